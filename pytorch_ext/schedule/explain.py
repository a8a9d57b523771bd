# SPDX-License-Identifier: Apache-2.0
"""What a schedule costs, and why its ranks wait, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

    from gapless.schedule.schedule import Schedule
    from gapless.schedule.simulate import Timeline


def explain(schedule: Schedule, timeline: Timeline | None = None) -> dict[str, Any]:
    """Plain values that JSON holds; of ``timeline`` if given, else of the schedule played with default options.

    Keys:
        planner, sequences, tokens, ranks, packs, steps: what it is.
        makespan, lower_bound, gap: seconds, seconds, and their quotient less 1.
        idle_share, idle_by_reason: of all ranks' time; see :class:`gapless.schedule.simulate.Timeline` for the reasons.
        busiest_rank: the rank that computes longest, and for how many seconds.
        bytes: moved over node links, the network, and to or from hosts.
        micro_batches: [fewest, most] of a rank.
        ranks_per_sequence: how many sequences of at least one token are computed by how many ranks.
        padding: slots for tokens that stay empty in micro-batches: how many, and which share of all slots.
        offloaded: share of all tokens' activations that goes to the host, of layers that may.
    """
    s = schedule
    played = s.timeline if timeline is None else timeline
    gap = played.makespan / s.lower_bound - 1 if s.lower_bound else 0.0
    pack = np.repeat(np.arange(s.packs), s.ring_sizes)
    held = s.pack_tokens[pack] / s.ring_sizes[pack]
    steps = max(s.micro_steps, 1)
    batch = np.unique(s.ring_ranks * steps + s.steps[pack])
    counts = np.bincount(batch // steps, minlength=s.ranks)
    slots = float(s.capacity[batch // steps].sum())
    resident = float((held * s.cost.resident_share(s.offload[pack])).sum())
    sizes, sequences = np.unique(s.ring_sizes[s.pack_of[s.lengths > 0]], return_counts=True)
    busiest = int(played.busy.argmax())
    return {
        "planner": s.planner,
        "sequences": len(s.lengths),
        "tokens": s.tokens,
        "ranks": s.ranks,
        "packs": s.packs,
        "steps": s.micro_steps,
        "makespan": played.makespan,
        "lower_bound": s.lower_bound,
        "gap": gap,
        "idle_share": played.idle,
        "idle_by_reason": played.idle_by_reason,
        "busiest_rank": {"rank": busiest, "seconds": float(played.busy[busiest])},
        "bytes": dict(played.bytes),
        "micro_batches": [int(counts.min()), int(counts.max())],
        "ranks_per_sequence": dict(zip(sizes.tolist(), sequences.tolist(), strict=True)),
        "padding": {"tokens": slots - resident, "share": 1 - resident / slots if slots else 0.0},
        "offloaded": float((held * s.offload[pack]).sum()) / s.tokens if s.tokens else 0.0,
    }


def table(schedule: Schedule, timeline: Timeline | None = None) -> Table:
    """The same for a terminal; needs rich."""
    from rich.table import Table

    row = explain(schedule, timeline)
    out = Table(box=None, show_header=False, pad_edge=False)
    out.add_column()
    out.add_column()
    few, many = row["micro_batches"]
    rings = row["ranks_per_sequence"]
    waits = {k: v for k, v in row["idle_by_reason"].items() if v >= 5e-4}
    moved = {k: v for k, v in row["bytes"].items() if v}
    for name, text in (
        ("planner", row["planner"] or "none"),
        ("batch", f"{row['sequences']:,} sequences, {row['tokens']:,} tokens"),
        ("packs", f"{row['packs']:,} in {row['steps']:,} steps on {row['ranks']:,} ranks"),
        ("makespan", f"{row['makespan']:.4g} s, {100 * row['gap']:.1f}% over {row['lower_bound']:.4g} s"),
        ("idle", _shares(row["idle_share"], waits)),
        ("busiest", "rank {rank}: {seconds:.4g} s".format(**row["busiest_rank"])),
        ("moved", ", ".join(f"{k} {v / 1e9:,.4g} GB" for k, v in moved.items()) or "nothing"),
        ("micro-batches", f"{few} to {many} a rank"),
        ("ranks a sequence", ", ".join(f"{k}: {v:,}" for k, v in rings.items()) or "none"),
        ("empty slots", f"{100 * row['padding']['share']:.1f}%"),
        ("offloaded", f"{100 * row['offloaded']:.1f}%"),
    ):
        out.add_row(name, text)
    return out


def _shares(total: float, parts: dict[str, float]) -> str:
    reasons = ", ".join(f"{name} {100 * share:.1f}%" for name, share in parts.items())
    return f"{100 * total:.1f}%" + (f": {reasons}" if reasons else "")
