# SPDX-License-Identifier: Apache-2.0
"""The search of attention tiles, and the masks that it gives."""

import math

import pytest
import torch

from gapless.ops.block_sparse import block_sparse_attention
from gapless.plan.block_grid import BlockGrid
from gapless.sparsity.patterns import attention_tile
from gapless.sparsity.policy import Dense
from gapless.sparsity.tile_search import TileMasks, TileSearch, tile_layout

FRAMES, PER_FRAME, TEXT = 6, 32, 16
TOKENS = FRAMES * PER_FRAME + TEXT
RANGE = (TOKENS - TEXT, TOKENS)


def draw(sharpness: float, seed: int = 0):
    """q, k, v [1, tokens, heads, dim]: the sharper, the more tokens attend to their own frame."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.arange(TOKENS) // PER_FRAME
    own = torch.nn.functional.one_hot(frame, 8)[None, :, None].float().expand(-1, -1, 2, -1)
    q, k, v = (torch.randn(1, TOKENS, 2, 8, generator=generator) for _ in range(3))
    return own * sharpness + 0.3 * q, own * sharpness + 0.3 * k, v


LAYERS = {"sharp": 8.0, "middle": 3.2, "flat": 0.0}


def searched(threshold: float, **options) -> TileSearch:
    search, plain = TileSearch(FRAMES, threshold=threshold, block=16, **options), Dense(16)
    for step in range(2):
        for layer, sharpness in LAYERS.items():
            tokens = draw(sharpness, step)
            out = search.attention(layer, step, *tokens, text=RANGE)
            assert torch.equal(
                out, plain.attention(layer, step, *tokens)
            )  # calibration sees what dense layers give
    return search


def test_each_layer_takes_the_sparsest_mask_under_the_threshold():
    search = searched(0.09)
    table = search.table
    assert {(row.layer, row.k) for row in table} == {
        (n, k) for n in LAYERS for k in (None, *range(FRAMES - 1))
    }
    for layer in LAYERS:
        rows = [row for row in table if row.layer == layer]
        assert [row.density for row in rows] == sorted((row.density for row in rows), reverse=True)
        (chosen,) = [row for row in rows if row.chosen]
        assert chosen.error <= 0.09
        assert all(row.error > 0.09 for row in rows if row.density < chosen.density)
        assert rows[0].k is None and rows[0].density == 1.0 and rows[0].error == 0.0
        assert all(row.seconds > 0 for row in rows)
    choice = search.result().choice
    assert choice == {"sharp": 0, "middle": 2, "flat": None}


def test_the_error_is_that_of_the_output_over_all_inputs():
    search = searched(0.09, references=[1])
    for layer, sharpness in LAYERS.items():
        layout = attention_tile(FRAMES, PER_FRAME, TEXT, 1, block_q=16, block_k=16)
        wrong = right = 0.0
        for step in range(2):
            tokens = draw(sharpness, step)
            full = Dense().attention(0, 0, *tokens)[0]
            sparse = block_sparse_attention(*(x[0] for x in tokens), layout)
            wrong, right = wrong + (sparse - full).square().sum(), right + full.square().sum()
        (row,) = [row for row in search.table if row.layer == layer and row.k == 1]
        assert row.error == pytest.approx(math.sqrt(wrong / right), rel=1e-3)
        assert row.density == pytest.approx(layout.density.item())


def test_thresholds_at_the_ends():
    assert set(searched(0.0).result().choice.values()) == {None}
    assert set(searched(10.0).result().choice.values()) == {0}


def test_the_result_computes_its_masks():
    result = searched(0.09).result()
    for layer, sharpness in LAYERS.items():
        tokens, k = draw(sharpness, 5), result.choice[layer]
        out = result.attention(layer, 0, *tokens, text=RANGE)
        if k is None:
            assert torch.equal(out, Dense().attention(0, 0, *tokens))
        else:
            layout = attention_tile(FRAMES, PER_FRAME, TEXT, k, block_q=16, block_k=16)
            assert torch.equal(out[0], block_sparse_attention(*(x[0] for x in tokens), layout))
    rows = {row.layer: row for row in result.statistics()}
    assert rows["flat"].kind == "dense" and rows["flat"].density == 1.0
    assert rows["sharp"].kind == "sparse" and rows["sharp"].density < 0.45


def test_text_before_and_after_and_keys_cut_off():
    base = attention_tile(FRAMES, PER_FRAME, TEXT, 2, block_q=16, block_k=16).to_mask()
    grid = BlockGrid.make([TOKENS] * 2, [TOKENS, TOKENS - 20], block_q=16, block_k=16)
    layout = tile_layout(grid, FRAMES, RANGE, 2)
    first, second = grid.split(layout.to_mask())
    assert torch.equal(first, base) and torch.equal(second, base[..., : second.shape[2]])
    grid = BlockGrid.make(TOKENS, block_q=16, block_k=16)
    before = attention_tile(FRAMES, PER_FRAME, TEXT, 2, text_first=True, block_q=16, block_k=16)
    assert torch.equal(tile_layout(grid, FRAMES, (0, TEXT), 2).to_mask(), before.to_mask())
    grid = BlockGrid.make(FRAMES * PER_FRAME, block_q=16, block_k=16)
    assert tile_layout(grid, FRAMES, (0, 0), FRAMES).density == 1.0


def test_a_nan_is_under_no_threshold():
    search = TileSearch(FRAMES, threshold=5.0, block=16)
    q, k, v = draw(8.0)
    v[0, 3, 0, 0] = math.nan
    search.attention("broken", 0, q, k, v, text=RANGE)
    assert search.result().choice == {"broken": None}


def test_reset_forgets_the_calibration():
    search = searched(0.09)
    search.end_run()
    assert search.table  # a pipeline's end does not
    search.reset()
    with pytest.raises(ValueError, match="nothing was searched"):
        search.result()


Q = torch.zeros(1, TOKENS, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TileSearch(0), "frames is 0"),
        (lambda: TileSearch(4, threshold=-1), "threshold is -1"),
        (lambda: TileSearch(4, references=[5]), r"references\[0\] is 5: it has to be from 0 to 4"),
        (lambda: TileMasks(4, {"a": 7}), r"choice\['a'\] is 7"),
        (lambda: TileMasks(4, {"a": 2}).attention("b", 0, Q, Q, Q), "layer is 'b': it has to be one"),
        (lambda: TileMasks(7, {"a": 2}).attention("a", 0, Q, Q, Q), "frames is 7: it has to divide the 208"),
        (lambda: TileMasks(6, {"a": 2}).attention("a", 0, Q, Q, Q, text=(3, 9)), r"text is \(3, 9\)"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
