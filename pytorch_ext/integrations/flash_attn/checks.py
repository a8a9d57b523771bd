# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the arguments of ``flash_attn_with_kvcache``, told before anything is written to the cache."""

from __future__ import annotations

from torch import Tensor

from gapless.ops.checks import check_device, check_integers, check_pages, check_range, check_shape, readable


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Everything but values: which arguments go together, types, shapes, devices."""
    check_shape("q", q, ["batch", "seqlen", "nheads", "headdim"])
    batch, _, _, dim = q.shape
    check_shape("k_cache", k_cache, ["batch_cache", "seqlen_cache", "nheads_k", dim])
    check_shape("v_cache", v_cache, [*k_cache.shape[:3], "headdim_v"])
    if k_cache.shape[1] == 0:
        raise ValueError(f"k_cache has shape {list(k_cache.shape)}: its rows (or pages) have to hold a key")
    if (k is None) != (v is None) or (k is not None and cache_seqlens is None):
        raise ValueError("k, v and cache_seqlens: new keys need all three")
    if k is not None and v is not None:
        heads, dim_v = k_cache.shape[2], v_cache.shape[3]
        check_shape("k", k, [batch, "seqlen_new", heads, dim])
        check_shape("v", v, [batch, k.shape[1], heads, dim_v])
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if t is not None and t.dtype != q.dtype:
            raise TypeError(f"{name} is {t.dtype}, q is {q.dtype}: they have to be the same")
        check_device(name, t, q)
    for name, given, other in (
        ("rotary_cos", rotary_cos, rotary_sin),
        ("rotary_sin", rotary_sin, rotary_cos),
    ):
        if given is not None and (other is None or k is None):
            raise ValueError(
                f"{name} is given: it needs rotary_{'sin' if name.endswith('cos') else 'cos'} and k"
            )
    if rotary_cos is not None and rotary_sin is not None:
        check_shape("rotary_cos", rotary_cos, ["seqlen_ro", "rotary_dim / 2"])
        check_shape("rotary_sin", rotary_sin, rotary_cos.shape)
        for name, t in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            if not t.is_floating_point():
                raise TypeError(f"{name} is {t.dtype}: it has to be of a floating point type")
            check_device(name, t, q)
        if 2 * rotary_cos.shape[1] > dim:
            raise ValueError(f"rotary_cos rotates {2 * rotary_cos.shape[1]} dims: the head dim is {dim}")
    lengths = None if isinstance(cache_seqlens, int) else cache_seqlens
    rows = {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    for name, t in {"cache_seqlens": lengths, **rows}.items():
        if t is not None:
            check_integers(name, t, [batch], q)
    if block_table is not None:
        check_integers("block_table", block_table, [batch, "max_num_blocks_per_seq"], q)
        for name, t in rows.items():
            if t is not None:
                raise ValueError(
                    f"{name} is given with block_table: pages take neither cache_batch_idx nor cache_leftpad"
                )
    elif cache_batch_idx is None and batch > k_cache.shape[0]:
        raise ValueError(
            f"k_cache has {k_cache.shape[0]} rows, q has {batch}: give cache_batch_idx or more rows"
        )


def check_cache_values(
    k_cache: Tensor,
    new: int,
    table: Tensor,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    rotary_cos: Tensor | None,
    turned: int,
) -> None:
    """What can be read without waiting for a device.

    Args:
        new: keys that are added to each sequence.
        table: the pages of each sequence [batch, max_pages], or its row of the cache [batch, 1].
        turned: how far after ``cache_seqlens`` something is rotated.
    """
    if not readable(table, cache_seqlens, cache_batch_idx, cache_leftpad):
        return
    room = table.shape[1] * k_cache.shape[1]
    check_range("cache_seqlens", cache_seqlens, 0, room - new, f"with {new} new keys: the cache holds {room}")
    if cache_batch_idx is not None:
        check_range("cache_batch_idx", cache_batch_idx, 0, k_cache.shape[0] - 1, "the rows of k_cache")
    used = cache_seqlens + new
    check_pages(table, used, k_cache.shape[1], k_cache.shape[0])
    if cache_leftpad is not None:
        check_range("cache_leftpad", cache_leftpad, 0, used.numpy(), "the length of its sequence")
    if rotary_cos is not None:
        rows = rotary_cos.shape[0]
        check_range("cache_seqlens", cache_seqlens, 0, rows - turned, f"as rotary_cos has {rows} rows")
