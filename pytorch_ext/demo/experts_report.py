# SPDX-License-Identifier: Apache-2.0
"""The report of the experts demo: what adapters learn, what they route to, what serving them costs."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gapless.demo.report import PACKED, PADDED, Rows, Tables, axes_of, images, page, table

MIB = 2**20


def tables(result: dict[str, Any]) -> Tables:
    """(title, head, rows) of each table."""
    tested, made = result["tested"], {a["topic"]: a for a in result["adapters"]}
    total = result["settings"]["experts"]
    rows: Rows = [
        (
            topic,
            f"{sum(a['experts']) / len(a['experts']):.1f} of {total}, at most {max(a['experts'])}",
            f"{a['bytes'] / MIB:.1f} MiB",
            f"{a['load_seconds'] * 1e3:.1f} ms",
            f"{tested['base'][topic]:.3f}",
            f"{tested[topic][topic]:.3f}",
            f"{tested[topic][topic] - tested['base'][topic]:+.3f}",
        )
        for topic, a in made.items()
    ]
    head = ("adapter", "experts in a layer", "file", "load", "base's loss", "its loss", "")
    yield "Adapters, and nats per byte on text of their topic that nothing was trained on", head, rows
    rows = [
        (
            c["adapter"],
            str(c["rows"]),
            "the same" if c["same_tokens"] else "DIFFERENT",
            "the same to the bit" if c["same_logits"] else f"differ by up to {c['difference']:.2g}",
        )
        for c in result["served"]["compared"]
    ]
    count = len(result["served"]["asked"])
    yield (
        f"One batch of {count} rows on one base, against each merged model",
        ("rows of", "", "tokens", "logits"),
        rows,
    )
    yield "Memory", ("", "bytes", "of the base's experts"), _memory_rows(result["memory"])
    rows = []
    for phase, rates in result["speed"].items():
        (base, all_), share = rates.values(), rates["all adapters"] / rates["base only"] - 1
        rows.append((phase, f"{base:,.0f} tokens/s", f"{all_:,.0f} tokens/s", f"{share:+.1%}"))
    yield "Throughput", ("", "base only", "all adapters in one batch", ""), rows


def _memory_rows(m: dict[str, Any]) -> Rows:
    shown = [
        ("experts of the base model", m["experts"]),
        ("and of all adapters, what is needed", m["used"]),
        ("mapped by the store, in whole pages", m["mapped"]),
        ("resident, as the system counts it", m["resident"]),
        ("a padded tensor for every slot", m["padded"]),
        ("a merged copy of the experts for each adapter", m["experts"] * (1 + m["merged"] // m["model"])),
    ]
    return [
        (name, f"{size / MIB:,.1f} MiB", f"{size / m['experts']:.2f}x")
        if size
        else (name, "not known here", "")
        for name, size in shown
    ]


def plots(result: dict[str, Any]) -> dict[str, Figure]:
    """Figures by file name."""
    return {
        "losses.png": _losses(result["tested"]),
        "matrix.png": _matrix(result["tested"]),
        "routes.png": _routes(result["maps"]),
        "memory.png": _memory(result["memory"]),
        "speed.png": _speed(result["speed"]),
    }


def _losses(tested: dict[str, dict[str, float]]) -> Figure:
    figure, axes = axes_of("Loss on each topic")
    names = list(tested["base"])
    places = np.arange(len(names))
    for shift, label, color, values in (
        (-0.2, "base model", PADDED, [tested["base"][t] for t in names]),
        (0.2, "with the topic's adapter", PACKED, [tested[t][t] for t in names]),
    ):
        bars = axes.bar(places + shift, values, 0.36, label=label, color=color)
        axes.bar_label(bars, fmt="{:.2f}", fontsize=8)
    axes.set_xticks(places, names)
    axes.set_ylabel("nats per byte")
    axes.margins(y=0.2)
    axes.legend(frameon=False, ncols=2)
    return figure


def _matrix(tested: dict[str, dict[str, float]]) -> Figure:
    """What each adapter does to each topic, beside the base model."""
    figure, axes = axes_of("Change of loss: adapters down, topics across")
    names = list(tested["base"])
    values = np.array([[tested[a][t] - tested["base"][t] for t in names] for a in names])
    most = max(np.abs(values).max(), 1e-9)
    axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        strong = abs(value) > 0.6 * most
        axes.text(column, row, f"{value:+.2f}", ha="center", va="center", color="white" if strong else "#222")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    return figure


def _routes(maps: dict[str, Any]) -> Figure:
    """Of each topic how often each expert of each layer is chosen, and which were selected."""
    figure = Figure(figsize=(6.4, 1.5 * len(maps) + 0.6), layout="constrained")
    figure.suptitle("What the base's routers choose; dots: experts that were trained", fontsize=11)
    rows = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    high = max(float(m["scores"].max()) for m in maps.values())
    for axes, (topic, m) in zip(rows, maps.items(), strict=True):
        axes.imshow(
            m["scores"].numpy(), cmap="Blues", vmin=0, vmax=high, aspect="auto", interpolation="nearest"
        )
        points = [(e, row) for row, ids in enumerate(m["chosen"].values()) for e in ids]
        axes.scatter(*zip(*points, strict=True), s=9, color=PADDED)
        axes.set_yticks(range(len(m["chosen"])), [str(layer) for layer in m["chosen"]], fontsize=7)
        axes.set_ylabel(topic, fontsize=9)
    rows[-1].set_xlabel("expert; rows are layers")
    return figure


def _memory(m: dict[str, Any]) -> Figure:
    figure, axes = axes_of("Memory of all experts")
    shown = {
        "base only": m["experts"],
        "one base with\nall adapters": m["resident"] or m["mapped"],
        "padded": m["padded"],
        "merged copies": m["experts"] * (1 + m["merged"] // m["model"]),
    }
    colors = ["#c9c9c9", PACKED, PADDED, PADDED]
    bars = axes.bar(list(shown), [size / MIB for size in shown.values()], 0.5, color=colors)
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.set_ylabel("MiB")
    return figure


def _speed(speed: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    for axes, (phase, rates) in zip(figure.subplots(1, len(speed)), speed.items(), strict=True):
        bars = axes.bar(list(rates), list(rates.values()), 0.5, color=["#c9c9c9", PACKED])
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.set_title(f"{phase}, tokens per second")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _samples(compared: list[dict]) -> str:
    parts = []
    for c in compared:
        if c["adapter"] == "base":
            continue
        prompt = html.escape(c["prompt"])
        for who, text in (
            ("the base model", c["by_base"]),
            (f"the adapter for {c['adapter']}", c["continued"]),
        ):
            parts.append(
                f"<p><small>{html.escape(who)}</small></p><pre>{prompt}<b>{html.escape(text)}</b></pre>"
            )
    return f"<details><summary>What they write, after so little training</summary>{''.join(parts)}</details>"


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write the PNGs and ``index.html`` into ``folder``; returns the path of the latter."""
    figures = plots(result)
    carried = dict(zip(figures, images(figures, folder), strict=True))
    (first, second, third, fourth) = (
        f"<h2>{html.escape(title)}</h2>{table(head, rows)}" for title, head, rows in tables(result)
    )
    s, m = result["settings"], result["memory"]
    steps = result["adapters"][0]["steps"]
    parts = [
        f"<p>A DeepSeek-V2-Lite of {result['parameters'] / 1e6:.1f} million parameters, an eighth as wide: "
        f"{s['layers']} layers, of which {s['layers'] - 1} have {s['experts']} experts, {s['top_k']} for each token, "
        "and two shared ones. It learned the standard library's single modules byte by byte, in "
        f"{len(result['losses'])} steps. For each topic the experts that its routers choose most on the topic's text, "
        f"{s['top_p']:.0%} of all choices, were copied and trained alone for about {steps} steps (ESFT), written in "
        "ESFT's format, and loaded from there.</p>",
        first,
        carried["losses.png"],
        carried["matrix.png"],
        carried["routes.png"],
        second,
        _samples(result["served"]["compared"]),
        third,
        f"<p><small>Of the padded tensor a share of {1 - m['used'] / m['padded']:.0%} would be empty; F_mem is "
        f"{m['fragmentation']:.2f}.</small></p>",
        carried["memory.png"],
        fourth,
        carried["speed.png"],
    ]
    return page(folder, "Many adapters on one mixture of experts", parts, result["machine"])
