# SPDX-License-Identifier: Apache-2.0
"""Ranks and how they are connected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.inputs import check_count


@dataclass(frozen=True)
class Cluster:
    """Ranks of a data-parallel group, numbered node by node.

    Attributes:
        ranks: how many. A rank holds a whole model, or a pipeline of ``stages``.
        ranks_per_node: rank r is on node ``r // ranks_per_node``.
        nics_per_node: network cards that the ranks of a node share.
        stages: pipeline stages of a rank: each does ``1 / stages`` of the layers, all at the same time, on devices
            of its own. One number, or one for each rank.
        speed: of each stage of each rank, relative to the cost model (heterogeneous strategies); empty means 1 for all.
    """

    ranks: int
    ranks_per_node: int = 8
    nics_per_node: int = 8
    stages: int | tuple[int, ...] = 1
    speed: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        values = [(name, getattr(self, name)) for name in ("ranks", "ranks_per_node", "nics_per_node")]
        if isinstance(self.stages, tuple):
            values += [(f"stages[{rank}]", value) for rank, value in enumerate(self.stages)]
        else:
            values.append(("stages", self.stages))
        for name, value in values:
            check_count(value, name)
        for name, entries in (("stages", self.stages), ("speed", self.speed)):
            if isinstance(entries, tuple) and entries and len(entries) != self.ranks:
                raise ValueError(
                    f"{name} has {len(entries)} entries: it has to have one for each of {self.ranks} ranks"
                )
        if self.stages == ():
            raise ValueError(
                f"stages is empty: it has to be one number, or one for each of {self.ranks} ranks"
            )
        for rank, value in enumerate(self.speed):
            if not 0 < value < float("inf"):
                raise ValueError(f"speed[{rank}] is {value}: it has to be above 0 and finite")

    @staticmethod
    def of(ranks: int | Cluster) -> Cluster:
        """A cluster as it is, or one with so many ranks and the default connections."""
        return ranks if isinstance(ranks, Cluster) else Cluster(ranks)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    @property
    def speeds(self) -> NDArray[np.float64]:
        """float64 [ranks]."""
        return np.asarray(self.speed) if self.speed else np.ones(self.ranks)

    @property
    def stages_of(self) -> NDArray[np.int64]:
        """int64 [ranks], pipeline stages of each rank."""
        return np.broadcast_to(np.asarray(self.stages, np.int64), self.ranks)

    @property
    def throughputs(self) -> NDArray[np.float64]:
        """float64 [ranks], how much each does in a second with all its stages busy, relative to the cost model."""
        return self.speeds * self.stages_of

    @property
    def sharing(self) -> int:
        """Ranks of a node that share a network card."""
        return -(-self.ranks_per_node // min(self.nics_per_node, self.ranks_per_node))

    def widths(self, ranks: ArrayLike, two_level: bool) -> NDArray[np.int64]:
        """``Schedule.widths`` of rings of so many ranks on as few nodes as hold them: those of a node, or all."""
        n = np.asarray(ranks, np.int64)
        node = self.ranks_per_node
        return np.where(two_level & (n > node) & (n % node == 0), node, n)

    def node_of(self, ranks: ArrayLike) -> NDArray[np.int64]:
        """The node of each rank."""
        return np.asarray(ranks, np.int64) // self.ranks_per_node
