# SPDX-License-Identifier: Apache-2.0
"""Sequence lengths to plan for: generators fitted to published facts, real code, and a user's own file."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.inputs import check_lengths

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

K = 1024
M = 1024 * K
GLOBAL_BATCH = 32 * M  # tokens, of ByteScale's experiments

# Installed packages are not the standard library; its own tests are left out by some distributions.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True, eq=False)
class LogLinear:
    """Lengths whose distribution function is linear in log(length) between edges.

    Attributes:
        edges: float64 [m + 1], ascending. A length is at least ``edges[0]`` and below ``edges[-1]``.
        shares: float64 [m], share of the samples between two edges.
    """

    edges: Floats
    shares: Floats

    @staticmethod
    def fit(edges: list[int], samples: Mapping[int, float], tokens: Mapping[int, float]) -> LogLinear:
        """The distribution in which a share ``samples[x]`` of samples, ``tokens[x]`` of tokens, is at least x long.

        Each x is one of the edges. As many facts as inner edges: with the sum of 1 they leave nothing free.
        Raises ValueError if no distribution with these edges has them.
        """
        bounds = np.asarray(edges, np.float64)
        rows, right = [np.ones(len(edges) - 1)], [1.0]
        for x, share in samples.items():
            rows.append((bounds[:-1] >= x).astype(np.float64))
            right.append(share)
        for x, share in tokens.items():
            rows.append(_means(bounds) * ((bounds[:-1] >= x) - share) / bounds[-1])
            right.append(0.0)
        shares = np.linalg.solve(np.stack(rows), np.array(right))
        if (shares < 0).any():
            i = int(shares.argmin())
            raise ValueError(
                f"these facts leave a share of {shares[i]:.3g} of the samples between {edges[i]} and {edges[i + 1]}"
            )
        return LogLinear(bounds, shares)

    @property
    def mean(self) -> float:
        """Tokens of a sample, on average."""
        return float(_means(self.edges) @ self.shares)

    def quantile(self, q: Floats) -> Floats:
        """The length that a share q of samples is below."""
        return np.exp(np.interp(q, np.concatenate([[0], np.cumsum(self.shares)]), np.log(self.edges)))

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        """int64 [count]."""
        return np.floor(self.quantile(rng.random(count))).astype(np.int64)


def _means(edges: Floats) -> Floats:
    """Mean of lengths that are uniform in log(length), between each two edges."""
    return np.diff(edges) / np.diff(np.log(edges))


@cache
def byted() -> LogLinear:
    """ByteScale's production set (arXiv:2502.21231): a thousandth of its samples decides how a step goes.

    Published: 80% of samples up to 4K; 1% from 128K on hold 44.3% of tokens, 0.05% from 2M on 12.1%; 37% of tokens
    are in sequences above 256K. Assumed: nothing above 4M, the edges at 32K and 512K, and 64 tokens at least.
    """
    return LogLinear.fit(
        [64, 4 * K, 32 * K, 128 * K, 256 * K, 512 * K, 2 * M, 4 * M],
        samples={4 * K: 0.2, 128 * K: 0.01, 2 * M: 0.0005},
        tokens={128 * K: 0.443, 256 * K: 0.37, 2 * M: 0.121},
    )


@cache
def github() -> LogLinear:
    """ByteScale's open set (arXiv:2502.21231): 16.2% of tokens in sequences above 128K, 9.8% above 256K, to 2M.

    Assumed: from 128K on each doubling holds 0.7 times the tokens of the one before (which gives just those 9.8%), and
    below it 4% up to 1K, 16% to 4K, 38% to 32K: a mean of 4.6K tokens and a median of 0.9K.
    """
    return LogLinear.fit(
        [64, K, 4 * K, 32 * K, 128 * K, 256 * K, 512 * K, M, 2 * M],
        samples={},
        tokens={K: 0.96, 4 * K: 0.8, 32 * K: 0.42, 128 * K: 0.162, 256 * K: 0.098, 512 * K: 0.053, M: 0.022},
    )


@cache
def hydraulis() -> LogLinear:
    """Web text and code at contexts of up to 32K, the kind of mix that Hydraulis (arXiv:2412.07894) trains on.

    It publishes pictures, no numbers: assumed are 55% of samples up to 1K, 90% to 4K, 97% to 8K, 99.4% to 16K.
    """
    return LogLinear.fit(
        [64, K, 4 * K, 8 * K, 16 * K, 32 * K],
        samples={K: 0.45, 4 * K: 0.1, 8 * K: 0.03, 16 * K: 0.006},
        tokens={},
    )


def _megatron(rng: np.random.Generator, count: int) -> Ints:
    """Of Megatron's notes on dynamic context parallelism: lognormal, mean 1024, sigma 1.5, kept in 128 to 8192."""
    sigma = 1.5
    drawn = rng.lognormal(np.log(1024) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, 128, 8192).astype(np.int64)


@cache
def code_lengths() -> Ints:
    """int64 [files], bytes of each source file of the running Python's standard library, by path; no empty files."""
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted((p.relative_to(root) for p in root.rglob("*.py")), key=lambda p: p.parts)
    sizes = [(root / p).stat().st_size for p in found if not _NOT_LIBRARY.intersection(p.parts)]
    lengths = np.array([size for size in sizes if size], np.int64)
    lengths.setflags(write=False)
    return lengths


def _code(rng: np.random.Generator, count: int) -> Ints:
    """Files of the standard library as byte tokens, with replacement."""
    return rng.choice(code_lengths(), count)


_DRAW: dict[str, Callable[[np.random.Generator, int], Ints]] = {
    "byted": lambda rng, count: byted().draw(rng, count),
    "github": lambda rng, count: github().draw(rng, count),
    "hydraulis": lambda rng, count: hydraulis().draw(rng, count),
    "megatron": _megatron,
    "code": _code,
}
NAMES = tuple(_DRAW)


def sample(name: str, *, tokens: int = GLOBAL_BATCH, context: int | None = None, seed: int = 0) -> Ints:
    """Lengths of a global batch of exactly ``tokens`` tokens, int64 [sequences], the same for the same seed.

    Args:
        name: one of ``NAMES``.
        tokens: of the batch. The last sequence loses what would be too much.
        context: longer sequences are cut to it (the rest is dropped); None: none are.
        seed: of the generator.
    """
    if name not in _DRAW:
        raise ValueError(f"name is {name!r}: it has to be one of {', '.join(NAMES)}")
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}: it has to be at least 0")
    if context is not None and context < 1:
        raise ValueError(f"context is {context}: it has to be at least 1, or None")
    rng = np.random.default_rng(seed)
    drawn, total = [np.empty(0, np.int64)], 0
    while total < tokens:
        some = _DRAW[name](rng, 4096)
        drawn.append(some if context is None else np.minimum(some, context))
        total += int(drawn[-1].sum())
    lengths = np.concatenate(drawn)
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, tokens)) + 1 if tokens else 0
    lengths = lengths[:count].copy()
    if count:
        lengths[-1] -= ends[count - 1] - tokens
    return lengths


def load(path: str | Path, column: str | None = None) -> Ints:
    """A user's own lengths, int64 [sequences]: text with one number a line, or a ``.parquet`` file.

    Args:
        path: of the file. Empty lines are skipped.
        column: of a Parquet file, numbers of tokens or lists of them; None: its only column that holds either.

    Raises:
        ValueError: the file has no lengths, or something in it is no length; names the line or row and what it holds.
        ImportError: a Parquet file without pyarrow installed.
    """
    path = Path(path)
    lengths = _parquet(path, column) if path.suffix == ".parquet" else _lines(path)
    if not len(lengths):
        raise ValueError(f"{path} holds no lengths: it has to have at least one sequence")
    return check_lengths(lengths, f"lengths of {path}")


def _lines(path: Path) -> list[int]:
    lengths = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: byte {error.start} is {error.object[error.start]:#x}") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        if not (text.isascii() and text.removeprefix("-").isdigit()):
            raise ValueError(f"{path}, line {number}: {text[:40]!r} is not a whole number of tokens")
        if text.startswith("-"):
            raise ValueError(f"{path}, line {number}: {text[:40]}: a sequence has 0 tokens or more")
        if len(text) > 15:
            raise ValueError(f"{path}, line {number}: {text[:40]} tokens are more than a sequence can have")
        lengths.append(int(text))
    return lengths


def _parquet(path: Path, column: str | None) -> Ints:
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    schema = pq.read_schema(path)
    fits = [f.name for f in schema if pa.types.is_integer(f.type) or _is_list(pa, f.type)]
    if column is None and len(fits) != 1:
        raise ValueError(
            f"{path}: column is None and {len(fits)} columns hold numbers or lists: name one of {fits}"
        )
    name = fits[0] if column is None else column
    if name not in schema.names:
        raise ValueError(f"{path} has no column {name!r}: it has {schema.names}")
    if name not in fits:
        raise ValueError(f"{path}: column {name!r} is of {schema.field(name).type}: it has to hold lengths")
    values = pq.read_table(path, columns=[name])[name]
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise ValueError(f"{path}: row {row} of column {name!r} is null: it has to be a length")
    if _is_list(pa, values.type):
        values = pc.list_value_length(values)
    return values.to_numpy()


def _is_list(pa, kind) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
