# SPDX-License-Identifier: Apache-2.0
"""Tokens that change rank between attention and linear modules: Zeppelin's remapping (arXiv:2509.21841, section 4)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gapless.distributed.peers import ROWS, Exchange, Message, tag_of
from gapless.schedule.schedule import Schedule


@dataclass(frozen=True)
class Moves:
    """What one rank gives and takes in one step.

    Attributes:
        rank, step: whose, and when.
        tokens: that it has under attention.
        given: (rank, tokens), from the end of its micro-batch backwards.
        taken: (rank, tokens), appended in this order. A rank does not do both.
    """

    rank: int
    step: int
    tokens: int
    given: tuple[tuple[int, int], ...]
    taken: tuple[tuple[int, int], ...]

    @staticmethod
    def of(schedule: Schedule, step: int, rank: int) -> Moves:
        """From the rows of ``schedule.moves``; made once for each schedule, step and rank."""
        made = _moves.setdefault(schedule, {})
        if (step, rank) not in made:
            rows = [(int(s), int(t), int(n)) for at, s, t, n in schedule.moves if at == step]
            held = sum(b.tokens for b in schedule.micro_batches(rank) if b.step == step)
            made[step, rank] = Moves(
                rank,
                step,
                held,
                tuple((target, n) for source, target, n in rows if source == rank),
                tuple((source, n) for source, target, n in rows if target == rank),
            )
        return made[step, rank]

    @property
    def kept(self) -> int:
        """Tokens that stay."""
        return self.tokens - sum(n for _, n in self.given)

    @property
    def linear_tokens(self) -> int:
        """Tokens that the rank has in linear modules."""
        return self.kept + sum(n for _, n in self.taken)


_moves: weakref.WeakKeyDictionary[Schedule, dict[tuple[int, int], Moves]] = weakref.WeakKeyDictionary()


def to_linear(x: Tensor, schedule: Schedule, step: int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Move rows from where attention left them to where linear modules want them.

    Every rank that gives or takes in ``step`` has to call it, also one that has no micro-batch there; trailing sizes
    and dtype have to be the same on all.

    Args:
        x: [tokens, ...], this rank's rows in the order of its micro-batch's pieces.
        schedule: the same on all ranks.
        step: micro-step of the schedule.
        group: whose ranks the schedule numbers; None is the default group.

    Returns:
        [tokens after the moves, ...]: a giver's first rows, a taker's own rows followed by the taken ones. The
        gradient goes the other way, by :func:`to_attention`.

    Raises:
        ValueError: ``x`` has not as many rows as the rank has tokens.
        PeerError: another rank is lost or late.
    """
    moves = _checked(x, schedule, step, group)
    _check_rows(x, moves.tokens, moves, "under attention")
    return _ToLinear.apply(x, moves, group) if moves.given or moves.taken else x


def to_attention(
    x: Tensor, schedule: Schedule, step: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Move rows back: the inverse of :func:`to_linear`, and its adjoint."""
    moves = _checked(x, schedule, step, group)
    _check_rows(x, moves.linear_tokens, moves, "in linear modules")
    return _ToAttention.apply(x, moves, group) if moves.given or moves.taken else x


def _checked(x: Tensor, schedule: Schedule, step: int, group: dist.ProcessGroup | None) -> Moves:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is of type {type(schedule).__name__}: it has to be a Schedule")
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"x is {x!r:.80}: it has to be a tensor [tokens, ...]")
    if not len(schedule.moves):
        rank = dist.get_rank(group) if dist.is_initialized() else 0
    else:
        rank = dist.get_rank(group)
    return Moves.of(schedule, step, rank)


def _check_rows(x: Tensor, rows: int, moves: Moves, where: str) -> None:
    if x.shape[0] != rows:
        raise ValueError(
            f"x has {x.shape[0]} rows: rank {moves.rank} has {rows} tokens {where} in step {moves.step}"
        )


class _ToLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, moves, group):
        ctx.moves, ctx.group = moves, group
        return _give(x, moves, group)

    @staticmethod
    def backward(ctx, gradient):
        return _ToAttention.apply(gradient, ctx.moves, ctx.group), None, None


class _ToAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, moves, group):
        ctx.moves, ctx.group = moves, group
        return _return(x, moves, group)

    @staticmethod
    def backward(ctx, gradient):
        return _ToLinear.apply(gradient, ctx.moves, ctx.group), None, None


def _give(x: Tensor, moves: Moves, group: dist.ProcessGroup | None) -> Tensor:
    """A giver sends its last rows; a taker appends."""
    result = x.new_empty(moves.linear_tokens, *x.shape[1:])
    exchange = Exchange(
        _messages(x.contiguous(), moves.tokens, moves.given, -1),
        _messages(result, moves.tokens, moves.taken, 1),
        group,
        f"rank {moves.rank}, step {moves.step}, moving rows to linear modules",
    )
    kept = min(moves.tokens, moves.linear_tokens)
    result[:kept] = x[:kept]
    exchange.finish()
    return result


def _return(x: Tensor, moves: Moves, group: dist.ProcessGroup | None) -> Tensor:
    """A taker sends back what it took; a giver has its last rows again."""
    result = x.new_empty(moves.tokens, *x.shape[1:])
    exchange = Exchange(
        _messages(x.contiguous(), moves.tokens, moves.taken, 1),
        _messages(result, moves.tokens, moves.given, -1),
        group,
        f"rank {moves.rank}, step {moves.step}, moving rows back to attention",
    )
    kept = min(moves.tokens, moves.linear_tokens)
    result[:kept] = x[:kept]
    exchange.finish()
    return result


def _messages(x: Tensor, row: int, moved: tuple[tuple[int, int], ...], side: int) -> list[Message]:
    """Rows of ``x`` on one side of ``row``, one message for each move: upwards, or from there backwards."""
    messages = []
    for peer, count in moved:
        begin = row if side > 0 else row - count
        messages.append(Message(x[begin : begin + count], peer, tag_of(0, ROWS)))
        row += side * count
    return messages
