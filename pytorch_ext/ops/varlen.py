# SPDX-License-Identifier: Apache-2.0
"""Variable-length packed attention: the public function, its checks, its choice of implementation, its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapless import _native
from gapless.ops import registry
from gapless.ops.checks import (
    DTYPES,
    INT32_MAX,
    check_device,
    check_pages,
    check_qkv,
    check_range,
    check_softcap,
    check_tensors,
    has_tangent,
    key_shape,
    number,
    readable,
    window_sides,
)
from gapless.ops.impl import Impl, choose
from gapless.plan.varlen import VarlenPlan, cache, check_q_offset, mask_window
from gapless.reference import varlen as reference

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Inputs(NamedTuple):
    """Everything that decides which implementation can run."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seqused_k: Tensor | None
    block_table: Tensor | None
    softcap: float
    needs_grad: bool
    return_lse: bool
    has_tangent: bool = False  # of forward-mode derivatives
    q_offset: Tensor | None = None


def _flash_attn_reasons(x: Inputs) -> list[str]:
    why = registry.tangent_reasons(x.has_tangent) + registry.flash_attn_unusable(x.q.device)
    if x.q.dtype not in (torch.float16, torch.bfloat16):
        why.append(f"it takes float16 and bfloat16, not {x.q.dtype}")
    if x.q.shape[-1] % 8 or x.q.shape[-1] != x.v.shape[-1]:
        why.append("it needs equal head dims that are multiples of 8")
    if x.sinks is not None:
        why.append("it has no sinks")
    if x.seqused_k is not None or x.block_table is not None:
        why.append("its public varlen function has no seqused_k")
    if x.q_offset is not None:
        why.append("it has no q_offset")
    if x.return_lse and x.needs_grad:
        why.append("its LSE has no gradient")
    return why


REASONS = {
    "native": lambda x: registry.native_reasons(x.q, x.has_tangent),
    "triton": lambda x: registry.triton_reasons(x.q, x.has_tangent),
    "flash_attn": _flash_attn_reasons,
    "reference": lambda x: [],
}


class Options(TypedDict, total=False):
    """Keyword arguments of every attention function here, and their types."""

    causal: bool
    window: tuple[int, int]
    softcap: float
    scale: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    plan: VarlenPlan | None
    impl: Impl


class PagedOptions(Options, total=False):
    """And those about which keys are used, and where queries sit among them."""

    seqused_k: Tensor | None
    block_table: Tensor | None
    q_offset: Tensor | None


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PagedOptions],
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[PagedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    return_lse: bool,
    **options: Unpack[PagedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    q_offset: Tensor | None = None,
    return_lse: bool = False,
    plan: VarlenPlan | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a packed batch of sequences of different lengths, with no padding anywhere.

    Query ``i`` of a sequence with ``len_q`` queries and ``len_k`` keys sits at key position ``p = i + len_k - len_q``
    (bottom-right alignment, as in flash-attn), or, with ``q_offset``, at ``p = i + q_offset[sequence]``. It scores key
    ``j`` with ``s = scale * q_i . k_j``, then ``softcap * tanh(s / softcap)`` if ``softcap`` is set, then
    ``- slope * |p - j|`` with ALiBi.

    Args:
        q: queries, [tokens_q, heads, dim]; float32, bfloat16, float16 or float64.
        k: keys, [tokens_k, kv_heads, dim], or pages [num_pages, page_size, kv_heads, dim] with ``block_table``.
            ``heads`` is a multiple of ``kv_heads``: query head ``h`` reads kv head ``h // (heads / kv_heads)``.
        v: values, as ``k`` with ``dim_v`` in place of ``dim``.
        cu_seqlens_q: int32 or int64 [batch + 1], where each sequence begins, then the number of tokens.
        cu_seqlens_k: the same for keys; None: the lengths of the queries. With pages it is not read.
        causal: a query sees no key to the right of its own position.
        window: (left, right) keys seen beside the query's position, both inclusive; -1 is no limit (Mistral,
            arXiv:2310.06825).
        softcap: cap of the scores' size (Gemma 2, arXiv:2408.00118); 0 is none.
        scale: factor of the scores; None is ``dim ** -0.5``.
        alibi_slopes: float32 [heads] or [batch, heads] (ALiBi, arXiv:2108.12409); not differentiable.
        sinks: [heads], a learnable score per head that joins the softmax with no value (gpt-oss, arXiv:2508.10925).
        seqused_k: int32 [batch], how many of a sequence's keys are used; forward only.
        block_table: int32 [batch, max_pages], the pages of each sequence; needs ``seqused_k``; forward only.
        q_offset: int32 [batch], position among the keys of each sequence's first query, which may lie before or behind
            all of them: so any part of a sequence's queries can meet any part of its keys under the mask of the whole,
            and :func:`gapless.merge_attention` joins the results. None: bottom right.
        return_lse: also return the log-sum-exp of the scores.
        plan: from :meth:`gapless.VarlenPlan.make`; None makes one, or finds the one made before for these tensors. Its
            ``q_offset`` counts, whether it is given here again or not.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        out [tokens_q, heads, dim_v] in q's dtype; with ``return_lse`` also LSE [heads, tokens_q], natural logarithm,
        float32 (float64 for float64 inputs), which is differentiable too. A row that sees no key gives 0 and -inf
        (the sink's score, if there is one) and has zero gradients.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right.
    """
    if plan is not None and q_offset is alibi_slopes is sinks is None:
        found = _at_once(
            q, k, v, cu_seqlens_q, causal, window, softcap, scale, seqused_k, block_table, plan, impl
        )
        if found:
            return found if return_lse else found[0]
    bounds = _check(
        q, k, v, cu_seqlens_q, causal, window, softcap, alibi_slopes, sinks, seqused_k, block_table, plan
    )
    q_offset = _q_offset(q, cu_seqlens_q, q_offset, plan, mask_window(causal, window))
    scale = q.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )
    tangent = has_tangent(q, k, v, sinks)
    if (needs_grad or tangent) and (seqused_k is not None or block_table is not None):
        name = "seqused_k" if block_table is None else "block_table"
        raise ValueError(f"{name} is for inference: call it under torch.no_grad() or detach its inputs")
    inputs = Inputs(
        q,
        k,
        v,
        alibi_slopes,
        sinks,
        seqused_k,
        block_table,
        softcap,
        needs_grad,
        return_lse,
        tangent,
        q_offset,
    )
    name = choose(impl, REASONS, inputs)
    tensors = plan_tensors(q, k, cu_seqlens_q, cu_seqlens_k, block_table, bounds, plan, q_offset)
    if name != "native":  # whose operator looks at the values itself
        check_plan_values(q, k, tensors, seqused_k, block_table)
    if name == "reference":
        out, lse = reference.varlen_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            window=bounds,
            softcap=softcap,
            scale=scale,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            seqused_k=seqused_k,
            block_table=block_table,
            q_offset=q_offset,
        )
        return (out, lse) if return_lse else out
    if name == "flash_attn":
        return registry.flash_attn_varlen(inputs, cu_seqlens_q, cu_seqlens_k, scale, bounds)
    score, limits = [scale, float(softcap)], list(bounds)
    try:
        if needs_grad:
            if torch.compiler.is_compiling():  # Dynamo traces no Function that is given one tensor twice
                k, v = k.view_as(k), v.view_as(v)
            out, lse = _VarlenAttention.apply(q, k, v, alibi_slopes, sinks, score, limits, name, *tensors)
        else:
            fwd = _native.varlen_attention_fwd if name == "native" else registry.varlen_attention_fwd_triton
            out, lse = fwd(q, k, v, tensors, seqused_k, block_table, alibi_slopes, sinks, score, limits)
    except RuntimeError:
        check_plan_values(q, k, tensors, seqused_k, block_table)
        raise
    return (out, lse) if return_lse else out


def _at_once(
    q, k, v, cu_seqlens_q, causal, window, softcap, scale, seqused_k, block_table, plan, impl
) -> tuple[Tensor, Tensor] | None:
    """The native operator's results, if it may run before all is checked and finds nothing wrong."""
    if not isinstance(plan, VarlenPlan):
        return None
    tensors = plan.tensors
    if (
        not registry.native_at_once(impl, q, k, v, cu_seqlens_q, seqused_k, block_table, *tensors)
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or has_tangent(q, k, v)
    ):
        return None
    try:
        left, right = window
        score = [q.shape[-1] ** -0.5 if scale is None else number("scale", scale), number("softcap", softcap)]
        if (
            score[1] < 0
            or not (type(left) is type(right) is int and right >= -1)
            or cu_seqlens_q.dtype not in (torch.int32, torch.int64)
            or cu_seqlens_q.shape != tensors[0].shape
        ):
            return None
        limits = [left, 0 if causal else right]
        return _native.varlen_attention_fwd(
            q, k, v, tensors, seqused_k, block_table, None, None, score, limits
        )
    except Exception:  # the checks say it better
        return None


class _VarlenAttention(torch.autograd.Function):
    """Raw forward and backward operators, with the saved tensors between them."""

    @staticmethod
    def forward(ctx, q, k, v, alibi_slopes, sinks, score, window, name, *plan):
        fwd = _native.varlen_attention_fwd if name == "native" else registry.varlen_attention_fwd_triton
        out, lse = fwd(q, k, v, list(plan), None, None, alibi_slopes, sinks, score, window)
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, sinks, *plan)
        ctx.score, ctx.window, ctx.name = score, window, name
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, alibi_slopes, sinks, *plan = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        bwd = _native.varlen_attention_bwd if ctx.name == "native" else registry.varlen_attention_bwd_triton
        dq, dk, dv, dsinks = bwd(
            dout, dlse, q, k, v, out, lse, plan, alibi_slopes, sinks, ctx.score, ctx.window
        )
        return dq, dk, dv, None, None if sinks is None else dsinks, *[None] * (3 + len(plan))


def plan_tensors(q, k, cu_seqlens_q, cu_seqlens_k, block_table, window, plan, q_offset=None) -> list[Tensor]:
    paged, device = block_table is not None, q.device
    total_k = None if paged else k.shape[0]
    if plan is not None:
        batch = cu_seqlens_q.shape[0] - 1
        if plan.batch != batch:
            raise ValueError(f"plan is for {plan.batch} sequences, cu_seqlens_q has {batch}")
        if plan.cu_seqlens_q.device != device:
            raise ValueError(
                f"plan is on {plan.cu_seqlens_q.device}, q is on {device}: call plan.to(q.device)"
            )
        return plan.tensors
    if paged:
        cu_seqlens_k = None
    elif cu_seqlens_k is not None:
        check_tensors(cu_seqlens_k=cu_seqlens_k)
    elif q.shape[0] != total_k:
        raise ValueError(
            f"k has {total_k} tokens, q has {q.shape[0]}: give cu_seqlens_k where the lengths differ"
        )
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_device(name, t, q)
    if torch.compiler.is_compiling():
        lengths = cu_seqlens_q, cu_seqlens_k, q.shape[0], total_k
        made = list(registry.varlen_plan(*lengths, list(window), q_offset))
        return made if q_offset is None else [*made, q_offset.contiguous()]
    found = cache.get(
        cu_seqlens_q,
        cu_seqlens_k,
        window=window,
        total_q=q.shape[0],
        total_k=q.shape[0] if paged or cu_seqlens_k is None else total_k,
        q_offset=q_offset,
    )
    return found.tensors


def _check(
    q, k, v, cu_seqlens_q, causal, window, softcap, alibi_slopes, sinks, seqused_k, block_table, plan
) -> tuple[int, int]:
    """Everything that types, shapes and dtypes tell; returns the window with causal folded in."""
    check_qkv(q, k, v, paged=block_table is not None)
    check_tensors(cu_seqlens_q=cu_seqlens_q)
    heads = q.shape[1]
    check_softcap(softcap)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"cu_seqlens_q has shape {list(cu_seqlens_q.shape)}: it has to be [batch + 1]")
    if cu_seqlens_q.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens_q is {cu_seqlens_q.dtype}: it has to be int32 or int64")
    if plan is not None and not isinstance(plan, VarlenPlan):
        raise TypeError(f"plan is {plan!r:.80}, of type {type(plan).__name__}: it has to be a VarlenPlan")
    batch = cu_seqlens_q.shape[0] - 1
    if alibi_slopes is not None:
        _check_side("alibi_slopes", alibi_slopes, q, (torch.float32,), [[heads], [batch, heads]])
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes requires a gradient: it has none; detach it")
    if sinks is not None:
        _check_side("sinks", sinks, q, (torch.float32, q.dtype), [[heads]])
    if seqused_k is not None:
        _check_side("seqused_k", seqused_k, q, (torch.int32,), [[batch]])
    if block_table is not None:
        if seqused_k is None:
            raise ValueError("block_table is given, seqused_k is not: pages need the length of each sequence")
        columns = max([1, *block_table.shape[-1:]]) if isinstance(block_table, Tensor) else 1
        _check_side("block_table", block_table, q, (torch.int32,), [[batch, columns]])
        if k.shape[1] == 0:
            raise ValueError(f"k has shape {list(k.shape)}: its pages, {key_shape(True)}, have to hold a key")
    left, right = window_sides("window", window)
    if left < -1 or right < -1:
        raise ValueError(f"window is {tuple(window)}: it has to be (left, right), each -1 or at least 0")
    # No sequence is longer than int32 tells: a wider window is no limit.
    return mask_window(causal, (left if left <= INT32_MAX else -1, right if right <= INT32_MAX else -1))


def _q_offset(q, cu_seqlens_q, q_offset, plan, window) -> Tensor | None:
    """The offsets that count: those of the plan, if there is one."""
    if q_offset is not None:
        check_q_offset(q_offset, cu_seqlens_q.shape[0] - 1)
        check_device("q_offset", q_offset, q)
        if plan is not None:
            _check_same_offsets(q_offset, plan.q_offset)
    if plan is not None:
        q_offset = plan.q_offset
    if q_offset is not None and max(window) > INT32_MAX:  # which is a limit to a query 2^32 away
        raise ValueError(
            f"window is {tuple(window)}: with q_offset each has to be at most {INT32_MAX}, or -1 for no limit"
        )
    return q_offset


def _check_same_offsets(q_offset: Tensor, of_plan: Tensor | None) -> None:
    if of_plan is None:
        raise ValueError("plan has no q_offset, q_offset is given: give it to VarlenPlan.make, too")
    if readable(q_offset, of_plan) and q_offset.shape == of_plan.shape and not torch.equal(q_offset, of_plan):
        raise ValueError(
            f"q_offset is {q_offset.tolist()!s:.80}, plan.q_offset is {of_plan.tolist()!s:.80}: "
            "they have to be the same"
        )


def _check_side(name: str, t: Any, q: Tensor, dtypes: tuple, shapes: list[list[int]]) -> None:
    check_tensors(**{name: t})
    if t.dtype not in dtypes:
        raise TypeError(
            f"{name} is {t.dtype}: it has to be {' or '.join(str(d) for d in dict.fromkeys(dtypes))}"
        )
    if list(t.shape) not in shapes:
        raise ValueError(f"{name} has shape {list(t.shape)}: it has to be {' or '.join(map(str, shapes))}")
    check_device(name, t, q)


def check_plan_values(q, k, plan: list[Tensor], seqused_k=None, block_table=None) -> None:
    """What only values tell, where they can be read: before a run that trusts them, after a run that refused them."""
    if not readable(*plan, seqused_k, block_table):
        return
    keys = None if block_table is not None else k
    for name, cu_seqlens, t in (("q", plan[0], q), ("k", plan[1], keys)):
        if t is not None and cu_seqlens[-1] != t.shape[0]:
            raise ValueError(
                f"plan.cu_seqlens_{name} ends at {cu_seqlens[-1]}: it has to end at {t.shape[0]}, the tokens of {name}"
            )
    if block_table is not None:
        check_pages(block_table, seqused_k, k.shape[1], k.shape[0])
    elif seqused_k is not None:
        check_range("seqused_k", seqused_k, 0, plan[1].diff().numpy(), "the keys of its sequence")


@overload
def merge_attention(
    outs: list[Tensor], lses: list[Tensor], *, return_lse: Literal[False] = False
) -> Tensor: ...
@overload
def merge_attention(
    outs: list[Tensor], lses: list[Tensor], *, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def merge_attention(
    outs: list[Tensor], lses: list[Tensor], *, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def merge_attention(
    outs: list[Tensor], lses: list[Tensor], *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the results over each set.

    Args:
        outs: results, each [tokens, heads, dim]; float32, bfloat16, float16 or float64.
        lses: their log-sum-exps, each [heads, tokens], float32 (float64). A row of -inf saw no key and adds nothing.

    Returns:
        out [tokens, heads, dim], and with ``return_lse`` the LSE [heads, tokens] of the union. Differentiable.

    Raises:
        TypeError: something else than a list (or tuple) of tensors, or a dtype that is not taken.
        ValueError: not as many ``lses`` as ``outs``, none at all, or shapes or devices that do not agree.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} is of type {type(parts).__name__}: it has to be a list of tensors")
        check_tensors(**{f"{name}[{i}]": t for i, t in enumerate(parts)})
    if len(outs) != len(lses) or not outs:
        raise ValueError(
            f"there are {len(outs)} outs and {len(lses)} lses: each out needs its lse, and at least one"
        )
    dtype, device, shape = outs[0].dtype, outs[0].device, outs[0].shape
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dtype != dtype or dtype not in DTYPES:
            raise TypeError(
                f"outs[{i}] is {out.dtype}: it has to be float32, bfloat16, float16 or float64, the same for all"
            )
        if lse.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"lses[{i}] is {lse.dtype}: it has to be float32 (or float64)")
        if out.dim() != 3 or out.shape != shape or lse.shape != (shape[1], shape[0]):
            raise ValueError(
                f"outs[{i}] has shape {list(out.shape)}, lses[{i}] has {list(lse.shape)}: they have to be "
                "[tokens, heads, dim], the same for all, and [heads, tokens]"
            )
        if out.device != device or lse.device != device:
            raise ValueError(
                f"outs[{i}] is on {out.device}, lses[{i}] on {lse.device}: they have to be on {device}, as outs[0]"
            )
    out, lse = reference.merge_attention(outs, lses)
    return (out, lse) if return_lse else out
