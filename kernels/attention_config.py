# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the attention kernels, a table instead of tuning at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton import knobs


class Config(NamedTuple):
    """Rows of queries and of keys in one step, and how the compiler spreads it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# One column per family of compute capability, by shared memory of a block: 163, 99 and 227 KiB.
ARCHS = (80, 86, 90)
# (kernel, padded head dim, bytes of an element) -> a configuration for each of ARCHS: the largest tiles whose inner
# loops keep to registers (tests/test_triton_compile.py); not yet measured on a GPU.
TABLE = {
    ("fwd", 64, 2): (Config(128, 64, 4, 3), Config(128, 64, 4, 3), Config(128, 64, 8, 3)),
    ("fwd", 128, 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3)),
    ("fwd", 256, 2): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(128, 32, 8, 2)),
    ("dq", 64, 2): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 128, 8, 2)),
    ("dq", 128, 2): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 64, 8, 2)),
    ("dq", 256, 2): (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 64, 4, 1)),
    ("dkdv", 64, 2): (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(64, 128, 8, 2)),
    ("dkdv", 128, 2): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 128, 8, 2)),
    ("dkdv", 256, 2): (Config(32, 64, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("mass", 64, 2): (Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(128, 128, 8, 3)),
    ("mass", 128, 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 128, 8, 3)),
    ("mass", 256, 2): (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(128, 64, 8, 2)),
    ("fwd", 64, 4): (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    ("fwd", 128, 4): (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    ("fwd", 256, 4): (Config(32, 32, 8, 2), Config(32, 16, 8, 1), Config(32, 32, 8, 2)),
    ("dq", 64, 4): (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    ("dq", 128, 4): (Config(32, 32, 8, 1), Config(32, 16, 8, 2), Config(32, 32, 8, 1)),
    ("dq", 256, 4): (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(32, 16, 8, 1)),
    ("dkdv", 64, 4): (Config(32, 64, 8, 1), Config(32, 64, 8, 1), Config(32, 64, 8, 1)),
    ("dkdv", 128, 4): (Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(32, 32, 8, 1)),
    ("dkdv", 256, 4): (Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 32, 8, 1)),
    ("mass", 64, 4): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    ("mass", 128, 4): (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(64, 16, 8, 2)),
    ("mass", 256, 4): (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(32, 32, 8, 2)),
}
# Where walking a list takes the registers that a kernel above leaves.
SPARSE_TABLE = {
    ("sparse_fwd", 128, 2): (Config(128, 32, 8, 3), Config(128, 32, 8, 3), Config(128, 64, 8, 3)),
    ("sparse_dq", 64, 2): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(128, 64, 8, 2)),
    ("sparse_dq", 128, 2): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(128, 64, 8, 2)),
    ("sparse_dq", 256, 2): (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(64, 32, 8, 2)),
    ("sparse_dkdv", 64, 2): (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(64, 64, 8, 2)),
    ("sparse_dkdv", 128, 2): (Config(64, 64, 8, 2), Config(64, 64, 8, 1), Config(32, 128, 8, 2)),
    ("sparse_dkdv", 256, 2): (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("sparse_fwd", 128, 4): (Config(64, 16, 8, 2), Config(64, 16, 8, 2), Config(32, 16, 8, 2)),
    ("sparse_fwd", 256, 4): (Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(32, 16, 8, 2)),
    ("sparse_dq", 128, 4): (Config(32, 32, 8, 1), Config(32, 16, 8, 2), Config(32, 16, 8, 2)),
}
# Small blocks, so that small inputs have several.
INTERPRETER = Config(32, 16, 1, 1)


def padded(dim: int) -> int:
    """The power of two that tensor cores take in place of ``dim``."""
    return max(16, 1 << (dim - 1).bit_length())


def family(capability: tuple[int, int]) -> int:
    """The column of ARCHS for a compute capability."""
    major, minor = capability
    if major >= 12 or (major == 8 and minor in (6, 9)):
        return 86
    return 90 if major >= 9 else 80


def choose(kernel: str, dim: int, dtype: torch.dtype, arch: int) -> Config:
    """The configuration of ``kernel`` for the larger head dim, an input dtype and one of ARCHS."""
    width, size = max(64, padded(dim)), dtype.itemsize
    dense = TABLE[kernel.removeprefix("sparse_"), width, size]
    return SPARSE_TABLE.get((kernel, width, size), dense)[ARCHS.index(arch)]


def fit(config: Config, kernel: str, dim: int, block_q: int, block_k: int) -> Config:
    """The configuration with tiles that fit into mask blocks; a forward pass over fewer rows needs fewer warps."""
    m, n = min(config.block_m, block_q), min(config.block_n, block_k)
    fewer = kernel == "sparse_fwd" and m < config.block_m and dim <= 128
    return Config(m, n, min(config.num_warps, 4) if fewer else config.num_warps, config.num_stages)


def configure(kernel: str, dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration for a device; asks the driver only on a GPU."""
    if knobs.runtime.interpret:
        return INTERPRETER
    return choose(kernel, dim, dtype, family(torch.cuda.get_device_capability(device)))
