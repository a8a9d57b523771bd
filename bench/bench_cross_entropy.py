# SPDX-License-Identifier: Apache-2.0
"""The loss of a last layer under pytest-benchmark: everybody on every case, the result checked first.

``pytest bench/bench_cross_entropy.py --benchmark-disable`` shows in seconds that all of them run and are right.
``--full`` takes the real sizes, of which the largest needs 16 GiB. Timings are not interleaved here, so they give no
ratios: ``gapless bench cross-entropy`` does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gapless.bench.cross_entropy import IMPLEMENTATIONS, LossCase, calls, cases_of, describe, extra_bytes, run
from gapless.bench.machine import machine


def full_cases() -> Iterator[LossCase]:
    yield from cases_of(directions=("fwd", "fwd_bwd"))
    yield from cases_of(tokens=(2048,), classes=(32_000,), dtypes=("bfloat16", "float32"))


def smoke_cases() -> Iterator[LossCase]:
    how = {"tokens": (33,), "classes": (300,), "hidden": (40,)}
    yield from cases_of(**how, dtypes=("float32", "bfloat16"), directions=("fwd", "fwd_bwd"))
    yield from cases_of(**how, ignored=0.5)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" not in metafunc.fixturenames:
        return
    chosen = full_cases() if metafunc.config.getoption("full") else smoke_cases()
    pairs = [(case, name) for case in chosen for name in IMPLEMENTATIONS]
    metafunc.parametrize(
        ("case", "name"), pairs, ids=[f"{c.label}-{n}".replace(" ", "-").replace(",", "") for c, n in pairs]
    )


def test_cross_entropy(benchmark, case: LossCase, name: str) -> None:
    call = calls(case, [name])[0][name]()
    said = call.verdict()
    assert call.peer or said == "ok", said
    benchmark.group = case.label
    if not benchmark.disabled:
        more = {"impl": name, "peer": call.peer, "check": said, "samples": 0, "machine": machine()}
        benchmark.extra_info |= describe(case, call) | more
    benchmark(call.run)


def test_rows() -> None:
    """What the command shows, of a small case."""
    (case,) = cases_of(tokens=[40], classes=[500], hidden=[16])
    rows, skipped = run(case, ["torch"], rounds=1, seconds=0.01, with_memory=False)
    assert [row["impl"] for row in rows] == ["gapless", "torch"] and not skipped
    assert rows[0]["check"] == "ok" and rows[0]["others"]["torch"] > 0


def test_memory() -> None:
    (case,) = cases_of(tokens=[2048], classes=[70_000], hidden=[16])
    ours, theirs = (extra_bytes(case, name, torch.get_num_threads()) for name in ("gapless", "torch"))
    assert ours is None or theirs is None or ours < theirs
