# SPDX-License-Identifier: Apache-2.0
"""BlockLayout: its lists, their transposition and order, compact storage, and every way into it and out of it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from gapless import BlockLayout
from gapless.plan import block_convert, block_lists, block_masks, block_patterns
from gapless.plan.block_grid import BLOCK_SIZES, BlockGrid, lengths_of
from gapless.testing.block_sparse import layouts, make_layout, random_mask

LENGTHS = ([70, 0, 130, 1], [33, 5, 0, 200])  # off the blocks, no keys, no queries


def assert_same(a: BlockLayout, b: BlockLayout) -> None:
    """The same pairs of tokens, in the same lists."""
    assert (a.grid.lengths_q, a.grid.lengths_k) == (b.grid.lengths_q, b.grid.lengths_k)
    assert (a.block_q, a.block_k, a.heads) == (b.block_q, b.block_k, b.heads)
    for x, y in zip(a.to_token_mask(), b.to_token_mask(), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a.offsets, b.offsets)
    assert torch.equal(a.partial_offsets, b.partial_offsets)
    for x, y, end in (
        (a.ids, b.ids, a.offsets),
        (a.partial_ids, b.partial_ids, a.partial_offsets),
    ):
        assert torch.equal(x[: end[-1]], y[: end[-1]])


def rows_of(offsets: torch.Tensor, values: torch.Tensor) -> list[list[int]]:
    bounds = offsets.tolist()
    return [values[a:b].tolist() for a, b in pairwise(bounds)]


@pytest.fixture
def device_ways(monkeypatch: pytest.MonkeyPatch):
    """What runs on a device, which is never waited for, on tensors of the CPU."""
    for module in (block_lists, block_patterns, block_masks, block_convert):
        monkeypatch.setattr(module, "on_host", lambda t: False)


# Lists


def test_lists_by_hand():
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 0, [1, 3]] = True
    mask[1, 2] = True
    mask[1, 1, 0] = True
    layout = BlockLayout.from_mask(mask, block_q=16, block_k=32, lengths_q=40, lengths_k=100)
    assert layout.offsets.tolist() == [0, 2, 2, 2, 2, 3, 7]
    assert layout.ids.tolist() == [1, 3, 0, 0, 1, 2, 3]
    assert layout.partial_offsets.tolist() == [0] * 7
    assert layout.partial_ids.shape == layout.partial_patterns.shape == (0,)
    assert layout.patterns.shape == (0, 32, 1)
    assert all(t.dtype == torch.int32 for t in layout.tensors)
    assert (layout.q_blocks, layout.k_blocks, layout.max_k_blocks, layout.heads) == (3, 4, 4, 2)
    assert layout.density == 7 / 24
    assert layout.density_per_head.tolist() == pytest.approx([2 / 12, 5 / 12])
    assert layout.nnz == 7
    t = layout.transposed
    assert rows_of(t.offsets, t.ids) == [[], [0], [], [0], [1, 2], [2], [2], [2]]
    # The last block has 4 keys only; the row that lists it and block 1 sees 36.
    assert layout.visible_keys().tolist() == [36, 0, 0, 0, 32, 100]
    assert layout.order().tolist() == [5, 0, 4, 1, 2, 3]


def test_ragged_sequences_by_hand():
    masks = [torch.ones(1, 2, 1, dtype=torch.bool), torch.ones(1, 1, 3, dtype=torch.bool)]
    layout = BlockLayout.from_mask(masks, block_q=16, block_k=16, lengths_q=[20, 9], lengths_k=[7, 48])
    assert layout.cu_seqlens_q.tolist() == [0, 20, 29]
    assert layout.cu_seqlens_k.tolist() == [0, 7, 55]
    assert layout.cu_blocks_q.tolist() == [0, 2, 3]
    assert layout.cu_blocks_k.tolist() == [0, 1, 4]
    assert rows_of(layout.offsets, layout.ids) == [[0], [0], [0, 1, 2]]
    assert rows_of(layout.transposed.offsets, layout.transposed.ids) == [[0, 1], [0], [0], [0]]
    assert layout.density == 1


def test_tables_of_a_grid_by_hand():
    grid = BlockGrid.make([40, 0, 20], [10, 5, 50], block_q=16, block_k=32)
    assert grid.sequence_of_row.tolist() == [0, 0, 0, 2, 2]
    assert grid.block_of_row.tolist() == [0, 1, 2, 0, 1]
    assert grid.k_blocks_of_row.tolist() == [1, 1, 1, 2, 2]
    assert grid.key_end(False).tolist() == [10, 10, 10, 50, 50]
    # The last of 40 queries sits at the last of 10 keys: the first 30 see none.
    assert grid.key_end(True).tolist() == [0, 2, 10, 46, 50]
    assert [x.tolist() for x in grid.diagonal] == [[-1, -1, 0, 0, 1], [-1, 0, 0, 1, 1]]
    assert grid.inside.tolist() == [[True, False]] * 3 + [[True, True]] * 2
    assert (grid.q_blocks, grid.k_blocks, grid.max_q_blocks, grid.max_k_blocks) == (5, 4, 3, 2)
    assert grid.blocks == 3 + 0 + 4
    for t in (grid.query_table, grid.key_table, grid.cu_seqlens_q, grid.cu_blocks_k):
        assert t.dtype == torch.int32


@given(layouts())
def test_lists_are_the_mask(drawn):
    layout = drawn.layout
    grid, mask = layout.grid, layout.to_mask()
    full, partial = rows_of(layout.offsets, layout.ids), rows_of(layout.partial_offsets, layout.partial_ids)
    patterns = rows_of(layout.partial_offsets, layout.partial_patterns)
    assert layout.offsets.shape == layout.partial_offsets.shape == (layout.rows + 1,)
    row = 0
    tokens = layout.to_token_mask()
    for h in range(layout.heads):
        for s in range(grid.batch):
            for a in range(grid.counts_q[s]):
                for ids in (full[row], partial[row]):
                    assert ids == sorted(set(ids))
                assert not set(full[row]) & set(partial[row])
                kept = mask[h, row - h * grid.q_blocks].nonzero().flatten().tolist()
                assert kept == sorted(full[row] + partial[row])
                assert all(b < grid.counts_k[s] for b in kept)
                for b in range(grid.counts_k[s]):
                    cells = tokens[s][h, a * grid.block_q :, b * grid.block_k :]
                    cells = cells[: grid.block_q, : grid.block_k]
                    if b in partial[row]:
                        pattern = layout.patterns[patterns[row][partial[row].index(b)]]
                        i, j = torch.arange(cells.shape[0])[:, None], torch.arange(cells.shape[1])
                        assert torch.equal((pattern[j, i // 32] >> (i % 32)) & 1 == 1, cells)
                        assert cells.any()
                        assert not cells.all()
                    else:
                        assert cells.all() if b in full[row] else not cells.any()
                row += 1
    assert row == layout.rows


@given(layouts())
def test_transposed(drawn):
    layout, t = drawn.layout, drawn.layout.transposed
    grid = layout.grid
    assert t.offsets.shape == (layout.heads * grid.k_blocks + 1,)
    full, partial = rows_of(t.offsets, t.ids), rows_of(t.partial_offsets, t.partial_ids)
    patterns = rows_of(t.partial_offsets, t.partial_patterns)
    slots = grid.split(layout.slots())
    row = 0
    for h in range(layout.heads):
        for part, slot in zip(grid.split(layout.full_mask()), slots, strict=True):
            for b in range(part.shape[2]):
                assert full[row] == part[h, :, b].nonzero().flatten().tolist()
                assert partial[row] == slot[h, :, b].nonzero().flatten().tolist()
                assert patterns[row] == [int(slot[h, a, b]) - 1 for a in partial[row]]
                row += 1
    assert row == len(full)
    assert layout.transposed is t


@given(layouts(), st.booleans())
def test_order_is_by_visible_keys(drawn, causal: bool):
    layout = drawn.layout
    grid, mask = layout.grid, layout.to_mask()
    costs = []
    for h in range(layout.heads):
        row = 0
        for s, (len_q, len_k) in enumerate(zip(grid.lengths_q, grid.lengths_k, strict=True)):
            for a in range(grid.counts_q[s]):
                last = min((a + 1) * grid.block_q, len_q) - 1
                end = min(len_k, last + len_k - len_q + 1) if causal else len_k
                seen = 0
                for b in mask[h, row].nonzero().flatten().tolist():
                    seen += max(0, min(end, (b + 1) * grid.block_k) - b * grid.block_k)
                costs.append(seen)
                row += 1
    assert layout.visible_keys(causal).tolist() == costs
    order = layout.order(causal)
    assert order.dtype == torch.int32
    assert order.tolist() == sorted(range(layout.rows), key=lambda r: -costs[r])
    assert layout.order(causal) is order


@given(layouts(partial=False))
def test_from_mask_in_all_forms(drawn):
    layout = drawn.layout
    grid, packed = layout.grid, layout.to_mask()
    sizes = {"block_q": grid.block_q, "block_k": grid.block_k}
    lengths = {"lengths_q": grid.lengths_q, "lengths_k": grid.lengths_k}
    assert_same(BlockLayout.from_mask(packed, **sizes, **lengths), layout)
    if grid.batch:
        assert_same(BlockLayout.from_mask(grid.split(packed), **sizes, **lengths), layout)
    cu = {
        f"cu_seqlens_{side}": torch.tensor([0, *accumulate(found)], dtype=torch.int64)
        for side, found in (("q", grid.lengths_q), ("k", grid.lengths_k))
    }
    assert_same(BlockLayout.from_mask(packed, **sizes, **cu), layout)


def test_lengths_that_are_left_out():
    mask = torch.ones(2, 4, 8, dtype=torch.bool)
    layout = BlockLayout.from_mask(mask, block_q=32, block_k=16)
    assert (layout.grid.lengths_q, layout.grid.lengths_k) == ((128,), (128,))
    layout = BlockLayout.from_mask(mask, block_q=32, block_k=16, lengths_q=120)
    assert layout.grid.lengths_k == (120,)
    layout = BlockLayout.from_mask(mask, block_q=32, block_k=64, lengths_q=120)
    assert layout.grid.lengths_k == (512,)
    layout = BlockLayout.from_mask([mask, mask[:, :1]], block_q=32, block_k=32)
    assert (layout.grid.lengths_q, layout.grid.lengths_k) == ((128, 32), (256, 256))


@pytest.mark.parametrize("block_k", BLOCK_SIZES)
@pytest.mark.parametrize("block_q", BLOCK_SIZES)
def test_token_masks_at_every_block_size(block_q: int, block_k: int):
    torch.manual_seed(block_q * block_k)
    masks = [torch.rand(2, q, k) < 0.9 for q, k in zip(*LENGTHS, strict=True)]
    masks[0][:, : block_q // 2 + 1] = True
    masks[2][:, 60:] = True
    masks[3][1] = False
    layout = BlockLayout.from_token_mask(masks, block_q=block_q, block_k=block_k)
    for got, want in zip(layout.to_token_mask(), masks, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(layout.to_token_mask(causal=True), masks, strict=True):
        assert torch.equal(got, want.tril(want.shape[2] - want.shape[1]))


def test_equal_patterns_are_kept_once():
    n = 64 * 5
    i = torch.arange(n)
    mask = ((i[:, None] - i) >= 0) & ((i[:, None] - i) < 100)
    layout = BlockLayout.from_token_mask(mask.expand(3, n, n), block_q=64, block_k=64)
    assert layout.patterns.shape[0] == 3  # the diagonal, and where the window ends: 100 = 64 + 36
    assert layout.partial_offsets[-1] == 3 * (5 + 4 + 3)


@given(layouts())
def test_cover(drawn):
    layout, cover = drawn.layout, drawn.layout.cover()
    assert torch.equal(cover.to_mask(), layout.to_mask())
    assert cover.partial_offsets[-1] == 0
    assert cover.nnz == layout.nnz


# Storage


@given(layouts())
def test_compact(drawn):
    layout = drawn.layout
    compact = layout.compact()
    assert_same(compact.expand(), layout)
    assert_same(compact.to("cpu").expand(), layout)
    assert torch.equal(compact.expand().transposed.ids, layout.transposed.ids)


def test_compact_is_small():
    layout = make_layout([8192], heads=8, density=0.2)
    assert layout.compact().nbytes * 8 == 8 * 128 * 128
    assert layout.nbytes > 6 * layout.compact().nbytes


def test_moving_and_pickling():
    layout = make_layout(*LENGTHS, heads=2, block_q=32, block_k=16, partial=0.5)
    assert_same(layout.to("cpu"), layout)
    assert_same(pickle.loads(pickle.dumps(layout)), layout)
    assert "2 heads, 4 sequences" in repr(layout)
    moved = layout.to("meta")
    assert moved.device.type == moved.cu_seqlens_q.device.type == "meta"
    assert [tuple(t.shape) for t in moved.tensors] == [tuple(t.shape) for t in layout.tensors]
    assert "density ?" in repr(moved)


# Without waiting for a device


@given(layouts(max_length=100))
def test_ways_of_a_device_give_the_same(drawn):
    layout = drawn.layout
    with pytest.MonkeyPatch.context() as patch:
        for module in (block_lists, block_patterns, block_masks, block_convert):
            patch.setattr(module, "on_host", lambda t: False)
        if layout.batch:
            sizes = {"block_q": layout.block_q, "block_k": layout.block_k}
            other = BlockLayout.from_token_mask(layout.to_token_mask(), **sizes)
        else:
            other = BlockLayout.from_packed(layout.grid, layout.to_mask())
        assert other.ids.shape[0] == layout.heads * layout.grid.blocks
        assert_same(other, layout)
        assert_same(other.compact().expand(), layout)
        transposed, order = other.transposed, other.order(causal=True)
        covered = other.cover()
        assert_same(covered, layout.cover())
    for name in ("offsets", "partial_offsets"):
        assert torch.equal(getattr(transposed, name), getattr(layout.transposed, name))
    assert rows_of(transposed.offsets, transposed.ids) == rows_of(
        layout.transposed.offsets, layout.transposed.ids
    )
    assert torch.equal(order, layout.order(causal=True))
    # A list with room to spare comes back to the CPU.
    back = other.compact().expand()
    assert_same(back, layout)
    assert back.partial_patterns.shape == back.partial_ids.shape
    assert torch.equal(other.transposed.offsets, layout.transposed.offsets)


def test_building_inside_a_compiled_function():
    want = make_layout(*LENGTHS, heads=2, block_q=32, block_k=16, density=0.4, seed=9)
    mask = want.to_mask()

    @torch.compile(fullgraph=True, backend="eager")
    def build(mask: torch.Tensor, grid: BlockGrid) -> tuple[list[torch.Tensor], torch.Tensor]:
        layout = BlockLayout.from_packed(grid, mask, capacity=200)
        return [*layout.tensors, layout.order(True), *layout.transposed], layout.compact().expand().to_mask()

    found, again = build(mask, want.grid)
    assert torch.equal(again, mask)
    assert found[3].shape == (200,)
    expected = [*want.tensors, want.order(True), *want.transposed]
    for got, e in zip(found, expected, strict=True):
        assert torch.equal(got[: e.shape[0]], e)

    @torch.compile(fullgraph=True, backend="eager")
    def use(x: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
        return x + sum(t.sum() for t in (*layout.tensors, layout.order(), *layout.transposed))

    layout = make_layout(*LENGTHS, heads=2, block_q=32, block_k=16, partial=0.4, seed=9)
    tensors = (*layout.tensors, layout.order(), *layout.transposed)
    assert use(torch.zeros(()), layout) == sum(t.sum() for t in tensors)
    assert use(torch.zeros(()), BlockLayout.from_packed(want.grid, mask)) > 0


def test_what_is_kept_serves_training_too():
    with torch.inference_mode():
        grid = BlockGrid.make([1234, 77], block_q=64, block_k=16)
    layout = BlockLayout.from_packed(grid, random_mask(grid, 2, 0.5))
    with torch.inference_mode():
        kept = [layout.order(True), layout.order(), *layout.transposed, grid.inside, grid.cu_blocks_q]
    for t in (*kept, *layout.tensors, grid.query_table, grid.key_table):
        assert not t.is_inference()


def test_masks_of_any_strides():
    mask = torch.rand(5, 4, 3).transpose(0, 2) < 0.5
    layout = BlockLayout.from_mask(mask, block_q=16, block_k=16)
    assert torch.equal(layout.to_mask(), mask)
    tokens = (torch.rand(50, 60, 2) < 0.9).transpose(0, 2)
    for m in (tokens, tokens[:, :48, :32], tokens[:1].expand(3, -1, -1)):
        assert torch.equal(BlockLayout.from_token_mask(m, block_q=16, block_k=16).to_token_mask()[0], m)


def test_capacity(device_ways):
    mask = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    sizes = {"block_q": 64, "block_k": 64}
    layout = BlockLayout.from_mask(mask, **sizes, capacity=20)
    assert layout.ids.shape == (20,)
    layout = BlockLayout.from_mask(mask, **sizes, capacity=25)
    assert layout.ids.shape == (25,)
    assert layout.offsets[-1] == 20
    assert torch.equal(layout.to_mask(), mask)
    assert layout.transposed.ids.shape == (25,)
    assert BlockLayout.from_mask(~mask.new_ones(mask.shape), **sizes, capacity=0).ids.shape == (0,)
    for capacity in (19, 0):
        with pytest.raises(RuntimeError, match=f"capacity is {capacity}: the mask keeps more blocks"):
            BlockLayout.from_mask(mask, **sizes, capacity=capacity)


def test_capacity_on_the_cpu():
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="capacity is 31: the mask keeps 32 blocks"):
        BlockLayout.from_mask(mask, block_q=64, block_k=64, capacity=31)
    assert BlockLayout.from_mask(mask, block_q=64, block_k=64, capacity=40).ids.shape == (32,)


def test_errors_of_a_device(device_ways):
    grid = BlockGrid.make([128, 64], block_q=64, block_k=64)
    with pytest.raises(RuntimeError, match="True beyond a sequence's key blocks"):
        BlockLayout.from_mask(
            torch.ones(1, 3, 2, dtype=torch.bool), block_q=64, block_k=64, lengths_q=grid.lengths_q
        )
    lists = {"block_q": 64, "block_k": 64, "lengths_q": [128, 64]}
    counts = torch.ones(1, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="indices has a wrong entry"):
        BlockLayout.from_lists(torch.full((1, 3, 1), 1), counts, **lists)
    with pytest.raises(RuntimeError, match="counts has a wrong entry"):
        BlockLayout.from_lists(torch.zeros(1, 3, 1, dtype=torch.int32), counts + 1, **lists)
    with pytest.raises(RuntimeError, match="indices has a wrong entry"):
        BlockLayout.from_csr(torch.tensor([0, 2, 2, 2]), torch.tensor([1, 0]), **lists)


@pytest.mark.gpu
def test_building_waits_for_no_gpu():
    grid = BlockGrid.make([4096, 1000], [4096, 300], block_q=64, block_k=64)
    mask = random_mask(grid, 4, 0.3)
    want = BlockLayout.from_packed(grid, mask)
    there = grid.to("cuda")
    tokens = torch.rand(2, 300, 500, device="cuda") < 0.9
    on_gpu = mask.cuda()
    for _ in range(2):  # the tables of the grid are made the first time
        torch.cuda.set_sync_debug_mode("error")
        try:
            layout = BlockLayout.from_packed(there, on_gpu)
            BlockLayout.from_mask(
                on_gpu, block_q=64, block_k=64, lengths_q=[4096, 1000], lengths_k=[4096, 300]
            )
            found = (
                layout.transposed,
                layout.order(True),
                layout.density_per_head,
                layout.compact().expand(),
            )
            BlockLayout.from_token_mask(tokens, block_q=64, block_k=64).transposed  # noqa: B018
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same(layout.to("cpu"), want)
    assert_same(found[3].to("cpu"), want)
    for got, expected in zip(found[0], want.transposed, strict=True):
        assert torch.equal(got[: expected.shape[0]].cpu(), expected)
    assert torch.equal(found[1].cpu(), want.order(True))


def test_building_is_fast():
    mask = random_mask(BlockGrid.make(8192, block_q=64, block_k=64), 8, 0.2)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        BlockLayout.from_mask(mask, block_q=64, block_k=64, lengths_q=8192)
        times.append(time.perf_counter() - begin)
    assert min(times) < 5e-3  # measured 0.2 ms; FlexAttention's takes hundreds


# Heads of different kinds


def test_heads_by_hand():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :, 2] = True
    layout = BlockLayout.from_heads(
        ["dense", "streaming", "sparse", "streaming"],
        lengths_q=256,
        block_q=64,
        block_k=64,
        mask=mask,
        sink=[0, 1, 0, 0],
        local=[0, 1, 0, 2],
    )
    got = layout.to_mask().int()
    assert got[0].all()
    assert got[1].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert torch.equal(got[2], mask[0].int())
    assert got[3].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_heads_of_ragged_sequences():
    """The local blocks follow the bottom right corner, and blocks of queries cover several of keys."""
    layout = BlockLayout.from_heads(
        ["streaming", "dense"], lengths_q=[40, 0, 64], lengths_k=[100, 50, 0], block_q=32, block_k=16, local=1
    )
    # Queries 0-31 are at keys 60-91, blocks 3 to 5; queries 32-39 at 92-99, blocks 5 and 6.
    first, _, last = layout.grid.split(layout.to_mask())
    assert first[0].int().tolist() == [[1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1, 1]]
    assert first[1].all()
    assert last.shape == (2, 2, 0)


# Lists of blocks


@given(layouts(partial=False), st.randoms(use_true_random=False))
def test_lists_in_any_order(drawn, random):
    layout = drawn.layout
    grid = layout.grid
    indices, counts = layout.to_lists()
    assert indices.shape == (layout.heads, layout.q_blocks, layout.max_k_blocks)
    assert torch.equal(counts, layout.to_mask().sum(2).int())
    shuffled = torch.full((*indices.shape[:2], indices.shape[2] + 1), -7)  # what is not counted is not read
    for h in range(layout.heads):
        for r in range(layout.q_blocks):
            row = indices[h, r, : counts[h, r]].tolist()
            random.shuffle(row)
            shuffled[h, r, : len(row)] = torch.tensor(row)
    sizes = {"block_q": grid.block_q, "block_k": grid.block_k}
    lengths = {"lengths_q": grid.lengths_q, "lengths_k": grid.lengths_k}
    assert_same(BlockLayout.from_lists(shuffled, counts, **sizes, **lengths), layout)
    if layout.rows:  # which tell the heads
        assert_same(BlockLayout.from_csr(layout.offsets, layout.ids, **sizes, **lengths), layout)


def test_lists_of_blocks_hold_no_patterns():
    layout = make_layout([100], block_q=32, block_k=32, partial=1.0)
    with pytest.raises(
        ValueError, match=r"partial blocks, which lists of blocks cannot hold: call cover\(\)"
    ):
        layout.to_lists()
    assert layout.cover().to_lists()[1].sum() == layout.nnz


def test_csr_with_unused_entries():
    layout = BlockLayout.from_csr(
        torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1, -5, 99]), block_q=16, block_k=16
    )
    assert layout.to_mask().int().tolist() == [[[0, 1], [1, 1]]]
    assert layout.ids.dtype == layout.offsets.dtype == torch.int32
    assert layout.transposed.ids[:3].tolist() == [1, 0, 1]


# SciPy, and FlashInfer, whose (indptr, indices) are SciPy's


@pytest.mark.parametrize("lengths", [(128, 96), (100, 90), (1, 200), (0, 50), (50, 0)])
def test_bsr_round_trip(lengths: tuple[int, int]):
    sparse = pytest.importorskip("scipy.sparse")
    len_q, len_k = lengths
    layout = make_layout([len_q], [len_k], heads=3, block_q=32, block_k=16, density=0.6, partial=0.5, seed=3)
    matrices = [layout.to_bsr(h) for h in range(3)]
    for h, m in enumerate(matrices):
        assert isinstance(m, sparse.bsr_array)
        assert m.blocksize == (32, 16) or m.shape[0] == 0 or m.shape[1] == 0
        dense = torch.from_numpy(m.toarray())
        want = torch.zeros(dense.shape, dtype=torch.bool)
        want[:len_q, :len_k] = layout.to_token_mask()[0][h]
        assert torch.equal(dense, want)
    if len_q and len_k:
        assert_same(BlockLayout.from_bsr(matrices, lengths_q=len_q, lengths_k=len_k), layout)


def test_bsr_that_scipy_made():
    sparse = pytest.importorskip("scipy.sparse")
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(64, 96)) * (rng.random((64, 96)) < 0.3)
    dense[:16, :32] = 1.0
    layout = BlockLayout.from_bsr(sparse.bsr_matrix(dense, blocksize=(16, 32)))
    assert torch.equal(layout.to_token_mask()[0][0], torch.from_numpy(dense != 0))
    # Unsorted, and blocks that stand twice and cancel.
    m = sparse.bsr_array(
        (np.array([np.ones((16, 16)), -np.ones((16, 16)), np.ones((16, 16))]), [1, 1, 0], [0, 3]),
        shape=(16, 32),
    )
    assert BlockLayout.from_bsr(m).to_mask().tolist() == [[[True, False]]]
    # A matrix of blocks is FlashInfer's pair of arrays.
    blocks = sparse.csr_array(rng.random((5, 7)) < 0.4)
    blocks.sort_indices()
    arrays = (torch.from_numpy(x.copy()) for x in (blocks.indptr, blocks.indices))
    layout = BlockLayout.from_csr(*arrays, block_q=64, block_k=64, lengths_q=300, lengths_k=444)
    assert torch.equal(layout.to_mask()[0], torch.from_numpy(blocks.toarray()))


def test_without_scipy():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from gapless.testing.block_sparse import make_layout\n"
        "try: make_layout([64]).to_bsr()\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "BSR matrices need SciPy: pip install scipy"


# FlexAttention


DOCUMENTS = torch.tensor([0] * 40 + [1] * 25 + [2] * 80 + [3] * 200)
SLOPE = torch.tensor([3, 70, 500])

MASK_MODS = {
    "causal": lambda b, h, q, k: q >= k,
    "window_of_head": lambda b, h, q, k: (q - k).abs() <= SLOPE[h],
    "documents": lambda b, h, q, k: DOCUMENTS[q] == DOCUMENTS[k],
    "batch_and_head": lambda b, h, q, k: (q + k + b) % (h + 2) == 0,
    "nothing": lambda b, h, q, k: q < 0,
    "everything": lambda b, h, q, k: q >= 0,
}


@pytest.mark.parametrize("lengths", [(256, 256), (200, 150), (37, 300)])
@pytest.mark.parametrize("name", MASK_MODS)
def test_from_block_mask(name: str, lengths: tuple[int, int]):
    len_q, len_k = lengths
    mod = MASK_MODS[name]
    made = flex.create_block_mask(mod, 2, 3, len_q, len_k, device="cpu", BLOCK_SIZE=(32, 64))
    layout = BlockLayout.from_block_mask(made)
    dense = flex.create_mask(mod, 2, 3, len_q, len_k, device="cpu")
    assert layout.batch == 2
    for got, want in zip(layout.to_token_mask(), dense, strict=True):
        assert torch.equal(got, want)
    # Exact: blocks that FlexAttention calls partial may be full or empty.
    assert_same(BlockLayout.from_token_mask(list(dense), block_q=32, block_k=64), layout)


def test_from_block_mask_of_lists():
    """No mask_mod: the lists say it all; one entry serves a batch."""
    counts = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 3, 1, 2], [0, 1, 2, 3], [2, 0, 0, 0]]]], dtype=torch.int32)
    made = flex.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64)
    layout = BlockLayout.from_block_mask(made, batch=3)
    want = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert [m.int().tolist() for m in layout.grid.split(layout.to_mask())] == [[want]] * 3
    assert layout.partial_offsets[-1] == 0
    with pytest.raises(ValueError, match="batch is 0: block_mask has 1 entries"):
        BlockLayout.from_block_mask(made, batch=0)
    three = flex.BlockMask.from_kv_blocks(counts.expand(3, 1, 3), indices.expand(3, 1, 3, 4), BLOCK_SIZE=64)
    with pytest.raises(ValueError, match="batch is 2: block_mask has 3 entries"):
        BlockLayout.from_block_mask(three, batch=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(128, 128), (100, 90), (100, 98), (40, 130), (130, 40)])
def test_to_block_mask(lengths: tuple[int, int], causal: bool):
    len_q, len_k = lengths
    layout = make_layout(
        [len_q] * 2, [len_k] * 2, heads=2, block_q=32, block_k=16, density=0.6, partial=0.5, seed=5
    )
    made = layout.to_block_mask(causal)
    want = layout.to_token_mask(causal)
    # By its function alone, as eager FlexAttention takes it, and by its lists.
    dense = flex.create_mask(made.mask_mod, 2, 2, len_q, len_k, device="cpu")
    for b in range(2):
        assert torch.equal(dense[b], want[b])
    back = BlockLayout.from_block_mask(made)
    assert_same(back, BlockLayout.from_token_mask(want, block_q=32, block_k=16))
    if not causal:
        assert_same(back, layout)
    assert layout.to_block_mask(heads=6).kv_num_blocks.shape[:2] == (2, 6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees():
    layout = make_layout([96], [80], heads=2, block_q=32, block_k=16, density=0.5, partial=0.5, seed=7)
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 96, 16), torch.randn(1, 4, 80, 16)
    got = flex.flex_attention(q, k, k, block_mask=layout.to_block_mask(True, heads=4))
    mask = layout.to_token_mask(True)[0].repeat_interleave(2, 0)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask).nan_to_num(0.0)
    torch.testing.assert_close(got, want)


def test_block_mask_needs_one_length():
    with pytest.raises(ValueError, match="sequences of 2 different lengths"):
        make_layout([64, 32]).to_block_mask()
    with pytest.raises(ValueError, match="sequences of 0 different lengths"):
        make_layout([]).to_block_mask()
    with pytest.raises(ValueError, match="heads is 3: it has to be a multiple of 2"):
        make_layout([64], heads=2).to_block_mask(heads=3)


# Ranges


@given(layouts(max_length=120))
def test_ranges_round_trip(drawn):
    layout = drawn.layout
    grid = layout.grid
    ranges = layout.to_ranges()
    back = BlockLayout.from_ranges(
        *ranges[:2],
        heads=ranges.heads,
        num_heads=layout.heads,
        lengths_q=grid.lengths_q,
        lengths_k=grid.lengths_k,
        block_q=grid.block_q,
        block_k=grid.block_k,
    )
    assert_same(back, layout)
    area = (ranges.q_ranges.diff(dim=1) * ranges.k_ranges.diff(dim=1)).sum()
    assert area == sum(int(m.sum()) for m in layout.to_token_mask())


@given(
    st.lists(st.tuples(*[st.integers(0, 90)] * 2, *[st.integers(0, 70)] * 2, st.integers(0, 3)), max_size=6)
)
def test_ranges_of_all_kinds(drawn):
    want = torch.zeros(90, 70, dtype=torch.bool)
    q_ranges, k_ranges, kinds = [], [], []
    for a, b, c, d, kind in drawn:
        (q0, q1), (k0, k1) = sorted((a, b)), sorted((c, d))
        q_ranges.append((q0, q1))
        k_ranges.append((k0, k1))
        kinds.append(kind)
        for i in range(q0, q1):
            for j in range(k0, k1):
                causal, inverse = j - k1 <= i - q1, j - k0 >= i - q0
                want[i, j] |= (kind not in (1, 3) or causal) and (kind not in (2, 3) or inverse)
    layout = BlockLayout.from_ranges(
        q_ranges, k_ranges, kinds=kinds, lengths_q=90, lengths_k=70, block_q=16, block_k=32
    )
    assert torch.equal(layout.to_token_mask()[0][0], want)


def test_ranges_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch):
    from gapless.plan import block_ranges

    layout = make_layout([100, 40], [130, 9], heads=2, block_q=16, block_k=32, partial=0.5)
    ranges = layout.to_ranges()
    monkeypatch.setattr(block_ranges, "CELLS_AT_ONCE", 5000)
    again = BlockLayout.from_ranges(
        *ranges[:2], heads=ranges.heads.tolist(), num_heads=2, lengths_q=[100, 40], lengths_k=[130, 9],
        block_q=16, block_k=32,
    )  # fmt: skip
    assert_same(again, layout)


# Lengths


def test_lengths_of_cu_seqlens():
    cu = torch.tensor([0, 3, 3, 10])
    assert lengths_of(cu) == (3, 0, 7)
    cu[3] = 12  # another version
    assert lengths_of(cu) == (3, 0, 9)
    with torch.inference_mode():
        assert lengths_of(torch.tensor([0, 3, 10])) == (3, 7)
    assert lengths_of(torch.tensor([0])) == ()
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        lengths_of(torch.tensor([1, 3]), "cu_seqlens_k")
    sizes = {"block_q": 16, "block_k": 16}
    grid = BlockGrid.make([3, 4], **sizes)
    for same in (torch.tensor([3, 4]), np.array([3, 4]), (np.int64(3), 4)):
        assert BlockGrid.make(same, **sizes) is grid
    for one in (3, np.int32(3), torch.tensor(3)):
        assert BlockGrid.make(one, **sizes).lengths_q == (3,)


# Bad input

T = torch.ones(2, 3, 4, dtype=torch.bool)
SIZES = {"block_q": 64, "block_k": 64}
LISTS = torch.zeros(1, 2, 2, dtype=torch.int32)
COUNTS = torch.ones(1, 2, dtype=torch.int32)


def wrong(name: str, error: type[Exception], message: str, call):
    return pytest.param(call, error, message, id=name)


@pytest.mark.parametrize(
    "call, error, message",
    [
        wrong("block", ValueError, "block_q is 48: it has to be one of 16, 32, 64, 128, 256",
              lambda: BlockLayout.from_mask(T, block_q=48, block_k=64)),
        wrong("block_type", ValueError, "block_k is True", lambda: BlockLayout.from_mask(T, block_q=64, block_k=True)),
        wrong("block_list", ValueError, r"block_k is \[64\]",
              lambda: BlockLayout.from_mask(T, block_q=64, block_k=[64])),
        wrong("dtype", TypeError, "mask is torch.float32: it has to be a tensor of torch.bool",
              lambda: BlockLayout.from_mask(T.float(), **SIZES)),
        wrong("type", TypeError, r"mask\[1\] is int", lambda: BlockLayout.from_mask([T, 3], **SIZES)),
        wrong("dims", ValueError, r"mask has shape \[3, 4\]: it has to be \[heads, queries, keys\]",
              lambda: BlockLayout.from_mask(T[0], **SIZES)),
        wrong("no_heads", ValueError, "mask has no heads", lambda: BlockLayout.from_mask(T[:0], **SIZES)),
        wrong("no_masks", ValueError, "mask is empty", lambda: BlockLayout.from_mask([], **SIZES)),
        wrong("heads_differ", ValueError, r"mask\[1\] has 1 heads, the first has 2",
              lambda: BlockLayout.from_mask([T, T[:1]], **SIZES)),
        wrong("q_blocks", ValueError,
              r"mask has shape \[2, 3, 4\]: the lengths, in blocks of 64 x 64, make it \[2, 2, 4\]",
              lambda: BlockLayout.from_mask(T, **SIZES, lengths_q=128, lengths_k=200)),
        wrong("k_blocks", ValueError, r"make it \[2, 3, 5\]",
              lambda: BlockLayout.from_mask(T, **SIZES, lengths_q=192, lengths_k=257)),
        wrong("of_one_sequence", ValueError, r"mask\[1\] has shape \[2, 3, 4\]: .* make it \[2, 1, 4\]",
              lambda: BlockLayout.from_mask([T, T], **SIZES, lengths_q=[192, 64], lengths_k=[256, 256])),
        wrong("sequences", ValueError, "mask has 2 entries, the lengths say 1 sequences",
              lambda: BlockLayout.from_mask([T, T], **SIZES, lengths_q=192)),
        wrong("batch", ValueError, "lengths_k are 1, lengths_q are 2",
              lambda: BlockLayout.from_mask(T, **SIZES, lengths_q=[1, 2], lengths_k=[3])),
        wrong("outside", ValueError, r"mask\[0, 2, 1\] is True: the sequence of query block 2 has 1 key blocks",
              lambda: BlockLayout.from_mask(T[:1, :, :2], **SIZES, lengths_q=[128, 64])),
        wrong("negative", ValueError, r"lengths_q\[1\] is -4",
              lambda: BlockLayout.from_mask(T, **SIZES, lengths_q=[3, -4])),
        wrong("lengths_type", TypeError, "lengths_q is 1.5",
              lambda: BlockLayout.from_mask(T, **SIZES, lengths_q=1.5)),
        wrong("too_many", ValueError, "lengths_k add up to 2147483648 tokens",
              lambda: BlockLayout.from_mask(T, **SIZES, lengths_q=192, lengths_k=1 << 31)),
        wrong("both", ValueError, "lengths_q and cu_seqlens_q are both given",
              lambda: BlockLayout.from_mask(T, **SIZES, lengths_q=192, cu_seqlens_q=torch.tensor([0, 192]))),
        wrong("cu_seqlens", ValueError, "cu_seqlens_q",
              lambda: BlockLayout.from_mask(T, **SIZES, cu_seqlens_q=torch.tensor([0, 192, 100]))),
        wrong("capacity", ValueError, "capacity is -1", lambda: BlockLayout.from_mask(T, **SIZES, capacity=-1)),
        wrong("huge", ValueError, "capacity is 4294967296: it has to be at most 2147483647",
              lambda: BlockLayout.from_packed(BlockGrid.make(65536 * 16, block_q=16, block_k=16),
                                              torch.zeros(1, 1, 1, dtype=torch.bool))),
        wrong("kinds", ValueError, r"kinds\[1\] is 'spare': it has to be 'dense', 'sparse' or 'streaming'",
              lambda: BlockLayout.from_heads(["dense", "spare"], lengths_q=64, **SIZES)),
        wrong("no_kinds", ValueError, "kinds is empty", lambda: BlockLayout.from_heads([], lengths_q=64, **SIZES)),
        wrong("kinds_no_mask", ValueError, "mask is None: kinds names 1 sparse heads",
              lambda: BlockLayout.from_heads(["sparse"], lengths_q=64, **SIZES)),
        wrong("kinds_mask", ValueError, "mask has 2 heads, kinds names 1 sparse ones",
              lambda: BlockLayout.from_heads(["sparse"], lengths_q=192, lengths_k=256, mask=T, **SIZES)),
        wrong("kinds_needless", ValueError, "mask is given, kinds names no sparse head",
              lambda: BlockLayout.from_heads(["dense"], lengths_q=192, lengths_k=256, mask=T, **SIZES)),
        wrong("sink", ValueError, "sink is -1: it has to be a whole number, 0 or more, or one for each of 1 heads",
              lambda: BlockLayout.from_heads(["dense"], lengths_q=192, sink=-1, **SIZES)),
        wrong("local", ValueError, r"local is \[1, 2\]",
              lambda: BlockLayout.from_heads(["dense"], lengths_q=192, local=[1, 2], **SIZES)),
        wrong("list_range", ValueError, r"indices\[0, 1, 0\] is 2: the sequence of query block 1 has 2 key blocks",
              lambda: BlockLayout.from_lists(torch.tensor([[[1, 9], [2, 9]]]), COUNTS, **SIZES)),
        wrong("list_negative", ValueError, r"indices\[0, 0, 0\] is -1",
              lambda: BlockLayout.from_lists(LISTS - 1, COUNTS, **SIZES)),
        wrong("list_twice", ValueError, r"indices\[0, 0\] is \[0, 0\]: it lists a block twice",
              lambda: BlockLayout.from_lists(LISTS, COUNTS * 2, **SIZES)),
        wrong("list_count", ValueError, r"counts\[0, 0\] is 3: it has to be from 0 to 2",
              lambda: BlockLayout.from_lists(LISTS, COUNTS * 3, **SIZES)),
        wrong("list_shapes", ValueError, r"counts has shape \[1, 1\]: indices make it \[1, 2\]",
              lambda: BlockLayout.from_lists(LISTS, COUNTS[:, :1], **SIZES)),
        wrong("list_lengths", ValueError, "indices has 2 rows of query blocks: .* make it 3",
              lambda: BlockLayout.from_lists(LISTS, COUNTS, **SIZES, lengths_q=150)),
        wrong("list_dtype", TypeError, "counts is torch.float32",
              lambda: BlockLayout.from_lists(LISTS, COUNTS.float(), **SIZES)),
        wrong("csr_order", ValueError, r"indices\[1\] is 0: it has to be above the entry before, sort each row",
              lambda: BlockLayout.from_csr(torch.tensor([0, 2, 2]), torch.tensor([1, 0]), **SIZES)),
        wrong("csr_twice", ValueError, r"indices\[1\] is 1: it has to be above",
              lambda: BlockLayout.from_csr(torch.tensor([0, 2, 2]), torch.tensor([1, 1]), **SIZES)),
        wrong("csr_range", ValueError, r"indices\[1\] is 2: its sequence has 2 key blocks",
              lambda: BlockLayout.from_csr(torch.tensor([0, 1, 2]), torch.tensor([1, 2]), **SIZES)),
        wrong("csr_start", ValueError, r"indptr\[0\] is 1: it has to be 0",
              lambda: BlockLayout.from_csr(torch.tensor([1, 1, 2]), torch.tensor([1, 1]), **SIZES)),
        wrong("csr_decreasing", ValueError, r"indptr\[1\] is 2: the next is less",
              lambda: BlockLayout.from_csr(torch.tensor([0, 2, 1]), torch.tensor([0, 1]), **SIZES)),
        wrong("csr_end", ValueError, r"indptr.* is 3: indices has 2 entries",
              lambda: BlockLayout.from_csr(torch.tensor([0, 2, 3]), torch.tensor([0, 1]), **SIZES)),
        wrong("csr_rows", ValueError, "indptr has 2 rows: the lengths make it 3 for each head",
              lambda: BlockLayout.from_csr(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), **SIZES, lengths_q=150)),
        wrong("csr_empty", ValueError, r"indptr has shape \[0\]",
              lambda: BlockLayout.from_csr(torch.tensor([], dtype=torch.int32), LISTS[0, 0], **SIZES)),
        wrong("ranges_backwards", ValueError, r"q_ranges\[1\] is \(5, 4\): it has to run forwards from 0 to 64",
              lambda: BlockLayout.from_ranges([(0, 4), (5, 4)], [(0, 4)] * 2, lengths_q=64, **SIZES)),
        wrong("ranges_end", ValueError, r"k_ranges\[0\] is \(0, 65\)",
              lambda: BlockLayout.from_ranges([(0, 4)], [(0, 65)], lengths_q=64, **SIZES)),
        wrong("ranges_sequence", ValueError,
              "they have to lie in one sequence; that of the first query has queries 0 to 30",
              lambda: BlockLayout.from_ranges([(0, 4)], [(20, 31)], lengths_q=[30, 34], **SIZES)),
        wrong("ranges_count", ValueError, "k_ranges are 2, q_ranges are 1",
              lambda: BlockLayout.from_ranges([(0, 4)], [(0, 4)] * 2, lengths_q=64, **SIZES)),
        wrong("ranges_shape", ValueError, r"q_ranges has shape \[3\]",
              lambda: BlockLayout.from_ranges([0, 4, 5], [(0, 4)] * 3, lengths_q=64, **SIZES)),
        wrong("ranges_kind", ValueError, r"kinds\[0\] is 4: it has to be from 0 to 3",
              lambda: BlockLayout.from_ranges([(0, 4)], [(0, 4)], kinds=[4], lengths_q=64, **SIZES)),
        wrong("ranges_head", ValueError, r"heads\[0\] is 1: it has to be from 0 to 0",
              lambda: BlockLayout.from_ranges([(0, 4)], [(0, 4)], heads=[1], lengths_q=64, **SIZES)),
        wrong("bsr_format", TypeError, "matrix 0 is of type ndarray: it has to be a BSR matrix",
              lambda: BlockLayout.from_bsr(np.ones((64, 64)))),
        wrong("bsr_sequences", ValueError, "layout has 2 sequences: a matrix holds one",
              lambda: make_layout([3, 4]).to_bsr()),
        wrong("bsr_head", ValueError, "head is 1: it has to be from 0 to 0", lambda: make_layout([3]).to_bsr(1)),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    if "bsr" in message.lower():
        pytest.importorskip("scipy")
    with pytest.raises(error, match=message):
        call()


def test_importing_imports_no_scipy():
    code = "import sys, gapless; print('scipy' in sys.modules, 'torch.nn.attention.flex_attention' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    bare = subprocess.run(
        [sys.executable, "-c", code.replace("gapless", "torch")], capture_output=True, text=True, check=True
    ).stdout
    assert out == bare
