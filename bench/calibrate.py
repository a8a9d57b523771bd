# SPDX-License-Identifier: Apache-2.0
"""A cost model of the machine at hand, from the kernels' own times: ``gapless calibrate``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapless.bench.cases import offsets
from gapless.bench.machine import machine, machine_line
from gapless.bench.measure import interleave
from gapless.ops.varlen import varlen_attention
from gapless.plan.varlen import VarlenPlan
from gapless.schedule.cost import CostModel
from gapless.schedule.fit import fit_times
from gapless.schedule.model_shape import ModelShape
from gapless.testing.processes import Processes

COPY = 1 << 26  # bytes of a copy or a message whose rate is measured
SHAPES = {
    "demo": ModelShape(hidden=256, intermediate=682, layers=4, heads=4, kv_heads=2, dim=64, vocabulary=260),
    "llama-7b": ModelShape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, dim=128),
    "llama-8b": ModelShape(4096, 14336, 32, 32, 8, 128, 128256),
}


class Layer(nn.Module):
    """The part of a decoder layer that is linear in the tokens: projections, MLP, norms, residuals."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        q, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden) for _ in range(2))
        self.qkv, self.out = (
            nn.Linear(shape.hidden, q + 2 * kv, bias=False),
            nn.Linear(q, shape.hidden, bias=False),
        )
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.qkv(self.norms[0](x))[:, : self.out.in_features]
        x = x + self.out(q)
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def _training(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """``forward`` and its backward pass."""

    def run() -> None:
        out = forward()
        out.backward(torch.ones_like(out))

    return run


def _attention(shape: ModelShape, lengths: list[int], dtype: torch.dtype, device: str, causal: bool):
    cu = offsets(lengths).to(device)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (
        torch.randn(sum(lengths), h, shape.dim, dtype=dtype, device=device, requires_grad=True) for h in heads
    )
    plan = VarlenPlan.make(cu, causal=causal)
    return partial(varlen_attention, q, k, v, cu, causal=causal, plan=plan)


def _linear(layer: Layer, tokens: int, dtype: torch.dtype, device: str):
    x = torch.randn(tokens, layer.out.out_features, dtype=dtype, device=device, requires_grad=True)
    return partial(layer, x)


def _without_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def calibrate(
    shape: ModelShape,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tokens: int = 4096,
    causal: bool = True,
    seconds: float = 60.0,
    link: bool = True,
    tell: Callable[[str], object] = lambda text: None,
) -> tuple[CostModel, list[dict]]:
    """Time one layer at several sizes, forward and with its backward pass, and fit a :class:`CostModel`.

    Args:
        shape: of the model; its ``value_bytes`` are those of ``dtype``.
        tokens: of the largest micro-batch that is timed; attention is timed at lengths from 64 to that.
        seconds: for all measurements, roughly.
        link: measure messages between two processes of this machine (gloo; NCCL where two GPUs are at hand).
        tell: gets what is being measured.

    Returns:
        The model, and the samples: dicts of what, tokens, cells, seconds, and the fitted seconds.
    """
    if tokens < 256:
        raise ValueError(f"tokens is {tokens}: it has to be at least 256")
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype!r}: it has to be float32, bfloat16 or float16")
    shape = replace(shape, value_bytes=kind.itemsize)
    sizes = [n for n in (64, 256, 1024, 4096, 16384, 65536) if n < tokens] + [tokens]
    packs = [[n] * (tokens // n) for n in sizes] + [[tokens // 4], [tokens // 2]]
    counts = [tokens // 16, tokens // 4, tokens // 2, tokens]
    cost = CostModel(cell=1.0, token=1.0, causal=causal)
    cells = [float(cost.cells(p).sum()) for p in packs]
    layer = Layer(shape).to(device, kind)
    samples: list[dict] = []
    fits: dict[str, tuple[float, float, float]] = {}
    for part, sides in (
        (
            "attention",
            [
                (sum(p), c, _attention(shape, p, kind, device, causal))
                for p, c in zip(packs, cells, strict=True)
            ],
        ),
        ("linear", [(n, 0.0, _linear(layer, n, kind, device)) for n in counts]),
    ):
        for direction, wrap in (("forward", _without_grad), ("both", _training)):
            tell(f"{part}, {direction}")
            calls = {str(i): wrap(call) for i, (_, _, call) in enumerate(sides)}
            timings = interleave(calls, seconds=seconds / 5, device=torch.device(device).type)
            rows = [
                {
                    "part": part,
                    "direction": direction,
                    "tokens": n,
                    "cells": c,
                    "seconds": timings[str(i)].median,
                }
                for i, (n, c, _) in enumerate(sides)
            ]
            fit = fit_times(*([row[key] for row in rows] for key in ("tokens", "cells", "seconds")))
            for row in rows:
                row["fitted"] = fit[0] * row["cells"] + fit[1] * row["tokens"] + fit[2]
            samples += rows
            fits[f"{part} {direction}"] = fit
    (cell, rows_cost, attention_fixed), (_, token, linear_fixed) = (
        fits["attention forward"],
        fits["linear forward"],
    )
    both_attention, both_linear = fits["attention both"], fits["linear both"]
    forward_token, both_token = rows_cost + token, both_attention[1] + both_linear[1]
    tell("copies and messages")
    model = CostModel(
        cell=cell,
        token=forward_token,
        fixed=attention_fixed + linear_fixed,
        layers=shape.layers,
        backward_cell=max(both_attention[0] / cell - 1, 0.0) if cell else 2.5,
        backward_token=max(both_token / forward_token - 1, 0.0) if forward_token else 2.0,
        activation_bytes=shape.activation_bytes,
        kv_bytes=shape.kv_bytes,
        # Gradients of keys and values travel in float32 beside the keys and values.
        backward_kv=1 + 4 / shape.value_bytes,
        hidden_bytes=shape.hidden_bytes,
        host_bandwidth=_copy_rate(device),
        causal=causal,
        name=f"calibrated: {dtype} on {machine_line(machine())}",
    )
    if link:
        bandwidth, latency = _link(device)
        model = model.replace(node_bandwidth=bandwidth, network_bandwidth=bandwidth, latency=latency)
    return model, samples


def _copy_rate(device: str) -> float:
    """Bytes a second from the device into host memory that is already there."""
    source = torch.ones(COPY, dtype=torch.uint8, device=device)
    target = torch.empty(COPY, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    timing = interleave(
        {"copy": lambda: target.copy_(source)}, rounds=10, seconds=2.0, device=torch.device(device).type
    )
    return COPY / timing["copy"].median


def _link(device: str) -> tuple[float, float]:
    """(bytes a second, seconds) of messages between two processes that send to each other at the same time."""
    cuda = torch.device(device).type == "cuda" and torch.cuda.device_count() > 1
    with Processes(2, backend="nccl" if cuda else "gloo") as processes:
        large, small = processes.run(_messages, cuda)[0]
    return COPY / max(large - small, 1e-9), small


def _messages(cuda: bool) -> list[float]:
    """Median seconds of a message of ``COPY`` bytes each way, and of one of a byte."""
    rank = dist.get_rank()
    device = f"cuda:{rank}" if cuda else "cpu"
    times = []
    for size in (COPY, 1):
        mine, other = torch.ones(2, size, dtype=torch.uint8, device=device)
        samples = []
        for _ in range(7):
            dist.barrier()
            begin = time.perf_counter()
            ops = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
            for request in dist.batch_isend_irecv(ops):
                request.wait()
            if cuda:
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - begin)
        times.append(median(samples))
    return times
