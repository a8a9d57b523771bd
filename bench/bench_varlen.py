# SPDX-License-Identifier: Apache-2.0
"""Varlen attention under pytest-benchmark: every implementation on every case, the result checked first.

``pytest bench/bench_varlen.py --benchmark-disable`` shows in seconds that all of them run and are right. ``--full``
takes the real workloads; ``--benchmark-json FILE`` and ``gapless bench report FILE`` give the table. Timings are not
interleaved here: compare implementations with ``gapless bench varlen``, and runs of one of them with this.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gapless.bench import cases, peers
from gapless.bench.machine import machine
from gapless.bench.measure import checked, describe, interleave, read, sgemm


def full_cases() -> Iterator[cases.Case]:
    """Every workload at both ratios of heads and both dims, then gradients and the other dtypes."""
    for name in cases.WORKLOADS:
        for kv_heads in (8, 2):
            for dim in (64, 128):
                yield cases.with_options(cases.workload(name), kv_heads=kv_heads, dim=dim)
    for name in "RMS":
        yield cases.with_options(cases.workload(name), direction="fwd_bwd")
    for dtype in ("bfloat16", "float16"):
        for name in "RM":
            yield cases.with_options(cases.workload(name), dtype=dtype)
        yield cases.with_options(cases.workload("R"), dtype=dtype, direction="fwd_bwd")
    yield cases.with_options(cases.workload("U"), causal=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = list(full_cases()) if metafunc.config.getoption("full") else list(cases.SMOKE)
    pairs = [(case, impl) for case in chosen for impl in peers.select(None, case)[0]]
    metafunc.parametrize(
        ("case", "implementation"), pairs, ids=[f"{c.label}-{i.name}".replace(" ", "-") for c, i in pairs]
    )


@pytest.fixture(scope="session")
def rates() -> dict[str, float]:
    """The rates of this machine, for the shares."""
    anchors = {"sgemm": sgemm(), "read": read(1 << 28)}
    timed = interleave({name: call for name, (call, _) in anchors.items()}, rounds=5, seconds=2)
    return {name: work / timed[name].median for name, (_, work) in anchors.items()}


def test_varlen(benchmark, request, case: cases.Case, implementation: peers.Implementation) -> None:
    inputs = case.inputs()
    run = implementation.prepare(inputs)
    verdict = checked(run, inputs)
    # How exact a peer is is its own affair; the table says so.
    assert implementation.peer or verdict == "ok", verdict
    benchmark.group = case.label
    if not benchmark.disabled:
        measured = request.getfixturevalue("rates")
        benchmark.extra_info |= describe(case) | {
            "impl": implementation.name,
            "peer": implementation.peer,
            "check": verdict,
            "extra_bytes": None,
            "samples": 0,
            "sgemm_flops_per_second": measured["sgemm"],
            "read_bytes_per_second": measured["read"] if case.paged else None,
            "machine": machine(),
        }
    benchmark(run.call(case.direction))
