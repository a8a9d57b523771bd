# SPDX-License-Identifier: Apache-2.0
"""How long a rank takes for its micro-batches when it is a pipeline, and into how many to cut its sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.bins import best_fit_decreasing, loads, multifit
from gapless.schedule.cost import CostModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_TRIES = 16


def pipeline_seconds(seconds: Floats, stages: int) -> float:
    """Seconds that ``stages`` stages take for micro-batches of so many seconds on one of their speed.

    Each stage does ``1 / stages`` of each micro-batch, so this is a flow shop of proportionate jobs:
    ``(sum + (stages - 1) * max) / stages``, in any order of them. Hydraulis (arXiv:2412.07894) plans with
    ``(max + c) (stages - 1 + count) / stages``, which is the same for equal micro-batches and too much for others.
    """
    return float(seconds.sum() + (stages - 1) * seconds.max(initial=0)) / stages


def micro_batches(lengths: Ints, *, capacity: int, cost: CostModel, stages: int = 1) -> Ints:
    """The micro-batch of each sequence, int64 [n], for the smallest :func:`pipeline_seconds` found.

    More micro-batches are smaller, so that a pipeline fills and drains sooner, and each costs ``cost.overhead``:
    numbers are tried from the fewest up where a bound on what they can reach is below the best so far.

    Raises:
        ValueError: a sequence is longer than ``capacity``.
    """
    if not len(lengths) or (stages == 1 and lengths.sum() <= capacity):
        return np.zeros(len(lengths), np.int64)
    work = cost.work(lengths)
    total, longest = float(work.sum()), float(work.max())
    fewest = int(best_fit_decreasing(lengths, capacity).max()) + 1
    # With more, even uneven micro-batches have one that is the longest sequence alone.
    enough = min(len(lengths), max(fewest, int(np.ceil(1.25 * total / longest)) + 2 if longest else 1))
    tries = [
        np.arange(fewest, min(fewest + MOST_TRIES, enough + 1)),
        np.geomspace(fewest, enough, MOST_TRIES).round().astype(np.int64),
    ]
    best, best_seconds = np.empty(0, np.int64), np.inf
    for count in np.unique(np.concatenate(tries)).tolist():
        least = (total + (stages - 1) * max(longest, total / count)) / stages
        overhead = cost.overhead * (count + stages - 1) / stages
        if least + overhead >= best_seconds:
            continue
        found = multifit(work, count, sizes=lengths, capacity=capacity)
        each = loads(found, work, count)
        seconds = pipeline_seconds(each[each > 0] + cost.overhead, stages)
        if seconds < best_seconds:
            best, best_seconds = found, seconds
    return best
