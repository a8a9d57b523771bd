# SPDX-License-Identifier: Apache-2.0
"""For each layer the sparsest attention tile that its output can bear (Efficient-vDiT, arXiv:2502.06155)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from gapless.ops.block_sparse import block_sparse_attention
from gapless.ops.checks import number
from gapless.ops.impl import Impl
from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_layout import BlockLayout
from gapless.sparsity.patterns import attention_tile
from gapless.sparsity.policy import Clock, Policy, Record, Visit


class TileRow(NamedTuple):
    """One layer under one mask of the family."""

    layer: Hashable
    k: int | None  # reference frames; None is dense attention
    density: float  # share of blocks
    error: float  # of the layer's attention output over all calibration inputs, relative L2
    seconds: float  # of attention, the mean of all calibration inputs
    chosen: bool


class TileMasks(Policy):
    """Attention tiles with a number of reference frames for each layer.

    Args:
        frames: latent frames of the video.
        choice: reference frames of each layer; None is dense attention.
        block, impl: see :class:`Policy`.
        table: what the choice was made from.
    """

    def __init__(
        self,
        frames: int,
        choice: Mapping[Hashable, int | None],
        *,
        block: int | tuple[int, int] = 64,
        impl: Impl = "auto",
        table: Sequence[TileRow] = (),
    ) -> None:
        super().__init__(block, impl)
        self.frames = _check_frames(frames)
        self.choice = dict(choice)
        for layer, k in self.choice.items():
            if k is not None:
                _check_reference(f"choice[{layer!r}]", k, frames)
        self.table = list(table)

    def _attend(self, visit: Visit, record: Record, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if visit.layer not in self.choice:
            raise ValueError(
                f"layer is {visit.layer!r:.80}: it has to be one that was searched, "
                f"{', '.join(map(repr, self.choice)):.200}"
            )
        references = self.choice[visit.layer]
        if references is None:
            return record.attention.time(lambda: self._dense(visit, q, k, v))
        layout = record.search.time(lambda: tile_layout(visit.grid, self.frames, visit.text, references))
        record.kind = "sparse"
        record.density = layout.density_per_head
        return record.attention.time(
            lambda: block_sparse_attention(q, k, v, layout, scale=visit.scale, impl=self.impl)
        )


class TileSearch(Policy):
    """Finds the :class:`TileMasks` of a transformer from what its layers compute.

    While it is attached every layer computes in full, so that each is judged on the inputs it is meant to have, and
    once more under every mask of the family. ``result()`` gives each layer the sparsest mask whose error is at most the
    threshold. The paper does not say how it measures; here it is the relative L2 error of the attention output over all
    calibration inputs together.

        search = TileSearch(frames=13, threshold=0.1)
        with search.attached(pipe.transformer):
            pipe(prompt, num_inference_steps=4)
        with search.result().attached(pipe.transformer):
            pipe(...)

    Args:
        frames: latent frames of the video.
        threshold: the largest error that a mask may have.
        references: numbers of reference frames to try; None is 0 to ``frames - 2``, above which a mask is dense.
        block, impl: see :class:`Policy`.
    """

    def __init__(
        self,
        frames: int,
        *,
        threshold: float = 0.1,
        references: Sequence[int] | None = None,
        block: int | tuple[int, int] = 64,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(block, impl)
        self.frames = _check_frames(frames)
        self.threshold = number("threshold", threshold)
        if self.threshold < 0:
            raise ValueError(f"threshold is {threshold}: it has to be 0 or more")
        chosen = range(frames - 1) if references is None else references
        self.references = tuple(_check_reference(f"references[{i}]", n, frames) for i, n in enumerate(chosen))
        self._trials: dict[Hashable, dict[int | None, _Trial]] = {}

    def _attend(self, visit: Visit, record: Record, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = record.attention.time(lambda: self._dense(visit, q, k, v))
        record.kind = "search"
        record.search.time(lambda: self._try(visit, record.attention, q, k, v, out))
        return out

    def _try(self, visit: Visit, dense: Clock, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        trials = self._trials.setdefault(visit.layer, {})
        full = trials.setdefault(None, _Trial())
        full.clocks.append(dense)
        size = out.double().square().sum()
        full.size = full.size + size
        for n in self.references:
            layout = tile_layout(visit.grid, self.frames, visit.text, n)
            trial, clock = trials.setdefault(n, _Trial()), Clock(q.device)
            sparse = clock.time(
                lambda layout=layout: block_sparse_attention(  # type: ignore[misc]
                    q, k, v, layout, scale=visit.scale, impl=self.impl
                )
            )
            trial.clocks.append(clock)
            trial.error = trial.error + (sparse.double() - out.double()).square().sum()
            trial.size = trial.size + size
            trial.density = layout.density

    def reset(self) -> None:
        """Forget everything, statistics and calibration."""
        super().reset()
        self._trials = {}

    @property
    def table(self) -> list[TileRow]:
        """Every layer under every mask, densest first. Waits for the device."""
        rows = []
        for layer, trials in self._trials.items():
            found = [(n, *trial.read()) for n, trial in trials.items()]
            found.sort(key=lambda row: -row[1])
            under = [row for row in found if row[2] <= self.threshold]
            best = min(under, key=lambda row: (row[1], row[2]), default=found[0])
            rows += [TileRow(layer, *row, chosen=row is best) for row in found]
        return rows

    def result(self) -> TileMasks:
        """The sparsest mask for each layer that stays under the threshold; dense attention where none does."""
        if not self._trials:
            raise ValueError("nothing was searched: attach the search and run the transformer first")
        table = self.table
        choice = {row.layer: row.k for row in table if row.chosen}
        block = (self.block_q, self.block_k)
        return TileMasks(self.frames, choice, block=block, impl=self.impl, table=table)


class _Trial:
    """One layer under one mask, over all calibration inputs; sums stay on the device."""

    def __init__(self) -> None:
        self.error: Tensor | float = 0.0
        self.size: Tensor | float = 0.0
        self.density: Tensor | float = 1.0
        self.clocks: list[Clock] = []

    def read(self) -> tuple[float, float, float]:
        """(density, error, seconds)."""
        error, size = float(self.error), float(self.size)
        relative = (error / size) ** 0.5 if size else float(error > 0)
        seconds = sum(clock.seconds for clock in self.clocks) / len(self.clocks)
        return float(self.density), relative, seconds


@lru_cache(maxsize=256)
def tile_layout(grid: BlockGrid, frames: int, text: tuple[int, int], references: int) -> BlockLayout:
    """The attention tile of every sequence of ``grid``, whose keys may be cut off at the end.

    Args:
        grid: sequences with as many tokens each, a whole number for each frame beside the text.
        frames: latent frames.
        text: (begin, end) of the text's tokens, before or after the video's.
        references: reference frames.
    """
    masks = []
    for len_q, columns in zip(grid.lengths_q, grid.counts_k, strict=True):
        begin, end = text
        if end > begin and begin != 0 and end != len_q:
            raise ValueError(
                f"text is {text}: it has to be before or after the {len_q - end + begin} video tokens"
            )
        video = len_q - (end - begin)
        if video <= 0 or video % frames:
            raise ValueError(f"frames is {frames}: it has to divide the {video} video tokens")
        layout = attention_tile(
            frames, video // frames, end - begin, references,
            text_first=begin == 0, block_q=grid.block_q, block_k=grid.block_k, device=grid.device,
        )  # fmt: skip
        masks.append(layout.to_mask()[..., :columns])
    return BlockLayout.from_packed(grid, grid.pack(masks))


def _check_frames(frames: int) -> int:
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ValueError(f"frames is {frames!r:.80}: it has to be a whole number from 1")
    return frames


def _check_reference(name: str, references: int, frames: int) -> int:
    if isinstance(references, bool) or not isinstance(references, int) or not 0 <= references <= frames:
        raise ValueError(f"{name} is {references!r:.80}: it has to be from 0 to {frames}, the frames")
    return references
