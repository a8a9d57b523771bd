# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention and the mass of blocks, one sequence at a time, with the whole score matrix in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gapless.reference.varlen import visible

if TYPE_CHECKING:
    from gapless.plan.block_layout import BlockLayout


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """[heads, len_q, len_k] in the dtype of q; k may have fewer heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One sequence: q [len_q, heads, dim], k and v [len_k, kv_heads, dim], mask bool [heads, len_q, len_k].

    Returns out [len_q, heads, dim_v] and LSE [heads, len_q]. Rows that see nothing give 0 and -inf.
    """
    if k.shape[0] == 0:
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[-1]), q.new_full(mask.shape[:2], -torch.inf)
    scores = _scores(q, k, scale, softcap).masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    empty = lse == -torch.inf
    probabilities = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", probabilities.to(v.dtype), v), lse


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`gapless.block_sparse_attention`; returns (out, LSE) always."""
    heads = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [q.new_zeros(0, heads, v.shape[-1])], [q.new_zeros(heads, 0, dtype=_lse_dtype(q))]
    grid, at_q, at_k = layout.grid, 0, 0
    for mask, len_q, len_k in zip(layout.to_token_mask(causal), grid.lengths_q, grid.lengths_k, strict=True):
        out, lse = masked_attention(
            q[at_q : at_q + len_q],
            k[at_k : at_k + len_k],
            v[at_k : at_k + len_k],
            mask.repeat_interleave(heads // layout.heads, dim=0),
            scale=scale,
            softcap=softcap,
        )
        outs.append(out)
        lses.append(lse.to(_lse_dtype(q)))
        at_q, at_k = at_q + len_q, at_k + len_k
    return torch.cat(outs), torch.cat(lses, dim=1)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The specification of :func:`gapless.block_mass` (AdaSpa, arXiv:2502.21079, equation 13)."""
    heads = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    parts = []
    for i in range(len(bounds_q) - 1):
        qs, ks = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        len_q, len_k = qs.stop - qs.start, ks.stop - ks.start
        scores = _scores(q[qs], k[ks], scale, softcap).to(_lse_dtype(q))
        mask = visible(len_q, len_k, (-1, 0) if causal else (-1, -1), q.device)
        row = lse[:, qs, None].to(scores.dtype)
        # A row that sees nothing has LSE -inf and no mass.
        weights = torch.exp(scores - row.masked_fill(row == -torch.inf, 0.0)).masked_fill(
            ~mask | (row == -torch.inf), 0.0
        )
        weights = torch.nn.functional.pad(weights, (0, -len_k % block_k, 0, -len_q % block_q))
        parts.append(weights.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q)).sum((2, 4)))
    if not parts:
        return q.new_zeros(heads, 0, 0, dtype=_lse_dtype(q))
    widest = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, widest - part.shape[2])) for part in parts], dim=1)
