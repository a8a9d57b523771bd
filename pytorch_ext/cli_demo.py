# SPDX-License-Identifier: Apache-2.0
"""``gapless demo``: the operators at work on real input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gapless.cli_options import Folder, Planners, Quick, Seconds, Steps, Threads, plain_errors

app = typer.Typer(help="The operators at work on real input.", invoke_without_command=True)


@app.callback()
def demo(
    context: typer.Context,
    steps: Steps = 0,
    out: Folder = Path("report"),
    seconds: Seconds = 240.0,
    threads: Threads = 0,
) -> None:
    """The operators at work on real input; with no name of a demo, `pack`, `video`, `experts`, then `train`.

    Then --steps and --seconds are those of `pack`, and the other reports are in folders of their names in the first.
    """
    if context.invoked_subcommand is None:
        pack(steps, out, seconds, threads)
        video(out=out / "video", threads=threads)
        experts(out=out / "experts", threads=threads)
        train(out=out / "train")


@contextmanager
def _needs_demo_packages() -> Iterator[None]:
    """A package that is missing as one line and exit status 1."""
    try:
        yield
    except ImportError as missing:
        console = Console(stderr=True)
        console.print(
            f"the demo needs {missing.name}: pip install 'gapless[demo]'", markup=False, highlight=False
        )
        raise typer.Exit(1) from None


@app.command()
def pack(
    steps: Steps = 0, out: Folder = Path("report"), seconds: Seconds = 240.0, threads: Threads = 0
) -> None:
    """Train a small Llama on source files twice, padded with torch's SDPA and packed with gapless."""
    with _needs_demo_packages():
        from gapless.demo import pack as packing
    packing.run(steps=steps, out=out, seconds=seconds, threads=threads)


@app.command()
def video(
    steps: Annotated[
        int, typer.Option(help="Denoising steps, at least 4; 0 takes as many as the time allows.", min=0)
    ] = 0,
    out: Folder = Path("report/video"),
    seconds: Seconds = 130.0,
    threads: Threads = 0,
    inputs: Annotated[
        str, typer.Option(help="weights: a pipeline with random weights; fields: smooth fields; or both.")
    ] = "both",
    quick: Quick = False,
) -> None:
    """Denoise a video with a transformer of random weights, dense, with AdaSpa and with attention tiles."""
    with _needs_demo_packages():
        from gapless.demo import video as videos
    with plain_errors():
        videos.check(inputs, steps)
    if quick:
        steps = steps or videos.QUICK_STEPS
    settings = videos.QUICK if quick else None
    videos.run(inputs=inputs, steps=steps, out=out, seconds=seconds, threads=threads, settings=settings)


@app.command()
def experts(
    out: Folder = Path("report/experts"), seconds: Seconds = 90.0, threads: Threads = 0, quick: Quick = False
) -> None:
    """Make adapters of a mixture of experts for parts of the standard library, and serve them all on one base."""
    with _needs_demo_packages():
        from gapless.demo import experts as mixtures
    settings = mixtures.QUICK if quick else None
    mixtures.run(out=out, seconds=seconds, threads=threads, settings=settings)


@app.command()
def train(
    out: Folder = Path("report/train"),
    seconds: Seconds = 150.0,
    planner: Planners = None,
    quick: Quick = False,
) -> None:
    """Train a small Llama on texts of very different lengths, on 4 processes, by the plans of several planners."""
    with _needs_demo_packages():
        from gapless.demo import schedules
    settings = schedules.QUICK if quick else None
    with plain_errors():
        schedules.run(out=out, seconds=seconds, settings=settings, planners=planner or schedules.PLANNERS)
