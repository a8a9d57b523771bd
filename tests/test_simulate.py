# SPDX-License-Identifier: Apache-2.0
"""The simulator against cases worked by hand, a tiny event simulation, and identities that always hold."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.schedule import Cluster, CostModel, Pack, schedule_of
from gapless.schedule import explain as explained
from gapless.schedule.links import hop
from gapless.schedule.micro_batches import connected
from gapless.schedule.simulate import WAITS, simulate

# Attention alone: a pair takes a second forward and nothing backward.
PAIRS = CostModel(cell=1.0, token=0.0, backward_cell=0.0, backward_token=0.0)
ALL = CostModel(
    cell=1e-9,
    token=1e-6,
    fixed=1e-4,
    layers=4,
    activation_bytes=100.0,
    kv_bytes=1000.0,
    hidden_bytes=500.0,
    host_bandwidth=1e9,
    node_bandwidth=1e9,
    network_bandwidth=1e8,
    latency=1e-5,
)
MANY = 10**9


def plan(lengths, packs, ranks=1, cost=ALL, **changes):
    return schedule_of(lengths, packs, ranks=ranks, capacity=MANY, cost=cost, **changes)


def add_up(timeline):
    """Every rank's time is accounted for, and no reason takes less than nothing."""
    total = timeline.busy + sum(timeline.waits.values())
    np.testing.assert_allclose(total, timeline.makespan, rtol=1e-9, atol=1e-15)
    assert tuple(timeline.waits) == WAITS
    for reason, seconds in timeline.waits.items():
        assert (seconds >= -1e-9 * timeline.makespan).all(), reason


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("bandwidth", [1e6, 1e12])
def test_one_ring_alone_takes_what_the_cost_model_says(ranks, bandwidth):
    cost = ALL.replace(node_bandwidth=bandwidth, network_bandwidth=bandwidth / 10)
    s = plan([5000, 300, 0], [Pack([0, 1, 2], range(ranks), 0)], ranks, cost)
    expected = float(cost.seconds(5300, cost.cells([5000, 300]).sum(), ranks, ranks > 8))
    assert s.makespan == pytest.approx(expected, rel=1e-12)
    t = s.timeline
    add_up(t)
    kind = "network" if ranks > 8 else "node"
    assert (t.waits[kind].max() > 0) == (bandwidth == 1e6 and ranks > 1)
    hops = cost.layers * (ranks - 1) * 5300 * cost.kv_bytes * (1 + cost.backward_kv)
    assert t.bytes["node"] + t.bytes["network"] == pytest.approx(hops)
    # A ring of 16 on two nodes crosses twice among its 16 links.
    assert t.bytes["network"] == pytest.approx(hops / 8 if ranks > 8 else 0.0)


def test_nothing_takes_no_time():
    empty = plan([], [], 3)
    assert empty.makespan == empty.lower_bound == empty.gap == 0
    assert empty.timeline.idle == 0 and not empty.timeline.busy.any()
    tokenless = plan([0], [Pack([0], [1], 0)], 2)
    assert tokenless.makespan == pytest.approx(ALL.overhead)
    add_up(tokenless.timeline)


def test_rings_that_share_a_rank_take_turns():
    # One token is one pair: A has 10 of them over ranks 0 and 1, B 6 over 1 and 2; the lone pack of 4 goes first.
    lengths = [4, 4, 3]
    s = plan(lengths, [Pack([0], [1], 0), Pack([1], [0, 1], 0), Pack([2], [1, 2], 0)], 3, PAIRS)
    t = s.timeline
    assert t.makespan == pytest.approx(10 + 5 + 3)
    np.testing.assert_allclose(t.busy, [5, 18, 3])
    np.testing.assert_allclose(t.waits["peers"], [13, 0, 15])
    # The other way around B waits for A, and the lone pack comes last.
    s = plan(lengths, [Pack([1], [0, 1], 0), Pack([2], [1, 2], 0), Pack([0], [1], 0)], 3, PAIRS)
    assert s.makespan == pytest.approx(18)


def test_a_chain_of_rings_ends_together():
    # 0-1, 1-2 and 2-3: the inner two ranks take two rings, in turns.
    lengths = [3, 3, 3]
    s = plan(lengths, [Pack([i], [i, i + 1], 0) for i in range(3)], 4, PAIRS)
    assert s.makespan == pytest.approx(6)
    np.testing.assert_allclose(s.timeline.busy, [3, 6, 6, 3])
    np.testing.assert_allclose(s.timeline.waits["peers"], [3, 0, 0, 3])
    # One after another, each ring has to wait for the one before; in another order the outer two run at once.
    assert simulate(s, overlap="ring").makespan == pytest.approx(9)
    s = plan(lengths, [Pack([0], [0, 1], 0), Pack([1], [2, 3], 0), Pack([2], [1, 2], 0)], 4, PAIRS)
    assert simulate(s, overlap="ring").makespan == pytest.approx(6)


def test_ranks_run_ahead_where_nothing_ties_them():
    # Rank 1 has a step of 10 before the ring of step 1, rank 0 one of 1; rank 2 is never tied.
    packs = [Pack([0], [0], 0), Pack([1], [1], 0), Pack([2], [0, 1], 1), Pack([3], [2], 0), Pack([4], [2], 2)]
    t = plan([1, 4, 4, 2, 2], packs, 3, PAIRS).timeline
    assert t.makespan == pytest.approx(15)
    np.testing.assert_allclose(t.waits["peers"], [9, 0, 0])
    np.testing.assert_allclose(t.waits["end"], [0, 0, 9])


def test_a_ring_is_as_slow_as_its_slowest_member():
    t = plan([4], [Pack([0], [0, 1], 0)], Cluster(2, speed=(1.0, 0.5)), PAIRS).timeline
    assert t.makespan == pytest.approx(10)
    np.testing.assert_allclose(t.waits["peers"], [5, 0])


def test_rings_share_network_cards():
    cost = PAIRS.replace(cell=1e-9, kv_bytes=100.0, network_bandwidth=1e3, node_bandwidth=1e6)
    packs = [Pack([0], [0, 2], 0), Pack([1], [1, 3], 0)]
    alone = 20 / 2 * 100 / 1e3 * 3  # half of 20 tokens, one hop, forward and twice as much backward
    for cards, factor in ((2, 1), (1, 2)):
        s = plan([20, 20], packs, Cluster(4, ranks_per_node=2, nics_per_node=cards), cost)
        assert s.makespan == pytest.approx(alone * factor, rel=1e-6)
        assert s.timeline.waits["network"].min() > 0
    # Not at the same time: one after the other.
    apart = [packs[0], Pack([1], [1, 3], 1)]
    s = plan([20, 20], apart, Cluster(4, ranks_per_node=2, nics_per_node=1), cost)
    assert s.makespan == pytest.approx(alone, rel=1e-6)


def test_two_levels_use_all_cards_of_a_node():
    cost = ALL.replace(latency=0.0, cell=1e-15)
    cluster, packs, tokens = Cluster(32, ranks_per_node=8), [Pack([0], range(32), 0)], 10**6
    flat, two = (plan([tokens], packs, cluster, cost, two_level=t) for t in (False, True))
    fixed = float(cost.linear(tokens / 32)) + cost.overhead
    assert flat.widths.tolist() == [32] and two.widths.tolist() == [8]
    assert flat.makespan - fixed == pytest.approx(float(cost.ring(tokens, 32, True)))
    # Three times a share to the next node, ten times as slow as the seven hops inside one, four times.
    share = tokens / 32 * cost.kv_bytes * 3 * cost.layers
    assert two.makespan - fixed == pytest.approx(max(3 * share / 1e8, 4 * 7 * share / 1e9))
    assert two.makespan - fixed == pytest.approx(float(cost.ring(tokens, 32, True, 8)))
    assert two.timeline.bytes["network"] == pytest.approx(32 * 3 * share)
    assert two.timeline.bytes["node"] == pytest.approx(32 * 4 * 7 * share)
    # Two ranks share a card, so that it takes twice as long to leave the node.
    cards = Cluster(32, ranks_per_node=8, nics_per_node=4)
    shared = plan([tokens], packs, cards, cost, two_level=True)
    assert shared.makespan - fixed == pytest.approx(max(6 * share / 1e8, 28 * share / 1e9))


@pytest.mark.parametrize(
    ("ring", "width"),
    [
        (range(8), 4),  # two nodes of four
        ([4, 5, 0, 1], 2),
        ([0, 4, 8], 1),
        ([0, 1, 2], 3),  # one node
        ([0, 1, 4], 3),  # uneven
        ([0, 1, 2, 4, 5, 6, 7], 7),
        ([0, 1, 4, 5, 8], 5),
        ([0, 4, 1, 5], 1),  # a node twice
    ],
)
def test_widths(ring, width):
    packs = [Pack([0], ring, 0), Pack([1], range(4), 1), Pack([2], [3], 2)]
    s = plan([100, 100, 100], packs, Cluster(9, ranks_per_node=4), two_level=True)
    assert s.widths.tolist() == [width, 4, 1]
    assert plan([100, 100, 100], packs, Cluster(9, ranks_per_node=4)).widths.tolist() == [len(ring), 4, 1]
    assert s.shard(0, ring[0]).width == width


def test_transfers_hide_or_do_not():
    cost = PAIRS.replace(kv_bytes=1.0, node_bandwidth=0.25, backward_kv=0.0)
    # A: 10 pairs over 2 ranks, 2 tokens each: 5 seconds and 8 of transfer; then 15 seconds alone.
    s = plan([4, 5, 5], [Pack([0], [0, 1], 0), Pack([1], [0], 0), Pack([2], [1], 0)], 2, cost)
    assert s.makespan == simulate(s, overlap="ring").makespan == pytest.approx(8 + 15)
    assert simulate(s, overlap=False).makespan == pytest.approx(5 + 8 + 15)
    # Rings in turn hide each other's transfers: 8 and 40 seconds behind 5 and 105.
    rings = plan([4, 20], [Pack([0], [0, 1], 0), Pack([1], [0, 1], 0)], 2, cost)
    assert rings.makespan == pytest.approx(5 + 105)
    assert simulate(rings, overlap="ring").makespan == pytest.approx(8 + 105)
    lone = plan([4], [Pack([0], [0, 1], 0)], 2, cost)
    assert lone.makespan == pytest.approx(8)
    assert lone.timeline.waits["node"].tolist() == [pytest.approx(3)] * 2


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("batches", [1, 3, 6])
def test_equal_micro_batches_of_a_pipeline(stages, batches):
    cost = ALL.replace(latency=0.0)
    s = plan(
        [1000] * batches, [Pack([i], [0], 2 * i) for i in range(batches)], Cluster(1, stages=stages), cost
    )
    each = float(cost.work([1000])[0] + cost.overhead) / stages
    assert s.makespan == pytest.approx((stages - 1 + batches) * each)
    add_up(s.timeline)
    assert s.makespan >= s.lower_bound
    assert s.timeline.waits["pipeline"][0] == pytest.approx((stages - 1) * each)


def one_forward_one_backward(forward, backward, stages):
    """When a lone pipeline is done: each stage's list, run as soon as what it needs is there."""
    n = len(forward)
    lists = []
    for stage in range(stages):
        warm = min(stages - stage - 1, n)
        steps = [("f", i) for i in range(warm)]
        f, b = warm, 0
        while b < n:
            if f < n:
                steps.append(("f", f))
                f += 1
            steps.append(("b", b))
            b += 1
        lists.append(steps)
    ends, clock = {}, [0.0] * stages
    while any(lists):
        for stage, steps in enumerate(lists):
            if not steps:
                continue
            kind, i = steps[0]
            before = (kind, i, stage - 1) if kind == "f" else (kind, i, stage + 1)
            if kind == "b" and stage == stages - 1:
                before = ("f", i, stage)
            if before[2] >= 0 and before not in ends:
                continue
            ends[kind, i, stage] = clock[stage] = (
                max(clock[stage], ends.get(before, 0.0)) + (forward if kind == "f" else backward)[i] / stages
            )
            steps.pop(0)
    return max(clock)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=7), st.integers(1, 4))
def test_unequal_micro_batches_of_a_pipeline(lengths, stages):
    cost = ALL.replace(cell=1e-7, fixed=0.0)
    s = plan(lengths, [Pack([i], [0], i) for i in range(len(lengths))], Cluster(1, stages=stages), cost)
    cells, tokens = cost.cells(lengths), np.array(lengths)
    attention, linear = cost.cell * cells * cost.layers, cost.token * tokens * cost.layers
    forward, backward = attention + linear, 2.5 * attention + 2 * linear
    assert s.makespan == pytest.approx(one_forward_one_backward(forward, backward, stages), rel=1e-9)


def test_tied_pipelines_keep_common_turns():
    # Rank 1 has only steps 0 and 3, tied to rank 0 in both; packed closer it would lock with it.
    packs = [Pack([0], [0, 1], 0), Pack([1], [0], 1), Pack([2], [0], 2), Pack([3], [0, 1], 3)]
    cost = ALL.replace(latency=0.0, node_bandwidth=1e15)
    s = plan([2000, 1000, 1000, 2000], packs, Cluster(2, stages=2), cost)
    cells = cost.cells([2000, 1000, 1000, 2000]) / [2, 1, 1, 2]
    tokens = np.array([1000, 1000, 1000, 1000])
    attention, linear = cost.cell * cells * 4, cost.token * tokens * 4 + cost.fixed * 4
    expected = one_forward_one_backward(attention + linear, 2.5 * attention + 2 * linear, 2)
    assert s.makespan == pytest.approx(expected)
    add_up(s.timeline)
    mixed = plan([8], [Pack([0], [0, 1], 0)], Cluster(2, stages=(2, 4)), cost)
    with pytest.raises(ValueError, match=r"pack 0: its ring joins pipelines of 2 and 4 stages"):
        _ = mixed.makespan


def test_pipelines_of_different_depth():
    s = plan([1000] * 6, [Pack([i], [i % 2], i // 2) for i in range(6)], Cluster(2, stages=(2, 3)), ALL)
    each = float(ALL.work([1000])[0] + ALL.overhead)
    finish = np.array([(1 + 3) * each / 2, (2 + 3) * each / 3])
    assert s.makespan == pytest.approx(finish.max())
    np.testing.assert_allclose(s.timeline.waits["end"], finish.max() - finish, atol=1e-12)
    add_up(s.timeline)


@pytest.mark.parametrize(("bandwidth", "hidden"), [(1e3, False), (1e12, True)])
def test_offloading(bandwidth, hidden):
    cost = ALL.replace(host_bandwidth=bandwidth)
    s = plan([4000, 10], [Pack([0], [0], 0, 0.5), Pack([1], [1], 0)], 2, cost)
    computing = float(cost.work([4000])[0] + cost.overhead)
    copy = 0.5 * 4000 * cost.activation_bytes * 2 / bandwidth  # two of four layers may go
    t = s.timeline
    add_up(t)
    assert t.bytes["host"] == pytest.approx(2 * copy * bandwidth)
    assert t.makespan == pytest.approx(computing if hidden else 2 * copy)
    assert t.waits["host"][0] == pytest.approx(0 if hidden else 2 * copy - computing)
    assert t.waits["host"][1] == 0
    apart = simulate(s, host_overlap=False)
    assert apart.makespan == pytest.approx(computing + 2 * copy)
    add_up(apart)


def test_offloading_holds_up_the_ring():
    cost = ALL.replace(host_bandwidth=1e3)
    t = plan([4000, 1000], [Pack([0], [0, 1], 0, 0.5), Pack([1], [1], 0, 0.5)], 2, cost).timeline
    # Rank 1 copies 3000 tokens and rank 0 2000, but they go on together.
    np.testing.assert_allclose(t.waits["host"] + t.waits["peers"] + t.busy, t.makespan)
    assert t.makespan == pytest.approx(2 * 0.5 * 3000 * 100 * 2 / 1e3)
    add_up(t)


def test_moved_tokens_lock_a_step():
    cost = CostModel(
        cell=1.0,
        token=3.0,
        layers=2,
        hidden_bytes=4.0,
        node_bandwidth=8.0,
        network_bandwidth=2.0,
        latency=0.5,
    )
    lengths = [6, 4, 2]
    packs = [Pack([i], [i], 0) for i in range(3)]
    # Rank 0 hands 2 tokens to rank 2, on its node.
    s = plan(lengths, packs, Cluster(4, ranks_per_node=3), cost, moves=[[0, 0, 2, 2]])
    t = s.timeline
    attention = np.array([21, 10, 3]) * 2 * 3.5
    move = (2 * 4 / 8 + 0.5) * 2 * 4  # there and back, forward and backward, two layers
    linear = 4 * 3.0 * 2 * 3
    assert t.makespan == pytest.approx(attention[0] + move + linear)
    np.testing.assert_allclose(t.busy[:3], attention + linear)
    np.testing.assert_allclose(t.waits["node"][:3], [move, 0, move])
    np.testing.assert_allclose(t.waits["peers"][:3], attention[0] - attention + [0, move, 0])
    assert t.bytes["node"] == 2 * 4 * 2 * 4 and t.bytes["network"] == 0
    # To rank 3, which has nothing and is on another node: it computes linear modules all the same.
    s = plan(lengths, packs, Cluster(4, ranks_per_node=3), cost, moves=[[0, 0, 3, 3]])
    move = (3 * 4 / 2 + 0.5) * 2 * 4
    assert s.makespan == pytest.approx(attention[0] + move + linear)
    assert s.timeline.busy[3] == pytest.approx(3 * 3.0 * 2 * 3)
    assert s.timeline.waits["network"].tolist() == [pytest.approx(move), 0, 0, pytest.approx(move)]
    add_up(s.timeline)


def test_reduction_comes_last():
    s = plan([1000, 10], [Pack([0], [0], 0), Pack([1], [9], 0)], 16)
    t = simulate(s, gradient_bytes=1.6e6)
    hops = 2 * 15
    assert t.makespan - s.makespan == pytest.approx(hops * (1e5 / ALL.network_bandwidth + ALL.latency))
    assert t.bytes["network"] + t.bytes["node"] == pytest.approx(hops * 1.6e6)
    add_up(t)
    one = plan([10], [Pack([0], [0], 0)])
    assert simulate(one, gradient_bytes=1e9).makespan == one.makespan


def test_bad_options():
    s = plan([4], [Pack([0], [0], 0)])
    with pytest.raises(ValueError, match="overlap is 'all'"):
        simulate(s, overlap="all")
    with pytest.raises(ValueError, match="gradient_bytes is -1"):
        simulate(s, gradient_bytes=-1)


@st.composite
def schedules(draw):
    ranks = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    packs = draw(st.integers(0, 12))
    offload = rng.random(4) * draw(st.sampled_from([0, 1]))
    lengths = rng.integers(0, 4000, packs)
    members = [rng.permutation(ranks)[: rng.integers(1, ranks + 1)].tolist() for _ in range(packs)]
    steps = rng.integers(0, 4, packs).tolist()
    moves = []
    held = {(r, t) for ring, t, n in zip(members, steps, lengths, strict=True) for r in ring if n > 2 * ranks}
    if held and ranks > 1 and draw(st.booleans()):
        source, step = sorted(held)[0]
        moves = [[step, source, (source + 1) % ranks, 1]]
    stages = draw(st.integers(1, 3))
    return plan(
        lengths,
        [Pack([p], members[p], steps[p], offload[steps[p]]) for p in range(packs)],
        Cluster(ranks, 4, draw(st.integers(1, 4)), stages=stages, speed=tuple(rng.random(ranks) + 0.5)),
        ALL.replace(latency=0.0),
        moves=moves,
        two_level=draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None)
@given(
    schedules(),
    st.sampled_from([True, False, "ring"]),
    st.booleans(),
    st.sampled_from([0, 1e5]),
)
def test_identities(s, overlap, host_overlap, gradient_bytes):
    options = {"host_overlap": host_overlap, "gradient_bytes": gradient_bytes}
    t = simulate(s, overlap=overlap, spans=True, **options)
    add_up(t)
    assert t.makespan >= s.lower_bound * (1 - 1e-12)
    assert (t.busy <= t.makespan * (1 + 1e-12)).all()
    assert t.makespan <= simulate(s, overlap=False, host_overlap=False).makespan * (1 + 1e-9) + (
        simulate(s, gradient_bytes=gradient_bytes).makespan - s.makespan
    )
    again = simulate(s, overlap=overlap, spans=True, **options)
    assert again.makespan == t.makespan and (again.spans == t.spans).all()
    # What is drawn is what was counted: a stage does one thing at a time, and computes as long as it is busy.
    computed = np.zeros(s.ranks)
    for rank in range(s.ranks):
        for stage in range(int(s.cluster.stages_of[rank])):
            mine = t.spans[(t.spans["rank"] == rank) & (t.spans["stage"] == stage)]
            mine = mine[np.argsort(mine["begin"], kind="stable")]
            assert (mine["begin"][1:] >= mine["end"][:-1] - 1e-12 - 1e-9 * t.makespan).all()
            computed[rank] += (mine["end"] - mine["begin"])[mine["kind"] < 2].sum()
    np.testing.assert_allclose(computed / s.cluster.stages_of, t.busy, rtol=1e-9, atol=1e-15)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 14)), max_size=25))
def test_connected(edges):
    group, member = np.array(edges, np.int64).reshape(-1, 2).T
    label = connected(15, group, member)
    reach = {i: {i} for i in range(15)}
    for g in set(group.tolist()):
        joined = set().union(*(reach[m] for m in member[group == g].tolist()))
        for m in joined:
            reach[m] = joined
    assert label.tolist() == [min(reach[i]) for i in range(15)]


def test_a_long_chain_is_connected():
    n = 5000
    label = connected(
        n + 1, np.repeat(np.arange(n), 2), np.stack([np.arange(n), np.arange(1, n + 1)], 1).ravel()
    )
    assert not label.any()


def test_hops_are_near_or_far():
    assert float(hop(ALL, 100.0, False)) == 100 / 1e9 + 1e-5
    assert float(hop(ALL, 100.0, True)) == 100 / 1e8 + 1e-5
    assert float(hop(ALL, 100.0, True, contention=3.0)) == pytest.approx(300 / 1e8 + 1e-5)


def test_explain_is_plain_values():
    packs = [Pack([0], [0, 1], 0, 0.5), Pack([1, 3], [2], 0), Pack([2], [2], 1)]
    s = schedule_of([4000, 100, 50, 0], packs, ranks=4, capacity=2000, cost=ALL, planner="by hand")
    row = explained.explain(s)
    assert json.loads(json.dumps(row))["planner"] == "by hand"
    assert row["makespan"] == s.makespan and row["gap"] == s.gap and row["idle_share"] == s.timeline.idle
    assert row["micro_batches"] == [0, 2] and row["ranks_per_sequence"] == {1: 2, 2: 1}
    # 2000 tokens with half of two of four layers away are 1500; four micro-batches hold 2000 each.
    assert row["padding"] == {"tokens": 8000 - 3150, "share": pytest.approx(4850 / 8000)}
    assert row["offloaded"] == pytest.approx(2000 / 4150)
    slower = explained.explain(s, simulate(s, overlap=False))
    assert slower["makespan"] > row["makespan"] and slower["gap"] > row["gap"]
    empty = explained.explain(plan([], [], 2))
    assert empty["micro_batches"] == [0, 0] and empty["padding"]["share"] == empty["offloaded"] == 0


def test_explain_as_a_table():
    console = pytest.importorskip("rich.console").Console(width=200, record=True, file=io.StringIO())
    s = plan([4000, 100], [Pack([0], [0, 1], 0), Pack([1], [0], 1)], 2)
    console.print(explained.table(s))
    text = console.export_text()
    assert "2 sequences, 4,100 tokens" in text and "1 to 2 a rank" in text and "1: 1, 2: 1" in text


def test_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    from gapless.schedule.timeline import draw, figure, sample_of

    packs = [Pack([0], range(40), 0, 0.5), *(Pack([r + 1], [r], 1) for r in range(39))]
    s = plan([40000, *range(1, 40)], packs, Cluster(41, stages=2), ALL.replace(host_bandwidth=1e5))
    t = simulate(s, spans=True)
    path = tmp_path / "timeline.svg"
    draw(t, path, title="by hand", most=6)
    assert path.stat().st_size > 5000 and "6 of 41 ranks" in figure(t, most=6).axes[0].get_title()
    draw(simulate(plan([], [], 2), spans=True), tmp_path / "empty.png")
    ranks = sample_of(t, 6)
    assert len(ranks) == 6 and {int(t.busy.argmax()), 40} <= set(ranks.tolist())
    assert sample_of(t, 50).tolist() == list(range(41)) and len(sample_of(t, 1)) == 1
    with pytest.raises(ValueError, match="spans=True"):
        draw(simulate(s), path)
    with pytest.raises(ValueError, match="most is 0"):
        draw(t, path, most=0)
