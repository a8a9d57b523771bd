# SPDX-License-Identifier: Apache-2.0
"""Attention over jagged nested tensors, which carry their lengths with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from gapless.ops.checks import check_device
from gapless.ops.impl import Impl
from gapless.ops.varlen import Options, varlen_attention
from gapless.plan.varlen import VarlenPlan

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def nested_attention(
    nt_q: Tensor,
    nt_k: Tensor,
    nt_v: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def nested_attention(
    nt_q: Tensor, nt_k: Tensor, nt_v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def nested_attention(
    nt_q: Tensor, nt_k: Tensor, nt_v: Tensor, *, return_lse: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
def nested_attention(
    nt_q: Tensor,
    nt_k: Tensor,
    nt_v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    plan: VarlenPlan | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gapless.varlen_attention` over nested tensors of ``layout=torch.jagged``.

    Args:
        nt_q: queries, [batch, jagged, heads, dim], or its ``transpose(1, 2)``, [batch, heads, jagged, dim], the form
            that torch's scaled_dot_product_attention takes. Which of the two it is shows in which dim is jagged.
        nt_k, nt_v: keys and values in the same form as ``nt_q``, with their own lengths; ``heads`` may be a multiple
            of their heads. ``nt_k`` and ``nt_v`` have the same lengths. Any sequence may be empty.
        causal, window, softcap, scale, alibi_slopes, sinks, plan, impl: as in :func:`gapless.varlen_attention`. Causal
            aligns at the bottom right where the lengths of queries and keys differ.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        A nested tensor in the form and with the lengths of ``nt_q``; with ``return_lse`` also the LSE, nested
        [batch, jagged, heads]. Both are differentiable.

    Raises:
        TypeError: an argument is no jagged nested tensor.
        ValueError: the forms, batches or devices differ, or ``nt_k`` and ``nt_v`` differ in length, or as in
            ``varlen_attention``.
    """
    jagged = {name: _jagged_dim(name, t) for name, t in (("nt_q", nt_q), ("nt_k", nt_k), ("nt_v", nt_v))}
    if len(set(jagged.values())) != 1:
        raise ValueError(f"the jagged dims are {jagged}: nt_q, nt_k and nt_v need the same form")
    for name, t in (("nt_k", nt_k), ("nt_v", nt_v)):
        check_device(name, t, nt_q, "nt_q")
        if t.shape[0] != nt_q.shape[0]:
            raise ValueError(
                f"{name} has {t.shape[0]} sequences, nt_q has {nt_q.shape[0]}: they have to be equal"
            )
    transposed = jagged["nt_q"] == 2
    if transposed:
        nt_q, nt_k, nt_v = (t.transpose(1, 2) for t in (nt_q, nt_k, nt_v))
    offsets_q, offsets_k, offsets_v = (_offsets(t) for t in (nt_q, nt_k, nt_v))
    if offsets_v is not offsets_k and not torch.equal(offsets_v, offsets_k):
        lengths = [offsets.diff().tolist() for offsets in (offsets_k, offsets_v)]
        raise ValueError(
            f"the lengths of nt_k are {lengths[0]}, those of nt_v are {lengths[1]}: they have to be equal"
        )
    result = varlen_attention(
        nt_q.values(),
        nt_k.values(),
        nt_v.values(),
        offsets_q,
        None if offsets_k is offsets_q else offsets_k,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
        plan=plan,
        impl=impl,
    )
    out = _nest(result[0] if isinstance(result, tuple) else result, nt_q)
    if transposed:
        out = out.transpose(1, 2)
    return (out, _nest(result[1].transpose(0, 1), nt_q)) if return_lse else out


def _offsets(t: Any) -> Tensor:  # Any: methods of nested tensors are not in Tensor's type
    return t.offsets()


def _jagged_dim(name: str, t: Any) -> int:
    if not getattr(t, "is_nested", False) or t.layout != torch.jagged:
        what = f"{t!r:.80}, of type {type(t).__name__}"
        if isinstance(t, Tensor):
            what = f"{'nested' if t.is_nested else 'dense'}, {t.layout}"
        raise TypeError(f"{name} is {what}: it has to be a jagged nested tensor")
    if t.dim() != 4:
        raise ValueError(f"{name} has {t.dim()} dims: it has to be [batch, jagged, heads, dim]")
    if t._ragged_idx not in (1, 2):
        raise ValueError(
            f"{name} is jagged in dim {t._ragged_idx}: it has to be in dim 1, or 2 where heads are in 1"
        )
    if t.lengths() is not None:
        raise ValueError(f"{name} has holes (lengths beside offsets): call .contiguous() on it")
    return t._ragged_idx


def _nest(values: Tensor, like: Tensor) -> Tensor:
    """``values`` with the offsets of ``like``, so that torch knows that both have the same jagged size."""
    return torch.nested.nested_tensor_from_jagged(values, offsets=_offsets(like))
