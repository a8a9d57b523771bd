# SPDX-License-Identifier: Apache-2.0
"""Packed attention under the signature of ``torch.nn.attention.varlen.varlen_attn``, also on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gapless.ops.checks import check_integers, check_tensors, to_int32, window_sides
from gapless.ops.varlen import varlen_attention

if TYPE_CHECKING:
    from torch.nn.attention.varlen import AuxRequest


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gapless.varlen_attention`, called as torch 2.13 calls its own.

    Unlike torch's it runs on a CPU, in float32 and float64 too, and the LSE has a gradient.

    Args:
        query: [tokens_q, heads, dim].
        key, value: [tokens_k, kv_heads, dim], or pages [num_pages, page_size, kv_heads, dim] with ``block_table``.
        cu_seq_q: int32 or int64 [batch + 1], where each sequence begins, then the number of tokens.
        cu_seq_k: the same for keys; None means the queries' lengths. Not read with ``block_table``.
        max_q, max_k: taken and not needed: lengths are read from ``cu_seq_q`` and ``cu_seq_k``.
        return_aux: with ``lse=True`` the LSE is returned too.
        scale: factor of the scores; None is ``dim ** -0.5``.
        window_size: (left, right) keys seen, -1 is no limit; (-1, 0) is causal, aligned at the bottom right.
        enable_gqa: allow fewer kv heads than heads.
        seqused_k: integer [batch], how many keys of each sequence are used; forward only.
        block_table: int32 [batch, max_pages]; needs ``seqused_k``; forward only.
        num_splits: taken and not needed: results never depend on the rest of the batch.

    Returns:
        out [tokens_q, heads, dim]; with ``return_aux.lse`` also LSE [heads, tokens_q].

    Raises:
        ValueError, TypeError: as :func:`gapless.varlen_attention`, and for unequal heads without ``enable_gqa``.
    """
    check_tensors(query=query, key=key, value=value, cu_seq_q=cu_seq_q)
    rank = 3 if block_table is None else 4
    for name, t, dims in (("query", query, 3), ("key", key, rank), ("value", value, rank)):
        if t.dim() != dims:
            raise ValueError(f"{name} has shape {list(t.shape)}: it has to have {dims} dims")
    if cu_seq_k is not None:
        check_tensors(cu_seq_k=cu_seq_k)
    if seqused_k is not None:
        check_integers("seqused_k", seqused_k, ["batch"], query)
        seqused_k = to_int32(seqused_k)
    return_lse = False if return_aux is None else getattr(return_aux, "lse", None)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_aux is {return_aux!r:.80}: it has to be an AuxRequest or None")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads, key has {kv_heads}: fewer kv heads need enable_gqa=True")
    return varlen_attention(
        query,
        key,
        value,
        cu_seq_q,
        None if cu_seq_k is cu_seq_q else cu_seq_k,
        window=window_sides("window_size", window_size),
        scale=scale,
        seqused_k=seqused_k,
        block_table=block_table,
        return_lse=return_lse,
    )
