# SPDX-License-Identifier: Apache-2.0
"""One rank of the training demo: a small Llama under HDP, by the plans of one planner."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapless.bench import corpus, memory
from gapless.demo import train
from gapless.distributed import HDP
from gapless.distributed.data import ScheduleSampler, loader
from gapless.distributed.losses import TokenBatch, causal_lm_loss
from gapless.distributed.peers import traffic
from gapless.schedule import Cluster, CostModel, Schedule
from gapless.schedule.planners import planner


@dataclass(frozen=True)
class Settings:
    """A run of all ranks. ``planner`` "one" is a single process: the whole batch on one rank."""

    planner: str = "hdp"
    ranks: int = 4
    steps: int = 3
    tokens: int = 24576  # of a global batch
    capacity: int = 6144  # tokens of a rank
    context: int = 12288  # tokens of the longest sequences
    joined: float = 0.5  # share of the corpus's tokens in files that are joined to the longest sequences
    max_bytes: int = 3072  # of the other files
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    dtype: str = "float32"
    seed: int = 0
    cost: dict[str, Any] = field(default_factory=dict)


def texts(settings: Settings) -> list[Tensor]:
    """int64 byte tokens of whole files, and of files joined until the context is full: a long tail."""
    context, paths = settings.context, corpus.files(settings.max_bytes)
    files = [torch.from_numpy(corpus.tokens(path)) for path in paths]
    total = sum(map(len, files))
    order = np.random.default_rng(settings.seed).permutation(len(files)).tolist()
    chain, taken = [], 0
    while taken < settings.joined * total:
        chain.append(files[order.pop()])
        taken += len(chain[-1])
    whole = torch.cat(chain) if chain else torch.empty(0, dtype=torch.int64)
    return [files[i] for i in order] + [part for part in whole.split(context) if len(part) == context]


def plan(lengths: np.ndarray, settings: Settings) -> Schedule:
    """The schedule of a global batch by the planner that the settings name."""
    cost = CostModel.from_dict(settings.cost)
    if settings.planner == "one":
        return planner("lpt")(lengths, ranks=1, capacity=settings.tokens, cost=cost)
    cluster = Cluster(settings.ranks, ranks_per_node=2, nics_per_node=1)
    return planner(settings.planner)(lengths, ranks=cluster, capacity=settings.capacity, cost=cost)


def sampler(sequences: list[Tensor], settings: Settings) -> ScheduleSampler:
    """The same global batches whatever the planner, and as many as there are steps or more."""
    return ScheduleSampler(
        [len(s) for s in sequences],
        partial(plan, settings=settings),
        tokens=settings.tokens,
        seed=settings.seed,
        epochs=None,
    )


def pin(rank: int, ranks: int) -> None:
    """A rank is a device of its own, so it gets its share of the cores and no other rank's, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = rank * len(cores) // ranks
        os.sched_setaffinity(0, cores[first : max((rank + 1) * len(cores) // ranks, first + 1)])


def run(settings: Settings) -> dict[str, Any]:
    """Train on this rank; returns what it measured: a list of ``steps``, and the memory of the whole run."""
    alone = settings.planner == "one"
    if not alone:
        pin(dist.get_rank(), settings.ranks)
    torch.set_num_threads(1)
    shape = train.Settings(
        "packed",
        settings.steps,
        max_bytes=settings.context,
        hidden=settings.hidden,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        dtype=settings.dtype,
        seed=settings.seed,
    )
    hdp = HDP(train.build(shape))
    optimizer = torch.optim.AdamW(hdp.parameters(), lr=shape.learning_rate)
    sequences = texts(settings)
    batches = iter(loader(sequences, sampler(sequences, settings), rank=hdp.rank))
    idle = train.known(memory.reset_peak)
    steps = []
    for step in range(settings.steps):
        batch = next(batches)
        begins: list[float] = []

        def loss_of(model: nn.Module, tensors: TokenBatch, begins: list[float] = begins) -> Tensor:
            begins.append(time.perf_counter())
            return causal_lm_loss(model, tensors)

        if not alone:
            dist.barrier()
        before, begin, used = replace(traffic), time.perf_counter(), time.process_time()
        loss = hdp.step(batch.schedule, batch.tensors, loss_of)
        hdp.clip_gradients(1.0)
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        schedule = batch.schedule
        steps.append(
            {
                "step": step,
                "loss": loss.item(),
                "seconds": end - begin,
                "processor": time.process_time() - used,
                "tokens": schedule.tokens,
                "bytes": traffic.bytes - before.bytes,
                "waited": traffic.waited - before.waited,
                "begins": [b - begin for b in begins],
                "planned": {"makespan": schedule.makespan, "bound": schedule.lower_bound},
            }
        )
    del batches  # its threads
    highest = train.known(memory.peak) if idle else None
    return {"steps": steps, "idle_bytes": idle, "peak_bytes": highest}
