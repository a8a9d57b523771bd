# SPDX-License-Identifier: Apache-2.0
"""What reports of the demos share: tables, plots as PNG, one HTML file that carries them, and how every demo ends."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console, RenderableType
from rich.table import Table

from gapless.bench.machine import machine, machine_line

Rows = list[tuple[str, ...]]
Tables = Iterator[tuple[str, tuple[str, ...], Rows]]  # title, head, rows of each

PADDED, PACKED = "#b04a3a", "#2f6f9f"
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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


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


def printable(tables: Tables) -> Iterator[Table]:
    """The same tables for the terminal."""
    for title, head, rows in tables:
        made = Table(*head[:1], box=None, pad_edge=False, title=title, title_justify="left")
        for name in head[1:]:
            made.add_column(name, justify="right")
        for row in rows:
            made.add_row(*row)
        yield made


def finish(
    result: dict[str, Any], out: Path, write: Callable[[dict[str, Any], Path], Path], *shown: RenderableType,
    begin: float, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """The end of a demo that began at ``begin``: print what is ``shown``, write the page and ``result.json``."""
    result = result | {"machine": machine(), "seconds": time.perf_counter() - begin}
    for part in shown:
        console.print(part)
    console.print(machine_line(result["machine"]), style="dim", highlight=False, markup=False)
    index = write(result, out)
    (out / "result.json").write_text(json.dumps(_plain(result), indent=2) + "\n")
    console.print(f"report: {index.resolve()}", highlight=False, markup=False)
    return result | {"report": str(index)}


def _plain(value: Any) -> Any:
    """For JSON: maps are pictures, not numbers, and infinity is no number there."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items() if name != "maps"}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
