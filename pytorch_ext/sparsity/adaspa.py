# SPDX-License-Identifier: Apache-2.0
"""AdaSpa: sparse attention whose masks are searched while a video is made (arXiv:2502.21079)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from gapless.ops.block_sparse import attention_with_mass, block_mass, block_sparse_attention
from gapless.ops.checks import number
from gapless.ops.impl import Impl
from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_layout import BlockLayout
from gapless.plan.compact_layout import CompactLayout
from gapless.sparsity.policy import Policy, Record, Visit
from gapless.sparsity.selectors import Keep, Selection, even_rows, top_k, top_k_global


@dataclass
class _State:
    """What is known of one layer in one call."""

    grid: BlockGrid
    searched: int  # the ordinal of the search that it is from
    stored: BlockLayout | CompactLayout
    density: Tensor  # [heads]
    lse: Tensor | None = None  # [heads, tokens_q], of the first search

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes + (0 if self.lse is None else self.lse.nbytes)


class AdaSpa(Policy):
    """Dense attention first, then only the blocks that held the most weight.

    The tenth step, say, is still dense and measures on the way how much of the weights lies in each block; from the
    next step on only the heaviest blocks are computed. The thirtieth step measures again before it computes, by the LSE
    that was kept from the first search, which saves half of a search. Steps of all layers keep their masks bit by bit.

    ``with AdaSpa().attached(pipe.transformer): pipe(...)`` does it all; :meth:`attention` is for loops of your own.
    One object serves one transformer.

    Args:
        density: share of blocks that a head computes on average.
        block: tokens in a block, or (queries, keys).
        search_steps: which steps search, counted from 1 as in the paper. Those before the first are the warm-up, and
            the first is dense too. A layer that is first seen later searches when it is seen.
        head_adaptive: heads whose masks recall more than ``recall_threshold`` of their weights are compressed twice as
            much, and as many of the worst heads get what that saves, so that the mean stays at ``density``. At most
            half of the heads gain, and no head gets more than all of its blocks.
        recall_threshold: of ``head_adaptive``.
        selection: ``"row"`` gives each row of blocks the same number, so that no region is left out; ``"global"`` lets
            the rows of a head compete, each of which keeps at least one.
        text_in_budget: blocks of text are always kept; True counts them as part of the density, so that rows compute
            fewer others; False gives the density to the others alone.
        lse_cache: later searches use the LSE of the first; False makes each a dense step of its own.
        compact: keep masks bit by bit and make the lists anew in each step; False keeps the lists, about 6 times as
            much memory at density 0.2.
        impl: see :class:`Policy`.
    """

    def __init__(
        self,
        density: float = 0.2,
        *,
        block: int | tuple[int, int] = 64,
        search_steps: Sequence[int] = (10, 30),
        head_adaptive: bool = True,
        recall_threshold: float = 0.8,
        selection: Literal["row", "global"] = "row",
        text_in_budget: bool = True,
        lse_cache: bool = True,
        compact: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(block, impl)
        self.density = number("density", density)
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {density}: it has to be above 0 and at most 1")
        self.search_steps = tuple(search_steps)
        if not self.search_steps or any(isinstance(n, bool) or not isinstance(n, int) for n in search_steps):
            raise ValueError(f"search_steps is {search_steps!r:.80}: it has to be a list of whole numbers")
        if self.search_steps[0] < 1:
            raise ValueError(
                f"search_steps[0] is {self.search_steps[0]}: it has to be at least 1, the first step, whose search "
                "needs its dense attention"
            )
        if any(a >= b for a, b in pairwise(self.search_steps)):
            raise ValueError(f"search_steps is {list(search_steps)}: they have to go up")
        if selection not in ("row", "global"):
            raise ValueError(f"selection is {selection!r:.80}: it has to be 'row' or 'global'")
        self.head_adaptive = head_adaptive
        self.recall_threshold = number("recall_threshold", recall_threshold)
        self.selection = selection
        self.text_in_budget = text_in_budget
        self.lse_cache = lse_cache
        self.compact = compact
        self._states: dict[tuple[Hashable, Hashable], _State] = {}

    @property
    def layouts(self) -> dict[tuple[Hashable, Hashable], BlockLayout]:
        """The last masks found, by (call, layer)."""
        return {key: _expand(state.stored) for key, state in self._states.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the masks and LSEs that are kept."""
        return sum(state.nbytes for state in self._states.values())

    def _begin_run(self) -> None:
        self._states = {}

    def _attend(self, visit: Visit, record: Record, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ordinal = visit.step + 1
        due = max((n for n in self.search_steps if n <= ordinal), default=0)
        state = self._states.get(visit.key)
        if state is not None and not _same(state.grid, visit.grid):
            state = None  # another resolution or another text: what was found is of no use
        if due == 0:
            return record.attention.time(lambda: self._dense(visit, q, k, v))
        if state is None or (state.searched < due and state.lse is None):
            return self._search_dense(visit, record, due, q, k, v)
        if state.searched < due:
            state = self._search_cached(visit, record, due, state, q, k)
            layout = _expand(state.stored)
        else:
            record.kind = "sparse"
            layout = record.search.time(lambda: _expand(state.stored))
        record.density = state.density
        return record.attention.time(
            lambda: block_sparse_attention(q, k, v, layout, scale=visit.scale, impl=self.impl)
        )

    def _search_dense(
        self, visit: Visit, record: Record, due: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Algorithm 1: dense attention, and the mass of each block with it."""
        grid = visit.grid
        out, lse, mass = record.attention.time(
            lambda: attention_with_mass(
                q, k, v,
                cu_seqlens_q=grid.cu_seqlens_q, cu_seqlens_k=grid.cu_seqlens_k,
                block_q=grid.block_q, block_k=grid.block_k, scale=visit.scale, impl=self.impl,
            )
        )  # fmt: skip
        state = record.search.time(lambda: self._found(visit, record, due, mass))
        if self.lse_cache and due < self.search_steps[-1]:
            state.lse = lse
        record.kind = "fused search"
        return out

    def _search_cached(
        self, visit: Visit, record: Record, due: int, state: _State, q: Tensor, k: Tensor
    ) -> _State:
        """Algorithm 2: the mass of each block by the LSE of an earlier step."""
        grid, lse = visit.grid, state.lse
        assert lse is not None

        def search() -> _State:
            mass = block_mass(
                q, k, lse,
                cu_seqlens_q=grid.cu_seqlens_q, cu_seqlens_k=grid.cu_seqlens_k,
                block_q=grid.block_q, block_k=grid.block_k, scale=visit.scale, impl=self.impl,
            )  # fmt: skip
            if self.selection == "global":
                mass = even_rows(mass, grid)
            return self._found(visit, record, due, mass)

        record.kind = "cached search"
        found = record.search.time(search)
        if due < self.search_steps[-1]:
            found.lse = lse
        return found

    def _found(self, visit: Visit, record: Record, due: int, mass: Tensor) -> _State:
        selection = self.select(mass, visit.grid, visit.text)
        layout = selection.layout
        record.recall = selection.recall(mass)
        state = _State(
            visit.grid, due, layout.compact() if self.compact else layout, selection.density_per_head
        )
        self._states[visit.key] = state
        return state

    def select(self, mass: Tensor, grid: BlockGrid, text: tuple[int, int] = (0, 0)) -> Selection:
        """The blocks to keep, of float32 mass [heads, q_blocks, max_k_blocks]; nothing waits for the device.

        Args:
            mass: from :func:`gapless.block_mass`.
            grid: lengths and block sizes.
            text: (begin, end) of the text's tokens.
        """
        choose = top_k if self.selection == "row" else top_k_global
        keep = Keep(text=text, inside_budget=self.text_in_budget)
        base = choose(mass, grid, density=self.density, keep=keep)
        if not self.head_adaptive:
            return base
        densities = head_densities(base.recall(mass, per_sequence=True), self.density, self.recall_threshold)
        high = self.density + min(self.density / 2, 1 - self.density)
        return choose(mass, grid, density=densities, keep=keep, max_density=high)


def head_densities(recall: Tensor, density: float, threshold: float = 0.8) -> Tensor:
    """Three levels of density by recall, with the same mean (AdaSpa, section on head-adaptive hierarchical masks).

    Of heads with a recall above ``threshold`` the best half of all heads at most go down by half, as many of the worst
    go up by as much. Where half is more than there is room for above, all levels are closer.

    Args:
        recall: [heads] or [heads, batch]; NaN is the worst.
        density: the mean.
        threshold: the recall that allows for less.

    Returns:
        float64, of the shape of ``recall``.
    """
    heads = recall.shape[0]
    step = min(density / 2, 1 - density)
    recall = recall.nan_to_num(nan=-1.0)
    moved = (recall > threshold).sum(0, keepdim=True).clamp(max=heads // 2)
    best_first = recall.argsort(dim=0, descending=True, stable=True)
    rank = best_first.argsort(dim=0)
    level = (rank >= heads - moved).double() - (rank < moved).double()
    return density + step * level


def _expand(stored: BlockLayout | CompactLayout) -> BlockLayout:
    return stored if isinstance(stored, BlockLayout) else stored.expand()


def _same(a: BlockGrid, b: BlockGrid) -> bool:
    return (a.lengths_q, a.lengths_k, a.device) == (b.lengths_q, b.lengths_k, b.device)
