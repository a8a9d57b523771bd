# SPDX-License-Identifier: Apache-2.0
"""Packed batches for tests, and what the reference says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gapless import reference
from gapless.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Batch:
    """A packed batch and the gradients that arrive at its results."""

    q: Tensor  # [tokens_q, heads, dim]
    k: Tensor  # [tokens_k, kv_heads, dim]
    v: Tensor  # [tokens_k, kv_heads, dim_v]
    cu_seqlens_q: Tensor  # int32 [batch + 1]
    cu_seqlens_k: Tensor | None  # None: as the queries'
    dout: Tensor  # [tokens_q, heads, dim_v]
    dlse: Tensor  # [heads, tokens_q], float32 or float64


class Results(NamedTuple):
    """What attention gives; gradients are None where they were not asked for."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dsinks: Tensor | None = None


def cumulative(lengths: Sequence[int]) -> Tensor:
    """``cu_seqlens`` of ``lengths``: int32 [batch + 1]."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def make_batch(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 16,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    non_contiguous: bool = False,
) -> Batch:
    """Normally distributed inputs, the same values in every dtype up to rounding.

    With ``non_contiguous`` every tensor is a window into a larger one stored head by head, whose other entries are
    NaN: a read outside the window shows.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    dim_v = dim if dim_v is None else dim_v
    tokens_q, tokens_k = sum(lengths_q), sum(lengths_q if lengths_k is None else lengths_k)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return _window(x) if non_contiguous else x

    return Batch(
        q=draw(tokens_q, heads, dim),
        k=draw(tokens_k, kv_heads, dim),
        v=draw(tokens_k, kv_heads, dim_v),
        cu_seqlens_q=cumulative(lengths_q),
        cu_seqlens_k=None if lengths_k is None else cumulative(lengths_k),
        dout=draw(tokens_q, heads, dim_v),
        dlse=draw(heads, tokens_q, dtype=wide),
    )


def _window(x: Tensor) -> Tensor:
    """The values of ``x`` inside a larger tensor of NaN, with its first two axes swapped in memory."""
    sizes = list(x.shape)
    sizes[0], sizes[1] = sizes[1], sizes[0]
    holder = x.new_full([n + 3 for n in sizes], torch.nan)
    view = holder.transpose(0, 1)[tuple(slice(1, n + 1) for n in x.shape)]
    view.copy_(x)
    return view


def attend(
    function: Callable[..., Any],
    batch: Batch,
    *,
    grad: bool = True,
    sinks: Tensor | None = None,
    dlse: bool = True,
    **options: Any,
) -> Results:
    """Call ``function``, which has the signature of :func:`gapless.varlen_attention`, and differentiate it.

    Args:
        function: what to call; it is asked for the LSE.
        batch: inputs and incoming gradients.
        grad: differentiate with respect to q, k, v and the sinks.
        sinks: [heads] or None.
        dlse: let a gradient arrive at the LSE too.
        options: passed on.
    """
    leaves = [x.detach().requires_grad_(grad) for x in (batch.q, batch.k, batch.v)]
    if sinks is not None:
        sinks = sinks.detach().requires_grad_(grad)
    out, lse = function(
        *leaves, batch.cu_seqlens_q, batch.cu_seqlens_k, sinks=sinks, return_lse=True, **options
    )
    if not grad:
        return Results(out, lse)
    targets = leaves if sinks is None else [*leaves, sinks]
    pairs = [(out, batch.dout), (lse, batch.dlse)] if dlse else [(out, batch.dout)]
    pairs = [
        (x, dx) for x, dx in pairs if x.requires_grad
    ]  # the reference of an empty batch touches no input
    found: Sequence[Tensor] = [torch.zeros_like(x) for x in targets]
    if pairs:
        outputs, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, targets, gradients, allow_unused=True, materialize_grads=True)
    return Results(out.detach(), lse.detach(), *found)


def _reference(*args: Any, return_lse: bool, **options: Any) -> tuple[Tensor, Tensor]:
    return reference.varlen_attention(*args, **options)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def oracle_and_witness(
    batch: Batch,
    *,
    grad: bool = True,
    sinks: Tensor | None = None,
    dlse: bool = True,
    **options: Any,
) -> tuple[Results, Results]:
    """The reference in float64, and in the dtype of the batch; arguments as in :func:`attend`."""
    wide = Batch(**{name: _double(value) for name, value in vars(batch).items()})
    wide_options = {name: _double(value) for name, value in options.items()}
    oracle = attend(_reference, wide, grad=grad, sinks=_double(sinks), dlse=dlse, **wide_options)
    return oracle, attend(_reference, batch, grad=grad, sinks=sinks, dlse=dlse, **options)


def assert_results(
    actual: Results, oracle: Results, witness: Results, *, factor: float = 2.0, reason: str | None = None
) -> None:
    """Every part of ``actual`` is within the budget; float64 may differ from the oracle by its own rounding."""
    if actual.out.dtype == torch.float64 and reason is None:
        factor, reason = 64.0, "the witness is the oracle itself: only the order of sums differs"
    for name in Results._fields:
        got, want, naive = (getattr(x, name) for x in (actual, oracle, witness))
        assert (got is None) == (want is None), f"{name} is {'missing' if got is None else 'not expected'}"
        if got is not None:
            assert_within_budget(got, want, naive, factor=factor, reason=reason, name=name)
