# SPDX-License-Identifier: Apache-2.0
"""The exact search against enumeration, and every planner against proven optima of stored batches."""

from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest

from gapless.bench import schedule_optimum as stored
from gapless.schedule import Cluster, CostModel, exact

COST = CostModel(
    cell=1e-9, token=1e-6, fixed=1e-4, layers=2, kv_bytes=100.0, node_bandwidth=1e8, latency=1e-5
)


def partitions(items: list[int]):
    """All ways to put items into packs."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for others in partitions(rest):
        yield [[first], *others]
        for i in range(len(others)):
            yield [*others[:i], [first, *others[i]], *others[i + 1 :]]


def enumerated(lengths: list[int], ranks: int, capacity: int, rings: bool) -> float:
    """The shortest makespan over packs, their order and their rings."""
    every = [r for n in range(1, (ranks if rings else 1) + 1) for r in combinations(range(ranks), n)]
    best = np.inf
    for packs in partitions(list(range(len(lengths)))):
        tokens = [sum(lengths[i] for i in pack) for pack in packs]
        cells = [sum(float(COST.cells(lengths[i])) for i in pack) for pack in packs]
        for order in permutations(range(len(packs))):
            for chosen in product(every, repeat=len(packs)):
                free = [0.0] * ranks
                for p, ring in zip(order, chosen, strict=True):
                    if -(-tokens[p] // len(ring)) > capacity:
                        break
                    end = max(free[r] for r in ring) + float(COST.seconds(tokens[p], cells[p], len(ring)))
                    for r in ring:
                        free[r] = end
                else:
                    best = min(best, max(free))
    return best


@pytest.mark.parametrize("rings", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_enumeration_finds(seed, rings):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60 if rings else 40, 4).tolist()
    schedule, proven = exact.search(lengths, ranks=2, capacity=40, cost=COST, rings=rings)
    assert proven
    assert schedule.makespan == pytest.approx(enumerated(lengths, 2, 40, rings), rel=1e-9)


def test_a_search_that_gives_up_says_so():
    lengths = list(range(20, 31))
    schedule, proven = exact.search(lengths, ranks=4, capacity=100, cost=COST, most_states=2)
    assert not proven and schedule.makespan >= schedule.lower_bound
    with pytest.raises(ValueError, match="too many for the exact search"):
        exact.plan(lengths, ranks=4, capacity=100, cost=COST, most_states=2)


@pytest.mark.parametrize(
    ("lengths", "ranks", "message"),
    [
        ([5] * 17, 2, "1 to 16"),
        ([5], 5, "between 1 and 4"),
        ([90], 2, r"lengths\[0\] is 90: it does not fit on 2 ranks of 40"),
        ([5], Cluster(2, ranks_per_node=1), "equal ranks of one node"),
        ([5], Cluster(2, speed=(1.0, 0.5)), "equal ranks of one node"),
        ([-5], 2, r"lengths\[0\] is -5"),
    ],
)
def test_what_it_does_not_search(lengths, ranks, message):
    with pytest.raises(ValueError, match=message):
        exact.search(lengths, ranks=ranks, capacity=40, cost=COST)


def test_empty_sequences_and_batches():
    assert exact.plan([], ranks=2, capacity=4, cost=COST).packs == 0
    assert exact.plan([0, 0], ranks=2, capacity=4, cost=COST).packs == 1
    assert exact.plan([0, 3, 0], ranks=2, capacity=4, cost=COST).tokens == 3


@pytest.mark.parametrize("at", range(0, 240, 24))
def test_stored_optima_are_what_the_search_finds(at):
    case = stored.load()[at]
    again = stored.solve({k: case[k] for k in ("kind", "ranks", "cost", "lengths")})
    assert again["optimum"] == pytest.approx(case["optimum"], rel=1e-12)
    assert (again["whole"] is None) == (case["whole"] is None)
    assert case["whole"] is None or again["whole"] == pytest.approx(case["whole"], rel=1e-12)


# Mean and worst regret that planners had when their cases were stored, rounded up: they may only get better.
KNOWN = {
    "hdp": (0.004, 0.1),
    "multifit": (0.0005, 0.011),
    "karmarkar-karp": (0.003, 0.07),
    "lpt": (0.005, 0.11),
}


@pytest.mark.parametrize("name", ["static-cp", "naive-hdp", "dynamic-cp", "hybrid-cp", *KNOWN])
def test_no_planner_beats_the_optimum_and_ours_are_close(name):
    found = [r for case in stored.load() if (r := stored.regret(name, case)) is not None]
    assert len(found) >= 140 and min(found) >= -1e-9
    if name in KNOWN:
        mean, worst = KNOWN[name]
        assert np.mean(found) <= mean and max(found) <= worst
