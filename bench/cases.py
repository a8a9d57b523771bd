# SPDX-License-Identifier: Apache-2.0
"""Workloads as data: which sequences there are, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gapless.bench import corpus

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DIRECTIONS = ("fwd", "fwd_bwd")
PAGE = 128  # keys in a page of a paged workload

Lengths = tuple[tuple[int, int], ...]  # (queries, keys) of each sequence


@dataclass(frozen=True)
class Case:
    """One workload under one setting.

    Attributes:
        name: how reports call it.
        lengths: (queries, keys) of each sequence.
        paged: keys and values come in pages of ``PAGE`` rows, in shuffled order.
    """

    name: str
    lengths: Lengths
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64
    dtype: str = "float32"
    causal: bool = True
    direction: str = "fwd"
    paged: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: it has to be one of {', '.join(DTYPES)}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}: it has to be one of {', '.join(DIRECTIONS)}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}, kv_heads {self.kv_heads}: the first has to be a multiple"
            )
        if not 1 <= self.dim <= 256:
            raise ValueError(f"dim is {self.dim}: it has to be from 1 to 256")

    @property
    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        dtype = self.dtype.replace("float", "fp").replace("bfp", "bf")
        return f"{self.name} h{self.heads}/{self.kv_heads} d{self.dim} {dtype} {mask} {self.direction}"

    @property
    def self_attention(self) -> bool:
        return all(q == k for q, k in self.lengths)

    @property
    def tokens_q(self) -> int:
        return sum(q for q, _ in self.lengths)

    @property
    def tokens_k(self) -> int:
        return sum(k for _, k in self.lengths)

    @property
    def cells(self) -> int:
        """Visible (query, key) pairs of one head, over all sequences: padding and masked cells are not counted."""
        if not self.causal:
            return sum(q * k for q, k in self.lengths)
        # Rows before the first key see nothing; the rest see one key more each.
        rows = ((min(q, k), k) for q, k in self.lengths)
        return sum(r * (k - r) + r * (r + 1) // 2 for r, k in rows)

    @property
    def flops(self) -> int:
        """Useful operations: two products of 2 * cells * dim forward, and five more backward."""
        forward = 4 * self.cells * self.heads * self.dim
        return forward if self.direction == "fwd" else forward * 7 // 2

    @property
    def key_bytes(self) -> int:
        """Bytes of all keys and values, each of which has to be read once."""
        return 2 * self.tokens_k * self.kv_heads * self.dim * DTYPES[self.dtype].itemsize

    def inputs(self, seed: int = 0) -> Inputs:
        """Random tensors for this case; the same for the same seed."""
        make = torch.Generator().manual_seed(seed)
        dtype, device = DTYPES[self.dtype], self.device

        def draw(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, self.dim, generator=make).to(device, dtype)

        q = draw(self.tokens_q, self.heads)
        k, v = draw(self.tokens_k, self.kv_heads), draw(self.tokens_k, self.kv_heads)
        return Inputs(self, q, k, v, draw(self.tokens_q, self.heads))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Packed tensors of a case: q, dout [tokens_q, heads, dim]; k, v [tokens_k, kv_heads, dim]."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def lengths_q(self) -> list[int]:
        return [q for q, _ in self.case.lengths]

    @property
    def lengths_k(self) -> list[int]:
        return [k for _, k in self.case.lengths]

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        return offsets(self.lengths_q).to(self.case.device)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        return offsets(self.lengths_k).to(self.case.device)

    @cached_property
    def pages(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(keys, values, seqused_k, block_table): the same keys and values in shuffled pages."""
        counts = [-(-n // PAGE) for n in self.lengths_k]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).to(torch.int32)
        table = torch.zeros(len(counts), max(counts, default=0), dtype=torch.int32)
        keys, values = (x.new_zeros(sum(counts), PAGE, *x.shape[1:]) for x in (self.k, self.v))
        first = 0
        for row, (start, n, count) in enumerate(
            zip(offsets(self.lengths_k).tolist(), self.lengths_k, counts, strict=False)
        ):
            own = order[first : first + count]
            table[row, :count] = own
            for pages, rows in ((keys, self.k), (values, self.v)):
                padded = rows.new_zeros(count * PAGE, *rows.shape[1:])
                padded[:n] = rows[start : start + n]
                pages[own.long()] = padded.unflatten(0, (count, PAGE))
            first += count
        used = torch.tensor(self.lengths_k, dtype=torch.int32)
        return keys, values, used.to(self.case.device), table.to(self.case.device)


def offsets(lengths: Sequence[int]) -> Tensor:
    """int32 [batch + 1] from the lengths of a batch."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def same(lengths: Sequence[int]) -> Lengths:
    """Self-attention: as many keys as queries."""
    return tuple((int(n), int(n)) for n in lengths)


def _short() -> Lengths:
    return same(np.random.default_rng(0).integers(16, 129, 512).tolist())


WORKLOADS: dict[str, Callable[[], Case]] = {
    "R": lambda: Case("R", same(corpus.spread(24))),
    "M": lambda: Case("M", same([512] * 32)),
    "S": lambda: Case("S", _short()),
    "U": lambda: Case("U", same([2048] * 8)),
    "L": lambda: Case("L", same([16384])),
    "D": lambda: Case("D", ((1, 4096),) * 32, paged=True),
    "T": lambda: Case("T", same([16])),
}
ABOUT = {
    "R": "24 files of the standard library, up to 4096 bytes",
    "M": "32 x 512",
    "S": "512 sequences of 16 to 128 tokens",
    "U": "8 x 2048",
    "L": "1 x 16384",
    "D": "decode: 32 queries over 4096 paged keys each",
    "T": "1 x 16: the cost of a call",
}
# One small case of each kind, for a run that only shows that everything works.
SMOKE = (
    Case("mixed", same([17, 1, 64, 200]), kv_heads=2),
    Case("mixed", same([17, 1, 64, 200]), kv_heads=2, direction="fwd_bwd"),
    Case("mixed", same([33, 70]), dtype="bfloat16", causal=False),
    Case("decode", ((1, 300),) * 4, kv_heads=2, paged=True),
)


def workload(name: str) -> Case:
    """One of ``WORKLOADS`` by its name."""
    if name not in WORKLOADS:
        raise ValueError(f"case is {name!r}: it has to be one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]()


def parse_lengths(text: str) -> Lengths:
    """Lengths from the command line, or from a file of them.

    Comma-separated items ``L`` (one sequence), ``NxL`` (N of them), each with an optional ``:K`` for the number of keys
    (``32x1:4096`` is decode), or the path of a text file with such items separated by commas or white space.
    """
    if Path(text).is_file():
        text = Path(text).read_text()
    found: list[tuple[int, int]] = []
    for item in text.replace(",", " ").split():
        size, _, keys = item.partition(":")
        times, cross, length = size.rpartition("x")
        try:
            queries = int(length)
            repeat = int(times) if cross else 1
            pair = (queries, int(keys) if keys else queries)
        except ValueError:
            raise ValueError(f"lengths has {item!r}: an item has to be L, NxL or NxL:K") from None
        if min(*pair, repeat) < 0:
            raise ValueError(f"lengths has {item!r}: no number may be negative")
        found += [pair] * repeat
    if not found:
        raise ValueError(f"lengths is {text!r}: it has to name at least one sequence")
    return tuple(found)


def with_options(case: Case, **options: object) -> Case:
    """``case`` with those options that are not None."""
    return replace(case, **{name: value for name, value in options.items() if value is not None})
