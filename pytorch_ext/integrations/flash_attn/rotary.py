# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (arXiv:2104.09864) of the new keys and queries of a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first ``rotary_dim`` dims of each head; computed in float32, returned in x's dtype.

    Args:
        x: [batch, seqlen, heads, dim].
        cos, sin: [max_position, rotary_dim / 2].
        positions: integer [batch, seqlen], or [batch, 1] where the whole sequence shares one.
        interleaved: dims (0, 1), (2, 3), ... form pairs; else dim i and dim i + rotary_dim / 2.
    """
    half = cos.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions.long()].unsqueeze(2).to(work) for table in (cos, sin))
    turned = x[..., : 2 * half].to(work)
    pairs = (
        turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    )
    a, b = pairs.unbind(-1)
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    turned = (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], -1)
