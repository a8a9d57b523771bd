# SPDX-License-Identifier: Apache-2.0
"""What users can get wrong in a planner's arguments."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_TOKENS = 2**53  # a batch beyond it has sums that float64 does not hold exactly


def check_lengths(lengths: ArrayLike, name: str = "lengths") -> NDArray[np.int64]:
    """int64 [n]. Raises TypeError or ValueError naming the sequence that is not a number of tokens."""
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {list(array.shape)}: it has to be [sequences]")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        whole = array.dtype.kind == "f" and bool(
            np.isfinite(array).all() and (array == np.floor(array)).all()
        )
        if not whole:
            raise TypeError(f"{name} is of {array.dtype}: it has to be whole numbers of tokens")
    if (array < 0).any():
        i = int(np.argmax(array < 0))
        raise ValueError(f"{name}[{i}] is {array[i]}: a sequence has 0 tokens or more")
    if float(array.sum(dtype=np.float64)) > MOST_TOKENS:
        raise ValueError(f"{name} adds up to {array.sum(dtype=np.float64):.3g} tokens: at most 2^53")
    return array.astype(np.int64)


def check_count(value: object, name: str) -> int:
    """A whole number of at least 1. Raises TypeError or ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}: it has to be a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}: it has to be at least 1")
    return int(value)


def check_capacity(capacity: ArrayLike, ranks: int) -> NDArray[np.int64]:
    """int64 [ranks], from one number for all ranks or one for each."""
    array = np.asarray(capacity)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"capacity is {capacity!r:.80}: it has to be a whole number of tokens, or one for each rank"
        )
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != ranks):
        raise ValueError(
            f"capacity has shape {list(array.shape)}: it has to be one number or [{ranks}], one a rank"
        )
    if (array < 1).any():
        raise ValueError(f"capacity is {int(array.min())}: a rank has to hold at least 1 token")
    return np.broadcast_to(array, ranks).astype(np.int64)


def check_fits(lengths: NDArray[np.int64], most: int, ranks: int, share: float = 1.0) -> None:
    """Raise ValueError, naming the longest sequence and the capacity that would do, unless all have ``most`` at most.

    ``share`` is the part of the activations that stays on a device when as much as possible is offloaded.
    """
    if lengths.size and lengths.max() > most:
        i = int(lengths.argmax())
        needed = int(np.ceil(-(-int(lengths[i]) // ranks) * share))
        raise ValueError(
            f"lengths[{i}] is {lengths[i]}: {ranks} ranks hold at most {most} tokens of one sequence; "
            f"a capacity of {needed} tokens a rank would do, or more ranks"
        )
