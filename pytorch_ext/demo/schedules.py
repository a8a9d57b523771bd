# SPDX-License-Identifier: Apache-2.0
"""The training demo: real processes, one small Llama, one long-tailed corpus, several planners."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import transformers  # noqa: F401  (the runs need it: say so before they start)
from rich.console import Console

from gapless.bench import calibrate
from gapless.demo import ranks, report, schedules_report
from gapless.demo.ranks import Settings
from gapless.schedule import ModelShape
from gapless.testing.processes import Processes

PLANNERS = ("static-cp", "naive-hdp", "hdp", "zeppelin")
QUICK = Settings(
    steps=2, tokens=1200, capacity=128, context=512, max_bytes=200, hidden=32, layers=2, heads=4, kv_heads=2
)
TIMEOUT = 600.0  # seconds that one planner's run may take


def _cost(settings: Settings, seconds: float, link: bool) -> dict[str, Any]:
    """The machine's own cost model, of one thread: what a rank has."""
    import torch

    shape = ModelShape(
        hidden=settings.hidden,
        intermediate=settings.hidden * 8 // 3,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        dim=settings.hidden // settings.heads,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found, _ = calibrate.calibrate(shape, tokens=max(256, settings.capacity), seconds=seconds, link=link)
    finally:
        torch.set_num_threads(threads)
    return found.to_dict()


def summary(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks of one run measured, as one row; the first step warms up and is not counted."""
    timed = [rank["steps"][1:] or rank["steps"] for rank in found]
    steps = range(len(timed[0]))
    # A rank computes as long as it uses the processor; the longest one of each step is the critical path.
    work = [[rank[i]["processor"] for rank in timed] for i in steps]
    tokens = sum(timed[0][i]["tokens"] for i in steps)
    walls = [max(rank[i]["seconds"] for rank in timed) for i in steps]
    memory = [rank["peak_bytes"] - rank["idle_bytes"] for rank in found if rank["peak_bytes"]]
    return {
        "planner": name,
        "rate": tokens / sum(walls),
        "critical_rate": tokens / sum(max(w) for w in work),
        "idle": 1 - sum(map(sum, work)) / sum(len(found) * max(w) for w in work),
        "waited": sum(rank[i]["waited"] for rank in timed for i in steps) / (len(found) * sum(walls)),
        "bytes": sum(rank[i]["bytes"] for rank in timed for i in steps) / len(steps),
        "peak_bytes": max(memory) if memory else None,
        "planned": median(timed[0][i]["planned"]["makespan"] for i in steps),
        "losses": [step["loss"] for step in found[0]["steps"]],
    }


def run(
    *,
    out: Path = Path("report/train"),
    seconds: float = 150.0,
    settings: Settings | None = None,
    planners: Sequence[str] = PLANNERS,
) -> dict[str, Any]:
    """Train by each planner and in one process, compare, print, and write the report to ``out``.

    Args:
        seconds: for everything, roughly: more of them are more steps, of at least 2 each.
        settings: sizes, in place of the default ones; then ``seconds`` is not looked at.
        planners: by name (:mod:`gapless.schedule.planners`).

    Returns:
        What the report shows: ``rows``, ``runs``, ``loss_differences``, ``machine``, ``report`` and so on.
    """
    console = Console()
    begin = time.perf_counter()
    given = settings is not None
    base = settings or Settings()
    lengths = [len(text) for text in ranks.texts(base)]
    console.print(
        f"{len(lengths)} texts of the standard library, {min(lengths)} to {max(lengths)} bytes; "
        f"{base.tokens} tokens a step, {base.ranks} processes of {base.capacity} tokens each, "
        "on cores of their own",
        highlight=False,
    )
    runs: dict[str, list[dict[str, Any]]] = {}
    with console.status("") as status:
        status.update("calibrating")
        base = replace(base, cost=_cost(base, 1.0 if given else 8.0, link=not given))
        with Processes(1, timeout=TIMEOUT) as alone:
            status.update("training: one process")
            (found,) = alone.run(ranks.run, replace(base, planner="one"))
        runs["one"] = [found]
        if not given:
            # A run tells how many steps there is time for: one process takes about as long as any number of them.
            each = sum(step["seconds"] for step in found["steps"]) / len(found["steps"])
            room = (seconds - (time.perf_counter() - begin)) / (len(planners) * each)
            base = replace(base, steps=int(np.clip(room, 2, base.steps)))
        with Processes(base.ranks, timeout=TIMEOUT, group_timeout=120.0) as processes:
            for name in planners:
                status.update(f"training: {schedules_report.NAMES.get(name, name)}")
                runs[name] = processes.run(ranks.run, replace(base, planner=name))
    one = summary("one", runs["one"])
    rows = [one, *(summary(name, runs[name]) for name in planners)]
    result: dict[str, Any] = {
        "settings": {k: v for k, v in asdict(base).items() if k not in ("planner", "cost")},
        "cost": base.cost,
        "lengths": lengths,
        "rows": rows,
        "runs": runs,
        "loss_differences": {
            row["planner"]: max(abs(a - b) for a, b in zip(one["losses"], row["losses"], strict=False))
            for row in rows[1:]
        },
    }
    shown = report.printable(schedules_report.tables(result))
    return report.finish(result, out, schedules_report.write, *shown, begin=begin, console=console)
