# SPDX-License-Identifier: Apache-2.0
"""block_sparse_attention's CPU kernels: values, gradients, edges and bitwise promises."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import gapless
from gapless import BlockLayout, _native
from gapless.plan.block_grid import BLOCK_SIZES
from gapless.testing import (
    Batch,
    Results,
    assert_results,
    assert_within_budget,
    make_batch,
    oracle_and_witness,
)
from gapless.testing.block_sparse import (
    Drawn,
    attend_layout,
    layout_batch,
    layout_oracle_and_witness,
    layouts,
    make_layout,
)

native = partial(gapless.block_sparse_attention, impl="native")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (FP32, BF16, FP16, FP64)]
CAUSAL = {"causal": True}
FEW_NUMBERS = "the witness of a small batch, or of rows with one key, may meet the oracle by luck"


class Case(NamedTuple):
    """One named layout, shape and mask."""

    id: str
    lengths_q: list[int]
    lengths_k: list[int] | None = None
    heads: int = 2
    kv_heads: int = 1
    dim: int = 24
    dim_v: int | None = None
    options: dict[str, Any] = {}
    how: dict[str, Any] = {}  # to make_layout
    reason: str | None = None  # why the budget is twice as wide

    def layout(self) -> BlockLayout:
        return make_layout(
            self.lengths_q, self.lengths_k, **({"block_q": 32, "block_k": 32, "partial": 0.4} | self.how)
        )

    def batch(self, dtype: torch.dtype, **how: Any) -> Batch:
        return make_batch(
            self.lengths_q, self.lengths_k, self.heads, self.kv_heads, self.dim, self.dim_v, dtype, **how
        )


def heads_case(heads: int, kv_heads: int, pattern_heads: int) -> Case:
    """Query heads, kv heads and patterns, blocks of which hold up to 256 rows and more."""
    how = {"heads": pattern_heads, "density": [(i % 3 + 1) / 4 for i in range(pattern_heads)]}
    return Case(
        f"heads_{heads}_{kv_heads}_{pattern_heads}", [70, 33], None, heads, kv_heads, options=CAUSAL, how=how
    )


CASES = [
    *(
        Case(
            f"blocks_{q}_{k}", [290, 0, 33], [301, 17, 40], options={"causal": q > k},
            how={"block_q": q, "block_k": k, "heads": 2},
        )
        for q, k in product(BLOCK_SIZES, BLOCK_SIZES)
    ),
    # Heads: of queries, of keys, of patterns.
    *(
        heads_case(*n)
        for n in [
            (1, 1, 1), (3, 3, 1), (3, 3, 3), (4, 2, 1), (4, 2, 2), (4, 2, 4), (8, 2, 4), (8, 4, 2), (6, 1, 3),
            (6, 1, 6), (12, 6, 3),
        ]
    ),
    Case("many_rows_to_a_block", [300, 20], heads=8, options=CAUSAL, how={"block_q": 256, "block_k": 16}),
    # Head dims.
    *(Case(f"dim_{d}", [17, 66], dim=d, options=CAUSAL) for d in (1, 3, 8, 15, 40, 64, 80, 128, 256)),
    Case("dim_192_128", [17, 66], dim=192, dim_v=128, options=CAUSAL),
    Case("dim_5_11", [17, 66], dim=5, dim_v=11),
    Case("dim_64_1", [17, 66], dim=64, dim_v=1),
    Case("dim_33_96", [17, 66], dim=33, dim_v=96),
    # Lengths.
    Case("off_the_block", [1, 15, 16, 17, 31, 32, 33, 63, 65], options=CAUSAL, how={"density": 1.0}),
    Case("more_queries", [90, 5, 40], [47, 0, 33], options=CAUSAL),
    Case("more_keys", [47, 0, 33], [190, 5, 40], options=CAUSAL),
    Case("long", [1100], dim=64, options=CAUSAL, how={"block_q": 64, "block_k": 64, "partial": 0.1}),
    Case("many_keys_of_a_wide_head", [300], [1300], dim=256, how={"block_q": 16, "block_k": 16, "partial": 0.1}),
    Case(
        "many_keys_causal", [700, 90], [1300, 20], heads=4, kv_heads=2, dim=256, options=CAUSAL,
        how={"block_q": 32, "block_k": 64, "heads": 2, "density": [0.9, 0.1], "partial": 0.1},
    ),
    # Scores.
    Case("scale", [33, 70], options={"scale": 0.7, "causal": True}),
    Case("scale_negative", [33, 70], options={"scale": -0.3}),
    Case("scale_zero", [33, 70], options={"scale": 0.0}),
    Case("softcap", [33, 140], options={"softcap": 2.0, "causal": True}),
    Case("softcap_saturated", [33, 70], options={"softcap": 0.05}),
    # Which blocks.
    Case("nothing_listed", [33, 70], how={"density": 0.0}),
    Case("all_listed", [33, 170], how={"density": 1.0, "partial": 0.0}),
    Case("all_partial", [33, 170], options=CAUSAL, how={"density": 1.0, "partial": 1.0}),
    Case("none_partial", [33, 170], options=CAUSAL, how={"partial": 0.0}),
    Case(
        "empty_rows_and_columns", [200, 90],
        how={"heads": 2, "density": 0.8, "empty_rows": 0.4, "empty_columns": 0.4},
    ),
    Case("skewed_heads", [310], heads=4, kv_heads=4, how={"heads": 4, "density": [0.95, 0.05, 0.0, 0.6]}),
    Case(
        "everything", [40, 0, 166, 9], [170, 5, 130, 0], heads=4, kv_heads=2, dim=20, dim_v=12,
        options={"causal": True, "softcap": 3.0, "scale": 0.4},
        how={"block_q": 64, "block_k": 16, "heads": 2, "empty_rows": 0.2, "empty_columns": 0.2},
    ),
    # Nothing to do.
    Case("empty_batch", []),
    Case("all_empty", [0, 0, 0], options=CAUSAL),
    Case("only_keys", [0, 0], [3, 40]),
    Case("only_queries", [3, 40], [0, 0]),
]  # fmt: skip
BY_ID = {case.id: case for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_forward_and_backward(case: Case, dtype: torch.dtype):
    batch, layout = case.batch(dtype), case.layout()
    actual = attend_layout(native, batch, layout, **case.options)
    assert actual.out.dtype == dtype
    assert actual.lse.dtype == batch.dlse.dtype
    wider = {"factor": 4.0, "reason": case.reason} if case.reason and dtype != FP64 else {}
    assert_results(actual, *layout_oracle_and_witness(batch, layout, **case.options), **wider)


@settings(max_examples=40)
@given(drawn=layouts(max_length=150))
def test_any_layout(drawn: Drawn):
    layout, heads, kv_heads, seed = drawn
    dtype = (FP32, BF16, FP16, FP64)[seed % 4]
    batch = layout_batch(layout, heads=heads, kv_heads=kv_heads, dim=8 + seed % 30, dtype=dtype, seed=seed)
    options = {"causal": seed % 3 == 0, "softcap": 3.0 * (seed % 5 == 0)}
    actual = attend_layout(native, batch, layout, **options)
    oracle, witness = layout_oracle_and_witness(batch, layout, **options)
    # One budget for the gradients, as dq and dk of rows that see one key are nothing but rounding.
    wider = {"factor": 64.0 if dtype == FP64 else 8.0, "reason": FEW_NUMBERS}
    for names in (("out",), ("lse",), ("dq", "dk", "dv")):
        parts = (torch.cat([getattr(x, n).flatten() for n in names]) for x in (actual, oracle, witness))
        assert_within_budget(*parts, name=", ".join(names), **wider)


# Against dense attention.


def dense(batch: Batch, mask: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """torch's attention with a boolean mask [heads, len_q, len_k] of one sequence: out, dq, dk, dv.

    A row that sees nothing is let see everything, and no gradient arrives at it.
    """
    leaves = [x.to(dtype).requires_grad_() for x in (batch.q, batch.k, batch.v)]
    sees = mask.any(-1)
    q, k, v = (x.transpose(0, 1)[None] for x in leaves)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~sees[..., None], enable_gqa=True)
    out = out[0].transpose(0, 1) * sees.T[..., None]
    return [out.detach(), *torch.autograd.grad(out, leaves, batch.dout.to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_of_dense_attention_with_the_same_pattern(
    dim: int, causal: bool, block: int, dtype: torch.dtype
):
    layout = make_layout(
        [300], [333], heads=2, block_q=block, block_k=block, density=0.7, partial=0.2, empty_rows=0.4, seed=3
    )
    batch = layout_batch(layout, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    got = attend_layout(native, batch, layout, causal=causal, dlse=False)
    mask = layout.to_token_mask(causal)[0].repeat_interleave(2, 0)
    assert not mask.any(-1).all() and not mask.all()
    factor = {"factor": 64.0, "reason": "the witness is the oracle itself"} if dtype == FP64 else {}
    for name, want, naive in zip(
        ("out", "dq", "dk", "dv"), dense(batch, mask, FP64), dense(batch, mask, dtype), strict=True
    ):
        assert_within_budget(getattr(got, name), want, naive, name=name, **factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_layout_of_all_blocks_is_varlen_attention(causal: bool, dtype: torch.dtype):
    lengths = [1, 0, 200, 65]
    layout = make_layout(lengths, block_q=64, block_k=32, density=1.0)
    batch = make_batch(lengths, None, 4, 2, 64, dtype=dtype)
    assert_results(
        attend_layout(native, batch, layout, causal=causal), *oracle_and_witness(batch, causal=causal)
    )


def test_causal_argument_is_the_causal_pattern():
    """Masking by geometry and by the cells of partial blocks give the same."""
    batch = make_batch([150, 40], [190, 30], 2, 1)
    masks = [
        torch.ones(1, q, k, dtype=torch.bool).tril(k - q)
        for q, k in zip(*([150, 40], [190, 30]), strict=True)
    ]
    cells = BlockLayout.from_token_mask(masks, block_q=32, block_k=64)
    everything = make_layout([150, 40], [190, 30], block_q=32, block_k=64, density=1.0)
    oracle, witness = oracle_and_witness(batch, causal=True)
    assert_results(attend_layout(native, batch, cells), oracle, witness)
    assert_results(attend_layout(native, batch, everything, causal=True), oracle, witness)
    assert_results(attend_layout(native, batch, cells, causal=True), oracle, witness)


# Rows and keys that nobody lists.


SPARSE = ["everything", "empty_rows_and_columns", "all_partial", "more_queries", "skewed_heads"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPARSE)
def test_what_is_not_seen_is_exactly_zero(case: str, dtype: torch.dtype):
    how = BY_ID[case]
    batch, layout = how.batch(dtype), how.layout()
    got = attend_layout(native, batch, layout, **how.options)
    masks = layout.to_token_mask(how.options.get("causal", False))
    rows = torch.cat([m.any(2) for m in masks], 1).repeat_interleave(how.heads // layout.heads, 0)
    assert not rows.all(), "the case has to have rows that see nothing"
    assert (got.out[~rows.T] == 0).all() and (got.dq[~rows.T] == 0).all()
    assert (got.lse[~rows] == -torch.inf).all() and got.lse[rows].isfinite().all()
    seen = torch.cat([m.any(1) for m in masks], 1).repeat_interleave(how.heads // layout.heads, 0)
    keys = seen.unflatten(0, (how.kv_heads, -1)).any(1)
    assert not keys.all(), "the case has to have keys that nobody sees"
    assert (got.dk[~keys.T] == 0).all() and (got.dv[~keys.T] == 0).all()
    assert (got.dv[keys.T] != 0).any(1).all()


KINDS = {
    "row": lambda mask: mask[:, 1].zero_(),
    "first_row": lambda mask: mask[:, 0].zero_(),
    "last_row": lambda mask: mask[:, -1].zero_(),
    "column": lambda mask: mask[:, :, 1].zero_(),
    "first_column": lambda mask: mask[:, :, 0].zero_(),
    "last_column": lambda mask: mask[:, :, -1].zero_(),
    "head": lambda mask: mask[1].zero_(),
    "all_but_one_block": lambda mask: (mask.zero_(), mask[1, 2, 3].fill_(True)),
    "only_above_the_diagonal": lambda mask: mask.triu_(1),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_empty_row_and_column(kind: str, causal: bool):
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    KINDS[kind](mask)
    layout = BlockLayout.from_mask(mask, block_q=32, block_k=32, lengths_q=[120], lengths_k=[115])
    for dtype in (FP32, BF16):
        batch = layout_batch(layout, heads=4, kv_heads=2, dim=16, dtype=dtype)
        got = attend_layout(native, batch, layout, causal=causal)
        assert_results(got, *layout_oracle_and_witness(batch, layout, causal=causal))
        seen = layout.to_token_mask(causal)[0]
        assert (got.dv[~seen.any(1).T] == 0).all() and (got.dk[~seen.any(1).T] == 0).all()
        assert (got.out[~seen.any(2).repeat_interleave(2, 0).T] == 0).all()


# Gradients.


@pytest.mark.parametrize("case", ["everything", "off_the_block", "only_queries"])
def test_gradient_through_out_only_and_lse_only(case: str):
    how = BY_ID[case]
    batch, layout, options = how.batch(FP32), how.layout(), how.options
    assert_results(
        attend_layout(native, batch, layout, dlse=False, **options),
        *layout_oracle_and_witness(batch, layout, dlse=False, **options),
    )
    no_dout = Batch(**{**vars(batch), "dout": torch.zeros_like(batch.dout)})
    leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    _, lse = native(*leaves, layout, return_lse=True, **options)
    got = torch.autograd.grad(lse, leaves, batch.dlse)
    oracle, witness = layout_oracle_and_witness(no_dout, layout, **options)
    for x, name in zip(got, ("dq", "dk", "dv"), strict=True):
        assert_within_budget(x, getattr(oracle, name), getattr(witness, name), name=name)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_gradients_of_some_inputs(wanted: str):
    how = BY_ID["everything"]
    batch, layout = how.batch(FP32), how.layout()
    full = attend_layout(native, batch, layout, **how.options)._asdict()
    tensors = {n: getattr(batch, n).detach().requires_grad_(n in wanted) for n in "qkv"}
    torch.autograd.backward(
        native(*tensors.values(), layout, return_lse=True, **how.options), [batch.dout, batch.dlse]
    )
    for name, x in tensors.items():
        if name in wanted:
            assert torch.equal(x.grad, full["d" + name])
        else:
            assert x.grad is None


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 1.5}, {"scale": 0.9}], ids=str)
def test_gradcheck(options: dict):
    """Analytic against numeric derivatives of out and LSE; rows that see nothing have a constant LSE of -inf."""
    layout = make_layout(
        [18, 0, 3], [18, 2, 4], heads=2, block_q=16, block_k=16, density=0.7, partial=0.5, seed=2
    )
    batch = layout_batch(layout, heads=2, kv_heads=1, dim=2, dim_v=1, dtype=FP64)
    rows = layout.to_token_mask(options.get("causal", False))[0].any(2)
    assert rows.any()

    def function(q, k, v):
        out, lse = native(q, k, v, layout, return_lse=True, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (batch.q, batch.k, batch.v)])


# Strides.


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype):
    case = BY_ID["everything"]
    scattered, plain, layout = case.batch(dtype, non_contiguous=True), case.batch(dtype), case.layout()
    assert not any(x.is_contiguous() for x in (scattered.q, scattered.k, scattered.v, scattered.dout))
    for got, want in zip(
        attend_layout(native, scattered, layout, **case.options)[:5],
        attend_layout(native, plain, layout, **case.options)[:5],
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["last_stride_2", "heads_expanded", "dim_expanded", "tokens_expanded"])
def test_odd_strides(kind: str):
    """Strides other than 1 in the last dimension, and zero strides."""
    layout = make_layout([13, 37], block_q=16, block_k=16, partial=0.5)
    batch = make_batch([50], dim=32)
    q, k, v = batch.q, batch.k, batch.v
    if kind == "last_stride_2":
        odd = [x[..., ::2] for x in (q, k, v)]
    elif kind == "heads_expanded":
        odd = [x[:, :1].expand(-1, 2, -1) for x in (q, k, v)]
    elif kind == "dim_expanded":
        odd = [x[..., :1].expand(-1, -1, 16) for x in (q, k, v)]
    else:
        odd = [x[:1].expand(50, -1, -1) for x in (q, k, v)]
    results = []
    for tensors in (odd, [x.contiguous() for x in odd]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = native(*leaves, layout, causal=True)
        # The gradient of a sum has zero strides itself.
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_strides_beyond_32_bits():
    stride = 2**30 + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    storage = torch.frombuffer(mmap.mmap(-1, 4 * stride + 128, flags=flags), dtype=BF16)
    layout = make_layout([3], block_q=16, block_k=16, density=1.0)
    small = layout_batch(layout, heads=2, dtype=BF16)
    want = attend_layout(native, small, layout, causal=True)
    for name in ("q", "k", "v", "dout"):
        x = getattr(small, name)
        far = storage.as_strided(x.shape, (stride, x.shape[2], 1)).copy_(x).detach()
        moved = Batch(**{**vars(small), name: far})
        for a, b in zip(attend_layout(native, moved, layout, causal=True)[:5], want[:5], strict=True):
            assert torch.equal(a, b), name


# Values that are not numbers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_bad_values_reach_no_block_that_does_not_meet_them(where: str, poison: float, dtype: torch.dtype):
    """One bad token: rows whose lists do not have its block, and keys that nobody lists with it, keep their bits."""
    layout = make_layout([260, 100], heads=2, block_q=32, block_k=32, density=0.5, partial=0.3, seed=4)
    clean, bad = (layout_batch(layout, heads=2, kv_heads=2, dim=16, dtype=dtype) for _ in range(2))
    token = 150
    getattr(bad, where)[token] = poison
    want, got = attend_layout(native, clean, layout), attend_layout(native, bad, layout)
    cells = layout.grid.split(layout.to_mask())[0]  # [heads, query blocks, key blocks] of the first sequence
    block = token // 32
    if where in ("k", "v"):
        rows = cells[:, :, block]
        keys = (cells & rows[:, :, None]).any(1)
    else:
        rows = torch.zeros_like(cells[:, :, 0])
        rows[:, block] = True
        keys = cells[:, block]
    assert rows.any() and not rows.all() and not keys.all()
    for name, hit in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
        safe = F.pad(~hit.repeat_interleave(32, 1)[:, :260], (0, 100), value=True).T  # [tokens, heads]
        assert torch.equal(getattr(got, name)[safe], getattr(want, name)[safe]), name
        if name == "out":
            assert torch.equal(got.lse.T[safe], want.lse.T[safe])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_reaches_the_rows_that_see_it_and_no_others(where: str, dtype: torch.dtype):
    layout = make_layout([150], block_q=32, block_k=32, density=0.6, partial=0.5)
    clean, bad = (layout_batch(layout, heads=2, kv_heads=2, dim=16, dtype=dtype) for _ in range(2))
    getattr(bad, where)[70] = torch.nan
    mask = layout.to_token_mask(True)[0][0]
    sees = mask[:, 70] if where == "k" else (torch.arange(150) == 70) & mask.any(1)
    assert sees.any() and not sees.all()
    want, got = (attend_layout(native, x, layout, grad=False, causal=True) for x in (clean, bad))
    assert got.out[sees].isnan().all()
    assert got.lse[:, sees].isnan().all()
    assert torch.equal(got.out[~sees], want.out[~sees])
    assert torch.equal(got.lse[:, ~sees], want.lse[:, ~sees])


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_of_minus_infinity_is_a_key_not_seen(dtype: torch.dtype):
    layout = make_layout([90], block_q=32, block_k=16, density=0.7, seed=1)
    batch = layout_batch(layout, heads=2, dim=16, dtype=dtype)
    batch.q.abs_()
    batch.k[40] = -torch.inf
    mask = layout.to_token_mask()[0]
    mask[:, :, 40] = False
    without = BlockLayout.from_token_mask(mask, block_q=32, block_k=16)
    finite = Batch(**{**vars(batch), "k": batch.k.clone()})
    finite.k[40] = 0
    got = attend_layout(native, batch, layout, grad=False)
    assert_results(got, *layout_oracle_and_witness(finite, without, grad=False))


# Bitwise promises.

INVARIANT = [
    "everything",
    "skewed_heads",
    "all_partial",
    "blocks_16_256",
    "blocks_256_16",
    "heads_8_2_4",
    "long",
]


def identical(a: Results, b: Results) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", INVARIANT)
def test_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype, threads):
    case = BY_ID[name]
    batch, layout = case.batch(dtype), case.layout()
    results = []
    for n in (1, 2, 3, 4, 1):
        threads(n)
        results.append(attend_layout(native, batch, layout, **case.options))
    assert all(identical(results[0], r) for r in results[1:])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_same_bits_however_rows_are_grouped_for_threads(dtype: torch.dtype, threads):
    """Enough rows that more threads would get smaller items, and keys that several of them wait for."""
    layout = make_layout([1500], [1700], heads=4, block_q=16, block_k=32, density=[0.7, 0.05, 0.5, 0.2])
    batch = layout_batch(layout, heads=8, kv_heads=4, dim=128, dtype=dtype)
    results = []
    for n in (1, 2, 4):
        threads(n)
        results.append(attend_layout(native, batch, layout, grad=n < 4, causal=True))
    assert identical(results[0], results[1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[2][:2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_same_bits_in_every_run(dtype: torch.dtype, threads):
    """Many tiles of keys hand the same sums on to each other, by two threads."""
    threads(2)
    layout = make_layout([200, 40], [2100, 40], heads=2, block_q=32, block_k=32, density=0.15, partial=0.2)
    batch = layout_batch(layout, heads=4, kv_heads=2, dim=16, dtype=dtype)
    first = attend_layout(native, batch, layout)
    assert_results(first, *layout_oracle_and_witness(batch, layout))
    for _ in range(20):
        assert identical(attend_layout(native, batch, layout), first)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_company_of_sequences_does_not_matter(dtype: torch.dtype):
    """A packed batch equals one call for each sequence: bitwise."""
    lengths_q, lengths_k = [70, 0, 33, 200, 5], [70, 9, 90, 150, 0]
    layout = make_layout(lengths_q, lengths_k, heads=2, block_q=32, block_k=16, partial=0.4)
    batch = layout_batch(layout, heads=4, kv_heads=2, dim=24, dtype=dtype)
    whole = attend_layout(native, batch, layout, causal=True)
    masks, at_q, at_k = layout.to_token_mask(), 0, 0
    for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        qs, ks = slice(at_q, at_q + n), slice(at_k, at_k + m)
        alone = Batch(
            batch.q[qs], batch.k[ks], batch.v[ks], torch.tensor([0, n]), torch.tensor([0, m]), batch.dout[qs],
            batch.dlse[:, qs],
        )  # fmt: skip
        got = attend_layout(
            native, alone, BlockLayout.from_token_mask([masks[i]], block_q=32, block_k=16), causal=True
        )
        want = Results(whole.out[qs], whole.lse[:, qs], whole.dq[qs], whole.dk[ks], whole.dv[ks])
        assert identical(got, want), i
        at_q, at_k = at_q + n, at_k + m


def test_same_bits_without_autograd():
    case = BY_ID["everything"]
    batch, layout = case.batch(FP32), case.layout()
    want = attend_layout(native, batch, layout, **case.options)
    with torch.no_grad():
        out = native(batch.q.requires_grad_(), batch.k, batch.v, layout, **case.options)
    assert out.grad_fn is None
    assert torch.equal(out, want.out)


# Compiled, and on other instruction sets.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo's own
def test_compiles_in_one_graph():
    torch._dynamo.reset()
    case = BY_ID["everything"]
    batch, layout = case.batch(FP32), case.layout()
    want = attend_layout(native, batch, layout, **case.options)
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    assert identical(attend_layout(compiled, batch, layout, **case.options), want)


ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
ISA_CASES = [
    ("everything", FP32), ("everything", BF16), ("blocks_16_16", BF16), ("blocks_256_16", FP32), ("heads_8_2_4", FP16),
    ("many_keys_causal", FP32), ("dim_33_96", FP32), ("dim_128", BF16), ("softcap", FP64), ("all_partial", BF16),
]  # fmt: skip
CHILD = """
import sys, torch, gapless
from functools import partial
from gapless import _native
from gapless.testing.block_sparse import attend_layout, make_layout
native = partial(gapless.block_sparse_attention, impl="native")
taken = []
for batch, lengths, how, options in torch.load(sys.argv[1], weights_only=False):
    taken.append(tuple(attend_layout(native, batch, make_layout(*lengths, **how), **options)))
torch.save((_native.cpu_isa(), taken), sys.argv[2])
"""


@pytest.mark.parametrize("isa", ISAS)
def test_isa_gives_the_reference(isa: str, tmp_path):
    if isa == _native.cpu_isa():
        pytest.skip("every other test here runs on it")
    cases = [(BY_ID[name], dtype) for name, dtype in ISA_CASES]
    given = [
        (
            case.batch(dtype), (case.lengths_q, case.lengths_k),
            {"block_q": 32, "block_k": 32, "partial": 0.4} | case.how, case.options,
        )
        for case, dtype in cases
    ]  # fmt: skip
    torch.save(given, tmp_path / "given.pt")
    inherited = {k: v for k, v in os.environ.items() if k not in ("GAPLESS_ISA", "ATEN_CPU_CAPABILITY")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "given.pt"), str(tmp_path / "taken.pt")],
        env=inherited | {"GAPLESS_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, runs = torch.load(tmp_path / "taken.pt")
    if name != isa:
        pytest.skip(f"this machine or build has no {isa} kernels; the best below it is {name}")
    for (case, dtype), run in zip(cases, runs, strict=True):
        assert_results(
            Results(*run), *layout_oracle_and_witness(case.batch(dtype), case.layout(), **case.options)
        )
