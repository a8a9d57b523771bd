# SPDX-License-Identifier: Apache-2.0
"""The loader on Ray: the same batches as the plain one, also when servers, the planner or a rank die on the way."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray")

from gapless.distributed import ray_loader  # noqa: E402
from gapless.distributed.current import running_steps  # noqa: E402
from gapless.distributed.data import RankDataset, ScheduleSampler  # noqa: E402
from gapless.distributed.losses import IGNORED  # noqa: E402
from gapless.distributed.ray_loader import Planner, RayLoader, Server, Slices  # noqa: E402
from gapless.schedule import CostModel, Pack, schedule_of  # noqa: E402

COST = CostModel(cell=1e-11, token=1e-7)
RANKS, SHARDS, TOKENS = 3, 2, 300


def plan(lengths):
    """The longest over all ranks, the others in turn; rank 2 computes some of rank 0's tokens."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    packs = [Pack(order[:1], range(RANKS), 0)]
    packs += [Pack(order[1 + r :: RANKS], [r], 1) for r in range(RANKS)]
    few = min(3, int(lengths[order[1::RANKS]].sum()))
    moves = [[1, 0, 2, few]] if few else None
    return schedule_of(lengths, packs, ranks=RANKS, capacity=10_000, cost=COST, moves=moves)


def part(shard):
    rng = np.random.default_rng(shard)
    return [torch.from_numpy(rng.integers(0, 1000, n)) for n in (*rng.integers(1, 60, 20), 400, 0)]


DATASET = [tokens for shard in range(SHARDS) for tokens in part(shard)]


@pytest.fixture(scope="module")
def cluster():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 << 20,
        )
        yield
        ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def make(cluster, tmp_path_factory):
    """Makes a rank's loader; ``make.reads`` says how often each shard was read."""
    log = tmp_path_factory.mktemp("reads") / "log"

    def read(shard, shards):
        with open(log, "a") as file:
            file.write(f"{shard}\n")
        return part(shard) if shard else [{"input_ids": tokens.tolist()} for tokens in part(shard)]

    def made(rank, **options):
        return RayLoader(
            read, plan, **{"rank": rank, "shards": SHARDS, "tokens": TOKENS, "seed": 5} | options
        )

    made.reads = lambda: sorted(log.read_text().split())
    yield made
    made(0).stop()


@pytest.fixture(scope="module")
def expected():
    """The global batches of an epoch."""
    sampler = ScheduleSampler([len(s) for s in DATASET], plan, tokens=TOKENS, seed=5)
    return [batch for (batch,) in sampler]


def check(found, batch, rank):
    """``found`` is rank's part of ``batch``: the same tokens as the plain loader's."""
    assert found.schedule.digest == batch.schedule.digest and found.state == batch.state
    assert found.of.number == batch.number and found.of.indices.tolist() == batch.indices.tolist()
    plain = RankDataset(DATASET, rank)[batch]
    for running in running_steps(batch.schedule, rank):
        one, other = found.tensors(running.rows), plain.tensors(running.rows)
        assert one.keys() == other.keys()
        for name, tokens in other.items():
            assert one[name].dtype == torch.int64 and torch.equal(one[name], tokens)


def test_an_epoch_has_every_token_once_with_its_successor(make, expected):
    assert len(expected) > 4
    successors = [torch.full((len(s),), -1) for s in DATASET]
    for rank in range(RANKS):
        batches = list(make(rank))
        assert len(batches) == len(expected)
        for found, batch in zip(batches, expected, strict=True):
            check(found, batch, rank)
            for running in running_steps(batch.schedule, rank):
                targets, place = found.tensors(running.rows)["targets"], 0
                for i, begin, end in running.rows.pieces.tolist():
                    here = successors[batch.indices[i]][begin:end]
                    assert (here == -1).all()
                    here.copy_(targets[place : place + end - begin])
                    place += end - begin
    for tokens, following in zip(DATASET, successors, strict=True):
        if len(tokens):
            assert torch.equal(following, torch.cat([tokens[1:], torch.tensor([IGNORED])]))


def test_servers_and_planner_may_die(make, expected):
    rank = 1
    loader = make(rank)
    stream = iter(loader)
    for batch in expected[:2]:
        check(next(stream), batch, rank)
    before = make.reads()
    for actor in (loader._planner, loader._servers[1]):
        ray.kill(actor, no_restart=False)
    for batch in expected[2:]:
        check(next(stream), batch, rank)
    assert next(stream, None) is None
    assert make.reads() == sorted([*before, "1"])


def test_a_plan_that_died_with_its_planner_is_asked_for_again(make, expected, monkeypatch):
    loader, asked, answers = make(0), [], ray_loader._answers

    def once_lost(refs, timeout):
        asked.extend(refs)
        if asked == ["the planner", "the planner's node"]:
            raise ray.exceptions.OwnerDiedError(refs["the planner's node"].hex(), None, "")
        return answers(refs, timeout)

    monkeypatch.setattr(ray_loader, "_answers", once_lost)
    assert loader._batch_after(expected[0].state).schedule.digest == expected[1].schedule.digest
    assert asked == 2 * ["the planner", "the planner's node"]


def test_a_rank_that_comes_back_goes_on_after_what_it_acknowledged(make, expected):
    rank = 2
    reads = make.reads()
    loader = make(rank)
    first = loader.state_dict()
    stream = iter(loader)
    next(stream)
    # Given out, not done: a restart repeats it.
    assert loader.state_dict() == first
    second = next(stream)
    assert loader.state_dict() == expected[0].state
    loader.acknowledge(second)
    state = loader.state_dict()
    assert state == expected[1].state
    next(stream)
    stream.close()
    del loader, stream, second

    again = make(rank)
    again.load_state_dict(state)
    rest = list(again)
    assert [b.of.number for b in rest] == [b.number for b in expected[2:]]
    for found, batch in zip(rest, expected[2:], strict=True):
        check(found, batch, rank)
    assert make.reads() == reads  # the actors outlived it
    assert again.state_dict() == expected[-1].state and list(again) == []


def test_a_rank_fetches_only_its_slices(make, expected):
    for found, batch in zip(make(0), expected, strict=True):
        assert sorted(found.sequences) == batch.wanted_by(0).tolist()
        longest = int(batch.schedule.lengths.argmax())
        if (length := batch.schedule.lengths[longest]) == 400:
            whole = found.sequences[longest]
            assert len(whole) == length
            with pytest.raises(IndexError, match="tokens 100 to 101 are not this rank's"):
                whole[100:101]
            assert sum(len(tokens) for _, tokens in whole._held) < length / RANKS + 3
            return
    raise AssertionError("no batch has a long sequence")


def test_slices_look_like_the_sequence():
    whole = torch.arange(10)
    slices = Slices(10, [(0, whole[:4]), (6, whole[6:])])
    assert slices[1:4].tolist() == [1, 2, 3] and slices[7:12].tolist() == [7, 8, 9]
    assert slices[10:11].dtype == torch.int64 and not len(slices[10:11])
    with pytest.raises(IndexError, match="tokens 3 to 7"):
        slices[3:7]


def test_a_server_gives_slices_and_notices_another_dataset():
    server = Server(lambda shard, shards: [[1, 2, 3], [], [4, 5]], 1, 2)
    assert server.lengths().tolist() == [3, 0, 2]
    assert server.fetch(np.array([[2, 0, 1, 2], [0, 1, 3, 3]])).tolist() == [4, 2, 3]
    with pytest.raises(ValueError, match="sequence 2 of shard 1 has 2 tokens and had 7"):
        server.fetch(np.array([[2, 0, 1, 7]]))
    with pytest.raises(ValueError, match="sequence 3 of shard 1 has 0 tokens"):
        server.fetch(np.array([[3, 0, 1, 7]]))
    with pytest.raises(ValueError, match="shard 1 has float64 tokens"):
        Server(lambda shard, shards: [[1.5]], 1, 2)
    assert Server(lambda shard, shards: [], 0, 1).lengths().tolist() == []


class Broken:
    def __init__(self):
        raise OSError("no such disk")

    def lengths(self): ...

    def fetch(self, pieces): ...


class Asleep:
    def lengths(self):
        time.sleep(600)


def test_a_server_that_stays_away_is_named(make):
    loader = make(0)
    dead, late = (ray.remote(kind).options(num_cpus=0).remote() for kind in (Broken, Asleep))
    with pytest.raises(RuntimeError, match=r"(?s)server of shard 0 is dead.*no such disk"):
        Planner([dead], plan, {"tokens": 9}, timeout=60).start()
    with pytest.raises(TimeoutError, match=r"server of shard 1 has not answered for [\d.]+ s"):
        Planner([loader._servers[0], late], plan, {"tokens": 9}, timeout=0.5).start()
    ray.kill(late)
    loader._servers[1] = dead
    with pytest.raises(RuntimeError, match="server of shard 1 is dead"):
        list(loader)


def test_bad_input_is_named(make, monkeypatch):
    with pytest.raises(ValueError, match="shards is 0"):
        make(0, shards=0)
    with pytest.raises(ValueError, match="runs with tokens=300, not 7"):
        make(0, tokens=7)
    with pytest.raises(ValueError, match="runs with 2 shards, not 1"):
        make(0, shards=1)
    with pytest.raises(ValueError, match="rank is 3"):
        list(make(3))
    loader = make(0)
    loader.load_state_dict({"epoch": 0})
    with pytest.raises(ValueError, match="state has the keys"):  # of the planner's sampler
        list(loader)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"call ray\.init"):
        make(0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'gapless\[ray\]'"):
        make(0)
