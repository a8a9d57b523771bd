# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention under pytest-benchmark: every call of every study on every case, the result checked first.

``pytest bench/bench_block_sparse.py --benchmark-disable`` shows in seconds that all of them run and are right.
``--full`` takes the real sizes. Timings are not interleaved here, so they give no ratios: ``gapless bench blocksparse``
does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gapless.bench import adaspa
from gapless.bench.block_studies import STUDIES, cases_of, describe
from gapless.bench.machine import machine

# FlexAttention compiles for a minute; it has to be asked for on the command line of `gapless bench blocksparse`.
PEERS = ("gapless", "dense", "sdpa", "sdpa_mask", "gapless:block_sparse_attention")


def full_cases() -> Iterator:
    for study, known in STUDIES.items():
        for direction in known.directions:
            for dtype in ("float32", "bfloat16"):
                for dim in (64, 128):
                    for block in (64, 128):
                        yield from cases_of(study, None, direction, dim=dim, dtype=dtype, block=block)


def smoke_cases() -> Iterator:
    small = {"tokens": 300, "heads": 3, "dim": 32, "block": 32}
    for study, known in STUDIES.items():
        for direction in known.directions:
            densities = known.densities[:2]
            yield from cases_of(study, densities, direction, **small)
    yield from cases_of("efficiency", (0.3,), "fwd", **small | {"dtype": "bfloat16", "block": 64})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" not in metafunc.fixturenames:
        return
    chosen = full_cases() if metafunc.config.getoption("full") else smoke_cases()
    pairs = [(case, name) for case in chosen for name in STUDIES[case.study].makers(case, PEERS)[0]]
    metafunc.parametrize(
        ("case", "name"), pairs, ids=[f"{c.label}-{n}".replace(" ", "-").replace(":", "") for c, n in pairs]
    )


def test_block_sparse(benchmark, case, name: str) -> None:
    call = STUDIES[case.study].makers(case, PEERS)[0][name]()
    verdict = call.verdict()
    assert call.peer or verdict == "ok", verdict
    benchmark.group = case.label
    if not benchmark.disabled:
        benchmark.extra_info |= describe(case, call) | {
            "impl": name,
            "peer": call.peer,
            "check": verdict,
            "samples": 0,
            "machine": machine(),
        }
    benchmark(call.run)


def test_adaspa_takes_turns(benchmark) -> None:
    """A few steps of a small video, or all of them."""
    pytest.importorskip("diffusers")
    case = adaspa.case_of(0.3, tokens=512, heads=2, dim=32, block=32)
    benchmark.group = case.label
    if not benchmark.disabled:
        pytest.skip("`gapless bench blocksparse --study adaspa` times it")
    rows, skipped = benchmark(lambda: adaspa.measure(case, steps=6, search_steps=(2, 4)))
    assert not skipped
    assert [row["impl"] for row in rows] == ["dense", "AdaSpa", "ideal of the schedule"]
    assert {kind: found["steps"] for kind, found in rows[1]["kinds"].items()} == {
        "dense": 1, "fused search": 1, "sparse": 3, "cached search": 1,
    }  # fmt: skip
