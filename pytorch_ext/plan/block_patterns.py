# SPDX-License-Identifier: Apache-2.0
"""Patterns of partial blocks: which key of a block each query of it sees, one bit each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gapless.plan.block_lists import on_host


def words(block_q: int) -> int:
    """int32 words that hold one bit for each query of a block."""
    return -(-block_q // 32)


def pack_bits(cells: Tensor) -> Tensor:
    """bool [..., n] to int32 [..., ceil(n / 32)]: bit ``i % 32`` of word ``i // 32`` is entry ``i``."""
    n = cells.shape[-1]
    padded = torch.nn.functional.pad(cells, (0, -n % 32))
    if on_host(cells):
        packed = np.packbits(padded.numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(packed.view("<i4").astype(np.int32, copy=False))
    bit = torch.ones(32, dtype=torch.int32, device=cells.device) << torch.arange(
        32, dtype=torch.int32, device=cells.device
    )
    grouped = padded.unflatten(-1, (-1, 32))
    return torch.where(grouped, bit, 0).sum(-1, dtype=torch.int32)  # bit 31 is the sign; sums do not carry


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """int32 [..., ceil(n / 32)] to bool [..., n]."""
    if on_host(packed):
        octets = np.ascontiguousarray(packed.numpy().astype("<i4", copy=False)).view(np.uint8)
        bits = np.unpackbits(octets, axis=-1, count=n, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    shift = torch.arange(32, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shift) & 1).flatten(-2)[..., :n].bool()


def to_patterns(cells: Tensor) -> Tensor:
    """bool [n, block_q, block_k] to patterns int32 [n, block_k, words(block_q)]."""
    return pack_bits(cells.transpose(1, 2).contiguous())


def to_cells(patterns: Tensor, block_q: int) -> Tensor:
    """Patterns int32 [n, block_k, words(block_q)] to bool [n, block_q, block_k]."""
    return unpack_bits(patterns, block_q).transpose(1, 2)


def distinct(patterns: Tensor) -> tuple[Tensor, Tensor | None]:
    """Each pattern once, in the order of first use, and which one each was: int32 [n].

    Tensors of other devices than the CPU come back as they are, with None: to know how many differ would be to wait.
    """
    n = patterns.shape[0]
    if not on_host(patterns):
        return patterns, None
    if n == 0:
        return patterns, torch.zeros(0, dtype=torch.int32)
    rows = np.ascontiguousarray(patterns.numpy()).reshape(n, -1)
    keys = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(n)
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(first.shape[0])
    used = torch.from_numpy(np.sort(first))
    return patterns[used], torch.from_numpy(rank[which.reshape(-1)].astype(np.int32))
