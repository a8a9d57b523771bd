# SPDX-License-Identifier: Apache-2.0
"""Batches for schedules: which sequences make a global batch, its plan, and a rank's own tokens of it.

    sampler = ScheduleSampler(lengths, partial(bytescale.plan, ranks=ranks, capacity=8192, cost=cost), tokens=1 << 20)
    for batch in loader(dataset, sampler, rank=hdp.rank):
        loss = hdp.step(batch.schedule, batch.tensors)

Every rank draws and plans the same, from the lengths alone; the next plan is made while the present step runs. A
checkpoint keeps ``batch.state``: a sampler that loads it goes on with the batch after that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gapless.distributed.current import running_steps
from gapless.distributed.losses import from_sequences
from gapless.distributed.rows import Rows
from gapless.schedule.inputs import check_lengths
from gapless.schedule.schedule import Schedule

Ints = NDArray[np.int64]


class Sequences(Protocol):
    """A map-style dataset of token sequences."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """What all ranks compute between two optimizer steps.

    Attributes:
        number: of the step, from 0.
        indices: int64 [n], the dataset's number of each sequence of ``schedule``.
        schedule: of those sequences.
        state: of a sampler that goes on after this batch.
    """

    number: int
    indices: Ints
    schedule: Schedule
    state: Mapping[str, int]

    def pieces_of(self, rank: int) -> Ints:
        """int64 [p, 3], rows (place in ``indices``, begin, end) of the tokens that ``rank`` is fed with, all steps."""
        fed = [running.rows.pieces for running in running_steps(self.schedule, rank)]
        return np.concatenate([np.empty((0, 3), np.int64), *fed])

    def wanted_by(self, rank: int) -> Ints:
        """int64, places in ``indices`` of the sequences of which ``rank`` is fed with some token, ascending."""
        return np.unique(self.pieces_of(rank)[:, 0])


class ScheduleSampler(Sampler[list[GlobalBatch]]):
    """A batch sampler: draws sequences until a global batch is full, and plans it.

    Args:
        lengths: tokens of each item of the dataset.
        plan: makes a :class:`~gapless.schedule.Schedule` of some lengths, the same one for the same lengths.
        tokens: of a global batch: it takes sequences, in the epoch's order, as long as they fit, and always one.
        seed: of the shuffling; each epoch is shuffled anew.
        epochs: how often the dataset is gone through; None: without end.
        shuffle: False keeps the dataset's order.
        prefetch: plan the next batch on a thread while the present one is computed.

    Raises:
        ValueError: ``tokens`` or ``epochs`` below 1, or no sequences. While drawing: what ``plan`` raises, with the
            dataset's number of the longest sequence.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        plan: Callable[[Ints], Schedule],
        *,
        tokens: int,
        seed: int = 0,
        epochs: int | None = 1,
        shuffle: bool = True,
        prefetch: bool = True,
    ) -> None:
        self.lengths = check_lengths(lengths)
        if not len(self.lengths):
            raise ValueError("lengths is empty: there is nothing to draw from")
        for name, value in (("tokens", tokens), ("epochs", epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it has to be at least 1")
        self._plan, self._tokens, self._epochs = plan, tokens, epochs
        self._shuffle, self._prefetch = shuffle, prefetch
        self._state = {"seed": seed, "epoch": 0, "position": 0, "number": 0}

    def state_dict(self) -> dict[str, int]:
        """Where the batch that was given out last ends. A loader with workers runs ahead: keep ``batch.state``."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batch that ``state`` came with."""
        if set(state) != set(self._state):
            raise ValueError(f"state has the keys {sorted(state)}: it has to have {sorted(self._state)}")
        if not 0 <= state["position"] <= len(self.lengths):
            raise ValueError(
                f"state has position {state['position']}: the dataset has {len(self.lengths)} sequences"
            )
        self._state = dict(state)

    def __iter__(self) -> Iterator[list[GlobalBatch]]:
        drawn = self._draw()
        if not self._prefetch:
            for indices, state in drawn:
                yield [self._give(self._make(indices, state))]
            return
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[GlobalBatch] | None = None
            for indices, state in drawn:
                following = pool.submit(self._make, indices, state)
                if ahead is not None:
                    yield [self._give(ahead.result())]
                ahead = following
            if ahead is not None:
                yield [self._give(ahead.result())]

    def _give(self, batch: GlobalBatch) -> GlobalBatch:
        self._state = dict(batch.state)
        return batch

    def _make(self, indices: Ints, state: Mapping[str, int]) -> GlobalBatch:
        lengths = self.lengths[indices]
        try:
            schedule = self._plan(lengths)
        except ValueError as error:
            longest = int(indices[lengths.argmax()])
            raise ValueError(
                f"{error} (the dataset's sequence {longest} is the longest of the batch)"
            ) from error
        if not np.array_equal(schedule.lengths, lengths):
            raise ValueError("plan gave a schedule of other lengths than those that it was given")
        return GlobalBatch(state["number"] - 1, indices, schedule, state)

    def _draw(self) -> Iterator[tuple[Ints, dict[str, int]]]:
        """Sequences of each global batch, and the state after it."""
        state = dict(self._state)
        while self._epochs is None or state["epoch"] < self._epochs:
            order = np.arange(len(self.lengths))
            if self._shuffle:
                order = np.random.default_rng([state["seed"], state["epoch"]]).permutation(order)
            ends = np.cumsum(self.lengths[order])
            while (first := state["position"]) < len(order):
                full = (ends[first - 1] if first else 0) + self._tokens
                end = max(int(np.searchsorted(ends, full, side="right")), first + 1)
                state |= {"position": end, "number": state["number"] + 1}
                yield order[first:end], dict(state)
            state |= {"epoch": state["epoch"] + 1, "position": 0}


@dataclass(frozen=True, eq=False)
class RankBatch:
    """A rank's part of a global batch: ``hdp.step(batch.schedule, batch.tensors)``.

    Attributes:
        of: the global batch.
        sequences: the whole sequences of which this rank has some tokens, int64 [tokens] each, by their number in the
            schedule.
    """

    of: GlobalBatch
    sequences: Mapping[int, Tensor]

    @property
    def schedule(self) -> Schedule:
        return self.of.schedule

    @property
    def state(self) -> Mapping[str, int]:
        """Of a sampler that goes on after this batch."""
        return self.of.state

    def tensors(self, rows: Rows) -> dict[str, Tensor]:
        """``input_ids`` and ``targets`` of some tokens: what :meth:`gapless.distributed.HDP.step` asks for."""
        return from_sequences(self.sequences)(rows)


class RankDataset(Dataset[RankBatch]):
    """A dataset of sequences as seen by one rank: global batches in, that rank's sequences out.

    Args:
        dataset: gives int64 tokens [length], or a mapping with ``input_ids``, for each number.
        rank: in the schedules.
    """

    def __init__(self, dataset: Sequences, rank: int) -> None:
        self.dataset, self.rank = dataset, rank

    def __getitem__(self, batch: GlobalBatch) -> RankBatch:
        loaded = {}
        for i in batch.wanted_by(self.rank).tolist():
            number, expected = int(batch.indices[i]), int(batch.schedule.lengths[i])
            item = self.dataset[number]
            tokens = torch.as_tensor(item["input_ids"] if isinstance(item, Mapping) else item).reshape(-1)
            if len(tokens) != expected:
                raise ValueError(
                    f"the dataset's sequence {number} has {len(tokens)} tokens: its length was given as {expected}"
                )
            loaded[i] = tokens.to(torch.int64)
        return RankBatch(batch, loaded)


def collate(batches: Sequence[RankBatch]) -> RankBatch:
    """A loader's list of the one batch that a sampler gives at a time."""
    (batch,) = batches
    return batch


def loader(
    dataset: Sequences, sampler: Sampler[list[GlobalBatch]], *, rank: int, **options: Any
) -> DataLoader[RankBatch]:
    """A ``DataLoader`` of a rank's batches.

    Args:
        dataset, rank: see :class:`RankDataset`.
        sampler: a :class:`ScheduleSampler`.
        options: of ``torch.utils.data.DataLoader``, such as ``num_workers``.
    """
    return DataLoader(RankDataset(dataset, rank), batch_sampler=sampler, collate_fn=collate, **options)
