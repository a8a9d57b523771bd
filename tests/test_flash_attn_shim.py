# SPDX-License-Identifier: Apache-2.0
"""gapless.integrations.flash_attn: flash-attn 2.8's interface, and ``import flash_attn`` where there is none."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
import textwrap

import pytest
import torch

from gapless.integrations import flash_attn as shim
from gapless.integrations.flash_attn import bert_padding
from gapless.ops.registry import flash_attn_unusable
from gapless.reference.varlen import attention
from gapless.testing import assert_within_budget

# Names, order and defaults of flash-attn 2.8.3.
OPTIONS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_varlen_func": (
        ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
        {**OPTIONS, "block_table": None},
    ),
    "flash_attn_varlen_kvpacked_func": (
        ["q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"], OPTIONS,
    ),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
    "flash_attn_with_kvcache": (
        ["q", "k_cache", "v_cache"],
        {
            "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
            "cache_batch_idx": None, "cache_leftpad": None, "block_table": None, "softmax_scale": None,
            "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
            "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
        },
    ),
}  # fmt: skip
PADDING = {
    "unpad_input": ["hidden_states", "attention_mask", "unused_mask"],
    "unpad_input_for_concatenated_sequences": ["hidden_states", "attention_mask_in_length"],
    "pad_input": ["hidden_states", "indices", "batch", "seqlen"],
}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(q, k, v, window=(-1, -1), slopes=None, softcap=0.0, scale=None):
    """The reference on each batch entry: out [batch, seqlen, heads, dim], LSE [batch, heads, seqlen]."""
    groups = q.shape[2] // k.shape[2]
    results = [
        attention(
            q[i], k[i].repeat_interleave(groups, 1), v[i].repeat_interleave(groups, 1), window=window, softcap=softcap,
            scale=scale or q.shape[-1] ** -0.5, slopes=slopes,
        )
        for i in range(q.shape[0])
    ]  # fmt: skip
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def check(actual, function, *tensors):
    """Against ``function`` in float64 (oracle) and in the tensors' own dtype (witness)."""
    oracle, witness = function(*(t.double() for t in tensors)), function(*tensors)
    for got in zip(actual, oracle, witness, strict=True):
        assert_within_budget(*got)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    names, options = SIGNATURES[name]
    parameters = inspect.signature(getattr(shim, name)).parameters
    assert {n: p.default for n, p in parameters.items()} == {
        **dict.fromkeys(names, inspect.Parameter.empty),
        **options,
    }
    assert list(parameters) == [*names, *options]


@pytest.mark.parametrize("name", PADDING)
def test_padding_signatures(name):
    assert list(inspect.signature(getattr(bert_padding, name)).parameters) == PADDING[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (2, 1), "softcap": 3.0},
        {"causal": True, "window_size": (2, 5), "softmax_scale": 0.3},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "softcap": -1.0},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_dense(options, dtype):
    q, k, v = (randn(2, n, h, 16, dtype=dtype, seed=i) for i, (n, h) in enumerate([(5, 4), (7, 2), (7, 2)]))
    out, lse, probs = shim.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert (
        out.shape == q.shape and lse.shape == (2, 4, 5) and lse.dtype == torch.float32 and probs.numel() == 0
    )
    left, right = options.get("window_size", (-1, -1))
    rule = {
        "window": (left, 0 if options.get("causal") else right), "slopes": options.get("alibi_slopes"),
        "softcap": max(options.get("softcap", 0.0), 0.0), "scale": options.get("softmax_scale"),
    }  # fmt: skip
    check((out, lse), lambda *t: dense(*t, **rule), q, k, v)
    assert torch.equal(shim.flash_attn_func(q, k, v, **options), out)


def test_empty_rows_and_gradients():
    q, k, v = (randn(1, n, 2, 8, seed=n).requires_grad_() for n in (5, 2, 2))
    out, lse, _ = shim.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :3].any() and (lse[:, :, :3] == -torch.inf).all()
    out.sum().backward()
    assert not q.grad[:, :3].any() and all(t.grad.isfinite().all() for t in (q, k, v))


def test_packed_variants_agree():
    qkv = randn(2, 6, 3, 4, 16).requires_grad_()
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    one = shim.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], causal=True)
    assert torch.equal(shim.flash_attn_kvpacked_func(q, kv, causal=True), one)
    assert torch.equal(shim.flash_attn_qkvpacked_func(qkv, causal=True), one)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    flat = qkv.flatten(0, 1)
    varlen, lse, probs = shim.flash_attn_varlen_func(
        flat[:, 0], flat[:, 1], flat[:, 2], cu, cu, 6, 6, causal=True, return_attn_probs=True
    )
    assert torch.equal(varlen.view(one.shape), one) and lse.shape == (4, 12) and probs.numel() == 0
    assert torch.equal(
        shim.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 6, 6, causal=True), varlen
    )
    packed = shim.flash_attn_varlen_qkvpacked_func(flat, cu, 6, causal=True)
    assert torch.equal(packed, varlen)
    packed.sum().backward()
    assert qkv.grad.isfinite().all() and qkv.grad.any()


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1"):
        shim.flash_attn_func(*[randn(1, 2, 1, 8)] * 3, 0.1)


@torch.no_grad()
def test_varlen_pages():
    q, k, v = randn(5, 4, 16), randn(3, 8, 2, 16, seed=1), randn(3, 8, 2, 16, seed=2)
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 11, 16], dtype=torch.int32)
    table = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    out = shim.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 11, causal=True, block_table=table)
    k, v = (torch.cat([torch.cat([x[2], x[0]])[:11], x[1, :5]]) for x in (k, v))
    torch.testing.assert_close(out, shim.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 11, causal=True))


def rotary(x, cos, sin, positions, interleaved):
    """The formula, one pair at a time; x [seqlen, heads, dim]."""
    x, half = x.clone(), cos.shape[1]
    for t, position in enumerate(positions):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            c, s = cos[position, i], sin[position, i]
            x[t, :, a], x[t, :, b] = x[t, :, a] * c - x[t, :, b] * s, x[t, :, a] * s + x[t, :, b] * c
    return x


@torch.no_grad()
@pytest.mark.parametrize("layout", ["rows", "batch_idx", "leftpad", "pages"])
@pytest.mark.parametrize("turn", [None, "interleaved", "halves"])
@pytest.mark.parametrize("causal", [True, False])
def test_kvcache(layout, turn, causal):
    batch, new, heads, kv_heads, dim, length = 3, 2, 4, 2, 16, 12
    q, k, v = (randn(batch, new, h, dim, seed=i) for i, h in enumerate([heads, kv_heads, kv_heads]))
    lengths = torch.tensor([3, 0, 10], dtype=torch.int32)
    leftpad = torch.tensor([1, 0, 4], dtype=torch.int32) if layout == "leftpad" else None
    index = torch.tensor([4, 0, 3], dtype=torch.int32) if layout == "batch_idx" else None
    table = torch.tensor([[5, 1, 0], [2, 4, 3], [8, 6, 7]], dtype=torch.int32) if layout == "pages" else None
    shape = (
        (9, 4, kv_heads, dim)
        if layout == "pages"
        else (5 if layout == "batch_idx" else batch, length, kv_heads, dim)
    )
    caches = [randn(*shape, seed=3), randn(*shape, seed=4)]
    before = [x.clone() for x in caches]
    angle = randn(16, 4, seed=5)
    cos, sin = (angle.cos(), angle.sin()) if turn else (None, None)
    out, lse = shim.flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, lengths, index, leftpad, table, causal=causal,
        rotary_interleaved=turn == "interleaved", num_splits=3, return_softmax_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape and lse.shape == (batch, heads, new)
    for i in range(batch):
        n, pad = int(lengths[i]), 0 if leftpad is None else int(leftpad[i])
        row = i if index is None else int(index[i])
        qi, ki = q[i], k[i]
        if turn:
            ki = rotary(ki, cos, sin, range(n, n + new), turn == "interleaved")
            qi = rotary(qi, cos, sin, range(n, n + new) if causal else [n] * new, turn == "interleaved")
        held = [(x[table[i].long()].flatten(0, 1) if layout == "pages" else x[row]) for x in before]
        now = [(x[table[i].long()].flatten(0, 1) if layout == "pages" else x[row]) for x in caches]
        for old, current, fresh in zip(held, now, (ki, v[i]), strict=True):  # in place, and nothing else
            torch.testing.assert_close(current[n : n + new], fresh)
            assert torch.equal(current[:n], old[:n]) and torch.equal(current[n + new :], old[n + new :])
        keys, values = (torch.cat([old[pad:n], x]) for old, x in zip(held, (ki, v[i]), strict=True))
        expected = dense(qi[None], keys[None], values[None], window=(-1, 0 if causal else -1))
        torch.testing.assert_close((out[i : i + 1], lse[i : i + 1]), expected)


@torch.no_grad()
def test_kvcache_without_new_keys():
    q, cache = randn(2, 1, 2, 8), randn(2, 6, 2, 8, seed=1)
    whole = shim.flash_attn_with_kvcache(q, cache, cache)
    torch.testing.assert_close(whole, shim.flash_attn_func(q, cache, cache))
    some = shim.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=4)
    torch.testing.assert_close(some, shim.flash_attn_func(q, cache[:, :4], cache[:, :4]))


def test_kvcache_refusals():
    q, cache = randn(2, 2, 2, 8), randn(2, 6, 2, 8)
    table = torch.zeros(2, 1, dtype=torch.int32)
    for message, options in {
        "cache_seqlens: new keys need": {"k": q, "v": q},
        "cache_seqlens.0. is 5.*the cache holds 6": {"k": q, "v": q, "cache_seqlens": 5},
        "rotary_cos is given": {"rotary_cos": randn(6, 4), "rotary_sin": randn(6, 4)},
        "cache_leftpad is given with block_table": {"block_table": table, "cache_leftpad": table[:, 0]},
        "cache_batch_idx is given with block_table": {"block_table": table, "cache_batch_idx": table[:, 0]},
    }.items():
        with pytest.raises(ValueError, match=message):
            shim.flash_attn_with_kvcache(q, cache, cache, **options)
    with pytest.raises(ValueError, match="no backward"):
        shim.flash_attn_with_kvcache(q.requires_grad_(), cache, cache)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


DENSE = [
    (
        "q_rank",
        {"q": torch.ones(5, 4, 16)},
        ValueError,
        r"q has shape \[5, 4, 16\].*\[batch, seqlen_q, nheads",
    ),
    ("q_none", {"q": None}, TypeError, "q is None.*tensor"),
    ("k_batch", {"k": torch.ones(1, 7, 2, 16)}, ValueError, r"k has shape \[1, 7, 2, 16\].*\[2, seqlen_k"),
    (
        "v_length",
        {"v": torch.ones(2, 3, 2, 16)},
        ValueError,
        r"v has shape \[2, 3, 2, 16\].*\[2, 7, 2, headdim_v",
    ),
    ("k_dtype", {"k": torch.ones(2, 7, 2, 16).double()}, TypeError, "k is torch.float64"),
    ("window", {"window_size": (1,)}, ValueError, r"window_size is \(1,\)"),
    ("window_float", {"window_size": (1.5, 2)}, ValueError, r"window_size is \(1.5, 2\)"),
    ("softcap", {"softcap": None}, TypeError, "softcap is None.*number"),
    ("softcap_nan", {"softcap": float("nan")}, ValueError, "softcap is nan"),
    ("scale", {"softmax_scale": "x"}, TypeError, "softmax_scale is 'x'.*number"),
    ("slopes", {"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes has shape \[3\]"),
]


@pytest.mark.parametrize(
    "change, error, message", [case[1:] for case in DENSE], ids=[case[0] for case in DENSE]
)
def test_bad_dense_arguments(change, error, message):
    good = {"q": torch.ones(2, 5, 4, 16), "k": torch.ones(2, 7, 2, 16), "v": torch.ones(2, 7, 2, 16)}
    with pytest.raises(error, match=message):
        shim.flash_attn_func(**good | change)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: shim.flash_attn_kvpacked_func(torch.ones(2, 5, 4, 16), x),
        lambda x: shim.flash_attn_qkvpacked_func(x),
        lambda x: shim.flash_attn_varlen_kvpacked_func(torch.ones(8, 4, 16), x, ints(0, 8), ints(0, 8), 8, 8),
        lambda x: shim.flash_attn_varlen_qkvpacked_func(x, ints(0, 8), 8),
    ],
    ids=["kv", "qkv", "varlen_kv", "varlen_qkv"],
)
def test_bad_packed_arguments(call):
    for shape in ((2,), (8, 4, 16), (2, 7, 2, 16), (2, 7, 5, 2, 16)):
        with pytest.raises(ValueError, match=r"kv has shape .*it has to be \["):
            call(torch.ones(shape))


PAGED = [
    (
        "page",
        {"block_table": ints(0, 99, 2, 0).view(2, 2)},
        ValueError,
        r"block_table\[0, 1\] is 99.*from 0 to 2",
    ),
    ("too_long", {"cu_seqlens_k": ints(0, 99, 100)}, ValueError, r"seqused_k\[0\] is 99.*from 0 to 16"),
    ("decreases", {"cu_seqlens_k": ints(0, 11, 3)}, ValueError, r"cu_seqlens_k\[2\] is 3, after 11"),
    ("start", {"cu_seqlens_k": ints(1, 11, 16)}, ValueError, r"cu_seqlens_k\[0\] is 1"),
    ("none", {"cu_seqlens_k": None}, TypeError, "cu_seqlens_k is None"),
    ("float", {"cu_seqlens_k": torch.tensor([0.0, 11.0, 16.0])}, TypeError, "cu_seqlens_k is torch.float32"),
    ("shape", {"cu_seqlens_k": ints(0, 11)}, ValueError, r"cu_seqlens_k has shape \[2\].*\[3\]"),
    ("gradient", {"q": torch.ones(5, 4, 16, requires_grad=True)}, ValueError, "block_table is for inference"),
]


@pytest.mark.parametrize(
    "change, error, message", [case[1:] for case in PAGED], ids=[case[0] for case in PAGED]
)
def test_bad_paged_arguments(change, error, message):
    good = {
        "q": torch.ones(5, 4, 16), "k": torch.ones(3, 8, 2, 16), "v": torch.ones(3, 8, 2, 16),
        "cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 11, 16), "max_seqlen_q": 3, "max_seqlen_k": 11,
        "block_table": ints(2, 0, 1, 0).view(2, 2),
    }  # fmt: skip
    assert shim.flash_attn_varlen_func(**good).shape == (5, 4, 16)
    with pytest.raises(error, match=message):
        shim.flash_attn_varlen_func(**good | change)


NEW = torch.ones(2, 2, 2, 8)
COS = {"rotary_cos": torch.ones(6, 4), "rotary_sin": torch.ones(6, 4)}
PAGES = {"cache_batch_idx": None, "block_table": ints(0, 1, 2, 0).view(2, 2)}
CACHE = [
    ("q_rank", {"q": torch.ones(2, 4, 8)}, ValueError, r"q has shape \[2, 4, 8\]"),
    ("k_cache_rank", {"k_cache": torch.ones(3)}, ValueError, r"k_cache has shape \[3\]"),
    ("v_cache_heads", {"v_cache": torch.ones(3, 6, 1, 8)}, ValueError, r"v_cache has shape \[3, 6, 1, 8\]"),
    ("no_room", {"k_cache": NEW[:, :0], "v_cache": NEW[:, :0]}, ValueError, r"k_cache has shape \[2, 0, 2, 8\]"),
    ("index", {"cache_batch_idx": ints(0, 3)}, ValueError, r"cache_batch_idx\[1\] is 3.*from 0 to 2"),
    ("index_negative", {"cache_batch_idx": ints(0, -1)}, ValueError, r"cache_batch_idx\[1\] is -1"),
    ("index_float", {"cache_batch_idx": torch.ones(2)}, TypeError, "cache_batch_idx is torch.float32"),
    ("index_shape", {"cache_batch_idx": ints(0)}, ValueError, r"cache_batch_idx has shape \[1\].*\[2\]"),
    ("rows", {"cache_batch_idx": None, "k_cache": NEW[:1], "v_cache": NEW[:1]}, ValueError, "has 1 rows, q has 2"),
    ("length", {"cache_seqlens": ints(5, 1)}, ValueError, r"cache_seqlens\[0\] is 5.*from 0 to 4.*the cache holds 6"),
    ("length_negative", {"cache_seqlens": ints(-1, 2)}, ValueError, r"cache_seqlens\[0\] is -1"),
    ("length_shape", {"cache_seqlens": ints(1)}, ValueError, r"cache_seqlens has shape \[1\].*\[2\]"),
    ("length_float", {"cache_seqlens": 1.5}, TypeError, "cache_seqlens is 1.5"),
    ("length_string", {"cache_seqlens": "a"}, TypeError, "cache_seqlens is 'a'"),
    ("k_batch", {"k": NEW[:1], "v": NEW[:1]}, ValueError, r"k has shape \[1, 2, 2, 8\].*\[2, seqlen_new, 2, 8\]"),
    ("k_heads", {"k": NEW[:, :, :1], "v": NEW[:, :, :1]}, ValueError, r"k has shape \[2, 2, 1, 8\]"),
    ("v_length", {"v": NEW[:, :1]}, ValueError, r"v has shape \[2, 1, 2, 8\].*\[2, 2, 2, 8\]"),
    ("k_dtype", {"k": NEW.double()}, TypeError, "k is torch.float64"),
    ("k_device", {"k": NEW.to("meta")}, ValueError, "k is on meta"),
    ("only_sin", {"rotary_sin": torch.ones(6, 4)}, ValueError, "rotary_sin is given"),
    ("rotary_short", {k: v[:3] for k, v in COS.items()}, ValueError, r"cache_seqlens\[0\] is 2.*rotary_cos has 3 rows"),
    ("rotary_shapes", COS | {"rotary_sin": torch.ones(6, 3)}, ValueError, r"rotary_sin has shape \[6, 3\].*\[6, 4\]"),
    ("rotary_rank", {k: v[0] for k, v in COS.items()}, ValueError, r"rotary_cos has shape \[4\]"),
    ("rotary_wide", {k: torch.ones(6, 5) for k in COS}, ValueError, "rotary_cos rotates 10 dims"),
    ("rotary_int", {k: v.int() for k, v in COS.items()}, TypeError, "rotary_cos is torch.int32"),
    ("leftpad", {"cache_leftpad": ints(1, 9)}, ValueError, r"cache_leftpad\[1\] is 9.*from 0 to 5"),
    ("leftpad_negative", {"cache_leftpad": ints(-1, 1)}, ValueError, r"cache_leftpad\[0\] is -1"),
    ("page", PAGES | {"block_table": ints(9, 1, 2, 0).view(2, 2)}, ValueError, r"block_table\[0, 0\] is 9.*to 2"),
    ("table_rank", PAGES | {"block_table": ints(0, 1)}, ValueError, r"block_table has shape \[2\]"),
    ("table_batch", PAGES | {"block_table": ints(0, 1).view(1, 2)}, ValueError, r"block_table has shape \[1, 2\]"),
    ("table_float", PAGES | {"block_table": torch.zeros(2, 2)}, TypeError, "block_table is torch.float32"),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    "change, error, message", [case[1:] for case in CACHE], ids=[case[0] for case in CACHE]
)
def test_bad_cache_arguments_leave_the_cache_alone(change, error, message):
    good = {
        "q": torch.ones(2, 2, 4, 8), "k_cache": torch.zeros(3, 6, 2, 8), "v_cache": torch.zeros(3, 6, 2, 8),
        "k": NEW, "v": NEW, "cache_seqlens": ints(2, 3), "cache_batch_idx": ints(0, 1),
    }  # fmt: skip
    assert shim.flash_attn_with_kvcache(**good).shape == (2, 2, 4, 8)
    caches = {"k_cache": torch.zeros(3, 6, 2, 8), "v_cache": torch.zeros(3, 6, 2, 8)}
    with pytest.raises(error, match=message):
        shim.flash_attn_with_kvcache(**good | caches | change)
    assert not any(x.any() for x in caches.values())


def test_bad_padding_arguments():
    x, mask = torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    unpad, concatenated = bert_padding.unpad_input, bert_padding.unpad_input_for_concatenated_sequences
    take, put, pad = bert_padding.index_first_axis, bert_padding.index_put_first_axis, bert_padding.pad_input
    for error, message, function, *args in [
        (ValueError, r"attention_mask has shape \[2, 2\].*\[2, 3\]", unpad, x, mask[:, :2]),
        (ValueError, r"attention_mask has shape \[3\].*\[2, 3\]", unpad, x, mask[0]),
        (ValueError, "attention_mask.* holds 2: .* 0 or 1", unpad, x, 2 * mask),
        (ValueError, "unused_mask, holds 2: .* 0 or 1", unpad, x, mask, mask),
        (ValueError, r"unused_mask has shape \[2, 2\]", unpad, x, mask, mask[:, :2]),
        (ValueError, r"hidden_states has shape \[4\]", unpad, x[0, 0], mask),
        (TypeError, "attention_mask is None", unpad, x, None),
        (
            ValueError,
            r"attention_mask_in_length.sum\(-1\)\[0\] is 4.*to 3",
            concatenated,
            x,
            ints(3, 1, 0, 1, 0, 0).view(2, 3),
        ),
        (
            ValueError,
            r"attention_mask_in_length\[0, 1\] is -1",
            concatenated,
            x,
            ints(3, -1, 0, 1, 0, 0).view(2, 3),
        ),
        (TypeError, "attention_mask_in_length is torch.float32", concatenated, x, mask.float()),
        (ValueError, r"indices\[0\] is 5.*from 0 to 1", take, x, torch.tensor([5])),
        (ValueError, r"indices\[0\] is -1", take, x, torch.tensor([-1])),
        (TypeError, "indices is torch.float32", take, x, torch.tensor([1.5])),
        (ValueError, r"indices has shape \[1, 1\]", take, x, torch.tensor([[1]])),
        (ValueError, r"indices\[1\] is 9.*from 0 to 4", put, x, torch.tensor([0, 9]), 5),
        (ValueError, "first_axis_dim is -5", put, x, torch.tensor([0, 1]), -5),
        (ValueError, r"indices\[1\] is 9.*from 0 to 3", pad, x, torch.tensor([0, 9]), 2, 2),
        (ValueError, r"indices has shape \[1\].*\[2\]", pad, x, torch.tensor([0]), 2, 2),
        (ValueError, "batch is -2", pad, x, torch.tensor([0, 1]), -2, 2),
    ]:
        with pytest.raises(error, match=message):
            function(*args)


def test_unpad_and_pad():
    x = randn(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert (
        indices.tolist() == [0, 1, 2, 11, 12, 13, 14] and cu_seqlens.tolist() == [0, 3, 3, 7] and longest == 4
    )
    assert (
        used.tolist() == [2, 0, 4] and cu_seqlens.dtype == used.dtype == torch.int32 and type(longest) is int
    )
    padded = bert_padding.pad_input(packed, indices, 3, 5)
    kept = (mask + unused).bool()
    assert torch.equal(padded, x * kept[:, :, None, None])
    (padded * padded).sum().backward()
    torch.testing.assert_close(x.grad, 2 * padded.detach())
    assert torch.equal(bert_padding.index_first_axis(x.flatten(0, 1), indices), packed)
    assert len(bert_padding.unpad_input(x, mask.bool())) == 5


def test_unpad_concatenated():
    x = randn(2, 6, 4)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11] and cu_seqlens.tolist() == [0, 2, 5, 11]
    assert longest == 6 and torch.equal(packed, x.flatten(0, 1)[indices])


@pytest.fixture
def installed():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("a real flash-attn is installed")
    assert shim.install() and shim.install()  # twice is as once
    yield
    shim.uninstall()
    assert importlib.util.find_spec("flash_attn") is None


def test_install(installed):
    import flash_attn
    from flash_attn import flash_attn_varlen_func
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_func

    assert flash_attn.__version__.startswith("2.8.") and flash_attn_varlen_func is shim.flash_attn_varlen_func
    assert flash_attn_func is shim.flash_attn_func and unpad_input is bert_padding.unpad_input
    assert index_first_axis is bert_padding.index_first_axis and pad_input is bert_padding.pad_input
    for _ in range(2):  # loaded or not
        assert importlib.util.find_spec("flash_attn").gapless_shim
        assert flash_attn_unusable(torch.device("cuda")) == ["flash-attn is not installed"]
        sys.modules.pop("flash_attn", None)
    assert (
        importlib.metadata.version("flash-attn")
        == importlib.metadata.version("flash_attn")
        == flash_attn.__version__
    )
    assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.cute")


def test_a_real_installation_is_never_shadowed(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert shim.install() is False
    assert importlib.import_module("flash_attn").real
    shim.uninstall()
    assert importlib.import_module("flash_attn").real
    del sys.modules["flash_attn"]


def test_a_real_installation_wins_later(installed, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("flash_attn").real
    del sys.modules["flash_attn"]


MODEL = """
    import torch
    from flash_attn import flash_attn_varlen_func
    from flash_attn.bert_padding import pad_input, unpad_input

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)

        def forward(self, x, mask):
            packed, indices, cu_seqlens, longest, _ = unpad_input(self.qkv(x), mask)
            q, k, v = packed.view(-1, 3, 2, 8).unbind(1)
            out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
            return pad_input(out.flatten(1), indices, *mask.shape)
"""


def test_model_code_that_requires_flash_attn(installed, tmp_path, monkeypatch):
    """A model file in the manner of many on the hub trains on a CPU."""
    (tmp_path / "modeling_needs_flash.py").write_text(textwrap.dedent(MODEL))
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("modeling_needs_flash").Attention()
    x, mask = randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    out = model(x, mask)
    q, k, v = model.qkv(x).view(2, 5, 3, 2, 8).transpose(1, 3).unbind(2)
    expected = (
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    )
    torch.testing.assert_close(out, expected * mask[:, :, None])
    out.sum().backward()
    assert model.qkv.weight.grad.any()
    del sys.modules["modeling_needs_flash"]


def test_transformers_sees_flash_attn(tmp_path):
    """It finds the package and its version, but refuses ``flash_attention_2`` on any CPU: "gapless" is for that."""
    pytest.importorskip("transformers")
    script = """
        from gapless.integrations import flash_attn
        assert flash_attn.install()
        import torch, transformers
        from transformers.utils import is_flash_attn_greater_or_equal
        assert is_flash_attn_greater_or_equal("2.8.0")
        config = transformers.LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                          num_attention_heads=2)
        if not torch.cuda.is_available():
            try:
                transformers.LlamaModel._from_config(config, attn_implementation="flash_attention_2")
            except ImportError as error:
                assert "not available on CPU" in str(error), error
            else:
                raise AssertionError("transformers runs flash_attention_2 on a CPU now: say so in the docs")
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr


def test_imports_stay_light():
    script = (
        "import sys, gapless, gapless.integrations.flash_attn; "
        "assert not {'triton', 'transformers', 'flash_attn'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
