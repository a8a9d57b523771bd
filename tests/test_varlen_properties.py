# SPDX-License-Identifier: Apache-2.0
"""varlen_attention on inputs that nobody thought of: hypothesis draws lengths, heads, dims, masks and layouts."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gapless
from gapless.testing import (
    Results,
    assert_results,
    assert_within_budget,
    attend,
    make_batch,
    oracle_and_witness,
    scatter_pages,
)

native = partial(gapless.varlen_attention, impl="native")

lengths = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 130]))
sides = st.one_of(st.just(-1), st.integers(0, 40))
dims = st.one_of(st.integers(1, 20), st.sampled_from([32, 48, 64, 80]))
wide_dtypes = st.sampled_from([torch.float32, torch.float64])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def wider(dtype: torch.dtype) -> dict:
    """Room for rows with one key in small batches; float64 has its own."""
    reason = "with one key to a row, dout . v - delta cancels to rounding that the reference's softmax does not have"
    return {} if dtype == torch.float64 else {"factor": 4.0, "reason": reason}


@st.composite
def shapes(draw: st.DrawFn) -> dict:
    """Arguments of make_batch."""
    # The last sequence is an ordinary one: a budget from a few lucky entries of the witness would mean nothing.
    pairs = [*draw(st.lists(st.tuples(lengths, lengths), max_size=4)), (24, 24)]
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (1, 8), (3, 1)]))
    return {
        "lengths_q": [q for q, _ in pairs],
        "lengths_k": draw(st.sampled_from([None, [k for _, k in pairs]])),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "dim": draw(dims),
        "dim_v": draw(st.one_of(st.none(), dims)),
        "non_contiguous": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@st.composite
def masks(draw: st.DrawFn, shape: dict) -> dict:
    """Options of varlen_attention that fit the shape."""
    generator = torch.Generator().manual_seed(shape["seed"])
    heads, batch = shape["heads"], len(shape["lengths_q"])
    rand = partial(torch.rand, generator=generator)
    return {
        "causal": draw(st.booleans()),
        "window": draw(st.tuples(sides, sides)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
        "scale": draw(st.sampled_from([None, None, 0.3, -1.0])),
        "alibi_slopes": draw(st.sampled_from([None, rand(heads), rand(batch, heads)])),
        "sinks": draw(st.sampled_from([None, torch.randn(heads, generator=generator)])),
    }


@given(st.data(), shapes(), wide_dtypes)
def test_results_and_gradients_match_the_reference(data: st.DataObject, shape: dict, dtype: torch.dtype):
    options = data.draw(masks(shape))
    batch = make_batch(**shape, dtype=dtype)
    actual, (oracle, witness) = attend(native, batch, **options), oracle_and_witness(batch, **options)
    if actual.dsinks is not None and dtype != torch.float64:
        # One number per head: the witness may meet the oracle by luck.
        sums = (x.dsinks for x in (actual, oracle, witness))
        assert_within_budget(*sums, factor=16.0, reason="a sum over all rows", name="dsinks")
        actual, oracle, witness = (x._replace(dsinks=None) for x in (actual, oracle, witness))
    assert_results(actual, oracle, witness, **wider(dtype))


@given(st.data(), shapes(), dtypes)
def test_forward_matches_in_every_dtype(data: st.DataObject, shape: dict, dtype: torch.dtype):
    options = data.draw(masks(shape))
    batch = make_batch(**shape, dtype=dtype)
    actual = attend(native, batch, grad=False, **options)
    assert_results(actual, *oracle_and_witness(batch, grad=False, **options))


@given(st.data(), shapes(), st.integers(1, 50), dtypes)
def test_pages_match_packed_keys(data: st.DataObject, shape: dict, page_size: int, dtype: torch.dtype):
    options = data.draw(masks(shape))
    batch = make_batch(**shape, dtype=dtype)
    used = shape["lengths_q"] if shape["lengths_k"] is None else shape["lengths_k"]
    pages = scatter_pages(batch.k, batch.v, used, page_size, seed=shape["seed"])
    out, lse = native(
        batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k, block_table=pages.block_table,
        return_lse=True, **options,
    )  # fmt: skip
    assert_results(Results(out, lse), *oracle_and_witness(batch, grad=False, **options))


@given(shapes(), st.booleans(), st.integers(1, 200), st.integers(1, 200))
def test_tile_sizes_change_rounding_only(shape: dict, causal: bool, block_q: int, block_k: int):
    batch = make_batch(**shape)
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q, batch.cu_seqlens_k, block_q=block_q, block_k=block_k)
    actual = attend(native, batch, causal=causal, plan=plan)
    assert_results(actual, *oracle_and_witness(batch, causal=causal), **wider(torch.float32))


@settings(max_examples=10)
@given(shapes(), st.booleans())
def test_weights_sum_to_one(shape: dict, causal: bool):
    """Attention over values of one is one where a row sees a key, zero where it sees none."""
    batch = make_batch(**shape)
    out, lse = native(
        batch.q, batch.k, torch.ones_like(batch.v), batch.cu_seqlens_q, batch.cu_seqlens_k, causal=causal,
        return_lse=True,
    )  # fmt: skip
    seen = lse.isfinite().t()[..., None].expand_as(out)
    torch.testing.assert_close(out, seen.to(out.dtype))
