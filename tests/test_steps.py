# SPDX-License-Identifier: Apache-2.0
"""Which forward of a transformer is which call of which step."""

import weakref

import pytest
import torch

from gapless.integrations.steps import StepCounter


class Runs:
    def __init__(self) -> None:
        self.begun = 0

    def __call__(self) -> None:
        self.begun += 1


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_names_count_their_own_forwards(runs):
    counter = StepCounter(runs)
    timesteps = torch.tensor([900, 600, 300])
    found = [counter.count(name, None, t.expand(2)) for t in timesteps for name in ("cond", "uncond")]
    assert found == [(name, step) for step in range(3) for name in ("cond", "uncond")]
    counter.reset()
    assert counter.count("uncond", None, timesteps[0]) == ("uncond", 0)
    assert runs.begun == 0


def test_one_name_called_twice_in_a_step(runs):
    counter = StepCounter(runs)
    found = [counter.count("cond", None, t) for t in torch.tensor([9.0, 6.0]) for _ in range(2)]
    assert found == [("cond", 0), (("cond", 1), 0), ("cond", 1), (("cond", 1), 1)]


def test_names_need_no_timestep(runs):
    counter = StepCounter(runs)
    assert [counter.count("cond", None, None) for _ in range(3)] == [("cond", step) for step in range(3)]


def test_a_tensor_that_takes_the_place_of_another_is_a_new_one(runs):
    counter = StepCounter(runs)
    for step in range(5):
        t = torch.tensor([float(step)])
        assert counter.count("cond", None, t) == ("cond", step)
        held = weakref.ref(t)
        del t
        assert held() is not None  # its memory is not given to the next one
    t = torch.tensor([1.0])
    assert counter.count("cond", None, t) == ("cond", 5)
    t.fill_(2.0)
    assert counter.count("cond", None, t) == ("cond", 6)


def test_an_index_is_believed(runs):
    counter = StepCounter(runs)
    found = [counter.count(name, index, None) for index in (25, 26) for name in ("cond", "uncond", "uncond")]
    assert found == [
        ("cond", 25), ("uncond", 25), (("uncond", 1), 25), ("cond", 26), ("uncond", 26), (("uncond", 1), 26),
    ]  # fmt: skip
    assert runs.begun == 0
    assert counter.count("cond", 0, None) == ("cond", 0) and runs.begun == 1
    assert counter.count("uncond", 0, None) == ("uncond", 0) and runs.begun == 1


@pytest.mark.parametrize("kind", ["tensor", "number", "in place", "per token", "inference"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_timesteps_tell_steps_and_calls(runs, calls, kind):
    counter, held = StepCounter(runs), torch.zeros(2)

    def timestep(t: float):
        if kind == "number":
            return t
        if kind == "in place":
            return held.fill_(t)
        if kind == "per token":
            return torch.tensor([[0.0, 0.0, t]])
        with torch.inference_mode(kind == "inference"):
            return torch.full((2,), t)

    for run in range(3):
        found = [counter.count(None, None, timestep(t)) for t in (900.0, 600.0, 300.0) for _ in range(calls)]
        assert found == [(call, step) for step in range(3) for call in range(calls)]
        assert runs.begun == run


def test_timesteps_that_go_up(runs):
    counter = StepCounter(runs)
    for _ in range(2):
        found = [counter.count(None, None, t) for t in (0.0, 0.25, 0.5, 1.0)]
        assert found == [(0, step) for step in range(4)]
    assert runs.begun == 1


def test_a_given_number_of_calls(runs):
    counter = StepCounter(runs, calls_per_step=2)
    found = [counter.count(None, None, None) for _ in range(6)]
    assert found == [(call, step) for step in range(3) for call in range(2)]
    counter.reset()
    assert counter.count(None, None, None) == (0, 0)


def test_errors(runs):
    with pytest.raises(ValueError, match="calls_per_step is 0"):
        StepCounter(runs, 0)
    with pytest.raises(ValueError, match="timestep is None: give calls_per_step"):
        StepCounter(runs).count(None, None, None)
