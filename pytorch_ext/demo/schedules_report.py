# SPDX-License-Identifier: Apache-2.0
"""The report of the training demo: speed, waiting, traffic, losses, and who did what when."""

from __future__ import annotations

import html
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gapless.demo import ranks
from gapless.demo.ranks import Settings
from gapless.demo.report import PACKED, PADDED, Rows, Tables, axes_of, images, page, table
from gapless.schedule.simulate import simulate
from gapless.schedule.timeline import figure as planned_figure

NAMES = {
    "one": "one process",
    "static-cp": "static context parallelism",
    "naive-hdp": "naive HDP",
    "hdp": "balanced HDP",
    "zeppelin": "Zeppelin",
}
MIB = 2**20


def tables(result: dict[str, Any]) -> Tables:
    """(title, head, rows) of each table."""
    rows = {row["planner"]: row for row in result["rows"]}
    static = rows.get("static-cp")
    cells: Rows = []
    for name, row in rows.items():
        against = "" if static is None or name == "one" else f"{row['rate'] / static['rate']:.2f}x"
        critical = (
            ""
            if static is None or name == "one"
            else f"{row['critical_rate'] / static['critical_rate']:.2f}x"
        )
        memory = f"{row['peak_bytes'] / MIB:,.0f} MiB" if row["peak_bytes"] else "not known here"
        cells.append(
            (
                NAMES.get(name, name),
                f"{row['rate']:,.0f}",
                against,
                f"{row['critical_rate']:,.0f}",
                critical,
                f"{row['idle']:.0%}",
                f"{row['bytes'] / MIB:,.1f} MiB",
                memory,
            )
        )
    head = ("", "tokens/s", "", "on the critical path", "", "idle", "sent a step", "peak of a rank")
    yield "Training", head, cells
    cells = [
        (
            NAMES.get(name, name),
            f"{rows[name]['losses'][0]:.6f}",
            f"{rows[name]['losses'][-1]:.6f}",
            f"{result['loss_differences'][name]:.2g}" if name in result["loss_differences"] else "",
        )
        for name in rows
    ]
    yield "Losses", ("", "first step", "last step", "largest difference to one process"), cells


def _speed(result: dict[str, Any]) -> Figure:
    figure, axes = axes_of("Tokens per second of all ranks")
    rows = [row for row in result["rows"] if row["planner"] != "one"]
    places = np.arange(len(rows))
    for shift, key, label, color in (
        (-0.2, "rate", "by the clock", PACKED),
        (0.2, "critical_rate", "on the critical path", PADDED),
    ):
        bars = axes.bar(places + shift, [row[key] for row in rows], 0.36, label=label, color=color)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(places, [NAMES.get(row["planner"], row["planner"]) for row in rows], fontsize=8)
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    return figure


def _measured(result: dict[str, Any]) -> Figure:
    """When each rank began its micro-batches in the last step, by the clock."""
    runs = {name: found for name, found in result["runs"].items() if name != "one"}
    figure = Figure(figsize=(6.4, 1.1 * len(runs) + 0.8), layout="constrained")
    figure.suptitle("Micro-batches of the last step, measured", fontsize=11)
    rows = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, found) in zip(rows, runs.items(), strict=True):
        for rank, run in enumerate(found):
            last = run["steps"][-1]
            begins = [*last["begins"], last["seconds"]]
            for i, (begin, end) in enumerate(itertools.pairwise(begins)):
                axes.barh(
                    rank, end - begin, left=begin, height=0.8, color=PACKED, alpha=1.0 if i % 2 else 0.7
                )
        axes.set_yticks(range(len(found)))
        axes.invert_yaxis()
        axes.set_ylabel(NAMES.get(name, name), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("seconds")
    return figure


def _lengths(result: dict[str, Any]) -> Figure:
    figure, axes = axes_of(f"Lengths of the {len(result['lengths'])} texts, and where the tokens are")
    lengths = np.sort(result["lengths"])
    axes.hist(lengths, bins=np.geomspace(max(1, lengths[0]), lengths[-1] + 1, 40).tolist(), color=PACKED)
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("texts")
    share = axes.twinx()
    share.plot(lengths, np.cumsum(lengths) / lengths.sum(), color=PADDED)
    share.set_ylim(0, 1.02)
    share.set_ylabel("share of tokens")
    share.spines[["top"]].set_visible(False)
    return figure


def plots(result: dict[str, Any]) -> dict[str, Figure]:
    """Figures by file name: the first batch's plans are drawn as they are simulated."""
    settings = Settings(**result["settings"], cost=result["cost"])
    sequences = ranks.texts(settings)
    made = {"speed.png": _speed(result), "lengths.png": _lengths(result), "measured.png": _measured(result)}
    for name in result["runs"]:
        if name == "one":
            continue
        (batch,) = next(iter(ranks.sampler(sequences, replace(settings, planner=name))))
        played = simulate(batch.schedule, spans=True)
        title = f"{NAMES.get(name, name)}, simulated: {played.makespan:.3g} s, {played.idle:.0%} idle"
        made[f"{name}.png"] = planned_figure(played, title=title)
    return made


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write the PNGs and ``index.html`` into ``folder``; returns the path of the latter."""
    shown = images(plots(result), folder)
    settings = result["settings"]
    parts = [
        f"<p>A Llama of {settings['layers']} layers learns the Python standard library byte by byte on "
        f"{settings['ranks']} processes joined by gloo, {settings['tokens']:,} tokens a step. Files up to "
        f"{settings['max_bytes']:,} bytes are whole; others are joined to texts of "
        f"{settings['ranks'] * settings['capacity']:,} tokens, which no process holds alone.</p>"
    ]
    for title, head, cells in tables(result):
        parts += [f"<h2>{html.escape(title)}</h2>", table(head, cells)]
    parts += [
        "<p><small>Processes share the machine's cores. The critical path is the processor time of the busiest rank of "
        "each step: what would be left with a core for each. Idle is what the others wait for it.</small></p>",
        *shown,
    ]
    return page(folder, "Schedules at work", parts, result["machine"])
