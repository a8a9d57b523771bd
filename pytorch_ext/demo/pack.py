# SPDX-License-Identifier: Apache-2.0
"""The packing demo: the same training twice, padded and packed, then the operator alone, then a report."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers  # noqa: F401  (the runs need it: say so before they start)
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gapless.bench import cases, corpus, measure
from gapless.bench import report as bench_report
from gapless.demo import pack_report, report
from gapless.demo.train import Settings, arguments

# Shares of the whole time: the padded run, and the operator's table. The packed run takes what it takes, which is less.
PADDED_SHARE, BENCH_SHARE = 0.5, 0.15
MOST_STEPS = 200
OPERATOR_CASES = (("R", "fwd"), ("M", "fwd"), ("S", "fwd"), ("M", "fwd_bwd"))


def train(settings: Settings, each_step: Callable[[dict], object] = lambda line: None) -> dict:
    """Run ``settings`` in a process of its own; returns its steps, its memory, and what follows from them."""
    lines = []
    # An empty working directory: Python would look there first, and a checkout has folders named as packages.
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            arguments(settings), stdout=subprocess.PIPE, stderr=errors, text=True, cwd=empty
        ) as process:
            assert process.stdout is not None
            for text in process.stdout:
                if text.startswith("{"):
                    lines.append(json.loads(text))
                    each_step(lines[-1])
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"the {settings.kind} run failed:\n{errors.read()[-2000:]}")
    steps, end = lines[:-1], lines[-1]
    timed = steps[1:] or steps  # the first step warms up
    tokens, computed = (sum(s[key] for s in steps) for key in ("tokens", "computed"))
    return end | {
        "steps": steps,
        "rate": sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed),
        "step_seconds": sum(s["seconds"] for s in timed) / len(timed),
        "padding": 1 - tokens / computed,
    }


def _operator_table(seconds: float, begun: Callable[[int, str], object]) -> list[dict]:
    """Rows of ``OPERATOR_CASES``, or of as many as a slow machine gets through in twice ``seconds``."""
    rows: list[dict] = []
    begin = time.perf_counter()
    for i, (name, direction) in enumerate(OPERATOR_CASES):
        case = cases.with_options(cases.workload(name), direction=direction)
        if time.perf_counter() - begin > 2 * seconds:
            break
        begun(i, case.label)
        rows += measure.measure(
            case,
            ["gapless", "sdpa_loop", "sdpa_list"],
            seconds=seconds / len(OPERATOR_CASES),
            with_memory=False,
        )[0]
    return bench_report.derive(rows)


def run(
    *,
    steps: int = 0,
    out: Path = Path("report"),
    seconds: float = 240.0,
    threads: int = 0,
    base: Settings | None = None,
    with_bench: bool = True,
) -> dict:
    """Train twice, time the operator, print, and write the report to ``out``.

    Args:
        steps: training steps; 0 takes as many as ``seconds`` allow.
        seconds: for everything, roughly; the steps are always finished if their number is given.
        threads: of torch; 0 is torch's own choice.
        base: sizes of model and batch, in place of the default ones.

    Returns:
        What the report shows: ``runs``, ``loss_difference``, ``bench``, ``machine``, ``report`` and so on.
    """
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    base = replace(base or Settings("", 0), threads=threads)
    limit = float("inf") if steps else seconds * PADDED_SHARE
    lengths = corpus.lengths(base.max_bytes)
    console.print(
        f"{len(lengths)} source files of the standard library, {min(lengths)} to {max(lengths)} bytes, "
        f"{base.batch} to a batch; padded with torch's SDPA, then packed with gapless",
        highlight=False,
    )
    runs: dict[str, dict] = {}
    begin = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        for kind in ("padded", "packed"):
            count = steps or (len(runs["padded"]["steps"]) if runs else MOST_STEPS)
            timed = limit < float("inf") and kind == "padded"
            task = progress.add_task(pack_report.NAMES[kind], total=limit if timed else count, now="starting")

            def each_step(line: dict, task=task, timed=timed) -> None:
                if "loss" in line:
                    done = progress.tasks[task].completed + line["seconds"] if timed else line["step"] + 1
                    progress.update(
                        task, completed=done, now=f"step {line['step'] + 1}, loss {line['loss']:.3f}"
                    )

            settings = replace(base, kind=kind, steps=count, seconds=limit if timed else float("inf"))
            runs[kind] = train(settings, each_step)
            progress.update(task, completed=progress.tasks[task].total)
        rows: list[dict] = []
        if with_bench:
            task = progress.add_task("the operator alone", total=len(OPERATOR_CASES), now="")

            def begun(done: int, label: str) -> None:
                progress.update(task, completed=done, now=label)

            rows = _operator_table(seconds * BENCH_SHARE, begun)
            progress.update(task, completed=len(OPERATOR_CASES), now="")
    pairs = zip(runs["padded"]["steps"], runs["packed"]["steps"], strict=True)
    result = {
        "runs": runs,
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "parameters": runs["packed"]["parameters"],
        "settings": {k: v for k, v in asdict(base).items() if k not in ("kind", "steps", "seconds")},
        "lengths": lengths,
        "bench": rows,
    }
    facts = Table("", *pack_report.NAMES.values(), box=None, pad_edge=False)
    for row in pack_report.facts(result):
        facts.add_row(*row)
    difference = Text(f"largest difference between the losses of a step: {result['loss_difference']:.2g}")
    shown = [bench_report.table(rows)] if rows else []
    return report.finish(
        result, out, pack_report.write, facts, difference, *shown, begin=begin, console=console
    )
