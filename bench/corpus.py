# SPDX-License-Identifier: Apache-2.0
"""Real input on every machine: the source files of the running Python's standard library, as byte tokens."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

# Installed packages are not the standard library; its own tests are left out by some distributions.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
BEGIN = 256  # token before the first byte of a file
VOCABULARY = 260


@cache
def files(max_bytes: int = 4096) -> tuple[Path, ...]:
    """Source files of 1 to ``max_bytes`` bytes, sorted by their path inside the library: no file is ever cut."""
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted((p.relative_to(root) for p in root.rglob("*.py")), key=lambda p: p.parts)
    kept = [root / p for p in found if not _NOT_LIBRARY.intersection(p.parts)]
    return tuple(p for p in kept if 1 <= p.stat().st_size <= max_bytes)


def lengths(max_bytes: int = 4096) -> list[int]:
    """Bytes of each of :func:`files`."""
    return [p.stat().st_size for p in files(max_bytes)]


def tokens(path: Path) -> np.ndarray:
    """int64 [1 + bytes]: ``BEGIN``, then the bytes of the file."""
    return np.concatenate([[BEGIN], np.frombuffer(path.read_bytes(), np.uint8)]).astype(np.int64)


def spread(count: int, max_bytes: int = 4096) -> list[int]:
    """``count`` lengths at evenly spaced ranks of the distribution, in a fixed shuffled order."""
    ranked = np.sort(lengths(max_bytes))
    picked = ranked[((np.arange(count) + 0.5) * len(ranked) / count).astype(int)]
    return np.random.default_rng(0).permutation(picked).tolist()
