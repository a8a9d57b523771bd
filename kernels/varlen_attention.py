# SPDX-License-Identifier: Apache-2.0
"""Varlen attention in Triton: one program per tile of the plan and head, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from gapless.kernels.attention_config import configure, padded
from gapless.kernels.attention_tiles import (
    LN2,
    LOG2E,
    PRECISION,
    biased,
    key_rows,
    load_rows,
    scaled,
    span,
    store_rows,
    visible,
)

DELTA_ROWS = 64


@triton.jit
def _attend(
    acc, top, total, q, position, begin, end, length,
    k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from ``begin`` to ``end``; ``top`` and ``total`` are in powers of two."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < length if MASKED else None
        kt = load_rows(
            key_rows(k, keys, inside, pages, page_size, k_page, k_token), inside, DIM, BLOCK_DIM, UPCAST
        )
        score = scaled(tl.dot(q, tl.trans(kt), input_precision=PRECISION), scale, softcap)
        score = biased(score, position[:, None], keys[None, :], slope) * LOG2E
        if MASKED:
            score = tl.where(
                visible(position[:, None], keys[None, :], length, left, right), score, -float("inf")
            )
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has seen nothing yet has no finite top to subtract.
        base = tl.where(new_top == -float("inf"), 0.0, new_top) if MASKED else new_top
        p = tl.exp2(score - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        vt = load_rows(
            key_rows(v, keys, inside, pages, page_size, v_page, v_token), inside, DIM_V, BLOCK_DIM_V, UPCAST
        )
        acc = tl.dot(p.to(vt.dtype), vt, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["tokens", "page_size", "left", "right"])
def fwd_kernel(
    q, k, v, out, lse, cu_q, cu_k, tiles, used, pages, slopes, sinks,
    q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head, pages_row, slopes_row,
    tokens, page_size, scale, softcap, left, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and LSE of one query tile and head. Heads run fastest, so that neighbours share keys in the cache."""
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
        low, full_low, full_high, high = span(
            start + shift, tl.minimum(start + BLOCK_M, end) - 1 + shift, length, left, right, BLOCK_N
        )
        if left is not None:
            acc, top, total = _attend(
                acc, top, total, qt, position, low, tl.minimum(full_low, high), length,
                k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
            )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, qt, position, full_low, full_high, length,
            k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, False, UPCAST,
        )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, qt, position, full_high, high, length,
            k, v, pages, page_size, k_page, k_token, v_page, v_token, scale, softcap, slope, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
        )  # fmt: skip
        seen = total > 0
        acc = acc / tl.where(seen, total, 1.0)[:, None]
        store_rows(out + rows.to(tl.int64) * (HEADS * DIM_V), inside, acc, DIM_V, BLOCK_DIM_V)
        log = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
        tl.store(lse + rows, log, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    dout, out, lse, dlse, delta, dout_token, dout_head, out_token, out_head, tokens,
    HEADS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, [heads, tokens]: what the softmax subtracts from every dp of a row."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    rows = tl.program_id(0) // HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    at = head * tokens + rows
    grad = load_rows(
        dout + head * dout_head + rows.to(tl.int64) * dout_token, inside, DIM_V, BLOCK_DIM_V, True
    )
    result = load_rows(
        out + head * out_head + rows.to(tl.int64) * out_token, inside, DIM_V, BLOCK_DIM_V, True
    )
    difference = tl.sum(grad * result, 1)
    if dlse is not None:
        # An empty row has no gradient, whatever the caller's formula makes of its -inf.
        empty = tl.load(lse + at, mask=inside, other=0.0) == -float("inf")
        difference -= tl.where(empty, 0.0, tl.load(dlse + at, mask=inside, other=0.0))
    tl.store(delta + at, difference, mask=inside)


@triton.jit
def _load_lse(pointers, inside):
    """LSE of rows; +inf where a row sees nothing or is not ``inside``, so that its every p is 0."""
    if inside is None:
        lse = tl.load(pointers)
    else:
        lse = tl.load(pointers, mask=inside, other=float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse)
    return lse


@triton.jit
def _weights(
    products, dp, lse, delta, position, keys, length, scale, softcap, slope, left, right, MASKED: tl.constexpr
):
    """(p, ds) of a tile in either orientation: all arguments broadcast against ``products``; ds lacks the scale."""
    score = scaled(products, scale, softcap)
    p = tl.exp2((biased(score, position, keys, slope) - lse) * LOG2E)
    if MASKED:
        p = tl.where(visible(position, keys, length, left, right), p, 0.0)
    ds = p * (dp - delta)
    if softcap is not None:
        share = score / softcap
        ds *= 1.0 - share * share
    return p, ds


@triton.jit
def _collect_dq(
    dq, q, grad, lse, delta, position, begin, end, length,
    k, v, k_token, v_token, scale, softcap, slope, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the keys from ``begin`` to ``end`` give to dq of a query tile."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < length if MASKED else None
        kt = load_rows(k + keys.to(tl.int64) * k_token, inside, DIM, BLOCK_DIM, UPCAST)
        vt = load_rows(v + keys.to(tl.int64) * v_token, inside, DIM_V, BLOCK_DIM_V, UPCAST)
        products = tl.dot(q, tl.trans(kt), input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(vt), input_precision=PRECISION)
        _, ds = _weights(
            products, dp, lse[:, None], delta[:, None], position[:, None], keys[None, :], length,
            scale, softcap, slope, left, right, MASKED,
        )  # fmt: skip
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["tokens", "left", "right"])
def dq_kernel(
    dout, q, k, v, lse, delta, dq, cu_q, cu_k, tiles, slopes,
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
        log = _load_lse(lse + rows, inside)
        difference = tl.load(delta + rows, mask=inside, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        low, full_low, full_high, high = span(
            start + shift, tl.minimum(start + BLOCK_M, end) - 1 + shift, length, left, right, BLOCK_N
        )
        if left is not None:
            acc = _collect_dq(
                acc, qt, grad, log, difference, position, low, tl.minimum(full_low, high), length,
                k, v, k_token, v_token, scale, softcap, slope, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
            )  # fmt: skip
        acc = _collect_dq(
            acc, qt, grad, log, difference, position, full_low, full_high, length,
            k, v, k_token, v_token, scale, softcap, slope, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, False, UPCAST,
        )  # fmt: skip
        acc = _collect_dq(
            acc, qt, grad, log, difference, position, full_high, high, length,
            k, v, k_token, v_token, scale, softcap, slope, left, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, True, UPCAST,
        )  # fmt: skip
        store_rows(dq + rows.to(tl.int64) * (HEADS * DIM), inside, acc * scale, DIM, BLOCK_DIM)


@triton.jit
def _collect_dkdv(
    dk, dv, k, v, keys, begin, end, queries, length, shift,
    q, dout, lse, delta, q_token, dout_token, scale, softcap, slope, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the queries from ``begin`` to ``end`` give to dk and dv of a key tile; scores are transposed here."""
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < queries if MASKED else None
        qt = load_rows(q + rows.to(tl.int64) * q_token, inside, DIM, BLOCK_DIM, UPCAST)
        grad = load_rows(dout + rows.to(tl.int64) * dout_token, inside, DIM_V, BLOCK_DIM_V, UPCAST)
        log = _load_lse(lse + rows, inside)
        difference = tl.load(delta + rows, mask=inside, other=None if inside is None else 0.0)
        products = tl.dot(k, tl.trans(qt), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        p, ds = _weights(
            products, dp, log[None, :], difference[None, :], (rows + shift)[None, :], keys[:, None],
            length, scale, softcap, slope, left, right, MASKED,
        )  # fmt: skip
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "left", "right"])
def dkdv_kernel(
    dout, q, k, v, lse, delta, dk, dv, cu_q, cu_k, tiles, slopes,
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
                    q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, slope, left, right,
                    DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_M, True, UPCAST,
                )  # fmt: skip
            acc_k, acc_v = _collect_dkdv(
                acc_k, acc_v, kt, vt, keys, full_low, full_high, queries, length, shift,
                q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, slope, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_M, False, UPCAST,
            )  # fmt: skip
            acc_k, acc_v = _collect_dkdv(
                acc_k, acc_v, kt, vt, keys, full_high, high, queries, length, shift,
                q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, slope, left, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_M, True, UPCAST,
            )  # fmt: skip
        store_rows(dk + keys.to(tl.int64) * (KV_HEADS * DIM), inside, acc_k * scale, DIM, BLOCK_DIM)
        store_rows(dv + keys.to(tl.int64) * (KV_HEADS * DIM_V), inside, acc_v, DIM_V, BLOCK_DIM_V)


def _dense(t: Tensor | None) -> Tensor | None:
    """``t``, or a copy where its last dimension is not contiguous: kernels take every other stride."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _common(kernel: str, q: Tensor, v: Tensor, kv_heads: int, score: list[float], window: list[int]) -> dict:
    """Arguments that all attention kernels share; None where a feature is off, which compiles it away."""
    dim, dim_v = q.shape[-1], v.shape[-1]
    config = configure(kernel, max(dim, dim_v), q.dtype, q.device)
    # Clamped so that position + window stays in int32.
    left, right = (None if w < 0 else min(w, 1 << 30) for w in window)
    return {
        "tokens": q.shape[0],
        "scale": score[0],
        "softcap": score[1] or None,
        "left": left,
        "right": right,
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // kv_heads,
        "DIM": dim,
        "DIM_V": dim_v,
        "BLOCK_DIM": padded(dim),
        "BLOCK_DIM_V": padded(dim_v),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # The interpreter's bfloat16 products are wrong.
        "UPCAST": knobs.runtime.interpret and q.dtype == torch.bfloat16,
    }


def _slopes_row(slopes: Tensor | None) -> int:
    """Distance of two sequences' slopes: 0 where one row serves all."""
    return 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)


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
    q, k, v, seqused_k, block_table, alibi_slopes, sinks = map(
        _dense, (q, k, v, seqused_k, block_table, alibi_slopes, sinks)
    )
    tokens, heads = q.shape[:2]
    cu_q, cu_k, tiles, _ = plan
    out = q.new_empty(tokens, heads, v.shape[-1])
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    paged = block_table is not None
    with torch.cuda.device_of(q):
        if tiles.shape[0] and tokens:
            fwd_kernel[(tiles.shape[0] * heads,)](
                q, k, v, out, lse, cu_q, cu_k, tiles, seqused_k, block_table, alibi_slopes, sinks,
                q.stride(0), q.stride(1), k.stride(0) if paged else 0, k.stride(-3), k.stride(-2),
                v.stride(0) if paged else 0, v.stride(-3), v.stride(-2),
                block_table.stride(0) if paged else 0, _slopes_row(alibi_slopes),
                page_size=k.shape[1] if paged else 1, **_common("fwd", q, v, k.shape[-2], score, window),
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
    dout, q, k, v, out, alibi_slopes = map(_dense, (dout, q, k, v, out, alibi_slopes))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    tokens, heads = q.shape[:2]
    kv_heads = k.shape[1]
    cu_q, cu_k, query_tiles, key_tiles = plan
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    strides = (
        dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        _slopes_row(alibi_slopes),
    )  # fmt: skip
    with torch.cuda.device_of(q):
        if tokens:
            delta_kernel[(triton.cdiv(tokens, DELTA_ROWS) * heads,)](
                dout, out, lse, dlse, delta,
                dout.stride(0), dout.stride(1), out.stride(0), out.stride(1), tokens,
                HEADS=heads, DIM_V=v.shape[-1], BLOCK_DIM_V=padded(v.shape[-1]), BLOCK_M=DELTA_ROWS,
            )  # fmt: skip
        if key_tiles.shape[0] and k.shape[0]:
            dkdv_kernel[(key_tiles.shape[0] * kv_heads,)](
                dout, q, k, v, lse, delta, dk, dv, cu_q, cu_k, key_tiles, alibi_slopes, *strides,
                **_common("dkdv", q, v, kv_heads, score, window),
            )  # fmt: skip
        if query_tiles.shape[0] and tokens:
            dq_kernel[(query_tiles.shape[0] * heads,)](
                dout, q, k, v, lse, delta, dq, cu_q, cu_k, query_tiles, alibi_slopes, *strides,
                **_common("dq", q, v, kv_heads, score, window),
            )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    dsinks = -(torch.exp(sinks.float()[:, None] - lse) * delta).sum(1)
    return dq, dk, dv, dsinks.to(sinks.dtype)
