# SPDX-License-Identifier: Apache-2.0
"""Host memory that is kept and used again: pinned allocations are slow, and every step needs the same sizes."""

from __future__ import annotations

from collections import defaultdict, deque
from functools import cache

import torch
from torch import Tensor

Ready = torch.cuda.Event | None  # what has to be over before a buffer's bytes may be touched; None: nothing


def size_class(size: int) -> int:
    """The next of 1, 1.25, 1.5, 1.75 times a power of two, at least 4096: a fifth is wasted at most."""
    quarter = max(1 << max(size - 1, 0).bit_length() >> 3, 1024)
    return max(-(-size // quarter) * quarter, 4096)


class HostPool:
    """Buffers of host bytes by size class.

    Nothing here locks: a buffer may come back from a destructor at any moment, and a deque's ends are atomic.

    Args:
        pinned: page-locked memory, which a GPU copies to and from on its own streams.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._free: defaultdict[int, deque[tuple[Tensor, Ready]]] = defaultdict(deque)
        self.allocated = 0  # bytes in all buffers, given out or not

    def take(self, size: int) -> tuple[Tensor, Ready]:
        """uint8 [size class of ``size``], and what has to be over before it is written."""
        capacity = size_class(size)
        try:
            return self._free[capacity].pop()
        except IndexError:
            self.allocated += capacity
            return torch.empty(capacity, dtype=torch.uint8, pin_memory=self.pinned), None

    def give(self, buffer: Tensor, ready: Ready = None) -> None:
        """Take a buffer back; ``ready`` is the last copy from or to it."""
        self._free[buffer.numel()].append((buffer, ready))

    @property
    def in_use(self) -> int:
        """Bytes given out and not given back."""
        return self.allocated - sum(size * len(free) for size, free in tuple(self._free.items()))

    def clear(self) -> None:
        """Hand the free buffers back to the system."""
        self.allocated = self.in_use
        self._free.clear()


@cache
def shared_pool(device_type: str) -> HostPool:
    """The pool of a process for one kind of device."""
    return HostPool(pinned=device_type == "cuda")
