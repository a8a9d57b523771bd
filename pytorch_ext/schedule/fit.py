# SPDX-License-Identifier: Apache-2.0
"""From measured times to a cost model's three numbers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike


def fit_times(tokens: ArrayLike, cells: ArrayLike, seconds: ArrayLike) -> tuple[float, float, float]:
    """``(cell, token, fixed)``, none below 0, such that ``cell * cells + token * tokens + fixed`` is near ``seconds``.

    Least squares of the relative error, so that short runs count as much as long ones. With three unknowns the
    non-negative optimum is the best of the plain optima over each subset of them.

    Args:
        tokens, cells, seconds: [samples], of one layer's forward pass each.

    Raises:
        ValueError: no samples, shapes that differ, or times that are not above 0 and finite.
    """
    times = np.asarray(seconds, np.float64)
    columns = np.stack(
        [np.asarray(cells, np.float64), np.asarray(tokens, np.float64), np.ones(len(times))], 1
    )
    if times.ndim != 1 or not len(times):
        raise ValueError(f"seconds has shape {list(times.shape)}: it has to be [samples], at least one")
    if not (np.isfinite(times) & (times > 0)).all():
        i = int(np.argmin(np.isfinite(times) & (times > 0)))
        raise ValueError(f"seconds[{i}] is {times[i]}: it has to be above 0 and finite")
    relative = columns / times[:, None]
    scale = np.abs(relative).max(0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(3), np.inf
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            used = relative[:, chosen] / scale[list(chosen)]
            found = np.linalg.lstsq(used, np.ones(len(times)), rcond=None)[0]
            error = float(np.square(used @ found - 1).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(3), error
                best[list(chosen)] = found / scale[list(chosen)]
    cell, token, fixed = best.tolist()
    return cell, token, fixed
