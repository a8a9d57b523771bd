# SPDX-License-Identifier: Apache-2.0
"""What decides how each attention layer of a denoising transformer computes, and what it costs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gapless.ops.checks import check_shape, check_tensors, number
from gapless.ops.impl import Impl
from gapless.ops.varlen import varlen_attention
from gapless.plan.block_grid import BlockGrid

Result = TypeVar("Result")


class Statistic(NamedTuple):
    """What one layer did in one step.

    ``density`` and ``recall`` are means over heads; recall is NaN where it was not measured, density counts blocks.
    Seconds of a fused search are attention's; ``search_seconds`` has what came on top of it.
    """

    run: int  # of the pipeline, from 0
    layer: Hashable
    call: Hashable  # which of the transformer's calls in a step, such as "cond" and "uncond"
    step: int  # from 0
    kind: str
    density: float
    recall: float
    attention_seconds: float
    search_seconds: float


@dataclass(frozen=True)
class Visit:
    """One layer's attention in one step of one call, on packed tensors."""

    layer: Hashable
    step: int
    call: Hashable
    text: tuple[int, int]
    grid: BlockGrid
    scale: float | None

    @property
    def key(self) -> tuple[Hashable, Hashable]:
        return self.call, self.layer


class Clock:
    """Seconds between two places, on a GPU without waiting for it until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._seconds = 0.0
        self._device = device

    def time(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` and add its seconds."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self._device)
            begin.record(stream)
            result = function()
            end.record(stream)
            self._events += [begin, end]
            return result
        begun = time.perf_counter()
        result = function()
        self._seconds += time.perf_counter() - begun
        return result

    @property
    def seconds(self) -> float:
        for begin, end in zip(self._events[::2], self._events[1::2], strict=True):
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        self._events = []
        return self._seconds


@dataclass
class Record:
    """A :class:`Statistic` in the making; its tensors are read when somebody asks."""

    run: int
    visit: Visit
    attention: Clock
    search: Clock
    kind: str = "dense"
    density: Tensor | None = None  # [heads]; None is 1
    recall: Tensor | None = None  # [heads] or [heads, batch]
    fixed: Statistic | None = field(default=None, repr=False)

    def read(self) -> Statistic:
        if self.fixed is None:
            density = 1.0 if self.density is None else float(self.density.mean())
            recall = float("nan") if self.recall is None else float(self.recall.mean())
            visit = self.visit
            self.fixed = Statistic(
                self.run, visit.layer, visit.call, visit.step, self.kind, density, recall,
                self.attention.seconds, self.search.seconds,
            )  # fmt: skip
            self.density = self.recall = None
        return self.fixed


class Policy(ABC):
    """Attention of the layers of a denoising transformer, layer by layer and step by step; for inference.

    Attributes:
        block_q, block_k: tokens in a block.
        impl: implementation of every operator, see :func:`gapless.varlen_attention`.
    """

    def __init__(self, block: int | tuple[int, int] = 64, impl: Impl = "auto") -> None:
        self.block_q, self.block_k = (block, block) if isinstance(block, int) else block
        self.impl = impl
        self._records: list[Record] = []
        self._run = 0
        self._ended = False
        BlockGrid.make(0, block_q=self.block_q, block_k=self.block_k)  # says what is wrong with a block

    def attention(
        self,
        layer: Hashable,
        step: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        call: Hashable = "",
        text: tuple[int, int] = (0, 0),
        lengths_k: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of one layer in one step, as the policy has it.

        Args:
            layer: whatever tells layers apart.
            step: which denoising step, from 0.
            q: [batch, tokens_q, heads, dim].
            k: [batch, tokens_k, kv_heads, dim].
            v: [batch, tokens_k, kv_heads, dim_v].
            call: what tells several calls of the transformer in one step apart (classifier-free guidance).
            text: (begin, end) of the text's tokens.
            lengths_k: keys of each batch item that count, the first ones; None is all.
            scale: factor of the scores; None is ``dim ** -0.5``.

        Returns:
            [batch, tokens_q, heads, dim_v] in q's dtype.
        """
        check_tensors(q=q, k=k, v=v)
        if q.dim() != 4:
            raise ValueError(f"q has shape {list(q.shape)}: it has to be [batch, tokens, heads, dim]")
        batch, len_q, heads, dim = q.shape
        check_shape("k", k, (batch, "tokens_k", "kv_heads", dim))
        check_shape("v", v, (batch, k.shape[1], k.shape[2], "dim_v"))
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r:.80}: it has to be a whole number from 0")
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(
                f"{type(self).__name__} is for inference: call it under torch.no_grad() or detach q, k and v"
            )
        if self._ended:
            self._ended = False
            self._run += 1
            self._begin_run()
        lengths = check_lengths(lengths_k, batch, k.shape[1])
        grid = BlockGrid.make(
            [len_q] * batch, lengths, block_q=self.block_q, block_k=self.block_k, device=q.device
        )
        if scale is not None:
            scale = number("scale", scale)
        visit = Visit(layer, step, call, (int(text[0]), int(text[1])), grid, scale)
        record = Record(self._run, visit, Clock(q.device), Clock(q.device))
        out = self._attend(visit, record, q.flatten(0, 1), pack(k, lengths), pack(v, lengths))
        self._records.append(record)
        return out.view(batch, len_q, heads, v.shape[-1])

    @abstractmethod
    def _attend(self, visit: Visit, record: Record, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """On packed tensors [tokens, heads, dim]; says in ``record`` what it did."""

    def _begin_run(self) -> None:  # noqa: B027  (most policies have nothing to forget)
        """Forget what was found in an earlier run."""

    def _dense(self, visit: Visit, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = visit.grid
        return varlen_attention(
            q, k, v, grid.cu_seqlens_q, grid.cu_seqlens_k, scale=visit.scale, impl=self.impl
        )

    def end_run(self) -> None:
        """The pipeline is through: the next attention begins a new run. What was found stays readable until then."""
        self._ended = True

    def reset(self) -> None:
        """Forget everything, statistics too."""
        self._records = []
        self._run = 0
        self._ended = False
        self._begin_run()

    def statistics(self) -> list[Statistic]:
        """Everything since the last :meth:`reset`, in order. Waits for the device."""
        return [record.read() for record in self._records]

    def attached(self, transformer: torch.nn.Module, **options: Any) -> AbstractContextManager[Any]:
        """``with policy.attached(pipe.transformer): pipe(...)``: layers of a diffusers transformer compute by it.

        ``options`` are those of :func:`gapless.integrations.diffusers.attached`.
        """
        from gapless.integrations.diffusers import attached  # an optional package, above this layer

        return attached(transformer, self, **options)


class Dense(Policy):
    """Every layer in full: what the others are compared with."""

    def _attend(self, visit: Visit, record: Record, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return record.attention.time(lambda: self._dense(visit, q, k, v))


def check_lengths(lengths: Sequence[int] | None, batch: int, tokens: int) -> tuple[int, ...]:
    """Keys that count of each batch item."""
    if lengths is None:
        return (tokens,) * batch
    found = tuple(int(n) for n in lengths)
    if len(found) != batch:
        raise ValueError(f"lengths_k are {len(found)}: they have to be {batch}, one for each batch item")
    for i, n in enumerate(found):
        if not 0 <= n <= tokens:
            raise ValueError(f"lengths_k[{i}] is {n}: it has to be from 0 to {tokens}, the keys there are")
    return found


def pack(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[batch, tokens, heads, dim] to [sum of lengths, heads, dim]: the first tokens of each batch item."""
    batch, tokens = x.shape[:2]
    if all(n == tokens for n in lengths):
        return x.flatten(0, 1)
    if batch == 1:
        return x[0, : lengths[0]]
    return torch.cat([x[i, :n] for i, n in enumerate(lengths)])
