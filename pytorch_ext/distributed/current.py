# SPDX-License-Identifier: Apache-2.0
"""The micro-batch that this rank computes at the moment: what attention inside a model asks for.

It belongs to the process, not to a thread or a context: a process is one rank and computes one micro-batch at a time,
and on a GPU the backward pass, with what it recomputes, runs on threads that autograd made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gapless.distributed.attention import varlen_attention
from gapless.distributed.remap import to_attention, to_linear
from gapless.distributed.rows import Rows, rows_of
from gapless.schedule.schedule import Schedule
from gapless.schedule.shards import MicroBatch


@dataclass(frozen=True, eq=False)
class Running:
    """A micro-batch that is computed.

    Attributes:
        micro_batch: of this rank.
        group: whose ranks the schedule numbers; None is the default group.
        schedule: where tokens change rank around attention; None: they do not.
    """

    micro_batch: MicroBatch
    group: dist.ProcessGroup | None = None
    schedule: Schedule | None = None

    @cached_property
    def rows(self) -> Rows:
        """The tokens that this rank's linear modules compute: what the model is fed with."""
        if self.schedule is None:
            return Rows(self.micro_batch.rank, self.micro_batch.step, self.micro_batch.pieces)
        return rows_of(self.schedule, self.micro_batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention in the order of :attr:`rows`, over all ranks of each sequence.

        A rank without tokens may give one row of padding, since many modules take no empty input: its result is 0.

        Args:
            q: [tokens, heads, dim]; k [tokens, kv_heads, dim]; v [tokens, kv_heads, dim_v].
            options: of :func:`gapless.distributed.varlen_attention`, without ``group`` and ``return_lse``.

        Returns:
            [tokens, heads, dim_v].
        """
        tokens, given = self.rows.tokens, q.shape[0]
        if given != tokens and (tokens, given) != (0, 1):
            raise ValueError(
                f"q has {given} tokens: rank {self.micro_batch.rank} has {tokens} in step {self.micro_batch.step}; "
                "give the model exactly the micro-batch's tokens, without padding"
            )
        out = self._attend(q[:tokens], k[:tokens], v[:tokens], options)
        return out if given == tokens else torch.cat([out, out.new_zeros(1, *out.shape[1:])])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        if self.schedule is None or not len(self.schedule.moves):
            return varlen_attention(q, k, v, self.micro_batch, group=self.group, **options)
        where = (self.schedule, self.micro_batch.step)
        sizes = [x[0].numel() if len(x) else x.shape[1] * x.shape[2] for x in (q, k, v)]
        moved = to_attention(torch.cat([x.flatten(1) for x in (q, k, v)], 1), *where, group=self.group)
        q, k, v = (
            part.unflatten(1, x.shape[1:]) for part, x in zip(moved.split(sizes, 1), (q, k, v), strict=True)
        )
        out = varlen_attention(q, k, v, self.micro_batch, group=self.group, **options)
        return to_linear(out, *where, group=self.group)


_running: Running | None = None


def current() -> Running | None:
    """What runs, if anything does."""
    return _running


@contextmanager
def run(running: Running) -> Iterator[Running]:
    """Context in which ``running`` is what attention asks for."""
    global _running
    if _running is not None:
        raise RuntimeError(
            f"the micro-batch of step {_running.micro_batch.step} runs already: a rank computes one at a time"
        )
    _running = running
    try:
        yield running
    finally:
        _running = None


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of the micro-batch that runs: for modules inside ``hdp.micro_batch(..)`` or ``hdp.step(..)``.

    Args:
        q: [tokens, heads, dim], the tokens that the model was given; k [tokens, kv_heads, dim];
            v [tokens, kv_heads, dim_v].
        options: causal, window, softcap, scale, alibi_slopes, sinks, impl: as for :func:`gapless.varlen_attention`.

    Returns:
        [tokens, heads, dim_v] in q's dtype.

    Raises:
        RuntimeError: no micro-batch runs.
    """
    if _running is None:
        raise RuntimeError("no micro-batch runs: call the model inside `with hdp.micro_batch(micro_batch):`")
    return _running.attend(q, k, v, **options)


def running_steps(schedule: Schedule, rank: int, group: dist.ProcessGroup | None = None) -> list[Running]:
    """All that ``rank`` takes part in, step by step: its micro-batches, and steps in which it only takes tokens."""
    steps = {mb.step: mb for mb in schedule.micro_batches(rank)}
    for step, source, target, _ in schedule.moves.tolist():
        if rank in (source, target) and step not in steps:
            steps[step] = schedule.micro_batch(rank, step)
    moving = schedule if len(schedule.moves) else None
    return [Running(steps[step], group, moving) for step in sorted(steps)]
