# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in Triton: one program per tile of a row of the layout and head, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.attention_config import configure, fit
from gapless.kernels.attention_launch import constants, deltas, dense, sides
from gapless.kernels.attention_steps import attend, collect_dkdv, collect_dq, finish, load_lse
from gapless.kernels.attention_tiles import load_rows, store_rows
from gapless.kernels.block_rows import count_below, locate


@triton.jit
def _attend(
    acc, top, total, q, position, within, length, ids, kinds, patterns, begin, end,
    k, v, k_token, v_token, scale, softcap, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the listed key blocks from the ``begin``-th to the ``end``-th, in tiles of BLOCK_N keys."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    block = tl.load(ids + begin, mask=begin < end, other=0)  # each id is read one step ahead
    for step in range(begin * STEPS, end * STEPS):
        start = block * BLOCK_K + step % STEPS * BLOCK_N
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < length if MASKED else None
        words = None
        if patterns is not None:
            kind = tl.load(kinds + step // STEPS).to(tl.int64)
            words = (
                patterns + (kind * BLOCK_K + step % STEPS * BLOCK_N) * WORDS + tl.arange(0, BLOCK_N) * WORDS
            )
        ahead = (step + 1) // STEPS
        block = tl.load(ids + ahead, mask=ahead < end, other=0)
        k_rows = k + start.to(tl.int64) * k_token + tl.arange(0, BLOCK_N) * k_token
        v_rows = v + start.to(tl.int64) * v_token + tl.arange(0, BLOCK_N) * v_token
        acc, top, total, _ = attend(
            acc, top, total, q, position, keys, inside, length, words, within, k_rows, v_rows,
            scale, softcap, None, None, None, right, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, MASKED, UPCAST,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _place(order, table, blocks, TILES: tl.constexpr, TILE: tl.constexpr, SHARE: tl.constexpr):
    """What this program works on: (row of the order, which of SHARE heads, sequence, first token of the tile)."""
    row = tl.load(order + tl.program_id(0) // (TILES * SHARE))
    at = table + row % blocks * 3
    start = tl.load(at + 1) + tl.program_id(0) % TILES * TILE
    return row, tl.program_id(0) // TILES % SHARE, tl.load(at), start


@triton.jit
def _list(offsets, ids, row):
    """(the ids that ``row`` lists, how many)."""
    begin = tl.load(offsets + row)
    return ids + begin, tl.load(offsets + row + 1) - begin


@triton.jit
def _ends(first, last, length, right, BLOCK_K: tl.constexpr):
    """(full_end, end): queries at key positions ``first..last`` see all keys of the key blocks before ``full_end``.

    Of the blocks up to ``end`` they see some, of those after it none; a pattern may hide more.
    """
    full_end = length
    end = length
    if right is not None:
        full_end = tl.maximum(tl.minimum(first + right + 1, length), 0)
        end = tl.maximum(tl.minimum(last + right + 1, length), 0)
    return full_end // BLOCK_K, tl.cdiv(end, BLOCK_K)


@triton.jit(do_not_specialize=["tokens", "blocks", "right"])
def sparse_fwd_kernel(
    q, k, v, out, lse, cu_q, cu_k, table, order, offsets, ids, partial_offsets, partial_ids, kinds, patterns,
    q_token, q_head, k_token, k_head, v_token, v_head, tokens, blocks, scale, softcap, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and LSE of one tile of a row, for one of the SHARE heads that read it: rows come costliest first."""
    WORDS: tl.constexpr = (BLOCK_Q + 31) // 32
    row, member, sequence, start = _place(order, table, blocks, BLOCK_Q // BLOCK_M, BLOCK_M, SHARE)
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    if start >= queries:
        return
    first_key = tl.load(cu_k + sequence)
    length = tl.load(cu_k + sequence + 1) - first_key
    shift = length - queries
    head = (row // blocks * SHARE + member).to(tl.int64)
    k += first_key.to(tl.int64) * k_token + head // GROUP * k_head
    v += first_key.to(tl.int64) * v_token + head // GROUP * v_head

    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < queries
    position = rows + shift
    word = start % BLOCK_Q // 32
    within = tl.arange(0, BLOCK_M) + start % BLOCK_Q % 32  # the tile's bits of patterns, from that word on
    token = (first + rows).to(tl.int64)
    qt = load_rows(q + token * q_token + head * q_head, inside, DIM, BLOCK_DIM, UPCAST)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM_V], tl.float32)
    full_end, end = _ends(
        start + shift, tl.minimum(start + BLOCK_M, queries) - 1 + shift, length, right, BLOCK_K
    )
    listed, count = _list(offsets, ids, row)
    full = count_below(listed, count, full_end)
    acc, top, total = _attend(
        acc, top, total, qt, position, within, length, listed, None, None, 0, full,
        k, v, k_token, v_token, scale, softcap, right,
        DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_K, BLOCK_N, WORDS, False, UPCAST,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, qt, position, within, length, listed, None, None, full, count_below(listed, count, end),
        k, v, k_token, v_token, scale, softcap, right,
        DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_K, BLOCK_N, WORDS, True, UPCAST,
    )  # fmt: skip
    if patterns is not None:
        listed, count = _list(partial_offsets, partial_ids, row)
        chosen, _ = _list(partial_offsets, kinds, row)
        acc, top, total = _attend(
            acc, top, total, qt, position, within, length, listed, chosen, patterns + word,
            0, count_below(listed, count, end), k, v, k_token, v_token, scale, softcap, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_K, BLOCK_N, WORDS, True, UPCAST,
        )  # fmt: skip
    acc, log = finish(acc, top, total)
    store_rows(out + (token * HEADS + head) * DIM_V, inside, acc, DIM_V, BLOCK_DIM_V)
    tl.store(lse + head * tokens + token, log, mask=inside)


@triton.jit
def _collect_dq(
    dq, q, grad, lse, delta, position, within, length, ids, kinds, patterns, begin, end,
    k, v, k_token, v_token, scale, softcap, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the listed key blocks from the ``begin``-th to the ``end``-th give to dq of a query tile."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    block = tl.load(ids + begin, mask=begin < end, other=0)
    for step in range(begin * STEPS, end * STEPS):
        start = block * BLOCK_K + step % STEPS * BLOCK_N
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < length if MASKED else None
        words = None
        if patterns is not None:
            kind = tl.load(kinds + step // STEPS).to(tl.int64)
            words = (
                patterns + (kind * BLOCK_K + step % STEPS * BLOCK_N) * WORDS + tl.arange(0, BLOCK_N) * WORDS
            )
        ahead = (step + 1) // STEPS
        block = tl.load(ids + ahead, mask=ahead < end, other=0)
        k_rows = k + start.to(tl.int64) * k_token + tl.arange(0, BLOCK_N) * k_token
        v_rows = v + start.to(tl.int64) * v_token + tl.arange(0, BLOCK_N) * v_token
        dq = collect_dq(
            dq, q, grad, lse, delta, position, keys, inside, length, words, within, k_rows, v_rows,
            scale, softcap, None, None, None, right, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, MASKED, UPCAST,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["tokens", "blocks", "right"])
def sparse_dq_kernel(
    dout, q, k, v, lse, delta, dq, cu_q, cu_k, table, order,
    offsets, ids, partial_offsets, partial_ids, kinds, patterns,
    dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head, tokens, blocks, scale, softcap, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of one tile of a row, for one of the SHARE heads that read it."""
    WORDS: tl.constexpr = (BLOCK_Q + 31) // 32
    row, member, sequence, start = _place(order, table, blocks, BLOCK_Q // BLOCK_M, BLOCK_M, SHARE)
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    if start >= queries:
        return
    first_key = tl.load(cu_k + sequence)
    length = tl.load(cu_k + sequence + 1) - first_key
    shift = length - queries
    head = (row // blocks * SHARE + member).to(tl.int64)
    k += first_key.to(tl.int64) * k_token + head // GROUP * k_head
    v += first_key.to(tl.int64) * v_token + head // GROUP * v_head

    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < queries
    position = rows + shift
    word = start % BLOCK_Q // 32
    within = tl.arange(0, BLOCK_M) + start % BLOCK_Q % 32  # the tile's bits of patterns, from that word on
    token = (first + rows).to(tl.int64)
    qt = load_rows(q + token * q_token + head * q_head, inside, DIM, BLOCK_DIM, UPCAST)
    grad = load_rows(dout + token * dout_token + head * dout_head, inside, DIM_V, BLOCK_DIM_V, UPCAST)
    log = load_lse(lse + head * tokens + token, inside)
    difference = tl.load(delta + head * tokens + token, mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    full_end, end = _ends(
        start + shift, tl.minimum(start + BLOCK_M, queries) - 1 + shift, length, right, BLOCK_K
    )
    listed, count = _list(offsets, ids, row)
    full = count_below(listed, count, full_end)
    acc = _collect_dq(
        acc, qt, grad, log, difference, position, within, length, listed, None, None, 0, full,
        k, v, k_token, v_token, scale, softcap, right,
        DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_K, BLOCK_N, WORDS, False, UPCAST,
    )  # fmt: skip
    acc = _collect_dq(
        acc, qt, grad, log, difference, position, within, length, listed, None, None,
        full, count_below(listed, count, end), k, v, k_token, v_token, scale, softcap, right,
        DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_K, BLOCK_N, WORDS, True, UPCAST,
    )  # fmt: skip
    if patterns is not None:
        listed, count = _list(partial_offsets, partial_ids, row)
        chosen, _ = _list(partial_offsets, kinds, row)
        acc = _collect_dq(
            acc, qt, grad, log, difference, position, within, length, listed, chosen, patterns + word,
            0, count_below(listed, count, end), k, v, k_token, v_token, scale, softcap, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_K, BLOCK_N, WORDS, True, UPCAST,
        )  # fmt: skip
    store_rows(dq + (token * HEADS + head) * DIM, inside, acc * scale, DIM, BLOCK_DIM)


@triton.jit
def _collect_dkdv(
    dk, dv, k, v, keys, offset, queries, length, shift, ids, kinds, patterns, begin, end,
    q, dout, lse, delta, q_token, dout_token, scale, softcap, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the listed query blocks from the ``begin``-th to the ``end``-th give to dk and dv of a key tile."""
    STEPS: tl.constexpr = BLOCK_Q // BLOCK_M
    block = tl.load(ids + begin, mask=begin < end, other=0)
    for step in range(begin * STEPS, end * STEPS):
        start = block * BLOCK_Q + step % STEPS * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        within = tl.arange(0, BLOCK_M) + step % STEPS * BLOCK_M % 32
        inside = rows < queries if MASKED else None
        words = None
        if patterns is not None:
            kind = tl.load(kinds + step // STEPS).to(tl.int64)
            words = patterns + (kind * BLOCK_K + offset) * WORDS + step % STEPS * BLOCK_M // 32
        ahead = (step + 1) // STEPS
        block = tl.load(ids + ahead, mask=ahead < end, other=0)
        q_rows = q + start.to(tl.int64) * q_token + tl.arange(0, BLOCK_M) * q_token
        dout_rows = dout + start.to(tl.int64) * dout_token + tl.arange(0, BLOCK_M) * dout_token
        dk, dv = collect_dkdv(
            dk, dv, k, v, keys, rows, shift, inside, length, words, within, q_rows, dout_rows,
            lse, delta, scale, softcap, None, None, None, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, MASKED, UPCAST,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "blocks", "right"])
def sparse_dkdv_kernel(
    dout, q, k, v, lse, delta, dk, dv, cu_q, cu_k, table, order,
    offsets, ids, partial_offsets, partial_ids, kinds, patterns,
    dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head, tokens, blocks, scale, softcap, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, MEMBERS: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of a key block and kv head: the heads of its group are summed here, in order.

    The lists are the transposed ones. Rows of the order are MEMBERS kv heads that list the same, or one.
    """
    KV_HEADS: tl.constexpr = HEADS // GROUP
    WORDS: tl.constexpr = (BLOCK_Q + 31) // 32
    row, member, sequence, start = _place(order, table, blocks, BLOCK_K // BLOCK_N, BLOCK_N, MEMBERS)
    first_key = tl.load(cu_k + sequence)
    length = tl.load(cu_k + sequence + 1) - first_key
    if start >= length:
        return
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    shift = length - queries
    kv_head = (row // blocks * MEMBERS + member).to(tl.int64)
    q += first.to(tl.int64) * q_token
    dout += first.to(tl.int64) * dout_token
    lse += first
    delta += first

    keys = start + tl.arange(0, BLOCK_N)
    inside = keys < length
    token = (first_key + keys).to(tl.int64)
    kt = load_rows(k + token * k_token + kv_head * k_head, inside, DIM, BLOCK_DIM, UPCAST)
    vt = load_rows(v + token * v_token + kv_head * v_head, inside, DIM_V, BLOCK_DIM_V, UPCAST)
    acc_k = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DIM_V], tl.float32)
    offset = keys % BLOCK_K
    # Query blocks before ``low`` see none of these keys, those from ``full`` to ``tail`` all, all their queries do.
    low = queries * 0
    full = low
    if right is not None:
        low = tl.maximum(start - shift - right, 0) // BLOCK_Q
        full = tl.cdiv(tl.maximum(tl.minimum(start + BLOCK_N, length) - 1 - shift - right, 0), BLOCK_Q)
    tail = tl.maximum(queries // BLOCK_Q, full)
    for number in range(GROUP):
        head = kv_head * GROUP + number
        q_h, dout_h = q + head * q_head, dout + head * dout_head
        lse_h, delta_h = lse + head * tokens, delta + head * tokens
        line = head // SHARE * blocks + row % blocks
        listed, count = _list(offsets, ids, line)
        some = count_below(listed, count, full)
        whole = count_below(listed, count, tail)
        if right is not None:
            acc_k, acc_v = _collect_dkdv(
                acc_k, acc_v, kt, vt, keys, offset, queries, length, shift, listed, None, None,
                count_below(listed, count, low), some,
                q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_Q, BLOCK_K, BLOCK_M, WORDS, True, UPCAST,
            )  # fmt: skip
        acc_k, acc_v = _collect_dkdv(
            acc_k, acc_v, kt, vt, keys, offset, queries, length, shift, listed, None, None, some, whole,
            q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_Q, BLOCK_K, BLOCK_M, WORDS, False, UPCAST,
        )  # fmt: skip
        acc_k, acc_v = _collect_dkdv(
            acc_k, acc_v, kt, vt, keys, offset, queries, length, shift, listed, None, None, whole, count,
            q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, right,
            DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_Q, BLOCK_K, BLOCK_M, WORDS, True, UPCAST,
        )  # fmt: skip
        if patterns is not None:
            listed, count = _list(partial_offsets, partial_ids, line)
            chosen, _ = _list(partial_offsets, kinds, line)
            acc_k, acc_v = _collect_dkdv(
                acc_k, acc_v, kt, vt, keys, offset, queries, length, shift, listed, chosen, patterns,
                count_below(listed, count, low), count,
                q_h, dout_h, lse_h, delta_h, q_token, dout_token, scale, softcap, right,
                DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_Q, BLOCK_K, BLOCK_M, WORDS, True, UPCAST,
            )  # fmt: skip
    store_rows(dk + (token * KV_HEADS + kv_head) * DIM, inside, acc_k * scale, DIM, BLOCK_DIM)
    store_rows(dv + (token * KV_HEADS + kv_head) * DIM_V, inside, acc_v, DIM_V, BLOCK_DIM_V)


def _near(t: Tensor) -> Tensor:
    """Dense, and with tokens so near to one another that the distances in a tile are int32."""
    return dense(t) if t.stride(0) * 256 < 1 << 31 else t.contiguous()


def _common(
    kernel: str,
    q: Tensor,
    v: Tensor,
    kv_heads: int,
    blocks: list[int],
    score: list[float],
    window: list[int],
) -> dict:
    block_q, block_k, heads = blocks
    dim = max(q.shape[-1], v.shape[-1])
    config = configure(kernel, dim, q.dtype, q.device)
    return constants(fit(config, kernel, dim, block_q, block_k), q, v, kv_heads, score) | {
        "right": sides(window)[1],
        "SHARE": q.shape[1] // heads,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
    }


def _lists(lists: list[Tensor], patterns: Tensor) -> list[Tensor | None]:
    """(offsets, ids, partial_offsets, partial_ids, kinds, patterns) for kernels; None where no block is partial."""
    return [*lists, patterns] if patterns.shape[0] and lists[3].shape[0] else [*lists[:2], *[None] * 4]


def block_sparse_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    blocks: list[int],
    score: list[float],
    window: list[int],
) -> tuple[Tensor, Tensor]:
    """out [tokens_q, heads, dim_v] and LSE float32 [heads, tokens_q]; see :func:`gapless.block_sparse_attention`.

    ``layout`` is ``BlockLayout.tensors`` and its order, ``blocks`` [block_q, block_k, pattern heads], ``score``
    [scale, softcap] (0 is none), ``window`` [-1, 0] (causal) or [-1, -1]. float64 is not supported.
    """
    q, k, v = map(_near, (q, k, v))
    tokens, heads = q.shape[:2]
    cu_q, cu_k, *lists, patterns, order = layout
    out = q.new_empty(tokens, heads, v.shape[-1])
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    common = _common("sparse_fwd", q, v, k.shape[1], blocks, score, window)
    rows = order.shape[0]
    with torch.cuda.device_of(q):
        if rows:
            count = rows // blocks[2]
            table = locate(cu_q, blocks[0], blocks[0], count)
            tiles = blocks[0] // common["BLOCK_M"] * common["SHARE"]
            sparse_fwd_kernel[(rows * tiles,)](
                q, k, v, out, lse, cu_q, cu_k, table, order, *_lists(lists, patterns),
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), blocks=count, **common,
            )  # fmt: skip
    return out, lse


def block_sparse_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[Tensor],
    blocks: list[int],
    score: list[float],
    window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the forward's inputs and results; after ``order``, ``layout`` holds the transposed lists."""
    dout, q, k, v = map(_near, (dout, q, k, v))
    out = dense(out)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    kv_heads = k.shape[1]
    block_q, block_k, pattern_heads = blocks
    cu_q, cu_k, *lists, patterns, order = layout[:9]
    transposed = layout[9:]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    strides = (
        dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
    )  # fmt: skip
    query_blocks = order.shape[0] // pattern_heads
    key_blocks = (transposed[0].shape[0] - 1) // pattern_heads
    with torch.cuda.device_of(q):
        delta = deltas(dout, out, lse, dlse)
        if key_blocks:
            common = _common("sparse_dkdv", q, v, kv_heads, blocks, score, window)
            # kv heads that list the same, or the lists that a kv head's heads read, together make a row.
            shared = min(pattern_heads, kv_heads)
            counts = transposed[0].diff() + transposed[2].diff()
            costs = counts.view(shared, -1, key_blocks).sum(1).view(-1)
            key_order = costs.argsort(descending=True, stable=True).int()
            tiles = block_k // common["BLOCK_N"] * (kv_heads // shared)
            sparse_dkdv_kernel[(shared * key_blocks * tiles,)](
                dout, q, k, v, lse, delta, dk, dv, cu_q, cu_k, locate(cu_k, block_k, block_k, key_blocks), key_order,
                *_lists(transposed, patterns), *strides, blocks=key_blocks, MEMBERS=kv_heads // shared, **common,
            )  # fmt: skip
        if query_blocks:
            common = _common("sparse_dq", q, v, kv_heads, blocks, score, window)
            tiles = block_q // common["BLOCK_M"] * common["SHARE"]
            sparse_dq_kernel[(order.shape[0] * tiles,)](
                dout, q, k, v, lse, delta, dq, cu_q, cu_k, locate(cu_q, block_q, block_q, query_blocks), order,
                *_lists(lists, patterns), *strides, blocks=query_blocks, **common,
            )  # fmt: skip
    return dq, dk, dv
