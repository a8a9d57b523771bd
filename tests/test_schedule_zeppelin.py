# SPDX-License-Identifier: Apache-2.0
"""Zeppelin's planner: zones, certified plans, remapping against a linear program."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from gapless.schedule import Cluster, CostModel, traces, zeppelin
from gapless.schedule.remap import balance_tokens, link_seconds, nic_of, targets, traffic

COST = CostModel(
    cell=2e-11,
    token=2e-7,
    fixed=1e-5,
    layers=4,
    kv_bytes=4096,
    hidden_bytes=8192,
    node_bandwidth=200e9,
    network_bandwidth=25e9,
    latency=5e-6,
)


# --- zones -----------------------------------------------------------------------------------------------------------


def hidden(cost, lengths, across):
    """Whether a ring of two hides its transfers, by the cost model itself."""
    return cost.attention(cost.cells(lengths)) / 2 >= cost.ring(lengths, 2, across)


@pytest.mark.parametrize("kv_bytes", [64, 512, 4096])
@pytest.mark.parametrize("latency", [0.0, 5e-6])
def test_zones_against_brute_force(kv_bytes, latency):
    cost = COST.replace(kv_bytes=kv_bytes, latency=latency, node_bandwidth=400e9)
    local, intra = zeppelin.zones(cost, Cluster(16), two_level=False)
    assert 0 < local <= intra
    for limit, across in ((local, False), (intra, True)):
        lengths = np.arange(1, 400_000)
        assert limit == lengths[~hidden(cost, lengths, across)].max() < 300_000


def test_zones_at_the_extremes():
    cluster = Cluster(16)
    free = COST.replace(node_bandwidth=np.inf, network_bandwidth=np.inf, latency=0.0)
    assert zeppelin.zones(free, cluster) == (0, 0)
    # Without attention nothing hides a transfer; with fast cards the outer zone does not begin before the inner one.
    assert zeppelin.zones(COST.replace(cell=0.0), cluster) == (2**53, 2**53)
    local, intra = zeppelin.zones(COST.replace(network_bandwidth=np.inf, latency=0.0), cluster)
    assert local == intra > 0


def test_rings_of_two_levels_let_shorter_sequences_leave_their_node():
    cluster = Cluster(16)
    assert zeppelin.zones(COST, cluster)[1] < zeppelin.zones(COST, cluster, two_level=False)[1]


# --- plans -----------------------------------------------------------------------------------------------------------

lengths = st.lists(st.one_of(st.integers(0, 60), st.integers(0, 3000)), max_size=40)
clusters = st.builds(
    Cluster, ranks=st.integers(1, 13), ranks_per_node=st.integers(1, 5), nics_per_node=st.integers(1, 4)
)


def plan(sizes, cluster, capacity=600, cost=COST, **options):
    return zeppelin.plan(sizes, ranks=cluster, capacity=capacity, cost=cost, **options)


@settings(deadline=None, max_examples=60)
@given(lengths, clusters, st.sampled_from([300, 1000, 3000]), st.booleans(), st.booleans())
def test_plans_are_certified_and_the_same_again(sizes, cluster, capacity, remap, two_level):
    if max(sizes, default=0) > cluster.ranks * capacity:
        with pytest.raises(ValueError, match=r"lengths\[\d+\] is \d+: .* would do"):
            plan(sizes, cluster, capacity)
        return
    schedule = plan(sizes, cluster, capacity, remap=remap, two_level=two_level)  # its construction checks it
    assert schedule.digest == plan(sizes, cluster, capacity, remap=remap, two_level=two_level).digest
    assert schedule.makespan >= schedule.lower_bound * (1 - 1e-9)
    if not remap:
        assert len(schedule.moves) == 0
    for step in range(schedule.micro_steps):
        sizes_of = schedule.ring_sizes[schedule.steps == step]
        assert len(sizes_of)  # steps that nobody takes are none
        place = 2 * schedule.across_nodes[schedule.steps == step] + (sizes_of > 1)
        assert (np.diff(place) <= 0).all()  # between nodes first, whole sequences last


@pytest.mark.parametrize("ranks", [16, 20, 28])
def test_a_node_that_is_not_whole_makes_no_plan_longer(ranks):
    # A ring of two whole nodes, or of one level over all ranks: never one of two levels that is none.
    slow = COST.replace(network_bandwidth=2e9)
    for longest in (50_000, 100_000, 150_000):
        sizes = np.append(np.full(40, 500), longest)
        made = {
            two_level: plan(sizes, Cluster(ranks), 20_000, slow, remap=False, two_level=two_level)
            for two_level in (False, True)
        }
        assert made[True].makespan <= made[False].makespan * 1.02


@settings(deadline=None, max_examples=30)
@given(lengths, st.randoms(use_true_random=False))
def test_the_order_of_sequences_does_not_matter(sizes, random):
    cluster = Cluster(6, ranks_per_node=3)
    shuffled = list(sizes)
    random.shuffle(shuffled)
    assert plan(shuffled, cluster).makespan == pytest.approx(plan(sizes, cluster).makespan, rel=1e-9)


def test_empty_batches_and_sequences():
    empty = plan([], 4)
    assert empty.packs == 0 and empty.makespan == 0
    nothing = plan([0, 0], 4)
    assert nothing.packs == 1 and nothing.ring(0) == (0,)
    assert plan([0, 5, 0], 4).packs == 1


def test_few_sequences_leave_ranks_without_work():
    schedule = plan([100, 90], Cluster(8), 200)
    assert sorted(map(len, map(schedule.micro_batches, range(8)))) == [0] * 6 + [1, 1]


def test_capacities_without_end():
    schedule = plan([3000, 5], Cluster(4), 2**62)
    assert schedule.micro_steps == 1


def test_one_rank_takes_step_after_step():
    schedule = plan([50] * 13, 1, 100)
    assert schedule.micro_steps == 7 and (schedule.ring_sizes == 1).all()


def test_local_sequences_stay_whole_and_intra_node_ones_stay_in_a_node():
    cluster = Cluster(16)
    local, intra = zeppelin.zones(COST, cluster, two_level=False)
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, local + 1, 200), rng.integers(local + 1, intra + 1, 60)])
    schedule = plan(sizes, cluster, 4 * intra, two_level=False)
    alone = schedule.ring_sizes[schedule.pack_of] == 1
    assert alone[sizes <= local].all()
    assert not schedule.across_nodes.any()
    one = plan([*sizes.tolist(), 20 * intra], cluster, 4 * intra, two_level=False)
    assert one.across_nodes[one.pack_of[-1]]


def test_a_sequence_over_the_capacity_of_a_node_is_shared_by_nodes():
    schedule = plan([5000, 10, 10], Cluster(4, ranks_per_node=2), 1300)
    assert schedule.ring(schedule.pack_of[0]) == (0, 1, 2, 3)


def test_one_giant_among_thousands():
    rng = np.random.default_rng(0)
    sizes = np.append(rng.integers(1, 400, 3000), 64_000)
    cluster = Cluster(16, ranks_per_node=4)
    schedule = plan(sizes, cluster, 8192, COST.replace(network_bandwidth=200e9))
    assert schedule.gap < 0.05
    # A cluster whose ranks hold just enough of it.
    tight = plan(sizes, cluster, 4000)
    assert len(tight.ring(tight.pack_of[-1])) == 16


def test_capacities_and_speeds_that_differ():
    sizes = np.random.default_rng(1).integers(1, 700, 60)
    cluster = Cluster(4, ranks_per_node=2, speed=(1.0, 2.0, 1.0, 0.5))
    schedule = plan(sizes, cluster, np.array([700, 900, 300, 200]))
    assert schedule.gap < 0.5  # the bound knows no capacities, and no overhead of micro-batches
    with pytest.raises(ValueError, match="a capacity of 501 tokens a rank would do"):
        plan([2001], cluster, np.array([700, 900, 100, 100]))
    with pytest.raises(
        ValueError, match=r"stages is .*: ranks that share sequences need pipelines of one depth"
    ):
        plan(sizes, Cluster(2, stages=(1, 2)), 700)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": [3, -1]}, ValueError, r"lengths\[1\] is -1"),
        ({"lengths": [3.5]}, TypeError, "lengths is of float64"),
        ({"capacity": 0}, ValueError, "capacity is 0"),
        ({"capacity": [5, 5, 5]}, ValueError, r"capacity has shape \[3\]"),
        ({"ranks": 0}, ValueError, "ranks is 0"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"lengths": [3, 4], "ranks": 2, "capacity": 10, "cost": COST} | change
    with pytest.raises(error, match=message):
        zeppelin.plan(arguments.pop("lengths"), **arguments)


def test_remapping_makes_a_crowded_step_shorter():
    # Two long sequences fill two ranks; short ones have no pairs to balance them with, only tokens.
    cost = COST.replace(cell=1e-12, kv_bytes=1e9, hidden_bytes=16)
    sizes = [4000, 4000, *[10] * 200]
    moved = plan(sizes, 8, 4000, cost, remap=True)
    kept = plan(sizes, 8, 4000, cost, remap=False)
    assert len(moved.moves) and moved.makespan < 0.75 * kept.makespan


@pytest.mark.parametrize("name", ["github", "megatron", "code"])
def test_shared_traces_come_close_to_the_lower_bound(name):
    cost = COST.replace(network_bandwidth=100e9, kv_bytes=1024)
    sizes = traces.sample(name, tokens=2**21, context=2**17, seed=5)
    schedule = plan(sizes, Cluster(32), 16384, cost)
    assert schedule.gap < 0.1


# --- remapping -------------------------------------------------------------------------------------------------------


def after(tokens, moves):
    held = np.atleast_2d(np.array(tokens, np.int64))
    np.subtract.at(held, (moves[:, 0], moves[:, 1]), moves[:, 3])
    np.add.at(held, (moves[:, 0], moves[:, 2]), moves[:, 3])
    return held


def least_time(tokens, cluster, cost):
    """The least largest time of any transfer matrix with fractions of tokens: a linear program."""
    surplus = (np.asarray(tokens) - targets(tokens, cluster)[0]).astype(float)
    givers, takers = np.flatnonzero(surplus > 0), np.flatnonzero(surplus < 0)
    if not len(givers):
        return 0.0
    near, far = link_seconds(cost)
    pairs = [(g, t) for g in givers for t in takers]
    seconds = [near if cluster.node_of(g) == cluster.node_of(t) else far for g, t in pairs]
    equal = [[float(r in pair) for pair in pairs] for r in (*givers, *takers)]
    right = [abs(surplus[r]) for r in (*givers, *takers)]
    below = [
        [s * (r == pair[end]) for pair, s in zip(pairs, seconds, strict=True)] + [-1.0]
        for end, ranks in ((0, givers), (1, takers))
        for r in ranks
    ]
    below += [
        [far * (nic_of(p[end], cluster) == card and s == far) for p, s in zip(pairs, seconds, strict=True)]
        + [-1.0]
        for end in (0, 1)
        for card in np.unique(nic_of(np.arange(cluster.ranks), cluster))
    ]
    answer = linprog(
        [0.0] * len(pairs) + [1.0],
        A_ub=below,
        b_ub=[0.0] * len(below),
        A_eq=[[*row, 0.0] for row in equal],
        b_eq=right,
    )
    assert answer.status == 0
    return answer.fun


@settings(deadline=None, max_examples=60)
@given(clusters, st.data())
def test_remapping_against_a_linear_program(cluster, data):
    tokens = data.draw(st.lists(st.integers(0, 500), min_size=cluster.ranks, max_size=cluster.ranks))
    # A unit of time that the program's tolerances do not drown.
    cost = COST.replace(
        hidden_bytes=1.0, node_bandwidth=8.0, network_bandwidth=data.draw(st.sampled_from([1.0, 3.0, 7.0]))
    )
    moves = balance_tokens(tokens, cluster, cost)
    held = after(tokens, moves)
    assert held.max() - held.min() <= 1 and held.sum() == sum(tokens)
    best = least_time(tokens, cluster, cost)
    _, far = link_seconds(cost)
    assert best - 1e-6 <= traffic(moves, cluster, cost) <= best + 2 * far + 1e-6


@settings(deadline=None, max_examples=60)
@given(clusters, st.integers(1, 3), st.data())
def test_only_surplus_moves_and_no_more_than_needed_leaves_a_node(cluster, steps, data):
    row = st.lists(st.integers(0, 500), min_size=cluster.ranks, max_size=cluster.ranks)
    tokens = np.array(data.draw(st.lists(row, min_size=steps, max_size=steps)))
    moves = balance_tokens(tokens, cluster, COST)
    goal = targets(tokens, cluster)
    assert np.array_equal(after(tokens, moves), goal)
    gives = set(map(tuple, moves[:, :2].tolist()))
    assert not gives & set(map(tuple, moves[:, [0, 2]].tolist()))
    across = cluster.node_of(moves[:, 1]) != cluster.node_of(moves[:, 2])
    node = cluster.node_of(np.arange(cluster.ranks))
    for step in range(steps):
        surplus = np.bincount(node, weights=(tokens - goal)[step])
        assert moves[across & (moves[:, 0] == step), 3].sum() == np.maximum(surplus, 0).sum()
        # No targets that differ by one at most let fewer tokens leave their nodes.
        share, size = tokens[step].sum() / cluster.ranks, np.bincount(node)
        held = np.bincount(node, weights=tokens[step])
        assert np.maximum(surplus, 0).sum() <= np.maximum(held - np.floor(share) * size, 0).sum()
    alone = [balance_tokens(t, cluster, COST) + np.array([s, 0, 0, 0]) for s, t in enumerate(tokens)]
    assert np.array_equal(moves, np.concatenate(alone))


def test_remapping_follows_the_speed_of_ranks():
    cluster = Cluster(3, speed=(1.0, 2.0, 1.0))
    assert after([100, 0, 0], balance_tokens([100, 0, 0], cluster, COST)).tolist() == [[25, 50, 25]]


def test_the_surplus_for_other_nodes_is_shared_by_the_ranks_that_have_it():
    # 300 tokens have to leave; both givers' times are equal when each sends half.
    cluster = Cluster(4, ranks_per_node=2)
    moves = balance_tokens([300, 300, 0, 0], cluster, COST)
    assert moves[:, 1:].tolist() == [[0, 2, 150], [1, 3, 150]]
    # The rank with more to hand on inside its node sends fewer out of it.
    cluster = Cluster(6, ranks_per_node=3)
    moves = balance_tokens([400, 200, 0, 0, 0, 0], cluster, COST)
    out = moves[moves[:, 2] >= 3]
    sent = np.bincount(out[:, 1], weights=out[:, 3], minlength=2)
    assert sent.sum() == 300 and sent[1] <= sent[0]


def test_remapping_of_nothing():
    for tokens in ([0, 0, 0], [7, 7, 7], [7, 8, 7]):
        assert len(balance_tokens(tokens, Cluster(3), COST)) == 0
    assert len(balance_tokens([9], Cluster(1), COST)) == 0
    assert traffic(np.empty((0, 4)), Cluster(3), COST) == 0
    # Two messages of rank 0, inside its node.
    slow = COST.replace(latency=1.0)
    assert traffic([[0, 0, 1, 5], [0, 0, 2, 5]], Cluster(3), slow) == pytest.approx(2.0, rel=1e-5)
    fast = COST.replace(node_bandwidth=np.inf, network_bandwidth=np.inf)
    assert after([9, 0, 0], balance_tokens([9, 0, 0], Cluster(3, 1), fast)).tolist() == [[3, 3, 3]]
    with pytest.raises(
        ValueError, match=r"tokens has shape \[2\]: it has to be \[steps, ranks\], of 3 ranks"
    ):
        balance_tokens([1, 2], Cluster(3), COST)
    with pytest.raises(ValueError, match="tokens holds -1"):
        balance_tokens([1, -1, 0], Cluster(3), COST)
