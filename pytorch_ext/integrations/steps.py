# SPDX-License-Identifier: Apache-2.0
"""Which denoising step a transformer's forward belongs to, and which of the step's calls it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class StepCounter:
    """Counts steps from 0, and tells the several calls of one step apart (classifier-free guidance).

    By what the caller says:

    - A name for the call ("cond", "uncond"), as diffusers' pipelines do with ``cache_context``: each name counts its
      own forwards. Pipelines that give the step's index too are believed. Forwards of one name with the same tensor for
      a timestep, or with the same index, are several calls of one step. Nothing is read from a device.
    - Else the timestep: forwards with the same timestep are calls 0, 1, .. of one step, another is the next step, and a
      turn of direction begins a new run. A timestep on a device is read, which waits for the device, unless it is the
      very tensor of the forward before.
    - ``calls_per_step`` needs no timestep and reads nothing, but cannot tell when a new run begins.

    Args:
        new_run: called when a run begins that nobody announced with :meth:`reset`.
        calls_per_step: forwards of each step; None finds out.
    """

    def __init__(self, new_run: Callable[[], None], calls_per_step: int | None = None) -> None:
        if calls_per_step is not None and (not isinstance(calls_per_step, int) or calls_per_step < 1):
            raise ValueError(
                f"calls_per_step is {calls_per_step!r:.80}: it has to be a whole number from 1, or None"
            )
        self._new_run = new_run
        self._calls_per_step = calls_per_step
        self.reset()

    def reset(self) -> None:
        """The next forward is the first of a run."""
        self._streams: dict[str | None, _Stream] = {}

    def count(self, name: str | None, index: int | None, timestep: Any) -> tuple[Hashable, int]:
        """The next forward's (call, step).

        Args:
            name: of the call, or None.
            index: of the step, from 0, or None.
            timestep: of the forward, a number or a tensor, or None.
        """
        stream = self._streams.setdefault(name, _Stream())
        if index is not None:
            if index < stream.step:
                stream = self._begin(name)
            stream.forward(new=index != stream.step)
            stream.step = index
        elif self._calls_per_step is not None:
            stream.forward(new=stream.call + 1 in (0, self._calls_per_step))
        elif name is not None:
            stream.forward(new=not stream.same_tensor(timestep))
        elif timestep is None:
            raise ValueError(
                "timestep is None: give calls_per_step where the transformer is called without a timestep"
            )
        elif stream.same_tensor(timestep) and timestep.device.type != "cpu":
            stream.forward(new=False)
        else:
            value = torch.as_tensor(timestep).detach().to("cpu", torch.float64, copy=True)
            if stream.turns(value):
                stream = self._begin(name)
                stream.same_tensor(timestep)
            stream.forward(new=stream.value is None or not torch.equal(stream.value, value))
            stream.value = value
        if name is None:
            return stream.call, stream.step
        return (name if stream.call == 0 else (name, stream.call)), stream.step

    def _begin(self, name: str | None) -> _Stream:
        self.reset()
        self._new_run()
        return self._streams.setdefault(name, _Stream())


class _Stream:
    """Forwards of one name."""

    def __init__(self) -> None:
        self.step = -1
        self.call = -1
        self.value: Tensor | None = None
        self._held: Any = None  # the last timestep, so that no other takes its place in memory
        self._place: tuple | None = None
        self._up: bool | None = None

    def forward(self, new: bool) -> None:
        self.call = 0 if new else self.call + 1
        self.step += new

    def same_tensor(self, timestep: Any) -> bool:
        """``timestep`` is the tensor that it was last time, or a view of the same entries, unchanged."""
        place = None
        if isinstance(timestep, Tensor) and not timestep.is_inference():  # which would not show changes
            place = timestep.data_ptr(), timestep.dtype, timestep._version
        last, self._place, self._held = self._place, place, timestep
        return place is not None and place == last

    def turns(self, value: Tensor) -> bool:
        """The direction of timesteps is another than before."""
        if self.value is None:
            return False
        change = float(value.max() - self.value.max())
        if change == 0:
            return False
        before, self._up = self._up, change > 0
        return before is not None and before != self._up
