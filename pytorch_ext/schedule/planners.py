# SPDX-License-Identifier: Apache-2.0
"""Planners by name, for commands, demos and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from gapless.schedule.schedule import Schedule

# name: (module, options, what it is)
PLANNERS: dict[str, tuple[str, dict, str]] = {
    "static-cp": ("static_cp", {}, "one grid of data x context parallel ranks for every batch"),
    "naive-hdp": (
        "bytescale",
        {"balance": None, "two_level": False},
        "ByteScale's algorithm 1: as many ranks as a sequence needs",
    ),
    "hdp": ("bytescale", {"balance": "dp"}, "ByteScale's balanced hybrid data parallelism"),
    "hdp-pp": (
        "bytescale",
        {"balance": "pp"},
        "the same for pipelines: similar micro-batches one after another",
    ),
    "zeppelin": ("zeppelin", {}, "zones by length, and tokens remapped between attention and linear modules"),
    "dynamic-cp": ("dynamic_cp", {"variant": "dynamic"}, "Megatron's dynamic context parallelism"),
    "hybrid-cp": ("dynamic_cp", {"variant": "hybrid"}, "Megatron's hybrid context parallelism"),
    "flexsp": ("flexsp", {}, "FlexSP's mixed-integer program over rings of 2^k ranks"),
    "multifit": ("packing", {"method": "multifit"}, "whole sequences, multifit with swaps"),
    "karmarkar-karp": ("packing", {"method": "karmarkar_karp"}, "whole sequences, verl's differencing"),
    "lpt": ("packing", {"method": "lpt"}, "whole sequences, longest processing time first"),
}

DEFAULTS = ("static-cp", "naive-hdp", "hdp", "zeppelin")


def planner(name: str) -> Callable[..., Schedule]:
    """``plan(lengths, *, ranks, capacity, cost)`` of that name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PLANNERS:
        raise ValueError(f"planner is {name!r}: it has to be one of {', '.join(PLANNERS)}")
    module, options, _ = PLANNERS[name]
    return partial(import_module(f"gapless.schedule.{module}").plan, **options)
