# SPDX-License-Identifier: Apache-2.0
"""Variable-length attention of one micro-batch whose sequences may span any number of ranks."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapless import _native
from gapless.distributed import ring
from gapless.distributed.ring_plan import RingPlan
from gapless.ops import registry, varlen
from gapless.ops.checks import (
    INT32_MAX,
    check_device,
    check_qkv,
    check_softcap,
    check_tensors,
    has_tangent,
    number,
    window_sides,
)
from gapless.ops.impl import Impl, choose
from gapless.schedule.shards import MicroBatch

REASONS = {
    "native": varlen.REASONS["native"],
    "triton": varlen.REASONS["triton"],
    "flash_attn": lambda x: ["it takes no part in rings"],
    "reference": lambda x: ["it takes no part in rings"],
}


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    micro_batch: MicroBatch,
    *,
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    micro_batch: MicroBatch,
    *,
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    micro_batch: MicroBatch,
    *,
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    micro_batch: MicroBatch,
    *,
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gapless.varlen_attention` over whole sequences, of which this rank holds some chunks.

    Every rank of every ring in ``micro_batch`` has to call it for the same step, layers in the same order, with the
    same mask, head sizes and dtype, also if it holds no token; ranks with different micro-batches do not wait for each
    other. If keys need gradients on one rank, they have to on all. Messages go from rank to rank of the one ``group``.
    On NCCL, let all ranks run a collective of the group before (:func:`gapless.distributed.agree` is one). Messages are
    nothing that a compiler traces: in a model that is compiled, call it from a function under torch.compiler.disable.

    Args:
        q: [tokens, heads, dim], the micro-batch's tokens in the order of ``micro_batch.pieces``.
        k: [tokens, kv_heads, dim].
        v: [tokens, kv_heads, dim_v].
        micro_batch: of this rank, from :meth:`gapless.schedule.Schedule.micro_batches`.
        group: whose ranks the schedule numbers; None is the default group.
        causal, window, softcap, scale: as there; positions are those in the whole sequences.
        alibi_slopes: float32 [heads], or [sequences, heads] with a row for each of the micro-batch's sequences, shard
            by shard, also for those that have no token here.
        sinks: [heads]; their gradient is this rank's part, to be summed over ranks as any parameter's.
        return_lse: also return the LSE.
        impl: as there; only "native" and "triton" take part in rings.

    Returns:
        out [tokens, heads, dim_v] in q's dtype, and with ``return_lse`` the LSE [heads, tokens], both differentiable.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, its value, and what would be right.
        PeerError: another rank is lost, or later than the group's timeout; the message says which, and in what pack.
    """
    _check(q, k, v, micro_batch, group, window, softcap, alibi_slopes, sinks)
    score = [q.shape[-1] ** -0.5 if scale is None else number("scale", scale), float(softcap)]
    left, right = (side if side <= INT32_MAX else -1 for side in window_sides("window", window))
    plan = RingPlan.of(
        micro_batch,
        causal=causal,
        window=(left, right),
        alibi=alibi_slopes is not None,
        device=q.device,
    )
    if alibi_slopes is not None and alibi_slopes.dim() == 2 and alibi_slopes.shape[0] != plan.sequences:
        raise ValueError(
            f"alibi_slopes has {alibi_slopes.shape[0]} rows: it has to have {plan.sequences}, "
            "one for each sequence of the micro-batch"
        )
    if not plan.rings:
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes.index_select(0, plan.own_sequences)
        return varlen.varlen_attention(
            q,
            k,
            v,
            plan.own.cu_seqlens_q,
            causal=causal,
            window=(left, right),
            softcap=softcap,
            scale=scale,
            alibi_slopes=slopes,
            sinks=sinks,
            return_lse=return_lse,
            plan=plan.own,
            impl=impl,
        )
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sinks))
    inputs = varlen.Inputs(
        q,
        k,
        v,
        alibi_slopes,
        sinks,
        None,
        None,
        softcap,
        needs_grad,
        return_lse,
        has_tangent(q, k, v, sinks),
    )
    forward, backward = _raw(choose(impl, REASONS, inputs))
    attention = ring.Attention(forward, backward, score, alibi_slopes, group)
    if needs_grad:
        out, lse = _RingAttention.apply(q, k, v, sinks, plan, attention)
    else:
        out, lse = ring.forward(plan, attention, q, k, v, sinks)
    return (out, lse) if return_lse else out


class _RingAttention(torch.autograd.Function):
    """Both directions of the ring, with the saved tensors between them."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, attention):
        out, lse = ring.forward(plan, attention, q, k, v, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan, ctx.attention = plan, attention
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, sinks = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dsinks = ring.backward(ctx.plan, ctx.attention, dout, dlse, q, k, v, out, lse, sinks)
        return dq, dk, dv, None if sinks is None else dsinks, None, None


def _raw(name: str):
    if name == "native":
        return _native.varlen_attention_fwd, _native.varlen_attention_bwd
    return registry.varlen_attention_fwd_triton, registry.varlen_attention_bwd_triton


def _check(q, k, v, micro_batch, group, window, softcap, alibi_slopes, sinks) -> None:
    if not isinstance(micro_batch, MicroBatch):
        raise TypeError(
            f"micro_batch is of type {type(micro_batch).__name__}: it has to be one of schedule.micro_batches(rank)"
        )
    check_qkv(q, k, v)
    check_softcap(softcap)
    for name, t in (("q", q), ("k", k)):
        if t.shape[0] != micro_batch.tokens:
            raise ValueError(
                f"{name} has {t.shape[0]} tokens: it has to have the {micro_batch.tokens} of rank "
                f"{micro_batch.rank}'s micro-batch in step {micro_batch.step}"
            )
    left, right = window_sides("window", window)
    if left < -1 or right < -1:
        raise ValueError(f"window is {tuple(window)}: it has to be (left, right), each -1 or at least 0")
    heads = q.shape[1]
    if alibi_slopes is not None:
        check_tensors(alibi_slopes=alibi_slopes)
        check_device("alibi_slopes", alibi_slopes, q)
        if alibi_slopes.dtype != torch.float32:
            raise TypeError(f"alibi_slopes is {alibi_slopes.dtype}: it has to be torch.float32")
        if alibi_slopes.dim() not in (1, 2) or alibi_slopes.shape[-1] != heads:
            raise ValueError(
                f"alibi_slopes has shape {list(alibi_slopes.shape)}: it has to be [{heads}] or [sequences, {heads}]"
            )
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes requires a gradient: it has none; detach it")
    if sinks is not None:
        check_tensors(sinks=sinks)
        check_device("sinks", sinks, q)
        if sinks.dtype not in (torch.float32, q.dtype):
            raise TypeError(f"sinks is {sinks.dtype}: it has to be torch.float32 or {q.dtype}")
        if list(sinks.shape) != [heads]:
            raise ValueError(f"sinks has shape {list(sinks.shape)}: it has to be [{heads}]")
    if all(len(shard.ranks) == 1 for shard in micro_batch.shards):
        return
    if not dist.is_initialized():
        raise ValueError(
            f"micro_batch of rank {micro_batch.rank} has packs on several ranks, and torch.distributed is not "
            "initialised: call dist.init_process_group"
        )
    if (rank := dist.get_rank(group)) != micro_batch.rank:
        raise ValueError(f"micro_batch is of rank {micro_batch.rank}: this is rank {rank} of the group")
