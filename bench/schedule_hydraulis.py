# SPDX-License-Identifier: Apache-2.0
"""Hydraulis' question: one parallel strategy for all batches, or the best of several for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import numpy as np

from gapless.schedule import CostModel, hydraulis, packing, traces
from gapless.schedule.hydraulis import Replica, Strategy

DEVICES = 64
TOKENS_OF_DEVICE = 4096  # whose activations one device holds beside its share of the model
# What tensor parallelism leaves of a device's speed: its all-reduces are exposed. Assumed, of the usual size on NVLink.
EFFICIENCY = {1: 1.0, 2: 0.94, 4: 0.86, 8: 0.72}
CONTEXT = 32768
BATCHES = 4


def replica(tp: int, stages: int = 1) -> Replica:
    """``tp * stages`` devices: as many tokens as they hold together, as fast as tensor parallelism lets them."""
    return Replica(TOKENS_OF_DEVICE * tp, tp, stages, tp * EFFICIENCY[tp])


def strategies() -> list[Strategy]:
    """All replicas alike, and mixes: few replicas for the longest sequences, many small ones for the rest."""
    alike = [Strategy((replica(8),) * (DEVICES // 8), "tp8 x 8")]
    mixes = []
    for eights in (1, 2, 4):
        left = DEVICES - 8 * eights
        for tp, stages in ((4, 1), (2, 1), (1, 1), (2, 2), (1, 4)):
            some = (replica(tp, stages),) * (left // (tp * stages))
            mixes.append(
                Strategy((replica(8),) * eights + some, f"tp8 x {eights}, tp{tp} pp{stages} x {len(some)}")
            )
        half = left // 2
        some = (replica(4),) * (half // 4) + (replica(1),) * (left - half // 4 * 4)
        mixes.append(Strategy((replica(8),) * eights + some, f"tp8 x {eights}, tp4 x {half // 4}, tp1"))
    return alike + mixes


def run(tell: Callable[[str], object] = lambda text: None) -> Iterator[dict[str, Any]]:
    """Rows: the choice for each batch against the one strategy that fits all lengths; greedy and exact.

    ``speedup`` is that over what its paper compares with: one strategy and packing by tokens. ``of_the_choice`` is that
    over one strategy whose sequences are dispatched and packed as well as ours: what the choice of strategies brings.
    """
    cost = CostModel.published("flexsp").replace(fixed=0.0)
    every = strategies()
    alike = every[0]
    for tokens in (2**19, 2**20, 2**21):
        speedups, choices, chosen = [], [], []
        for seed in range(BATCHES):
            tell(f"{tokens} tokens, batch {seed}")
            batch = traces.sample("hydraulis", tokens=tokens, context=CONTEXT, seed=seed)
            best = hydraulis.plan(batch, strategies=every, cost=cost)
            same = hydraulis.plan(batch, strategies=[alike], cost=cost)
            packed = packing.plan(
                batch, ranks=alike.cluster, capacity=alike.capacity, cost=cost, method="best_fit"
            )
            speedups.append(packed.makespan / best.makespan)
            choices.append(same.makespan / best.makespan)
            chosen.append(best.planner)
        yield {
            "case": f"hydraulis trace, {tokens // 1024}K tokens a batch, {DEVICES} devices",
            "planner": "best of all strategies",
            "batches": BATCHES,
            "speedup": fmean(speedups),
            "least": min(speedups),
            "most": max(speedups),
            "of_the_choice": fmean(choices),
            "strategies": len(set(chosen)),
        }
    gaps = []
    small = Strategy((replica(8), replica(4), replica(2, 2)), "small")
    for seed in range(24):
        tell(f"greedy against exact, case {seed}")
        rng = np.random.default_rng(seed)
        lengths = np.clip(rng.lognormal(7.5, 1.2, int(rng.integers(5, 11))), 64, CONTEXT).astype(int)
        greedy = hydraulis.greedy(lengths, strategy=small, cost=cost)
        exact = hydraulis.exact(lengths, strategy=small, cost=cost)
        if exact.seconds <= exact.bound * (1 + 1e-6):  # proven
            gaps.append(greedy.seconds / exact.seconds - 1)
    yield {
        "case": "greedy against exact, small batches",
        "planner": "greedy",
        "batches": len(gaps),
        "mean_gap": fmean(gaps),
        "worst_gap": max(gaps),
    }
