# SPDX-License-Identifier: Apache-2.0
"""Regrouping of small batches: never worse, certified, and what it is for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.schedule import Cluster, CostModel, Pack, exact, schedule_of
from gapless.schedule.regroup import regroup

COST = CostModel(
    cell=4e-11, token=1e-6, fixed=1e-3, layers=4, kv_bytes=1e4, node_bandwidth=5e10, latency=1e-5
)
CAPACITY = 1000


def scattered(lengths, ranks):
    """Each sequence for itself, on as many ranks as hold it."""
    packs = [Pack([i], range(max(1, -(-n // CAPACITY))), i) for i, n in enumerate(lengths)]
    return schedule_of(lengths, packs, ranks=ranks, capacity=CAPACITY, cost=COST, planner="scattered")


def test_packs_that_share_a_ring_become_one():
    s = scattered([1500, 300, 100], 2)
    found = regroup(s)
    assert found.packs == 1 and found.ring(0) == (0, 1) and found.planner == "scattered"
    best, proven = exact.search([1500, 300, 100], ranks=2, capacity=CAPACITY, cost=COST)
    assert proven and found.makespan == pytest.approx(best.makespan)


def test_a_sequence_leaves_a_crowded_rank():
    s = scattered([900, 900, 900, 900], 4)
    assert s.makespan == pytest.approx(4 * regroup(s).makespan)


def test_what_is_offloaded_stays_as_it_is():
    cost = COST.replace(layers=10, activation_bytes=1.0)
    packs = [Pack([0], [0], 0, 0.75), *(Pack([i], [1], i) for i in range(1, 6))]
    s = schedule_of([2000, 90, 80, 70, 60, 50], packs, ranks=2, capacity=CAPACITY, cost=cost)
    found = regroup(s)
    p = int(found.pack_of[0])
    assert found.packs == 2 and found.makespan < 0.7 * s.makespan
    assert found.sequences(p).tolist() == [0] and found.ring(p) == (0,) and found.offload[p] == 0.75


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3 * CAPACITY), min_size=1, max_size=8), st.integers(3, 4))
def test_never_worse_and_the_same_again(lengths, ranks):
    s = scattered(lengths, Cluster(ranks))
    found = regroup(s)  # its construction checks it
    assert found.makespan <= s.makespan and found.digest == regroup(s).digest
    if any(lengths):
        best, proven = exact.search(lengths, ranks=ranks, capacity=CAPACITY, cost=COST)
        assert not proven or found.makespan >= best.makespan * (1 - 1e-9)
