# SPDX-License-Identifier: Apache-2.0
"""The ``gapless`` command: what can run here, how fast it is, and what it is good for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from gapless import cli_schedule
except ImportError as missing:
    sys.exit(f"the gapless command needs {missing.name}: pip install 'gapless[cli]'")

ISAS = ("baseline", "avx2", "avx512", "amx")

app = typer.Typer(
    help="Kernels for transformers that compute no gaps.", no_args_is_help=True, add_completion=False
)
bench_app = typer.Typer(help="Time an operator against its peers.", no_args_is_help=True)
demo_app = typer.Typer(help="The operators at work on real input.", invoke_without_command=True)
app.add_typer(bench_app, name="bench")
app.add_typer(demo_app, name="demo")
app.command()(cli_schedule.plan)
app.command()(cli_schedule.calibrate)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


@contextmanager
def _plain_errors():
    """Bad values as one line and exit status 2, in place of a traceback."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


# info


def _implementations() -> list[dict]:
    """Of each operator on each device: which implementations take a plain bfloat16 batch with gradients, or why not."""
    from gapless.ops import block_sparse, experts, linear_cross_entropy, reroute, varlen

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    rows = []
    for device in devices:
        x = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
        dense = varlen.Inputs(
            x,
            x,
            x,
            alibi_slopes=None,
            sinks=None,
            seqused_k=None,
            block_table=None,
            softcap=0.0,
            needs_grad=True,
            return_lse=False,
        )
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        ops = {
            "varlen_attention": (varlen.REASONS, dense),
            "block_sparse_attention": (block_sparse.REASONS, block_sparse.Inputs(x)),
            "reroute": (reroute.REASONS, reroute.Inputs(ids, "reroute")),
            "fused_experts": (experts.REASONS, experts.Inputs(x)),
            "linear_cross_entropy": (linear_cross_entropy.REASONS, linear_cross_entropy.Inputs(x)),
        }
        for op, (implementations, inputs) in ops.items():
            for impl, unsupported in implementations.items():
                why_not = unsupported(inputs)
                rows.append({"op": op, "device": device, "impl": impl, "why_not": why_not})
    return rows


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("gapless", "torch", "triton", "flash-attn", "transformers", "diffusers", "numpy")
    return {"python": sys.version.split()[0]} | {name: installed(name) for name in names}


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, instruction sets, devices, and which implementations can run here."""
    from gapless.bench.machine import machine, machine_line

    about = machine()
    versions, implementations = _versions(), _implementations()
    if as_json:
        found = {"versions": versions, "machine": about, "implementations": implementations}
        print(json.dumps(found, indent=2))
        return
    console = Console()
    console.print(machine_line(about), highlight=False, markup=False)
    packages = ", ".join(f"{name} {text or 'absent'}" for name, text in versions.items())
    console.print(packages, highlight=False, markup=False)
    table = Table("operator", "device", "implementation", "usable", box=None, pad_edge=False)
    for row in implementations:
        usable = "yes" if not row["why_not"] else "no: " + "; ".join(row["why_not"])
        table.add_row(row["op"], row["device"], row["impl"], usable)
    console.print(table)


# bench


def _run_again_under(isa: str) -> None:
    """Kernels are picked once in a process: start anew with the ISA in the environment."""
    if isa not in ISAS:
        raise ValueError(f"isa is {isa!r}: it has to be one of {', '.join(ISAS)}")
    if os.environ.get("GAPLESS_ISA") != isa:
        os.environ["GAPLESS_ISA"] = isa
        os.execv(sys.executable, [sys.executable, "-m", "gapless.cli", *sys.argv[1:]])


@bench_app.command()
def varlen(
    case: Annotated[
        list[str] | None, typer.Option(help="Workload R, M, S, U, L, D or T; may be repeated.")
    ] = None,
    lengths: Annotated[
        list[str] | None,
        typer.Option(help="Own workload: items L, NxL or NxL:KEYS with commas between, or a file of them."),
    ] = None,
    heads: int = 8,
    kv_heads: Annotated[list[int] | None, typer.Option(help="May be repeated. [default: 8]")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Of a head; may be repeated. [default: 64]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. [default: float32]")] = None,
    direction: Annotated[
        list[str] | None, typer.Option(help="fwd or fwd_bwd; may be repeated. [fwd]")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every query sees every key; the default is causal.")
    ] = False,
    paged: Annotated[bool, typer.Option("--paged", help="Own workload with keys in pages.")] = False,
    impl: Annotated[
        list[str] | None,
        typer.Option(help="A peer's name, or module:function to add your own; may be repeated."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Of torch; 0 is torch's own choice.", min=0)] = 0,
    device: str = "cpu",
    rounds: Annotated[int, typer.Option(help="Most samples of each implementation.", min=1)] = 50,
    seconds: Annotated[float, typer.Option(help="Time for the samples of one case.", min=0)] = 10.0,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too, each in a process of its own.")
    ] = True,
    isa: Annotated[
        str | None, typer.Option(help=f"Most of gapless's instruction sets: {', '.join(ISAS)}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time varlen attention against its peers: the result is checked first, then all take turns."""
    from gapless.bench import cases, measure, peers

    sys.path.insert(0, "")  # a user's module may be in the working directory
    with _plain_errors():
        if isa is not None:
            _run_again_under(isa)
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
    if threads:
        torch.set_num_threads(threads)

    def measured(c, tell):
        return measure.measure(c, impl, rounds=rounds, seconds=seconds, with_memory=memory, tell=tell)

    _measure_all(chosen, measured, out, as_json)


def _measure_all(
    chosen: Sequence[Any], measured: Callable[..., Any], out: Path | None, as_json: bool
) -> None:
    """Measure the cases one after the other, show the rows, and exit with 1 if one of ours is wrong."""
    from gapless.bench import report
    from gapless.bench.machine import machine

    data: dict = {"machine": machine(), "rows": [], "skipped": []}
    console = Console(stderr=True)
    with _progress(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for c in chosen:

            def tell(text: str, label: str = c.label) -> None:
                progress.update(task, description=f"{label}: {text}")

            rows, skipped = measured(c, tell)
            data["rows"] += rows
            data["skipped"] += skipped
            progress.advance(task)
    data["rows"] = report.derive(data["rows"])
    if out is not None:
        out.write_text(json.dumps(data, indent=2) + "\n")
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        report.show(data, Console())
    if any(not row["peer"] and row["check"] != "ok" for row in data["rows"]):
        raise typer.Exit(1)


Repeated = list[str] | None


@bench_app.command()
def blocksparse(
    study: Annotated[
        Repeated,
        typer.Option(help="efficiency, peers, build, heads, mass, selection or adaspa; all but the last."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the one sequence.", min=1)] = 8192,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    dim: Annotated[list[int] | None, typer.Option(help="Of a head; may be repeated. [default: 64]")] = None,
    dtype: Annotated[Repeated, typer.Option(help="May be repeated. [default: float32]")] = None,
    block: Annotated[list[int] | None, typer.Option(help="Tokens; may be repeated. [default: 64]")] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Of blocks; may be repeated. [default: the study's]")
    ] = None,
    direction: Annotated[Repeated, typer.Option(help="fwd or bwd; may be repeated. [fwd]")] = None,
    impl: Annotated[
        Repeated, typer.Option(help="Of peers: a name, or module:function to add your own; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of adaspa.", min=1)] = 50,
    layers: Annotated[int, typer.Option(help="Of adaspa's transformer.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Of torch; 0 is torch's own choice.", min=0)] = 0,
    device: str = "cpu",
    rounds: Annotated[int, typer.Option(help="Most rounds of a case.", min=1)] = 50,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of one case.", min=0)] = 20.0,
    isa: Annotated[
        str | None, typer.Option(help=f"Most of gapless's instruction sets: {', '.join(ISAS)}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time block-sparse attention, its searches and its masks: the result is checked first, then all take turns."""
    from gapless.bench import adaspa, block_peers, block_studies

    sys.path.insert(0, "")  # a user's module may be in the working directory
    with _plain_errors():
        if isa is not None:
            _run_again_under(isa)
        chosen = []
        for name in study or list(block_studies.STUDIES):
            for d in dim or [64]:
                for t in dtype or ["float32"]:
                    for b in block or [64]:
                        how: dict = {"tokens": tokens, "heads": heads, "dim": d, "dtype": t, "block": b}
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
    if threads:
        torch.set_num_threads(threads)

    def measured(c, tell):
        if c.study == "adaspa":
            return adaspa.measure(c, steps=steps, layers=layers, tell=tell)
        return block_studies.measure(c, impl, rounds=rounds, seconds=seconds, tell=tell)

    _measure_all(chosen, measured, out, as_json)


@bench_app.command()
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
    dtype: Annotated[Repeated, typer.Option(help="May be repeated. [default: float32]")] = None,
    direction: Annotated[Repeated, typer.Option(help="fwd or fwd_bwd; may be repeated. [fwd]")] = None,
    impl: Annotated[
        Repeated, typer.Option(help="Of peers: a name, or module:function to add your own; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of torch; 0 is torch's own choice.", min=0)] = 0,
    device: str = "cpu",
    rounds: Annotated[int, typer.Option(help="Most rounds of a case.", min=1)] = 50,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of one case.", min=0)] = 20.0,
    isa: Annotated[
        str | None, typer.Option(help=f"Most of gapless's instruction sets: {', '.join(ISAS)}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time rerouting, expert layers and stores of adapters: the result is checked first, then all take turns."""
    from gapless.bench import expert_studies

    sys.path.insert(0, "")  # a user's module may be in the working directory
    sizes = {
        "experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "inter": inter,
        "adapters": adapters,
        "max_experts": max_experts,
        "layers": layers,
        "block": block,
    }
    with _plain_errors():
        if isa is not None:
            _run_again_under(isa)
        chosen = [
            case
            for name in study or list(expert_studies.STUDIES)
            for case in expert_studies.cases_of(
                name, tokens=tokens, dtypes=dtype, ids=ids, directions=direction, device=device, **sizes
            )
        ]
        expert_studies.check_names(impl, chosen)
    if threads:
        torch.set_num_threads(threads)

    def measured(c, tell):
        return expert_studies.measure_case(c, impl, rounds=rounds, seconds=seconds, tell=tell)

    _measure_all(chosen, measured, out, as_json)


@bench_app.command("cross-entropy")
def cross_entropy(
    tokens: Annotated[list[int] | None, typer.Option(help="May be repeated. [default: 8192]")] = None,
    classes: Annotated[list[int] | None, typer.Option(help="Vocabulary; may be repeated. [128000]")] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Size of a token; may be repeated. [2048]")] = None,
    ignored: Annotated[float, typer.Option(help="Share of tokens without a target.", min=0, max=1)] = 0.0,
    dtype: Annotated[Repeated, typer.Option(help="May be repeated. [default: bfloat16]")] = None,
    direction: Annotated[Repeated, typer.Option(help="fwd or fwd_bwd; may be repeated. [fwd_bwd]")] = None,
    impl: Annotated[Repeated, typer.Option(help="Of peers, by name; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(help="Of torch; 0 is torch's own choice.", min=0)] = 0,
    device: str = "cpu",
    rounds: Annotated[int, typer.Option(help="Most rounds of a case.", min=1)] = 50,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of one case.", min=0)] = 60.0,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too, each in a process of its own.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time a last layer with its loss, forward and backward: the result is checked first, then all take turns."""
    from gapless.bench import cross_entropy as losses

    with _plain_errors():
        chosen = list(
            losses.cases_of(
                tokens=tokens,
                classes=classes,
                hidden=hidden,
                dtypes=dtype,
                directions=direction,
                ignored=ignored,
                device=device,
            )
        )
        losses.check_names(impl)
    if threads:
        torch.set_num_threads(threads)

    def measured(c, tell):
        return losses.run(c, impl, rounds=rounds, seconds=seconds, with_memory=memory, tell=tell)

    _measure_all(chosen, measured, out, as_json)


@bench_app.command()
def schedule(
    study: Annotated[
        Repeated,
        typer.Option(help="planning, balance, peers, optimum, ablation or hydraulis; may be repeated. [all]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Plan batches of many lengths for many ranks, play the plans, and compare planners."""
    from gapless.bench import schedule_studies
    from gapless.bench.machine import machine, machine_line

    with _plain_errors():
        chosen = schedule_studies.named(study)
    data: dict = {"machine": machine(), "rows": []}
    with _progress(Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(chosen))
        for make in chosen:
            data["rows"] += make(lambda text: progress.update(task, description=text))
            progress.advance(task)
    if out is not None:
        out.write_text(json.dumps(data, indent=2) + "\n")
    if as_json:
        print(json.dumps(data, indent=2))
        return
    console = Console()
    for made in schedule_studies.tables(data["rows"]):
        console.print(made)
    console.print(machine_line(data["machine"]), style="dim", highlight=False, markup=False)


@bench_app.command("report")
def bench_report(
    file: Annotated[Path, typer.Argument(help="JSON of `gapless bench` or pytest-benchmark.")],
) -> None:
    """Show results that were written before."""
    from gapless.bench import report

    if not file.is_file():
        raise typer.BadParameter(f"{file} is not a file")
    report.show(report.load(file), Console())


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


# demo

Steps = Annotated[int, typer.Option(help="Training steps; 0 takes as many as the time allows.", min=0)]
Out = Annotated[Path, typer.Option(help="Folder of the report.")]
Seconds = Annotated[float, typer.Option(help="Time for all of it, roughly.", min=1)]
Threads = Annotated[int, typer.Option(help="Of torch; 0 is torch's own choice.", min=0)]


@demo_app.callback()
def demo(
    context: typer.Context,
    steps: Steps = 0,
    out: Out = Path("report"),
    seconds: Seconds = 240.0,
    threads: Threads = 0,
) -> None:
    """The operators at work on real input; with no name of a demo, `pack`, `video`, `experts`, then `train`.

    Then --steps and --seconds are those of `pack`, and the other reports are in folders of their names in the first.
    """
    if context.invoked_subcommand is None:
        pack(steps, out, seconds, threads)
        video(out=out / "video", threads=threads)
        experts_demo(out=out / "experts", threads=threads)
        train(out=out / "train")


@contextmanager
def _needs_demo_packages():
    """A package that is missing as one line and exit status 1."""
    try:
        yield
    except ImportError as missing:
        console = Console(stderr=True)
        console.print(
            f"the demo needs {missing.name}: pip install 'gapless[demo]'", markup=False, highlight=False
        )
        raise typer.Exit(1) from None


@demo_app.command()
def pack(steps: Steps = 0, out: Out = Path("report"), seconds: Seconds = 240.0, threads: Threads = 0) -> None:
    """Train a small Llama on source files twice, padded with torch's SDPA and packed with gapless."""
    with _needs_demo_packages():
        from gapless.demo import pack as demo_pack
    demo_pack.run(steps=steps, out=out, seconds=seconds, threads=threads)


@demo_app.command()
def video(
    steps: Annotated[
        int, typer.Option(help="Denoising steps, at least 4; 0 takes as many as the time allows.", min=0)
    ] = 0,
    out: Out = Path("report/video"),
    seconds: Seconds = 130.0,
    threads: Threads = 0,
    inputs: Annotated[
        str, typer.Option(help="weights: a pipeline with random weights; fields: smooth fields; or both.")
    ] = "both",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny: that it runs, nothing of speed.")] = False,
) -> None:
    """Denoise a video with a transformer of random weights, dense, with AdaSpa and with attention tiles."""
    with _needs_demo_packages():
        from gapless.demo import video as demo_video
    with _plain_errors():
        demo_video.check(inputs, steps)
    if quick:
        steps = steps or demo_video.QUICK_STEPS
    settings = demo_video.QUICK if quick else None
    demo_video.run(inputs=inputs, steps=steps, out=out, seconds=seconds, threads=threads, settings=settings)


@demo_app.command("experts")
def experts_demo(
    out: Out = Path("report/experts"),
    seconds: Seconds = 90.0,
    threads: Threads = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny: that it runs, nothing of speed.")] = False,
) -> None:
    """Make adapters of a mixture of experts for parts of the standard library, and serve them all on one base."""
    with _needs_demo_packages():
        from gapless.demo import experts as demo_experts
    settings = demo_experts.QUICK if quick else None
    demo_experts.run(out=out, seconds=seconds, threads=threads, settings=settings)


@demo_app.command()
def train(
    out: Out = Path("report/train"),
    seconds: Seconds = 150.0,
    planner: Annotated[
        list[str] | None, typer.Option(help="May be repeated. [static-cp, naive-hdp, hdp, zeppelin]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny: that it runs, nothing of speed.")] = False,
) -> None:
    """Train a small Llama on texts of very different lengths, on 4 processes, by the plans of several planners."""
    with _needs_demo_packages():
        from gapless.demo import schedules
    settings = schedules.QUICK if quick else None
    with _plain_errors():
        schedules.run(out=out, seconds=seconds, settings=settings, planners=planner or schedules.PLANNERS)


if __name__ == "__main__":
    app(prog_name="gapless")
