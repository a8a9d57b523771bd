# SPDX-License-Identifier: Apache-2.0
"""Types of the planner, csrc/plan/bindings.cpp."""

import numpy as np
from numpy.typing import NDArray

def check_cu_seqlens(cu_seqlens: NDArray[np.int64], name: str, total: int) -> None:
    """Raise ValueError unless entries start at 0, never decrease, fit int32, end at total (if it is >= 0)."""

def varlen_tiles(
    cu_seqlens_q: NDArray[np.int32],
    cu_seqlens_k: NDArray[np.int32],
    block_q: int,
    block_k: int,
    left: int,
    right: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Query tiles and key tiles, flat int32 [(batch + tokens // block) * 3] rows (sequence, begin, end)."""
