# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.schedule import CostModel, dynamic_cp, static_cp

COST = CostModel(cell=2e-11, token=2e-7, layers=32)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(0, 300), max_size=30), ranks=st.integers(1, 12))
@pytest.mark.parametrize("planner", [static_cp.plan, dynamic_cp.plan])
def test_every_batch(planner, lengths, ranks):
    s = planner(lengths, ranks=ranks, capacity=max(1, -(-max(lengths, default=0) // ranks)), cost=COST)
    assert (np.bincount(s.pack_of, minlength=s.packs) > 0).all()


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=30),
    ranks=st.integers(1, 12),
    variant=st.sampled_from(["dynamic", "hybrid"]),
    delta=st.sampled_from([0.0, 0.05, 2.0]),
)
def test_rings_are_powers_of_two(lengths, ranks, variant, delta):
    capacity = max(50, -(-max(lengths, default=0) // ranks))
    same = {"ranks": ranks, "capacity": capacity, "cost": COST, "variant": variant, "delta": delta}
    s = dynamic_cp.plan(lengths, **same)
    assert s.digest == dynamic_cp.plan(lengths, **same).digest
    sizes = s.ring_sizes[s.ring_sizes < ranks]
    assert (sizes & (sizes - 1) == 0).all()


def test_static_grid_by_hand():
    # 25 tokens need four of eight ranks (three do not divide them): two replicas. 25 + 6 fit 40 tokens, so does 9; 12
    # opens a second pack.
    s = static_cp.plan([25, 6, 12, 9], ranks=8, capacity=10, cost=COST)
    assert s.pack_of.tolist() == [0, 0, 1, 0]
    assert [s.ring(p) for p in range(s.packs)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert s.steps.tolist() == [0, 0]


def test_static_grid_is_for_the_longest_that_is_allowed():
    same = {"ranks": 12, "capacity": 10, "cost": COST}
    assert static_cp.plan([8, 3], **same).ring_sizes.tolist() == [1, 1]
    assert static_cp.plan([8, 3], **same, context=55).ring_sizes.tolist() == [6]
    assert static_cp.plan([8, 3], **same, cp=3).ring_sizes.tolist() == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cp": 3}, "cp is 3: it has to divide the 8 ranks"),
        ({"cp": 9}, "cp is 9: it has to be between 1 and 8"),
        ({"cp": True}, "cp is True"),
        ({"context": 0}, "context is 0"),
        ({"context": 81}, "context is 81: 8 ranks hold 80 tokens at most"),
        ({"cp": 2}, r"lengths\[0\] is 25: 2 ranks hold at most 20 tokens .* capacity of 13"),
        ({"lengths": [1, 90]}, r"lengths\[1\] is 90: 8 ranks hold at most 80 tokens .* capacity of 12"),
    ],
)
def test_static_errors(options, message):
    with pytest.raises(ValueError, match=message):
        static_cp.plan(**({"lengths": [25], "ranks": 8, "capacity": 10, "cost": COST} | options))


def test_dynamic_rounds_by_hand():
    # 40 needs four of eight ranks and sets the time, 400 = 40^2 / 4. 20 takes two ranks and 200, 10 one and 100; the
    # second 10 joins no full group and takes the last rank.
    s = dynamic_cp.plan([10, 40, 20, 10], ranks=8, capacity=10, cost=COST)
    assert [len(s.ring(s.pack_of[i])) for i in range(4)] == [1, 4, 2, 1]
    assert s.micro_steps == 1


def test_dynamic_leaves_what_would_take_longer():
    # One rank of capacity 10: two of 8 do not fit together.
    s = dynamic_cp.plan([8, 8], ranks=1, capacity=10, cost=COST)
    assert s.steps.tolist() == [0, 1]


def test_idle_ranks_widen_the_smallest_groups():
    for variant in ("dynamic", "hybrid"):
        s = dynamic_cp.plan([10, 10], ranks=8, capacity=10, cost=COST, variant=variant)
        assert s.ring_sizes.tolist() == [4, 4], variant


def test_hybrid_fills_until_it_is_balanced():
    # 20 on two ranks works 200; two of 14 on one rank each 196 (within 5%): the round closes before the tens.
    s = dynamic_cp.plan([20, 15, 15], ranks=4, capacity=15, cost=COST, variant="hybrid")
    assert s.micro_steps == 1
    assert sorted(s.ring_sizes.tolist()) == [1, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "static"}, "variant is 'static'"),
        ({"delta": -0.1}, "delta is -0.1"),
        ({"lengths": [90]}, r"lengths\[0\] is 90: 8 ranks hold at most 80"),
    ],
)
def test_dynamic_errors(options, message):
    with pytest.raises(ValueError, match=message):
        dynamic_cp.plan(**({"lengths": [25], "ranks": 8, "capacity": 10, "cost": COST} | options))
