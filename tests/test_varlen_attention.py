# SPDX-License-Identifier: Apache-2.0
"""varlen_attention on the CPU against its reference: values, gradients, edges, pages, and bitwise promises."""

from __future__ import annotations

import mmap
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

import gapless
from gapless.plan.varlen import cache
from gapless.testing import (
    Batch,
    assert_results,
    assert_within_budget,
    attend,
    make_batch,
    oracle_and_witness,
    scatter_pages,
)

native = partial(gapless.varlen_attention, impl="native")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (FP32, BF16, FP16, FP64)]
MIXED = [0, 1, 15, 16, 17, 47, 48, 49, 63, 64, 65, 127]


class Case(NamedTuple):
    """One named shape and mask."""

    id: str
    lengths_q: list[int]
    lengths_k: list[int] | None = None
    heads: int = 2
    kv_heads: int = 1
    dim: int = 24
    dim_v: int | None = None
    options: dict[str, Any] = {}
    reason: str | None = None  # why the budget is twice as wide

    def batch(self, dtype: torch.dtype, **how: Any) -> Batch:
        return make_batch(
            self.lengths_q, self.lengths_k, self.heads, self.kv_heads, self.dim, self.dim_v, dtype, **how
        )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform from 0 to 1, the same in every run."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


CAUSAL = {"causal": True}
LONG_SUMS = "23 gradients of sums over 256 values each, added one by one where the reference adds in blocks"
ONE_KEY = (
    "with one key to a row, dout . v - delta cancels to rounding that the reference's softmax does not have"
)
SLOPES = torch.tensor([0.5, 0.0625])

CASES = [
    # Lengths: every side of a register, a tile and a block.
    Case("mixed", MIXED),
    Case("mixed_causal", MIXED, options=CAUSAL),
    Case("long", [513, 200, 1]),
    Case("long_causal", [1, 513, 0, 200], options=CAUSAL),
    Case("one_token", [1], options=CAUSAL, reason=ONE_KEY),
    Case("single_tokens", [1] * 7, options=CAUSAL, reason=ONE_KEY),
    # Queries and keys of different lengths, both ways: bottom right.
    Case("fewer_queries", [1, 3, 16, 65], [7, 64, 17, 200], options=CAUSAL),
    Case("more_queries", [7, 64, 17, 200], [1, 3, 16, 65], options=CAUSAL),
    Case("cross_full", [5, 130, 33], [97, 5, 33]),
    Case("no_keys", [4, 3, 0, 5], [0, 9, 6, 0]),
    Case("no_queries", [0, 0, 3], [5, 0, 3], options=CAUSAL),
    Case("more_queries_long", [700, 3], [520, 40], options=CAUSAL),
    # Heads.
    Case("mha", [33, 70], heads=3, kv_heads=3, options=CAUSAL),
    Case("gqa_4", [33, 70], heads=8, kv_heads=2, options=CAUSAL),
    Case("gqa_8", [33, 70, 1], heads=8, kv_heads=1, options=CAUSAL),
    Case("mqa_3", [65, 2], heads=3, kv_heads=1),
    # Head dims.
    *(
        Case(f"dim_{d}", [17, 66], dim=d, options=CAUSAL)
        for d in (1, 3, 7, 8, 9, 40, 64, 72, 80, 96, 128, 256)
    ),
    Case("dim_192_128", [17, 66], dim=192, dim_v=128, options=CAUSAL),
    Case("dim_5_11", [17, 66], dim=5, dim_v=11),
    Case("dim_64_1", [17, 66], dim=64, dim_v=1),
    Case("dim_1_256", [3, 20], dim=1, dim_v=256, reason=LONG_SUMS),
    # Windows.
    Case("window_0_0", [1, 50, 130], options={"window": (0, 0)}, reason=ONE_KEY),
    *(
        Case(f"window_{left}_{right}", [1, 50, 130], options={"window": (left, right)})
        for left, right in ((3, -1), (-1, 5), (17, 2), (0, -1), (-1, 0), (1000, 1000))
    ),
    Case("window_causal", [1, 50, 300], options={"window": (33, -1), "causal": True}),
    Case("window_causal_clips_right", [1, 50, 130], options={"window": (7, 9), "causal": True}),
    Case("window_more_queries", [80, 33], [20, 31], options={"window": (4, 3)}),
    Case("window_fewer_queries", [20, 31], [80, 33], options={"window": (4, 3)}),
    Case("window_long", [600], [620], options={"window": (40, 10)}),
    # Scores.
    Case("scale", [33, 70], options={"scale": 0.7, "causal": True}),
    Case("scale_negative", [33, 20], options={"scale": -0.3}),
    Case("scale_zero", [33, 20], options={"scale": 0.0}),
    Case("softcap", [33, 140], options={"softcap": 2.0, "causal": True}),
    Case("softcap_saturated", [33, 20], options={"softcap": 0.05}),
    Case("alibi", [33, 140], options={"alibi_slopes": SLOPES, "causal": True}),
    Case("alibi_both_sides", [33, 14], [20, 60], options={"alibi_slopes": SLOPES}),
    Case("alibi_per_sequence", [33, 14], options={"alibi_slopes": random(2, 2), "causal": True}),
    Case(
        "everything", [40, 0, 66, 9], [70, 5, 30, 0], heads=4, kv_heads=2, dim=20, dim_v=12,
        options={
            "causal": True, "window": (25, -1), "softcap": 3.0, "scale": 0.4, "alibi_slopes": random(4) / 8,
            "sinks": torch.tensor([0.5, -2.0, 3.0, 0.0]),
        },
    ),
    # Sinks.
    Case("sinks", [33, 70, 1], options={"sinks": torch.tensor([0.3, -1.5]), "causal": True}),
    Case("sinks_large", [33, 20], options={"sinks": torch.tensor([30.0, -60.0])}),
    Case("sinks_no_keys", [4, 3], [0, 9], options={"sinks": torch.tensor([0.3, -1.5])}),
    Case("sinks_more_queries", [40, 9], [12, 2], options={"sinks": torch.tensor([0.3, -1.5]), "causal": True}),
    # Nothing to do.
    Case("empty_batch", []),
    Case("all_empty", [0, 0, 0], options=CAUSAL),
    Case("only_keys", [0, 0], [3, 4]),
    Case("only_queries", [3, 4], [0, 0]),
]  # fmt: skip
BY_ID = {case.id: case for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_forward_and_backward(case: Case, dtype: torch.dtype):
    batch = case.batch(dtype)
    actual = attend(native, batch, **case.options)
    assert actual.out.dtype == dtype
    assert actual.lse.dtype == batch.dlse.dtype
    wider = {"factor": 4.0, "reason": case.reason} if case.reason and dtype != FP64 else {}
    assert_results(actual, *oracle_and_witness(batch, **case.options), **wider)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype):
    case = BY_ID["everything"]
    scattered, plain = case.batch(dtype, non_contiguous=True), case.batch(dtype)
    assert not any(x.is_contiguous() for x in (scattered.q, scattered.k, scattered.v, scattered.dout))
    for got, want in zip(
        attend(native, scattered, **case.options), attend(native, plain, **case.options), strict=True
    ):
        assert torch.equal(got, want)


def test_slices_of_one_projection():
    """q, k and v are views of one fused tensor, as models make them; the gradient flows back into it."""
    heads, kv_heads, dim = 4, 2, 16
    fused = torch.randn(50, (heads + 2 * kv_heads) * dim)
    grads = []
    for contiguous in (False, True):
        leaf = fused.clone().requires_grad_()
        parts = leaf.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        q, k, v = (x.unflatten(1, (-1, dim)) for x in parts)
        if contiguous:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = native(q, k, v, torch.tensor([0, 20, 50]), causal=True)
        out.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("layout", ["last_stride_2", "heads_expanded", "dim_expanded", "tokens_expanded"])
def test_odd_strides(layout: str):
    """Strides other than 1 in the last dimension, and zero strides."""
    q, k, v = (torch.randn(40, 2, 32) for _ in range(3))
    if layout == "last_stride_2":
        odd = [x[..., ::2] for x in (q, k, v)]
    elif layout == "heads_expanded":
        odd = [x[:, :1].expand(-1, 2, -1) for x in (q, k, v)]
    elif layout == "dim_expanded":
        odd = [x[..., :1].expand(-1, -1, 16) for x in (q, k, v)]
    else:
        odd = [x[:1].expand(40, -1, -1) for x in (q, k, v)]
    results = []
    for tensors in (odd, [x.contiguous() for x in odd]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = native(*leaves, torch.tensor([0, 13, 40]), causal=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_gradient_of_sum_has_zero_strides():
    case = BY_ID["mixed_causal"]
    batch = case.batch(FP32)
    dout = torch.ones(()).expand_as(batch.dout)
    assert dout.stride() == (0, 0, 0)
    got = attend(native, Batch(**{**vars(batch), "dout": dout}), **case.options)
    want = attend(native, Batch(**{**vars(batch), "dout": dout.contiguous()}), **case.options)
    for a, b in zip(got[:5], want[:5], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_sinks_in_the_dtype_of_the_inputs(dtype: torch.dtype):
    batch = make_batch([33, 0, 70], heads=2, kv_heads=1, dtype=dtype)
    sinks = torch.tensor([0.25, -1.5], dtype=dtype)  # exact in every dtype
    actual = attend(native, batch, sinks=sinks, causal=True)
    assert actual.dsinks.dtype == dtype
    assert_results(actual, *oracle_and_witness(batch, sinks=sinks, causal=True))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks", "qk", "kv"])
def test_gradients_of_some_inputs(wanted: str):
    batch = make_batch([33, 0, 20], heads=2, kv_heads=1)
    sinks = torch.tensor([0.3, -1.5])
    full = attend(native, batch, sinks=sinks, causal=True)._asdict()
    names = ["sinks"] if wanted == "sinks" else list(wanted)
    tensors = {"q": batch.q, "k": batch.k, "v": batch.v, "sinks": sinks}
    tensors = {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}
    out, lse = native(
        tensors["q"], tensors["k"], tensors["v"], batch.cu_seqlens_q, sinks=tensors["sinks"], causal=True,
        return_lse=True,
    )  # fmt: skip
    torch.autograd.backward([out, lse], [batch.dout, batch.dlse])
    for name, x in tensors.items():
        if name in names:
            assert torch.equal(x.grad, full["d" + name])
        else:
            assert x.grad is None


@pytest.mark.parametrize("case", ["everything", "mixed_causal", "no_keys"])
def test_gradient_through_out_only_and_lse_only(case: str):
    batch, options = BY_ID[case].batch(FP32), BY_ID[case].options
    assert_results(
        attend(native, batch, dlse=False, **options), *oracle_and_witness(batch, dlse=False, **options)
    )
    no_dout = Batch(**{**vars(batch), "dout": torch.zeros_like(batch.dout)})
    leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    _, lse = native(*leaves, batch.cu_seqlens_q, batch.cu_seqlens_k, return_lse=True, **options)
    got = torch.autograd.grad(lse, leaves, batch.dlse)
    oracle, witness = oracle_and_witness(no_dout, **options)
    for x, name in zip(got, ("dq", "dk", "dv"), strict=True):
        assert_within_budget(x, getattr(oracle, name), getattr(witness, name), name=name)


@pytest.mark.parametrize("block_q, block_k", [(16, 16), (48, 96), (1, 7), (1000, 1000)])
def test_any_tile_size_of_a_plan(block_q: int, block_k: int):
    batch = make_batch([0, 1, 65, 130], [5, 0, 97, 130], heads=2, kv_heads=1)
    plan = gapless.VarlenPlan.make(
        batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True, block_q=block_q, block_k=block_k
    )
    options = {"causal": True, "window": (50, -1)}
    assert_results(attend(native, batch, plan=plan, **options), *oracle_and_witness(batch, **options))


GRADCHECK = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (1, 1)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.1])},
    "sinks": {"sinks": torch.tensor([0.2, -0.4], dtype=FP64)},
    "sinks_softcap_window": {
        "sinks": torch.tensor([0.2, -0.4], dtype=FP64), "softcap": 2.0, "window": (2, 0), "scale": 0.9,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name: str):
    """Analytic against numeric derivatives of out and LSE; rows that see nothing have a constant LSE of -inf."""
    options = dict(GRADCHECK[name])
    batch = make_batch([3, 0, 2], [2 if "sinks" in options else 3, 1, 4], 2, 1, 3, 2, FP64)
    sinks = options.pop("sinks", None)
    tensors = [x.requires_grad_() for x in (batch.q, batch.k, batch.v, sinks) if x is not None]

    def function(q, k, v, sinks=None):
        out, lse = native(
            q, k, v, batch.cu_seqlens_q, batch.cu_seqlens_k, sinks=sinks, return_lse=True, **options
        )
        return out, lse

    assert torch.autograd.gradcheck(function, tensors)


def test_without_gradients_nothing_is_saved():
    batch = make_batch([5, 3])
    assert native(batch.q, batch.k, batch.v, batch.cu_seqlens_q).grad_fn is None
    with torch.no_grad():
        assert native(batch.q.requires_grad_(), batch.k, batch.v, batch.cu_seqlens_q).grad_fn is None


def test_rows_that_see_nothing():
    batch = make_batch([3], [1])
    result = attend(native, batch, causal=True)
    assert torch.equal(result.out[:2], torch.zeros_like(result.out[:2]))
    assert (result.lse[:, :2] == -torch.inf).all()
    assert torch.equal(result.dq[:2], torch.zeros_like(result.dq[:2]))
    sinks = torch.tensor([0.25, -4.0])
    result = attend(native, batch, causal=True, sinks=sinks)
    assert torch.equal(result.lse[:, :2], sinks[:, None].expand(2, 2))


# Pages and decoding.

PAGED = {
    "prefill": ([5, 0, 33, 1], [5, 7, 70, 3]),
    "chunk": ([4, 16, 3], [100, 16, 0]),
    "decode": ([1, 1, 1, 1, 1], [64, 0, 1, 300, 127]),
    "decode_two_tokens": ([2, 2], [130, 3]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 48])
@pytest.mark.parametrize("name", PAGED)
def test_paged(name: str, page_size: int, dtype: torch.dtype):
    lengths_q, lengths_k = PAGED[name]
    batch = make_batch(lengths_q, lengths_k, heads=4, kv_heads=2, dim=24, dim_v=16, dtype=dtype)
    pages = scatter_pages(batch.k, batch.v, lengths_k, page_size)
    options = {"causal": True, "softcap": 4.0, "sinks": 4 * random(4) - 2}
    out, lse = native(
        batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k, block_table=pages.block_table,
        return_lse=True, **options,
    )  # fmt: skip
    oracle, witness = oracle_and_witness(batch, grad=False, **options)
    assert_results(type(oracle)(out, lse), oracle, witness)


def test_pages_equal_packed_keys_bitwise():
    lengths_q, lengths_k = PAGED["prefill"]
    batch = make_batch(lengths_q, lengths_k, heads=4, kv_heads=2)
    want = attend(native, batch, grad=False, causal=True)
    for seed, page_size in ((0, 1), (1, 16), (2, 7)):
        pages = scatter_pages(batch.k, batch.v, lengths_k, page_size, seed=seed)
        got = native(
            batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k,
            block_table=pages.block_table, causal=True, return_lse=True,
        )  # fmt: skip
        assert torch.equal(got[0], want.out)
        assert torch.equal(got[1], want.lse)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (4, 4), (6, 1)])
def test_decode_over_long_keys(heads: int, kv_heads: int, dtype: torch.dtype):
    lengths_k = [5000, 1, 0, 2049, 517]
    batch = make_batch([1] * 5, lengths_k, heads, kv_heads, 16, dtype=dtype)
    pages = scatter_pages(batch.k, batch.v, lengths_k, 64)
    out, lse = native(
        batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k, block_table=pages.block_table,
        causal=True, return_lse=True,
    )  # fmt: skip
    oracle, witness = oracle_and_witness(batch, grad=False, causal=True)
    assert_results(type(oracle)(out, lse), oracle, witness)


def test_decode_with_window_over_long_keys():
    lengths_k = [3000, 40]
    batch = make_batch([1, 1], lengths_k, 4, 2)
    pages = scatter_pages(batch.k, batch.v, lengths_k, 16)
    options = {"causal": True, "window": (100, -1)}
    out, lse = native(
        batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k, block_table=pages.block_table,
        return_lse=True, **options,
    )  # fmt: skip
    oracle, witness = oracle_and_witness(batch, grad=False, **options)
    assert_results(type(oracle)(out, lse), oracle, witness)


@pytest.mark.parametrize("lengths_q", [[4, 1, 6, 3], [1, 1, 1, 1]], ids=["chunks", "decode"])
def test_seqused_k_without_pages(lengths_q: list[int]):
    """A cache of fixed rows for each sequence, used up to a point; what lies beyond is NaN."""
    rows, used = [40, 40, 40, 40], [40, 0, 17, 1]
    batch = make_batch(lengths_q, rows, 4, 2)
    for x in (batch.k, batch.v):
        for i, n in enumerate(used):
            x[40 * i + n : 40 * (i + 1)] = torch.nan
    options = {"causal": True, "seqused_k": torch.tensor(used, dtype=torch.int32)}
    oracle, witness = oracle_and_witness(batch, grad=False, **options)
    assert_results(attend(native, batch, grad=False, **options), oracle, witness)


# Merging.


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_merge_of_parts_equals_the_whole(dtype: torch.dtype):
    batch = make_batch([9, 4], [60, 4], 4, 2, dtype=dtype)
    oracle, witness = oracle_and_witness(batch, grad=False)
    bounds = [0, 7, 8, 60]
    outs, lses = [], []
    for begin, end in pairwise(bounds):
        lengths = [end - begin, min(4, end) - min(4, begin)]
        index = torch.cat([torch.arange(begin, end), 60 + torch.arange(min(4, begin), min(4, end))])
        cu_k = torch.tensor([0, *lengths]).cumsum(0)
        out, lse = native(batch.q, batch.k[index], batch.v[index], batch.cu_seqlens_q, cu_k, return_lse=True)
        outs.append(out)
        lses.append(lse)
    out, lse = gapless.merge_attention(outs, lses, return_lse=True)
    assert out.dtype == dtype
    reason = "every part is rounded to the dtype of the output before the merge"
    assert_results(type(oracle)(out, lse), oracle, witness, factor=4.0, reason=reason)


def test_merge_of_rows_that_saw_nothing():
    out, lse = torch.zeros(2, 1, 3), torch.full((1, 2), -torch.inf)
    other_out, other_lse = torch.randn(2, 1, 3), torch.tensor([[0.5, -torch.inf]])
    other_out[1] = 0
    merged, merged_lse = gapless.merge_attention([out, other_out], [lse, other_lse], return_lse=True)
    assert torch.equal(merged, other_out)
    assert torch.equal(merged_lse, other_lse)


# Values that are not numbers, and large ones.


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_bad_values_stay_in_their_sequence(where: str, poison: float):
    lengths = [20, 33, 0, 64, 5]
    clean, bad = make_batch(lengths, heads=4, kv_heads=2), make_batch(lengths, heads=4, kv_heads=2)
    getattr(bad, where)[25] = poison  # in the second sequence: tokens 20 to 53
    want, got = attend(native, clean, causal=True), attend(native, bad, causal=True)
    for name in ("out", "dq", "dk", "dv"):
        a, b = getattr(got, name), getattr(want, name)
        assert torch.equal(a[:20], b[:20]), name
        assert torch.equal(a[53:], b[53:]), name
    assert torch.equal(got.lse[:, :20], want.lse[:, :20])
    assert torch.equal(got.lse[:, 53:], want.lse[:, 53:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_reaches_the_rows_that_see_it_and_no_others(where: str, dtype: torch.dtype):
    clean, bad = make_batch([150], dtype=dtype), make_batch([150], dtype=dtype)
    getattr(bad, where)[70] = torch.nan
    want, got = attend(native, clean, grad=False, causal=True), attend(native, bad, grad=False, causal=True)
    sees = torch.arange(150) == 70 if where == "q" else torch.arange(150) >= 70
    assert got.out[sees].isnan().all()
    assert got.lse[:, sees].isnan().all()
    assert torch.equal(got.out[~sees], want.out[~sees])
    assert torch.equal(got.lse[:, ~sees], want.lse[:, ~sees])


def test_nan_in_a_value_stays_in_its_column():
    """Weights of 0 times NaN are NaN: it may reach rows of its sequence that do not see it, as in the reference."""
    clean, bad = make_batch([150]), make_batch([150])
    bad.v[70, :, 3] = torch.nan
    want, got = attend(native, clean, grad=False, causal=True), attend(native, bad, grad=False, causal=True)
    assert got.out[70:, :, 3].isnan().all()
    others = [i for i in range(16) if i != 3]
    assert torch.equal(got.out[..., others], want.out[..., others])
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_of_minus_infinity_is_a_key_not_seen(dtype: torch.dtype):
    batch = make_batch([9, 9], dtype=dtype)
    batch.q.abs_()
    batch.k[4] = -torch.inf
    got = attend(native, batch, grad=False)
    rest = [i for i in range(18) if i != 4]
    fewer = Batch(
        **{**vars(batch), "k": batch.k[rest], "v": batch.v[rest], "cu_seqlens_k": torch.tensor([0, 8, 17])}
    )
    assert_results(got, *oracle_and_witness(fewer, grad=False))


def test_score_of_plus_infinity_is_not_hidden():
    batch = make_batch([9, 9])
    batch.q.abs_()
    batch.k[4] = torch.inf
    got = attend(native, batch, grad=False)
    assert not got.lse[:, :9].isfinite().any()
    assert got.out[:9].isnan().all()
    assert got.out[9:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, -1e4], ids=["positive", "negative"])
def test_huge_scores_do_not_overflow(size: float, dtype: torch.dtype):
    """Scores of 1e4 and more: exp of any of them would overflow without the maximum taken off."""
    batch = make_batch([40, 3], dim=16, dtype=dtype)
    options = {"scale": size / 16, "causal": True}
    got = attend(native, batch, **options)
    assert all(x.isfinite().all() for x in got[:5])
    oracle, witness = oracle_and_witness(batch, **options)
    # In float64 the oracle itself is no better than that.
    how = {"factor": 1e4, "reason": "weights made again from a rounded LSE are off by eps * 1e4"}
    assert_results(got, oracle, witness, **how)
    if dtype != FP64:
        assert_results(type(got)(got.out, got.lse), type(got)(*oracle[:2]), type(got)(*witness[:2]))


# Strides and offsets beyond 2^31 elements.


def sparse_storage(elements: int) -> torch.Tensor:
    """bfloat16 [elements] of zeros; only the pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=BF16)


def test_strides_beyond_32_bits():
    stride = 2**30 + 8
    storage = sparse_storage(2 * stride + 64)
    small = make_batch([3], heads=2, kv_heads=2, dtype=BF16)

    def spread(x: torch.Tensor) -> torch.Tensor:
        far = storage.as_strided(x.shape, (stride, x.shape[2], 1))
        return far.copy_(x).detach()

    want = attend(native, small, causal=True)
    for name in ("q", "k", "v", "dout"):
        far = Batch(**{**vars(small), name: spread(getattr(small, name))})
        for a, b in zip(attend(native, far, causal=True)[:5], want[:5], strict=True):
            assert torch.equal(a, b), name


def test_pages_beyond_32_bits():
    stride = 2**30 + 8
    storage = sparse_storage(2 * stride + 1024)
    small = make_batch([1], [48], heads=2, kv_heads=2, dtype=BF16)
    pages = scatter_pages(small.k, small.v, [48], 16, spare_pages=0)
    want = attend(native, small, grad=False)
    for name in ("k", "v"):
        far = storage.as_strided((3, 16, 2, 16), (stride, 32, 16, 1)).copy_(getattr(pages, name))
        moved = pages._replace(**{name: far})
        got = native(
            small.q, moved.k, moved.v, small.cu_seqlens_q, seqused_k=pages.seqused_k,
            block_table=pages.block_table, return_lse=True,
        )  # fmt: skip
        assert torch.equal(got[0], want.out)
        assert torch.equal(got[1], want.lse)


# Bitwise promises.

INVARIANT = ["mixed_causal", "long_causal", "everything", "more_queries_long", "gqa_8", "alibi_per_sequence"]


def identical(a, b) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", INVARIANT)
def test_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype, threads):
    case = BY_ID[name]
    batch = case.batch(dtype)
    results = []
    for n in (1, 2, 3, 1):
        threads(n)
        results.append(attend(native, batch, **case.options))
    assert all(identical(results[0], r) for r in results[1:])


def test_decode_has_the_same_bits_for_any_number_of_threads_and_any_company(threads):
    lengths = [5000, 3, 1025]
    batch = make_batch([1] * 3, lengths, 8, 2)
    pages = scatter_pages(batch.k, batch.v, lengths, 64)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(native(
            batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k,
            block_table=pages.block_table, causal=True, return_lse=True,
        ))  # fmt: skip
    assert identical(results[0], results[1])
    assert identical(results[0], results[2])
    for i in range(3):
        alone = native(
            batch.q[i : i + 1], pages.k, pages.v, torch.tensor([0, 1]), seqused_k=pages.seqused_k[i : i + 1],
            block_table=pages.block_table[i : i + 1], causal=True, return_lse=True,
        )  # fmt: skip
        assert identical(alone, (results[0][0][i : i + 1], results[0][1][:, i : i + 1]))


def take(
    batch: Batch, order: list[int], lengths_q: list[int], lengths_k: list[int]
) -> tuple[Batch, list, list]:
    """The sequences of ``order``, and the token indices they had."""
    starts_q, starts_k = ([sum(n[:i]) for i in range(len(n))] for n in (lengths_q, lengths_k))
    index_q = [starts_q[i] + t for i in order for t in range(lengths_q[i])]
    index_k = [starts_k[i] + t for i in order for t in range(lengths_k[i])]
    how = make_batch([lengths_q[i] for i in order], [lengths_k[i] for i in order], 1, 1, 1)
    taken = Batch(
        batch.q[index_q], batch.k[index_k], batch.v[index_k], how.cu_seqlens_q, how.cu_seqlens_k,
        batch.dout[index_q], batch.dlse[:, index_q],
    )  # fmt: skip
    return taken, index_q, index_k


def rearranged(result, index_q: list, index_k: list) -> list:
    by_query = [result.out[index_q], result.lse[:, index_q], result.dq[index_q]]
    return [*by_query, result.dk[index_k], result.dv[index_k]]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", ["mixed_causal", "long_causal", "more_queries", "window_causal", "no_keys"])
def test_order_and_company_of_sequences_do_not_matter(name: str, dtype: torch.dtype):
    """Permuting the batch permutes results and gradients, and packing equals one call for each sequence: bitwise."""
    case = BY_ID[name]
    batch = case.batch(dtype)
    lengths_q, lengths_k = case.lengths_q, case.lengths_k or case.lengths_q
    whole = attend(native, batch, **case.options)
    everyone = torch.randperm(len(lengths_q), generator=torch.Generator().manual_seed(1)).tolist()
    for order in (everyone, *([i] for i in range(len(lengths_q)))):
        part, index_q, index_k = take(batch, order, lengths_q, lengths_k)
        got = attend(native, part, **case.options)
        assert identical(got[:5], rearranged(whole, index_q, index_k)), order


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thread_that_takes_several_heads_gives_the_same_bits(dtype: torch.dtype, threads):
    """Of many tiles a thread takes all heads at once, and asks for the next head's memory meanwhile."""
    threads(1)
    lengths = [(7 * i) % 90 for i in range(40)]
    batch = make_batch(lengths, heads=8, kv_heads=4, dim=40, dtype=dtype)
    whole = attend(native, batch, causal=True)
    for i in (0, 1, 13, 39):
        part, index_q, index_k = take(batch, [i], lengths, lengths)
        assert identical(attend(native, part, causal=True)[:5], rearranged(whole, index_q, index_k))


# Plans.


def test_a_plan_serves_every_layer_and_mask():
    batch = make_batch([5, 0, 70, 31])
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q)
    for options in ({}, {"causal": True}, {"window": (3, 0)}):
        with_plan = attend(native, batch, plan=plan, **options)
        assert_results(with_plan, *oracle_and_witness(batch, **options))


def test_plans_are_found_again_by_identity_and_version():
    batch = make_batch([5, 3])
    arguments = {"window": (-1, -1), "total_q": 8, "total_k": 8}
    first = cache.get(batch.cu_seqlens_q, None, **arguments)
    assert cache.get(batch.cu_seqlens_q, None, **arguments) is first
    assert cache.get(batch.cu_seqlens_q.clone(), None, **arguments) is not first
    batch.cu_seqlens_q[1] = 2
    second = cache.get(batch.cu_seqlens_q, None, **arguments)
    assert second.cu_seqlens_q.tolist() == [0, 2, 8]


def test_lengths_changed_in_place_are_seen():
    batch = make_batch([5, 3])
    native(batch.q, batch.k, batch.v, batch.cu_seqlens_q)
    batch.cu_seqlens_q[1] = 2
    assert_results(attend(native, batch), *oracle_and_witness(batch))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_of_cu_seqlens(dtype: torch.dtype):
    batch = make_batch([5, 3], [4, 9])
    wide = Batch(
        **{
            **vars(batch),
            "cu_seqlens_q": batch.cu_seqlens_q.to(dtype),
            "cu_seqlens_k": batch.cu_seqlens_k.to(dtype),
        }
    )
    assert identical(attend(native, wide), attend(native, batch))
