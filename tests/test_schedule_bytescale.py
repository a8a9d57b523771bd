# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.schedule import Cluster, CostModel, bytescale
from gapless.schedule.offloading import least_ranks, offload_limit

PLAIN = CostModel(cell=2e-11, token=2e-7, layers=32)
LINKED = CostModel(
    cell=2e-11,
    token=2e-7,
    fixed=2e-5,
    layers=32,
    activation_bytes=1.4e5,
    kv_bytes=4096,
    host_bandwidth=5e10,
    node_bandwidth=2e11,
    network_bandwidth=5e10,
    latency=5e-6,
)
WAYS = [
    {"balance": "dp"},
    {"balance": "pp"},
    {"balance": None},
    {"balance": "dp", "method": "greedy"},
    {"balance": "pp", "method": "greedy"},
]
lengths_of = st.lists(st.integers(0, 300), max_size=24)


def makespan(s, bubbles=0):
    """Each ring starts when all its ranks are free; a pipeline drains for its longest micro-batch."""
    seconds = s.cost.seconds(
        s.pack_tokens, s.pack_cells, s.ring_sizes, s.across_nodes, s.widths, s.cluster.sharing
    )
    free, longest = np.zeros(s.ranks), np.zeros(s.ranks)
    for p in np.argsort(s.steps, kind="stable"):
        ring = list(s.ring(p))
        time = seconds[p] / s.cluster.throughputs[ring].min()
        free[ring] = free[ring].max() + time
        longest[ring] = np.maximum(longest[ring], time)
    return (free + bubbles * longest).max()


def long_tailed(n, seed=0, top=2**21):
    rng = np.random.default_rng(seed)
    short = np.exp(rng.uniform(np.log(64), np.log(16384), n))
    long = np.exp(rng.uniform(np.log(16384), np.log(top), n // 25))
    return np.concatenate([short, long, [top]]).astype(np.int64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cost", [PLAIN, LINKED])
@settings(max_examples=12)
@given(lengths=lengths_of, ranks=st.integers(1, 9), offload=st.booleans(), seed=st.integers(0, 9))
def test_every_batch(way, cost, lengths, ranks, offload, seed):
    capacity = max(40, -(-max(lengths, default=0) // ranks))

    def plan(lengths):
        cluster = Cluster(ranks, ranks_per_node=4)
        return bytescale.plan(lengths, ranks=cluster, capacity=capacity, cost=cost, offload=offload, **way)

    s = plan(lengths)
    assert s.digest == plan(lengths).digest
    if not lengths:
        assert s.packs == 0
        return
    assert offload or not s.offload.any()
    assert (np.diff(s.sequence_offsets) > 0).all()  # no pack is empty
    # A micro-batch is one pack.
    pack = np.repeat(np.arange(s.packs), s.ring_sizes)
    assert len(np.unique(s.ring_ranks * s.packs + s.steps[pack])) == len(s.ring_ranks)
    if way["balance"] is not None and "method" not in way:
        shuffled = plan(np.random.default_rng(seed).permutation(lengths))
        assert makespan(shuffled) == pytest.approx(makespan(s), rel=1e-12)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60), ranks=st.integers(1, 9))
def test_never_worse_than_longest_first(lengths, ranks):
    s = bytescale.plan(lengths, ranks=ranks, capacity=10**6, cost=PLAIN)
    assert makespan(s) <= s.lower_bound + PLAIN.work(max(lengths)) * (1 - 1 / ranks) + 1e-12


@pytest.mark.parametrize(("ranks", "cost"), [(64, PLAIN), (64, LINKED), (300, PLAIN), (1024, LINKED)])
@pytest.mark.parametrize("seed", range(3))
def test_close_to_the_lower_bound(ranks, cost, seed):
    lengths = long_tailed(20 * ranks, seed, top=2**18)
    s = bytescale.plan(lengths, ranks=ranks, capacity=8192, cost=cost)
    assert makespan(s) <= 1.05 * s.lower_bound


def test_better_than_the_papers_algorithms():
    lengths = long_tailed(4000)
    same = {"ranks": 512, "capacity": 8192, "cost": LINKED}
    ours = makespan(bytescale.plan(lengths, **same))
    greedy = makespan(bytescale.plan(lengths, **same, method="greedy"))
    naive = makespan(bytescale.plan(lengths, **same, balance=None))
    assert ours < greedy < naive


def test_twelve_thousand_ranks():
    lengths = long_tailed(4000)
    s = bytescale.plan(lengths, ranks=12288, capacity=8192, cost=PLAIN)
    assert s.ring_sizes.max() > 256
    assert makespan(s) <= 1.05 * s.lower_bound


def test_one_giant_among_thousands():
    lengths = np.concatenate([np.full(4000, 100), [800_000]])
    s = bytescale.plan(lengths, ranks=128, capacity=8192, cost=PLAIN)
    assert s.ring_sizes[s.pack_of[-1]] >= 98
    assert makespan(s) <= 1.02 * s.lower_bound


@pytest.mark.parametrize("cards", [8, 4, 1])
def test_a_long_sequence_takes_whole_nodes_where_the_network_is_slow(cards):
    lengths = np.concatenate([np.full(2000, 500), [500_000]])
    slow = LINKED.replace(network_bandwidth=LINKED.network_bandwidth / 50)
    plans = {
        two_level: bytescale.plan(
            lengths, ranks=Cluster(130, nics_per_node=cards), capacity=8192, cost=slow, two_level=two_level
        )
        for two_level in (False, True)
    }
    assert (plans[False].widths == plans[False].ring_sizes).all()
    for s in plans.values():  # the planner, the cost model and the simulator agree
        assert s.makespan == pytest.approx(makespan(s), rel=1e-9)
    giant = plans[True].pack_of[-1]
    if cards > 1:
        assert plans[True].widths[giant] == 8 and plans[True].ring_sizes[giant] % 8 == 0
    # With one card a node there is nothing to gain.
    assert plans[True].makespan <= {8: 0.5, 4: 0.7, 1: 1}[cards] * plans[False].makespan


def test_more_ranks_than_tokens():
    s = bytescale.plan([1, 1, 1], ranks=64, capacity=10, cost=PLAIN)
    assert sorted(s.ring_ranks) == [0, 1, 2]
    assert s.micro_steps == 1


@pytest.mark.parametrize("way", WAYS)
def test_one_rank(way):
    s = bytescale.plan([5, 90, 0, 30, 100], ranks=1, capacity=100, cost=PLAIN, **way)
    assert set(s.ring_ranks) == {0}
    assert makespan(s) == pytest.approx(s.lower_bound)


@pytest.mark.parametrize("way", WAYS)
def test_equal_lengths_go_everywhere(way):
    s = bytescale.plan([100] * 32, ranks=8, capacity=100, cost=PLAIN, **way)
    assert np.bincount(s.ring_ranks).tolist() == [4] * 8
    assert makespan(s) == pytest.approx(s.lower_bound)


@pytest.mark.parametrize("way", WAYS)
def test_sequences_without_tokens(way):
    s = bytescale.plan([0, 0, 0], ranks=4, capacity=10, cost=PLAIN, **way)
    assert s.ring_ranks.tolist() == [0]


def test_ranks_of_different_capacity_and_speed():
    cluster = Cluster(8, ranks_per_node=4, speed=(1.0,) * 4 + (2.0,) * 4)
    capacity = [1000] * 2 + [4000] * 6
    lengths = [20_000, 9000, *range(50, 1500, 37)]
    s = bytescale.plan(lengths, ranks=cluster, capacity=capacity, cost=PLAIN, offload=False)
    assert not set(s.ring(s.pack_of[0])) & {0, 1}  # equal shards would not fit the small ranks
    # The four fast ranks hold 16,000 tokens, so that the long ring runs at a slow rank's pace, above the bound.
    assert makespan(s) <= 1.5 * s.lower_bound


def test_many_different_capacities():
    rng = np.random.default_rng(0)
    capacity = rng.integers(500, 3000, 200)
    s = bytescale.plan([100_000, *rng.integers(1, 500, 2000)], ranks=200, capacity=capacity, cost=PLAIN)
    assert makespan(s) <= 1.2 * s.lower_bound


def test_a_rank_that_is_late_gets_less():
    # The long one keeps two of four ranks busy; the others take what is short.
    lengths = [4000, *[500] * 16]
    s = bytescale.plan(lengths, ranks=4, capacity=2000, cost=CostModel(cell=1e-6, token=0.0))
    assert makespan(s) <= 1.1 * s.lower_bound


def test_pipelines_get_similar_micro_batches():
    cluster = Cluster(32, stages=8)
    lengths = long_tailed(3000, top=2**17)
    same = {"ranks": cluster, "capacity": 8192, "cost": PLAIN}
    dp, pp = (bytescale.plan(lengths, balance=b, **same) for b in ("dp", "pp"))
    assert makespan(pp, bubbles=7) < makespan(dp, bubbles=7)


def test_naive_is_algorithm_1_by_hand():
    # Capacity 10: 25 takes three ranks, 10 one, 14 two; the rest by best fit: 6 opens a pack, 7 another, 3 fills the
    # second to the brim (room 3, not 4), 4 fills the first. Ranks in turn: (0 1 2) (3) (0 1), then 2 and 3.
    s = bytescale.plan(
        [25, 6, 10, 7, 3, 14, 4], ranks=4, capacity=10, cost=PLAIN, balance=None, offload=False
    )
    assert s.pack_of.tolist() == [0, 3, 1, 4, 4, 2, 3]
    assert [s.ring(p) for p in range(5)] == [(0, 1, 2), (3,), (0, 1), (2,), (3,)]
    assert s.steps.tolist() == [0, 0, 1, 1, 1]


def test_greedy_is_algorithm_2_by_hand():
    # All start equal, so all are targets: 20 takes ranks 0 and 1, then 9, 8. Rank 3 is furthest behind, then rank 2.
    s = bytescale.plan(
        [9, 20, 8, 7, 6],
        ranks=4,
        capacity=10,
        cost=CostModel(cell=0.0, token=1.0),
        method="greedy",
        offload=False,
    )
    assert [s.ring(s.pack_of[i]) for i in range(5)] == [(2,), (0, 1), (3,), (3,), (2,)]


@settings(max_examples=40)
@given(
    length=st.integers(1, 100_000),
    capacity=st.integers(1, 5000),
    layers=st.integers(1, 40),
    bandwidth=st.sampled_from([1e9, 2e10, 1e11, np.inf]),
)
def test_equation_3_against_all_ratios(length, capacity, layers, bandwidth):
    cost = LINKED.replace(layers=layers, host_bandwidth=bandwidth)
    (ring,), (ratio,) = least_ranks([length], capacity=capacity, cost=cost)

    def fits(n, r):
        return -(-length // n) * (
            2 + (1 - r) * (layers - 2) if layers > 2 else layers
        ) <= capacity * layers * (1 + 1e-9)

    def hides(r):
        forward = cost.cell * length * (length + 1) / 2 + cost.token * length
        return forward >= r * length * cost.activation_bytes / bandwidth * (1 - 1e-9)

    assert fits(ring, ratio) and hides(ratio) and 0 <= ratio <= 1
    grid = [*np.linspace(0, 1, 201), float(offload_limit([length], cost)[0])]
    if ring > 1:  # no ratio makes fewer ranks do
        assert not any(fits(ring - 1, r) and hides(r) for r in grid if layers > 2 or r == 0)
    # and no smaller ratio does with these ranks
    assert not any(fits(ring, r) for r in grid if r < ratio - 1e-6)


def test_offloading_needs_fewer_ranks_for_long_sequences_only():
    lengths = [8192, 65536, 2**20]
    kept, _ = least_ranks(lengths, capacity=8192, cost=LINKED, offload=False)
    ring, ratio = least_ranks(lengths, capacity=8192, cost=LINKED)
    assert kept.tolist() == [1, 8, 128]
    assert ring[0] == 1 and ratio[0] == 0
    assert ring[2] < 20 and ratio[2] > 0.9


def test_a_sequence_over_all_ranks():
    with pytest.raises(
        ValueError, match=r"lengths\[1\] is 500: 4 ranks hold at most 400 .* capacity of 125 tokens"
    ):
        bytescale.plan([10, 500], ranks=4, capacity=100, cost=PLAIN, offload=False)
    with pytest.raises(ValueError, match=r"lengths\[0\] is 500: .* capacity of 125 tokens"):
        bytescale.plan([500, 10], ranks=4, capacity=100, cost=PLAIN, offload=False, balance=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "both"}, "balance is 'both'"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"delta": -1.0}, "delta is -1.0"),
        ({"delta": float("nan")}, "delta is nan"),
        ({"capacity": 0}, "capacity is 0"),
        ({"lengths": [3, -4]}, r"lengths\[1\] is -4"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        bytescale.plan(**({"lengths": [3], "ranks": 2, "capacity": 10, "cost": PLAIN} | options))


def test_the_simulator_agrees():
    s = bytescale.plan(long_tailed(400, top=2**17), ranks=32, capacity=8192, cost=PLAIN)
    assert s.makespan == pytest.approx(makespan(s), rel=1e-6)
