# SPDX-License-Identifier: Apache-2.0
"""Varlen attention in Triton: one program per tile of the plan and head, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.attention_config import Config, configure
from gapless.kernels.attention_launch import constants, deltas, dense, sides
from gapless.kernels.attention_steps import attend, collect_dkdv, collect_dq, finish, load_lse
from gapless.kernels.attention_tiles import LOG2E, key_rows, load_rows, near, span, store_rows


@triton.jit
def _attend(
    acc, top, total, q, position, begin, end, length, parts, stored, tokens,
    k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, beyond, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from ``begin`` to ``end``; ``parts``, if any, gets the LSE over each tile."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < length if MASKED else None
        k_rows = key_rows(k, keys, inside, pages, page_size, k_page, k_token)
        v_rows = key_rows(v, keys, inside, pages, page_size, v_page, v_token)
        acc, top, total, part = attend(
            acc, top, total, q, position, keys, inside, length, None, None, k_rows, v_rows,
            scale, softcap, slope, beyond, left, right, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, MASKED, UPCAST,
        )  # fmt: skip
        if parts is not None:
            none = part == 0.0
            log = tl.where(none, -float("inf"), top + tl.log2(tl.where(none, 1.0, part)))
            tl.store(parts + tl.cast(start // BLOCK_N, tl.int64) * tokens, log, mask=stored)
    return acc, top, total


@triton.jit(do_not_specialize=["tokens", "page_size", "left", "right", "parts_head"])
def fwd_kernel(
    q, k, v, out, lse, cu_q, cu_k, tiles, used, q_offset, pages, slopes, sinks, parts,
    q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head, pages_row, slopes_row,
    tokens, page_size, parts_head, scale, softcap, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and LSE of one query tile and head. Heads run fastest, so that neighbours share keys in the cache.

    ``parts`` [heads, key tiles, tokens], if any, gets the LSE over each tile of BLOCK_N keys alone, in powers of two.
    """
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * 3
    sequence = tl.load(tile)
    if sequence < 0:
        return
    begin = tl.load(tile + 1)
    end = tl.load(tile + 2)
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    first_key = tl.load(cu_k + sequence)
    length = tl.load(cu_k + sequence + 1) - first_key if used is None else tl.load(used + sequence)
    shift = length - queries
    beyond = None
    if q_offset is not None:
        given = tl.load(q_offset + sequence).to(tl.int64)
        shift = near(given, queries, length)
        beyond = tl.abs(given - shift).to(tl.float32)
        if left is not None:
            left = shift - near(given - left, queries, length)
        if right is not None:
            right = near(given + right + 1, queries, length) - 1 - shift
    sequence = sequence.to(tl.int64)
    head = head.to(tl.int64)
    q += first.to(tl.int64) * q_token + head * q_head
    out += (first.to(tl.int64) * HEADS + head) * DIM_V
    lse += head * tokens + first
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    if pages is None:
        k += first_key.to(tl.int64) * k_token
        v += first_key.to(tl.int64) * v_token
    else:
        pages += sequence * pages_row
    slope = None if slopes is None else tl.load(slopes + sequence * slopes_row + head)

    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < end
        position = rows + shift
        qt = load_rows(q + rows.to(tl.int64) * q_token, inside, DIM, BLOCK_DIM, UPCAST)
        # A sink is a key without a value that every row sees first.
        if sinks is None:
            top = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
        else:
            top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
            total = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM_V], tl.float32)
        parts_of = None if parts is None else parts + head * parts_head + first + rows
        low, full_low, full_high, high = span(
            start + shift, tl.minimum(start + BLOCK_M, end) - 1 + shift, length, left, right, BLOCK_N
        )
        if left is not None:
            acc, top, total = _attend(
                acc, top, total, qt, position, low, tl.minimum(full_low, high), length, parts_of, inside, tokens,
                k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, beyond, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
            )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, qt, position, full_low, full_high, length, parts_of, inside, tokens,
            k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, beyond, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, False, UPCAST,
        )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, qt, position, full_high, high, length, parts_of, inside, tokens,
            k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, beyond, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
        )  # fmt: skip
        acc, log = finish(acc, top, total)
        store_rows(out + rows.to(tl.int64) * (HEADS * DIM_V), inside, acc, DIM_V, BLOCK_DIM_V)
        tl.store(lse + rows, log, mask=inside)


@triton.jit
def _collect_dq(
    dq, q, grad, lse, delta, position, begin, end, length,
    k, v, k_token, v_token, scale, softcap, slope, beyond, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the keys from ``begin`` to ``end`` give to dq of a query tile."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < length if MASKED else None
        at = keys.to(tl.int64)
        dq = collect_dq(
            dq, q, grad, lse, delta, position, keys, inside, length, None, None, k + at * k_token, v + at * v_token,
            scale, softcap, slope, beyond, left, right, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, MASKED, UPCAST,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["tokens", "left", "right"])
def dq_kernel(
    dout, q, k, v, lse, delta, dq, cu_q, cu_k, tiles, q_offset, slopes,
    dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head, slopes_row,
    tokens, scale, softcap, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of one query tile and head."""
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * 3
    sequence = tl.load(tile)
    if sequence < 0:
        return
    begin = tl.load(tile + 1)
    end = tl.load(tile + 2)
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    first_key = tl.load(cu_k + sequence)
    length = tl.load(cu_k + sequence + 1) - first_key
    shift = length - queries
    beyond = None
    if q_offset is not None:
        given = tl.load(q_offset + sequence).to(tl.int64)
        shift = near(given, queries, length)
        beyond = tl.abs(given - shift).to(tl.float32)
        if left is not None:
            left = shift - near(given - left, queries, length)
        if right is not None:
            right = near(given + right + 1, queries, length) - 1 - shift
    head = head.to(tl.int64)
    slope = None if slopes is None else tl.load(slopes + sequence.to(tl.int64) * slopes_row + head)
    q += first.to(tl.int64) * q_token + head * q_head
    dout += first.to(tl.int64) * dout_token + head * dout_head
    dq += (first.to(tl.int64) * HEADS + head) * DIM
    lse += head * tokens + first
    delta += head * tokens + first
    k += first_key.to(tl.int64) * k_token + head // GROUP * k_head
    v += first_key.to(tl.int64) * v_token + head // GROUP * v_head

    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < end
        position = rows + shift
        qt = load_rows(q + rows.to(tl.int64) * q_token, inside, DIM, BLOCK_DIM, UPCAST)
        grad = load_rows(dout + rows.to(tl.int64) * dout_token, inside, DIM_V, BLOCK_DIM_V, UPCAST)
        log = load_lse(lse + rows, inside)
        difference = tl.load(delta + rows, mask=inside, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        low, full_low, full_high, high = span(
            start + shift, tl.minimum(start + BLOCK_M, end) - 1 + shift, length, left, right, BLOCK_N
        )
        if left is not None:
            acc = _collect_dq(
                acc, qt, grad, log, difference, position, low, tl.minimum(full_low, high), length,
                k, v, k_token, v_token, scale, softcap, slope, beyond, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
            )  # fmt: skip
        acc = _collect_dq(
            acc, qt, grad, log, difference, position, full_low, full_high, length,
            k, v, k_token, v_token, scale, softcap, slope, beyond, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, False, UPCAST,
        )  # fmt: skip
        acc = _collect_dq(
            acc, qt, grad, log, difference, position, full_high, high, length,
            k, v, k_token, v_token, scale, softcap, slope, beyond, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
        )  # fmt: skip
        store_rows(dq + rows.to(tl.int64) * (HEADS * DIM), inside, acc * scale, DIM, BLOCK_DIM)


@triton.jit
def _collect_dkdv(
    dk, dv, k, v, keys, begin, end, queries, length, shift,
    q, dout, lse, delta, q_token, dout_token, scale, softcap, slope, beyond, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the queries from ``begin`` to ``end`` give to dk and dv of a key tile; scores are transposed here."""
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < queries if MASKED else None
        at = rows.to(tl.int64)
        dk, dv = collect_dkdv(
            dk, dv, k, v, keys, rows, shift, inside, length, None, None, q + at * q_token, dout + at * dout_token,
            lse, delta, scale, softcap, slope, beyond, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, MASKED, UPCAST,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "left", "right"])
def dkdv_kernel(
    dout, q, k, v, lse, delta, dk, dv, cu_q, cu_k, tiles, q_offset, slopes,
    dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head, slopes_row,
    tokens, scale, softcap, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile and kv head: the heads of its group are summed here, in order."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tiles + tl.program_id(0) // KV_HEADS * 3
    sequence = tl.load(tile)
    if sequence < 0:
        return
    begin = tl.load(tile + 1)
    end = tl.load(tile + 2)
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    first_key = tl.load(cu_k + sequence)
    length = tl.load(cu_k + sequence + 1) - first_key
    shift = length - queries
    beyond = None
    if q_offset is not None:
        given = tl.load(q_offset + sequence).to(tl.int64)
        shift = near(given, queries, length)
        beyond = tl.abs(given - shift).to(tl.float32)
        if left is not None:
            left = shift - near(given - left, queries, length)
        if right is not None:
            right = near(given + right + 1, queries, length) - 1 - shift
    first_key = first_key.to(tl.int64)
    kv_head = kv_head.to(tl.int64)
    k += first_key * k_token + kv_head * k_head
    v += first_key * v_token + kv_head * v_head
    dk += (first_key * KV_HEADS + kv_head) * DIM
    dv += (first_key * KV_HEADS + kv_head) * DIM_V
    q += first.to(tl.int64) * q_token
    dout += first.to(tl.int64) * dout_token
    lse += first
    delta += first

    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        kt = load_rows(k + keys.to(tl.int64) * k_token, inside, DIM, BLOCK_DIM, UPCAST)
        vt = load_rows(v + keys.to(tl.int64) * v_token, inside, DIM_V, BLOCK_DIM_V, UPCAST)
        acc_k = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
        acc_v = tl.zeros([BLOCK_N, BLOCK_DIM_V], tl.float32)
        low, full_low, full_high, high = span(
            start - shift, tl.minimum(start + BLOCK_N, end) - 1 - shift, queries, right, left, BLOCK_M
        )
        for member in range(GROUP):
            head = kv_head * GROUP + member
            slope = None if slopes is None else tl.load(slopes + sequence.to(tl.int64) * slopes_row + head)
            q_h, dout_h = q + head * q_head, dout + head * dout_head
            lse_h, delta_h = lse + head * tokens, delta + head * tokens
            if right is not None:
                acc_k, acc_v = _collect_dkdv(
                    acc_k, acc_v, kt, vt, keys, low, tl.minimum(full_low, high), queries, length, shift,
                    q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, slope, beyond, left, right,
                    DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_M, True, UPCAST,
                )  # fmt: skip
            acc_k, acc_v = _collect_dkdv(
                acc_k, acc_v, kt, vt, keys, full_low, full_high, queries, length, shift,
                q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, slope, beyond, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_M, False, UPCAST,
            )  # fmt: skip
            acc_k, acc_v = _collect_dkdv(
                acc_k, acc_v, kt, vt, keys, full_high, high, queries, length, shift,
                q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, slope, beyond, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_M, True, UPCAST,
            )  # fmt: skip
        store_rows(dk + keys.to(tl.int64) * (KV_HEADS * DIM), inside, acc_k * scale, DIM, BLOCK_DIM)
        store_rows(dv + keys.to(tl.int64) * (KV_HEADS * DIM_V), inside, acc_v, DIM_V, BLOCK_DIM_V)


INT32_MAX = 2**31 - 1


def _config(kernel: str, q: Tensor, v: Tensor) -> Config:
    return configure(kernel, max(q.shape[-1], v.shape[-1]), q.dtype, q.device)


def _slopes_row(slopes: Tensor | None) -> int:
    """Distance of two sequences' slopes: 0 where one row serves all."""
    return 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)


def _unpack(plan: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Lengths, tiles, and q_offset or None."""
    cu_q, cu_k, query_tiles, key_tiles, *q_offset = plan
    return cu_q, cu_k, query_tiles, key_tiles, q_offset[0] if q_offset else None


def _sides(window: list[int], q_offset: Tensor | None) -> tuple[int | None, int | None]:
    """Where queries may be far from the keys, no limit is as good as none."""
    return sides(window) if q_offset is None else sides(window, INT32_MAX)


def launch_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    score: list[float],
    window: list[int],
    config: Config,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:
    """Write to ``out`` and ``lse``, which are contiguous, and to ``parts``, if given; the rest is :func:`dense`."""
    tokens, heads = q.shape[:2]
    cu_q, cu_k, tiles, _, q_offset = _unpack(plan)
    left, right = _sides(window, q_offset)
    paged = block_table is not None
    with torch.cuda.device_of(q):
        if tiles.shape[0] and tokens:
            fwd_kernel[(tiles.shape[0] * heads,)](
                q, k, v, out, lse, cu_q, cu_k, tiles, seqused_k, q_offset, block_table, alibi_slopes, sinks, parts,
                q.stride(0), q.stride(1), k.stride(0) if paged else 0, k.stride(-3), k.stride(-2),
                v.stride(0) if paged else 0, v.stride(-3), v.stride(-2),
                block_table.stride(0) if paged else 0, _slopes_row(alibi_slopes),
                page_size=k.shape[1] if paged else 1, parts_head=0 if parts is None else parts.stride(0),
                left=left, right=right, **constants(config, q, v, k.shape[-2], score),
            )  # fmt: skip


def varlen_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    score: list[float],
    window: list[int],
) -> tuple[Tensor, Tensor]:
    """out [tokens_q, heads, dim_v] and LSE float32 [heads, tokens_q]; see :func:`gapless.varlen_attention`.

    ``plan`` is ``VarlenPlan.tensors``, ``score`` [scale, softcap] (0 is none), ``window`` [left, right] (-1 is none).
    float64 is not supported.
    """
    q, k, v = map(dense, (q, k, v))
    seqused_k, block_table, alibi_slopes, sinks = (
        t if t is None else dense(t) for t in (seqused_k, block_table, alibi_slopes, sinks)
    )
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    config = _config("fwd", q, v)
    launch_fwd(
        q, k, v, out, lse, plan, score, window, config,
        seqused_k=seqused_k, block_table=block_table, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    return out, lse


def varlen_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    score: list[float],
    window: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks) from the forward's inputs and results; dsinks is empty without sinks.

    FlashAttention-2's scheme (arXiv:2307.08691) with every tile owned by one program: no atomics, the same bits always.
    """
    dout, q, k, v, out = map(dense, (dout, q, k, v, out))
    alibi_slopes = None if alibi_slopes is None else dense(alibi_slopes)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    tokens, heads = q.shape[:2]
    kv_heads = k.shape[1]
    cu_q, cu_k, query_tiles, key_tiles, q_offset = _unpack(plan)
    left, right = _sides(window, q_offset)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    strides = (
        dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        _slopes_row(alibi_slopes),
    )  # fmt: skip
    with torch.cuda.device_of(q):
        delta = deltas(dout, out, lse, dlse)
        if key_tiles.shape[0] and k.shape[0]:
            dkdv_kernel[(key_tiles.shape[0] * kv_heads,)](
                dout, q, k, v, lse, delta, dk, dv, cu_q, cu_k, key_tiles, q_offset, alibi_slopes, *strides,
                left=left, right=right, **constants(_config("dkdv", q, v), q, v, kv_heads, score),
            )  # fmt: skip
        if query_tiles.shape[0] and tokens:
            dq_kernel[(query_tiles.shape[0] * heads,)](
                dout, q, k, v, lse, delta, dq, cu_q, cu_k, query_tiles, q_offset, alibi_slopes, *strides,
                left=left, right=right, **constants(_config("dq", q, v), q, v, kv_heads, score),
            )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    dsinks = -(torch.exp(sinks.float()[:, None] - lse) * delta).sum(1)
    return dq, dk, dv, dsinks.to(sinks.dtype)
