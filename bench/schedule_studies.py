# SPDX-License-Identifier: Apache-2.0
"""What is asked of planners: the studies behind ``gapless bench schedule``, and their rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, product
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gapless.schedule import CostModel, Schedule, traces
from gapless.schedule.planners import planner

if TYPE_CHECKING:
    from rich.table import Table

Tell = Callable[[str], object]
Row = dict[str, Any]

CAPACITY = 8192
CONTEXT = 2 * 2**20
RANKS = (1024, 2048, 4096, 8192, 12288)
REPEATS = 3


def _batch(trace: str, tokens: int, context: int | None = CONTEXT, seed: int = 0) -> NDArray[np.int64]:
    return traces.sample(trace, tokens=tokens, context=context, seed=seed)


def _timed(make: Callable[[], Schedule]) -> tuple[Schedule, float]:
    """A schedule, certified as all are, and the seconds of making it: the median of some times."""
    spent = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        schedule = make()
        spent.append(time.perf_counter() - begin)
    return schedule, median(spent)


def _row(study: str, case: str, name: str, schedule: Schedule, **more: Any) -> Row:
    return {
        "study": study,
        "case": case,
        "planner": name,
        "makespan": schedule.makespan,
        "over_bound": schedule.makespan / schedule.lower_bound if schedule.lower_bound else 1.0,
        "idle": schedule.timeline.idle,
    } | more


def decided_by_one(schedule: Schedule) -> bool:
    """Whether some sequence alone, on as many ranks as may be, takes longer than the bound of the whole batch."""
    longest = int(schedule.lengths.max(initial=0))
    if not longest:
        return False
    cost, ranks = schedule.cost, np.arange(1, schedule.ranks + 1)
    cluster = schedule.cluster
    across, width = ranks > cluster.ranks_per_node, cluster.widths(ranks, schedule.two_level)
    alone = cost.seconds(longest, float(cost.cells(longest)), ranks, across, width, cluster.sharing)
    return bool(alone.min() > schedule.lower_bound)


def planning(tell: Tell) -> Iterator[Row]:
    """Seconds of planning 32M tokens, on one core, and their share of the step that they plan."""
    cost = CostModel.published("bytescale-gpu")
    for trace in ("byted", "github"):
        batch = _batch(trace, traces.GLOBAL_BATCH)
        for ranks in RANKS:
            tell(f"{trace}, {ranks} ranks")
            schedule, spent = _timed(
                partial(planner("hdp"), batch, ranks=ranks, capacity=CAPACITY, cost=cost)
            )
            share = spent / schedule.makespan
            yield _row("planning", f"{trace} {ranks}", "hdp", schedule, planned_in=spent, share_of_step=share)


def balance(tell: Tell) -> Iterator[Row]:
    """How far every planner's makespan is above the lower bound, on the large traces."""
    cost = CostModel.published("bytescale-gpu")
    for trace, context, ranks in product(("byted", "github"), (CONTEXT // 8, CONTEXT), RANKS):
        # Tokens in proportion to the ranks, as in practice: 32K a rank.
        batch = _batch(trace, 32768 * ranks, context)
        case = f"{trace}, {context // 1024}K context, {ranks} ranks"
        for name in ("hdp", "zeppelin") if ranks <= RANKS[1] else ("hdp",):
            tell(f"{case}: {name}")
            schedule = planner(name)(batch, ranks=ranks, capacity=CAPACITY, cost=cost)
            yield _row("balance", case, name, schedule, decided_by_one=decided_by_one(schedule))


# trace, tokens, context, ranks, capacity: at equal caps, what planners of whole sequences can do too.
PEER_CASES = (
    ("megatron", 2**20, 8192, 32, 8192),
    ("megatron", 2**22, 8192, 64, 8192),
    ("code", 2**24, 65536, 64, 65536),
    ("hydraulis", 2**24, 32768, 64, 32768),
    ("github", 2**25, 131072, 64, 131072),
    ("byted", 2**25, 131072, 64, 131072),
    ("github", 2**25, CONTEXT, 1024, 8192),
    ("byted", 2**25, CONTEXT, 1024, 8192),
)
PEERS = (
    "karmarkar-karp",
    "lpt",
    "multifit",
    "wlb",
    "dynamic-cp",
    "hybrid-cp",
    "static-cp",
    "hdp, one level",
    "hdp",
    "zeppelin",
)


def peers(tell: Tell) -> Iterator[Row]:
    """All planners on all shared traces, at equal caps."""
    cost = CostModel.published("bytescale-gpu")
    for trace, tokens, context, ranks, capacity in PEER_CASES:
        batch = _batch(trace, tokens, context)
        case = f"{trace}, {tokens // 2**20}M tokens, {context // 1024}K context, {ranks} ranks of {capacity // 1024}K"
        for name in PEERS:
            tell(f"{case}: {name}")
            try:
                schedule = _peer(name, batch, ranks, capacity, cost)
            except ValueError:
                continue  # a sequence is longer than a rank holds: the other table rows say so
            yield _row("peers", case, name, schedule)


def _peer(name: str, batch: NDArray[np.int64], ranks: int, capacity: int, cost: CostModel) -> Schedule:
    if name != "wlb":
        name, flat, _ = name.partition(", one level")
        options = {"two_level": False} if flat else {}
        return planner(name)(batch, ranks=ranks, capacity=capacity, cost=cost, **options)
    from gapless.schedule.wlb import WlbPacker

    # Nothing may wait for a later batch here: as few micro-batches as carry nothing over.
    fewest = -(-int(batch.sum()) // (ranks * capacity))
    for count in range(fewest, 2 * fewest + 4):
        packer = WlbPacker(
            ranks=ranks, capacity=capacity, cost=cost, micro_batches=count, levels=[capacity + 1]
        )
        iteration = packer.next(batch)
        if len(iteration.numbers) == len(batch):
            return iteration.schedule
    raise ValueError("WLB-LLM's packing carries sequences over however many micro-batches there are")


def optimum(tell: Tell) -> Iterator[Row]:
    """Every planner against the shortest schedule there is, on stored small batches."""
    from gapless.bench import schedule_optimum

    for row in schedule_optimum.regrets(tell=tell):
        yield {"study": "optimum", "case": "stored small batches"} | row


def ablation(tell: Tell) -> Iterator[Row]:
    """ByteScale's ablation and its trend over contexts, simulated."""
    from gapless.bench import schedule_ablation

    for row in schedule_ablation.run(tell=tell):
        yield {"study": "ablation"} | row


def hydraulis(tell: Tell) -> Iterator[Row]:
    """Choosing a parallel strategy for each batch against one strategy for all, and the greedy against the optimum."""
    from gapless.bench import schedule_hydraulis

    for row in schedule_hydraulis.run(tell=tell):
        yield {"study": "hydraulis"} | row


STUDIES: dict[str, Callable[[Tell], Iterator[Row]]] = {
    f.__name__: f for f in (planning, balance, peers, optimum, ablation, hydraulis)
}


def named(names: list[str] | None) -> list[Callable[[Tell], Iterator[Row]]]:
    """The studies of these names, or all. Raises ValueError where there is none of a name."""
    for name in names or []:
        if name not in STUDIES:
            raise ValueError(f"study is {name!r}: it has to be one of {', '.join(STUDIES)}")
    return [STUDIES[name] for name in names or STUDIES]


def tables(rows: list[Row]) -> Iterator[Table]:
    """A table for each study, whose columns are what its rows have."""
    from rich.table import Table

    for study, group in groupby(rows, key=lambda row: row["study"]):
        found = list(group)
        columns = list(dict.fromkeys(name for row in found for name in row if name not in ("study", "case")))
        table = Table(box=None, pad_edge=False, title=study, title_justify="left")
        for i, name in enumerate(columns):
            table.add_column(name.replace("_", " "), justify="right" if i else "left")
        for case, of_case in groupby(found, key=lambda row: row["case"]):
            table.add_row(str(case), style="cyan")
            for row in of_case:
                table.add_row(*(_cell(row.get(name)) for name in columns))
        yield table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
