# SPDX-License-Identifier: Apache-2.0
"""Attention mass of blocks in Triton: from a known LSE, or along with dense attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.attention_config import configure
from gapless.kernels.attention_launch import constants, dense, sides
from gapless.kernels.attention_steps import load_lse, weights
from gapless.kernels.attention_tiles import LOG2E, PRECISION, load_rows, span
from gapless.kernels.block_rows import locate
from gapless.kernels.varlen_attention import launch_fwd, varlen_attention_fwd

# Bytes of the LSE of every row over every tile of keys, which the fused pass keeps until it knows the whole row's.
SCRATCH = 1 << 30
FOLD_CELLS = 4096  # that a program holds at a time


@triton.jit
def _weigh(
    q, lse, position, begin, end, length, k, k_token, mass, exists, scale, softcap, right,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the mass of the keys from ``begin`` to ``end``, tile by tile; ``mass`` [GROUPS] points at each unit's."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < length if MASKED else None
        kt = load_rows(k + keys.to(tl.int64) * k_token, inside, DIM, BLOCK_DIM, UPCAST)
        products = tl.dot(q, tl.trans(kt), input_precision=PRECISION)
        p, _ = weights(
            products, lse[:, None], position[:, None], keys[None, :], length, None, None,
            scale, softcap, None, None, None, right, MASKED,
        )  # fmt: skip
        sums = tl.reshape(tl.sum(p, 1), [GROUPS, BLOCK_M // GROUPS])
        tl.store(mass + start // BLOCK_N, tl.sum(sums, 1), mask=exists)


@triton.jit(do_not_specialize=["tokens", "row_units", "key_tiles", "right"])
def mass_kernel(
    q, k, lse, mass, cu_q, cu_k, table, q_token, q_head, k_token, k_head,
    tokens, row_units, key_tiles, scale, softcap, right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mass of one tile of queries and head, by units of UNIT queries (a block, or less) and BLOCK_N keys.

    ``mass`` [heads, row_units, key_tiles] holds zeros, ``table`` comes from :func:`locate`.
    """
    GROUPS: tl.constexpr = BLOCK_M // UNIT
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    # With a causal mask the last tiles cost most, so they run first.
    tile = table + (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS * 3
    sequence = tl.load(tile)
    if sequence < 0:
        return
    start = tl.load(tile + 1)
    units_before = tl.load(tile + 2) * (BLOCK_Q // UNIT)
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    first_key = tl.load(cu_k + sequence)
    length = tl.load(cu_k + sequence + 1) - first_key
    shift = length - queries
    k += first_key.to(tl.int64) * k_token + head // GROUP * k_head
    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < queries
    position = rows + shift
    token = (first + rows).to(tl.int64)
    qt = load_rows(q + token * q_token + head * q_head, inside, DIM, BLOCK_DIM, UPCAST)
    log = load_lse(lse + head * tokens + token, inside)
    unit = tl.arange(0, GROUPS)
    mass += (head * row_units + units_before + start // UNIT + unit) * key_tiles
    exists = start + unit * UNIT < queries  # the units after belong to the next sequence
    _, full_low, full_high, high = span(
        start + shift, tl.minimum(start + BLOCK_M, queries) - 1 + shift, length, None, right, BLOCK_N
    )
    _weigh(
        qt, log, position, full_low, full_high, length, k, k_token, mass, exists, scale, softcap, right,
        DIM, BLOCK_DIM, BLOCK_M, BLOCK_N, GROUPS, False, UPCAST,
    )  # fmt: skip
    _weigh(
        qt, log, position, full_high, high, length, k, k_token, mass, exists, scale, softcap, right,
        DIM, BLOCK_DIM, BLOCK_M, BLOCK_N, GROUPS, True, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "q_blocks", "k_blocks", "right"])
def fold_kernel(
    parts, lse, mass, cu_q, cu_k, table, tokens, q_blocks, k_blocks, parts_head, right,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Mass of one query block and head from the LSE of its rows over tiles of BLOCK_N keys; COUNT blocks at a time."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    row = tl.program_id(0) // HEADS
    sequence = tl.load(table + row * 3)
    first = tl.load(cu_q + sequence)
    queries = tl.load(cu_q + sequence + 1) - first
    length = tl.load(cu_k + sequence + 1) - tl.load(cu_k + sequence)
    rows = tl.load(table + row * 3 + 1) + tl.arange(0, BLOCK_Q)
    inside = rows < queries
    end = length + rows * 0
    if right is not None:
        end = tl.minimum(rows + length - queries + right + 1, length)
    token = (first + rows).to(tl.int64)
    log = load_lse(lse + head * tokens + token, inside) * LOG2E
    parts += head * parts_head + token
    mass += (head * q_blocks + row) * k_blocks
    for start in range(0, k_blocks, COUNT):
        tiles = start * STEPS + tl.arange(0, COUNT * STEPS)
        # Tiles that a row does not see are not written.
        seen = inside[None, :] & ((tiles * BLOCK_N)[:, None] < end[None, :])
        at = parts[None, :] + tiles.to(tl.int64)[:, None] * tokens
        p = tl.exp2(tl.load(at, mask=seen, other=-float("inf")) - log[None, :])
        sums = tl.sum(tl.reshape(tl.sum(p, 1), [COUNT, STEPS]), 1)
        blocks = start + tl.arange(0, COUNT)
        tl.store(mass + blocks, sums, mask=blocks < k_blocks)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    blocks: list[int],
    score: list[float],
    window: list[int],
) -> Tensor:
    """Mass float32 [heads, q_blocks, max_k_blocks]; see :func:`gapless.block_mass`.

    ``plan`` is ``VarlenPlan.tensors``, ``blocks`` [block_q, block_k, q_blocks, max_k_blocks], ``score``
    [scale, softcap] (0 is none), ``window`` [-1, 0] (causal) or [-1, -1]. float64 is not supported.
    """
    q, k, lse = dense(q), dense(k), lse.contiguous()
    block_q, block_k, q_blocks, k_blocks = blocks
    heads, dim = q.shape[1:]
    config = configure("mass", dim, q.dtype, q.device)
    # A tile holds whole blocks, or a block holds whole tiles.
    config = config._replace(block_n=min(config.block_n, block_k))
    unit = min(block_q, config.block_m)
    parts, steps = block_q // unit, block_k // config.block_n
    sums = q.new_zeros(heads, q_blocks * parts, k_blocks * steps, dtype=torch.float32)
    common = constants(config, q, q, k.shape[1], score)
    del common["DIM_V"], common["BLOCK_DIM_V"]
    with torch.cuda.device_of(q):
        if q_blocks and k_blocks:
            # There are at most as many tiles as units: those that do not exist do nothing.
            table = locate(plan[0], config.block_m, block_q, q_blocks * parts)
            mass_kernel[(q_blocks * parts * heads,)](
                q, k, lse, sums, plan[0], plan[1], table, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
                row_units=q_blocks * parts, key_tiles=k_blocks * steps, right=sides(window)[1],
                BLOCK_Q=block_q, UNIT=unit, **common,
            )  # fmt: skip
    return sums.view(heads, q_blocks, parts, k_blocks, steps).sum((2, 4)) if parts * steps > 1 else sums


def attention_mass_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    blocks: list[int],
    score: list[float],
    window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense (out, LSE) and their mass; arguments as :func:`block_mass` takes them.

    The forward pass writes down each row's LSE over every tile of keys, which a second small kernel folds with the
    whole row's. Where that takes too much memory, heads take turns; where one is too much, the keys are read again.
    """
    q, k, v = map(dense, (q, k, v))
    block_q, block_k, q_blocks, k_blocks = blocks
    tokens, heads = q.shape[:2]
    group = heads // k.shape[1]
    config = configure("fwd", max(q.shape[-1], v.shape[-1]), q.dtype, q.device)
    config = config._replace(block_n=min(config.block_n, block_k))
    key_tiles = k_blocks * (block_k // config.block_n)
    together = SCRATCH // max(4 * tokens * key_tiles * group, 1) * group
    if not together:
        out, lse = varlen_attention_fwd(q, k, v, plan, None, None, None, None, score, window)
        return out, lse, block_mass(q, k, lse, plan, blocks, score, window)
    out = q.new_empty(tokens, heads, v.shape[-1])
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    mass = torch.empty(heads, q_blocks, k_blocks, dtype=torch.float32, device=q.device)
    scratch = q.new_empty(min(together, heads), key_tiles, tokens, dtype=torch.float32)
    count = max(FOLD_CELLS // (block_q * (block_k // config.block_n)), 1)
    with torch.cuda.device_of(q):
        table = locate(plan[0], block_q, block_q, q_blocks)
        for low in range(0, heads, together):
            some, some_kv = slice(low, low + together), slice(low // group, (low + together) // group)
            part = out if together >= heads else q.new_empty(out[:, some].shape)
            inputs = q[:, some], k[:, some_kv], v[:, some_kv]
            launch_fwd(*inputs, part, lse[some], plan, score, window, config, parts=scratch)
            if part is not out:
                out[:, some] = part
            if q_blocks and k_blocks:
                fold_kernel[(q_blocks * part.shape[1],)](
                    scratch, lse[some], mass[some], plan[0], plan[1], table, tokens, q_blocks, k_blocks,
                    scratch.stride(0), sides(window)[1], HEADS=part.shape[1], BLOCK_Q=block_q, BLOCK_K=block_k,
                    BLOCK_N=config.block_n, COUNT=count,
                )  # fmt: skip
    return out, lse, mass
