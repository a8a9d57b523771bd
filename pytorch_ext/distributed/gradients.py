# SPDX-License-Identifier: Apache-2.0
"""One sum of gradients over all ranks, in flat buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapless.distributed.peers import PeerError

BUCKET_BYTES = 1 << 25
UNDER_WAY = 2  # buckets at once: one is sent while the next is filled


def sum_gradients(
    parameters: Iterable[nn.Parameter],
    group: dist.ProcessGroup | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Replace each gradient by the sum over all ranks; the same bits on every rank, in a fixed order of buckets.

    A parameter that has no gradient on some ranks counts as zeros there, one that has none on any rank keeps none, as
    in one process: optimizers tell none from zeros. To know, ranks exchange one byte for each parameter, once.

    Args:
        parameters: the same on all ranks, in the same order; one that comes twice (tied) is summed once, frozen ones
            are left out.
        group: None is the default group.
        dtype: in which sums are made, unless a gradient's own is wider; None is each gradient's own.
        bucket_bytes: most bytes of a bucket, unless a single gradient is larger.

    Raises:
        ValueError: a sparse gradient, or a bucket of fewer than 1 byte.
        PeerError: another rank is lost or late.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}: it has to be at least 1")
    wanted = list(dict.fromkeys(p for p in parameters if p.requires_grad))
    for i, p in enumerate(wanted):
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of parameter {i}, shape {list(p.shape)}, is {p.grad.layout}: it has to be dense"
            )
    if not dist.is_initialized() or dist.get_world_size(group) == 1 or not wanted:
        return
    try:
        present = torch.tensor([p.grad is not None for p in wanted], dtype=torch.uint8).to(wanted[0].device)
        dist.all_reduce(present, dist.ReduceOp.MAX, group)
        some = [p for p, has in zip(wanted, present.tolist(), strict=True) if has]
        pending: deque[tuple[list[nn.Parameter], Tensor, dist.Work]] = deque()
        for bucket in _buckets(some, bucket_bytes):
            if len(pending) == UNDER_WAY:
                _scatter(*pending.popleft())
            own = bucket[0].dtype
            flat = _gather(bucket, own if dtype is None else torch.promote_types(own, dtype))
            pending.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
        while pending:
            _scatter(*pending.popleft())
    except RuntimeError as error:
        raise PeerError(f"summing gradients: another rank is lost or late; see its log. {error}") from error


def _buckets(parameters: list[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype on one device."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        fits = (
            bucket and (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device) and size + p.nbytes <= most
        )
        if bucket and not fits:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.nbytes
    if bucket:
        yield bucket


def _gather(bucket: list[nn.Parameter], dtype: torch.dtype) -> Tensor:
    flat = torch.zeros(sum(p.numel() for p in bucket), dtype=dtype, device=bucket[0].device)
    for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        if p.grad is not None:
            part.view(p.shape).copy_(p.grad)
    return flat


def _scatter(bucket: list[nn.Parameter], flat: Tensor, work: dist.Work) -> None:
    work.wait()
    for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(part.view(p.shape))
