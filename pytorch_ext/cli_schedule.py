# SPDX-License-Identifier: Apache-2.0
"""Commands about schedules: `gapless plan` and `gapless calibrate`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gapless.cli_options import Json, Planners, plain_errors
from gapless.schedule import Cluster, CostModel, ModelShape, Schedule


def _read_lengths(lengths: Path | None, column: str | None, trace: str, tokens: int, context: int, seed: int):
    from gapless.schedule import traces

    if lengths is None:
        return traces.sample(trace, tokens=tokens, context=context or None, seed=seed)
    return traces.load(lengths, column)


def _read_cost(cost: str, model: str | None, flops: float, links: tuple[float, float, float]) -> CostModel:
    """A published model, a file of `gapless calibrate`, or an estimate for a model's shape."""
    if model is None:
        return CostModel.load(cost) if Path(cost).is_file() else CostModel.published(cost)
    from gapless.bench.calibrate import SHAPES

    shape = SHAPES[model] if model in SHAPES else ModelShape.of(model)
    host, node, network = (x * 1e9 for x in links)
    return CostModel.estimate(
        shape,
        flops=flops * 1e12,
        host_bandwidth=host,
        node_bandwidth=node,
        network_bandwidth=network,
        latency=1e-5,
        name=f"{model} at {flops:g} TFLOP/s",
    )


def _summary(schedule: Schedule, seconds: float) -> dict[str, Any]:
    from gapless.schedule.explain import explain

    return {"planning_seconds": seconds} | explain(schedule)


def plan(
    lengths: Annotated[
        Path | None,
        typer.Option(help="Own lengths: one a line, or a .parquet file.", exists=True, dir_okay=False),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Of the .parquet file.")] = None,
    trace: Annotated[
        str, typer.Option(help="Without lengths: byted, github, hydraulis, megatron or code.")
    ] = "byted",
    tokens: Annotated[int, typer.Option(help="Of the global batch drawn from the trace.", min=0)] = 32
    * 2**20,
    context: Annotated[int, typer.Option(help="Longest sequence of the trace; 0: no limit.", min=0)] = 2
    * 2**20,
    seed: int = 0,
    planner: Planners = None,
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks.", min=1)] = 1024,
    ranks_per_node: Annotated[int, typer.Option(min=1)] = 8,
    nics_per_node: Annotated[int, typer.Option(min=1)] = 8,
    stages: Annotated[int, typer.Option(help="Pipeline stages of a rank.", min=1)] = 1,
    capacity: Annotated[int, typer.Option(help="Tokens whose activations a rank holds.", min=1)] = 8192,
    cost: Annotated[
        str, typer.Option(help="A published model, or a file of `gapless calibrate`.")
    ] = "bytescale-gpu",
    model: Annotated[
        str | None, typer.Option(help="In place of --cost: demo, llama-7b, llama-8b, or a config.json.")
    ] = None,
    flops: Annotated[float, typer.Option(help="With --model: TFLOP/s that a rank reaches.")] = 200.0,
    links: Annotated[
        tuple[float, float, float], typer.Option(help="With --model: GB/s of host, node and network links.")
    ] = (25.0, 200.0, 25.0),
    out: Annotated[Path | None, typer.Option(help="Folder for a timeline of each plan.")] = None,
    as_json: Json = False,
) -> None:
    """Plan a global batch for a cluster with several planners, and say what each plan costs and why ranks wait."""
    from gapless.schedule.planners import DEFAULTS
    from gapless.schedule.planners import planner as named

    with plain_errors(OSError, ImportError):
        batch = _read_lengths(lengths, column, trace, tokens, context, seed)
        model_cost = _read_cost(cost, model, flops, links)
        cluster = Cluster(ranks, ranks_per_node, nics_per_node, stages)
        schedules: dict[str, Schedule] = {}
        rows: dict[str, dict[str, Any]] = {}
        refused: dict[str, str] = {}
        for name in planner or DEFAULTS:
            make = named(name)
            begin = time.perf_counter()
            try:
                schedules[name] = make(batch, ranks=cluster, capacity=capacity, cost=model_cost)
            except ValueError as error:
                refused[name] = str(error)
                continue
            rows[name] = _summary(schedules[name], time.perf_counter() - begin)
        if refused and not rows:
            raise ValueError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    images = _draw(schedules, out) if out is not None else {}
    if as_json:
        print(json.dumps({"plans": rows, "refused": refused, "images": images}, indent=2))
        return
    console = Console()
    console.print(
        f"{len(batch)} sequences, {int(batch.sum())} tokens, the longest {int(batch.max(initial=0))}; "
        f"{ranks} ranks of {capacity} tokens; cost model: {model_cost.name}",
        highlight=False,
        markup=False,
    )
    console.print(_table(rows))
    for name, why in refused.items():
        console.print(f"{name} cannot: {why}", style="yellow", highlight=False, markup=False)
    for path in images.values():
        console.print(path, highlight=False, markup=False)


def _draw(schedules: dict[str, Schedule], out: Path) -> dict[str, str]:
    from gapless.schedule.simulate import simulate
    from gapless.schedule.timeline import draw

    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, schedule in schedules.items():
        path = out / f"{name}.svg"
        draw(simulate(schedule, spans=True), path, title=f"{name}: {schedule.makespan:.3g} s")
        images[name] = str(path)
    return images


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("planner", "makespan", "over the bound", "idle", "micro-batches", "moved", "planned in"):
        table.add_column(column, justify="left" if column == "planner" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['makespan']:.4g} s",
            f"{100 * row['gap']:.1f}%",
            f"{100 * row['idle_share']:.1f}%",
            "{}..{}".format(*row["micro_batches"]),
            f"{sum(row['bytes'].values()) / 1e9:.4g} GB",
            f"{row['planning_seconds']:.3f} s",
        )
    return table


def calibrate(
    model: Annotated[
        str, typer.Option(help="demo, llama-7b, llama-8b, or a transformers config.json.")
    ] = "demo",
    dtype: str = "float32",
    device: str = "cpu",
    tokens: Annotated[int, typer.Option(help="Of the largest micro-batch that is timed.", min=256)] = 4096,
    seconds: Annotated[float, typer.Option(help="For all measurements, roughly.", min=1)] = 60.0,
    link: Annotated[bool, typer.Option(help="Measure messages between two processes too.")] = True,
    out: Annotated[Path, typer.Option(help="The cost model, JSON.")] = Path("cost.json"),
    as_json: Json = False,
) -> None:
    """Fit a cost model to this machine's own kernels and write it to a file for planners."""
    from gapless.bench import calibrate as measured

    console = Console(stderr=True)
    with plain_errors(OSError):
        shape = measured.SHAPES[model] if model in measured.SHAPES else ModelShape.of(model)
        with console.status("") as status:
            found, samples = measured.calibrate(
                shape,
                dtype=dtype,
                device=device,
                tokens=tokens,
                seconds=seconds,
                link=link,
                tell=lambda text: status.update(text),
            )
    found.save(out)
    if as_json:
        print(json.dumps({"cost": found.to_dict(), "samples": samples}, indent=2))
        return
    errors = np.array([row["fitted"] / row["seconds"] - 1 for row in samples])
    console.print(
        f"{found.name}\n"
        f"attention {found.cell:.3g} s a pair, the rest {found.token:.3g} s a token, {found.fixed:.3g} s a layer; "
        f"the fit is off by {100 * np.abs(errors).mean():.0f}% on average\nwritten to {out}",
        highlight=False,
        markup=False,
    )
