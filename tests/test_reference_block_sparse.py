# SPDX-License-Identifier: Apache-2.0
"""The reference of block-sparse attention, against dense attention with the same mask and against its own promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapless import BlockLayout, reference
from gapless.plan.block_grid import BlockGrid
from gapless.reference import block_sparse
from gapless.sparsity import patterns
from gapless.testing import assert_within_budget, make_batch
from gapless.testing.block_sparse import (
    attend_layout,
    layout_batch,
    layout_oracle_and_witness,
    layouts,
    make_layout,
)

FP64 = torch.float64


@given(layouts(max_length=100, max_batch=3), st.booleans(), st.sampled_from([0.0, 1.5]))
def test_against_sdpa_with_a_mask(drawn, causal: bool, softcap: float):
    layout = drawn.layout
    batch = layout_batch(
        layout, heads=drawn.heads, kv_heads=drawn.kv_heads, dim=8, dim_v=5, dtype=FP64, seed=drawn.seed
    )
    out, lse = block_sparse.block_sparse_attention(
        batch.q, batch.k, batch.v, layout, causal=causal, scale=0.3, softcap=softcap
    )
    assert out.shape == (batch.q.shape[0], drawn.heads, 5)
    assert lse.shape == (drawn.heads, batch.q.shape[0])
    at_q = at_k = 0
    for mask, len_q, len_k in zip(
        layout.to_token_mask(), layout.grid.lengths_q, layout.grid.lengths_k, strict=True
    ):
        q, k, v = batch.q[at_q : at_q + len_q], batch.k[at_k : at_k + len_k], batch.v[at_k : at_k + len_k]
        for h in range(drawn.heads):
            g = h // (drawn.heads // drawn.kv_heads)
            s = 0.3 * q[:, h] @ k[:, g].T
            s = softcap * torch.tanh(s / softcap) if softcap else s
            seen = mask[h // (drawn.heads // layout.heads)]
            if causal:
                i, j = torch.arange(len_q)[:, None], torch.arange(len_k)
                seen = seen & (j <= i + len_k - len_q)
            s = s.masked_fill(~seen, -torch.inf)
            want = s.softmax(1).nan_to_num(0.0) @ v[:, g]
            torch.testing.assert_close(out[at_q : at_q + len_q, h], want)
            torch.testing.assert_close(lse[h, at_q : at_q + len_q], s.logsumexp(1))
        at_q, at_k = at_q + len_q, at_k + len_k


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(causal: bool):
    lengths_q, lengths_k = [70, 0, 33], [40, 9, 100]
    layout = make_layout(lengths_q, lengths_k, heads=2, block_q=32, block_k=16, density=1.0)
    batch = layout_batch(layout, heads=4, kv_heads=2, dim=16)
    got = block_sparse.block_sparse_attention(batch.q, batch.k, batch.v, layout, causal=causal)
    want = reference.varlen_attention(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, causal=causal
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_window_pattern_is_window_attention():
    layout = patterns.sliding_window([100, 30], [80, 60], window=(20, 5), block_q=16, block_k=32)
    batch = layout_batch(layout, heads=2, kv_heads=1, dim=16)
    got = block_sparse.block_sparse_attention(batch.q, batch.k, batch.v, layout)
    want = reference.varlen_attention(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, window=(20, 5)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_that_list_nothing():
    mask = torch.zeros(1, 3, 2, dtype=torch.bool)
    mask[0, 1, 0] = True
    layout = BlockLayout.from_mask(mask, block_q=16, block_k=32, lengths_q=40, lengths_k=50)
    batch = layout_batch(layout, heads=2, kv_heads=1, dim=8)
    found = attend_layout(
        lambda *a, return_lse, **o: block_sparse.block_sparse_attention(*a, **o), batch, layout
    )
    empty = torch.ones(40, dtype=torch.bool)
    empty[16:32] = False
    assert (found.out[empty] == 0).all()
    assert (found.lse[:, empty] == -torch.inf).all()
    assert found.lse[:, ~empty].isfinite().all()
    assert (found.dq[empty] == 0).all()
    assert (found.dk[32:] == 0).all() and (found.dv[32:] == 0).all()  # nobody lists these
    assert found.dk[:32].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_witness_is_near_the_oracle(dtype: torch.dtype):
    layout = make_layout([70, 0, 5], heads=2, block_q=16, block_k=16, density=0.5, partial=0.4)
    batch = layout_batch(layout, heads=2, dim=16, dtype=dtype)
    oracle, witness = layout_oracle_and_witness(batch, layout, causal=True)
    assert oracle.out.dtype == oracle.lse.dtype == FP64
    assert (witness.out.dtype, witness.lse.dtype) == (dtype, torch.float32)
    for name in ("out", "lse", "dq", "dk", "dv"):
        a, b = getattr(witness, name), getattr(oracle, name)
        assert a.shape == b.shape
        assert_within_budget(a, b, a, name=name)
        assert (a.double() - b).nan_to_num(0.0).abs().max() < 100 * torch.finfo(dtype).eps


def test_gradcheck():
    layout = make_layout([20, 3], [18, 5], heads=1, block_q=16, block_k=16, density=0.8, partial=0.5, seed=2)
    batch = layout_batch(layout, heads=2, kv_heads=1, dim=3, dtype=FP64)
    leaves = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_sparse.block_sparse_attention(q, k, v, layout, causal=True)[0], leaves
    )


# Mass


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_q, block_k", [(16, 16), (32, 16), (64, 128)])
def test_mass_by_cells(block_q: int, block_k: int, causal: bool):
    lengths_q, lengths_k = [40, 0, 17, 9], [50, 30, 3, 0]
    batch = make_batch(lengths_q, lengths_k, 4, 2, 8, dtype=FP64)
    cu = (batch.cu_seqlens_q, batch.cu_seqlens_k)
    _, lse = reference.varlen_attention(batch.q, batch.k, batch.v, *cu, causal=causal, softcap=2.0)
    mass = block_sparse.block_mass(
        batch.q, batch.k, lse, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], block_q=block_q, block_k=block_k,
        causal=causal, softcap=2.0,
    )  # fmt: skip
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k)
    want = torch.zeros(4, grid.q_blocks, grid.max_k_blocks, dtype=FP64)
    at_q = at_k = row = 0
    for len_q, len_k in zip(lengths_q, lengths_k, strict=True):
        for i in range(len_q):
            for j in range(len_k):
                if causal and j > i + len_k - len_q:
                    continue
                for h in range(4):
                    s = 2 * torch.tanh(batch.q[at_q + i, h] @ batch.k[at_k + j, h // 2] * 8**-0.5 / 2)
                    want[h, row + i // block_q, j // block_k] += (s - lse[h, at_q + i]).exp()
        at_q, at_k, row = at_q + len_q, at_k + len_k, row + -(-len_q // block_q)
    torch.testing.assert_close(mass, want)
    assert mass.dtype == FP64
    # A row's weights add up to 1, a block of queries' to its queries.
    queries = torch.tensor([min(block_q, n - i) for n in lengths_q for i in range(0, n, block_q)])
    seen = torch.where(lse == -torch.inf, 0.0, 1.0).double()
    if not causal:
        has_keys = torch.tensor(
            [m > 0 for n, m in zip(lengths_q, lengths_k, strict=True) for _ in range(0, n, block_q)]
        )
        torch.testing.assert_close(mass.sum(2), (queries * has_keys).double().expand(4, -1))
    torch.testing.assert_close(mass.sum((1, 2)), seen.sum(1))


def test_mass_of_nothing():
    batch = make_batch([], heads=3)
    cu = batch.cu_seqlens_q
    assert block_sparse.block_mass(batch.q, batch.k, torch.zeros(3, 0), cu_seqlens_q=cu).shape == (3, 0, 0)
    batch = make_batch([5], [0], heads=3)
    mass = block_sparse.block_mass(
        batch.q, batch.k, torch.full((3, 5), -torch.inf), cu_seqlens_q=batch.cu_seqlens_q,
        cu_seqlens_k=batch.cu_seqlens_k,
    )  # fmt: skip
    assert mass.shape == (3, 1, 0)
    assert mass.dtype == torch.float32


def test_rows_without_lse_have_no_mass():
    """The LSE of a sparse run, in which some rows listed nothing."""
    batch = make_batch([32], heads=1, dtype=FP64)
    _, lse = reference.varlen_attention(batch.q, batch.k, batch.v, batch.cu_seqlens_q)
    lse[:, :16] = -torch.inf
    mass = block_sparse.block_mass(
        batch.q, batch.k, lse, cu_seqlens_q=batch.cu_seqlens_q, block_q=16, block_k=16
    )
    assert (mass[:, 0] == 0).all()
    torch.testing.assert_close(mass[:, 1].sum(), torch.tensor(16.0, dtype=FP64))


def test_mass_is_float32_for_narrow_inputs():
    batch = make_batch([40], heads=2, dtype=torch.bfloat16)
    _, lse = reference.varlen_attention(batch.q, batch.k, batch.v, batch.cu_seqlens_q)
    mass = block_sparse.block_mass(
        batch.q, batch.k, lse, cu_seqlens_q=batch.cu_seqlens_q, block_q=16, block_k=16
    )
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.sum(2), torch.tensor([16.0, 16.0, 8.0]).expand(2, 3), rtol=0.02, atol=0)
