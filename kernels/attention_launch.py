# SPDX-License-Identifier: Apache-2.0
"""What the launches of all attention kernels share: strides, constants, and the deltas of a backward pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from gapless.kernels.attention_config import Config, padded
from gapless.kernels.attention_tiles import load_rows

DELTA_ROWS = 64


def dense(t: Tensor) -> Tensor:
    """``t``, or a copy where its last dimension is not contiguous: kernels take every other stride."""
    return t if t.stride(-1) == 1 else t.contiguous()


def sides(window: list[int], most: int = 1 << 30) -> tuple[int | None, int | None]:
    """Limits as kernels take them: None is none, others are at most so wide that position + limit stays in int32."""
    left, right = (None if side < 0 else min(side, most) for side in window)
    return left, right


def constants(config: Config, q: Tensor, v: Tensor, kv_heads: int, score: list[float]) -> dict[str, Any]:
    """Arguments of every kernel with tiles of queries and of keys; None where a feature is off compiles it away."""
    dim, dim_v = q.shape[-1], v.shape[-1]
    return {
        "tokens": q.shape[0],
        "scale": score[0],
        "softcap": score[1] or None,
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


def deltas(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """float32 [heads, tokens]; all tensors are :func:`dense`, lse and dlse contiguous."""
    tokens, heads, dim = out.shape
    delta = torch.empty_like(lse)
    if tokens:
        delta_kernel[(triton.cdiv(tokens, DELTA_ROWS) * heads,)](
            dout, out, lse, dlse, delta,
            dout.stride(0), dout.stride(1), out.stride(0), out.stride(1), tokens,
            HEADS=heads, DIM_V=dim, BLOCK_DIM_V=padded(dim), BLOCK_M=DELTA_ROWS,
        )  # fmt: skip
    return delta
