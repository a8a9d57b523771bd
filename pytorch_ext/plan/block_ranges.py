# SPDX-License-Identifier: Apache-2.0
"""Ranges of tokens, as MagiAttention (arXiv:2505.13211) has them, and layouts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gapless.plan import block_layout
from gapless.plan.block_grid import BlockGrid, Lengths
from gapless.plan.block_masks import Blocks, from_parts, token_blocks
from gapless.plan.block_patterns import words

KINDS = 4  # full, causal, inverse causal, both
CELLS_AT_ONCE = 1 << 23  # bounds the memory that a call takes


class TokenRanges(NamedTuple):
    """All queries of ``q_ranges[n]`` see all keys of ``k_ranges[n]`` in head ``heads[n]``."""

    q_ranges: Tensor  # int32 [n, 2], (first token, token after the last), counted through all sequences
    k_ranges: Tensor  # int32 [n, 2]
    heads: Tensor  # int32 [n]


def from_ranges(
    q_ranges: Any,
    k_ranges: Any,
    *,
    lengths_q: Lengths,
    lengths_k: Lengths | None = None,
    block_q: int,
    block_k: int,
    kinds: Any = None,
    heads: Any = None,
    num_heads: int = 1,
    device: torch.device | str = "cpu",
) -> block_layout.BlockLayout:
    """Exactly the pairs of tokens that some range holds; ranges may overlap.

    Args:
        q_ranges, k_ranges: whole numbers [n, 2], (first token, token after the last), tokens of all sequences counted
            through. A pair of ranges lies in one sequence.
        lengths_q, lengths_k: tokens of the sequence, or of each; None: keys are as many as queries.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.
        kinds: [n], 0: all pairs; 1: causal, aligned at the bottom right corner of the pair of ranges; 2: the inverse,
            keys from the diagonal on, aligned at the top left corner; 3: both. None: all 0.
        heads: [n], the pattern head of each pair; None: all of them.
        num_heads: pattern heads.
        device: of the layout.

    Raises:
        ValueError: ranges that run backwards or leave their sequence, other kinds or heads, shapes that do not fit.
    """
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k, device="cpu")
    pairs_q, pairs_k = _pairs("q_ranges", q_ranges), _pairs("k_ranges", k_ranges)
    n = len(pairs_q)
    if len(pairs_k) != n:
        raise ValueError(f"k_ranges are {len(pairs_k)}, q_ranges are {n}: each needs the other")
    of_kind = _numbers("kinds", kinds, n, KINDS)
    of_head: list[int | None] = [None] * n
    if heads is not None:
        of_head = list(_numbers("heads", heads, n, num_heads))
    starts_q, starts_k = grid.cu_seqlens_q.tolist(), grid.cu_seqlens_k.tolist()
    ranges: list[list[tuple[int, int, int, int, int, int | None]]] = [[] for _ in range(grid.batch)]
    for i, (q, k) in enumerate(zip(pairs_q, pairs_k, strict=True)):
        for name, (first, end), total in (("q", q, starts_q[-1]), ("k", k, starts_k[-1])):
            if not 0 <= first <= end <= total:
                raise ValueError(
                    f"{name}_ranges[{i}] is ({first}, {end}): it has to run forwards from 0 to {total} at most"
                )
        if q[0] == q[1] or k[0] == k[1]:
            continue
        s = bisect_right(starts_q, q[0]) - 1
        if q[1] > starts_q[s + 1] or not starts_k[s] <= k[0] or k[1] > starts_k[s + 1]:
            raise ValueError(
                f"q_ranges[{i}] is {q}, k_ranges[{i}] is {k}: they have to lie in one sequence; that of the first "
                f"query has queries {starts_q[s]} to {starts_q[s + 1]} and keys {starts_k[s]} to {starts_k[s + 1]}"
            )
        at_q, at_k = starts_q[s], starts_k[s]
        ranges[s].append((q[0] - at_q, q[1] - at_q, k[0] - at_k, k[1] - at_k, of_kind[i], of_head[i]))
    parts = [
        _blocks(found, num_heads, (len_q, len_k), (block_q, block_k))
        for found, len_q, len_k in zip(ranges, grid.lengths_q, grid.lengths_k, strict=True)
    ]
    return from_parts(grid, parts).to(device) if parts else _nothing(grid, num_heads).to(device)


def _nothing(grid: BlockGrid, heads: int) -> block_layout.BlockLayout:
    mask = torch.zeros(heads, grid.q_blocks, grid.max_k_blocks, dtype=torch.bool)
    return block_layout.BlockLayout.from_packed(grid, mask)


def _blocks(ranges, heads: int, lengths: tuple[int, int], block: tuple[int, int]) -> Blocks:
    """The blocks of one sequence, some rows of blocks at a time."""
    (len_q, len_k), (block_q, block_k) = lengths, block
    step = max(1, CELLS_AT_ONCE // max(1, heads * block_q * len_k)) * block_q
    parts, patterns = [], 0
    for start in range(0, len_q, step):
        stop = min(start + step, len_q)
        tokens = torch.zeros(heads, stop - start, len_k, dtype=torch.bool)
        for q0, q1, k0, k1, kind, head in ranges:
            low, high = max(q0, start), min(q1, stop)
            if low >= high:
                continue
            rows = tokens[slice(None) if head is None else slice(head, head + 1), low - start : high - start]
            if kind == 0:
                rows[..., k0:k1] = True
                continue
            i, j = torch.arange(low, high)[:, None], torch.arange(k0, k1)
            seen = torch.ones(high - low, k1 - k0, dtype=torch.bool)
            if kind in (1, 3):
                seen &= j - k1 <= i - q1
            if kind in (2, 3):
                seen &= j - k0 >= i - q0
            rows[..., k0:k1] |= seen
        part = token_blocks(tokens, block_q, block_k)
        parts.append(part._replace(slots=torch.where(part.slots > 0, part.slots + patterns, 0)))
        patterns += part.patterns.shape[0]
    if not parts:
        empty = torch.zeros(heads, 0, -(-len_k // block_k), dtype=torch.int32)
        return Blocks(empty.bool(), empty, torch.zeros(0, block_k, words(block_q), dtype=torch.int32))
    full, slots, found = (
        torch.cat(x, dim=d) for x, d in zip(zip(*parts, strict=True), (1, 1, 0), strict=True)
    )
    return Blocks(full, slots, found)


def to_ranges(layout: block_layout.BlockLayout) -> TokenRanges:
    """Ranges that hold exactly the layout's pairs of tokens, each pair once.

    Neighbouring blocks of a row become one range, equal rows that follow one another too.
    """
    found: list[tuple[int, int, int, int, int]] = []
    at_q = at_k = 0
    grid = layout.grid
    for s, mask in enumerate(layout.to_token_mask()):
        mask = mask.cpu()
        for h in range(layout.heads):
            for q0, q1, k0, k1 in _rectangles(mask[h]):
                found.append((q0 + at_q, q1 + at_q, k0 + at_k, k1 + at_k, h))
        at_q, at_k = at_q + grid.lengths_q[s], at_k + grid.lengths_k[s]
    table = torch.tensor(found, dtype=torch.int32).view(-1, 5).to(layout.device)
    return TokenRanges(table[:, :2].contiguous(), table[:, 2:4].contiguous(), table[:, 4].contiguous())


def _rectangles(mask: Tensor) -> list[tuple[int, int, int, int]]:
    """(q0, q1, k0, k1) of the runs in the rows of bool [len_q, len_k]; equal neighbouring rows share theirs."""
    if mask.numel() == 0:
        return []
    same = (mask[1:] == mask[:-1]).all(1)
    first = [0, *((~same).nonzero().flatten() + 1).tolist(), mask.shape[0]]
    edges = torch.nn.functional.pad(mask[first[:-1]].int(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero()[:, 1].tolist()
    return [(first[row], first[row + 1], k0, k1) for (row, k0), k1 in zip(starts, stops, strict=True)]


def _pairs(name: str, ranges: Any) -> list[tuple[int, int]]:
    t = torch.as_tensor(ranges)
    if t.numel() == 0:
        return []
    if t.dim() != 2 or t.shape[1] != 2 or t.dtype.is_floating_point or t.dtype == torch.bool:
        raise ValueError(
            f"{name} has shape {list(t.shape)} and is {t.dtype}: it has to be whole numbers [n, 2]"
        )
    return [(a, b) for a, b in t.tolist()]


def _numbers(name: str, values: Any, n: int, limit: int) -> Sequence[int]:
    found = [0] * n if values is None else [int(x) for x in values]
    if len(found) != n:
        raise ValueError(f"{name} are {len(found)}, the ranges are {n}")
    for i, x in enumerate(found):
        if not 0 <= x < limit:
            raise ValueError(f"{name}[{i}] is {x}: it has to be from 0 to {limit - 1}")
    return found
