# SPDX-License-Identifier: Apache-2.0
"""The value object of all planners, its chunks, and the certificate that every schedule needs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapless.schedule import Cluster, CostModel, Pack, Schedule, schedule_of
from gapless.schedule.inputs import check_capacity, check_fits, check_lengths
from gapless.schedule.shards import chunk_begin

COST = CostModel(cell=1e-11, token=1e-7, layers=4)


def example(**changes) -> Schedule:
    """Two rings and two single ranks on three ranks: rank 2 takes no part in step 1."""
    packs = [Pack([4, 0], [2, 0], 0), Pack([1], [1], 0), Pack([2, 3], [1, 0], 1), Pack([5], [2], 2, 0.5)]
    arguments = {"ranks": 3, "capacity": 60, "cost": COST} | changes
    return schedule_of([7, 20, 0, 33, 90, 70], packs, **arguments)


def covered(schedule: Schedule) -> dict[int, list[tuple[int, int]]]:
    """Every piece that any rank computes, by sequence."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    for rank in range(schedule.ranks):
        for micro_batch in schedule.micro_batches(rank):
            for sequence, begin, end in micro_batch.pieces.tolist():
                pieces.setdefault(sequence, []).append((begin, end))
    return pieces


def assert_covers(schedule: Schedule) -> None:
    pieces = covered(schedule)
    for sequence, length in enumerate(schedule.lengths.tolist()):
        ranges = sorted(pieces.get(sequence, []))
        assert [b for b, _ in ranges] == [0, *(e for _, e in ranges[:-1])] if length else ranges == []
        assert not length or ranges[-1][1] == length


def test_ranks_compute_every_token_once():
    schedule = example()
    assert_covers(schedule)
    assert schedule.tokens == 220 and schedule.packs == 4 and schedule.micro_steps == 3
    assert [[m.step for m in schedule.micro_batches(r)] for r in range(3)] == [[0, 1], [0, 1], [0, 2]]
    assert schedule.micro_batches(2)[1].offload == 0.5
    assert schedule.ring(0) == (2, 0) and schedule.sequences(0).tolist() == [0, 4]


def test_a_shard_is_first_chunks_then_second_chunks():
    shard = example().shard(0, 2)  # first of two ranks: chunks 0 and 3 of 4
    assert shard.index == 0 and shard.parts == 4
    assert shard.pieces.tolist() == [[0, 0, 2], [4, 0, 23], [0, 6, 7], [4, 67, 90]]
    positions = example().micro_batches(2)[0].positions
    assert positions.tolist() == [0, 1, *range(23), 6, *range(67, 90)]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.integers(1, 7),
    st.integers(0, 5).map(lambda n: 3**n),
)
def test_chunks_are_even(lengths, ranks, factor):
    lengths = np.array(lengths) * factor
    first = np.cumsum(lengths) - lengths
    cut = chunk_begin(first[:, None], lengths[:, None], np.arange(2 * ranks + 1), 2 * ranks)
    assert (cut[:, 0] == 0).all() and (cut[:, -1] == lengths).all()
    sizes = np.diff(cut)
    assert (sizes >= lengths[:, None] // (2 * ranks)).all() and (
        sizes <= -(-lengths[:, None] // (2 * ranks))
    ).all()
    held = sizes.sum(0)[:ranks] + sizes.sum(0)[: ranks - 1 : -1]
    assert held.max() == -(-lengths.sum() // ranks)


@st.composite
def packs(draw):
    """Lengths, and packs of them on up to five ranks."""
    lengths = draw(st.lists(st.integers(0, 300), max_size=12))
    ranks = draw(st.integers(1, 5))
    count = draw(st.integers(1, 6))
    of = [draw(st.integers(0, count - 1)) for _ in lengths]
    return (
        lengths,
        ranks,
        [
            Pack(
                [i for i, p in enumerate(of) if p == pack],
                draw(
                    st.permutations(range(ranks)).flatmap(
                        lambda r: st.integers(1, len(r)).map(lambda n: r[:n])
                    )
                ),
                draw(st.integers(0, 3)),
            )
            for pack in range(count)
        ],
    )


@given(packs())
def test_any_packs_cover_their_sequences(case):
    lengths, ranks, chosen = case
    schedule = schedule_of(lengths, chosen, ranks=ranks, capacity=4000, cost=COST)
    assert_covers(schedule)
    for rank in range(ranks):
        for micro_batch in schedule.micro_batches(rank):
            assert micro_batch.tokens == len(micro_batch.positions)
            for shard in micro_batch.shards:
                assert shard.ranks[shard.index] == rank
                fair = -(-int(shard.lengths.sum()) // len(shard.ranks))
                assert shard.tokens <= fair


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_of": [0, 1, 2, 2, 0, 4]}, "sequence 5 is in pack 4, of 4"),
        ({"pack_of": [0, 1, 2, 2, 0]}, r"pack_of has shape \[5\]: it has to be \[6\]"),
        ({"lengths": [7, 20, 0, 33, 90, -1]}, r"lengths\[5\] is -1"),
        ({"ring_ranks": [2, 0, 1, 1, 3, 2]}, "names rank 3: ranks are 0 to 2"),
        ({"ring_ranks": [2, 2, 1, 1, 0, 2]}, "rank 2 is twice in the ring of pack 0"),
        ({"rank_offsets": [0, 2, 2, 5, 6]}, "give each pack a rank"),
        ({"rank_offsets": [0, 2, 3, 5, 7]}, "end at the size of ring_ranks"),
        ({"steps": [0, 0, -1, 2]}, "pack 2 is in step -1"),
        ({"steps": [0, 0, 1, 0]}, "rank 2, step 0: its packs have different offload ratios"),
        ({"offload": [0, 0, 0, 1.5]}, r"offload\[3\] is 1.5"),
        ({"offload": [0, 0, 0, np.nan]}, r"offload\[3\] is nan"),
        (
            {"offload": [0, 0, 0, 0]},
            "rank 2 holds the activations of 70 tokens in step 2: its capacity is 60",
        ),
        ({"capacity": [60, 60, 40]}, "rank 2 holds the activations of 49 tokens in step 0"),
        ({"capacity": [60, 60]}, r"capacity has shape \[2\]"),
        ({"moves": [[0, 1, 2, 21]]}, "rank 1 gives away 21 tokens in step 0: it has 20"),
        ({"moves": [[1, 2, 0, 1]]}, "rank 2 gives away 1 tokens in step 1: it has 0"),
        ({"moves": [[0, 1, 1, 3]]}, "between two ranks"),
        ({"moves": [[0, 1, 2, 0]]}, "at least one token"),
        ({"moves": [[3, 1, 2, 1]]}, "moves names step 3, of 3"),
        ({"moves": [[0, 1, 5, 1]]}, "moves names rank 5, of 3"),
        ({"moves": [[0, 1, 2, 1], [0, 2, 0, 1]]}, "gives and receives"),
        ({"moves": [[0, 1, 2]]}, r"moves has shape \[1, 3\]"),
    ],
)
def test_the_certificate_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(example(), **changes)


def test_moves_may_be_certified():
    schedule = dataclasses.replace(example(), moves=[[0, 2, 1, 5], [0, 0, 1, 3], [1, 0, 1, 16]])
    assert len(schedule.moves) == 3


def test_sequences_in_no_or_two_packs_are_refused():
    with pytest.raises(ValueError, match="sequence 1 is in 0 packs"):
        schedule_of([1, 2], [Pack([0], [0], 0)], ranks=1, capacity=9, cost=COST)
    with pytest.raises(ValueError, match="sequence 0 is in 2 packs"):
        schedule_of([1], [Pack([0], [0], 0), Pack([0], [0], 1)], ranks=1, capacity=9, cost=COST)
    with pytest.raises(ValueError, match="name sequence 3: there are 1"):
        schedule_of([1], [Pack([0, 3], [0], 0)], ranks=1, capacity=9, cost=COST)


def test_an_empty_batch_and_empty_sequences():
    schedule = schedule_of([], [], ranks=2, capacity=1, cost=COST)
    assert schedule.packs == schedule.tokens == schedule.micro_steps == 0
    assert schedule.lower_bound == 0 and schedule.micro_batches(1) == []
    schedule = schedule_of([0, 0], [Pack([0, 1], [0], 0)], ranks=2, capacity=1, cost=COST)
    assert schedule.micro_batches(0)[0].tokens == 0 and schedule.micro_batches(0)[0].pieces.shape == (0, 3)


def test_arrays_cannot_be_changed_and_the_digest_tells_schedules_apart():
    schedule = example()
    with pytest.raises(ValueError, match="read-only"):
        schedule.steps[0] = 1
    assert schedule.digest == example().digest
    for changes in ({"steps": [0, 0, 1, 3]}, {"lengths": [7, 20, 0, 33, 90, 69]}, {"moves": [[0, 2, 1, 5]]}):
        assert dataclasses.replace(schedule, **changes).digest != schedule.digest


def test_bounds_and_packs_add_up():
    schedule = example()
    assert schedule.pack_tokens.tolist() == [97, 20, 33, 70]
    assert schedule.pack_cells.tolist() == [7 * 8 / 2 + 90 * 91 / 2, 210, 33 * 34 / 2, 70 * 71 / 2]
    assert schedule.lower_bound == pytest.approx(COST.work([7, 20, 33, 90, 70]).sum() / 3)
    uneven = example(ranks=Cluster(3, speed=(1.0, 0.5, 0.5)))
    assert uneven.lower_bound == pytest.approx(schedule.lower_bound * 1.5)
    assert example(ranks=Cluster(3, ranks_per_node=2)).across_nodes.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_lengths([3, -2]), ValueError, r"lengths\[1\] is -2"),
        (lambda: check_lengths([1.5]), TypeError, "whole numbers"),
        (lambda: check_lengths([float("nan")]), TypeError, "whole numbers"),
        (lambda: check_lengths(["x"]), TypeError, "whole numbers"),
        (lambda: check_lengths([[1]]), ValueError, r"shape \[1, 1\]"),
        (lambda: check_lengths([2**52, 2**53]), ValueError, "2\\^53"),
        (lambda: check_capacity(0, 2), ValueError, "capacity is 0"),
        (lambda: check_capacity([1, 2, 3], 2), ValueError, r"shape \[3\]"),
        (lambda: check_capacity(1.5, 2), TypeError, "whole number"),
        (lambda: check_fits(np.array([5, 100]), 80, 4), ValueError, r"lengths\[1\] is 100.*a capacity of 25"),
        (lambda: Cluster(0), ValueError, "ranks is 0"),
        (lambda: Cluster(2, speed=(1.0,)), ValueError, "speed has 1 entries"),
        (lambda: Cluster(1, speed=(0.0,)), ValueError, r"speed\[0\] is 0"),
        (lambda: Cluster("2"), TypeError, "ranks is '2'"),
        (lambda: example().micro_batches(3), ValueError, "rank is 3: it has to be between 0 and 2"),
        (lambda: example().shard(1, 0), ValueError, r"rank 0 has no part in pack 1: its ranks are \[1\]"),
        (lambda: CostModel(cell=-1.0, token=1.0), ValueError, "cell is -1"),
        (lambda: CostModel(cell=1.0, token=float("nan")), ValueError, "token is nan"),
        (lambda: CostModel(cell=1.0, token=1.0, layers=0), ValueError, "layers is 0"),
        (lambda: CostModel(cell="1", token=1.0), TypeError, "cell is '1'"),
        (lambda: CostModel(cell=1.0, token=1.0, node_bandwidth=0.0), ValueError, "node_bandwidth is 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_cost_models_survive_a_file(tmp_path):
    path = tmp_path / "cost.json"
    model = COST.replace(network_bandwidth=1e9, name="here")
    model.save(path)
    assert CostModel.load(path) == model
    path.write_text('{"cell": 1, "speed": 2}')
    with pytest.raises(ValueError, match="unknown fields \\['speed'\\]"):
        CostModel.load(path)
    path.write_text('{"cell": 1}')
    with pytest.raises(ValueError, match="the fields \\['token'\\] are missing"):
        CostModel.load(path)
    path.write_text("cells")
    with pytest.raises(ValueError, match="is not JSON"):
        CostModel.load(path)
