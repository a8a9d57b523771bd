# SPDX-License-Identifier: Apache-2.0
"""Sampling and loading of scheduled batches: every sequence once an epoch, every token once, resumable anywhere."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from gapless.distributed.data import GlobalBatch, RankBatch, RankDataset, ScheduleSampler, loader
from gapless.distributed.losses import IGNORED
from gapless.distributed.rows import Rows
from gapless.schedule import CostModel, Pack, schedule_of

COST = CostModel(cell=1e-11, token=1e-7)
RANKS = 3


def plan(lengths, moves=None):
    """The longest over all ranks, the others in turn."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    packs = [Pack(order[:1], range(RANKS), 0)]
    packs += [Pack(order[1 + r :: RANKS], [r], 1) for r in range(RANKS)]
    return schedule_of(lengths, packs, ranks=RANKS, capacity=10_000, cost=COST, moves=moves)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 1000, n)) for n in (*rng.integers(1, 60, 40), 500, 0)]


def make(dataset, **options):
    return ScheduleSampler([len(s) for s in dataset], plan, **{"tokens": 200} | options)


def batches(sampler):
    return [batch for (batch,) in sampler]


def test_an_epoch_has_every_sequence_once(dataset):
    found = batches(make(dataset, epochs=2))
    drawn = np.concatenate([b.indices for b in found])
    half = len(dataset)
    assert sorted(drawn[:half]) == sorted(drawn[half:]) == list(range(half))
    assert (drawn[:half] != drawn[half:]).any()
    assert [b.number for b in found] == list(range(len(found)))
    for batch in found:
        assert batch.schedule.tokens <= 200 or len(batch.indices) == 1 or 500 in batch.schedule.lengths
    full = [b.schedule.tokens for b in found]
    assert all(
        a + b.schedule.lengths[0] > 200
        for a, b in zip(full, found[1:], strict=False)
        if b.state["epoch"] == 0
    )


def test_ranks_load_every_token_once_with_its_successor(dataset):
    for batch in batches(make(dataset)):
        seen = {i: torch.full((len(dataset[n]),), -1) for i, n in enumerate(batch.indices)}
        for rank in range(RANKS):
            mine = RankDataset(dataset, rank)[batch]
            for micro_batch in batch.schedule.micro_batches(rank):
                rows = Rows(rank, micro_batch.step, micro_batch.pieces)
                tensors = mine.tensors(rows)
                place = 0
                for i, begin, end in micro_batch.pieces.tolist():
                    whole = dataset[batch.indices[i]]
                    here = slice(place, place + end - begin)
                    assert (seen[i][begin:end] == -1).all()
                    seen[i][begin:end] = tensors["input_ids"][here]
                    following = torch.cat([whole[1:], torch.tensor([IGNORED])])[begin:end]
                    assert torch.equal(tensors["targets"][here], following)
                    place += end - begin
        for i, n in enumerate(batch.indices):
            assert torch.equal(seen[i], dataset[n])


def test_moved_tokens_are_loaded_where_they_go():
    lengths = [9, 8, 4]
    schedule = plan(lengths, moves=[[1, 0, 2, 3], [1, 0, 1, 1]])
    batch = GlobalBatch(0, np.arange(3), schedule, {})
    assert batch.wanted_by(2).tolist() == [0, 1]
    tensors = RankDataset([torch.arange(n) for n in lengths], 2)[batch].tensors(
        Rows(2, 1, np.array([[1, 5, 8]]))
    )
    assert tensors["input_ids"].tolist() == [5, 6, 7] and tensors["targets"].tolist() == [6, 7, IGNORED]


@pytest.mark.parametrize("prefetch", [False, True])
def test_it_goes_on_where_a_batch_ended(dataset, prefetch):
    whole = batches(make(dataset, epochs=3, prefetch=prefetch))
    for cut in range(0, len(whole), 3):
        again = make(dataset, epochs=3, seed=99, prefetch=prefetch)
        again.load_state_dict(whole[cut].state)
        rest = batches(again)
        assert [b.number for b in rest] == [b.number for b in whole[cut + 1 :]]
        assert all((a.indices == b.indices).all() for a, b in zip(rest, whole[cut + 1 :], strict=True))
        assert again.state_dict() == whole[-1].state


def test_the_next_plan_is_made_while_a_step_runs(dataset):
    planned, threads = [], set()

    def counting(lengths):
        planned.append(len(lengths))
        threads.add(threading.current_thread())
        return plan(lengths)

    sampler = ScheduleSampler([len(s) for s in dataset], counting, tokens=200)
    stream = iter(sampler)
    next(stream)
    for _ in range(200):
        if len(planned) >= 2:
            break
        threading.Event().wait(0.01)
    assert len(planned) == 2 and threading.main_thread() not in threads
    # What is planned ahead is not given out yet.
    assert sampler.state_dict()["number"] == 1
    stream.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_rank_batches(dataset, workers):
    options = {"multiprocessing_context": "forkserver"} if workers else {}
    found = list(loader(dataset, make(dataset), rank=1, num_workers=workers, **options))
    expected = batches(make(dataset))
    assert [b.state for b in found] == [b.state for b in expected]
    for batch, whole in zip(found, expected, strict=True):
        assert isinstance(batch, RankBatch) and batch.schedule.digest == whole.schedule.digest
        assert sorted(batch.sequences) == whole.wanted_by(1).tolist()


def test_a_dataset_may_give_mappings():
    batch = GlobalBatch(
        0, np.array([0]), schedule_of([3], [Pack([0], [0], 0)], ranks=1, capacity=3, cost=COST), {}
    )
    (tokens,) = RankDataset([{"input_ids": [5, 6, 7]}], 0)[batch].sequences.values()
    assert tokens.tolist() == [5, 6, 7] and tokens.dtype == torch.int64


def test_bad_input_is_named(dataset):
    with pytest.raises(ValueError, match="tokens is 0"):
        make(dataset, tokens=0)
    with pytest.raises(ValueError, match="epochs is 0"):
        make(dataset, epochs=0)
    with pytest.raises(ValueError, match="lengths is empty"):
        ScheduleSampler([], plan, tokens=1)
    with pytest.raises(ValueError, match=r"lengths\[1\] is -1"):
        ScheduleSampler([1, -1], plan, tokens=1)
    with pytest.raises(ValueError, match="state has the keys"):
        make(dataset).load_state_dict({"epoch": 0})
    with pytest.raises(ValueError, match="position 99"):
        make(dataset).load_state_dict({"seed": 0, "epoch": 0, "position": 99, "number": 0})
    with pytest.raises(ValueError, match=r"capacity is 10000.*sequence 1 is the longest"):
        list(ScheduleSampler([5, 90_000, 7], plan, tokens=10**6))
    batch = next(iter(make(dataset)))[0]
    with pytest.raises(ValueError, match="its length was given as"):
        RankDataset([s[:-1] for s in dataset], 0)[batch]
    with pytest.raises(ValueError, match="other lengths"):
        list(ScheduleSampler([5, 6], lambda n: plan(n[:1]), tokens=100))
