# SPDX-License-Identifier: Apache-2.0
"""Selectors against a plain reading of their rules, and recall."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_layout import BlockLayout
from gapless.sparsity import selectors
from gapless.sparsity.selectors import (
    Keep,
    even_rows,
    forced_blocks,
    recall,
    top_k,
    top_k_global,
    top_p,
    visible_blocks,
)


def visible_by_hand(grid: BlockGrid, causal: bool) -> np.ndarray:
    """Some cell of the block is seen."""
    mask, row = np.zeros((grid.q_blocks, grid.max_k_blocks), dtype=bool), 0
    for len_q, len_k in zip(grid.lengths_q, grid.lengths_k, strict=True):
        i, j = np.arange(len_q)[:, None], np.arange(len_k)
        cells = (j <= i + len_k - len_q) if causal else np.ones((len_q, len_k), dtype=bool)
        for a in range(0, len_q, grid.block_q):
            for b in range(0, len_k, grid.block_k):
                mask[row, b // grid.block_k] = cells[a : a + grid.block_q, b : b + grid.block_k].any()
            row += 1
    return mask


def forced_by_hand(grid: BlockGrid, keep: Keep, causal: bool) -> np.ndarray:
    """Some cell of the block is forced, and some cell is seen."""
    mask, row = np.zeros((grid.q_blocks, grid.max_k_blocks), dtype=bool), 0
    begin, end = keep.text
    for len_q, len_k in zip(grid.lengths_q, grid.lengths_k, strict=True):
        i, j = np.arange(len_q)[:, None], np.arange(len_k)
        cells = np.broadcast_to(j < keep.sink, (len_q, len_k)).copy()
        if keep.window is not None:
            cells |= abs(j - (i + len_k - len_q)) <= keep.window
        cells |= ((begin <= i) & (i < end)) | ((begin <= j) & (j < end))
        for a in range(0, len_q, grid.block_q):
            for b in range(0, len_k, grid.block_k):
                mask[row, b // grid.block_k] = cells[a : a + grid.block_q, b : b + grid.block_k].any()
            row += 1
    return mask & visible_by_hand(grid, causal)


def ranked(scores: np.ndarray, visible: np.ndarray, forced: np.ndarray) -> list[int]:
    """Places in the order in which they are taken."""

    def key(i: int) -> tuple:
        nan = math.isnan(scores[i])
        return not forced[i], nan, 0.0 if nan else -scores[i], i

    return sorted(np.flatnonzero(visible).tolist(), key=key)


def rounded(density: float, n: int) -> int:
    return math.floor(density * n + 0.5)


SIZES = st.sampled_from([(16, 16), (32, 16), (16, 64)])
LENGTHS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=3)
KEEPS = st.builds(
    Keep,
    sink=st.integers(0, 20),
    window=st.none() | st.integers(0, 40),
    text=st.sampled_from([(0, 0), (0, 17), (40, 60), (5, 5)]),
    inside_budget=st.booleans(),
)
VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.5, 2.5, -1.0, math.nan, math.inf, -math.inf])


def case(lengths, sizes, values: st.DataObject, heads: int = 2, allowed=VALUES):
    grid = BlockGrid.make(
        [q for q, _ in lengths], [k for _, k in lengths], block_q=sizes[0], block_k=sizes[1]
    )
    n = heads * grid.q_blocks * grid.max_k_blocks
    found = values.draw(st.lists(allowed, min_size=n, max_size=n))
    return grid, torch.tensor(found).reshape(heads, grid.q_blocks, grid.max_k_blocks)


@given(LENGTHS, SIZES, KEEPS, st.booleans())
def test_visible_and_forced_blocks(lengths, sizes, keep, causal):
    grid = BlockGrid.make(
        [q for q, _ in lengths], [k for _, k in lengths], block_q=sizes[0], block_k=sizes[1]
    )
    np.testing.assert_array_equal(visible_blocks(grid, causal=causal).numpy(), visible_by_hand(grid, causal))
    np.testing.assert_array_equal(
        forced_blocks(grid, keep, causal=causal).numpy(), forced_by_hand(grid, keep, causal)
    )


@given(
    LENGTHS,
    SIZES,
    KEEPS,
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.integers(0, 5),
    st.integers(0, 3),
    st.data(),
)
def test_top_k(lengths, sizes, keep, causal, budget, at_least, values):
    grid, scores = case(lengths, sizes, values)
    options = {"density": budget} if isinstance(budget, float) else {"blocks": budget}
    got = top_k(scores, grid, **options, at_least=at_least, keep=keep, causal=causal)
    visible, forced = visible_by_hand(grid, causal), forced_by_hand(grid, keep, causal)
    for h in range(scores.shape[0]):
        for r in range(grid.q_blocks):
            n, given_ = int(visible[r].sum()), int(forced[r].sum())
            count = rounded(budget, n) if isinstance(budget, float) else min(budget, n)
            count = max(count, min(at_least, n))
            count = max(count, given_) if keep.inside_budget else count + given_
            wanted = ranked(scores[h, r].numpy(), visible[r], forced[r])[:count]
            assert got.mask[h, r].nonzero().flatten().tolist() == sorted(wanted)
    assert got.capacity >= int(got.mask.sum())
    assert torch.equal(got.layout.to_mask(), got.mask)


@given(LENGTHS, SIZES, KEEPS, st.booleans(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2), st.data())
def test_top_k_global(lengths, sizes, keep, causal, density, at_least, values):
    grid, scores = case(lengths, sizes, values)
    got = top_k_global(scores, grid, density=density, at_least=at_least, keep=keep, causal=causal)
    visible, forced = visible_by_hand(grid, causal), forced_by_hand(grid, keep, causal)
    for h in range(scores.shape[0]):
        wanted, row = np.zeros_like(visible), 0
        for rows in grid.counts_q:
            part = slice(row, row + rows)
            must = forced[part].copy()
            for r in range(row, row + rows):
                for c in ranked(scores[h, r].numpy(), visible[r], forced[r])[:at_least]:
                    must[r - row, c] = True
            count = rounded(density, int(visible[part].sum()))
            count += 0 if keep.inside_budget else int(forced[part].sum())
            count = max(count, int(must.sum()))
            order = ranked(scores[h, part].numpy().ravel(), visible[part].ravel(), must.ravel())[:count]
            flat = np.zeros(must.size, dtype=bool)
            flat[order] = True
            wanted[part] = flat.reshape(must.shape)
            row += rows
        np.testing.assert_array_equal(got.mask[h].numpy(), wanted)
    assert got.capacity >= int(got.mask.sum())
    assert torch.equal(got.layout.to_mask(), got.mask)


@given(
    LENGTHS,
    SIZES,
    KEEPS,
    st.booleans(),
    st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    st.sampled_from([(0, None), (1, None), (1, 2), (2, 2)]),
    st.data(),
)
def test_top_p(lengths, sizes, keep, causal, p, bounds, values):
    # Whole numbers whose shares are exact in binary, so that a plain reading rounds nothing.
    grid, scores = case(lengths, sizes, values, allowed=st.sampled_from([0.0, 1.0, 2.0, -3.0, math.nan]))
    got = top_p(scores, grid, p, at_least=bounds[0], at_most=bounds[1], keep=keep, causal=causal)
    visible, forced = visible_by_hand(grid, causal), forced_by_hand(grid, keep, causal)
    mass = scores.nan_to_num(0).clamp(min=0).numpy()
    for h in range(scores.shape[0]):
        for r in range(grid.q_blocks):
            order = ranked(scores[h, r].numpy(), visible[r], forced[r])
            free = order if keep.inside_budget else [i for i in order if not forced[r, i]]
            target, n = p * mass[h, r, free].sum(), int(visible[r].sum())
            count = 0
            while count < len(free) and mass[h, r, free[:count]].sum() < target:
                count += 1
            count = max(count, min(bounds[0], n))
            count = min(count, n if bounds[1] is None else bounds[1])
            wanted = set(np.flatnonzero(forced[r]).tolist())
            wanted |= set(order[:count] if keep.inside_budget else free[:count])
            assert got.mask[h, r].nonzero().flatten().tolist() == sorted(wanted), (h, r)
    assert got.capacity >= int(got.mask.sum())


def test_top_p_takes_the_fewest_blocks_that_reach_the_share():
    grid = BlockGrid.make(256, block_q=64, block_k=64)
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).repeat(1, 4, 1)
    for p, count in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4)):
        assert top_p(scores, grid, p).mask.sum(-1).unique().tolist() == [count]
    both = torch.cat([scores, scores])
    per_head = top_p(both, grid, torch.tensor([0.39, 0.95], dtype=torch.float64))
    assert per_head.mask.sum(-1)[:, 0].tolist() == [1, 4]
    infinite = scores.clone()
    infinite[..., 2] = torch.inf
    assert top_p(infinite, grid, 0.9).mask[0, 0].tolist() == [False, False, True, False]


def test_densities_of_heads_and_sequences():
    grid = BlockGrid.make([640, 320], block_q=64, block_k=32)
    scores = torch.rand(3, grid.q_blocks, grid.max_k_blocks, generator=torch.Generator().manual_seed(0))
    densities = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    for choose in (top_k, top_k_global):
        got = choose(scores, grid, density=densities, max_density=0.7)
        for h, density in enumerate(densities.tolist()):
            alone = choose(scores[h : h + 1], grid, density=density)
            assert torch.equal(got.mask[h : h + 1], alone.mask)
        each = torch.stack([densities, densities.flip(0)], 1)
        mixed = choose(scores, grid, density=each)
        for i, column in enumerate(each.unbind(1)):
            same = choose(scores, grid, density=column)
            assert torch.equal(grid.split(mixed.mask)[i], grid.split(same.mask)[i])
    assert top_k(scores, grid, density=1.0).density_per_head.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("choose", [top_k, top_k_global])
def test_hosts_and_devices_select_the_same(choose, causal: bool, monkeypatch: pytest.MonkeyPatch):
    """Both ways on the CPU: a device's own is not run here otherwise."""
    lengths = ([777, 0, 333], [555, 64, 111])
    grid, generator = BlockGrid.make(*lengths, block_q=64, block_k=32), torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (4, grid.q_blocks, grid.max_k_blocks), generator=generator).float()
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, -torch.nan])
    where = torch.rand(scores.shape, generator=generator) < 0.2
    scores[where] = strange[torch.randint(0, 5, (int(where.sum()),), generator=generator)]
    how = [
        {"density": density, "keep": keep, "causal": causal, "at_least": least}
        for density in (0.0, 0.2, 0.7, 1.0)
        for keep in (Keep(), Keep(sink=3, window=5, text=(0, 70)), Keep(sink=40, inside_budget=False))
        for least in (0, 1)
    ]
    host = [choose(scores, grid, **h).mask for h in how]
    monkeypatch.setattr(selectors, "on_host", lambda t: False)
    for h, mask in zip(how, host, strict=True):
        assert torch.equal(choose(scores, grid, **h).mask, mask), h


@pytest.mark.gpu
def test_a_gpu_selects_the_same_and_is_never_waited_for():
    lengths = ([777, 333], [555, 111])
    host = BlockGrid.make(*lengths, block_q=64, block_k=64)
    grid = BlockGrid.make(*lengths, block_q=64, block_k=64, device="cuda")
    scores = torch.randint(0, 5, (4, grid.q_blocks, 9), generator=torch.Generator().manual_seed(0)).float()
    on_gpu, keep = scores.cuda(), Keep(sink=3, window=5, text=(0, 70))
    for choose, budget in ((top_k, {"density": 0.2}), (top_k_global, {"density": 0.2}), (top_p, {"p": 0.7})):
        choose(on_gpu, grid, **budget, keep=keep)  # what depends on lengths only is made once
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = choose(on_gpu, grid, **budget, keep=keep)
            share = found.recall(per_sequence=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wanted = choose(scores, host, **budget, keep=keep)
        assert torch.equal(found.mask.cpu(), wanted.mask)
        torch.testing.assert_close(share.cpu(), wanted.recall(per_sequence=True))
        assert torch.equal(found.layout.to_mask().cpu(), wanted.mask)


def test_equal_scores_prefer_the_lowest_block():
    grid = BlockGrid.make(640, block_q=64, block_k=64)
    scores = torch.zeros(1, 10, 10)
    scores[0, 0, 7] = 1.0
    assert top_k(scores, grid, blocks=3).mask[0, :2].nonzero().tolist() == [
        [0, 0], [0, 1], [0, 7], [1, 0], [1, 1], [1, 2],
    ]  # fmt: skip
    signed = torch.tensor([-1.0, -0.0, 0.0, -0.0]).repeat(1, 4, 1)
    four = BlockGrid.make(256, block_q=64, block_k=64)
    assert top_k(signed, four, blocks=1).mask[0, 0].tolist() == [False, True, False, False]  # zero is zero
    assert top_k_global(scores, grid, blocks=12, at_least=0).mask.nonzero()[:, 1:].tolist() == [
        *([0, j] for j in range(10)), [1, 0], [1, 1],
    ]  # fmt: skip


def test_recall():
    grid = BlockGrid.make([100, 30], [100, 64], block_q=64, block_k=64)
    mass = torch.tensor([[[60.0, 4.0], [9.0, 27.0], [0.0, 0.0]]])  # the second sequence's only row has none
    mask = torch.tensor([[[True, False], [False, True], [False, False]]])
    by_hand = (64 * 60 / 64 + 36 * 27 / 36) / 100
    assert recall(mass, mask, grid=grid).tolist() == pytest.approx([by_hand])
    assert recall(mass, mask, grid=grid, per_sequence=True).tolist() == [pytest.approx([by_hand, 1.0])]
    assert recall(mass, BlockLayout.from_packed(grid, mask)).tolist() == pytest.approx([by_hand])
    stale = mass * torch.tensor([3.0, 0.25, 7.0])[:, None]  # an LSE of another step: a factor for each row
    assert recall(stale, mask, grid=grid).tolist() == pytest.approx([by_hand])
    torch.testing.assert_close(even_rows(stale, grid), mass)
    assert recall(mass.repeat(2, 1, 1), BlockLayout.from_packed(grid, mask)).shape == (2,)  # a shared pattern


def test_a_selection_says_its_recall_and_density():
    grid = BlockGrid.make(256, block_q=64, block_k=64)
    mass = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    selection = top_k(mass, grid, density=0.5)
    kept = mass.topk(2, -1).values.sum(-1) / mass.sum(-1)
    torch.testing.assert_close(selection.recall(), kept.mean(1))
    torch.testing.assert_close(selection.recall(mass.flip(0)), recall(mass.flip(0), selection.layout))
    assert selection.density_per_head.tolist() == [0.5, 0.5]
    assert top_k(mass, grid, density=1.0).recall().tolist() == [1.0, 1.0]
    causal = top_k(mass, grid, density=1.0, causal=True)
    assert causal.density_per_head.tolist() == [1.0, 1.0] and int(causal.mask.sum()) == 20


def test_empty_batches():
    for lengths in ([], [0], [0, 0]):
        grid = BlockGrid.make(lengths, block_q=64, block_k=64)
        scores = torch.zeros(2, 0, 0)
        for got in (
            top_k(scores, grid, density=0.5),
            top_k_global(scores, grid, density=0.5, keep=Keep(sink=1)),
            top_p(scores, grid, 0.5),
        ):
            assert got.mask.shape == (2, 0, 0) and got.capacity == 0
            assert got.recall().tolist() == [1.0, 1.0]
            assert got.density_per_head.tolist() == [0.0, 0.0]


def test_nothing_is_read_from_the_device():
    """Tensors without values raise as soon as Python asks for one."""
    grid = BlockGrid.make([777, 333], [555, 111], block_q=64, block_k=64, device="meta")
    mass = torch.empty(4, grid.q_blocks, grid.max_k_blocks, device="meta")
    densities = torch.empty(4, 2, dtype=torch.float64, device="meta")
    keep = Keep(sink=3, window=5, text=(0, 70))
    for selection in (
        top_k(mass, grid, density=0.2, keep=keep, causal=True),
        top_k(mass, grid, density=densities, keep=keep),
        top_k_global(mass, grid, density=densities, keep=keep),
        top_p(mass, grid, 0.9, keep=keep),
    ):
        assert selection.layout.ids.shape == (selection.capacity,)
        assert selection.recall(per_sequence=True).shape == (4, 2)
        assert selection.density_per_head.device.type == "meta"
    with pytest.raises(RuntimeError):
        mass.sum().item()


GRID = BlockGrid.make(128, block_q=64, block_k=64)
SCORES = torch.zeros(2, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_k(SCORES, GRID), ValueError, "density is None, blocks is None: give one"),
        (lambda: top_k(SCORES, GRID, density=0.5, blocks=1), ValueError, "give one of the two"),
        (lambda: top_k_global(SCORES, GRID), ValueError, "give one of the two"),
        (lambda: top_k(SCORES, GRID, density=1.5), ValueError, "density is 1.5: it has to be from 0 to 1"),
        (lambda: top_k(SCORES, GRID, blocks=-1), ValueError, "blocks is -1: it has to be a whole number"),
        (lambda: top_k(SCORES, GRID, blocks=1, at_least=1.5), ValueError, "at_least is 1.5"),
        (lambda: top_k(SCORES[0], GRID, density=0.5), ValueError, r"scores has shape \[2, 2\]"),
        (lambda: top_k(SCORES[..., :1], GRID, density=0.5), ValueError, r"has to be \[2, 2, 2\]"),
        (lambda: top_k(SCORES.int(), GRID, density=0.5), TypeError, "scores is torch.int32"),
        (lambda: top_k(SCORES, GRID, density=torch.zeros(2)), TypeError, "density is torch.float32"),
        (
            lambda: top_k(SCORES, GRID, density=torch.zeros(3, dtype=torch.float64)),
            ValueError,
            r"density has shape \[3\]",
        ),
        (lambda: top_p(SCORES, GRID, -0.1), ValueError, "p is -0.1: it has to be from 0 to 1"),
        (lambda: top_p(SCORES, GRID, 0.5, at_least=2, at_most=1), ValueError, "at_most is 1, at_least is 2"),
        (lambda: Keep(sink=-1), ValueError, "sink is -1"),
        (lambda: Keep(window=-1), ValueError, "window is -1"),
        (lambda: Keep(text=(3, 2)), ValueError, r"text is \(3, 2\)"),
        (lambda: recall(SCORES, SCORES > 0), ValueError, "grid is None"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
