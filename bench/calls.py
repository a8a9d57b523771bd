# SPDX-License-Identifier: Apache-2.0
"""Calls whose ratios answer a question: made and checked one by one, then timed in the same rounds.

Every ratio is the median over rounds of the ratio inside a round, so that a machine whose speed drifts does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gapless.bench.measure import Tell, Timing, interleave, ratio


@dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
        run: the call.
        verdict: ``ok``, or in what its result is wrong.
        flops: useful operations; 0 where they are not the point.
        density: of the blocks, where there are any.
        peer: not ours.
        baseline: the call of the same case that it is compared with.
        ideal: its time, if nothing were lost, as a share of the baseline's.
        others: more calls that it is compared with.
        fields: of its row in a report, besides.
    """

    run: Callable[[], object]
    verdict: Callable[[], str] = lambda: "ok"
    flops: float = 0.0
    density: float | None = None
    peer: bool = False
    baseline: str | None = None
    ideal: float | None = None
    others: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


Makers = dict[str, Callable[[], Call]]  # by name; nothing is made before it is needed
Skipped = dict[str, list[str]]  # who is left out, and why


def row_of(case: Any, call: Call, workload: str, sizes: Sequence[str]) -> dict:
    """What a row says about its case before anything is measured; ``sizes`` are names of the case's attributes."""
    return {
        "case": case.label,
        "workload": workload,
        "block": None,  # rows that have one are shown in a table of their case
        **{name: getattr(case, name) for name in (*sizes, "dtype", "direction", "device")},
        "flops": call.flops,
        "key_bytes": 0,
        "baseline": call.baseline,
        "relative": None,
        "efficiency": None,
        "extra_bytes": None,
        "sgemm_flops_per_second": None,
        "read_bytes_per_second": None,
    }


def why_broken(error: Exception) -> list[str]:
    """What to say of a peer that broke."""
    return [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"]


def time_calls(
    makers: Makers,
    skipped: Skipped,
    describe: Callable[[Call], dict],
    *,
    may_break: Callable[[str], bool],
    rounds: int,
    seconds: float,
    device: str,
    paired: bool = True,
    anchors: Mapping[str, tuple[Callable[[], object], int]] | None = None,
    tell: Tell = lambda text: None,
) -> list[dict]:
    """Rows of the calls. Who breaks and may (a peer) is added to ``skipped``.

    Args:
        describe: what a row says about its case.
        paired: as in :func:`gapless.bench.measure.interleave`; there are no ratios without it.
        anchors: further calls to time, each with its work: that of ``name`` makes a field ``name_per_second``.
    """
    calls: dict[str, Call] = {}
    verdicts: dict[str, str] = {}
    for name, make in makers.items():
        tell(f"checking {name}")
        try:
            call = make()
            verdicts[name] = call.verdict()
        except Exception as error:  # a peer that breaks must not take the table with it
            if not may_break(name):
                raise
            skipped[name] = why_broken(error)
            continue
        calls[name] = call
    tell("timing " + ", ".join(calls))
    # What is wrong is not timed; peers are, how exact they are is theirs to choose.
    runs = {name: c.run for name, c in calls.items() if c.peer or verdicts[name] == "ok"}
    anchors = anchors or {}
    timed = interleave(
        runs | {f"/{name}": anchor[0] for name, anchor in anchors.items()},
        rounds=rounds,
        seconds=seconds,
        device=device,
        paired=paired,
    )
    rates = {f"{name}_per_second": work / timed[f"/{name}"].median for name, (_, work) in anchors.items()}
    return [
        describe(call)
        | rates
        | dict(call.fields)
        | {"impl": name, "peer": call.peer, "check": verdicts[name]}
        | _times(call, timed.get(name), timed, paired)
        for name, call in calls.items()
    ]


def _times(call: Call, timing: Timing | None, timed: Mapping[str, Timing], paired: bool) -> dict:
    found: dict = {
        "seconds": timing.median if timing else None,
        "samples": len(timing.samples) if timing else 0,
    }
    if timing and paired:
        if call.baseline in timed:
            found["relative"] = ratio(timing, timed[call.baseline])
            found["efficiency"] = call.ideal / found["relative"] if call.ideal else None
        others = {name: ratio(timing, timed[name]) for name in call.others if name in timed}
        if others:
            found["others"] = others
    return found
