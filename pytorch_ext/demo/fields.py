# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of a made-up video that has structure: smooth 3-D fields, turned by rotary positions.

Neighbours in space and time have similar content, as in a video, on top of a part that all tokens share; rotary
positions say where a token is. What a search finds in them is therefore known: each head looks for what its axes say.
Of four heads in turn, one knows all positions (attention is a small cube around each token), one knows the place in the
picture (the same place in every frame), one knows the time (all of the frame), one knows no position (similar content,
wherever it is).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AXES = {"all positions": (1, 1, 1), "place": (0, 1, 1), "time": (1, 0, 0), "content": (0, 0, 0)}
SMOOTHNESS = (1.0, 3.0, 3.0)  # tokens over which a field changes: in time, down, across
SHARED = 2.0  # size of what all tokens have in common, of content's
SHARPNESS = 1.4  # gain of queries and of keys
BASE = 100.0  # of the rotary frequencies: the positions are few


def smooth_fields(video: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    """float32 [tokens, count]: noise of the video's shape after a Gaussian filter, with mean 0 and variance 1."""
    noise = torch.randn(count, *video, generator=generator)
    squares = torch.zeros(())
    for axis, (size, width) in enumerate(zip(video, SMOOTHNESS, strict=True)):
        frequency = torch.fft.fftfreq(size) * width
        squares = squares + frequency.square().reshape([-1 if i == axis else 1 for i in range(3)])
    spectrum = torch.fft.fftn(noise, dim=(1, 2, 3)) * torch.exp(-2 * math.pi**2 * squares)
    fields = torch.fft.ifftn(spectrum, dim=(1, 2, 3)).real.flatten(1)
    fields = (fields - fields.mean(1, keepdim=True)) / fields.std(1, keepdim=True).clamp(min=1e-6)
    return fields.T.contiguous()


def rotate(x: Tensor, video: tuple[int, int, int], axes: tuple[int, int, int]) -> Tensor:
    """[tokens, dim] with its pairs of channels turned by the positions; axes that are 0 turn nothing."""
    pairs = x.shape[1] // 2
    share = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in video)).view(-1, 3)
    angles = torch.cat(
        [
            known * places[:, axis, None] * BASE ** (-torch.arange(n) / n)
            for axis, (known, n) in enumerate(zip(axes, share, strict=True))
        ],
        dim=1,
    )
    even, odd = x[:, 0::2], x[:, 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(1)


def attention_inputs(
    video: tuple[int, int, int], heads: int, dim: int, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, float32 [tokens, heads, dim] each; tokens are ordered by frame, row, column.

    Args:
        video: latent frames, and their height and width in tokens.
        heads: the axes they know go round :data:`AXES`.
        dim: even.
        seed: of the fields.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = list(AXES.values())
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for head in range(heads):
        content, other, v = (smooth_fields(video, dim, generator) for _ in range(3))
        axes = kinds[head % len(kinds)]
        shared = torch.randn(dim, generator=generator) * (SHARED if any(axes) else 0.0)
        # Queries and keys are alike, not the same; their sizes are those that a norm would leave.
        q, k = (
            SHARPNESS * x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
            for x in (shared + content, shared + 0.9 * content + 0.4 * other)
        )
        found.append((rotate(q, video, axes), rotate(k, video, axes), v))
    q, k, v = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    return q, k, v
