# SPDX-License-Identifier: Apache-2.0
"""Scorers against a plain reading of what they estimate, token by token, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gapless import reference
from gapless.plan.block_grid import BlockGrid
from gapless.reference.block_sparse import block_mass
from gapless.sparsity import scorers
from gapless.testing.varlen import make_batch

LENGTHS = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=3)
SIZES = st.sampled_from([(16, 16), (32, 16), (16, 64)])
ROUNDING = {"atol": 2e-4, "rtol": 2e-4}  # of float32 scores through exp, against float64; masses are up to 64


def inputs(lengths, sizes, heads=4, kv_heads=2, dim=8, seed=0, **options):
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=sizes[0], block_k=sizes[1])
    batch = make_batch(lengths_q, lengths_k, heads, kv_heads, dim, seed=seed, **options)
    return grid, batch.q * 2, batch.k


def scores_by_hand(q: Tensor, k: Tensor) -> Tensor:
    """float64 [heads, len_q, len_k]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("ihd,jhd->hij", q.double(), k.double()) / math.sqrt(q.shape[-1])


def seen(len_q: int, len_k: int, causal: bool) -> Tensor:
    everything = torch.ones(len_q, len_k, dtype=torch.bool)
    return everything.tril(len_k - len_q) if causal else everything


def sums(cells: Tensor, size_q: int, size_k: int) -> Tensor:
    """Sums of tiles of the last two axes, the last tiles short."""
    padded = torch.nn.functional.pad(cells, (0, -cells.shape[2] % size_k, 0, -cells.shape[1] % size_q))
    return padded.unflatten(2, (-1, size_k)).unflatten(1, (-1, size_q)).sum((2, 4))


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over the last axis; rows that see nothing are 0."""
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)


def by_sequence(grid: BlockGrid, q: Tensor, k: Tensor):
    for qs, ks in zip(q.split(grid.lengths_q), k.split(grid.lengths_k), strict=True):
        yield qs, ks, qs.shape[0], ks.shape[0]


def pooled_by_hand(grid, q, k, causal):
    parts = []
    for qs, ks, len_q, len_k in by_sequence(grid, q, k):
        means_q, means_k = ([x.mean(0) for x in t.double().split(n)] if len(t) else []
                            for t, n in ((qs, grid.block_q), (ks, grid.block_k)))  # fmt: skip
        out = torch.zeros(q.shape[1], len(means_q), len(means_k), dtype=torch.float64)
        if len_q and len_k:
            scores = scores_by_hand(torch.stack(means_q), torch.stack(means_k))
            sizes = torch.tensor([len(x) for x in ks.split(grid.block_k)])
            mask = sums(seen(len_q, len_k, causal)[None], grid.block_q, grid.block_k)[0] > 0
            rows = torch.tensor([len(x) for x in qs.split(grid.block_q)])
            out = softmax(scores + sizes.log(), mask) * rows[:, None]
        parts.append(out)
    return grid.pack(parts)


def antidiagonal_by_hand(grid, q, k, causal, stride):
    parts = []
    for qs, ks, len_q, len_k in by_sequence(grid, q, k):
        tiles_q, tiles_k = -(-len_q // stride), -(-len_k // stride)
        out = torch.zeros(q.shape[1], tiles_q, tiles_k, dtype=torch.float64)
        if len_q and len_k:
            cells = scores_by_hand(qs, ks)
            for a in range(tiles_q):
                for b in range(tiles_k):
                    for t in range(stride):
                        i = min(a * stride + stride - 1 - t, len_q - 1)
                        j = min(b * stride + t, len_k - 1)
                        out[:, a, b] += cells[:, i, j] / stride
            rows, columns = (
                torch.tensor([min(stride, n - a) for a in range(0, n, stride)]) for n in (len_q, len_k)
            )
            mask = sums(seen(len_q, len_k, causal)[None], stride, stride)[0] > 0
            out = softmax(out + columns.log(), mask) * rows[:, None]
        parts.append(sums(out, grid.block_q // stride, grid.block_k // stride))
    return grid.pack(parts)


def vertical_slash_by_hand(grid, q, k, causal, sample):
    parts = []
    for i, (qs, ks, len_q, len_k) in enumerate(by_sequence(grid, q, k)):
        if not (len_q and len_k):
            parts.append(torch.zeros(q.shape[1], grid.counts_q[i], grid.counts_k[i], dtype=torch.float64))
            continue
        weights = softmax(scores_by_hand(qs, ks), seen(len_q, len_k, causal))
        rows = set(range(max(0, len_q - sample), len_q))
        if not causal:
            rows |= set(range(min(sample, len_q)))
        vertical = weights[:, sorted(rows)].mean(1)
        distances = {}
        for r in rows:
            for j in range(len_k):
                distances.setdefault(j - r, []).append(weights[:, r, j])
        cells = vertical[:, None].repeat(1, len_q, 1)
        for r in range(len_q):
            for j in range(len_k):
                if found := distances.get(j - r):
                    cells[:, r, j] += torch.stack(found).mean(0)
        blocks = sums(cells, grid.block_q, grid.block_k)
        blocks *= sums(seen(len_q, len_k, causal)[None], grid.block_q, grid.block_k) > 0
        total = blocks.sum(-1, keepdim=True)
        queries = torch.tensor([min(grid.block_q, len_q - a) for a in range(0, len_q, grid.block_q)])
        parts.append((blocks / total).nan_to_num(0.0) * queries[:, None])
    return grid.pack(parts)


def check(actual: Tensor, wanted: Tensor, grid: BlockGrid) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == wanted.shape == (actual.shape[0], grid.q_blocks, grid.max_k_blocks)
    torch.testing.assert_close(actual.double(), wanted, **ROUNDING)


@given(LENGTHS, SIZES, st.booleans())
def test_pooled(lengths, sizes, causal):
    grid, q, k = inputs(lengths, sizes)
    check(scorers.pooled(q, k, grid, causal=causal), pooled_by_hand(grid, q, k, causal), grid)


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_antidiagonal(causal, stride):
    grid, q, k = inputs([(40, 70), (0, 5), (33, 0), (50, 50), (3, 2), (20, 9)], (32, 16))
    got = scorers.antidiagonal(q, k, grid, stride=stride, causal=causal)
    check(got, antidiagonal_by_hand(grid, q, k, causal, stride), grid)


@given(LENGTHS, SIZES, st.booleans())
def test_antidiagonal_of_single_tokens_is_the_exact_mass(lengths, sizes, causal):
    grid, q, k = inputs(lengths, sizes)
    got = scorers.antidiagonal(q, k, grid, stride=1, causal=causal)
    cu = {"cu_seqlens_q": grid.cu_seqlens_q, "cu_seqlens_k": grid.cu_seqlens_k}
    q, k = q.double(), k.double()
    _, lse = reference.varlen_attention(q, k, k, *cu.values(), causal=causal)
    wanted = block_mass(q, k, lse, **cu, block_q=sizes[0], block_k=sizes[1], causal=causal)
    check(got, wanted, grid)


@pytest.mark.parametrize("sample", [1, 7, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_vertical_slash(causal, sample):
    grid, q, k = inputs([(40, 37), (0, 5), (6, 0), (33, 33), (3, 2), (20, 9)], (32, 16), heads=2, kv_heads=1)
    got = scorers.vertical_slash(q, k, grid, sample=sample, causal=causal)
    check(got, vertical_slash_by_hand(grid, q, k, causal, sample), grid)


def test_exact_mass():
    grid, q, k = inputs([(40, 37), (5, 30)], (32, 16))
    _, lse = reference.varlen_attention(q, k, k, grid.cu_seqlens_q, grid.cu_seqlens_k)
    got = scorers.exact_mass(q, k, lse, grid)
    parts = []
    for qs, ks, len_q, len_k in by_sequence(grid, q, k):
        parts.append(sums(softmax(scores_by_hand(qs, ks), seen(len_q, len_k, False)), 32, 16))
    check(got, grid.pack(parts), grid)


def test_scale_is_a_factor_of_the_scores():
    grid, q, k = inputs([(70, 50)], (16, 16))
    for name in ("pooled", "antidiagonal", "vertical_slash"):
        scorer = getattr(scorers, name)
        torch.testing.assert_close(scorer(q, k, grid, scale=0.5), scorer(q * 0.5, k, grid, scale=1.0))
        assert not torch.allclose(scorer(q, k, grid, scale=0.5), scorer(q, k, grid))


@pytest.mark.parametrize("name", ["pooled", "antidiagonal", "vertical_slash"])
def test_a_block_that_attracts_everything_is_found(name):
    """Keys of one block point where all queries do: its mass is all there is."""
    grid = BlockGrid.make(160, block_q=16, block_k=16)
    q = torch.ones(160, 1, 8)
    k = torch.zeros(160, 1, 8)
    k[48:64] = 8.0
    scores = getattr(scorers, name)(q, k, grid)
    assert (scores.argmax(-1) == 3).all()
    if name != "vertical_slash":  # which adds the slashes of that block to others
        torch.testing.assert_close(scores[..., 3], torch.full((1, 10), 16.0))


def test_few_scores_in_memory_at_once_change_nothing(monkeypatch):
    grid, q, k = inputs([(130, 90), (33, 20)], (32, 16))
    whole = scorers.antidiagonal(q, k, grid, causal=True)
    monkeypatch.setattr(scorers, "CELLS", 1)
    torch.testing.assert_close(scorers.antidiagonal(q, k, grid, causal=True), whole)


@pytest.mark.parametrize("name", ["pooled", "antidiagonal", "vertical_slash"])
def test_strides_and_low_precision(name):
    scorer = getattr(scorers, name)
    grid, q, k = inputs([(70, 50), (5, 9)], (16, 16))
    plain = scorer(q, k, grid)
    _, window_q, window_k = inputs([(70, 50), (5, 9)], (16, 16), non_contiguous=True)
    assert torch.equal(scorer(window_q, window_k, grid), plain)
    low = scorer(q.bfloat16(), k.bfloat16(), grid)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, atol=0.4, rtol=0.1)  # scores of size 3 in steps of 2**-7


@pytest.mark.parametrize("name", ["pooled", "antidiagonal", "vertical_slash"])
def test_nothing_is_read_from_the_device(name):
    """Tensors without values raise as soon as Python asks for one."""
    grid = BlockGrid.make([779, 334], [551, 118], block_q=64, block_k=64, device="meta")
    q, k = (torch.empty(n, 4, 64, dtype=torch.bfloat16, device="meta") for n in (1113, 669))
    scores = getattr(scorers, name)(q, k, grid, causal=True)
    assert scores.shape == (4, grid.q_blocks, 9) and scores.device.type == "meta"


GRID = BlockGrid.make(128, block_q=64, block_k=32)
Q = torch.zeros(128, 2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scorers.pooled(Q[0], Q, GRID), ValueError, r"q has shape \[2, 8\]"),
        (lambda: scorers.pooled(Q[:100], Q, GRID), ValueError, r"q has shape \[100, 2, 8\]"),
        (lambda: scorers.pooled(Q, Q[:, :, :4], GRID), ValueError, "k has shape"),
        (lambda: scorers.pooled(Q, torch.zeros(128, 3, 8), GRID), ValueError, "q has 2 heads, k has 3"),
        (lambda: scorers.pooled(Q, Q.double(), GRID), TypeError, "k is torch.float64"),
        (lambda: scorers.pooled(Q, Q, GRID, scale=math.nan), ValueError, "scale is nan"),
        (lambda: scorers.antidiagonal(Q, Q, GRID, stride=3), ValueError, "stride is 3"),
        (lambda: scorers.antidiagonal(Q, Q, GRID, stride=64), ValueError, "divides the blocks, 64 and 32"),
        (lambda: scorers.vertical_slash(Q, Q, GRID, sample=0), ValueError, "sample is 0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
