# SPDX-License-Identifier: Apache-2.0
"""WLB-LLM's packing: long sequences wait until every micro-batch can have one (arXiv:2503.17924)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.bins import loads, lpt
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_count, check_lengths
from gapless.schedule.one_rank import one_rank_schedule
from gapless.schedule.schedule import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NUMBER, _LENGTH, _ARRIVED = range(3)


class Iteration(NamedTuple):
    """What is computed in one iteration.

    Attributes:
        schedule: of the sequences of this iteration.
        numbers: int64 [n], which sequences these are: the number of each in the order of all that were ever given.
    """

    schedule: Schedule
    numbers: Ints


class Delay(NamedTuple):
    """How long tokens waited.

    Attributes:
        mean: iterations between arrival and computing, over all computed tokens.
        most: of any computed sequence.
        tokens: computed so far.
        waiting: tokens that have arrived and are not computed.
    """

    mean: float
    most: int
    tokens: int
    waiting: int


class WlbPacker:
    """Packs a stream of batches into a fixed number of micro-batches of even work each iteration.

    A sequence of at least ``levels[0]`` tokens waits in the queue of its level, first in, first out, until that holds
    one for every micro-batch. What has been released and all shorter sequences are then taken from the longest down:
    each goes to the micro-batch with the least work if it fits there, else to the one with the fewest tokens, else it
    is carried over to the next iteration.

    Args:
        ranks: how many, or the cluster.
        capacity: tokens of a micro-batch.
        cost: what to balance by.
        micro_batches: of each rank in an iteration.
        levels: ascending lengths at which the queues begin; default: a quarter and half of the capacity.
    """

    def __init__(
        self,
        *,
        ranks: int | Cluster,
        capacity: int,
        cost: CostModel,
        micro_batches: int = 1,
        levels: Sequence[int] | None = None,
    ) -> None:
        self.capacity = check_count(capacity, "capacity")
        self.micro_batches = check_count(micro_batches, "micro_batches")
        self.cluster, self.cost = Cluster.of(ranks), cost
        default = sorted({max(1, capacity // 4), max(1, capacity // 2)})
        self.levels = check_lengths(default if levels is None else levels, "levels")
        if (np.diff(self.levels) <= 0).any():
            raise ValueError(f"levels is {self.levels.tolist()}: they have to ascend")
        # Rows (number, length, iteration of arrival).
        self._queues = [np.empty((0, 3), np.int64) for _ in self.levels]
        self._carried = np.empty((0, 3), np.int64)
        self._iteration = self._given = self._computed = self._most = 0
        self._delayed = 0.0

    @property
    def bins(self) -> int:
        """Micro-batches of all ranks in one iteration."""
        return self.cluster.ranks * self.micro_batches

    @property
    def delay(self) -> Delay:
        waiting = sum(int(rows[:, _LENGTH].sum()) for rows in (*self._queues, self._carried))
        mean = self._delayed / self._computed if self._computed else 0.0
        return Delay(mean, self._most, self._computed, waiting)

    def next(self, lengths: ArrayLike) -> Iteration:
        """Take a batch in, and give out one iteration.

        Raises:
            ValueError: a sequence is longer than the capacity.
        """
        sizes = check_lengths(lengths)
        if sizes.max(initial=0) > self.capacity:
            i = int(sizes.argmax())
            raise ValueError(
                f"lengths[{i}] is {sizes[i]}: a micro-batch holds {self.capacity} tokens; "
                f"a capacity of {sizes[i]} would do"
            )
        numbers = self._given + np.arange(len(sizes))
        arrived = np.stack([numbers, sizes, np.full(len(sizes), self._iteration)], 1)
        self._given += len(sizes)
        level = np.searchsorted(self.levels, sizes, side="right")
        ready = [self._carried, arrived[level == 0]]
        for q in range(len(self.levels)):
            queue = np.concatenate([self._queues[q], arrived[level == q + 1]])
            released = self.bins if len(queue) >= self.bins else 0
            ready.append(queue[:released])
            self._queues[q] = queue[released:]
        return self._compute(np.concatenate(ready))

    def flush(self) -> list[Iteration]:
        """Give out all that waits, in as many iterations as it needs: the end of the data."""
        ready = np.concatenate([self._carried, *self._queues])
        self._queues = [np.empty((0, 3), np.int64) for _ in self.levels]
        iterations = []
        while len(ready):
            iterations.append(self._compute(ready))
            ready = self._carried
        return iterations

    def _compute(self, ready: Ints) -> Iteration:
        # Of equal lengths, whoever waits longest goes first.
        rows = ready[np.lexsort((ready[:, _NUMBER], -ready[:, _LENGTH]))]
        bin_of = self._fill(rows[:, _LENGTH])
        self._carried = rows[bin_of < 0]
        rows, bin_of = rows[bin_of >= 0], bin_of[bin_of >= 0]
        waited = self._iteration - rows[:, _ARRIVED]
        self._iteration += 1
        self._computed += int(rows[:, _LENGTH].sum())
        self._delayed += float((waited * rows[:, _LENGTH]).sum())
        self._most = max(self._most, int(waited.max(initial=0)))
        seconds = loads(bin_of, self.cost.work(rows[:, _LENGTH]), self.bins)
        rank_of = lpt(
            seconds, self.cluster.ranks, most_items=self.micro_batches, speeds=self.cluster.throughputs
        )
        order = np.argsort(rows[:, _NUMBER])
        schedule = one_rank_schedule(
            rows[order, _LENGTH],
            bin_of[order],
            rank_of,
            cluster=self.cluster,
            capacity=np.full(self.cluster.ranks, self.capacity),
            cost=self.cost,
            planner="wlb",
        )
        return Iteration(schedule, rows[order, _NUMBER])

    def _fill(self, lengths: Ints) -> Ints:
        """The micro-batch of each sequence, -1 for those to carry over."""
        work, tokens = np.zeros(self.bins), np.zeros(self.bins, np.int64)
        bin_of = np.full(len(lengths), -1)
        for i, (length, own) in enumerate(
            zip(lengths.tolist(), self.cost.work(lengths).tolist(), strict=True)
        ):
            b = int(work.argmin())
            if tokens[b] + length > self.capacity:
                b = int(tokens.argmin())
                if tokens[b] + length > self.capacity:
                    continue
            bin_of[i] = b
            work[b] += own
            tokens[b] += length
        return bin_of

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next, as plain values."""
        return {
            **self._options(),
            "queues": [queue.tolist() for queue in self._queues],
            "carried": self._carried.tolist(),
            "iteration": self._iteration,
            "given": self._given,
            "computed": self._computed,
            "delayed": self._delayed,
            "most": self._most,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it was taken of a packer with other options.
        """
        for name, value in self._options().items():
            if state[name] != value:
                raise ValueError(f"{name} is {value}: the state is of a packer with {state[name]}")
        self._queues = [np.array(queue, np.int64).reshape(-1, 3) for queue in state["queues"]]
        self._carried = np.array(state["carried"], np.int64).reshape(-1, 3)
        self._iteration, self._given = int(state["iteration"]), int(state["given"])
        self._computed, self._most = int(state["computed"]), int(state["most"])
        self._delayed = float(state["delayed"])

    def _options(self) -> dict[str, Any]:
        return {"bins": self.bins, "capacity": self.capacity, "levels": self.levels.tolist()}
