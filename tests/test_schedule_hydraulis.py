# SPDX-License-Identifier: Apache-2.0
"""Hydraulis: the choice among strategies, the greedy way against the exact one, and the exact one against counting."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.schedule import CostModel
from gapless.schedule.hydraulis import Replica, Strategy, exact, greedy, plan
from gapless.schedule.one_rank import finish_times

COST = CostModel(cell=1e-12, token=1e-8, fixed=2e-6, layers=8)
# 16 devices: many small replicas, a few large ones, or some of each.
SMALL = Strategy((Replica(4096, tp=2),) * 8, "small")
LARGE = Strategy((Replica(32768, tp=8, stages=2, speed=6.0),), "large")
MIXED = Strategy((Replica(16384, tp=4, stages=2, speed=3.5), *(Replica(4096, tp=2),) * 4), "mixed")


def seconds(sizes, bin_of, rank_of, strategy, cost):
    return finish_times(sizes, bin_of, rank_of, cluster=strategy.cluster, cost=cost).max()


def check(solution, sizes, strategy, cost):
    """Every sequence in a micro-batch of a replica that holds it, in the time that the solution says."""
    tokens = np.bincount(solution.bin_of, sizes, len(solution.rank_of))
    assert (tokens <= strategy.capacity[solution.rank_of]).all() and (tokens > 0).all()
    spent = seconds(sizes, solution.bin_of, solution.rank_of, strategy, cost)
    assert solution.seconds == pytest.approx(spent, rel=1e-12)
    assert solution.bound <= solution.seconds * (1 + 1e-9)


def small_case(seed):
    rng = np.random.default_rng(seed)
    cost = COST.replace(fixed=float(rng.choice([0, 1e-6, 2e-5])), layers=32)
    sizes = np.minimum(rng.lognormal(8, 1.2, rng.integers(2, 8)).astype(np.int64) + 1, 32768)
    some = [
        Replica(*(int(rng.choice(c)) for c in ([8192, 16384, 40000], [1, 2, 4], [1, 2, 4])))
        for _ in range(rng.integers(1, 3))
    ]
    return sizes, Strategy((*some, Replica(32768, 4, int(rng.choice([1, 2])))), "small case"), cost


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_within_three_percent_of_exact(seed):
    sizes, strategy, cost = small_case(seed)
    quick = greedy(sizes, strategy=strategy, cost=cost)
    best = exact(sizes, strategy=strategy, cost=cost, time_limit=20)
    check(quick, sizes, strategy, cost)
    check(best, sizes, strategy, cost)
    # Where the solver ran out of time, its bound still says how far the greedy way can be from the best.
    assert best.seconds <= quick.seconds <= best.seconds * 1.03


@pytest.mark.parametrize("seed", range(6))
def test_exact_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 3000, 4)
    strategy = Strategy((Replica(3000, tp=1, stages=int(rng.integers(1, 4))), Replica(5000, tp=2, stages=2)))
    cost = COST.replace(fixed=float(rng.choice([0, 1e-6, 1e-5])))
    best = np.inf
    # Micro-batch b belongs to replica b % 2.
    rank_of = np.arange(2 * len(sizes)) % 2
    for choice in itertools.product(range(len(rank_of)), repeat=len(sizes)):
        tokens = np.bincount(choice, sizes, len(rank_of))
        if (tokens > strategy.capacity[rank_of]).any():
            continue
        used, bins = np.unique(choice, return_inverse=True)
        best = min(best, seconds(sizes, bins, rank_of[used], strategy, cost))
    found = exact(sizes, strategy=strategy, cost=cost, time_limit=60)
    assert found.seconds == pytest.approx(best, rel=1e-6)
    assert found.bound == found.seconds


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 4096), max_size=14), st.randoms(use_true_random=False))
def test_plans_hold_for_any_batch_in_any_order(sizes, random):
    schedule = plan(sizes, strategies=[SMALL, MIXED], cost=COST)
    assert schedule.tokens == sum(sizes)
    again = plan(random.sample(sizes, len(sizes)), strategies=[SMALL, MIXED], cost=COST)
    assert schedule.makespan == pytest.approx(again.makespan, rel=1e-9)
    assert schedule.digest == plan(sizes, strategies=[SMALL, MIXED], cost=COST).digest


def test_the_batch_decides_the_strategy():
    rng = np.random.default_rng(0)
    names = []
    for sizes in ([30000], [16000, *rng.integers(100, 2000, 60)], rng.integers(100, 2000, 80)):
        schedule = plan(sizes, strategies=[SMALL, LARGE, MIXED], cost=COST)
        names.append(schedule.planner)
        if max(sizes) <= MIXED.capacity.max():
            assert schedule.makespan <= plan(sizes, strategies=[MIXED], cost=COST).makespan
    assert names == ["hydraulis(large, greedy)", "hydraulis(mixed, greedy)", "hydraulis(small, greedy)"]


def test_a_thousand_sequences_keep_all_replicas_busy():
    rng = np.random.default_rng(1)
    sizes = np.minimum(rng.lognormal(6.2, 1.1, 1000), 16384).astype(np.int64)
    found = greedy(sizes, strategy=MIXED, cost=COST)
    check(found, sizes, MIXED, COST)
    ends = finish_times(sizes, found.bin_of, found.rank_of, cluster=MIXED.cluster, cost=COST)
    assert ends.min() > 0.98 * ends.max()


def test_exact_plans_say_so_and_are_not_behind():
    sizes = [5000, 3000, 2000, 1000, 900, 0]
    quick = plan(sizes, strategies=[MIXED], cost=COST)
    best = plan(sizes, strategies=[MIXED], cost=COST, solve="exact")
    assert best.planner == "hydraulis(mixed, exact)" and best.tokens == quick.tokens


def test_edges():
    assert plan([], strategies=[SMALL], cost=COST).packs == 0
    assert plan([0, 0], strategies=[SMALL], cost=COST).packs == 1
    one = Strategy((Replica(10),))
    assert plan([10, 10], strategies=[one], cost=COST).micro_steps == 2
    assert exact([], strategy=one, cost=COST).seconds == 0


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"lengths\[1\] is 32769: .* more than 32768 tokens; one with .* 32769"
    ):
        plan([1, 32769], strategies=[SMALL, LARGE], cost=COST)
    with pytest.raises(ValueError, match="strategies is empty"):
        plan([1], strategies=[], cost=COST)
    with pytest.raises(ValueError, match="solve is 'ilp'"):
        plan([1], strategies=[SMALL], cost=COST, solve="ilp")
    with pytest.raises(ValueError, match="replicas is empty"):
        Strategy(())
    with pytest.raises(ValueError, match="stages is 0: it has to be at least 1"):
        Replica(10, stages=0)
    with pytest.raises(ValueError, match="speed is 0: it has to be above 0"):
        Replica(10, speed=0)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'gapless\[schedule\]'"):
        exact([5, 3], strategy=SMALL, cost=COST)
    assert plan([5, 3], strategies=[SMALL], cost=COST).tokens == 8
