# SPDX-License-Identifier: Apache-2.0
"""Items into bins: how whole sequences become micro-batches of even cost.

Each algorithm returns int64 [items], the bin of each item. All take items in descending order of cost, so that the
order in which they are given decides only which of equal items goes where.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless import _planner
from gapless.schedule.inputs import check_count, check_lengths

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

UNLIMITED = 2**62


@dataclass(frozen=True)
class _Problem:
    costs: Floats
    sizes: Ints
    speeds: Floats
    longest: Ints
    capacity: int
    most_items: int

    @property
    def bins(self) -> int:
        return len(self.speeds)

    @property
    def arguments(self) -> tuple[Floats, Ints, Floats, Ints, int, int]:
        return self.costs, self.sizes, self.speeds, self.longest, self.capacity, self.most_items

    @property
    def effort(self) -> int:
        """Looks of the refinement: some milliseconds, and some more for many items."""
        return 100_000 + 20 * len(self.costs)


def _check_costs(costs: ArrayLike) -> Floats:
    array = np.ascontiguousarray(costs, np.float64)
    if array.ndim != 1:
        raise ValueError(f"costs has shape {list(array.shape)}: it has to be [items]")
    return array


def _problem(
    costs: ArrayLike,
    bins: int,
    sizes: ArrayLike | None,
    capacity: int | None,
    longest: ArrayLike | None,
    most_items: int | None,
    speeds: ArrayLike | None,
) -> _Problem:
    checked = _check_costs(costs)
    bins = check_count(bins, "bins")
    if sizes is None and (capacity is not None or longest is not None):
        raise ValueError(
            "sizes is None: capacity and longest are in tokens, so each item has to have its own"
        )
    return _Problem(
        checked,
        np.zeros(len(checked), np.int64) if sizes is None else check_lengths(sizes, "sizes"),
        np.ones(bins) if speeds is None else np.ascontiguousarray(np.broadcast_to(speeds, bins), np.float64),
        np.ascontiguousarray(np.broadcast_to(UNLIMITED if longest is None else longest, bins), np.int64),
        UNLIMITED if capacity is None else check_count(capacity, "capacity"),
        UNLIMITED if most_items is None else check_count(most_items, "most_items"),
    )


def loads(assignment: ArrayLike, costs: ArrayLike, bins: int) -> Floats:
    """float64 [bins], the costs of each bin's items."""
    sums = np.bincount(np.asarray(assignment, np.int64), np.asarray(costs, np.float64), bins)
    return sums.astype(np.float64)


def best_fit_decreasing(sizes: ArrayLike, capacity: int) -> Ints:
    """Into the fullest bin that has room, largest items first; a new bin where none has. O(n log n).

    Raises:
        ValueError: an item is larger than ``capacity``.
    """
    return _planner.best_fit_decreasing(check_lengths(sizes, "sizes"), check_count(capacity, "capacity"))


def lpt(
    costs: ArrayLike,
    bins: int,
    *,
    sizes: ArrayLike | None = None,
    capacity: int | None = None,
    longest: ArrayLike | None = None,
    most_items: int | None = None,
    speeds: ArrayLike | None = None,
) -> Ints:
    """Costliest item first, each to the bin that would finish it first, of those that have room. O(n log bins).

    Without limits, on equal bins, the longest time is at most 4/3 - 1/(3 bins) of the best (Graham, 1969).

    Args:
        costs: [items], at least 0.
        bins: how many.
        sizes: [items], tokens.
        capacity: most tokens of all items of a bin.
        longest: most tokens of one item, one number or one for each bin.
        most_items: of a bin.
        speeds: [bins], how much cost each takes a second; 1 for all.

    Raises:
        ValueError: items were left that fit into no bin; another packing may have room for them.
    """
    problem = _problem(costs, bins, sizes, capacity, longest, most_items, speeds)
    assignment = _planner.longest_first(*problem.arguments)
    if (assignment < 0).any():
        raise _does_not_fit(problem, int(np.argmax(assignment < 0)))
    return assignment


def karmarkar_karp(costs: ArrayLike, bins: int, *, equal_size: bool = False) -> Ints:
    """Largest differencing method over equal bins (Karmarkar and Karp, 1982), in the form that verl uses.

    It knows no limit on tokens: :func:`gapless.schedule.packing.plan` raises the number of bins until what it gives
    keeps to the capacity.

    Args:
        costs: [items], at least 0.
        bins: how many.
        equal_size: all bins have the same number of items, or one less where the items do not divide evenly.
    """
    return _planner.karmarkar_karp(_check_costs(costs), check_count(bins, "bins"), bool(equal_size))


def multifit(
    costs: ArrayLike,
    bins: int,
    *,
    sizes: ArrayLike | None = None,
    capacity: int | None = None,
    longest: ArrayLike | None = None,
    most_items: int | None = None,
    speeds: ArrayLike | None = None,
) -> Ints:
    """First-fit under a bisected time (Coffman, Garey and Johnson, 1978), refined by moves and swaps of pairs.

    The other algorithms of this file are starts as well, where they keep to the limits, so that it is never behind
    any of them. Arguments are those of :func:`lpt`. Without limits, on equal bins, at most 13/11 of the best.

    Raises:
        ValueError: no packing within the limits was found.
    """
    problem = _problem(costs, bins, sizes, capacity, longest, most_items, speeds)
    assignment = _planner.pack(*problem.arguments, problem.effort)
    if (assignment < 0).any():
        raise _does_not_fit(problem, int(np.argmax(_planner.longest_first(*problem.arguments) < 0)))
    return assignment


def refine(
    assignment: ArrayLike,
    costs: ArrayLike,
    bins: int,
    *,
    sizes: ArrayLike | None = None,
    capacity: int | None = None,
    longest: ArrayLike | None = None,
    most_items: int | None = None,
    speeds: ArrayLike | None = None,
) -> Ints:
    """Moves items and swaps pairs between the bin that takes longest and others while that lowers the longest time.

    Limits that ``assignment`` keeps are kept. Other arguments are those of :func:`lpt`.
    """
    problem = _problem(costs, bins, sizes, capacity, longest, most_items, speeds)
    given = np.ascontiguousarray(assignment, np.int64)
    return _planner.refine_packing(*problem.arguments, given, problem.effort)


def balanced(costs: ArrayLike, sizes: ArrayLike, capacity: int, *, bins: int = 1) -> Ints:
    """Bins of even cost under a hard limit on tokens: as few as best-fit decreasing needs, and at least ``bins``.

    Raises:
        ValueError: an item is larger than ``capacity``.
    """
    needed = int(best_fit_decreasing(sizes, capacity).max(initial=0)) + 1
    return multifit(costs, max(needed, check_count(bins, "bins")), sizes=sizes, capacity=capacity)


def _does_not_fit(problem: _Problem, item: int) -> ValueError:
    size, roomiest = int(problem.sizes[item]), min(int(problem.longest.max()), problem.capacity)
    if size > roomiest:
        return ValueError(f"sizes[{item}] is {size}: no bin takes more than {roomiest} tokens of one item")
    return ValueError(
        f"no way was found to put {len(problem.costs)} items of {problem.sizes.sum()} tokens into {problem.bins} bins "
        f"within their limits: item {item}, of {size} tokens, was left; more bins or a larger capacity would do"
    )
