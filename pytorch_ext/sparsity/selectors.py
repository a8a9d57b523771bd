# SPDX-License-Identifier: Apache-2.0
"""From scores of blocks to the blocks that attention computes.

Every selector takes fp32 scores [heads, q_blocks, max_k_blocks] (:mod:`gapless.sparsity.scorers`) and the
:class:`BlockGrid` that they are of, and gives a :class:`Selection`. The rules that all of them share:

- A block that no query of its row sees (beyond the sequence, or above the causal diagonal) is never kept.
- Of equal scores the lowest key block goes first, whatever the device.
- A NaN score ranks below every number: such a block is kept only if nothing else is left, or if it is forced.
- Blocks that ``keep`` forces are kept whatever their score, inside the budget or on top of it, as ``keep`` says.
- Nothing waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from gapless.ops.checks import check_shape, check_tensors, number
from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_layout import BlockLayout
from gapless.plan.block_lists import on_host

# Scores become integers in the same order, with room for what is no score.
UNSEEN, NOT_A_NUMBER, FORCED = -(2**31), -(2**31) + 1, 2**31 - 1
INFINITE = 0x7F800000  # what infinity becomes; only NaN is beyond it, or beyond ~INFINITE
SHARE_BITS = 40  # shares of a row as whole numbers: their running sums are exact, in any order, on any device


@dataclass(frozen=True)
class Keep:
    """Blocks that a selection keeps whatever their scores. A block counts if one of its tokens does.

    Attributes:
        sink: first keys of each sequence that every query sees, in tokens.
        window: keys up to so many tokens away from the query's position, which is its own number counted from the end
            where lengths differ; 0 is the diagonal, None is no window.
        text: (begin, end) of the text's tokens in each sequence, among queries and keys alike: every query sees them,
            and they see every key (AdaSpa's text sink).
        inside_budget: they are part of the budget, which is exceeded only where they alone exceed it. False: the budget
            is for the others.
    """

    sink: int = 0
    window: int | None = None
    text: tuple[int, int] = (0, 0)
    inside_budget: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.sink, int) or self.sink < 0:
            raise ValueError(f"sink is {self.sink!r:.80}: it has to be a number of tokens, 0 for none")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 0):
            raise ValueError(f"window is {self.window!r:.80}: it has to be a number of tokens, None for none")
        begin, end = self.text
        if not 0 <= begin <= end:
            raise ValueError(
                f"text is {self.text!r:.80}: it has to be (begin, end) in tokens, 0 <= begin <= end"
            )


NOTHING = Keep()


@dataclass(frozen=True, eq=False)
class Selection:
    """The blocks that were kept.

    Attributes:
        grid: lengths and block sizes.
        mask: bool [heads, q_blocks, max_k_blocks].
        scores: float32, what it was selected from.
        causal: under the causal mask.
        capacity: most blocks that ``mask`` can keep, known without looking.
    """

    grid: BlockGrid
    mask: Tensor
    scores: Tensor
    causal: bool
    capacity: int

    @cached_property
    def layout(self) -> BlockLayout:
        """For :func:`gapless.block_sparse_attention`."""
        return BlockLayout.from_packed(self.grid, self.mask, capacity=self.capacity)

    @property
    def density_per_head(self) -> Tensor:
        """float32 [heads]: blocks kept of those that the mask lets a query see; 0 where there are none."""
        total = int(_visible_counts(self.grid, self.causal).sum())
        return self.mask.sum((1, 2)).float() / max(total, 1)

    def recall(self, mass: Tensor | None = None, *, per_sequence: bool = False) -> Tensor:
        """How much of ``mass`` is kept; see :func:`recall`. None: of the scores, if those are masses."""
        return recall(
            self.scores if mass is None else mass, self.mask, grid=self.grid, per_sequence=per_sequence
        )


def recall(
    mass: Tensor, kept: BlockLayout | Tensor, *, grid: BlockGrid | None = None, per_sequence: bool = False
) -> Tensor:
    """The share of the attention weights that lies in the kept blocks (AdaSpa, arXiv:2502.21079, equation 9).

    Each row of blocks is divided by its own sum and counts with its number of queries. So masses from an LSE of an
    earlier step, whose rows do not sum up to that number, give a true figure too.

    Args:
        mass: [heads, q_blocks, max_k_blocks], not negative: from :func:`gapless.block_mass` or a scorer.
        kept: a layout (a partial block counts in full), or bool of the shape of ``mass`` with its ``grid``.
        grid: of ``kept``, if that is a tensor.
        per_sequence: for each sequence apart.

    Returns:
        [heads], or [heads, batch]. Rows without any mass do not count; 1 where no row counts.
    """
    if isinstance(kept, BlockLayout):
        grid, kept = kept.grid, kept.to_mask().repeat_interleave(mass.shape[0] // kept.heads, dim=0)
    if grid is None:
        raise ValueError("grid is None: it has to be given with a tensor of kept blocks")
    check_shape("mass", mass, (mass.shape[0], grid.q_blocks, grid.max_k_blocks))
    check_shape("kept", kept, mass.shape)
    total = mass.sum(-1)
    share = (mass * kept).sum(-1) / torch.where(total > 0, total, 1)
    weight = torch.where(total > 0, _queries(grid), 0).to(mass.dtype)
    counts = list(grid.counts_q) if per_sequence else [grid.q_blocks]
    pairs = zip((share * weight).split(counts, 1), weight.split(counts, 1), strict=True)
    found = [
        torch.where(w.sum(1) > 0, s.sum(1) / w.sum(1).clamp(min=torch.finfo(w.dtype).tiny), 1.0)
        for s, w in pairs
    ]
    if not per_sequence:
        return found[0]
    return torch.stack(found, 1) if found else mass.new_zeros(mass.shape[0], 0)


def top_k(
    scores: Tensor,
    grid: BlockGrid,
    *,
    density: float | Tensor | None = None,
    blocks: int | None = None,
    at_least: int = 1,
    keep: Keep = NOTHING,
    causal: bool = False,
    max_density: float = 1.0,
) -> Selection:
    """The best blocks of each row of blocks, the same share of each row.

    Args:
        scores: float32 [heads, q_blocks, max_k_blocks].
        grid: lengths and block sizes.
        density: share of the blocks that the row may see, rounded to whole blocks (halves up); a number, or a tensor of
            float64 [heads] or [heads, batch] on the device of the scores.
        blocks: a number of blocks for each row, in place of ``density``.
        at_least: blocks that each row keeps if it has as many, whatever the density says.
        keep: blocks that are kept anyway.
        causal: under the causal mask.
        max_density: a bound of ``density`` if that is a tensor; a tight one saves memory and time.
    """
    scores = _check(scores, grid)
    visible, counts = _visible(grid, causal), _visible_counts(grid, causal)
    forced, forced_counts = _forced(grid, keep, causal)
    if (density is None) == (blocks is None):
        raise ValueError(f"density is {density!r:.80}, blocks is {blocks!r:.80}: give one of the two")
    if density is not None:
        budget, most = _budget(density, max_density, counts, grid, scores)
    else:
        assert blocks is not None
        most = np.minimum(_whole("blocks", blocks), counts)
        budget = _rows(most, scores)
    least = np.minimum(_whole("at_least", at_least), counts)
    budget = torch.maximum(budget, _rows(least, scores))
    most = np.maximum(most, least)
    given = _rows(forced_counts, scores)
    if keep.inside_budget:
        budget, most = torch.maximum(budget, given), np.maximum(most, forced_counts)
    else:
        budget, most = budget + given, most + forced_counts
    most = np.minimum(most, counts)
    keys = _keys(scores, visible, forced)
    mask = _take(keys, budget[..., None], int(most.max(initial=0)))
    return Selection(grid, mask, scores, causal, scores.shape[0] * int(most.sum()))


def top_k_global(
    scores: Tensor,
    grid: BlockGrid,
    *,
    density: float | Tensor | None = None,
    blocks: int | None = None,
    at_least: int = 1,
    keep: Keep = NOTHING,
    causal: bool = False,
    max_density: float = 1.0,
) -> Selection:
    """The best blocks of a whole head: rows compete for one budget for each head and sequence.

    Rows of scores should mean the same, such as masses of an LSE of the same step. Arguments as in :func:`top_k`;
    ``density`` and ``blocks`` are of all blocks of the head in a sequence, ``at_least`` is still for each row, inside
    the budget.
    """
    scores = _check(scores, grid)
    heads = scores.shape[0]
    visible, counts = _visible(grid, causal), _visible_counts(grid, causal)
    forced, forced_counts = _forced(grid, keep, causal)
    if (density is None) == (blocks is None):
        raise ValueError(f"density is {density!r:.80}, blocks is {blocks!r:.80}: give one of the two")
    totals = _by_sequence(counts, grid)
    if density is not None:
        budget, most = _budget(density, max_density, totals, grid, scores, rows=False)
    else:
        assert blocks is not None
        most = np.minimum(_whole("blocks", blocks), totals)
        budget = _rows(most, scores)
    least = np.minimum(_whole("at_least", at_least), counts)
    keys = _keys(scores, visible, forced)
    best = _take(keys, _rows(least, scores)[..., None], int(least.max(initial=0)))
    keys = torch.where(best, FORCED, keys)
    given, room = _by_sequence(forced_counts, grid), _by_sequence(least, grid)
    if keep.inside_budget:
        most = np.maximum(most, np.minimum(given + room, totals))
    else:
        budget = budget + _rows(given, scores)
        most = np.minimum(most + given + room, totals)
    parts = []
    for i, part in enumerate(grid.split(keys)):
        flat = part.flatten(1)
        taken = torch.maximum(budget[:, i : i + 1].expand(heads, -1), (flat == FORCED).sum(1, keepdim=True))
        parts.append(_take(flat, taken, int(most[i])).view_as(part))
    mask = grid.pack(parts) if parts else torch.zeros_like(keys, dtype=torch.bool)
    return Selection(grid, mask, scores, causal, heads * int(most.sum()))


def top_p(
    scores: Tensor,
    grid: BlockGrid,
    p: float | Tensor,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    keep: Keep = NOTHING,
    causal: bool = False,
) -> Selection:
    """The fewest blocks of each row whose scores add up to the share ``p`` of the row's sum.

    Args:
        scores: float32 [heads, q_blocks, max_k_blocks], masses: what is negative or NaN counts as 0, infinity as the
            largest number.
        grid: lengths and block sizes.
        p: share from 0 to 1; a number, or a tensor of float64 [heads] on the device of the scores.
        at_least, at_most: bounds of the number of blocks of each row; None is no bound.
        keep: blocks that are kept anyway. Inside the budget their mass and their number count; on top of it ``p`` and
            the bounds are of the others.
        causal: under the causal mask.
    """
    scores = _check(scores, grid)
    visible, counts = _visible(grid, causal), _visible_counts(grid, causal)
    forced, forced_counts = _forced(grid, keep, causal)
    if isinstance(p, Tensor):
        check_shape("p", p, (scores.shape[0],))
        share: float | Tensor = p.double()[:, None, None]
    else:
        share = _share("p", p)
    least = np.minimum(_whole("at_least", at_least), counts)
    most = counts if at_most is None else np.minimum(_whole("at_most", at_most), counts)
    if at_most is not None and at_most < at_least:
        raise ValueError(f"at_most is {at_most}, at_least is {at_least}: it has to be as large")
    keys, order = _keys(scores, visible, forced).sort(dim=-1, descending=True, stable=True)
    weights = scores.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max).clamp(min=0).double()
    weights = torch.where(visible if keep.inside_budget else visible & ~forced, weights, 0).gather(-1, order)
    total = weights.sum(-1, keepdim=True)
    parts = (weights / torch.where(total > 0, total, 1) * 2**SHARE_BITS).round().long().cumsum(-1)
    target = (parts[..., -1:].double() * share).ceil() if parts.shape[-1] else parts.double()
    first = 0 if keep.inside_budget else _rows(forced_counts, scores)[..., None]
    wanted = torch.where(target > 0, (parts < target).sum(-1, keepdim=True) + 1 - first, 0)
    taken = wanted.clamp(min=_rows(least, scores)[..., None], max=_rows(most, scores)[..., None])
    given = _rows(forced_counts, scores)[..., None]
    taken = torch.maximum(taken, given) if keep.inside_budget else taken + given
    place = torch.arange(keys.shape[-1], device=keys.device)
    mask = torch.zeros_like(keys, dtype=torch.bool).scatter(-1, order, (place < taken) & (keys > UNSEEN))
    bound = np.maximum(most, forced_counts) if keep.inside_budget else most + forced_counts
    return Selection(grid, mask, scores, causal, scores.shape[0] * int(np.minimum(bound, counts).sum()))


def even_rows(mass: Tensor, grid: BlockGrid) -> Tensor:
    """``mass`` with each row brought to its number of queries, as exact masses are; rows without any stay.

    An LSE of an earlier step gives each row of masses a factor of its own, which would count where rows compete.
    """
    total = mass.sum(-1)
    factor = torch.where(total > 0, _queries(grid) / torch.where(total > 0, total, 1), 1)
    return mass * factor[..., None]


def forced_blocks(grid: BlockGrid, keep: Keep, *, causal: bool = False) -> Tensor:
    """bool [q_blocks, max_k_blocks]: the blocks that ``keep`` names, of those that a query sees."""
    return _forced(grid, keep, causal)[0]


def visible_blocks(grid: BlockGrid, *, causal: bool = False) -> Tensor:
    """bool [q_blocks, max_k_blocks]: some query of the block sees some key of the block."""
    return _visible(grid, causal)


def _keys(scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
    """int32 in the order in which blocks are taken, largest first."""
    if on_host(scores):  # numpy takes a third of torch's time, and less where a rule touches no block
        numbers = (scores.numpy() + np.float32(0)).view(np.int32)  # adding 0 makes -0 equal to 0
        numbers ^= (numbers >> 31) & 0x7FFFFFFF
        if numbers.max(initial=0) > INFINITE or numbers.min(initial=0) < ~INFINITE:
            np.copyto(numbers, np.int32(NOT_A_NUMBER), where=np.isnan(scores.numpy()))
        for rule, number in ((forced.numpy(), FORCED), (~visible.numpy(), UNSEEN)):
            if rule.any():
                np.copyto(numbers, np.int32(number), where=rule)
        return torch.from_numpy(numbers)
    bits = (scores + 0.0).view(torch.int32)  # adding 0 makes -0 equal to 0
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = torch.where(scores.isnan(), NOT_A_NUMBER, keys)
    keys = torch.where(forced, FORCED, keys)
    return torch.where(visible, keys, UNSEEN)


def _take(keys: Tensor, count: Tensor, most: int) -> Tensor:
    """bool: the ``count`` [..., 1] largest of the last axis, of equal ones the first; ``most`` bounds the counts."""
    if most == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    count = count.expand(*keys.shape[:-1], 1)
    if on_host(keys):
        return _take_on_host(keys, count, most)
    threshold = keys.topk(most, dim=-1).values.gather(-1, count.clamp(1, most) - 1)
    return _cut(keys, threshold, count)


def _take_on_host(keys: Tensor, count: Tensor, most: int) -> Tensor:
    """numpy sorts in a tenth of torch's time."""
    ascending = np.sort(keys.numpy(), axis=-1)
    place = keys.shape[-1] - count.clamp(1, most).numpy()
    threshold = np.take_along_axis(ascending, place, -1)
    taken = torch.from_numpy(keys.numpy() >= threshold)
    # That was all, but for rows that are cut between equals, take nothing, or run out of blocks.
    before = np.take_along_axis(ascending, np.maximum(place - 1, 0), -1)
    rest = ((before == threshold) & (place > 0)) | (threshold == UNSEEN) | (count.numpy() < 1)
    if rest.any():
        rows = torch.from_numpy(rest[..., 0])
        taken[rows] = _cut(keys[rows], torch.from_numpy(threshold)[rows], count[rows])
    return taken


def _cut(keys: Tensor, threshold: Tensor, count: Tensor) -> Tensor:
    above, equal = keys > threshold, keys == threshold
    room = count - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return taken & (keys > UNSEEN) & (count > 0)


def _budget(
    density: float | Tensor,
    max_density: float,
    counts: np.ndarray,
    grid: BlockGrid,
    scores: Tensor,
    rows: bool = True,
) -> tuple[Tensor, np.ndarray]:
    """Whole blocks, int64 [heads or 1, rows or sequences], and a bound of them that the host knows."""
    if not isinstance(density, Tensor):
        most = np.floor(_share("density", density) * counts + 0.5).astype(np.int64)
        return _rows(most, scores), most
    bound = _share("max_density", max_density)
    wanted = (scores.shape[0],) if density.dim() == 1 else (scores.shape[0], grid.batch)
    check_shape("density", density, wanted)
    if density.dtype != torch.float64:  # which rounds halves as a number of Python does
        raise TypeError(f"density is {density.dtype}: it has to be torch.float64")
    share = density[:, None] if density.dim() == 1 else density
    if rows and density.dim() == 2:
        share = share.index_select(1, grid.sequence_of_row)
    budget = (share.clamp(0, bound) * _rows(counts, scores) + 0.5).floor().long()
    return budget, np.floor(bound * counts + 0.5).astype(np.int64)


@lru_cache(maxsize=256)
def _visible(grid: BlockGrid, causal: bool) -> Tensor:
    first = torch.arange(grid.max_k_blocks, device=grid.device) * grid.block_k
    return first < grid.key_end(causal)[:, None]


@lru_cache(maxsize=256)
def _queries(grid: BlockGrid) -> Tensor:
    """float32 [q_blocks]: queries of each block."""
    sizes = [
        min(grid.block_q, n - b * grid.block_q)
        for n, c in zip(grid.lengths_q, grid.counts_q, strict=True)
        for b in range(c)
    ]
    return _rows(np.asarray(sizes, dtype=np.int64), grid.cu_seqlens_q)[0].float()


@lru_cache(maxsize=256)
def _visible_counts(grid: BlockGrid, causal: bool) -> np.ndarray:
    """int64 [q_blocks]: key blocks that each row sees, known on the host."""
    counts = []
    for len_q, len_k, blocks in zip(grid.lengths_q, grid.lengths_k, grid.counts_q, strict=True):
        last = np.minimum(np.arange(1, blocks + 1) * grid.block_q, len_q) + len_k - len_q
        end = np.clip(last, 0, len_k) if causal else np.full(blocks, len_k)
        counts.append(-(-end // grid.block_k))
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


@lru_cache(maxsize=64)
def _forced(grid: BlockGrid, keep: Keep, causal: bool) -> tuple[Tensor, np.ndarray]:
    """bool [q_blocks, max_k_blocks] on the device, and their number in each row on the host."""
    mask = np.zeros((grid.q_blocks, grid.max_k_blocks), dtype=bool)
    row = 0
    for len_q, len_k, rows, columns in zip(
        grid.lengths_q, grid.lengths_k, grid.counts_q, grid.counts_k, strict=True
    ):
        part = mask[row : row + rows, :columns]
        first_q, first_k = np.arange(rows)[:, None] * grid.block_q, np.arange(columns)[None] * grid.block_k
        end_q, end_k = np.minimum(first_q + grid.block_q, len_q), np.minimum(first_k + grid.block_k, len_k)
        part |= first_k < keep.sink
        if keep.window is not None:
            shift = len_k - len_q
            part |= (first_k <= end_q - 1 + shift + keep.window) & (
                end_k - 1 >= first_q + shift - keep.window
            )
        begin, end = keep.text
        part |= (first_q < end) & (end_q > begin) & (begin < end)
        part |= (first_k < end) & (end_k > begin) & (begin < end)
        row += rows
    mask &= np.arange(grid.max_k_blocks) < _visible_counts(grid, causal)[:, None]
    return torch.from_numpy(mask).to(grid.device, non_blocking=True), mask.sum(1)


def _by_sequence(rows: np.ndarray, grid: BlockGrid) -> np.ndarray:
    """int64 [batch]: sums over the rows of each sequence."""
    ends = np.cumsum(grid.counts_q, dtype=np.int64)
    total = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    return total[ends] - total[ends - np.asarray(grid.counts_q, dtype=np.int64)]


def _rows(values: np.ndarray, like: Tensor) -> Tensor:
    """int64 [1, n] on the device of ``like``, by way of the host."""
    return torch.from_numpy(values.astype(np.int64)).to(like.device, non_blocking=True)[None]


def _check(scores: Tensor, grid: BlockGrid) -> Tensor:
    check_tensors(scores=scores)
    if scores.dim() != 3 or scores.shape[0] == 0:
        raise ValueError(f"scores has shape {list(scores.shape)}: it has to be [heads, q_blocks, k_blocks]")
    check_shape("scores", scores, (scores.shape[0], grid.q_blocks, grid.max_k_blocks))
    if not scores.is_floating_point():
        raise TypeError(f"scores is {scores.dtype}: it has to be of floating point")
    device = grid.cu_seqlens_q.device  # with its number, which the grid's own may lack
    if scores.device != device:
        raise ValueError(f"scores is on {scores.device}, the grid on {device}: they have to be on one")
    return scores.detach().float()


def _share(name: str, value: float) -> float:
    share = number(name, value)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {value}: it has to be from 0 to 1")
    return share


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 0:
        raise ValueError(f"{name} is {value!r:.80}: it has to be a whole number, 0 or more")
    return value.__index__()
