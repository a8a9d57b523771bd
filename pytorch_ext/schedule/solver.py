# SPDX-License-Identifier: Apache-2.0
"""Mixed-integer programs, solved by HiGHS through scipy, which is an optional package."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class Program:
    """Minimise ``objective @ x``; rows of constraints are added one by one.

    Attributes:
        objective: float64 [variables].
        integer: bool [variables].
        lower, upper: float64 [variables].
    """

    objective: Floats
    integer: NDArray[np.bool_]
    lower: Floats
    upper: Floats
    _rows: list[int] = field(default_factory=list)
    _columns: list[int] = field(default_factory=list)
    _values: list[float] = field(default_factory=list)
    _least: list[float] = field(default_factory=list)
    _most: list[float] = field(default_factory=list)

    def add(
        self, columns: list[int], values: list[float], least: float = -np.inf, most: float = np.inf
    ) -> None:
        """``least <= sum of values * x[columns] <= most``."""
        self._rows += [len(self._least)] * len(columns)
        self._columns += columns
        self._values += values
        self._least.append(least)
        self._most.append(most)

    def solve(self, time_limit: float, gap: float = 1e-6) -> tuple[Floats | None, float, bool]:
        """The best solution found, a bound on the objective of every solution, and whether it is proven to be optimal.

        Raises:
            ImportError: scipy is not installed.
        """
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError(
                f"mixed-integer programs need scipy ({error}): pip install 'gapless[schedule]'"
            ) from None
        shape = (len(self._least), len(self.objective))
        matrix = csr_array((self._values, (self._rows, self._columns)), shape=shape)
        result = milp(
            self.objective,
            integrality=self.integer.astype(int),
            bounds=Bounds(self.lower, self.upper),
            constraints=LinearConstraint(matrix, self._least, self._most),
            options={"time_limit": float(time_limit), "mip_rel_gap": gap},
        )
        bound = result.mip_dual_bound
        return result.x, -np.inf if bound is None else float(bound), result.status == 0
