# SPDX-License-Identifier: Apache-2.0
"""Patterns against their formulas, token by token, and against published figures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from gapless import BlockLayout
from gapless.plan.block_grid import BlockGrid
from gapless.sparsity import patterns
from gapless.sparsity.rules import layout_of_rule

LENGTHS = [(0, 0), (1, 1), (150, 150), (64, 130), (130, 70), (33, 0), (0, 20)]
BLOCKS = [(16, 16), (32, 64), (64, 16), (128, 128)]


def check(layout: BlockLayout, sequence: int, sees: Callable[[int, int], bool], exact: bool) -> None:
    """Exactly the pairs that the formula keeps, or all of each block that holds one."""
    grid = layout.grid
    len_q, len_k = grid.lengths_q[sequence], grid.lengths_k[sequence]
    want = torch.tensor([[sees(i, j) for j in range(len_k)] for i in range(len_q)], dtype=torch.bool)
    want = want.view(len_q, len_k)
    if exact:
        expected = BlockLayout.from_token_mask(want[None], block_q=grid.block_q, block_k=grid.block_k)
        assert torch.equal(layout.grid.split(layout.full_mask())[sequence][0], expected.full_mask()[0])
    else:
        assert layout.partial_ids.shape == (0,)
        padded = torch.nn.functional.pad(want, (0, -len_k % grid.block_k, 0, -len_q % grid.block_q))
        kept = padded.unflatten(1, (-1, grid.block_k)).unflatten(0, (-1, grid.block_q)).any(3).any(1)
        want = kept.repeat_interleave(grid.block_q, 0).repeat_interleave(grid.block_k, 1)[:len_q, :len_k]
    got = layout.to_token_mask()[sequence]
    for head in got:
        assert torch.equal(head, want)


def text_cases():
    def inside(i: int, j: int, shift: int, left: int, right: int) -> bool:
        p = i + shift
        return (left < 0 or j >= p - left) and (right < 0 or j <= p + right)

    yield "causal", patterns.causal, {}, lambda i, j, s: j <= i + s
    for left, right in ((5, 0), (0, 0), (-1, 3), (20, -1), (-1, -1), (40, 17)):
        yield (
            f"window_{left}_{right}",
            patterns.sliding_window,
            {"window": (left, right)},
            lambda i, j, s, a=left, b=right: inside(i, j, s, a, b),
        )
    for sink, left, right in ((4, 30, 0), (0, 8, 8), (40, 3, 2), (7, 5, -1)):
        yield (
            f"sink_{sink}_{left}_{right}",
            patterns.sink_window,
            {"sink": sink, "window": (left, right)},
            lambda i, j, s, n=sink, a=left, b=right: (
                inside(i, j, s, a, b) or (j < n and inside(i, j, s, -1, b))
            ),
        )
    for window, stride, first in ((3, 0, 0), (10, 40, 0), (0, 1, 0), (4, 7, 20), (2, 100, 3)):
        yield (
            f"strided_{window}_{stride}_{first}",
            patterns.strided,
            {"window": window, "stride": stride, "global_tokens": first},
            lambda i, j, s, w=window, n=stride, g=first: (
                abs(i + s - j) <= w or (n > 0 and (i + s - j) % n == 0) or j < g or i + s < g
            ),
        )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", [pytest.param(c[1:], id=c[0]) for c in text_cases()])
def test_text_patterns(case, exact: bool):
    make, options, formula = case
    for (block_q, block_k), (len_q, len_k) in product(BLOCKS, LENGTHS):
        if (block_q, block_k) != (32, 64) and (len_q, len_k) not in ((150, 150), (130, 70)):
            continue
        layout = make(len_q, len_k, block_q=block_q, block_k=block_k, exact=exact, **options)
        shift = len_k - len_q
        check(layout, 0, lambda i, j, s=shift: formula(i, j, s), exact)


def test_sequences_and_heads():
    lengths_q, lengths_k = zip(*LENGTHS, strict=True)
    layout = patterns.sliding_window(lengths_q, lengths_k, window=(30, 0), block_q=32, block_k=16, heads=3)
    assert (layout.batch, layout.heads) == (len(LENGTHS), 3)
    for s, (len_q, len_k) in enumerate(LENGTHS):
        shift = len_k - len_q
        check(layout, s, lambda i, j, d=shift: i + d - 30 <= j <= i + d, True)
    assert patterns.causal([], block_q=32, block_k=16, heads=2).rows == 0


def test_causal_without_patterns_is_for_a_causal_run():
    exact = patterns.causal([100, 40], [130, 20], block_q=32, block_k=32)
    cover = patterns.causal([100, 40], [130, 20], block_q=32, block_k=32, exact=False)
    for a, b in zip(exact.to_token_mask(), cover.to_token_mask(causal=True), strict=True):
        assert torch.equal(a, b)
    assert cover.patterns.shape[0] == 0
    assert torch.equal(exact.to_mask(), cover.to_mask())


def test_bigbird():
    grid = {"block_q": 32, "block_k": 16}
    options = {"window_blocks": 1, "global_blocks": 2, "random_blocks": 3, **grid}
    layout = patterns.bigbird([500, 90], [700, 40], heads=4, seed=5, **options)
    first, last = layout.grid.diagonal
    row = 0
    for s, part in enumerate(layout.grid.split(layout.to_mask())):
        nk = layout.grid.counts_k[s]
        for a in range(part.shape[1]):
            fixed = {b for b in range(nk) if a < 2 or b < 2 or int(first[row]) - 1 <= b <= int(last[row]) + 1}
            for h in range(4):
                kept = set(part[h, a].nonzero().flatten().tolist())
                assert fixed <= kept
                assert len(kept - fixed) == min(3, nk - len(fixed))
            row += 1
    again = patterns.bigbird([500, 90], [700, 40], heads=4, seed=5, **options)
    other = patterns.bigbird([500, 90], [700, 40], heads=4, seed=6, **options)
    assert torch.equal(again.to_mask(), layout.to_mask())
    assert not torch.equal(other.to_mask(), layout.to_mask())
    assert not torch.equal(layout.to_mask()[0], layout.to_mask()[1])


# Video


def with_text(sees, video: int, text: int, text_first: bool):
    def formula(i: int, j: int) -> bool:
        i, j = (i - text, j - text) if text_first else (i, j)
        return not (0 <= i < video and 0 <= j < video) or sees(i, j)

    return formula


@pytest.mark.parametrize(
    "video, tile", [((4, 6, 5), (2, 3, 2)), ((1, 7, 3), (4, 2, 2)), ((2, 4, 4), (2, 4, 4))]
)
def test_tile_order(video, tile):
    order = patterns.tile_order(video, tile)
    assert order.sort().values.tolist() == list(range(order.shape[0]))
    t, h, w = (order // (video[1] * video[2]), order // video[2] % video[1], order % video[2])
    where = [
        (int(a) // tile[0], int(b) // tile[1], int(c) // tile[2], int(a), int(b), int(c))
        for a, b, c in zip(t, h, w, strict=True)
    ]
    assert where == sorted(where)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("text, text_first", [(0, False), (21, False), (21, True)])
@pytest.mark.parametrize(
    "video, tile, window",
    [
        ((4, 6, 6), (2, 2, 2), (1, 3, 1)),
        ((4, 5, 7), (2, 2, 3), (2, 2, 2)),  # tiles that are short, windows of an even number
        ((2, 4, 8), (1, 4, 4), (5, 1, 1)),
        ((3, 4, 4), (3, 4, 4), (1, 1, 1)),
    ],
)
def test_sliding_tile(video, tile, window, text: int, text_first: bool, exact: bool):
    layout = patterns.sliding_tile(
        video, tile=tile, window=window, text_tokens=text, text_first=text_first, batch=2, heads=2,
        block_q=16, block_k=32, exact=exact,
    )  # fmt: skip
    order = patterns.tile_order(video, tile).tolist()
    counts = [-(-n // t) for n, t in zip(video, tile, strict=True)]

    def tile_of(token: int) -> list[int]:
        place = order[token]
        at = (place // (video[1] * video[2]), place // video[2] % video[1], place % video[2])
        return [x // t for x, t in zip(at, tile, strict=True)]

    def sees(i: int, j: int) -> bool:
        for a, b, n, w in zip(tile_of(i), tile_of(j), counts, window, strict=True):
            middle = min(max(a, w // 2), max(n - w, 0) + w // 2)
            if not middle - w // 2 <= b < middle - w // 2 + w:
                return False
        return True

    for s in range(2):
        check(layout, s, with_text(sees, len(order), text, text_first), exact)


def test_sliding_tile_of_the_paper():
    """arXiv:2502.04507: 115.2K tokens, of which windows leave out 58.33% and 91.0%; whole blocks."""
    video, tile = (30, 48, 80), (6, 8, 8)
    for window, density in (((5, 6, 10), 1.0), ((5, 5, 5), 1 - 0.5833), ((3, 3, 3), 1 - 0.91)):
        layout = patterns.sliding_tile(video, tile=tile, window=window, block_q=128, block_k=128)
        assert layout.density.item() == pytest.approx(density, abs=1e-4)
        assert layout.patterns.shape[0] == 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("text, text_first", [(0, False), (30, False), (30, True)])
@pytest.mark.parametrize("frames, per_frame, k", [(5, 16, 2), (6, 21, 1), (3, 40, 0), (3, 7, 3), (1, 50, 0)])
def test_attention_tile(frames: int, per_frame: int, k: int, text: int, text_first: bool, exact: bool):
    layout = patterns.attention_tile(
        frames, per_frame, text, k, text_first=text_first, exact=exact, block_q=16, block_k=32
    )
    chosen = {i * frames // k for i in range(k)}
    assert len(chosen) == k

    def sees(i: int, j: int) -> bool:
        a, b = i // per_frame, j // per_frame
        return a == b or a in chosen or b in chosen

    check(layout, 0, with_text(sees, frames * per_frame, text, text_first), exact)


@pytest.mark.parametrize(
    "frames, k, published",
    [
        (8, 4, 0.1760), (8, 3, 0.2988), (8, 2, 0.4547), (8, 1, 0.6438),
        (24, 12, 0.2151), (24, 8, 0.4030), (24, 6, 0.5188), (24, 4, 0.6498), (24, 3, 0.7205),
    ],
)  # fmt: skip
def test_attention_tile_of_the_paper(frames: int, k: int, published: float):
    """Shares left out in arXiv:2502.06155, which counts blocks on the border of two frames as kept."""
    layout = patterns.attention_tile(frames, 128, k=k)
    left_out = (frames - k) * (frames - k - 1) / frames**2
    assert 1 - layout.density.item() == pytest.approx(left_out)
    assert 0.008 <= left_out - published <= 0.0145
    straddling = patterns.attention_tile(frames, 100, k=k)
    assert straddling.density > layout.density
    chosen = list(range(k))
    moved = patterns.attention_tile(frames, 128, k=k, reference_frames=chosen)
    assert moved.density == layout.density
    assert moved.to_mask()[0, : 2 * k].all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("text, text_first", [(0, False), (19, True), (19, False)])
@pytest.mark.parametrize(
    "frames, per_frame, decay, narrowest, sink",
    [(9, 12, 1.0, 1, 1), (20, 5, 1.0, 1, 0), (7, 20, 0.6, 8, 1), (20, 6, 1.0, 4, 2), (1, 33, 2.0, 1, 0)],
)
def test_radial(frames, per_frame, decay, narrowest, sink, text: int, text_first: bool, exact: bool):
    layout = patterns.radial(
        frames, per_frame, text, decay=decay, narrowest=narrowest, sink_frames=sink, text_first=text_first,
        block_q=16, block_k=32, exact=exact,
    )  # fmt: skip

    def sees(i: int, j: int) -> bool:
        (a, x), (b, y) = divmod(i, per_frame), divmod(j, per_frame)
        width = decay * per_frame / 2 ** (max(abs(a - b), 1).bit_length() - 1)
        if b < sink:
            return True
        if width >= narrowest:
            return abs(x - y) + 1 <= width
        return abs(a - b) % -(-narrowest // width) == 0 and abs(x - y) + 1 <= narrowest

    check(layout, 0, with_text(sees, frames * per_frame, text, text_first), exact)


def test_large_videos_are_quick_and_symmetric():
    """110K tokens; nothing looks at single pairs of tokens."""
    tile = patterns.attention_tile(32, 3450, 256, 4)
    rings = patterns.radial(32, 3450, 256, narrowest=64, sink_frames=0)
    for layout in (tile, rings):
        mask = layout.to_mask()[0]
        assert torch.equal(mask, mask.T)
        assert layout.patterns.shape[0] == 0
    assert 0.2 < tile.density < 0.3
    assert rings.density < 0.45


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patterns.causal(64, heads=0), "heads is 0"),
        (lambda: patterns.causal(64, block_q=65), "block_q is 65"),
        (lambda: patterns.causal([64], [64, 3]), "lengths_k are 2, lengths_q are 1"),
        (lambda: patterns.sliding_window(64, window=(-2, 0)), r"window is \(-2, 0\)"),
        (lambda: patterns.sink_window(64, sink=-1, window=(3, 0)), "sink is -1"),
        (lambda: patterns.strided(64, window=3, stride=-1), "stride is -1"),
        (lambda: patterns.strided(64, window=1.5), "window is 1.5"),
        (lambda: patterns.bigbird(64, random_blocks=-1), "random_blocks is -1"),
        (lambda: patterns.bigbird(64, heads=0), "heads is 0"),
        (lambda: patterns.sliding_tile((2, 2), tile=(1, 1, 1), window=(1, 1, 1)), r"video is \(2, 2\)"),
        (lambda: patterns.sliding_tile((2, 2, 2), tile=(1, 0, 1), window=(1, 1, 1)), r"tile is \(1, 0, 1\)"),
        (
            lambda: patterns.sliding_tile((2, 2, 2), tile=(1, 1, 1), window=(1, 0, 1)),
            r"window is \(1, 0, 1\)",
        ),
        (lambda: patterns.attention_tile(4, 16, k=5), "k is 5: it has to be from 0 to 4"),
        (lambda: patterns.attention_tile(0, 16), "frames is 0"),
        (lambda: patterns.attention_tile(4, 16, -1), "text_tokens is -1"),
        (lambda: patterns.attention_tile(4, 16, k=2, reference_frames=[1]), r"reference_frames is \[1\]"),
        (lambda: patterns.attention_tile(4, 16, k=1, reference_frames=[4]), r"reference_frames is \[4\]"),
        (lambda: patterns.radial(4, 16, decay=0.0), "decay is 0.0"),
        (lambda: patterns.radial(4, 16, narrowest=0), "narrowest is 0"),
        (lambda: patterns.tile_order((2, 2, 2), (1, 1, -1)), r"tile is \(1, 1, -1\)"),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_bounds_do_not_have_to_find_every_full_block():
    """A rule may leave blocks to its cells; the layout is exact all the same."""
    from gapless.sparsity.rules import band, either

    grid = BlockGrid.make(100, block_q=16, block_k=16)
    split = either(band(-1, 0, 0), band(0, -1, 0))  # all, in two halves that meet on the diagonal
    layout = layout_of_rule(lambda n, m: split, grid)
    assert layout.density == 1
    assert layout.patterns.shape[0] == 0
