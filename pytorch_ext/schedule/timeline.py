# SPDX-License-Identifier: Apache-2.0
"""Draws what a schedule's ranks do when; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.micro_batches import KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gapless.schedule.simulate import Timeline

# Computing is blue, and darker backward; what makes others wait is warm.
_COLOURS = {
    "attention": ("#5b9bd0", "#2f6f9f"),
    "linear": ("#bcd9ec", "#8db8d6"),
    "node": ("#d98c7f", "#d98c7f"),
    "network": ("#b04a3a", "#b04a3a"),
    "host": ("#d9a441", "#d9a441"),
}
_NAMES = {
    "node": "waits for a node's links",
    "network": "waits for the network",
    "host": "waits for its host",
}
_WAITING = "#eeeeee"


def sample_of(timeline: Timeline, most: int) -> NDArray[np.int64]:
    """At most ``most`` ranks, ascending: the one that computes longest, the shortest, and others at even distances."""
    ranks = len(timeline.busy)
    if ranks <= most:
        return np.arange(ranks)
    ends = [int(timeline.busy.argmax()), int(timeline.busy.argmin())][:most]
    even = np.linspace(0, ranks - 1, most).astype(np.int64)
    others = even[~np.isin(even, ends)]
    keep = np.linspace(0, len(others) - 1, most - len(ends)).astype(np.int64)
    return np.unique(np.concatenate([np.array(ends), others[keep]]))


def figure(timeline: Timeline, *, title: str = "", most: int = 32) -> Figure:
    """One row for each rank, and each stage of one; of many ranks a sample, which the title states.

    Args:
        timeline: of ``simulate(schedule, spans=True)``.
        title: above the plot.
        most: ranks that are drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the timeline has no spans, or ``most`` is below 1.
    """
    try:
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing a timeline needs matplotlib: pip install 'gapless[demo]'") from error
    if timeline.spans is None:
        raise ValueError("the timeline has no spans: play the schedule with simulate(schedule, spans=True)")
    if most < 1:
        raise ValueError(f"most is {most}: at least one rank has to be drawn")
    ranks = sample_of(timeline, most)
    spans = timeline.spans[np.isin(timeline.spans["rank"], ranks)]
    rows = np.unique(np.stack([spans["rank"], spans["stage"]], 1), axis=0)
    idle = np.setdiff1d(ranks, rows[:, 0])
    rows = np.concatenate([rows, np.stack([idle, np.zeros_like(idle)], 1)])
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    staged = bool((rows[:, 1] > 0).any())
    width = int(rows[:, 1].max(initial=0)) + 1
    place = np.searchsorted(rows[:, 0] * width + rows[:, 1], spans["rank"] * width + spans["stage"])

    out = Figure(figsize=(10, 1.4 + 0.22 * len(rows)), layout="constrained")
    axes = out.subplots()
    axes.barh(np.arange(len(rows)), timeline.makespan, height=0.8, color=_WAITING)
    legend = []
    for kind, name in enumerate(KINDS):
        chosen = spans["kind"] == kind
        for backward in (False, True):
            some = chosen & (spans["backward"] == backward)
            y, begin, end = place[some], spans["begin"][some], spans["end"][some]
            corners = np.stack([begin, y - 0.4, begin, y + 0.4, end, y + 0.4, end, y - 0.4], 1)
            axes.add_collection(
                PolyCollection(
                    list(corners.reshape(-1, 4, 2)), facecolor=_COLOURS[name][backward], linewidth=0
                )
            )
            # Attention and linear modules go forward and backward; waits look the same both ways.
            if some.any() and (kind < 2 or not backward):
                way = (", backward" if backward else ", forward") if kind < 2 else ""
                legend.append(Patch(color=_COLOURS[name][backward], label=_NAMES.get(name, name) + way))
    legend.append(Patch(color=_WAITING, label="waits for others"))
    names = [f"{rank}, stage {stage}" if staged else f"{rank}" for rank, stage in rows.tolist()]
    axes.set_yticks(np.arange(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, timeline.makespan or 1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("rank")
    axes.spines[["top", "right", "left"]].set_visible(False)
    some_of = f"{len(ranks)} of {len(timeline.busy)} ranks: the busiest, the idlest, and others evenly"
    axes.set_title(
        title if len(ranks) == len(timeline.busy) else f"{title}\n({some_of})".strip(), fontsize=10
    )
    out.legend(handles=legend, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return out


def draw(timeline: Timeline, path: str | Path, *, title: str = "", most: int = 32) -> None:
    """Write :func:`figure` to ``path``: .svg, .png or .pdf."""
    metadata = {"Date": None} if Path(path).suffix == ".svg" else None
    figure(timeline, title=title, most=most).savefig(path, dpi=150, metadata=metadata)
