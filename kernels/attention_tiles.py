# SPDX-License-Identifier: Apache-2.0
"""What every attention kernel does with a tile: find its rows, load them, mask and score them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# tl.dot would round float32 operands to tf32, which is ten bits too coarse for the error budget.
PRECISION = tl.constexpr("ieee")


@triton.jit
def load_rows(pointers, inside, DIM: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, BLOCK] from row pointers [rows]; zeros beyond DIM and where not ``inside`` (None is nowhere so)."""
    columns = tl.arange(0, BLOCK)
    at = pointers[:, None] + columns[None, :]
    if inside is not None:
        mask = inside[:, None]
        if DIM != BLOCK:
            mask = mask & (columns < DIM)[None, :]
        tile = tl.load(at, mask=mask, other=0.0)
    elif DIM != BLOCK:
        tile = tl.load(at, mask=(columns < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_rows(pointers, inside, tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write [rows, BLOCK] to row pointers [rows] where ``inside``, columns below DIM."""
    columns = tl.arange(0, BLOCK)
    mask = inside[:, None] & (columns < DIM)[None, :]
    tl.store(pointers[:, None] + columns[None, :], tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def key_rows(base, keys, inside, pages, page_size, stride_page, stride_token):
    """Row pointers of the ``keys`` of a sequence: ``base`` is its first key, or page 0 where ``pages`` lists pages."""
    if pages is not None:
        # Where not inside, the page is undefined and so is the pointer: nothing is loaded from it.
        base += tl.load(pages + keys // page_size, mask=inside).to(tl.int64) * stride_page
        keys = keys % page_size
    return base + keys.to(tl.int64) * stride_token


@triton.jit
def near(position, queries, length):
    """A key position, int64, brought near the ``length`` keys: further away no query sees others, and it fits int32.

    A ``q_offset`` may be any int32, and sums of it and a window's side do not fit. No function can return None, so
    each kernel brings the shift of its queries and both sides here by itself.
    """
    return tl.minimum(tl.maximum(position, -queries), length).to(tl.int32)


@triton.jit
def span(first, last, length, left, right, BLOCK: tl.constexpr):
    """Which of ``length`` keys the queries at key positions ``first..last`` see, to walk in blocks from ``begin``.

    Returns (begin, full_begin, full_end, end): each query sees every key of the whole blocks from ``full_begin`` to
    ``full_end``; those before and after need a mask. With positions of keys, ``left`` and ``right`` swapped, it tells
    which queries see them.
    """
    begin = length * 0
    end = length
    full_begin = begin
    full_end = end
    if left is not None:
        begin = tl.maximum(first - left, 0)
        full_begin = tl.maximum(last - left, 0)
    if right is not None:
        end = tl.minimum(last + right + 1, length)
        full_end = tl.minimum(first + right + 1, length)
    full_begin = begin + tl.cdiv(full_begin - begin, BLOCK) * BLOCK
    full_end = full_begin + tl.maximum(full_end - full_begin, 0) // BLOCK * BLOCK
    return begin, full_begin, full_end, end


@triton.jit
def visible(position, keys, length, left, right):
    """Which of ``length`` keys a query at key ``position`` sees; None is no limit on that side."""
    seen = keys < length
    if left is not None:
        seen = seen & (keys >= position - left)
    if right is not None:
        seen = seen & (keys <= position + right)
    return seen


@triton.jit
def pattern_bits(words, within):
    """Which cells a pattern keeps: bit ``within % 32`` of word ``within // 32`` after ``words``.

    One is a row, the other a column. Words are picked from a few vectors: a tile of pointers would fill the registers.
    """
    bits = tl.load(words)
    for i in tl.static_range(1, within.numel // 32):
        bits = tl.where(within // 32 == i, tl.load(words + i), bits)
    return ((bits >> (within % 32)) & 1) != 0


@triton.jit
def tanh(x):
    """To 2 ulp: libdevice's is out of the interpreter's reach, the hardware's is too coarse for float32."""
    z = x * x
    # Least squares fit of (tanh(x) / x - 1) / x^2 on |x| < 0.625, relative error 4e-9.
    p = -0.00570404 * z + 0.02063786
    p = p * z - 0.05373916
    p = p * z + 0.13331432
    p = p * z - 0.33333281
    small = x + x * z * p
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def scaled(products, scale, softcap):
    """Scores from q.k, before any bias; ``softcap`` None is none."""
    if softcap is None:
        score = products * scale
    else:
        score = softcap * tanh(products * (scale / softcap))
    return score


@triton.jit
def biased(score, position, keys, slope, beyond):
    """Scores with ALiBi's bias; ``slope`` None is none, ``beyond`` is how far the queries were moved."""
    if slope is not None:
        distance = tl.abs(position - keys).to(tl.float32)
        if beyond is not None:
            distance += beyond
        score -= slope * distance
    return score
