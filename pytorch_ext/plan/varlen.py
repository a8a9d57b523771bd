# SPDX-License-Identifier: Apache-2.0
"""The plan of a packed batch: tiles of queries and of keys, longest sequence first."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gapless import _planner

# Rows of one tile. CPU kernels take any size; Triton kernels want a multiple of their block.
BLOCKS = {"cpu": (768, 512), "cuda": (128, 128)}


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """Which tiles of a packed batch exist, in the order in which they should run.

    Attributes:
        cu_seqlens_q: int32 [batch + 1], first query token of each sequence, then the total.
        cu_seqlens_k: int32 [batch + 1], the same for keys.
        query_tiles: int32 [capacity, 3], rows ``(sequence, begin, end)`` counted from the first token of the
            sequence, costliest first; unused rows hold -1 in the first column and are at the end.
        key_tiles: int32 [capacity, 3], the same for keys; the tiles of one sequence follow one another in ascending
            order, sequences costliest first. A sequence that has queries but no keys has one empty tile.
        block_q: most queries in a tile.
        block_k: most keys in a tile.
        q_offset: int32 [batch], position among the keys of each sequence's first query; None aligns the last query with
            the last key. A part of the mask: the plan holds for no other offsets.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    query_tiles: Tensor
    key_tiles: Tensor
    block_q: int
    block_k: int
    q_offset: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def tensors(self) -> list[Tensor]:
        """What the raw operators take."""
        tensors = [self.cu_seqlens_q, self.cu_seqlens_k, self.query_tiles, self.key_tiles]
        return tensors if self.q_offset is None else [*tensors, self.q_offset]

    def to(self, device: torch.device | str) -> VarlenPlan:
        """The same plan with its tensors on ``device``."""
        cu_q, cu_k, query, key, *offset = (t.to(device, non_blocking=True) for t in self.tensors)
        return VarlenPlan(cu_q, cu_k, query, key, self.block_q, self.block_k, *offset)

    @staticmethod
    def make(
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        total_q: int | None = None,
        total_k: int | None = None,
        block_q: int | None = None,
        block_k: int | None = None,
        q_offset: Tensor | None = None,
    ) -> VarlenPlan:
        """Check the lengths of a packed batch and lay out its tiles.

        Args:
            cu_seqlens_q: int32 or int64 [batch + 1], starting at 0, never decreasing.
            cu_seqlens_k: the same for keys; None means the keys' lengths are the queries'.
            causal, window: the mask that the batch will run under. They decide the order of tiles, not their content:
                a plan stays right under any mask.
            total_q, total_k: tokens that the last entries have to equal, where known.
            block_q, block_k: most rows in a tile; None takes the device's default.
            q_offset: int32 [batch], position among the keys of each sequence's first query, any value; None aligns the
                last query with the last key.

        Raises:
            TypeError: a ``cu_seqlens`` is not of an integer type, or ``q_offset`` is not int32.
            ValueError: a ``cu_seqlens`` does not start at 0, decreases, or does not end at the total; a block below 1
                or a window below -1; a ``q_offset`` that is not [batch].
        """
        device = cu_seqlens_q.device
        default_q, default_k = BLOCKS["cuda" if device.type == "cuda" else "cpu"]
        block_q = default_q if block_q is None else block_q
        block_k = default_k if block_k is None else block_k
        host_q = _host(cu_seqlens_q, "cu_seqlens_q", total_q)
        # A copy: Dynamo does not trace an autograd.Function that is given one tensor twice.
        host_k = host_q.clone() if cu_seqlens_k is None else _host(cu_seqlens_k, "cu_seqlens_k", total_k)
        if host_q.shape != host_k.shape:
            raise ValueError(
                f"cu_seqlens_k has {host_k.shape[0]} entries, cu_seqlens_q has {host_q.shape[0]}: "
                "both need one for each sequence and one for the end"
            )
        offset = [] if q_offset is None else [_host_offset(q_offset, host_q.shape[0] - 1)]
        left, right = mask_window(causal, window)
        query_tiles, key_tiles = _planner.varlen_tiles(
            host_q.numpy(), host_k.numpy(), block_q, block_k, left, right, *(t.numpy() for t in offset)
        )
        plan = VarlenPlan(
            host_q,
            host_k,
            torch.from_numpy(query_tiles).view(-1, 3),
            torch.from_numpy(key_tiles).view(-1, 3),
            block_q,
            block_k,
            *offset,
        )
        return plan if device.type == "cpu" else plan.to(device)


def mask_window(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    """(left, right) with causal folded in: causal means that nothing to the right is seen."""
    return (window[0], 0) if causal else window


def _host(cu_seqlens: Tensor, name: str, total: int | None) -> Tensor:
    """int32 on the CPU, checked once: runs trust it."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {cu_seqlens.dtype}: it has to be int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} has shape {list(cu_seqlens.shape)}: it has to be [batch + 1]")
    host = cu_seqlens.detach().to("cpu", torch.int64).contiguous()
    _planner.check_cu_seqlens(host.numpy(), name, -1 if total is None else total)
    return host.to(torch.int32)


def _host_offset(q_offset: Tensor, batch: int) -> Tensor:
    """A copy on the CPU, which nobody changes."""
    check_q_offset(q_offset, batch)
    return q_offset.detach().to("cpu", copy=True).contiguous()


def check_q_offset(q_offset: object, batch: int) -> None:
    """Raise unless it is int32 [batch]."""
    if not isinstance(q_offset, Tensor):
        raise TypeError(f"q_offset is of type {type(q_offset).__name__}: it has to be a tensor")
    if q_offset.dtype != torch.int32:
        raise TypeError(f"q_offset is {q_offset.dtype}: it has to be torch.int32")
    if list(q_offset.shape) != [batch]:
        raise ValueError(f"q_offset has shape {list(q_offset.shape)}: it has to be [{batch}]")


class PlanCache:
    """The last plans, found again by the identity and version of the tensors they were made from.

    Inference tensors count no versions, so their plans are not kept: give ``plan=`` where that matters.
    Threads may share it.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self._plans: OrderedDict[tuple, tuple[list[weakref.ref], list[int], VarlenPlan]] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        *,
        window: tuple[int, int],
        total_q: int | None = None,
        total_k: int | None = None,
        q_offset: Tensor | None = None,
    ) -> VarlenPlan:
        """What :meth:`VarlenPlan.make` gives for these arguments, made once for each batch."""
        given = (cu_seqlens_q, cu_seqlens_k, q_offset)
        inputs = [t for t in given if t is not None]
        make = partial(
            VarlenPlan.make,
            cu_seqlens_q,
            cu_seqlens_k,
            window=window,
            total_q=total_q,
            total_k=total_k,
            q_offset=q_offset,
        )
        if any(t.is_inference() for t in inputs):
            return make()
        key = (*map(id, given), window, total_q, total_k)
        versions = [t._version for t in inputs]
        with self._lock:
            if found := self._plans.get(key):
                refs, made_from, plan = found
                # An id can be taken over by a new tensor: the weak references tell.
                if made_from == versions and all(r() is t for r, t in zip(refs, inputs, strict=True)):
                    self._plans.move_to_end(key)
                    return plan
        plan = make()
        with self._lock:
            self._plans[key] = ([weakref.ref(t) for t in inputs], versions, plan)
            self._plans.move_to_end(key)
            while len(self._plans) > self.capacity:
                self._plans.popitem(last=False)
        return plan


cache = PlanCache()
