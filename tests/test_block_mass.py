# SPDX-License-Identifier: Apache-2.0
"""block_mass and attention_with_mass on the CPU: exact masses, known sums, stale LSE, bitwise promises."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch

import gapless
from gapless import _native, reference
from gapless.plan.block_grid import BLOCK_SIZES
from gapless.reference import block_sparse as block_reference
from gapless.testing import Batch, assert_within_budget, make_batch

native = partial(gapless.block_mass, impl="native")
fused = partial(gapless.attention_with_mass, impl="native")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (FP32, BF16, FP16, FP64)]
SAME_WITNESS = {"factor": 64.0, "reason": "the witness is the oracle itself: only the order of sums differs"}


class Case(NamedTuple):
    """One named shape and mask."""

    id: str
    lengths_q: list[int]
    lengths_k: list[int] | None = None
    heads: int = 2
    kv_heads: int = 1
    dim: int = 24
    options: dict[str, Any] = {}
    blocks: tuple[int, int] = (32, 32)

    def batch(self, dtype: torch.dtype, **how: Any) -> Batch:
        return make_batch(
            self.lengths_q, self.lengths_k, self.heads, self.kv_heads, self.dim, 16, dtype, **how
        )

    def keywords(self, batch: Batch) -> dict[str, Any]:
        return {
            "cu_seqlens_q": batch.cu_seqlens_q,
            "cu_seqlens_k": batch.cu_seqlens_k,
            "block_q": self.blocks[0],
            "block_k": self.blocks[1],
            **self.options,
        }


CAUSAL = {"causal": True}
CASES = [
    *(
        Case(f"blocks_{q}_{k}", [290, 0, 33], [301, 17, 40], options={"causal": q > k}, blocks=(q, k))
        for q, k in product(BLOCK_SIZES, BLOCK_SIZES)
    ),
    *(Case(f"dim_{d}", [17, 66], dim=d, options=CAUSAL) for d in (1, 3, 8, 15, 64, 80, 128, 256)),
    Case("heads_8_2", [70, 33], heads=8, kv_heads=2),
    Case("heads_3_3", [70, 33], heads=3, kv_heads=3, options=CAUSAL),
    Case("more_queries", [90, 5, 40], [47, 0, 33], options=CAUSAL),
    Case("more_keys", [47, 0, 33], [190, 5, 40], options=CAUSAL),
    Case("several_items", [1100, 30], [700, 900], options=CAUSAL, blocks=(256, 64)),
    Case("softcap", [33, 140], options={"softcap": 2.0, "causal": True}),
    Case("scale", [33, 140], options={"scale": 0.9}),
    Case("scale_negative", [33, 140], options={"scale": -0.3}),
    Case("one_token", [1, 1]),
    Case("empty_batch", []),
    Case("all_empty", [0, 0]),
    Case("only_keys", [0, 0], [3, 40]),
    Case("only_queries", [3, 40], [0, 0]),
]
BY_ID = {case.id: case for case in CASES}


def lse_of(batch: Batch, options: dict[str, Any]) -> torch.Tensor:
    qkv = (batch.q, batch.k, batch.v)
    return gapless.varlen_attention(
        *qkv, batch.cu_seqlens_q, batch.cu_seqlens_k, return_lse=True, impl="native", **options
    )[1]


def assert_mass(got: torch.Tensor, batch: Batch, lse: torch.Tensor, keywords: dict[str, Any]) -> None:
    """Within the budget of the reference that is given the same LSE."""
    oracle = block_reference.block_mass(batch.q.double(), batch.k.double(), lse.double(), **keywords)
    witness = block_reference.block_mass(batch.q, batch.k, lse, **keywords)
    assert got.dtype == witness.dtype == lse.dtype
    wider = SAME_WITNESS if batch.q.dtype == FP64 else {}
    assert_within_budget(got, oracle, witness, name="mass", **wider)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_mass(case: Case, dtype: torch.dtype):
    batch = case.batch(dtype)
    lse = lse_of(batch, case.options)
    assert_mass(native(batch.q, batch.k, lse, **case.keywords(batch)), batch, lse, case.keywords(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_fused(case: Case, dtype: torch.dtype):
    """out and LSE within varlen_attention's budget, the mass within that of the reference's own LSE."""
    batch = case.batch(dtype)
    got = fused(batch.q, batch.k, batch.v, **case.keywords(batch))
    found = []
    for wanted in (FP64, dtype):
        qkv = [x.to(wanted) for x in (batch.q, batch.k, batch.v)]
        out, lse = reference.varlen_attention(*qkv, batch.cu_seqlens_q, batch.cu_seqlens_k, **case.options)
        found.append((out, lse, block_reference.block_mass(*qkv[:2], lse, **case.keywords(batch))))
    wider = SAME_WITNESS if dtype == FP64 else {}
    for name, x, oracle, witness in zip(("out", "lse", "mass"), got, *found, strict=True):
        assert_within_budget(x, oracle, witness, name=name, **wider)


# What is known of the sums.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["block_mass", "fused"])
@pytest.mark.parametrize(
    "case", ["blocks_64_16", "more_queries", "several_items", "heads_8_2", "only_queries"]
)
def test_mass_of_a_row_of_blocks_is_its_number_of_queries(case: str, kind: str, dtype: torch.dtype):
    how = BY_ID[case]
    batch, keywords = how.batch(dtype), how.keywords(how.batch(dtype))
    if kind == "fused":
        _, lse, mass = fused(batch.q, batch.k, batch.v, **keywords)
    else:
        lse = lse_of(batch, how.options)
        mass = native(batch.q, batch.k, lse, **keywords)
    sees = lse[0] > -torch.inf
    counts = [
        sees[a:b][at : at + how.blocks[0]].sum().item()
        for a, b in pairwise(batch.cu_seqlens_q.tolist())
        for at in range(0, b - a, how.blocks[0])
    ]
    wanted = torch.tensor(counts, dtype=FP64).expand(how.heads, -1)
    exact = 1e-13 if dtype == FP64 else 2e-6  # a few roundings of sums of up to 256 rows
    if dtype in (BF16, FP16) and kind == "fused":
        exact = 2e-4  # products of bfloat16 may take a shorter exponential
    torch.testing.assert_close(mass.double().sum(-1), wanted, rtol=exact, atol=0)
    assert (mass >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_of_single_queries_sums_to_one(dtype: torch.dtype):
    """A sequence of one query is a block of its own: its masses are its weights, added up by blocks of keys."""
    keys = [1, 16, 17, 40, 100, 257]
    batch = make_batch([1] * 6, keys, 4, 2, 32, 16, dtype)
    lse = lse_of(batch, {})
    mass = native(
        batch.q, batch.k, lse, cu_seqlens_q=batch.cu_seqlens_q, cu_seqlens_k=batch.cu_seqlens_k, block_q=16,
        block_k=16,
    )  # fmt: skip
    assert mass.shape == (4, 6, 17)
    sums = mass.double().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-13 if dtype == FP64 else 2e-6, atol=0)
    for i, n in enumerate(keys):
        assert (mass[:, i, -(-n // 16) :] == 0).all()
        assert (mass[:, i, : -(-n // 16)] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["blocks_64_16", "more_queries", "several_items", "softcap"])
def test_one_pass_and_two_passes_agree(case: str, dtype: torch.dtype):
    how = BY_ID[case]
    batch = how.batch(dtype)
    _, lse, mass = fused(batch.q, batch.k, batch.v, **how.keywords(batch))
    assert_mass(mass, batch, lse, how.keywords(batch))
    assert_mass(native(batch.q, batch.k, lse, **how.keywords(batch)), batch, lse, how.keywords(batch))


def test_causal_mass_is_zero_above_the_diagonal():
    batch = make_batch([200])
    _, _, mass = fused(
        batch.q, batch.k, batch.v, cu_seqlens_q=batch.cu_seqlens_q, block_q=32, causal=True, block_k=32
    )
    assert (mass.triu(1) == 0).all()
    assert (mass.tril()[:, torch.ones(7, 7).tril().bool()] > 0).all()


# An LSE of another step.


@pytest.mark.parametrize("dtype", DTYPES)
def test_stale_lse_scales_each_row(dtype: torch.dtype):
    """A row whose LSE is off by d has its mass times exp(-d); normalised, a block of one row is exact again."""
    case = BY_ID["blocks_32_64"]
    batch, old = case.batch(dtype), case.batch(dtype, seed=1)
    stale = lse_of(old, case.options)
    assert_mass(native(batch.q, batch.k, stale, **case.keywords(batch)), batch, stale, case.keywords(batch))
    single = make_batch([1, 1], [100, 70], 2, 2, 24, 24, dtype)
    keywords = {"cu_seqlens_q": single.cu_seqlens_q, "cu_seqlens_k": single.cu_seqlens_k, "block_k": 16}
    exact = native(single.q, single.k, lse_of(single, {}), **keywords)
    moved = native(single.q, single.k, lse_of(single, {}) + 3, **keywords)
    rtol = 1e-12 if dtype == FP64 else 1e-5
    torch.testing.assert_close(
        moved, exact * torch.tensor(-3.0).double().exp().to(exact.dtype), rtol=rtol, atol=0
    )
    torch.testing.assert_close(
        moved / moved.sum(-1, keepdim=True), exact / exact.sum(-1, keepdim=True), rtol=rtol, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_lse_minus_infinity_has_no_mass(dtype: torch.dtype):
    batch = make_batch([40], heads=2, dtype=dtype)
    lse = lse_of(batch, {})
    lse[0, 5:20] = -torch.inf
    mass = native(batch.q, batch.k, lse, cu_seqlens_q=batch.cu_seqlens_q, block_q=16, block_k=16)
    assert_mass(mass, batch, lse, {"cu_seqlens_q": batch.cu_seqlens_q, "block_q": 16, "block_k": 16})
    sums = mass.double().sum(-1)
    torch.testing.assert_close(sums, torch.tensor([[5.0, 12, 8], [16, 16, 8]], dtype=FP64), rtol=2e-6, atol=0)


# Inputs as they come.


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype):
    case = BY_ID["heads_8_2"]
    scattered, plain = case.batch(dtype, non_contiguous=True), case.batch(dtype)
    keywords = case.keywords(plain)
    lse = lse_of(plain, case.options)
    far = torch.full((lse.shape[1] + 2, lse.shape[0] + 1), torch.nan, dtype=lse.dtype)[1:-1, 1:].T
    far.copy_(lse)
    assert not far.is_contiguous()
    assert torch.equal(
        native(scattered.q, scattered.k, far, **keywords), native(plain.q, plain.k, lse, **keywords)
    )
    for got, want in zip(
        fused(scattered.q, scattered.k, scattered.v, **keywords),
        fused(plain.q, plain.k, plain.v, **keywords),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_bad_values_stay_in_the_blocks_that_meet_them(where: str, poison: float, dtype: torch.dtype):
    """A bad query spoils its block of queries; a bad key the blocks that see it; a bad value no mass at all."""
    clean, bad = (make_batch([150, 60], heads=2, dtype=dtype) for _ in range(2))
    getattr(bad, where)[70] = poison
    keywords = {"cu_seqlens_q": clean.cu_seqlens_q, "block_q": 32, "block_k": 32, "causal": True}
    want, got = (fused(x.q, x.k, x.v, **keywords) for x in (clean, bad))
    blocks = torch.arange(7)
    met = {"q": blocks == 2, "k": (blocks >= 2) & (blocks < 5), "v": blocks < 0}[where]
    assert torch.equal(got[2][:, ~met], want[2][:, ~met])
    if where != "v":
        assert not got[2][:, met].isfinite().all()
    again = native(bad.q, bad.k, want[1], **keywords)
    assert torch.equal(again[:, ~met], native(clean.q, clean.k, want[1], **keywords)[:, ~met])
    if where == "k":  # its own column of blocks, and no other
        assert again[..., torch.arange(5) != 2].isfinite().all()


@pytest.mark.parametrize("size", [1e4, -1e4], ids=["positive", "negative"])
def test_huge_scores_do_not_overflow(size: float):
    batch = make_batch([100], dim=16)
    keywords = {"cu_seqlens_q": batch.cu_seqlens_q, "block_q": 16, "block_k": 16, "scale": size / 16}
    out, lse, mass = fused(batch.q, batch.k, batch.v, **keywords)
    assert out.isfinite().all() and lse.isfinite().all()
    sums = mass.double().sum(-1)
    torch.testing.assert_close(
        sums, torch.tensor([16.0] * 6 + [4.0], dtype=FP64).expand(2, -1), rtol=2e-6, atol=0
    )


def test_a_late_maximum_moves_earlier_sums():
    """Sums of early blocks are kept relative to a maximum that a later key raises, by more than exp can hold."""
    batch = make_batch([16], [160], heads=1, dim=16)
    batch.q[:] = 1
    rising = torch.arange(10).repeat_interleave(16)
    batch.k[:] = (rising * 30.0)[:, None, None]  # scores of 0, 120, 240, ... at scale 1 / 4
    _, _, mass = fused(
        batch.q, batch.k, batch.v, cu_seqlens_q=batch.cu_seqlens_q, cu_seqlens_k=batch.cu_seqlens_k, block_q=16,
        block_k=16,
    )  # fmt: skip
    assert mass[0, 0, -1].item() == pytest.approx(16, rel=1e-6)
    assert (mass[0, 0, :-2] == 0).all()


# Bitwise promises.


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("case", ["several_items", "heads_8_2", "blocks_16_256"])
def test_same_bits_for_any_number_of_threads_and_runs(case: str, dtype: torch.dtype, threads):
    how = BY_ID[case]
    batch = how.batch(dtype)
    keywords = how.keywords(batch)
    results = []
    for n in (1, 2, 3, 4, 2, 2):
        threads(n)
        found = fused(batch.q, batch.k, batch.v, **keywords)
        results.append([*found, native(batch.q, batch.k, found[1], **keywords)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_company_of_sequences_does_not_matter():
    lengths_q, lengths_k = [70, 0, 33, 600], [70, 9, 90, 150]
    batch = make_batch(lengths_q, lengths_k, 4, 2)
    options = {"block_q": 32, "block_k": 32, "causal": True}
    cu = {"cu_seqlens_q": batch.cu_seqlens_q, "cu_seqlens_k": batch.cu_seqlens_k}
    out, lse, mass = fused(batch.q, batch.k, batch.v, **cu, **options)
    two = native(batch.q, batch.k, lse, **cu, **options)
    at_q, at_k, row = 0, 0, 0
    for n, m in zip(lengths_q, lengths_k, strict=True):
        qs, ks = slice(at_q, at_q + n), slice(at_k, at_k + m)
        rows, columns = -(-n // 32), -(-m // 32)
        alone = {"cu_seqlens_q": torch.tensor([0, n]), "cu_seqlens_k": torch.tensor([0, m])}
        got = fused(batch.q[qs], batch.k[ks], batch.v[ks], **alone, **options)
        assert torch.equal(got[0], out[qs]) and torch.equal(got[1], lse[:, qs])
        assert torch.equal(got[2], mass[:, row : row + rows, :columns])
        again = native(batch.q[qs], batch.k[ks], lse[:, qs], **alone, **options)
        assert torch.equal(again, two[:, row : row + rows, :columns])
        assert (mass[:, row : row + rows, columns:] == 0).all()
        at_q, at_k, row = at_q + n, at_k + m, row + rows


# On other instruction sets.

ISA_CASES = [
    ("blocks_32_16", FP32), ("blocks_64_256", BF16), ("blocks_16_16", BF16), ("dim_80", FP16), ("softcap", FP64),
    ("several_items", BF16),
]  # fmt: skip
CHILD = """
import sys, torch, gapless
from gapless import _native
taken = []
for batch, keywords in torch.load(sys.argv[1], weights_only=False):
    out, lse, mass = gapless.attention_with_mass(batch.q, batch.k, batch.v, **keywords, impl="native")
    taken.append((lse, mass, gapless.block_mass(batch.q, batch.k, lse, **keywords, impl="native")))
torch.save((_native.cpu_isa(), taken), sys.argv[2])
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_isa_gives_the_reference(isa: str, tmp_path):
    if isa == _native.cpu_isa():
        pytest.skip("every other test here runs on it")
    cases = [(BY_ID[name], BY_ID[name].batch(dtype)) for name, dtype in ISA_CASES]
    torch.save([(batch, case.keywords(batch)) for case, batch in cases], tmp_path / "given.pt")
    inherited = {k: v for k, v in os.environ.items() if k not in ("GAPLESS_ISA", "ATEN_CPU_CAPABILITY")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "given.pt"), str(tmp_path / "taken.pt")],
        env=inherited | {"GAPLESS_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, runs = torch.load(tmp_path / "taken.pt")
    if name != isa:
        pytest.skip(f"this machine or build has no {isa} kernels; the best below it is {name}")
    for (case, batch), (lse, *masses) in zip(cases, runs, strict=True):
        for mass in masses:
            assert_mass(mass, batch, lse, case.keywords(batch))
