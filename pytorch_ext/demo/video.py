# SPDX-License-Identifier: Apache-2.0
"""The video demo: one diffusion run dense, with AdaSpa, and with attention tiles; then inputs that have structure."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401  (the runs need it: say so before they start)
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor

import gapless
from gapless.bench import video
from gapless.bench.block_cases import random_blocks
from gapless.demo import fields, report, video_report
from gapless.plan import BlockGrid, BlockLayout
from gapless.sparsity import AdaSpa, Dense, Policy, TileMasks, TileSearch, attention_tile, recall
from gapless.sparsity.policy import Record, Statistic, Visit

INPUTS = ("both", "weights", "fields")
QUICK_STEPS, FEWEST_STEPS, MOST_STEPS = 6, 8, 25
CALIBRATION_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """Sizes of the video (latent frames, tokens down and across), of the transformer, and what is tried.

    Attributes:
        densities: of AdaSpa.
        references: frames that all see, of the attention tiles.
        threshold: largest relative error of a layer's output that the search of attention tiles accepts.
    """

    frames: int = 9
    height: int = 30
    width: int = 32
    heads: int = 4
    dim: int = 64
    layers: int = 4
    block: int = 64
    densities: tuple[float, ...] = (0.5, 0.2, 0.1)
    references: tuple[int, ...] = (0, 3)
    threshold: float = 0.6
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width


QUICK = Settings(
    frames=4, height=6, width=8, heads=2, dim=32, layers=2, block=16, densities=(0.5, 0.25), references=(1,)
)


class _Watch(Dense):
    """Dense attention that keeps the mass of the blocks of each layer, of the last step."""

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self.masses: dict[Any, Tensor] = {}

    def _attend(self, visit: Visit, record: Record, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _, self.masses[visit.layer] = gapless.attention_with_mass(
            q, k, v, cu_seqlens_q=visit.grid.cu_seqlens_q, block_q=self.block_q, block_k=self.block_k,
            scale=visit.scale,
        )  # fmt: skip
        return out


def psnr(result: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of ``wanted``. Infinite where both are the same."""
    error = (result.double() - wanted.double()).square().mean().item()
    peak = (wanted.max() - wanted.min()).item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


# Through the pipeline


def _generate(
    pipe, settings: Settings, steps: int, each: Callable[[int], object]
) -> tuple[Tensor, list[float]]:
    """Latents, and the seconds of each step."""
    ends = [time.perf_counter()]

    def ended(pipe, step: int, timestep, values: dict) -> dict:
        ends.append(time.perf_counter())
        each(step)
        return values

    out = video.make(pipe, *settings.shape, steps, seed=settings.seed, callback_on_step_end=ended)
    return out, [b - a for a, b in pairwise(ends)]


def _variant(name: str, family: str, seconds: list[float], rows: list[Statistic]) -> dict:
    """One way to compute all steps: what it took, and what it left out.

    A fused search is attention that takes longer: what it takes beyond a dense step of the same run counts as search.
    """
    layers = {step: [r for r in rows if r.step == step] for step in range(len(seconds))}
    steps: list[dict[str, Any]] = [
        {
            "kind": layers[i][0].kind if layers[i] else "dense",
            "seconds": s,
            "attention": sum(r.attention_seconds for r in layers[i]),
            "search": sum(r.search_seconds for r in layers[i]),
        }
        for i, s in enumerate(seconds)
    ]
    dense = [s["attention"] for s in steps if s["kind"] == "dense"]
    for s in steps:
        if s["kind"] == "fused search" and dense:
            more = max(0.0, s["attention"] - statistics.median(dense))
            s["attention"], s["search"] = s["attention"] - more, s["search"] + more
    sparse = [r for r in rows if r.kind == "sparse"]
    of_kind = [s["seconds"] for s in steps if s["kind"] == ("sparse" if sparse else "dense")]
    recalls = [r.recall for r in rows if not math.isnan(r.recall)]
    return {
        "name": name,
        "family": family,
        "steps": steps,
        "run_seconds": sum(seconds),
        "step_seconds": statistics.median(of_kind or seconds),
        "density": statistics.mean(r.density for r in sparse) if sparse else 1.0,
        "recall": statistics.mean(recalls) if recalls else 1.0,
        "search_share": sum(s["search"] for s in steps) / sum(seconds),
    }


def search_steps(steps: int) -> tuple[int, int]:
    """The paper's 10 and 30 of 50 steps, to scale."""
    first = max(2, round(steps * 0.2))
    return first, max(first + 1, round(steps * 0.6))


def _steps_for(settings: Settings, seconds: float, dense_step: float) -> int:
    """As many steps as the time allows, if attention has three quarters of it."""
    tiles = [
        attention_tile(settings.frames, 1, 0, n, block_q=16, block_k=16, exact=True)
        for n in settings.references
    ]
    shares = [*settings.densities, *(t.to_token_mask()[0].float().mean().item() for t in tiles), 0.5]
    runs = 2.3 + sum(0.2 + 0.8 * (0.25 + 0.75 * share) for share in shares)
    calibration = CALIBRATION_STEPS * (2.3 + 0.3 * settings.frames)  # the search computes more than once
    return min(MOST_STEPS, max(FEWEST_STEPS, int((seconds / dense_step - calibration) / runs)))


def through_weights(
    settings: Settings, steps: int, seconds: float, tell: Callable[[str, int, int], object]
) -> dict[str, Any]:
    """The pipeline with random weights, every variant in turn.

    Args:
        steps: denoising steps; 0 takes as many as ``seconds`` allow.
        tell: is told what runs, which step of it, and of how many.
    """
    model = video.transformer(settings.heads, settings.dim, settings.layers, seed=settings.seed)
    pipe = video.pipeline(model)
    watch = _Watch(settings.block)

    def generate(name: str, count: int, policy: Policy | None) -> tuple[Tensor, list[float]]:
        tell(name, 0, count)
        each = lambda step: tell(name, step + 1, count)  # noqa: E731
        if policy is None:
            return _generate(pipe, settings, count, each)
        with policy.attached(model):
            return _generate(pipe, settings, count, each)

    _, warm = generate("warming up", CALIBRATION_STEPS, watch)
    steps = steps or _steps_for(settings, seconds, warm[-1])
    layers = list(watch.masses)
    _, torch_seconds = torch_run = generate("dense, torch", steps, None)
    dense = Dense(settings.block)
    wanted, dense_seconds = generate("dense", steps, dense)
    variants = [
        _variant("dense, torch", "torch", torch_seconds, []) | {"psnr": psnr(torch_run[0], wanted)},
        _variant("dense", "dense", dense_seconds, dense.statistics()) | {"psnr": math.inf},
    ]
    found: dict[Any, BlockLayout] = {}
    for density in settings.densities:
        adaspa = AdaSpa(density, block=settings.block, search_steps=search_steps(steps))
        name = f"AdaSpa, density {density:g}"
        out, took = generate(name, steps, adaspa)
        variants.append(_variant(name, "AdaSpa", took, adaspa.statistics()) | {"psnr": psnr(out, wanted)})
        if not found or density == 0.2:
            found = {layer: layout for (_, layer), layout in adaspa.layouts.items()}
    search = TileSearch(
        settings.frames,
        threshold=settings.threshold,
        references=range(0, settings.frames - 1, 2),
        block=settings.block,
    )
    generate("attention tile, the search", CALIBRATION_STEPS, search)
    tiles: list[tuple[str, dict[Any, int | None]]] = []
    for n in settings.references:
        tiles.append((f"attention tile, {n} reference frames", dict.fromkeys(layers, n)))
    tiles.append(("attention tile, searched", search.result().choice))
    for name, choice in tiles:
        policy = TileMasks(settings.frames, choice, block=settings.block)
        out, took = generate(name, steps, policy)
        one = _variant(name, "attention tile", took, policy.statistics()) | {"psnr": psnr(out, wanted)}
        variants.append(one | {"recall": _tile_recall(policy, settings, watch.masses)})
    first = layers[0]
    return {
        "steps": steps,
        "search_steps": search_steps(steps),
        "parameters": sum(p.numel() for p in model.parameters()),
        "variants": variants,
        "tiles": [row._asdict() for row in search.table],
        "maps": {"mass": watch.masses[first], "mask": found[first].to_mask()},
    }


def _tile_recall(policy: TileMasks, settings: Settings, masses: dict[Any, Tensor]) -> float:
    """Mean over layers, by the mass of the blocks in the run that warmed up."""
    recalls = []
    for layer, mass in masses.items():
        references, size = policy.choice[layer], settings.height * settings.width
        if references is None:
            recalls.append(1.0)
            continue
        block: dict[str, Any] = {"block_q": settings.block, "block_k": settings.block}
        layout = attention_tile(settings.frames, size, 0, references, **block)
        recalls.append(recall(mass, layout).mean().item())
    return statistics.mean(recalls)


# With structure


def through_fields(settings: Settings, tell: Callable[[str, int, int], object]) -> dict[str, Any]:
    """One attention on :mod:`gapless.demo.fields`: what is found, against tiles and as many blocks at random."""
    heads = max(settings.heads, len(fields.AXES))
    q, k, v = fields.attention_inputs(settings.shape, heads, settings.dim, seed=settings.seed)
    size: dict[str, Any] = {"block_q": settings.block, "block_k": settings.block}
    grid = BlockGrid.make(settings.tokens, **size)
    cu = grid.cu_seqlens_q
    plan = gapless.VarlenPlan.make(cu)
    total = 2 + 2 * len(settings.densities) + len(settings.references)
    done = iter(range(total + 1))

    def timed(name: str, function: Callable[[], Any]) -> tuple[Any, float]:
        tell(f"smooth fields: {name}", next(done), total)
        function()
        samples = []
        for _ in range(3):
            begin = time.perf_counter()
            out = function()
            samples.append(time.perf_counter() - begin)
        return out, statistics.median(samples)

    dense, dense_seconds = timed("dense", lambda: gapless.varlen_attention(q, k, v, cu, plan=plan))
    (_, _, mass), _ = timed(
        "search", lambda: gapless.attention_with_mass(q, k, v, cu_seqlens_q=cu, plan=plan, **size)
    )
    rows, mask = [], torch.empty(0)

    def masks() -> Iterator[tuple[str, str, BlockLayout]]:
        for density in settings.densities:
            found = AdaSpa(density, block=settings.block).select(mass, grid)
            yield f"AdaSpa, density {density:g}", "AdaSpa", found.layout
            blind = random_blocks(grid.q_blocks, heads, found.density_per_head.tolist(), seed=settings.seed)
            yield f"at random, density {density:g}", "random", BlockLayout.from_packed(grid, blind)
        for n in settings.references:
            tile = attention_tile(settings.frames, settings.height * settings.width, 0, n, **size)
            yield f"attention tile, {n} reference frames", "attention tile", tile

    for name, family, layout in masks():
        out, seconds = timed(name, lambda layout=layout: gapless.block_sparse_attention(q, k, v, layout))  # type: ignore[misc]
        rows.append(
            {
                "name": name,
                "family": family,
                "density": layout.density.item(),
                "recall": recall(mass, layout).mean().item(),
                "seconds": seconds,
                "speedup": dense_seconds / seconds,
                "psnr": psnr(out, dense),
            }
        )
        if family == "AdaSpa" and (not mask.numel() or "0.2" in name):
            mask = layout.to_mask()
    return {
        "dense_seconds": dense_seconds,
        "rows": rows,
        "heads": [list(fields.AXES)[h % len(fields.AXES)] for h in range(heads)],
        "maps": {"mass": mass, "mask": mask},
    }


def check(inputs: str, steps: int) -> None:
    """Raise ValueError where :func:`run` could not do what is asked."""
    if inputs not in INPUTS:
        raise ValueError(f"inputs is {inputs!r:.80}: it has to be one of {', '.join(INPUTS)}")
    if steps and steps < 4:
        raise ValueError(f"steps is {steps}: it has to be 4 or more, for warm-up and two searches, or 0")


def run(
    *,
    out: Path = Path("report/video"),
    steps: int = 0,
    seconds: float = 130.0,
    threads: int = 0,
    inputs: str = "both",
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Make the videos, print, and write the report to ``out``.

    Args:
        steps: denoising steps; 0 takes as many as ``seconds`` allow, from 8 to 25.
        seconds: for everything, roughly.
        threads: of torch; 0 is torch's own choice.
        inputs: ``weights`` is the pipeline with random weights, ``fields`` the attention on smooth fields.
        settings: sizes, in place of the default ones.

    Returns:
        What the report shows: ``weights``, ``fields``, ``machine``, ``report`` and so on.
    """
    check(inputs, steps)
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    settings = settings or Settings()
    console.print(
        f"a video of {settings.frames} latent frames of {settings.height} x {settings.width} tokens, "
        f"{settings.tokens} in all; a Wan transformer with random weights in diffusers' pipeline, dense and sparse",
        highlight=False,
    )
    begin = time.perf_counter()
    result: dict[str, Any] = {"settings": asdict(settings), "weights": None, "fields": None}
    with (
        torch.no_grad(),
        Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), console=console, transient=True,
        ) as progress,
    ):  # fmt: skip
        task = progress.add_task("starting", total=1)

        def tell(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        if inputs != "fields":
            result["weights"] = through_weights(settings, steps, seconds, tell)
        if inputs != "weights":
            result["fields"] = through_fields(settings, tell)
    shown, caveat = report.printable(video_report.tables(result)), Text(video_report.CAVEAT, style="dim")
    return report.finish(result, out, video_report.write, *shown, caveat, begin=begin, console=console)
