# SPDX-License-Identifier: Apache-2.0
"""The report of the packing demo: loss, speed and memory, padded and packed."""

from __future__ import annotations

import html
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gapless.bench import report as bench_report
from gapless.demo.report import PACKED, PADDED, axes_of, images, page, table

NAMES = {"padded": "padded, torch SDPA", "packed": "packed, gapless"}


def _bars(title: str, unit: str, values: dict[str, float]) -> Figure:
    figure, axes = axes_of(title)
    bars = axes.bar([NAMES[k] for k in values], list(values.values()), color=[PADDED, PACKED], width=0.5)
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.set_ylabel(unit)
    return figure


def plots(result: dict) -> dict[str, Figure]:
    """Figures by file name."""
    runs = result["runs"]
    loss, axes = axes_of("Loss of each step")
    for kind, style in (
        ("padded", {"color": PADDED, "linewidth": 4, "alpha": 0.4}),
        ("packed", {"color": PACKED}),
    ):
        steps = runs[kind]["steps"]
        axes.plot([s["step"] + 1 for s in steps], [s["loss"] for s in steps], label=NAMES[kind], **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("nats per byte")
    axes.legend(frameon=False)
    lengths, axes = axes_of(f"Lengths of the {len(result['lengths'])} files")
    axes.hist(result["lengths"], bins=40, color=PACKED)
    axes.set_xlabel("bytes")
    axes.set_ylabel("files")
    made = {
        "loss.png": loss,
        "speed.png": _bars("Useful tokens per second", "tokens/s", {k: runs[k]["rate"] for k in NAMES}),
        "lengths.png": lengths,
    }
    if all(runs[k]["peak_bytes"] for k in NAMES):
        values = {k: (runs[k]["peak_bytes"] - runs[k]["idle_bytes"]) / 2**20 for k in NAMES}
        made["memory.png"] = _bars("Peak memory of training, beyond the idle model", "MiB", values)
    return made


def facts(result: dict) -> list[tuple[str, str, str]]:
    """(what, padded, packed), the table that says it all."""
    padded, packed = (result["runs"][kind] for kind in ("padded", "packed"))

    def mebibytes(run: dict, own: bool) -> str:
        if not run["peak_bytes"]:
            return "not known here"
        return f"{(run['peak_bytes'] - (run['idle_bytes'] if own else 0)) / 2**20:,.0f} MiB"

    return [
        ("useful tokens/s", f"{padded['rate']:,.0f}", f"{packed['rate']:,.0f}"),
        ("speed-up", "", f"{packed['rate'] / padded['rate']:.2f}x"),
        ("time of a step", f"{padded['step_seconds']:.2f} s", f"{packed['step_seconds']:.2f} s"),
        ("padding share of the tokens computed", f"{padded['padding']:.0%}", f"{packed['padding']:.0%}"),
        ("peak memory of the process", mebibytes(padded, False), mebibytes(packed, False)),
        ("peak memory beyond the idle model", mebibytes(padded, True), mebibytes(packed, True)),
        ("loss, first step", f"{padded['steps'][0]['loss']:.6f}", f"{packed['steps'][0]['loss']:.6f}"),
        ("loss, last step", f"{padded['steps'][-1]['loss']:.6f}", f"{packed['steps'][-1]['loss']:.6f}"),
    ]


def _bench_table(rows: list[dict]) -> str:
    shown = bench_report.columns(rows)
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in shown) + "</tr>"]
    last = None
    for row, *texts in zip(rows, *shown.values(), strict=True):
        if row["case"] != last:
            last = row["case"]
            lines.append(f'<tr class="case"><td colspan="{len(shown)}">{html.escape(last)}</td></tr>')
        cells = "".join(f"<td>{html.escape(t)}</td>" for t in texts)
        lines.append(f'<tr class="{"peer" if row["peer"] else "own"}">{cells}</tr>')
    return "<table>" + "".join(lines) + "</table>"


def write(result: dict, folder: Path) -> Path:
    """Write the PNGs and ``index.html`` into ``folder``; returns the path of the latter."""
    shown = images(plots(result), folder)
    steps = len(result["runs"]["packed"]["steps"])
    settings = result["settings"]
    parts = [
        f"<p>A Llama of {result['parameters'] / 1e6:.1f} million parameters ({settings['layers']} layers, "
        f"{settings['heads']} heads, {settings['kv_heads']} kv heads) learns the Python standard library byte by byte: "
        f"{steps} steps of {settings['batch']} whole files each, up to {settings['max_bytes']} bytes, from the same "
        "weights and in the same order both times.</p>",
        table(("", NAMES["padded"], NAMES["packed"]), facts(result)),
        f"<p>Largest difference between the two losses of a step: {result['loss_difference']:.2g}.</p>",
        *shown,
    ]
    if result["bench"]:
        parts += [
            "<h2>The operator alone</h2>",
            _bench_table(result["bench"]),
            "<p><small>GFLOP/s count visible (query, key) pairs only; sgemm is the share of the rate of a float32 "
            "matrix product in the same run; x peer is how many times faster than the fastest peer.</small></p>",
        ]
    return page(folder, "Packed against padded", parts, result["machine"])
