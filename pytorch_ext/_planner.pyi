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
    q_offset: NDArray[np.int32] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Query tiles and key tiles, flat int32 [(batch + tokens // block) * 3] rows (sequence, begin, end)."""

def best_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Bin of each item, from 0."""

def karmarkar_karp(costs: NDArray[np.float64], bins: int, equal_size: bool) -> NDArray[np.int64]:
    """Bin of each item."""

def longest_first(
    costs: NDArray[np.float64],
    sizes: NDArray[np.int64],
    speeds: NDArray[np.float64],
    longest: NDArray[np.int64],
    capacity: int,
    most_items: int,
) -> NDArray[np.int64]:
    """LPT: bin of each item, -1 where none had room."""

def pack(
    costs: NDArray[np.float64],
    sizes: NDArray[np.int64],
    speeds: NDArray[np.float64],
    longest: NDArray[np.int64],
    capacity: int,
    most_items: int,
    effort: int,
) -> NDArray[np.int64]:
    """Bin of each item by the best of all algorithms, refined; -1 for all if none keeps to the limits."""

def refine_packing(
    costs: NDArray[np.float64],
    sizes: NDArray[np.int64],
    speeds: NDArray[np.float64],
    longest: NDArray[np.int64],
    capacity: int,
    most_items: int,
    assignment: NDArray[np.int64],
    effort: int,
) -> NDArray[np.int64]:
    """The assignment after moves and swaps that lower the longest time."""

def exact_schedule(
    seconds: NDArray[np.float64], sequences: int, ranks: int, most_states: int
) -> tuple[float, bool, NDArray[np.uint32], NDArray[np.uint32]]:
    """(makespan, proven, sequences of each pack as bits, its ranks as bits) of the shortest schedule."""

def zone_plan(
    lengths: NDArray[np.int64],
    attention: NDArray[np.float64],
    capacity: NDArray[np.int64],
    speed: NDArray[np.float64],
    *,
    ranks_per_node: int,
    token: float,
    near: float,
    far: float,
    outer: float,
    hop: float,
    overhead: float,
    whole_nodes: bool,
    piece: float,
    level: float,
    fullness: float,
    most_steps: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """(step [n], offsets [n + 1], ranks, end [ranks]): step (-1: left over), ring of each sequence; see zeppelin.h."""

def hidden_ranks(attention: float, transfer: float, hop: float, most: int) -> int:
    """Most ranks over which a ring's transfers hide behind attention, at least 1."""

def hdp_plan(
    lengths: NDArray[np.int64],
    attention: NDArray[np.float64],
    linear: NDArray[np.float64],
    resident: NDArray[np.float64],
    capacity: NDArray[np.int64],
    throughput: NDArray[np.float64],
    stages: NDArray[np.int64],
    *,
    ranks_per_node: int,
    overhead: float,
    node_token: float,
    network_token: float,
    sharing: int,
    hop: float,
    two_level: bool,
    finish: float,
    longest: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], float, float]:
    """(pack_of, rank_offsets, ring_ranks, steps, finish, makespan) of csrc/plan/hdp.h."""
