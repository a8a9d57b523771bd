# SPDX-License-Identifier: Apache-2.0
"""One step of attention: a tile of queries meets a tile of keys. The same however the keys are walked."""

from __future__ import annotations

import triton
import triton.language as tl

from gapless.kernels.attention_tiles import (
    LN2,
    LOG2E,
    PRECISION,
    biased,
    load_rows,
    pattern_bits,
    scaled,
    visible,
)


@triton.jit
def attend(
    acc, top, total, q, position, keys, inside, length, words, within, k_rows, v_rows,
    scale, softcap, slope, beyond, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys; ``top`` and ``total`` are in powers of two.

    Returns (acc, top, total, part): ``part`` is what these keys add to ``total``, relative to the new ``top``.
    ``words`` [keys] points at each key's bits of a pattern (None: there is none), ``within`` says which bit is whose.
    """
    kt = load_rows(k_rows, inside, DIM, BLOCK_DIM, UPCAST)
    score = scaled(tl.dot(q, tl.trans(kt), input_precision=PRECISION), scale, softcap)
    score = biased(score, position[:, None], keys[None, :], slope, beyond) * LOG2E
    if MASKED:
        seen = visible(position[:, None], keys[None, :], length, left, right)
        if words is not None:
            seen = seen & pattern_bits(words[None, :], within[:, None])
        score = tl.where(seen, score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    # A row that has seen nothing yet has no finite top to subtract.
    base = tl.where(new_top == -float("inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(score - base[:, None])
    decay = tl.exp2(top - base)
    part = tl.sum(p, 1)
    total = total * decay + part
    vt = load_rows(v_rows, inside, DIM_V, BLOCK_DIM_V, UPCAST)
    acc = tl.dot(p.to(vt.dtype), vt, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total, part


@triton.jit
def finish(acc, top, total):
    """(out, LSE) of rows from their online softmax; a row that saw nothing gives 0 and -inf."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    return acc / total[:, None], tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN2)


@triton.jit
def load_lse(pointers, inside):
    """LSE of rows; +inf where a row sees nothing or is not ``inside``, so that its every p is 0."""
    if inside is None:
        lse = tl.load(pointers)
    else:
        lse = tl.load(pointers, mask=inside, other=float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse)
    return lse


@triton.jit
def weights(
    products, lse, position, keys, length, words, within, scale, softcap, slope, beyond, left, right,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(p, score) of a tile in either orientation: all arguments broadcast against ``products``."""
    score = scaled(products, scale, softcap)
    p = tl.exp2((biased(score, position, keys, slope, beyond) - lse) * LOG2E)
    if MASKED:
        seen = visible(position, keys, length, left, right)
        if words is not None:
            seen = seen & pattern_bits(words, within)
        p = tl.where(seen, p, 0.0)
    return p, score


@triton.jit
def through_softmax(p, dp, score, delta, softcap):
    """Gradient of the products, which lacks the scale."""
    ds = p * (dp - delta)
    if softcap is not None:
        share = score / softcap
        ds *= 1.0 - share * share
    return ds


@triton.jit
def collect_dq(
    dq, q, grad, lse, delta, position, keys, inside, length, words, within, k_rows, v_rows,
    scale, softcap, slope, beyond, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to dq of a query tile; ``words`` and ``within`` as in :func:`attend`."""
    kt = load_rows(k_rows, inside, DIM, BLOCK_DIM, UPCAST)
    vt = load_rows(v_rows, inside, DIM_V, BLOCK_DIM_V, UPCAST)
    products = tl.dot(q, tl.trans(kt), input_precision=PRECISION)
    dp = tl.dot(grad, tl.trans(vt), input_precision=PRECISION)
    words = None if words is None else words[None, :]
    within = None if words is None else within[:, None]
    p, score = weights(
        products, lse[:, None], position[:, None], keys[None, :], length, words, within,
        scale, softcap, slope, beyond, left, right, MASKED,
    )  # fmt: skip
    ds = through_softmax(p, dp, score, delta[:, None], softcap)
    return tl.dot(ds.to(kt.dtype), kt, dq, input_precision=PRECISION)


@triton.jit
def collect_dkdv(
    dk, dv, k, v, keys, rows, shift, inside, length, words, within, q_rows, dout_rows, lse, delta,
    scale, softcap, slope, beyond, left, right,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries gives to dk and dv of a key tile; scores are transposed here."""
    qt = load_rows(q_rows, inside, DIM, BLOCK_DIM, UPCAST)
    grad = load_rows(dout_rows, inside, DIM_V, BLOCK_DIM_V, UPCAST)
    log = load_lse(lse + rows, inside)
    difference = tl.load(delta + rows, mask=inside, other=None if inside is None else 0.0)
    products = tl.dot(k, tl.trans(qt), input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    words = None if words is None else words[:, None]
    within = None if words is None else within[None, :]
    p, score = weights(
        products, log[None, :], (rows + shift)[None, :], keys[:, None], length, words, within,
        scale, softcap, slope, beyond, left, right, MASKED,
    )  # fmt: skip
    ds = through_softmax(p, dp, score, difference[None, :], softcap)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv
