# SPDX-License-Identifier: Apache-2.0
"""Masks that are known before the data: for text causal, windows, BigBird, strided; for video tiles, frames, radial.

Positions are aligned at the bottom right corner: query ``i`` of a sequence of ``len_q`` queries and ``len_k`` keys sits
at key position ``p = i + len_k - len_q``. With ``exact`` a layout keeps exactly the pairs of tokens that the formula
keeps, with patterns where it cuts blocks; without, every block that it touches is kept in full. The same arguments give
the same layout, and every head gets the same unless the function says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gapless.plan.block_grid import BlockGrid, Lengths
from gapless.plan.block_layout import BlockLayout
from gapless.sparsity.rules import Rule, Span, band, either, layout_of_rule, segments


def causal(
    lengths_q: Lengths,
    lengths_k: Lengths | None = None,
    *,
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Keys up to the query's position.

    Args:
        lengths_q: tokens of the sequence, or of each.
        lengths_k: the same for keys; None: as many as queries.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.
        heads: pattern heads.
        exact: cut blocks on the diagonal; without, run the layout with ``causal=True``.
        device: of the layout.
    """
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k)
    return layout_of_rule(lambda n, m: band(-1, 0, m - n), grid, heads=heads, exact=exact, device=device)


def sliding_window(
    lengths_q: Lengths,
    lengths_k: Lengths | None = None,
    *,
    window: tuple[int, int],
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """``window[0]`` keys to the left of the query's position and ``window[1]`` to its right, -1 for no limit.

    The window of :func:`gapless.varlen_attention` (Mistral, arXiv:2310.06825); arguments as in :func:`causal`.
    """
    left, right = _window(window)
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k)
    return layout_of_rule(
        lambda n, m: band(left, right, m - n), grid, heads=heads, exact=exact, device=device
    )


def sink_window(
    lengths_q: Lengths,
    lengths_k: Lengths | None = None,
    *,
    sink: int,
    window: tuple[int, int],
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The window, and the first ``sink`` keys of the sequence up to the window's right end.

    StreamingLLM (arXiv:2309.17453) with ``window=(n, 0)``; arguments as in :func:`sliding_window`.
    """
    left, right = _window(window)
    _at_least("sink", sink, 0)
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k)

    def rule(n: int, m: int) -> Rule:
        return either(band(left, right, m - n), _first_keys(sink, band(-1, right, m - n)))

    return layout_of_rule(rule, grid, heads=heads, exact=exact, device=device)


def strided(
    lengths_q: Lengths,
    lengths_k: Lengths | None = None,
    *,
    window: int,
    stride: int = 0,
    global_tokens: int = 0,
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Near tokens, every ``stride``-th of the far ones, and global tokens that see and are seen by all.

    A query at position ``p`` sees key ``j`` if ``|p - j| <= window``, or ``stride`` divides ``p - j``, or ``j`` or
    ``p`` is below ``global_tokens``: Longformer (arXiv:2004.05150) without a stride, the strided pattern of the Sparse
    Transformer (arXiv:1904.10509) in both directions with one.

    Args:
        lengths_q, lengths_k, block_q, block_k, heads, exact, device: as in :func:`causal`.
        window: keys seen to each side.
        stride: distance between far tokens; 0: none are seen.
        global_tokens: first tokens of the sequence.
    """
    for name, value in (("window", window), ("stride", stride), ("global_tokens", global_tokens)):
        _at_least(name, value, 0)
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k)

    def rule(n: int, m: int) -> Rule:
        shift = m - n
        anywhere = band(-1, -1, shift)
        rules = [
            band(window, window, shift),
            _first_keys(global_tokens, anywhere),
            _first_queries(global_tokens - shift, anywhere),
        ]
        return either(*rules, _every(stride, shift)) if stride else either(*rules)

    return layout_of_rule(rule, grid, heads=heads, exact=exact, device=device)


def bigbird(
    lengths_q: Lengths,
    lengths_k: Lengths | None = None,
    *,
    window_blocks: int = 1,
    global_blocks: int = 1,
    random_blocks: int = 3,
    seed: int = 0,
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Whole blocks: near ones, global ones that see and are seen by all, and random ones (arXiv:2007.14062).

    Args:
        lengths_q, lengths_k, block_q, block_k, device: as in :func:`causal`.
        window_blocks: key blocks to each side of those of the query block's own positions.
        global_blocks: first blocks of the sequence, as rows and as columns.
        random_blocks: further key blocks of each query block, drawn from those that it does not see yet; all of them
            where there are fewer.
        seed: of the drawing; another one for each head follows from it.
        heads: pattern heads, each with random blocks of its own.
    """
    for name, value in (
        ("window_blocks", window_blocks),
        ("global_blocks", global_blocks),
        ("random_blocks", random_blocks),
    ):
        _at_least(name, value, 0)
    _at_least("heads", heads, 1)
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k)
    first, last = (x[:, None] for x in grid.diagonal)
    block = torch.arange(grid.max_k_blocks)
    inside = block < grid.k_blocks_of_row[:, None]
    near = (block >= first - window_blocks) & (block <= last + window_blocks)
    fixed = inside & (near | (block < global_blocks) | (grid.block_of_row[:, None] < global_blocks))
    generator = torch.Generator().manual_seed(seed)
    lots = torch.rand(heads, *fixed.shape, generator=generator).masked_fill(fixed | ~inside, 2.0)
    drawn = torch.zeros_like(lots, dtype=torch.bool)
    drawn.scatter_(2, lots.argsort(dim=2)[..., :random_blocks], True)
    return BlockLayout.from_packed(grid, fixed | (drawn & (lots < 2.0))).to(device)


def tile_order(video: tuple[int, int, int], tile: tuple[int, int, int]) -> Tensor:
    """int64 [frames * height * width]: tokens of a video tile by tile, ``x[tile_order(...)]`` brings them together.

    Args:
        video: frames, height and width in tokens; tokens are stored in this order, width fastest.
        tile: the same of a tile; tiles at the far sides may be short.
    """
    _video_and_tile(video, tile)
    places = [torch.arange(n) for n in video]
    tiles = [p // t for p, t in zip(places, tile, strict=True)]
    counts = [-(-n // t) for n, t in zip(video, tile, strict=True)]
    number = (tiles[0][:, None, None] * counts[1] + tiles[1][:, None]) * counts[2] + tiles[2]
    return number.flatten().argsort(stable=True)


def sliding_tile(
    video: tuple[int, int, int],
    *,
    tile: tuple[int, int, int],
    window: tuple[int, int, int],
    text_tokens: int = 0,
    text_first: bool = False,
    batch: int = 1,
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Tiles of a video see the tiles around them (sliding tile attention, arXiv:2502.04507).

    Tokens have to be in the order of :func:`tile_order`. On each axis a tile sees ``window`` tiles, its own in the
    middle (of an even number, the one after); where that would leave the video the window moves back inside. Text sees
    and is seen by all. No block is cut where a tile is a multiple of both blocks.

    Args:
        video: frames, height and width in tokens.
        tile: the same of a tile; tiles at the far sides may be short.
        window: tiles seen on each axis, at least 1; more than there are sees all.
        text_tokens, text_first: text beside the video's tokens, before or after them.
        batch: sequences, all the same.
        block_q, block_k, heads, exact, device: as in :func:`causal`.
    """
    _video_and_tile(video, tile)
    _at_least_each("window", window, 1)
    counts = [-(-n // t) for n, t in zip(video, tile, strict=True)]
    near, sizes = [], []
    for n, t, w, tokens in zip(counts, tile, window, video, strict=True):
        number = np.arange(n)
        start = np.clip(number - w // 2, 0, max(n - w, 0))[:, None]
        near.append((number >= start) & (number < start + w))
        sizes.append(np.minimum(tokens - number * t, t))
    tiles = int(np.prod(counts))
    sees = near[0][:, None, None, :, None, None] & near[1][:, None, None, :, None] & near[2][:, None, None, :]
    lengths = np.einsum("i,j,k->ijk", *sizes).reshape(tiles)
    return _video_layout(
        lengths.tolist(), sees.reshape(tiles, tiles), text_tokens, text_first, batch,
        block_q=block_q, block_k=block_k, heads=heads, exact=exact, device=device,
    )  # fmt: skip


def attention_tile(
    frames: int,
    tokens_per_frame: int,
    text_tokens: int = 0,
    k: int = 2,
    *,
    reference_frames: Sequence[int] | None = None,
    text_first: bool = False,
    batch: int = 1,
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    exact: bool = False,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Frames of a video see themselves and ``k`` reference frames, which see all (Efficient-vDiT, arXiv:2502.06155).

    The paper's mask ``k : frames - k``. Of ``frames ** 2`` tiles of frames, ``(frames - k) * (frames - k - 1)`` are
    left out. As in the paper, blocks on the border of two frames are kept in full unless ``exact`` is set. Text sees
    and is seen by all.

    Args:
        frames: latent frames.
        tokens_per_frame: tokens of each; frames follow one another.
        text_tokens, text_first: text beside the video's tokens, before or after them.
        k: reference frames, from 0 to ``frames``.
        reference_frames: which ones; None: ``k`` frames at equal distances from the first on (the paper names none).
        batch: sequences, all the same.
        block_q, block_k, heads, exact, device: as in :func:`causal`.
    """
    _at_least("frames", frames, 1)
    _at_least("tokens_per_frame", tokens_per_frame, 1)
    if not isinstance(k, int) or not 0 <= k <= frames:
        raise ValueError(f"k is {k!r:.80}: it has to be from 0 to {frames}, the frames")
    if reference_frames is None:
        chosen = [i * frames // k for i in range(k)]
    else:
        chosen = list(reference_frames)
        if len(set(chosen)) != k or len(chosen) != k or not all(0 <= i < frames for i in chosen):
            raise ValueError(
                f"reference_frames is {chosen!r:.80}: it has to hold {k} different frames from 0 to {frames - 1}"
            )
    sees = np.eye(frames, dtype=bool)
    sees[chosen] = True
    sees[:, chosen] = True
    return _video_layout(
        [tokens_per_frame] * frames, sees, text_tokens, text_first, batch,
        block_q=block_q, block_k=block_k, heads=heads, exact=exact, device=device,
    )  # fmt: skip


def radial(
    frames: int,
    tokens_per_frame: int,
    text_tokens: int = 0,
    *,
    decay: float = 1.0,
    narrowest: int = 1,
    sink_frames: int = 1,
    text_first: bool = False,
    batch: int = 1,
    block_q: int = 64,
    block_k: int = 64,
    heads: int = 1,
    exact: bool = False,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Windows inside frames that halve as the distance between frames doubles (radial attention, arXiv:2506.19852).

    At a distance of ``d`` frames a token sees the tokens of the other frame whose place differs from its own by at most
    ``w - 1``, with ``w = decay * tokens_per_frame / 2 ** floor(log2(max(d, 1)))``. Where ``w`` is below ``narrowest``
    the window stays that wide, and only frames whose distance is a multiple of ``ceil(narrowest / w)`` are seen. With
    ``narrowest`` 1 that is the paper's formula; a block's size suits blocks better. Text sees and is seen by all.

    Args:
        frames: latent frames.
        tokens_per_frame: tokens of each; frames follow one another.
        text_tokens, text_first: text beside the video's tokens, before or after them.
        decay: factor of the windows, above 0.
        narrowest: least width of a window, in tokens.
        sink_frames: first frames, whose keys all queries see.
        batch: sequences, all the same.
        block_q, block_k, heads, exact, device: as in :func:`causal`.
    """
    for name, value, least in (
        ("frames", frames, 1),
        ("tokens_per_frame", tokens_per_frame, 1),
        ("narrowest", narrowest, 1),
        ("sink_frames", sink_frames, 0),
    ):
        _at_least(name, value, least)
    if not 0 < decay < float("inf"):
        raise ValueError(f"decay is {decay!r:.80}: it has to be above 0")
    distance = np.maximum(np.arange(frames), 1)
    wide = decay * tokens_per_frame / 2.0 ** np.floor(np.log2(distance))
    skip = np.ceil(narrowest / np.minimum(wide, narrowest)).astype(np.int64)
    reach = np.where(np.arange(frames) % skip == 0, np.maximum(np.floor(wide), narrowest), 0)  # by distance
    table = torch.from_numpy(reach)
    before = text_tokens if text_first else 0
    video = frames * tokens_per_frame

    def visible(query: Tensor, key: Tensor) -> Tensor:
        i, j = query - before, key - before
        text = (i < 0) | (i >= video) | (j < 0) | (j >= video)
        i, j = i.clamp(0, video - 1), j.clamp(0, video - 1)
        frame_i, frame_j = i // tokens_per_frame, j // tokens_per_frame
        apart = (i % tokens_per_frame - j % tokens_per_frame).abs()
        return text | (frame_j < sink_frames) | (apart < table[(frame_i - frame_j).abs()])

    def bounds(q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        (i0, i1), (j0, j1) = ((x[0] - before, x[1] - before) for x in (q, k))
        free = (i0 < 0) | (i0 >= video) | (j0 < 0) | (j0 >= video)
        frame_i, frame_j = (np.clip(x, 0, video - 1) // tokens_per_frame for x in (i0, j0))
        free = free | (frame_j < sink_frames)
        i0, i1 = i0 - frame_i * tokens_per_frame, i1 - frame_i * tokens_per_frame
        j0, j1 = j0 - frame_j * tokens_per_frame, j1 - frame_j * tokens_per_frame
        width = reach[np.abs(frame_i - frame_j)]
        nearest = np.maximum(np.maximum(j0 - i1, i0 - j1), 0)
        farthest = np.maximum(j1 - i0, i1 - j0)
        return free | (nearest < width), free | (farthest < width)

    borders = tuple(before + i * tokens_per_frame for i in range(frames + 1))
    grid = _video_grid(video, text_tokens, batch, block_q, block_k)
    return layout_of_rule(
        lambda n, m: Rule(visible, bounds, borders, borders), grid, heads=heads, exact=exact, device=device
    )


def _video_grid(video: int, text_tokens: int, batch: int, block_q: int, block_k: int) -> BlockGrid:
    _at_least("text_tokens", text_tokens, 0)
    _at_least("batch", batch, 0)
    return BlockGrid.make([video + text_tokens] * batch, block_q=block_q, block_k=block_k)


def _video_layout(
    lengths: list[int],
    sees: np.ndarray,
    text_tokens: int,
    text_first: bool,
    batch: int,
    *,
    block_q: int,
    block_k: int,
    heads: int,
    exact: bool,
    device: torch.device | str,
) -> BlockLayout:
    """Segments of a video of these lengths, and text that sees and is seen by all."""
    grid = _video_grid(sum(lengths), text_tokens, batch, block_q, block_k)
    if text_tokens:
        sees = np.pad(sees, (1, 0) if text_first else (0, 1), constant_values=True)
        lengths = [text_tokens, *lengths] if text_first else [*lengths, text_tokens]
    rule = segments(lengths, sees)
    return layout_of_rule(lambda n, m: rule, grid, heads=heads, exact=exact, device=device)


def _first_keys(count: int, rule: Rule) -> Rule:
    """The rule, of the first keys only."""

    def bounds(q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        some, every = rule.bounds(q, k)
        return some & (k[0] < count), every & (k[1] < count)

    return Rule(
        lambda query, key: rule.visible(query, key) & (key < count),
        bounds,
        rule.borders_q,
        (*rule.borders_k, count),
        rule.shifts,
    )


def _first_queries(count: int, rule: Rule) -> Rule:
    """The rule, of the first queries only."""

    def bounds(q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        some, every = rule.bounds(q, k)
        return some & (q[0] < count), every & (q[1] < count)

    return Rule(
        lambda query, key: rule.visible(query, key) & (query < count),
        bounds,
        (*rule.borders_q, count),
        rule.borders_k,
        rule.shifts,
    )


def _every(stride: int, shift: int) -> Rule:
    """Keys whose distance from the query's position is a multiple."""

    def bounds(q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        least, most = k[0] - (q[1] + shift), k[1] - (q[0] + shift)
        return most // stride * stride >= least, np.full(np.broadcast(least, most).shape, stride == 1)

    return Rule(lambda query, key: (key - query - shift) % stride == 0, bounds, shifts=True)


def _window(window: tuple[int, int]) -> tuple[int, int]:
    if len(window) != 2 or any(not isinstance(n, int) or n < -1 for n in window):
        raise ValueError(
            f"window is {window!r:.80}: it has to be (left, right), whole numbers, -1 for no limit"
        )
    return window


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r:.80}: it has to be a whole number, at least {least}")


def _at_least_each(name: str, values: tuple[int, int, int], least: int) -> None:
    if len(values) != 3 or any(not isinstance(n, int) or n < least for n in values):
        raise ValueError(
            f"{name} is {values!r:.80}: it has to be three whole numbers (frames, height, width), each at least {least}"
        )


def _video_and_tile(video: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    _at_least_each("video", video, 1)
    _at_least_each("tile", tile, 1)
