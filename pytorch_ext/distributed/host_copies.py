# SPDX-License-Identifier: Apache-2.0
"""Copies between a device and its host: beside the computing on a GPU, plain ones elsewhere."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gapless.distributed.host_pool import Ready


class PlainCopies:
    """Copies that are over when the call returns."""

    def out(self, source: Tensor, host: Tensor, after: Ready) -> Ready:
        """Copy to the host, once ``after`` is over; returns what to wait for before ``host`` is used."""
        host.copy_(source)
        return None

    def back(self, host: Tensor, target: Tensor, after: Ready) -> Ready:
        """Copy from the host; the same."""
        target.copy_(host)
        return None

    def wait(self, ready: Ready) -> None:
        """Let what is computed next see a copy."""


class StreamCopies(PlainCopies):
    """Copies on two streams of their own, one each way, which the host never waits for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._down = torch.cuda.Stream(device)
        self._up = torch.cuda.Stream(device)

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor, after: Ready) -> Ready:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        # The allocator may not hand the device's side on before the copy is over.
        (source if source.is_cuda else target).record_stream(stream)
        return stream.record_event()

    def out(self, source: Tensor, host: Tensor, after: Ready) -> Ready:
        return self._copy(self._down, source, host, after)

    def back(self, host: Tensor, target: Tensor, after: Ready) -> Ready:
        return self._copy(self._up, host, target, after)

    def wait(self, ready: Ready) -> None:
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)


@cache
def copies_of(device: torch.device) -> PlainCopies:
    """The copies of a device; its streams are made once."""
    return StreamCopies(device) if device.type == "cuda" else PlainCopies()
