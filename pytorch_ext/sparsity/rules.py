# SPDX-License-Identifier: Apache-2.0
"""Rules about tokens, and the layouts that keep exactly what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gapless.plan.block_cells import blocks_of_cells
from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_layout import BlockLayout
from gapless.plan.block_masks import Blocks, from_parts

Span = tuple[np.ndarray, np.ndarray]  # first tokens, last tokens (both counted in)


@dataclass(frozen=True)
class Rule:
    """What a sequence of ``len_q`` queries and ``len_k`` keys sees.

    Attributes:
        visible: (query, key), tensors that broadcast, to bool: the query sees the key.
        bounds: (spans of queries, spans of keys), as columns and rows that broadcast, to two arrays of bool: some pair
            of tokens of the two spans sees one another; all pairs do. ``some`` has to be exact; ``all`` may miss some.
        borders_q, borders_k: tokens at which the rule changes; spans do not reach across them.
        shifts: between borders only the difference of the two tokens counts.
    """

    visible: Callable[[Tensor, Tensor], Tensor]
    bounds: Callable[[Span, Span], tuple[np.ndarray, np.ndarray]]
    borders_q: tuple[int, ...] = ()
    borders_k: tuple[int, ...] = ()
    shifts: bool = False


def blocks_of_rule(rule: Rule, lengths: tuple[int, int], block: tuple[int, int], exact: bool) -> Blocks:
    """The blocks of one sequence; without ``exact`` every block that holds a visible pair is full."""
    (len_q, len_k), (block_q, block_k) = lengths, block
    nq, nk = -(-len_q // block_q), -(-len_k // block_k)
    if nq == 0 or nk == 0:
        some = every = np.zeros((nq, nk), dtype=bool)
    else:
        spans_q, first_q = _spans(len_q, block_q, rule.borders_q)
        spans_k, first_k = _spans(len_k, block_k, rule.borders_k)
        columns = (spans_q[0][:, None], spans_q[1][:, None])
        rows = (spans_k[0][None, :], spans_k[1][None, :])
        shape = (spans_q[0].shape[0], spans_k[0].shape[0])
        some, every = (np.broadcast_to(x, shape) for x in rule.bounds(columns, rows))
        some = np.logical_or.reduceat(np.logical_or.reduceat(some, first_q, axis=0), first_k, axis=1)
        every = np.logical_and.reduceat(np.logical_and.reduceat(every, first_q, axis=0), first_k, axis=1)
    undecided = torch.from_numpy(some)[None]
    full = undecided if not exact else torch.from_numpy(every)[None]
    alike = _alike(rule, lengths, block) if rule.shifts and exact else None
    return blocks_of_cells(
        full, undecided, lengths, block, lambda _, query, key: rule.visible(query, key), alike
    )


def _alike(rule: Rule, lengths: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """int64 [q_blocks, k_blocks]: blocks at one difference, between the same borders, have the same number."""
    starts, between = [], []
    for length, size, borders in zip(lengths, block, (rule.borders_q, rule.borders_k), strict=True):
        start = np.arange(0, length, size)
        ends = np.unique([*borders, length])
        first, last = (np.searchsorted(ends, x, side="right") for x in (start, start + size - 1))
        starts.append(start)
        between.append(np.unique(first * (len(ends) + 1) + last, return_inverse=True)[1].reshape(-1))
    difference = starts[1][None, :] - starts[0][:, None]
    kinds = [x.max(initial=0) + 1 for x in between]
    number = (difference * kinds[0] + between[0][:, None]) * kinds[1] + between[1][None, :]
    return torch.from_numpy(number)


def _spans(length: int, block: int, borders: tuple[int, ...]) -> tuple[Span, np.ndarray]:
    """Tokens cut at blocks and borders: (first, last) of each span, and the first span of each block."""
    starts = np.arange(0, length, block)
    inner = [b for b in borders if 0 < b < length]
    first = np.union1d(starts, np.asarray(inner, dtype=starts.dtype))
    last = np.append(first[1:], length) - 1
    return (first, last), np.searchsorted(first, starts)


def layout_of_rule(
    rule: Callable[[int, int], Rule],
    grid: BlockGrid,
    *,
    heads: int = 1,
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The rule of each sequence, made from its lengths, the same in every head.

    Raises:
        ValueError: heads below 1.
    """
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads is {heads!r:.80}: it has to be a whole number, at least 1")
    known: dict[tuple[int, int], Blocks] = {}
    block = (grid.block_q, grid.block_k)
    parts = []
    for lengths in zip(grid.lengths_q, grid.lengths_k, strict=True):
        if lengths not in known:
            found = blocks_of_rule(rule(*lengths), lengths, block, exact)
            shape = (heads, *found.full.shape[1:])
            known[lengths] = Blocks(found.full.expand(shape), found.slots.expand(shape), found.patterns)
        parts.append(known[lengths])
    if not parts:
        nothing = torch.zeros(heads, 0, 0, dtype=torch.bool)
        return BlockLayout.from_packed(grid, nothing).to(device)
    return from_parts(grid, parts).to(device)


def band(left: int, right: int, shift: int) -> Rule:
    """Keys from ``left`` before to ``right`` after the query's position, query + shift; -1 is no limit."""
    low = -left if left >= 0 else -(1 << 40)
    high = right if right >= 0 else 1 << 40

    def visible(query: Tensor, key: Tensor) -> Tensor:
        distance = key - (query + shift)
        return (distance >= low) & (distance <= high)

    def bounds(q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        least, most = k[0] - (q[1] + shift), k[1] - (q[0] + shift)
        return (most >= low) & (least <= high), (least >= low) & (most <= high)

    return Rule(visible, bounds, shifts=True)


def either(*rules: Rule) -> Rule:
    """What any of the rules lets through."""

    def visible(query: Tensor, key: Tensor) -> Tensor:
        seen = rules[0].visible(query, key)
        for rule in rules[1:]:
            seen = seen | rule.visible(query, key)
        return seen

    def bounds(q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        found = [rule.bounds(q, k) for rule in rules]
        some, every = found[0]
        for other, all_other in found[1:]:
            some, every = some | other, every | all_other
        return some, every

    return Rule(
        visible,
        bounds,
        tuple(b for rule in rules for b in rule.borders_q),
        tuple(b for rule in rules for b in rule.borders_k),
        all(rule.shifts for rule in rules),
    )


def segments(lengths: list[int], sees: np.ndarray) -> Rule:
    """Tokens in consecutive segments: those of segment ``i`` see those of segment ``j`` where ``sees[i, j]``."""
    ends = np.cumsum(lengths)
    of_token = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    table = torch.from_numpy(sees)

    def bounds(q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        i, j = (np.searchsorted(ends, x[0], side="right") for x in (q, k))
        return sees[i, j], sees[i, j]

    borders = tuple(ends[:-1].tolist())
    return Rule(lambda query, key: table[of_token[query], of_token[key]], bounds, borders, borders)
