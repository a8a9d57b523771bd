# SPDX-License-Identifier: Apache-2.0
"""``flash_attn.flash_attn_interface``: the seven public functions; the package lists the differences."""

from __future__ import annotations

import torch
from torch import Tensor

from gapless import _planner
from gapless.integrations.flash_attn.checks import check_cache, check_cache_values
from gapless.integrations.flash_attn.rotary import rotate
from gapless.integrations.lengths import even_cu_seqlens
from gapless.ops.checks import (
    check_integers,
    check_shape,
    number,
    readable,
    to_int32,
    window_sides,
)
from gapless.ops.varlen import Options, varlen_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention over a dense batch.

    Args:
        q: [batch, seqlen_q, nheads, headdim].
        k, v: [batch, seqlen_k, nheads_k, headdim].
        dropout_p: has to be 0.
        softmax_scale: None is ``headdim ** -0.5``.
        causal: aligned at the bottom right corner.
        window_size: (left, right) keys seen, inclusive; negative is no limit.
        softcap: 0 or less is none.
        alibi_slopes: float32 [nheads] or [batch, nheads].
        deterministic: it always is.
        return_attn_probs: also return the LSE and an empty tensor, as flash-attn does without dropout.

    Returns:
        out [batch, seqlen_q, nheads, headdim], or (out, LSE [batch, nheads, seqlen_q], empty).
    """
    check_shape("q", q, ["batch", "seqlen_q", "nheads", "headdim"])
    check_shape("k", k, [q.shape[0], "seqlen_k", "nheads_k", q.shape[3]])
    check_shape("v", v, [*k.shape[:3], "headdim_v"])
    cu_seqlens_q = even_cu_seqlens(q.shape[0], q.shape[1], q.device)
    cu_seqlens_k = even_cu_seqlens(k.shape[0], k.shape[1], k.device)
    out, lse = _packed(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
    )
    out = out.unflatten(0, q.shape[:2])
    return (out, _dense_lse(lse, q), out.new_empty(0)) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` with kv [batch, seqlen_k, 2, nheads_k, headdim]."""
    check_shape("kv", kv, ["batch", "seqlen_k", 2, "nheads_k", "headdim"])
    k, v = kv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` with qkv [batch, seqlen, 3, nheads, headdim]."""
    check_shape("qkv", qkv, ["batch", "seqlen", 3, "nheads", "headdim"])
    q, k, v = qkv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention over a packed batch.

    Args:
        q: [total_q, nheads, headdim].
        k, v: [total_k, nheads_k, headdim], or pages [num_blocks, page_block_size, nheads_k, headdim] with a
            ``block_table``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [batch + 1].
        max_seqlen_q, max_seqlen_k: taken and not needed.
        block_table: int32 [batch, max_num_blocks_per_seq]; forward only.
        others: as in :func:`flash_attn_func`.

    Returns:
        out [total_q, nheads, headdim], or (out, LSE [nheads, total_q], empty).
    """
    out, lse = _packed(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        block_table,
    )
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` with kv [total_k, 2, nheads_k, headdim]."""
    check_shape("kv", kv, ["total_k", 2, "nheads_k", "headdim"])
    k, v = kv.unbind(-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` with qkv [total, 3, nheads, headdim]."""
    check_shape("qkv", qkv, ["total", 3, "nheads", "headdim"])
    q, k, v = qkv.unbind(-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Put new keys and values into a cache, in place, then attend to what it holds. No backward.

    Args:
        q: [batch, seqlen, nheads, headdim].
        k_cache, v_cache: [batch_cache, seqlen_cache, nheads_k, headdim], or pages [num_blocks, page_block_size,
            nheads_k, headdim] with a ``block_table``.
        k, v: [batch, seqlen_new, nheads_k, headdim], written from ``cache_seqlens`` on; need ``cache_seqlens``.
        rotary_cos, rotary_sin: [seqlen_ro, rotary_dim / 2]. New keys turn by their place in the cache; queries by
            ``cache_seqlens`` and on under a causal mask or a window, else all by ``cache_seqlens``. Need ``k``.
        cache_seqlens: int or integer [batch], how long each sequence in the cache is. None is its whole length.
        cache_batch_idx: integer [batch], row of the cache of each sequence. Not with ``block_table``.
        cache_leftpad: integer [batch], first used place of each sequence in the cache. Not with ``block_table``.
        block_table: integer [batch, max_num_blocks_per_seq].
        rotary_interleaved: pairs of dims (0, 1), (2, 3), ... are rotated; else the two halves.
        num_splits: taken and not needed.
        others: as in :func:`flash_attn_func`.

    Returns:
        out [batch, seqlen, nheads, headdim], with ``return_softmax_lse`` also LSE [batch, nheads, seqlen].

    Raises:
        TypeError: a tensor of another dtype than q, indices that are no integers, or no tensor at all.
        ValueError: shapes or arguments that do not go together, places outside of the cache (not looked at on a GPU),
            or tensors that need a gradient. The cache is unchanged then.
    """
    check_cache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
    )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, k_cache, v_cache)
    ):
        raise ValueError("flash_attn_with_kvcache has no backward: call it under torch.no_grad()")
    rules = _rules(softmax_scale, causal, window_size, softcap, alibi_slopes)
    batch, seqlen = q.shape[:2]
    rows = cache_batch_idx if cache_batch_idx is not None else torch.arange(batch, device=q.device)
    # A dense cache is a paged one whose pages are its rows.
    table = to_int32(rows[:, None] if block_table is None else block_table)
    capacity = table.shape[1] * k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        length = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), length, dtype=torch.int64, device=q.device)
    new = 0 if k is None else k.shape[1]
    # Queries turn step by step under a mask, else all by the place of the first new key.
    steps = seqlen if rules["window"] != (-1, -1) else min(seqlen, 1)
    check_cache_values(
        k_cache, new, table, cache_seqlens, cache_batch_idx, cache_leftpad, rotary_cos, max(new, steps)
    )
    used = to_int32(cache_seqlens + new)
    if k is not None:
        places = cache_seqlens[:, None] + torch.arange(new, device=q.device)  # [batch, seqlen_new]
        if rotary_cos is not None:
            positions = cache_seqlens[:, None] + torch.arange(steps, device=q.device)
            q = rotate(q, rotary_cos, rotary_sin, positions, rotary_interleaved)
            k = rotate(k, rotary_cos, rotary_sin, places, rotary_interleaved)
        page = table.gather(1, places // k_cache.shape[1]).long()
        k_cache[page, places % k_cache.shape[1]] = k
        v_cache[page, places % v_cache.shape[1]] = v
    keys, values, cu_seqlens_k = k_cache, v_cache, None
    if cache_leftpad is not None:
        # Sequences that begin inside a page are packed: their lengths have to be known.
        place = torch.arange(capacity, device=q.device)
        held = (place >= cache_leftpad[:, None]) & (place < used[:, None])
        keys, values = (x[rows.long()][held] for x in (k_cache, v_cache))
        cu_seqlens_k = torch.nn.functional.pad(
            held.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)
        )
    paged = cu_seqlens_k is None
    out, lse = varlen_attention(
        q.flatten(0, 1),
        keys,
        values,
        even_cu_seqlens(batch, seqlen, q.device),
        cu_seqlens_k,
        seqused_k=used if paged else None,
        block_table=table if paged else None,
        return_lse=True,
        **rules,
    )
    out = out.unflatten(0, (batch, seqlen))
    return (out, _dense_lse(lse, q)) if return_softmax_lse else out


def _packed(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size,
    softcap,
    alibi_slopes,
    block_table=None,
) -> tuple[Tensor, Tensor]:
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}: gapless has no dropout in attention, it has to be 0.0")
    seqused_k = None
    if block_table is not None:
        check_shape("q", q, ["total_q", "nheads", "headdim"])
        check_integers("cu_seqlens_q", cu_seqlens_q, ["batch + 1"], q)
        check_integers("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, q)
        if readable(cu_seqlens_k):
            _planner.check_cu_seqlens(cu_seqlens_k.long().contiguous().numpy(), "cu_seqlens_k", -1)
        seqused_k = to_int32(cu_seqlens_k.diff())
    return varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        None if cu_seqlens_k is cu_seqlens_q or block_table is not None else cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        return_lse=True,
        **_rules(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )


def _rules(softmax_scale, causal, window_size, softcap, alibi_slopes) -> Options:
    """flash-attn's: a negative side of a window is no limit, causal sets the right one to 0, softcap <= 0 is none."""
    left, right = (max(side, -1) for side in window_sides("window_size", window_size))
    return {
        "window": (left, 0 if causal else right),
        "softcap": max(number("softcap", softcap), 0.0),
        "scale": None if softmax_scale is None else number("softmax_scale", softmax_scale),
        "alibi_slopes": alibi_slopes,
    }


def _dense_lse(lse: Tensor, q: Tensor) -> Tensor:
    """[nheads, batch * seqlen] to [batch, nheads, seqlen]."""
    return lse.unflatten(1, q.shape[:2]).transpose(0, 1)
