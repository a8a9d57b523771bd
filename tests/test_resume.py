# SPDX-License-Identifier: Apache-2.0
"""A run that loses a rank, or crashes while it saves, ends bitwise as one that was left alone."""

import hashlib
import os
import random
import signal
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from gapless.distributed.checkpoint import POINTER, Checkpoints
from gapless.distributed.current import attend
from gapless.distributed.hdp import HDP
from gapless.distributed.losses import from_sequences
from gapless.distributed.state_tree import Slot, join, split
from gapless.schedule import CostModel, Pack, Schedule, schedule_of
from gapless.testing.processes import Failure, run_processes, shared

RANKS, STEPS, EVERY = 4, 7, 2
COST = CostModel(cell=1e-9, token=1e-6, layers=2)
GROUP_TIMEOUT, PATIENCE = 60.0, 300.0  # seconds


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.head = nn.Linear(16, 20)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            q, k, v = layer(x).unflatten(1, (6, 8)).split(2, 1)
            x = x + nn.functional.dropout(attend(q, k, v, causal=True).flatten(1), 0.1)
        return self.head(x)


def loss_of(model: nn.Module, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["targets"], reduction="sum")


class Sampler:
    """Batches that depend on all that were drawn before."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.drawn = 0

    def draw(self, ranks: int) -> tuple[Schedule, list[torch.Tensor]]:
        self.drawn += 1
        lengths = torch.randint(1, 30, (2 * ranks,), generator=self.generator).tolist()
        sequences = [torch.randint(20, (n,), generator=self.generator) for n in lengths]
        packs = [Pack([0], list(range(ranks)), 0, 0.5)]
        packs += [Pack([i], [i % ranks], 1 + i // ranks) for i in range(1, 2 * ranks)]
        return schedule_of(lengths, packs, ranks=ranks, capacity=100, cost=COST), sequences

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state(), "drawn": self.drawn}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])
        self.drawn = state["drawn"]


def kill(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: str, optimizer: str, killed: tuple[str, int, int] | None = None
) -> tuple[str, list[float], int]:
    """Train from the last checkpoint, if there is one; ``killed`` is (where, rank, step).

    Returns a digest of the model and the optimizer, the losses of the steps made here, and the first of them.
    """
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    hdp = HDP(Model(), smallest=0)
    adam: torch.optim.Optimizer = (
        ZeroRedundancyOptimizer(hdp.parameters(), torch.optim.AdamW, lr=1e-2)
        if optimizer == "zero"
        else torch.optim.AdamW(hdp.parameters(), lr=1e-2)
    )
    sampler = Sampler()
    run = {"model": hdp.module, "optimizer": adam, "sampler": sampler}
    checkpoints = Checkpoints(folder, keep=2)
    saved = checkpoints.load(run)
    begin = saved.step if saved else 0
    losses = []
    for step in range(begin, STEPS):
        schedule, sequences = sampler.draw(ranks)
        if killed and killed[0] == "step" and killed[2] == step:
            linear = hdp.module.layers[1]
            linear.register_forward_hook(lambda *_: kill(killed[1]))  # the others wait for it in a ring
        losses.append(hdp.step(schedule, from_sequences(sequences), loss_of).item())
        adam.step()
        adam.zero_grad()
        hdp.module.steps += 1
        if (step + 1) % EVERY == 0:
            if killed and killed[0] == "save" and killed[2] == step:
                write = FileSystemWriter.write_data

                def write_and_die(*args, write=write):
                    write(*args).wait()
                    kill(killed[1])
                    return write(*args)

                FileSystemWriter.write_data = write_and_die
            checkpoints.save(step + 1, run, values={"digest": schedule.digest})
    if optimizer == "zero":
        adam.consolidate_state_dict(to=0)
    return digest_of(hdp.module, adam if optimizer == "whole" or rank == 0 else None), losses, begin


def digest_of(*sources) -> str:
    hashed = hashlib.sha256()
    for source in sources:
        if source is None:
            continue
        structure, tensors = split(source.state_dict(), "")
        hashed.update(repr(structure).encode())
        for key, tensor in sorted(tensors.items()):
            hashed.update(key.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize(
    "where, optimizer", [("step", "zero"), pytest.param("save", "whole", marks=pytest.mark.thorough)]
)
def test_a_run_that_loses_a_rank_ends_as_if_nothing_had_happened(tmp_path, where, optimizer):
    whole = shared(RANKS).run(train, str(tmp_path / "whole"), optimizer, timeout=PATIENCE)
    at = random.Random(where).choice(range(EVERY + 1, STEPS)) if where == "step" else 2 * EVERY - 1
    rank = random.Random(optimizer).randrange(RANKS)
    broken = run_processes(
        train, RANKS, str(tmp_path / "broken"), optimizer, (where, rank, at),
        check=False, timeout=PATIENCE, group_timeout=GROUP_TIMEOUT,
    )  # fmt: skip
    assert all(isinstance(told, Failure) for told in broken)
    assert [told.died for told in broken] == [r == rank for r in range(RANKS)]
    assert all("lost or late" in told.message for told in broken if not told.died)
    resumed = shared(RANKS).run(train, str(tmp_path / "broken"), optimizer, timeout=PATIENCE)
    last = at // EVERY * EVERY if where == "step" else at + 1 - EVERY
    assert [told[2] for told in resumed] == [last] * RANKS
    for told, wanted in zip(resumed, whole, strict=True):
        assert told[0] == wanted[0]
        assert told[1] == wanted[1][last:]


class Plain:
    """Some state."""

    def __init__(self, value) -> None:
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, state) -> None:
        self.value = state


def test_states_come_back_as_they_were(tmp_path):
    tensor = torch.randn(3, 4)
    state = {
        "tied": [tensor, tensor, tensor[1]],
        0: {"0": (torch.tensor(2.0), None, "text", 1.5, float("inf")), 1: torch.empty(0, 2)},
        "half": torch.ones(2, dtype=torch.bfloat16),
        "numpy": np.arange(3),
        "strided": torch.randn(4, 6).t()[::2],
    }
    checkpoints, linear = Checkpoints(tmp_path), nn.BatchNorm1d(3)
    np.random.seed(1), random.seed(2), torch.manual_seed(3)
    path = checkpoints.save(
        5, {"x": Plain(state), "m": linear}, own={"y": Plain([1])}, values={"digest": "ab"}
    )
    drawn = torch.rand(1), np.random.rand(), random.random()
    x, y, other = Plain(None), Plain(None), nn.BatchNorm1d(3)
    other.weight.data.fill_(7)
    saved = checkpoints.load({"x": x, "m": other}, own={"y": y})
    assert (saved.path, saved.step, saved.ranks, saved.values) == (path, 5, 1, {"digest": "ab"})
    assert (torch.rand(1), np.random.rand(), random.random()) == drawn
    assert y.value == [1]
    assert torch.equal(other.weight, linear.weight)
    assert list(x.value) == list(state)
    assert x.value[0]["0"][1:] == state[0]["0"][1:]
    assert isinstance(x.value[0]["0"], tuple)
    assert np.array_equal(x.value["numpy"], state["numpy"])
    for got, want in zip(tensors_of(x.value), tensors_of(state), strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype


def tensors_of(state) -> list[torch.Tensor]:
    structure, table = split(state, "")
    found = []

    def walk(value) -> None:
        if isinstance(value, Slot):
            found.append(table[value.key])
        elif isinstance(value, dict):
            list(map(walk, value.values()))
        elif isinstance(value, (list, tuple)):
            list(map(walk, value))

    walk(structure)
    return found


def test_module_state_keeps_its_versions():
    state = nn.BatchNorm1d(2).state_dict()
    again = join(*split(state, "m"))
    assert isinstance(again, OrderedDict)
    assert again._metadata == state._metadata


def test_the_newest_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.load({"x": Plain(None)}) is None
    for step in (1, 2, 10, 3):
        checkpoints.save(step, {"x": Plain(step)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [POINTER, "step-0000000003", "step-0000000010"]
    x = Plain(None)
    assert (
        checkpoints.load({"x": x}).step == x.value == 3
    )  # the last one saved, after a return to an earlier step
    again = checkpoints.save(3, {"x": Plain("again")})
    checkpoints.load({"x": x})
    assert x.value == "again"
    assert checkpoints.latest() == again


@pytest.mark.parametrize("crash", ["writing", "moving", "pointing"])
def test_a_crash_while_saving_leaves_the_one_before(tmp_path, monkeypatch, crash):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": Plain(torch.ones(3))})
    replace = os.replace
    moves = []

    def dying(source, target):
        moves.append(target)
        if len(moves) == {"moving": 1, "pointing": 2}[crash]:
            raise KeyboardInterrupt
        return replace(source, target)

    with monkeypatch.context() as patch:
        if crash == "writing":
            from torch.distributed.checkpoint import FileSystemWriter

            def stops(*args):
                raise KeyboardInterrupt

            patch.setattr(FileSystemWriter, "finish", stops)
        else:
            patch.setattr("gapless.distributed.checkpoint.os.replace", dying)
        with pytest.raises(BaseException):  # noqa: B017
            checkpoints.save(2, {"x": Plain(torch.zeros(3))})
    x = Plain(None)
    assert checkpoints.load({"x": x}).step == 1
    assert torch.equal(x.value, torch.ones(3))
    checkpoints.save(2, {"x": Plain(torch.zeros(3))})
    assert checkpoints.load({"x": x}).step == 2
    assert not x.value.any()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="step is -1"):
        checkpoints.save(-1, {})
    checkpoints.save(1, {"x": Plain(1)})
    with pytest.raises(ValueError, match=r"has no shared/y: it has .*shared/x"):
        checkpoints.load({"y": Plain(1)})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError):
        Checkpoints(blocked).save(1, {"x": Plain(1)})
