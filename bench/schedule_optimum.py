# SPDX-License-Identifier: Apache-2.0
"""Every planner against the shortest schedule with one pack in a micro-batch, on stored small batches.

Zeppelin's plans, which put several packs into one and move tokens around attention, may be shorter.

``python -m gapless.bench.schedule_optimum`` solves the cases anew and writes the file that :func:`regrets` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np

from gapless.schedule.cost import CostModel
from gapless.schedule.exact import search
from gapless.schedule.planners import planner

STORED = Path(__file__).with_name("schedule_optimum.json")
PLANNERS = ("static-cp", "naive-hdp", "hdp", "zeppelin", "dynamic-cp", "hybrid-cp", "flexsp")
WHOLE_PLANNERS = ("multifit", "karmarkar-karp", "lpt")  # of sequences that are never shared: another optimum
OFFLOADING = ("naive-hdp", "hdp")

# A 7B model's layer at 400 TFLOP/s; links at three speeds: rings that cost nothing, something, a lot.
_LAYER = {"cell": 4.1e-11, "token": 1.0e-6, "layers": 32, "kv_bytes": 16384.0, "hidden_bytes": 8192.0}
COSTS = {
    "fast links": CostModel(**_LAYER, fixed=1e-5, node_bandwidth=2e11, latency=5e-6),
    "slow links": CostModel(**_LAYER, fixed=1e-5, node_bandwidth=1e10, latency=2e-5),
    "overhead": CostModel(**_LAYER, fixed=1e-3, node_bandwidth=5e10, latency=1e-5),
}
CAPACITY = 8192
# Ranks, sequences and how many cases: those whose optimum the search proves in seconds, and larger ones, in minutes.
SIZES = ((2, (3, 12), 80), (3, (3, 9), 80), (4, (3, 8), 80), (4, (9, 12), 40))
MOST_STATES = 5_000_000
KINDS = ("lognormal", "uniform", "one giant", "equal")


def draw() -> list[dict]:
    """Cases without their solution: the same every time."""
    cases = []
    for ranks, (fewest, most), count in SIZES:
        rng = np.random.default_rng([ranks, most])
        for i in range(count):
            n = int(rng.integers(fewest, most + 1))
            kind, cost = KINDS[i % len(KINDS)], list(COSTS)[i // len(KINDS) % len(COSTS)]
            lengths = {
                "lognormal": rng.lognormal(7.5, 1.5, n),
                "uniform": rng.uniform(1, CAPACITY, n),
                "one giant": np.append(rng.uniform(1, CAPACITY / 2, n - 1), 0.9 * CAPACITY * ranks),
                "equal": np.full(n, rng.uniform(CAPACITY / 8, CAPACITY)),
            }[kind]
            lengths = np.clip(lengths, 1, CAPACITY * ranks).astype(int)
            cases.append({"kind": kind, "ranks": ranks, "cost": cost, "lengths": lengths.tolist()})
    return cases


def solve(case: dict) -> dict:
    """The case with ``optimum`` (any rings) and ``whole`` (no rings), seconds, and None where nothing is proven."""
    how = {"ranks": case["ranks"], "capacity": CAPACITY, "cost": COSTS[case["cost"]]}
    solved = dict(case)
    for key, rings in (("optimum", True), ("whole", False)):
        solved[key] = None
        if rings or max(case["lengths"]) <= CAPACITY:
            schedule, proven = search(case["lengths"], **how, rings=rings, most_states=MOST_STATES)
            if proven:
                solved[key] = schedule.makespan
    return solved


def load() -> list[dict]:
    """The stored cases with their solutions."""
    return json.loads(STORED.read_text())


def regret(name: str, case: dict) -> float | None:
    """Makespan over the optimum, minus 1; None where the planner has no answer or the optimum is not known."""
    best = case["whole" if name in WHOLE_PLANNERS else "optimum"]
    if best is None:
        return None
    how = {"ranks": case["ranks"], "capacity": CAPACITY, "cost": COSTS[case["cost"]]}
    if name in OFFLOADING:
        how["offload"] = False  # the optimum knows no hosts
    try:
        schedule = planner(name)(case["lengths"], **how)
    except ValueError:
        return None  # rings of 2^k of three ranks do not hold the longest sequence
    return schedule.makespan / best - 1


def regrets(
    names: Iterable[str] = PLANNERS + WHOLE_PLANNERS, tell: Callable[[str], object] = lambda text: None
) -> list[dict]:
    """Of each planner: cases, those solved to the optimum, mean and worst regret, and the worst case."""
    cases, rows = load(), []
    for name in names:
        tell(name)
        found = [(r, i) for i, case in enumerate(cases) if (r := regret(name, case)) is not None]
        worst, at = max(found)
        rows.append(
            {
                "planner": name,
                "cases": len(found),
                "optimal": sum(r < 1e-9 for r, _ in found),
                "best_regret": min(found)[0],
                "mean_regret": fmean(r for r, _ in found),
                "worst_regret": worst,
                "worst_case": at,
            }
        )
    return rows


if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        solved = list(pool.map(solve, draw()))
    STORED.write_text("[\n" + ",\n".join(json.dumps(case) for case in solved) + "\n]\n")
    print(f"{len(solved)} cases, {sum(case['optimum'] is None for case in solved)} without a proven optimum")
