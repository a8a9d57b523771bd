# SPDX-License-Identifier: Apache-2.0
"""Variable-length packed attention, one sequence at a time, with the whole score matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(len_q: int, len_k: int, first: int | None, device: torch.device) -> Tensor:
    """int64 [len_q]: key position of each query; ``first`` is the first one's, None aligns the ends."""
    return torch.arange(len_q, device=device) + (len_k - len_q if first is None else first)


def visible(
    len_q: int, len_k: int, window: tuple[int, int], device: torch.device, first: int | None = None
) -> Tensor:
    """Boolean [len_q, len_k]: which keys each query sees.

    A query sees ``window[0]`` keys to the left of its position and ``window[1]`` to its right; -1 is no limit.
    ``first`` as in :func:`positions`.
    """
    position = positions(len_q, len_k, first, device)[:, None]
    offset = torch.arange(len_k, device=device)[None, :] - position
    left, right = window
    mask = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= offset >= -left
    if right >= 0:
        mask &= offset <= right
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    first: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [len_q, heads, dim], k [len_k, heads, dim], v [len_k, heads, dim_v].

    ``first`` as in :func:`positions`. Returns out [len_q, heads, dim_v] and LSE [heads, len_q]. Rows that see nothing
    give 0 and -inf (or the sink).
    """
    len_q, len_k = q.shape[0], k.shape[0]
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        position = positions(len_q, len_k, first, q.device)[:, None]
        distance = (position - torch.arange(len_k, device=q.device)[None, :]).abs()
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distance.to(scores.dtype)
    scores = scores.masked_fill(~visible(len_q, len_k, window, q.device, first), -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(-1, len_q, 1)
        scores = torch.cat([scores, sink], dim=-1)
    if scores.shape[-1] == 0:
        return q.new_zeros(len_q, q.shape[1], v.shape[-1]), scores.new_full((q.shape[1], len_q), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    empty = lse == -torch.inf
    probabilities = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])[..., :len_k]
    return torch.einsum("hqk,khd->qhd", probabilities.to(v.dtype), v), lse


def gather_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Keys or values of one sequence, [length, heads, dim], from pages [num_pages, page_size, heads, dim]."""
    used = -(-length // pages.shape[1])
    return pages[table[:used].long()].flatten(0, 1)[:length]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    q_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`gapless.varlen_attention`; returns (out, LSE) always."""
    heads, kv_heads = q.shape[1], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if causal:
        window = (window[0], 0 if window[1] < 0 else min(window[1], 0))
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [q.new_zeros(0, heads, v.shape[-1])], []
    for i in range(len(bounds_q) - 1):
        qi = q[bounds_q[i] : bounds_q[i + 1]]
        if block_table is not None:
            assert seqused_k is not None
            length = int(seqused_k[i])
            ki, vi = (gather_pages(x, block_table[i], length) for x in (k, v))
        else:
            stop = bounds_k[i + 1] if seqused_k is None else bounds_k[i] + int(seqused_k[i])
            ki, vi = k[bounds_k[i] : stop], v[bounds_k[i] : stop]
        slopes = None
        if alibi_slopes is not None:
            slopes = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[i]
        out, lse = attention(
            qi,
            ki.repeat_interleave(heads // kv_heads, dim=1),
            vi.repeat_interleave(heads // kv_heads, dim=1),
            scale=scale,
            window=window,
            softcap=softcap,
            slopes=slopes,
            sinks=sinks,
            first=None if q_offset is None else int(q_offset[i]),
        )
        outs.append(out)
        lses.append(lse)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = (
        torch.cat([x.to(lse_dtype) for x in lses], dim=1) if lses else q.new_zeros(heads, 0, dtype=lse_dtype)
    )
    return torch.cat(outs), lse


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys: outs [tokens, heads, dim], LSE [heads, tokens]."""
    stacked = torch.stack(lses)
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse.masked_fill(lse == -torch.inf, 0.0))
    mixed = (torch.stack(outs) * weights.transpose(1, 2)[..., None].to(outs[0].dtype)).sum(0)
    return mixed, lse
