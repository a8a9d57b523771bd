# SPDX-License-Identifier: Apache-2.0
"""Reports of the demos: plots as PNG, and one HTML file that carries them. Here, what they share and the packing's."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gapless.bench import report as bench_report
from gapless.bench.machine import machine_line

PADDED, PACKED = "#b04a3a", "#2f6f9f"
NAMES = {"padded": "padded, torch SDPA", "packed": "packed, gapless"}
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}small{color:#666}"
    ".case td{color:#2f6f9f;padding-top:.8rem}.own{font-weight:bold}"
)


def axes_of(title: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in the reports' style."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


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


def images(figures: dict[str, Figure], folder: Path) -> list[str]:
    """Write the figures into ``folder`` as PNG; returns the HTML that carries them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        (folder / name).write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        made.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    return made


def page(folder: Path, title: str, parts: Sequence[str], about: dict) -> Path:
    """Write ``index.html`` into ``folder``; returns its path. ``about`` is the machine."""
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>gapless: {html.escape(title.lower())}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
    )
    foot = f"<p><small>{html.escape(machine_line(about))}</small></p></html>"
    index = folder / "index.html"
    index.write_text("\n".join([head, *parts, foot]), encoding="utf-8")
    return index


def write(result: dict, folder: Path) -> Path:
    """Write the PNGs and ``index.html`` of the packing demo into ``folder``; returns the path of the latter."""
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
