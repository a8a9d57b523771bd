# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention and the attention mass of blocks: public functions, checks, implementations, gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapless import _native
from gapless.ops import registry
from gapless.ops.checks import (
    check_device,
    check_qkv,
    check_shape,
    check_softcap,
    check_tensors,
    has_tangent,
    number,
    readable,
)
from gapless.ops.impl import Impl, choose
from gapless.ops.varlen import check_plan_values, plan_tensors
from gapless.plan.block_grid import BLOCK_SIZES, lengths_of
from gapless.plan.block_layout import BlockLayout
from gapless.plan.block_plan import BlockPlan
from gapless.plan.varlen import VarlenPlan
from gapless.reference import block_sparse as reference
from gapless.reference import varlen_attention as dense_reference

FORWARD = (
    9  # tensors that a forward pass reads: a layout's and its order; after them the transposed lists come
)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
    plan: BlockPlan | None = None,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
    plan: BlockPlan | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool,
    plan: BlockPlan | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    plan: BlockPlan | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the pairs of a query block and a key block that a layout keeps; no other pair is computed.

    Otherwise it is :func:`gapless.varlen_attention`: packed sequences, exact at lengths off the block size, aligned at
    the bottom right, the same scores. The layout is the plan: every layer and step can run over it.

    Args:
        q: queries, [tokens_q, heads, dim]; float32, bfloat16, float16 or float64.
        k: keys, [tokens_k, kv_heads, dim]. ``heads`` is a multiple of ``kv_heads``: query head ``h`` reads kv head
            ``h // (heads / kv_heads)``.
        v: values, [tokens_k, kv_heads, dim_v].
        layout: which blocks; its sequences add up to the tokens of q and k. Of its P pattern heads, query head ``h``
            reads ``h // (heads / P)``: P is 1, ``heads``, or any divisor of ``heads`` that divides ``kv_heads`` or that
            ``kv_heads`` divides.
        causal: a query sees no key to the right of its own position, in blocks that the layout keeps.
        scale: factor of the scores; None is ``dim ** -0.5``.
        softcap: cap of the scores' size (Gemma 2, arXiv:2408.00118); 0 is none.
        return_lse: also return the log-sum-exp of the scores.
        plan: from ``layout.plan(causal)``; None works it out at the first run and keeps it in the layout.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        out [tokens_q, heads, dim_v] in q's dtype; with ``return_lse`` also LSE [heads, tokens_q], natural logarithm,
        float32 (float64 for float64 inputs), which is differentiable too. A row that sees no key gives 0 and -inf and
        has zero gradients; a key that no row sees has zero gradients.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right.
    """
    check_qkv(q, k, v)
    _check_layout(layout, q, k)
    _check_plan(plan, layout, causal)
    check_softcap(softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    name = choose(impl, registry.REASONS, registry.Inputs(q, has_tangent(q, k, v)))
    if name == "reference":
        out, lse = reference.block_sparse_attention(
            q, k, v, layout, causal=causal, scale=scale, softcap=softcap
        )
        return (out, lse) if return_lse else out
    blocks = [layout.block_q, layout.block_k, layout.heads]
    score, window = [scale, float(softcap)], _window(causal)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    tensors = layout.tensors
    if name == "triton":
        plan = plan or layout.plan(causal, backward=needs_grad)
        tensors = [*tensors, plan.order, *((plan.transposed or layout.transposed) if needs_grad else ())]
    if not needs_grad:
        out, lse = _forward(name)(q, k, v, tensors, blocks, score, window)
    else:
        if torch.compiler.is_compiling():  # Dynamo traces no Function that is given one tensor twice
            k, v, tensors = k.view_as(k), v.view_as(v), [t.view_as(t) for t in tensors]
        out, lse = _BlockSparseAttention.apply(q, k, v, blocks, score, window, name, *tensors)
    return (out, lse) if return_lse else out


def _forward(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return _native.block_sparse_fwd if name == "native" else registry.block_sparse_fwd_triton


class _BlockSparseAttention(torch.autograd.Function):
    """Raw forward and backward operators, with the saved tensors between them."""

    @staticmethod
    def forward(ctx, q, k, v, blocks, score, window, name, *layout):
        out, lse = _forward(name)(q, k, v, list(layout[:FORWARD]), blocks, score, window)
        ctx.save_for_backward(q, k, v, out, lse, *layout)
        ctx.blocks, ctx.score, ctx.window, ctx.name = blocks, score, window, name
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *layout = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        bwd = _native.block_sparse_bwd if ctx.name == "native" else registry.block_sparse_bwd_triton
        dq, dk, dv = bwd(dout, dlse, q, k, v, out, lse, layout, ctx.blocks, ctx.score, ctx.window)
        return dq, dk, dv, *[None] * (4 + len(layout))


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    plan: VarlenPlan | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """How much attention each block gets: the sum of its softmax weights (AdaSpa, arXiv:2502.21079, equation 13).

    The second pass of AdaSpa's search: with the LSE of this step it is exact; with that of an earlier step every row
    is off by a factor of its own. It reads no values. For inference: nothing here has a gradient.

    Args:
        q: queries, [tokens_q, heads, dim]; float32, bfloat16, float16 or float64.
        k: keys, [tokens_k, kv_heads, dim], as in :func:`gapless.varlen_attention`.
        lse: [heads, tokens_q], natural logarithm, float32 (float64 for float64), from an attention function here.
        cu_seqlens_q: int32 or int64 [batch + 1], where each sequence begins, then the number of tokens.
        cu_seqlens_k: the same for keys; None: the lengths of the queries. The shape of the result depends on both:
            those of a device are waited for once for each batch of several sequences.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256; blocks restart at each sequence.
        causal, scale, softcap: as they were when ``lse`` was computed.
        plan: from :meth:`gapless.VarlenPlan.make`; None makes one, or finds the one made before for these tensors.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        mass [heads, q_blocks, max_k_blocks], float32 (float64 for float64): query blocks of all sequences one after
        another, key blocks counted from their sequence's first, 0 beyond its last. The mass of a query block adds up
        to the number of its rows that see a key. A row of LSE -inf has none.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right.
    """
    check_tensors(q=q, k=k, lse=lse)
    check_qkv(q, k, k)
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise TypeError(f"lse is {lse.dtype}: for q of {q.dtype} it has to be {wanted}")
    check_shape("lse", lse, [q.shape[1], q.shape[0]])
    check_device("lse", lse, q)
    _check_inference(q=q, k=k, lse=lse)
    run = _DenseRun.of(q, k, cu_seqlens_q, cu_seqlens_k, block_q, block_k, causal, scale, softcap, plan, impl)
    if run.name == "reference":
        return reference.block_mass(q, k, lse, **run.reference_options)
    mass = _native.block_mass if run.name == "native" else registry.block_mass_triton
    return mass(q, k, lse, run.plan, run.blocks, run.score, run.window)


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    plan: VarlenPlan | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gapless.varlen_attention` and :func:`block_mass` in one (AdaSpa's fused search), cheaper than both.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, softcap, plan, impl: as in
            :func:`gapless.varlen_attention`, without gradients.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.

    Returns:
        (out, LSE, mass), as those two return them.

    Raises:
        TypeError, ValueError: as those two.
    """
    check_qkv(q, k, v)
    _check_inference(q=q, k=k, v=v)
    run = _DenseRun.of(q, k, cu_seqlens_q, cu_seqlens_k, block_q, block_k, causal, scale, softcap, plan, impl)
    if run.name == "reference":
        options = run.reference_options
        dense = {key: options[key] for key in ("causal", "scale", "softcap")}
        out, lse = dense_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, **dense)
        return out, lse, reference.block_mass(q, k, lse, **options)
    fwd = _native.attention_mass_fwd if run.name == "native" else registry.attention_mass_fwd_triton
    return fwd(q, k, v, run.plan, run.blocks, run.score, run.window)


class _DenseRun(NamedTuple):
    """What the two functions over all blocks of a packed batch find out from their arguments."""

    name: str
    plan: list[Tensor]
    blocks: list[int]
    score: list[float]
    window: list[int]
    reference_options: dict[str, Any]

    @staticmethod
    def of(
        q, k, cu_seqlens_q, cu_seqlens_k, block_q, block_k, causal, scale, softcap, plan, impl
    ) -> _DenseRun:
        for name, block in (("block_q", block_q), ("block_k", block_k)):
            if isinstance(block, bool) or block not in BLOCK_SIZES:
                sizes = ", ".join(map(str, BLOCK_SIZES))
                raise ValueError(f"{name} is {block!r:.80}: it has to be one of {sizes}")
        check_softcap(softcap)
        scale = q.shape[-1] ** -0.5 if scale is None else number("scale", scale)
        if plan is not None and not isinstance(plan, VarlenPlan):
            raise TypeError(f"plan is {plan!r:.80}, of type {type(plan).__name__}: it has to be a VarlenPlan")
        if plan is not None and plan.q_offset is not None:
            raise ValueError("plan has a q_offset: blocks and their mass are aligned at the bottom right")
        window = _window(causal)
        check_tensors(cu_seqlens_q=cu_seqlens_q)
        tensors = plan_tensors(q, k, cu_seqlens_q, cu_seqlens_k, None, tuple(window), plan)
        check_plan_values(q, k, tensors)
        blocks = [block_q, block_k, *_block_counts(q, k, tensors[0], tensors[1], block_q, block_k)]
        return _DenseRun(
            choose(impl, registry.REASONS, registry.Inputs(q)),
            tensors,
            blocks,
            [scale, float(softcap)],
            window,
            {
                "cu_seqlens_q": cu_seqlens_q,
                "cu_seqlens_k": cu_seqlens_k,
                "block_q": block_q,
                "block_k": block_k,
                "causal": causal,
                "scale": scale,
                "softcap": softcap,
            },
        )


def _block_counts(q, k, cu_seqlens_q, cu_seqlens_k, block_q, block_k) -> tuple[int, int]:
    """(query blocks of all sequences, most key blocks of one)."""
    if cu_seqlens_q.shape[0] == 2 and not readable(cu_seqlens_q, cu_seqlens_k):
        return -(-q.shape[0] // block_q), -(-k.shape[0] // block_k)  # shapes tell the lengths of one sequence
    lengths_q, lengths_k = lengths_of(cu_seqlens_q, "cu_seqlens_q"), lengths_of(cu_seqlens_k, "cu_seqlens_k")
    return sum(-(-n // block_q) for n in lengths_q), max((-(-n // block_k) for n in lengths_k), default=0)


def _window(causal: bool) -> list[int]:
    return [-1, 0 if causal else -1]


def _check_inference(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if (t.requires_grad and torch.is_grad_enabled()) or has_tangent(t):
            raise ValueError(f"{name} requires a gradient: the mass has none; call it under torch.no_grad()")


def _check_plan(plan: BlockPlan | None, layout: BlockLayout, causal: bool) -> None:
    if plan is None:
        return
    if not isinstance(plan, BlockPlan):
        raise TypeError(f"plan is {plan!r:.80}, of type {type(plan).__name__}: it has to be a BlockPlan")
    if plan.layout is not layout:
        raise ValueError(f"plan is of {plan.layout!r}, layout is {layout!r}: call layout.plan(causal)")
    if plan.causal != bool(causal):
        raise ValueError(f"plan is for causal={plan.causal}, causal is {causal}: call layout.plan({causal})")


def _check_layout(layout: BlockLayout, q: Tensor, k: Tensor) -> None:
    """Everything about a layout that q and k tell; its own insides were checked when it was made."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout is {layout!r:.80}, of type {type(layout).__name__}: it has to be a BlockLayout"
        )
    if layout.device != q.device:
        raise ValueError(f"layout is on {layout.device}, q is on {q.device}: call layout.to(q.device)")
    for side, t, lengths in (("q", q, layout.grid.lengths_q), ("k", k, layout.grid.lengths_k)):
        if sum(lengths) != t.shape[0]:
            raise ValueError(
                f"layout is for {sum(lengths)} tokens in {len(lengths)} sequences, {side} has {t.shape[0]} tokens"
            )
    heads, kv_heads, pattern_heads = q.shape[1], k.shape[1], layout.heads
    if heads % pattern_heads or (kv_heads % pattern_heads and pattern_heads % kv_heads):
        raise ValueError(
            f"layout has {pattern_heads} heads, q has {heads}, k has {kv_heads}: it has to have 1, {kv_heads}, "
            f"{heads}, or another divisor of {heads} that divides {kv_heads} or is a multiple of it"
        )
