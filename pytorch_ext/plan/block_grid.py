# SPDX-License-Identifier: Apache-2.0
"""The blocks of a packed batch: how many each sequence has, and where they are. Pure geometry, known on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gapless.plan.varlen import _host

BLOCK_SIZES = (16, 32, 64, 128, 256)
INT32_MAX = 2**31 - 1

Lengths = int | Sequence[int] | Tensor
T = TypeVar("T")


def once(method: Callable[[Any], T]) -> T:
    """A property that is worked out once and kept in the object's ``made``.

    In place of functools.cached_property, whose lock Dynamo does not trace (before Python 3.12).
    """
    name = method.__name__

    def get(self: Any) -> T:
        if name not in self.made:
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                # What is kept has to serve training too.
                with torch.inference_mode(False):
                    self.made[name] = method(self)
            else:
                self.made[name] = method(self)
        return self.made[name]

    get.__doc__ = method.__doc__
    return cast(T, property(get))


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """Sequences cut into query blocks and key blocks; both restart at each sequence and may end in a short block.

    A *packed* tensor of blocks is [heads, q_blocks, max_k_blocks]: the query blocks of all sequences one after
    another, each with its sequence's key blocks, then nothing. With one sequence that is [heads, q_blocks, k_blocks].

    Attributes:
        block_q, block_k: tokens in a block.
        lengths_q, lengths_k: tokens of each sequence.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], the first token of each sequence, then the number of all.
        query_table: int32 [7, q_blocks], what is known of each query block; properties name its rows.
        key_table: int32 [3, k_blocks], of each key block: its sequence's first query block, their number, and which of
            the sequence's key blocks it is.
        made: what has been worked out so far.
    """

    block_q: int
    block_k: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    query_table: Tensor
    key_table: Tensor
    made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def make(
        lengths_q: Lengths,
        lengths_k: Lengths | None = None,
        *,
        block_q: int,
        block_k: int,
        device: torch.device | str = "cpu",
    ) -> BlockGrid:
        """Check lengths and block sizes; the same arguments give the same object as long as it is remembered.

        Args:
            lengths_q: tokens of the sequence, or of each sequence; a tensor of a device is waited for.
            lengths_k: the same for keys; None means the queries'.
            block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.
            device: of the tensors.

        Raises:
            ValueError: a length below 0, another number of them for keys, more than 2**31 - 1 tokens, another block.
        """
        _check_block("block_q", block_q)
        _check_block("block_k", block_k)
        found_q = _lengths("lengths_q", lengths_q)
        found_k = found_q if lengths_k is None else _lengths("lengths_k", lengths_k)
        if len(found_q) != len(found_k):
            raise ValueError(
                f"lengths_k are {len(found_k)}, lengths_q are {len(found_q)}: both need one for each sequence"
            )
        return _grid(found_q, found_k, block_q, block_k, torch.device(device))

    def to(self, device: torch.device | str) -> BlockGrid:
        """The same blocks with their tensors on ``device``."""
        return _grid(self.lengths_q, self.lengths_k, self.block_q, self.block_k, torch.device(device))

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens_q.device

    @property
    def batch(self) -> int:
        return len(self.lengths_q)

    @once
    def counts_q(self) -> tuple[int, ...]:
        """Query blocks of each sequence."""
        return tuple(-(-n // self.block_q) for n in self.lengths_q)

    @once
    def counts_k(self) -> tuple[int, ...]:
        """Key blocks of each sequence."""
        return tuple(-(-n // self.block_k) for n in self.lengths_k)

    @once
    def q_blocks(self) -> int:
        return sum(self.counts_q)

    @once
    def k_blocks(self) -> int:
        return sum(self.counts_k)

    @once
    def max_q_blocks(self) -> int:
        return max(self.counts_q, default=0)

    @once
    def max_k_blocks(self) -> int:
        return max(self.counts_k, default=0)

    @once
    def blocks(self) -> int:
        """Pairs of a query block and a key block of one sequence."""
        return sum(q * k for q, k in zip(self.counts_q, self.counts_k, strict=True))

    @once
    def cu_blocks_q(self) -> Tensor:
        """int32 [batch + 1], first query block of each sequence, then the number of all."""
        return _int32([0, *accumulate(self.counts_q)], self.device)

    @once
    def cu_blocks_k(self) -> Tensor:
        """int32 [batch + 1], the same for keys."""
        return _int32([0, *accumulate(self.counts_k)], self.device)

    @property
    def sequence_of_row(self) -> Tensor:
        """int32 [q_blocks], the sequence of each query block."""
        return self.query_table[0]

    @property
    def block_of_row(self) -> Tensor:
        """int32 [q_blocks], each query block counted from its sequence's first."""
        return self.query_table[1]

    @property
    def k_blocks_of_row(self) -> Tensor:
        """int32 [q_blocks], key blocks of the sequence of each query block."""
        return self.query_table[2]

    def key_end(self, causal: bool) -> Tensor:
        """int32 [q_blocks]: keys from here on are seen by no query of the block, for want of them or by ``causal``."""
        return self.query_table[4 if causal else 3]

    @property
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """int32 [q_blocks] each: the key blocks of the positions of a query block's first and last query.

        Queries sit at the keys' end: query ``i`` at key ``i + len_k - len_q``, which may lie before the first key.
        """
        return self.query_table[5], self.query_table[6]

    @once
    def inside(self) -> Tensor | None:
        """bool [q_blocks, max_k_blocks]: the block is one of the sequence's. None: all are."""
        if len(set(self.counts_k)) <= 1:
            return None
        return torch.arange(self.max_k_blocks, device=self.device) < self.k_blocks_of_row[:, None]

    @once
    def transposition(self) -> Tensor | None:
        """int64 [k_blocks, max_q_blocks]: where in [q_blocks * max_k_blocks] the transposed tensor finds its blocks.

        Places that are no block point at ``q_blocks * max_k_blocks``. None: one sequence, plain transposition.
        """
        if self.batch == 1:
            return None
        first, blocks, block = (row[:, None].long() for row in self.key_table)
        query = torch.arange(self.max_q_blocks, device=self.device)
        outside = self.q_blocks * self.max_k_blocks
        return torch.where(query < blocks, (first + query) * self.max_k_blocks + block, outside)

    def transpose(self, packed: Tensor) -> Tensor:
        """[heads, q_blocks, max_k_blocks] to [heads, k_blocks, max_q_blocks]; zero (False) where no block is."""
        index = self.transposition
        if index is None:
            return packed.transpose(1, 2).contiguous()
        flat = torch.cat([packed.flatten(1), packed.new_zeros(packed.shape[0], 1)], dim=1)
        return flat[:, index]

    def split(self, packed: Tensor) -> list[Tensor]:
        """[heads, q_blocks, max_k_blocks] as one view [heads, q_blocks, k_blocks] for each sequence."""
        parts = packed.split(list(self.counts_q), dim=1)
        return [part[..., :n] for part, n in zip(parts, self.counts_k, strict=True)]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`split` undoes; zero (False) beyond a sequence's key blocks."""
        if len(parts) == 1:
            return parts[0]
        padded = [torch.nn.functional.pad(p, (0, self.max_k_blocks - p.shape[-1])) for p in parts]
        return torch.cat(padded, dim=1)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept has to serve training too
def _grid(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], block_q: int, block_k: int, device: torch.device
) -> BlockGrid:
    # All at once and beforehand: a compiler traces what works on tables, not what makes them.
    cu_seqlens = [_int32([0, *accumulate(n)], device) for n in (lengths_q, lengths_k)]
    blocks_q = np.asarray([-(-n // block_q) for n in lengths_q], dtype=np.int64)
    blocks_k = np.asarray([-(-n // block_k) for n in lengths_k], dtype=np.int64)
    len_q, len_k = (np.repeat(np.asarray(n, dtype=np.int64), blocks_q) for n in (lengths_q, lengths_k))
    block = _within(blocks_q)
    first, shift = block * block_q, len_k - len_q
    last = np.minimum(first + block_q, len_q) - 1
    queries = [
        np.repeat(np.arange(len(lengths_q)), blocks_q),
        block,
        np.repeat(blocks_k, blocks_q),
        len_k,
        np.maximum(last + 1 + shift, 0),
        (first + shift) // block_k,
        (last + shift) // block_k,
    ]
    before = np.cumsum(blocks_q) - blocks_q
    keys = [np.repeat(before, blocks_k), np.repeat(blocks_q, blocks_k), _within(blocks_k)]
    tables = [_int32(np.stack(rows), device) for rows in (queries, keys)]
    return BlockGrid(block_q, block_k, lengths_q, lengths_k, *cu_seqlens, *tables)


def _int32(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    # By way of the host: tensor(device=...) would wait for the device.
    return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(device, non_blocking=True)


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _check_block(name: str, block: int) -> None:
    if isinstance(block, bool) or block not in BLOCK_SIZES:
        raise ValueError(f"{name} is {block!r:.80}: it has to be one of {', '.join(map(str, BLOCK_SIZES))}")


def _lengths(name: str, lengths: Lengths) -> tuple[int, ...]:
    if isinstance(lengths, (Tensor, np.ndarray)):
        lengths = lengths.reshape(-1).tolist()
    elif hasattr(lengths, "__index__"):
        lengths = [lengths.__index__()]
    try:
        found = tuple(n.__index__() for n in lengths)
    except (AttributeError, TypeError):
        raise TypeError(
            f"{name} is {lengths!r:.80}: it has to be a whole number, or one for each sequence"
        ) from None
    for i, n in enumerate(found):
        if n < 0:
            raise ValueError(f"{name}[{i}] is {n}: it has to be 0 or more")
    if sum(found) > INT32_MAX:
        raise ValueError(f"{name} add up to {sum(found)} tokens: at most {INT32_MAX} are possible")
    return found


_known_lengths = WeakTensorKeyDictionary()  # cu_seqlens -> (version, lengths)


def lengths_of(cu_seqlens: Tensor, name: str = "cu_seqlens") -> tuple[int, ...]:
    """Lengths of the sequences; those of a tensor on a device are waited for once, then remembered.

    Args:
        cu_seqlens: int32 or int64 [batch + 1], starting at 0, never decreasing.
        name: what to call it in messages.
    """
    if cu_seqlens.is_inference():  # counts no versions
        return _differences(cu_seqlens, name)
    known = _known_lengths.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _known_lengths[cu_seqlens] = (cu_seqlens._version, _differences(cu_seqlens, name))
    return known[1]


def _differences(cu_seqlens: Tensor, name: str) -> tuple[int, ...]:
    return tuple(_host(cu_seqlens, name, None).diff().tolist())
