# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy of some classes' logits, in Triton: the sums of a row, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.attention_launch import dense
from gapless.kernels.attention_tiles import tanh
from gapless.kernels.expert_rows import load_wide
from gapless.kernels.expert_tiles import store_tile

# Rows and columns of a tile of logits, and the warps that share it.
TILE = {"BLOCK_M": 4, "BLOCK_N": 1024, "num_warps": 8}


@triton.jit
def load_logits(logits, bias, inside, column, within, softcap):
    """float32 [M, N] after bias and cap, from row pointers [M]; with a cap (None: none) also tanh(logit / cap)."""
    x = load_wide(logits, inside, column, within)
    if bias is not None:
        x += tl.load(bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    t = x
    if softcap is not None:
        t = tanh(x / softcap)
        x = softcap * t
    return x, t


@triton.jit(do_not_specialize=["rows", "first"])
def sums_kernel(
    logits, bias, targets, before, after, logits_row, before_row, after_row, rows, columns, first, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[4, rows]: maximum, sum of exp(logit - maximum), the target's logit, sum of all, taken up from ``before``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=-1)
    used = target >= 0
    target -= first
    highest = tl.load(before + row, mask=inside, other=0.0)
    total = tl.load(before + before_row + row, mask=inside, other=0.0)
    chosen = tl.load(before + 2 * before_row + row, mask=inside, other=0.0)
    every = tl.load(before + 3 * before_row + row, mask=inside, other=0.0)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        within = column < columns
        x, _ = load_logits(logits + row * logits_row, bias, used, column, within, softcap)
        there = used[:, None] & within[None, :]
        every += tl.sum(tl.where(there, x, 0.0), 1)
        hit = there & (target[:, None] == column[None, :])
        # A row meets its target once, in one of the chunks; until then what it has is no number.
        found = tl.sum(hit.to(tl.int32), 1) > 0
        chosen = tl.where(found, tl.sum(tl.where(hit, x, 0.0), 1), chosen)
        x = tl.where(there, x, float("-inf"))
        new = tl.maximum(highest, tl.max(x, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        highest = new
    tl.store(after + row, highest, mask=inside)
    tl.store(after + after_row + row, total, mask=inside)
    tl.store(after + 2 * after_row + row, chosen, mask=inside)
    tl.store(after + 3 * after_row + row, every, mask=inside)


@triton.jit(do_not_specialize=["rows", "first"])
def gradient_kernel(
    logits, bias, targets, factors, out, logits_row, factors_row, out_row, rows, columns, first, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax * factors[1] + (factors[2] at the target) + factors[3]; 0 where a row has no target."""
    parts = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, within = row < rows, column < columns
    target = tl.load(targets + row, mask=inside, other=-1)
    used = target >= 0
    target -= first
    lse = tl.load(factors + row, mask=used, other=0.0)
    softmax = tl.load(factors + factors_row + row, mask=used, other=0.0)
    hot = tl.load(factors + 2 * factors_row + row, mask=used, other=0.0)
    every = tl.load(factors + 3 * factors_row + row, mask=used, other=0.0)
    x, t = load_logits(logits + row * logits_row, bias, used, column, within, softcap)
    y = tl.exp(x - lse[:, None]) * softmax[:, None] + every[:, None]
    y += tl.where(target[:, None] == column[None, :], hot[:, None], 0.0)
    if softcap is not None:
        y *= 1.0 - t * t
    y = tl.where(used[:, None], y, 0.0)
    store_tile(out + row * out_row, inside, column, within, y)


def cross_entropy_sums(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sums: Tensor,
    first: int,
    softcap: float,
    total: bool,
) -> Tensor:
    """Sums [4, T] that also count logits [T, N] of classes from ``first`` on."""
    logits, sums, targets = dense(logits), dense(sums), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    after = torch.empty_like(sums, memory_format=torch.contiguous_format)
    rows, columns = logits.shape
    if rows:
        with torch.cuda.device_of(logits):
            sums_kernel[(triton.cdiv(rows, TILE["BLOCK_M"]),)](
                logits, bias, targets, sums, after, logits.stride(0), sums.stride(0), after.stride(0), rows, columns,
                first, softcap or None, **TILE,
            )  # fmt: skip
    return after


def cross_entropy_gradient(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor,
    first: int,
    softcap: float,
    out: Tensor,
    sideways: Tensor | None,
) -> None:
    """The gradient of logits [T, N] to ``out``, which may be the logits, and transposed to ``sideways``."""
    logits, factors, targets = dense(logits), dense(factors), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, columns = logits.shape
    if rows and columns:
        programs = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(columns, TILE["BLOCK_N"])
        with torch.cuda.device_of(logits):
            gradient_kernel[(programs,)](
                logits, bias, targets, factors, out, logits.stride(0), factors.stride(0), out.stride(0), rows, columns,
                first, softcap or None, **TILE,
            )  # fmt: skip
    if sideways is not None:
        sideways.copy_(out.t())
