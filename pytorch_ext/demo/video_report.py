# SPDX-License-Identifier: Apache-2.0
"""The report of the video demo: tables, speed against quality, and maps of what was found."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from gapless.demo.report import PACKED, PADDED, Rows, Tables, axes_of, images, page, table

CAVEAT = (
    "Random weights show speed, not quality: their attention has no structure to find, and what a mask leaves out "
    "would be as important as what it keeps. The smooth fields have structure; quality on a trained model is for that "
    "model to show."
)
COLORS = {
    "torch": "#888888", "dense": "#222222", "AdaSpa": PACKED, "attention tile": PADDED, "random": "#999955",
}  # fmt: skip
STYLES = {"dense": "#c9c9c9", "fused search": "#e0a030", "cached search": "#e0a030", "sparse": PACKED}
MOST_HEADS = 4  # in a picture


def _decibels(value: float) -> str:
    return "the same" if math.isinf(value) else f"{value:.1f} dB"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.2f} s"


def tables(result: dict[str, Any]) -> Tables:
    """(title, head, rows) of each table that there is something for."""
    if weights := result["weights"]:
        dense = next(v for v in weights["variants"] if v["family"] == "dense")
        rows: Rows = [
            (
                v["name"],
                f"{v['density']:.1%}",
                f"{v['recall']:.1%}",
                _seconds(v["step_seconds"]),
                f"{dense['step_seconds'] / v['step_seconds']:.2f}x",
                _seconds(v["run_seconds"]),
                f"{dense['run_seconds'] / v['run_seconds']:.2f}x",
                f"{v['search_share']:.1%}",
                _decibels(v["psnr"]),
            )
            for v in weights["variants"]
        ]
        head = ("", "density", "recall", "step", "", "run", "", "search", "PSNR")
        yield f"{weights['steps']} steps through random weights", head, rows
    if fields := result["fields"]:
        rows = [
            ("dense", "100.0%", "100.0%", _seconds(fields["dense_seconds"]), "1.00x", _decibels(math.inf))
        ]
        rows += [
            (
                row["name"],
                f"{row['density']:.1%}",
                f"{row['recall']:.1%}",
                _seconds(row["seconds"]),
                f"{row['speedup']:.2f}x",
                _decibels(row["psnr"]),
            )
            for row in fields["rows"]
        ]
        yield "One attention on smooth fields", ("", "density", "recall", "attention", "", "PSNR"), rows


def _speed_and_quality(title: str, xlabel: str, points: list[tuple[str, str, float, float]]) -> Figure:
    """Points are (name, family, speed-up, dB); those with no error are left out."""
    figure, axes = axes_of(title)
    shown = [p for p in points if math.isfinite(p[3])]
    for family in dict.fromkeys(p[1] for p in shown):
        own = sorted((p[2], p[3]) for p in shown if p[1] == family)
        axes.plot(*zip(*own, strict=True), "o-", color=COLORS[family], label=family, linewidth=1)
    for name, _, speed, quality in shown:
        axes.annotate(name.split(", ")[-1], (speed, quality), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("PSNR against dense, dB")
    axes.margins(0.15)
    if shown:
        axes.legend(frameon=False)
    return figure


def _step_bars(variants: list[dict]) -> Figure:
    """Seconds of every step of every variant, one row of boxes each."""
    figure, axes = axes_of("Where the time of a run goes")
    for y, variant in enumerate(reversed(variants)):
        left = 0.0
        for step in variant["steps"]:
            color = STYLES.get(step["kind"], PACKED)
            axes.barh(y, step["seconds"], left=left, color=color, edgecolor="white", linewidth=0.6)
            left += step["seconds"]
    axes.set_yticks(range(len(variants)), [v["name"] for v in reversed(variants)], fontsize=7)
    axes.set_xlabel("seconds; grey steps are dense, yellow ones search")
    return figure


def _maps(title: str, mass: Tensor, mask: Tensor, names: list[str]) -> Figure:
    """Of each head the mass of the blocks above, the blocks that were kept below."""
    heads = min(MOST_HEADS, mass.shape[0])
    figure = Figure(figsize=(2.4 * heads, 5.2), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(2, heads, squeeze=False)
    high = float(mass.max())
    norm = LogNorm(max(high / 1e4, 1e-12), max(high, 1e-11), clip=True)
    for head in range(heads):
        above, below = grid[0, head], grid[1, head]
        above.imshow(mass[head].numpy(), norm=norm, cmap="viridis", interpolation="nearest")
        below.imshow(mask[head].numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        above.set_title(names[head], fontsize=9)
        for axes in (above, below):
            axes.set_xticks([])
            axes.set_yticks([])
    grid[0, 0].set_ylabel("weight of blocks, log")
    grid[1, 0].set_ylabel("blocks that were kept")
    return figure


def plots(result: dict[str, Any]) -> dict[str, Figure]:
    """Figures by file name."""
    made: dict[str, Figure] = {}
    if weights := result["weights"]:
        variants = weights["variants"]
        dense = next(v for v in variants if v["family"] == "dense")
        points = [
            (v["name"], v["family"], dense["step_seconds"] / v["step_seconds"], v["psnr"])
            for v in variants
            if v["family"] not in ("torch", "dense")
        ]
        made["weights-speed-quality.png"] = _speed_and_quality(
            "Random weights: speed and difference", "speed-up of a sparse step over dense", points
        )
        made["weights-steps.png"] = _step_bars(variants)
        names = [f"head {h}" for h in range(len(weights["maps"]["mass"]))]
        made["weights-maps.png"] = _maps("Random weights, first layer", **weights["maps"], names=names)
    if fields := result["fields"]:
        points = [(r["name"], r["family"], r["speedup"], r["psnr"]) for r in fields["rows"]]
        made["fields-speed-quality.png"] = _speed_and_quality(
            "Smooth fields: speed and quality", "speed-up of attention over dense", points
        )
        made["fields-maps.png"] = _maps(
            "Smooth fields through rotary positions", **fields["maps"], names=fields["heads"]
        )
    return made


def _tile_table(rows: list[dict]) -> str:
    """The search of attention tiles: error, density and time of each layer under each mask."""
    shown = [
        (
            str(r["layer"]),
            "dense" if r["k"] is None else str(r["k"]),
            f"{r['density']:.1%}",
            f"{r['error']:.3f}",
            _seconds(r["seconds"]),
            "taken" if r["chosen"] else "",
        )
        for r in rows
    ]
    head = ("layer", "reference frames", "density", "error", "attention", "")
    return f"<details><summary>Each layer under each mask</summary>{table(head, shown)}</details>"


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write the PNGs and ``index.html`` into ``folder``; returns the path of the latter."""
    figures = plots(result)
    carried = dict(zip(figures, images(figures, folder), strict=True))
    found = {title: table(head, rows) for title, head, rows in tables(result)}
    settings = result["settings"]
    tokens = settings["frames"] * settings["height"] * settings["width"]
    size = f"{settings['frames']} latent frames of {settings['height']} x {settings['width']} tokens, {tokens} in all"
    parts = [f"<p><b>{html.escape(CAVEAT)}</b></p>"]
    titles = iter(found)
    if weights := result["weights"]:
        title = next(titles)
        first, second = weights["search_steps"]
        parts += [
            f"<h2>{html.escape(title)}</h2>",
            f"<p>A Wan transformer of {weights['parameters'] / 1e6:.1f} million parameters ({settings['layers']} "
            f"layers, {settings['heads']} heads of {settings['dim']}) in diffusers' WanPipeline with its flow-matching "
            f"scheduler, float32, {size}, blocks of {settings['block']}. Its feed-forward layers are as narrow as the "
            "rest, so that attention has the share of the time that it has in large models. AdaSpa is dense up to step "
            f"{first}, which searches, and searches again at step {second}: the paper's schedule, to scale. Attention "
            "tiles are fixed masks; the searched one gives each layer the sparsest whose output differs by at most "
            f"{settings['threshold']:g}.</p>",
            found[title],
            "<p><small>density: blocks computed in a sparse step; recall: attention weights that lie in them, for the "
            "tiles those of the first steps; step: a sparse step of all layers, and how many times faster than a dense "
            "one; run: all steps, with warm-up and searches; search: its share of the run; PSNR: the final latents "
            "against those of the dense run.</small></p>",
            carried["weights-speed-quality.png"],
            carried["weights-steps.png"],
            _tile_table(weights["tiles"]),
        ]
    if result["fields"]:
        title = next(titles)
        parts += [
            f"<h2>{html.escape(title)}</h2>",
            "<p>Queries and keys are smooth 3-D fields through rotary positions, of which each head knows its own: all "
            "of them, the place in the picture, the time, or none but the content. The masks that AdaSpa finds are "
            "what these heads look at: bands beside the diagonal, the same place in every frame, whole frames. As many "
            "blocks at random find about as much weight as their density says.</p>",
            found[title],
            carried["fields-speed-quality.png"],
        ]
    maps = [carried[name] for name in ("fields-maps.png", "weights-maps.png") if name in carried]
    parts += ["<h2>What was found</h2>", *maps]
    return page(folder, "Dense and sparse video attention", parts, result["machine"])
