# SPDX-License-Identifier: Apache-2.0
"""``gapless bench``: operators and planners against their peers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gapless.cli_options import (
    ISAS,
    CaseSeconds,
    Dims,
    Directions,
    Dtypes,
    Isa,
    Json,
    JsonFile,
    Memory,
    Peers,
    Repeated,
    Rounds,
    Threads,
    plain_errors,
)

Tell = Callable[[str], object]

app = typer.Typer(help="Time an operator against its peers.", no_args_is_help=True)


@app.command()
def varlen(
    case: Annotated[Repeated, typer.Option(help="Workload R, M, S, U, L, D or T; may be repeated.")] = None,
    lengths: Annotated[
        Repeated,
        typer.Option(help="Own workload: items L, NxL or NxL:KEYS with commas between, or a file of them."),
    ] = None,
    heads: int = 8,
    kv_heads: Annotated[list[int] | None, typer.Option(help="May be repeated. [default: 8]")] = None,
    dim: Dims = None,
    dtype: Dtypes = None,
    direction: Directions = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every query sees every key; the default is causal.")
    ] = False,
    paged: Annotated[bool, typer.Option("--paged", help="Own workload with keys in pages.")] = False,
    impl: Annotated[
        Repeated, typer.Option(help="A peer's name, or module:function to add your own; may be repeated.")
    ] = None,
    threads: Threads = 0,
    device: str = "cpu",
    rounds: Annotated[int, typer.Option(help="Most samples of each implementation.", min=1)] = 50,
    seconds: Annotated[float, typer.Option(help="Time for the samples of one case.", min=0)] = 10.0,
    memory: Memory = True,
    isa: Isa = None,
    out: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Time varlen attention against its peers: the result is checked first, then all take turns."""
    from gapless.bench import cases, measure, peers

    with plain_errors():
        _start(threads, isa)
        chosen = [cases.workload(name) for name in case or ([] if lengths else ["R", "M", "S"])]
        chosen += [cases.Case(text, cases.parse_lengths(text), paged=paged) for text in lengths or []]
        chosen = [
            cases.with_options(
                c, heads=heads, kv_heads=kv, dim=d, dtype=t, direction=way, causal=not full, device=device
            )
            for c in chosen
            for kv in kv_heads or [8]
            for d in dim or [64]
            for t in dtype or ["float32"]
            for way in direction or ["fwd"]
        ]
        for c in chosen:
            peers.select(impl, c)
    measured = partial(measure.measure, impls=impl, rounds=rounds, seconds=seconds, with_memory=memory)
    _measure_all(chosen, measured, out, as_json)


@app.command()
def blocksparse(
    study: Annotated[
        Repeated,
        typer.Option(help="efficiency, peers, build, heads, mass, selection or adaspa; all but the last."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the one sequence.", min=1)] = 8192,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    dim: Dims = None,
    dtype: Dtypes = None,
    block: Annotated[list[int] | None, typer.Option(help="Tokens; may be repeated. [default: 64]")] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Of blocks; may be repeated. [default: the study's]")
    ] = None,
    direction: Annotated[Repeated, typer.Option(help="fwd or bwd; may be repeated. [fwd]")] = None,
    impl: Peers = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of adaspa.", min=1)] = 50,
    layers: Annotated[int, typer.Option(help="Of adaspa's transformer.", min=1)] = 1,
    threads: Threads = 0,
    device: str = "cpu",
    rounds: Rounds = 50,
    seconds: CaseSeconds = 20.0,
    isa: Isa = None,
    out: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Time block-sparse attention, its searches and its masks: the result is checked first, then all take turns."""
    from gapless.bench import adaspa, block_peers, block_studies

    with plain_errors():
        _start(threads, isa)
        chosen: list[Any] = []
        studies = study or list(block_studies.STUDIES)
        for name, d, t, b in product(studies, dim or [64], dtype or ["float32"], block or [64]):
            how: dict[str, Any] = {"tokens": tokens, "heads": heads, "dim": d, "dtype": t, "block": b}
            how["device"] = device
            if name == "adaspa":
                chosen += [adaspa.case_of(share, **how) for share in density or [0.2]]
                continue
            for way in direction or ["fwd"]:
                chosen += block_studies.cases_of(name, density, way, **how)
        for c in chosen:
            if c.study == "peers":
                block_peers.select(impl, c)
        if any(c.study == "adaspa" for c in chosen):
            adaspa.check_steps(steps)

    def measured(c, tell):
        if c.study == "adaspa":
            return adaspa.measure(c, steps=steps, layers=layers, tell=tell)
        return block_studies.measure(c, impl, rounds=rounds, seconds=seconds, tell=tell)

    _measure_all(chosen, measured, out, as_json)


@app.command()
def experts(
    study: Annotated[
        Repeated,
        typer.Option(
            help="reroute, align, reroute_align, layer, grouped_mm, merged, adapters or store; may be repeated. [all]"
        ),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="May be repeated. [default: the study's]")] = None,
    experts: Annotated[int | None, typer.Option(help="Of the base model. [default: the study's]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choices of a token. [default: the study's]")] = None,
    hidden: Annotated[int | None, typer.Option(help="Size of a token. [default: the study's]")] = None,
    inter: Annotated[int | None, typer.Option(help="Inside an expert. [default: the study's]")] = None,
    adapters: Annotated[int | None, typer.Option(help="[default: the study's]")] = None,
    max_experts: Annotated[int | None, typer.Option(help="Of an adapter. [default: the study's]")] = None,
    layers: Annotated[int | None, typer.Option(help="Of a store. [default: the study's]")] = None,
    block: Annotated[int | None, typer.Option(help="Of alignment. [default: the study's]")] = None,
    ids: Annotated[Repeated, typer.Option(help="int32 or int64; may be repeated. [int64]")] = None,
    dtype: Dtypes = None,
    direction: Directions = None,
    impl: Peers = None,
    threads: Threads = 0,
    device: str = "cpu",
    rounds: Rounds = 50,
    seconds: CaseSeconds = 20.0,
    isa: Isa = None,
    out: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Time rerouting, expert layers and stores of adapters: the result is checked first, then all take turns."""
    from gapless.bench import expert_studies

    sizes = {
        "experts": experts, "top_k": top_k, "hidden": hidden, "inter": inter,
        "adapters": adapters, "max_experts": max_experts, "layers": layers, "block": block,
    }  # fmt: skip
    with plain_errors():
        _start(threads, isa)
        chosen = [
            case
            for name in study or list(expert_studies.STUDIES)
            for case in expert_studies.cases_of(
                name, tokens=tokens, dtypes=dtype, ids=ids, directions=direction, device=device, **sizes
            )
        ]
        expert_studies.check_names(impl, chosen)
    measured = partial(expert_studies.measure_case, impls=impl, rounds=rounds, seconds=seconds)
    _measure_all(chosen, measured, out, as_json)


@app.command("cross-entropy")
def cross_entropy(
    tokens: Annotated[list[int] | None, typer.Option(help="May be repeated. [default: 8192]")] = None,
    classes: Annotated[list[int] | None, typer.Option(help="Vocabulary; may be repeated. [128000]")] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Size of a token; may be repeated. [2048]")] = None,
    ignored: Annotated[float, typer.Option(help="Share of tokens without a target.", min=0, max=1)] = 0.0,
    dtype: Annotated[Repeated, typer.Option(help="May be repeated. [default: bfloat16]")] = None,
    direction: Annotated[Repeated, typer.Option(help="fwd or fwd_bwd; may be repeated. [fwd_bwd]")] = None,
    impl: Annotated[Repeated, typer.Option(help="Of peers, by name; may be repeated.")] = None,
    threads: Threads = 0,
    device: str = "cpu",
    rounds: Rounds = 50,
    seconds: CaseSeconds = 60.0,
    memory: Memory = True,
    out: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Time a last layer with its loss, forward and backward: the result is checked first, then all take turns."""
    from gapless.bench import cross_entropy as losses

    sizes = {"tokens": tokens, "classes": classes, "hidden": hidden}
    with plain_errors():
        _start(threads)
        chosen = list(
            losses.cases_of(**sizes, dtypes=dtype, directions=direction, ignored=ignored, device=device)
        )
        losses.check_names(impl)
    measured = partial(losses.run, impls=impl, rounds=rounds, seconds=seconds, with_memory=memory)
    _measure_all(chosen, measured, out, as_json)


@app.command()
def schedule(
    study: Annotated[
        Repeated,
        typer.Option(help="planning, balance, peers, optimum, ablation or hydraulis; may be repeated. [all]"),
    ] = None,
    out: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Plan batches of many lengths for many ranks, play the plans, and compare planners."""
    from gapless.bench import schedule_studies
    from gapless.bench.machine import machine, machine_line

    with plain_errors():
        chosen = schedule_studies.named(study)
    data: dict = {"machine": machine(), "rows": []}
    _one_by_one(chosen, lambda make, tell: data["rows"].extend(make(tell)))

    def show(data: dict, console: Console) -> None:
        for made in schedule_studies.tables(data["rows"]):
            console.print(made)
        console.print(machine_line(data["machine"]), style="dim", highlight=False, markup=False)

    _hand_out(data, show, out, as_json)


@app.command("report")
def show_report(
    file: Annotated[Path, typer.Argument(help="JSON of `gapless bench` or pytest-benchmark.")],
) -> None:
    """Show results that were written before."""
    from gapless.bench import report

    if not file.is_file():
        raise typer.BadParameter(f"{file} is not a file")
    report.show(report.load(file), Console())


# What all of them do.


def _start(threads: int, isa: str | None = None) -> None:
    """Let peers be in the working directory, and set torch's threads and the ISA; 0 and None leave them alone."""
    sys.path.insert(0, "")
    if isa is not None:
        _run_again_under(isa)
    if threads:
        torch.set_num_threads(threads)


def _run_again_under(isa: str) -> None:
    """Kernels are picked once in a process: start anew with the ISA in the environment."""
    if isa not in ISAS:
        raise ValueError(f"isa is {isa!r}: it has to be one of {', '.join(ISAS)}")
    if os.environ.get("GAPLESS_ISA") != isa:
        os.environ["GAPLESS_ISA"] = isa
        os.execv(sys.executable, [sys.executable, "-m", "gapless.cli", *sys.argv[1:]])


def _measure_all(
    chosen: Sequence[Any], measured: Callable[..., Any], out: Path | None, as_json: bool
) -> None:
    """Measure the cases one after the other, show the rows, and exit with 1 if one of ours is wrong."""
    from gapless.bench import report
    from gapless.bench.machine import machine

    data: dict = {"machine": machine(), "rows": [], "skipped": []}

    def measure(c: Any, tell: Tell) -> None:
        rows, skipped = measured(c, tell=lambda text: tell(f"{c.label}: {text}"))
        data["rows"] += rows
        data["skipped"] += skipped

    _one_by_one(chosen, measure)
    data["rows"] = report.derive(data["rows"])
    _hand_out(data, report.show, out, as_json)
    if any(not row["peer"] and row["check"] != "ok" for row in data["rows"]):
        raise typer.Exit(1)


def _one_by_one(chosen: Sequence[Any], do: Callable[[Any, Tell], object]) -> None:
    """Do it to each, with a function that says beside their count what is being done."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(chosen))
        for c in chosen:
            do(c, lambda text: progress.update(task, description=text))
            progress.advance(task)


def _hand_out(data: dict, show: Callable[[dict, Console], None], out: Path | None, as_json: bool) -> None:
    """To the file, and to the screen as JSON or as tables."""
    text = json.dumps(data, indent=2)
    if out is not None:
        out.write_text(text + "\n")
    if as_json:
        print(text)
    else:
        show(data, Console())
