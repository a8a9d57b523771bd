# SPDX-License-Identifier: Apache-2.0
"""What is asked of experts: the studies, their sizes, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from gapless.bench import (
    expert_check,
    expert_grouped,
    expert_ids,
    expert_peers,
    expert_serving,
    expert_store,
    measure,
)
from gapless.bench.calls import Call, Makers, Skipped, row_of, time_calls
from gapless.bench.expert_cases import ExpertCase, Layer
from gapless.bench.expert_ids import Names, users
from gapless.bench.measure import Tell
from gapless.bench.peers import Implementation

READ = 1 << 30  # bytes whose reading gives the read rate: far beyond any cache


def layer(case: ExpertCase, names: Names) -> tuple[Makers, Skipped]:
    """A layer's experts by everybody."""
    problem = cache(lambda: Layer.make(case))
    check = cache(lambda: expert_check.LayerCheck(problem()))

    def make(implementation: Implementation, share: float) -> Call:
        # Nobody finds in a cache what another read just before.
        run = implementation.prepare(problem().starting_at(share))
        reads = problem().read_bytes if case.direction == "fwd" else 0
        return Call(
            run.call(case.direction),
            lambda: expert_check.verdict(lambda: check()(implementation.prepare)),
            case.flops,
            peer=implementation.peer,
            fields={"key_bytes": reads},
        )

    if names is not None:  # other studies have peers of other names
        names = ["gapless", *(n for n in names if ":" in n or n in expert_peers.IMPLEMENTATIONS)]
    running, skipped = expert_peers.select(names, case)
    shares = ((i, n / len(running)) for n, i in enumerate(running))
    return {i.name: lambda i=i, share=share: make(i, share) for i, share in shares}, skipped


def _rates(case: ExpertCase) -> dict:
    return {"sgemm_flops": measure.sgemm(case.device), "read_bytes": measure.read(READ, case.device)}


@dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        makers: the calls of a case, with those asked for by name, and who is left out and why.
        tokens: the numbers of them that it is asked for.
        own: calls that are timed whatever peers are asked for.
        paired: ratios are those inside a round; without it slow peers have fewer samples.
        sizes: of its cases, where they differ from :class:`ExpertCase`'s.
        directions: that have a meaning.
        anchors: what its rates are shares of.
        measure: makes the rows, where calls in turns are not the way.
        of_ids: integers are all there is, so dtypes mean nothing.
    """

    makers: Callable[[ExpertCase, Names], tuple[Makers, Skipped]]
    tokens: tuple[int, ...]
    own: tuple[str, ...] = ("gapless",)
    paired: bool = True
    sizes: dict[str, Any] = field(default_factory=dict)
    directions: tuple[str, ...] = ("fwd",)
    anchors: Callable[[ExpertCase], dict] = lambda case: {}
    of_ids: bool = False
    measure: Callable[..., tuple[list[dict], list[dict]]] | None = None


IDS = {"experts": 256, "top_k": 8, "adapters": 64, "max_experts": 32}
STUDIES = {
    "reroute": Study(expert_ids.reroute, (8192, 1), sizes=IDS, of_ids=True),
    "align": Study(expert_ids.align, (4096, 1), sizes=IDS, of_ids=True),
    "reroute_align": Study(
        expert_ids.reroute_align,
        (4096, 1),
        own=("align", "reroute_align", "reroute, then align"),
        sizes=IDS,
        of_ids=True,
    ),
    "layer": Study(layer, (1, 64, 4096), paired=False, directions=("fwd", "fwd_bwd"), anchors=_rates),
    "grouped_mm": Study(expert_grouped.grouped_mm, (4096,), paired=False, anchors=expert_grouped.anchors),
    "merged": Study(
        expert_serving.merged,
        (4096, 64, 1),
        own=("merged", "merged, a second copy", "gapless", "rerouted by torch"),
    ),
    "adapters": Study(
        expert_serving.adapters,
        (4096, 64),
        own=("base only", "rerouted before", "gapless", "rerouted by torch"),
        sizes={"inter": 704, "shared": 1408},  # DeepSeek-V2-Lite with every width halved
    ),
    "store": Study(
        lambda case, names: ({}, {}),
        (64,),
        sizes={
            "hidden": 512,
            "inter": 352,
            "layers": 8,
        },  # the same with widths quartered, and 8 of 26 layers
        measure=expert_store.measure,
    ),
}


def calls(case: ExpertCase, names: Names = None) -> tuple[Makers, Skipped]:
    """The calls of a case: ours, and of the peers those that are named, all if None."""
    study = STUDIES[case.study]
    makers, skipped = study.makers(case, names)
    if names is not None:
        makers = {name: make for name, make in makers.items() if name in study.own or name in names}
        skipped = {name: why for name, why in skipped.items() if name in names}
    return makers, skipped


def cases_of(
    study: str,
    *,
    tokens: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
    **options: Any,
) -> Iterable[ExpertCase]:
    """Every combination that has a meaning in the study; what is None is as the study has it.

    Raises:
        ValueError: a study that is not known, or a value that a case refuses.
    """
    if study not in STUDIES:
        raise ValueError(f"study is {study!r}: it has to be one of {', '.join(STUDIES)}")
    known = STUDIES[study]
    sizes = known.sizes | {name: value for name, value in options.items() if value is not None}
    kinds = ids or ["int64"] if known.of_ids else dtypes or ["float32"]
    for kind in kinds:
        for direction in directions or ["fwd"]:
            for count in tokens or known.tokens:
                how = {"ids" if known.of_ids else "dtype": kind, "direction": direction}
                case = ExpertCase(study, count, **sizes | how)
                if direction in known.directions:
                    yield case


def check_names(names: Names, cases: Iterable[ExpertCase]) -> None:
    """Raise a ValueError for a name that none of the cases has a call of, or a path that leads nowhere."""
    users(names)
    if all(":" in name for name in names or ()):
        return
    known = dict.fromkeys(name for case in cases for found in calls(case) for name in found)
    for name in names or ():
        if ":" not in name and name not in known:
            raise ValueError(f"impl is {name!r}: it has to be module:function or one of {', '.join(known)}")


def describe(case: ExpertCase, call: Call) -> dict:
    """What a row says about its case."""
    sizes = ("tokens", "experts", "top_k", "hidden", "inter", "adapters", "max_experts", "block", "ids")
    return row_of(case, call, case.study, sizes)


def measure_case(
    case: ExpertCase,
    impls: Iterable[str] | None = None,
    *,
    rounds: int = 50,
    seconds: float = 20.0,
    tell: Tell = lambda text: None,
) -> tuple[list[dict], list[dict]]:
    """Rows of one case, and what was skipped and why; see :func:`gapless.bench.measure.measure`."""
    study = STUDIES[case.study]
    if study.measure is not None:
        row = lambda call: describe(case, call)  # noqa: E731
        return study.measure(case, row, rounds=rounds, seconds=seconds, tell=tell)
    makers, skipped = calls(case, None if impls is None else list(impls))
    rows = time_calls(
        makers,
        skipped,
        lambda call: describe(case, call),
        may_break=lambda name: name not in study.own,
        rounds=rounds,
        seconds=seconds,
        device=case.device,
        paired=study.paired,
        anchors=study.anchors(case),
        tell=tell,
    )
    return rows, [{"case": case.label, "impl": name, "why": why} for name, why in skipped.items()]
