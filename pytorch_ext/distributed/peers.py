# SPDX-License-Identifier: Apache-2.0
"""Messages between two ranks of the one process group, and what is said when one does not come.

Every rank posts its exchanges in one order that all ranks share (steps, then layers, then rounds, then rings), and each
exchange needs only such of its peers as come no later in that order. So no rank can wait for one that waits for it,
on gloo, whose messages are independent, and on NCCL, which runs the batches of a rank one after another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

MOST_TAGS = 2**31
KEYS, OUTER, GRADIENTS, HOME, ROWS = KINDS = range(5)  # what a message holds


class PeerError(RuntimeError):
    """A peer did not send what this rank waits for, or did not take what it was sent."""


@dataclass
class Traffic:
    """What this process has sent to its peers so far, and how long it has waited for them.

    Attributes:
        bytes, messages: that were sent.
        waited: seconds in which nothing was done but waiting for a message.
    """

    bytes: int = 0
    messages: int = 0
    waited: float = 0.0


traffic = Traffic()


class Message(NamedTuple):
    """Rows for a rank of the group, or room for rows from it; neither is sent if there are none."""

    rows: Tensor  # contiguous
    peer: int
    tag: int


def tag_of(number: int, kind: int) -> int:
    """A tag by what is sent. Equal tags are no harm: messages of a pair with one tag arrive in their order."""
    return (len(KINDS) * number + kind) % MOST_TAGS


class Exchange:
    """Messages posted together, under way until waited for.

    Args:
        sends: nobody may change their rows before :meth:`finish`.
        receives: their rows are there after :meth:`receive`.
        group: None is the default group.
        about: what they are part of, for messages of errors.
    """

    def __init__(
        self,
        sends: Sequence[Message],
        receives: Sequence[Message],
        group: dist.ProcessGroup | None,
        about: str,
    ) -> None:
        self._about = about
        self._receives = [m for m in receives if m.rows.numel()]
        self._sends = [m for m in sends if m.rows.numel()]
        self._arrivals: list[tuple[dist.Work, str]] = []
        self._departures: list[tuple[dist.Work, str]] = []
        operations = [
            dist.P2POp(call, m.rows, group=group, tag=m.tag, group_peer=m.peer)
            for call, some in ((dist.irecv, self._receives), (dist.isend, self._sends))
            for m in some
        ]
        if not operations:
            return
        traffic.messages += len(self._sends)
        traffic.bytes += sum(m.rows.nbytes for m in self._sends)
        waits = [f"waited for rank {m.peer}" for m in self._receives]
        waits += [f"sent to rank {m.peer}" for m in self._sends]
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._lost(" and ".join(waits), error) from error
        if len(works) != len(operations):  # NCCL: one for all
            self._arrivals = [(work, " and ".join(waits)) for work in works]
        else:
            named, first = list(zip(works, waits, strict=True)), len(self._receives)
            self._arrivals, self._departures = named[:first], named[first:]

    def receive(self) -> None:
        """Wait for what was to come."""
        self._wait(self._arrivals)

    def finish(self) -> None:
        """Wait for all messages."""
        self._wait(self._arrivals)
        self._wait(self._departures)
        self._sends = self._receives = []

    def _wait(self, works: list[tuple[dist.Work, str]]) -> None:
        begin = time.perf_counter()
        while works:
            work, what = works[0]
            try:
                work.wait()
            except RuntimeError as error:
                raise self._lost(what, error) from error
            works.pop(0)
        traffic.waited += time.perf_counter() - begin

    def _lost(self, what: str, error: RuntimeError) -> PeerError:
        return PeerError(f"{self._about}: {what}, which is lost or late; see its log. {error}")
