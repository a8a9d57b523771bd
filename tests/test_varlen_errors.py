# SPDX-License-Identifier: Apache-2.0
"""Bad input: Python names the argument and its value; the raw operators refuse what would touch foreign memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gapless
from gapless import _native
from gapless.testing import make_batch, scatter_pages
from gapless.testing.paging import ABSURD_PAGE

# The public functions.


def call(change: dict[str, Any]) -> Any:
    """A good call of 8 tokens in 2 sequences, 4 heads over 2, dims 16 and 12, with some arguments changed."""
    batch = make_batch([5, 3], [5, 3], 4, 2, 16, 12)
    arguments: dict[str, Any] = {"q": batch.q, "k": batch.k, "v": batch.v, "cu_seqlens_q": batch.cu_seqlens_q}
    if change.pop("pages", False):
        pages = scatter_pages(batch.k, batch.v, [5, 3], 4)._asdict()
        arguments |= pages
    return gapless.varlen_attention(**(arguments | change))


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def table(*pages: int) -> torch.Tensor:
    return ints(*pages).view(2, len(pages) // 2)


C64 = torch.complex64
plan_of = gapless.VarlenPlan.make
GOOD_PLAN = plan_of(ints(0, 5, 8))
NO_KEYS = {"k": torch.ones(4, 0, 2, 16), "v": torch.ones(4, 0, 2, 12)}
LEAF = torch.ones(8, 4, 16, requires_grad=True)
BAD = [
    # what is wrong, the arguments, the exception, what the message has to contain
    ("q_dtype_int", {"q": torch.ones(8, 4, 16, dtype=torch.int32)}, TypeError, ["int32"]),
    ("all_int", dict.fromkeys("qkv", torch.ones(8, 4, 16, dtype=torch.int64)), TypeError, ["q is", "int64"]),
    ("all_complex", dict.fromkeys("qkv", torch.ones(8, 4, 16, dtype=C64)), TypeError, ["q is", "complex64"]),
    ("k_dtype", {"k": torch.ones(8, 2, 16, dtype=torch.float16)}, TypeError, ["k is", "float16", "float32"]),
    ("v_dtype", {"v": torch.ones(8, 2, 12, dtype=torch.float64)}, TypeError, ["v is", "float64", "float32"]),
    ("q_rank", {"q": torch.ones(8, 64)}, ValueError, ["q has shape", "[8, 64]", "[tokens, heads, dim]"]),
    ("k_rank", {"k": torch.ones(1, 8, 2, 16)}, ValueError, ["k has shape", "[1, 8, 2, 16]"]),
    ("v_rank", {"v": torch.ones(8, 12)}, ValueError, ["v has shape", "[8, 12]"]),
    ("k_v_tokens", {"v": torch.ones(7, 2, 12)}, ValueError, ["[8, 2, 16]", "[7, 2, 12]"]),
    ("k_v_heads", {"v": torch.ones(8, 1, 12)}, ValueError, ["[8, 2, 16]", "[8, 1, 12]"]),
    ("k_dim", {"k": torch.ones(8, 2, 15)}, ValueError, ["k has head dim 15", "16"]),
    ("heads_do_not_divide", {"q": torch.ones(8, 3, 16)}, ValueError, ["q has 3 heads", "k has 2"]),
    ("fewer_heads", {"q": torch.ones(8, 1, 16)}, ValueError, ["q has 1 heads", "k has 2"]),
    ("no_heads", {"q": torch.ones(8, 0, 16)}, ValueError, ["q has 0 heads"]),
    ("no_kv_heads", {"k": torch.ones(8, 0, 16), "v": torch.ones(8, 0, 12)}, ValueError, ["k has 0"]),
    ("dim_0", {"q": torch.ones(8, 4, 0), "k": torch.ones(8, 2, 0)}, ValueError, ["0 (q, k)", "256"]),
    ("dim_257", {"q": torch.ones(8, 4, 257), "k": torch.ones(8, 2, 257)}, ValueError, ["257 (q, k)", "256"]),
    ("dim_v_257", {"v": torch.ones(8, 2, 257)}, ValueError, ["257 (v)", "256"]),
    ("cu_float", {"cu_seqlens_q": torch.tensor([0.0, 5.0, 8.0])}, TypeError, ["cu_seqlens_q", "float32", "int32"]),
    ("cu_bool", {"cu_seqlens_q": torch.tensor([False, True])}, TypeError, ["cu_seqlens_q", "bool"]),
    ("cu_rank_2", {"cu_seqlens_q": ints(0, 5, 8)[None]}, ValueError, ["cu_seqlens_q", "[1, 3]", "[batch + 1]"]),
    ("cu_rank_0", {"cu_seqlens_q": torch.tensor(8)}, ValueError, ["cu_seqlens_q", "[batch + 1]"]),
    ("cu_no_entry", {"cu_seqlens_q": ints()}, ValueError, ["cu_seqlens_q", "[0]"]),
    ("cu_start", {"cu_seqlens_q": ints(1, 5, 8)}, ValueError, ["cu_seqlens_q", "1", "0"]),
    ("cu_negative", {"cu_seqlens_q": ints(-2, 5, 8)}, ValueError, ["cu_seqlens_q", "-2"]),
    ("cu_decreases", {"cu_seqlens_q": ints(0, 7, 5, 8)}, ValueError, ["cu_seqlens_q", "7", "5"]),
    ("cu_too_short", {"cu_seqlens_q": ints(0, 5, 7)}, ValueError, ["cu_seqlens_q", "7", "8"]),
    ("cu_too_long", {"cu_seqlens_q": ints(0, 5, 9)}, ValueError, ["cu_seqlens_q", "9", "8"]),
    ("cu_beyond_int32", {"cu_seqlens_q": ints(0, 2**33, dtype=torch.int64)}, ValueError, ["cu_seqlens_q", str(2**33)]),
    ("cu_k_float", {"cu_seqlens_k": torch.tensor([0.0, 5.0, 8.0])}, TypeError, ["cu_seqlens_k", "float32"]),
    ("cu_k_start", {"cu_seqlens_k": ints(3, 5, 8)}, ValueError, ["cu_seqlens_k", "3"]),
    ("cu_k_decreases", {"cu_seqlens_k": ints(0, 9, 8)}, ValueError, ["cu_seqlens_k", "9", "8"]),
    ("cu_k_end", {"cu_seqlens_k": ints(0, 5, 6)}, ValueError, ["cu_seqlens_k", "6", "8"]),
    ("cu_k_batch", {"cu_seqlens_k": ints(0, 8)}, ValueError, ["cu_seqlens_k has 2", "3"]),
    ("cu_k_missing", {"k": torch.ones(9, 2, 16), "v": torch.ones(9, 2, 12)}, ValueError, ["k has 9", "cu_seqlens_k"]),
    ("window_negative", {"window": (-2, 0)}, ValueError, ["window", "(-2, 0)"]),
    ("window_right", {"window": (0, -7)}, ValueError, ["window", "(0, -7)"]),
    ("window_float", {"window": (1.5, 0)}, ValueError, ["window", "1.5"]),
    ("window_length", {"window": (1, 2, 3)}, ValueError, ["window", "(1, 2, 3)"]),
    ("softcap_negative", {"softcap": -1.0}, ValueError, ["softcap", "-1.0"]),
    ("softcap_nan", {"softcap": float("nan")}, ValueError, ["softcap", "nan"]),
    ("softcap_inf", {"softcap": float("inf")}, ValueError, ["softcap", "inf"]),
    ("slopes_dtype", {"alibi_slopes": torch.ones(4).double()}, TypeError, ["alibi_slopes", "float64", "float32"]),
    ("slopes_shape", {"alibi_slopes": torch.ones(3)}, ValueError, ["alibi_slopes", "[3]", "[4]", "[2, 4]"]),
    ("slopes_batch", {"alibi_slopes": torch.ones(3, 4)}, ValueError, ["alibi_slopes", "[3, 4]", "[2, 4]"]),
    ("slopes_grad", {"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, ["alibi_slopes", "gradient"]),
    ("sinks_dtype", {"sinks": torch.ones(4, dtype=torch.int32)}, TypeError, ["sinks", "int32"]),
    ("sinks_shape", {"sinks": torch.ones(2)}, ValueError, ["sinks", "[2]", "[4]"]),
    ("seqused_dtype", {"seqused_k": ints(5, 3, dtype=torch.int64)}, TypeError, ["seqused_k", "int64", "int32"]),
    ("seqused_shape", {"seqused_k": ints(5, 3, 1)}, ValueError, ["seqused_k", "[3]", "[2]"]),
    ("seqused_grad", {"seqused_k": ints(5, 3), "q": LEAF}, ValueError, ["seqused_k"]),
    ("seqused_too_long", {"seqused_k": ints(6, 3)}, ValueError, ["seqused_k[0] is 6", "from 0 to 5"]),
    ("seqused_negative", {"seqused_k": ints(5, -1)}, ValueError, ["seqused_k[1] is -1", "from 0 to 3"]),
    ("pages_without_seqused", {"pages": True, "seqused_k": None}, ValueError, ["block_table", "seqused_k"]),
    ("pages_rank", {"pages": True, "k": torch.ones(8, 2, 16)}, ValueError, ["k has shape", "[8, 2, 16]", "page_size"]),
    ("pages_grad", {"pages": True, "q": LEAF}, ValueError, ["block_table"]),
    ("table_dtype", {"pages": True, "block_table": torch.zeros(2, 2)}, TypeError, ["block_table", "float32", "int32"]),
    ("table_shape", {"pages": True, "block_table": torch.zeros(3, 2).int()}, ValueError, ["block_table", "[3, 2]"]),
    ("table_rank", {"pages": True, "block_table": ints(0, 1)}, ValueError, ["block_table", "[2]"]),
    ("page_out_of_range", {"pages": True, "block_table": table(0, 1, 2, 99)}, None, []),  # 99 is not used
    ("page_too_large", {"pages": True, "block_table": table(0, 99, 2, 3)}, ValueError, ["[0, 1] is 99", "0 to 4"]),
    ("page_negative", {"pages": True, "block_table": table(0, 1, -1, 3)}, ValueError, ["block_table[1, 0] is -1"]),
    ("pages_too_few", {"pages": True, "seqused_k": ints(13, 3)}, ValueError, ["seqused_k[0] is 13", "from 0 to 12"]),
    ("table_empty", {"pages": True, "block_table": table()}, ValueError, ["block_table", "[2, 0]", "[2, 1]"]),
    ("table_scalar", {"pages": True, "block_table": torch.tensor(1).int()}, ValueError, ["block_table", "[]"]),
    ("pages_of_0", {"pages": True, **NO_KEYS}, ValueError, ["k has shape [4, 0, 2, 16]"]),
    ("window_none", {"window": None}, ValueError, ["window is None", "(left, right)"]),
    ("window_string", {"window": ("a", 0)}, ValueError, ["window", "'a'"]),
    ("softcap_string", {"softcap": "1"}, TypeError, ["softcap is '1'", "number"]),
    ("softcap_tensor", {"softcap": torch.tensor(1.0)}, TypeError, ["softcap is tensor(1.)", "number"]),
    ("scale_string", {"scale": "x"}, TypeError, ["scale is 'x'", "number"]),
    ("scale_nan", {"scale": float("nan")}, ValueError, ["scale is nan", "finite"]),
    ("scale_inf", {"scale": float("-inf")}, ValueError, ["scale is -inf", "finite"]),
    ("sparse", {"q": torch.ones(8, 4, 16).to_sparse()}, TypeError, ["q is of layout", "sparse", "strided"]),
    ("cu_device", {"cu_seqlens_q": ints(0, 5, 8).to("meta")}, ValueError, ["cu_seqlens_q is on meta", "cpu"]),
    ("cu_k_device", {"cu_seqlens_k": ints(0, 5, 8).to("meta")}, ValueError, ["cu_seqlens_k is on meta", "cpu"]),
    ("plan_type", {"plan": (1, 2)}, TypeError, ["plan is (1, 2)", "VarlenPlan"]),
    ("plan_device", {"plan": GOOD_PLAN.to("meta")}, ValueError, ["plan is on meta", "cpu"]),
    ("plan_queries", {"plan": plan_of(ints(0, 5, 9))}, ValueError, ["plan.cu_seqlens_q ends at 9", "8"]),
    ("plan_keys", {"plan": plan_of(ints(0, 5, 8), ints(0, 5, 7))}, ValueError, ["plan.cu_seqlens_k ends at 7", "8"]),
    ("plan_and_cu_float", {"plan": GOOD_PLAN, "cu_seqlens_q": torch.ones(3)}, TypeError, ["cu_seqlens_q", "float32"]),
    ("impl_unknown", {"impl": "cuda"}, ValueError, ["impl", "'cuda'", "'native'"]),
    ("impl_flash_attn", {"impl": "flash_attn"}, ValueError, ["impl='flash_attn'", "flash-attn"]),
    ("plan_of_another_batch", {"plan": plan_of(ints(0, 8))}, ValueError, ["plan is for 1", "2"]),
]  # fmt: skip


@pytest.mark.parametrize("change, error, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_arguments(change: dict[str, Any], error: type | None, words: list[str]):
    if error is None:
        call(dict(change))
        return
    with pytest.raises(error) as caught:
        call(dict(change))
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


def test_the_good_call_is_good():
    assert call({}).shape == (8, 4, 12)
    assert call({"pages": True}).shape == (8, 4, 12)


@pytest.mark.parametrize("name", ["k", "v", "sinks", "alibi_slopes"])
def test_devices_have_to_agree(name: str):
    shape = {"k": (8, 2, 16), "v": (8, 2, 12), "sinks": (4,), "alibi_slopes": (4,)}[name]
    with pytest.raises(ValueError, match=rf"{name} is on meta, q is on cpu"):
        call({name: torch.ones(shape, device="meta")})


def test_devices_without_a_kernel_are_refused():
    q = torch.ones(8, 4, 16, device="meta")
    with pytest.raises(
        ValueError, match="impl='native' cannot take these inputs: it has no kernel for meta tensors"
    ):
        gapless.varlen_attention(q, q, q, ints(0, 8), impl="native")


@pytest.mark.parametrize("name", ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sinks"])
def test_tensors_are_needed(name: str):
    with pytest.raises(TypeError, match=rf"^{name} is \[1, 2\], of type list: it has to be a tensor"):
        call({name: [1, 2]})
    with pytest.raises(TypeError, match=rf"^{name} is array.*of type ndarray: it has to be a tensor"):
        call({name: torch.ones(2).numpy()})


@pytest.mark.parametrize("name", ["seqused_k", "block_table"])
def test_tensors_are_needed_with_pages(name: str):
    with pytest.raises(TypeError, match=rf"^{name} is \[1, 2\], of type list: it has to be a tensor"):
        call({"pages": True, name: [1, 2]})


VALUES = ["cu_start", "cu_decreases", "cu_too_long", "cu_k_end", "cu_k_batch", "cu_k_missing", "seqused_too_long",
          "seqused_negative", "page_too_large", "page_negative", "pages_too_few", "plan_of_another_batch",
          "plan_queries", "plan_keys"]  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_the_reference_refuses_the_same(name: str):
    """It reads with slices, which forgive."""
    change, error, words = next(case[1:] for case in BAD if case[0] == name)
    with pytest.raises(error) as caught:
        call({**change, "impl": "reference"})
    for word in words:
        assert word in str(caught.value)


def test_a_wide_window_is_no_limit():
    assert torch.equal(call({"window": (2**40, 2**31)}), call({}))
    assert torch.equal(call({"window": [2**31 - 1, 0]}), call({"causal": True}))


def test_a_plan_that_does_not_fit_the_tensors_is_refused():
    """Same number of sequences, other lengths; with a gradient too."""
    for cu in (ints(0, 5, 9), ints(0, 9, 9), ints(0, 2**30, 2**31 - 1)):
        for q in (LEAF.detach(), LEAF):
            with pytest.raises(ValueError, match=r"plan\.cu_seqlens_q ends at"):
                call({"q": q, "plan": plan_of(cu, block_q=2**30, block_k=2**30)})


def test_slopes_that_want_a_gradient_serve_inference():
    slopes = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(call({"alibi_slopes": slopes}), call({"alibi_slopes": slopes.detach()}))


def test_values_of_fake_tensors_are_not_read():
    from torch._subclasses import FakeTensorMode

    batch = make_batch([5, 3])
    pages = scatter_pages(batch.k, batch.v, [5, 3], 4)
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q)
    with FakeTensorMode() as mode:
        q, k, v, table, used, cu = map(mode.from_tensor, (batch.q, *pages, batch.cu_seqlens_q))
        tensors = map(mode.from_tensor, plan.tensors)
        plan = gapless.VarlenPlan(*tensors, plan.block_q, plan.block_k)
        out = gapless.varlen_attention(q, k, v, cu, seqused_k=used, block_table=table, plan=plan)
    assert out.shape == batch.q.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in torch.func
def test_forward_mode_derivatives():
    """Only the reference has them; the others say so."""
    from torch.autograd import forward_ad

    batch = make_batch([5, 3])
    tangent = torch.ones_like(batch.q)

    def attention(q: torch.Tensor, **options: Any) -> torch.Tensor:
        return gapless.varlen_attention(q, batch.k, batch.v, batch.cu_seqlens_q, causal=True, **options)

    with forward_ad.dual_level():
        q = forward_ad.make_dual(batch.q, tangent)
        got = forward_ad.unpack_dual(attention(q)).tangent
        with pytest.raises(
            ValueError, match="impl='native' cannot take these inputs: it has no forward-mode"
        ):
            attention(q, impl="native")
        with pytest.raises(ValueError, match="seqused_k is for inference"):
            attention(q, seqused_k=ints(5, 3))
    _, want = torch.func.jvp(attention, (batch.q,), (tangent,))
    torch.testing.assert_close(got, want)
    leaf = batch.q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(attention(leaf), leaf, batch.dout)
    torch.testing.assert_close((got * batch.dout).sum(), (dq * tangent).sum())


OUT, LSE = torch.ones(3, 2, 4), torch.ones(2, 3)
PARTS = {
    "nothing": ([], [], ValueError, ["0 outs"]),
    "no_lse": ([OUT], [], ValueError, ["1 outs", "0 lses"]),
    "lse_shape": ([OUT], [torch.ones(3, 2)], ValueError, ["lses[0]", "[3, 2]"]),
    "out_shapes": ([OUT, torch.ones(3, 2, 5)], [LSE] * 2, ValueError, ["outs[1]", "[3, 2, 5]"]),
    "rank": ([torch.ones(3)], [torch.ones(3)], ValueError, ["outs[0] has shape [3]", "[tokens, heads, dim]"]),
    "no_list": (OUT, [LSE], TypeError, ["outs is of type Tensor", "list"]),
    "none": ([OUT], None, TypeError, ["lses is of type NoneType", "list"]),
    "no_tensors": ([OUT, 1], [LSE, LSE], TypeError, ["outs[1] is 1", "tensor"]),
    "dtypes": ([OUT, OUT.half()], [LSE] * 2, TypeError, ["outs[1] is torch.float16"]),
    "integers": ([OUT.int()], [LSE], TypeError, ["outs[0] is torch.int32"]),
    "lse_dtype": ([OUT, OUT], [LSE, LSE.half()], TypeError, ["lses[1] is torch.float16", "float32"]),
    "device": ([OUT, OUT.to("meta")], [LSE] * 2, ValueError, ["outs[1] is on meta", "cpu"]),
    "lse_device": ([OUT], [LSE.to("meta")], ValueError, ["lses[0] on meta", "cpu"]),
}


@pytest.mark.parametrize("outs, lses, error, words", PARTS.values(), ids=PARTS)
def test_bad_parts_to_merge(outs: Any, lses: Any, error: type, words: list[str]):
    with pytest.raises(error) as caught:
        gapless.merge_attention(outs, lses)
    for word in words:
        assert word in str(caught.value)


def nested(*lengths: int, heads: int = 2, dim: int = 8, device: str = "cpu") -> torch.Tensor:
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(
        torch.ones(sum(lengths), heads, dim, device=device), offsets=offsets
    )


NESTED = {
    "no_tensor": (lambda: {"nt_q": [1]}, TypeError, ["nt_q is [1], of type list", "jagged"]),
    "dense": (lambda: {"nt_k": torch.ones(2, 3, 2, 8)}, TypeError, ["nt_k is dense", "jagged"]),
    "batch": (lambda: {"nt_k": nested(1, 2, 2)}, ValueError, ["nt_k has 3 sequences, nt_q has 2"]),
    "lengths": (lambda: {"nt_v": nested(1, 4)}, ValueError, ["[3, 2]", "[1, 4]"]),
    "device": (lambda: {"nt_v": nested(3, 2, device="meta")}, ValueError, ["nt_v is on meta"]),
    "heads": (lambda: {"nt_q": nested(3, 2, heads=3)}, ValueError, ["q has 3 heads, k has 2"]),
    "window": (lambda: {"window": (-3, 0)}, ValueError, ["window is (-3, 0)"]),
    "plan": (lambda: {"plan": gapless.VarlenPlan.make(ints(0, 5))}, ValueError, ["plan is for 1"]),
}


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning", "ignore:.*is_fx_tracing.*")
@pytest.mark.parametrize("change, error, words", NESTED.values(), ids=NESTED)
def test_bad_nested_arguments(change: Callable[[], dict], error: type, words: list[str]):
    same = nested(3, 2)
    with pytest.raises(error) as caught:
        gapless.nested_attention(**{"nt_q": same, "nt_k": same, "nt_v": same} | change())
    for word in words:
        assert word in str(caught.value)


TORCHS = [
    ("query_rank", {"query": torch.ones(4)}, ValueError, ["query has shape [4]", "3 dims"]),
    ("key_rank", {"key": torch.ones(3)}, ValueError, ["key has shape [3]", "3 dims"]),
    ("key_is_no_page", {"block_table": table(0, 1, 2, 3)}, ValueError, ["key has shape [8, 2, 16]", "4 dims"]),
    ("query_none", {"query": None}, TypeError, ["query is None", "tensor"]),
    ("cu_list", {"cu_seq_q": [0, 5, 8]}, TypeError, ["cu_seq_q is [0, 5, 8]", "tensor"]),
    ("heads", {"enable_gqa": False}, ValueError, ["query has 4 heads, key has 2"]),
    ("window_of_1", {"window_size": (1,)}, ValueError, ["window_size is (1,)"]),
    ("window_of_3", {"window_size": (1, 2, 3)}, ValueError, ["window_size is (1, 2, 3)"]),
    ("window_none", {"window_size": None}, ValueError, ["window_size is None"]),
    ("used_float", {"seqused_k": torch.ones(2)}, TypeError, ["seqused_k is torch.float32", "int32"]),
    ("used_bool", {"seqused_k": torch.ones(2).bool()}, TypeError, ["seqused_k is torch.bool", "int32"]),
    ("used_long", {"seqused_k": ints(2**32 + 1, 3, dtype=torch.int64)}, ValueError, ["seqused_k[0] is", "from 0 to 5"]),
    ("used_shape", {"seqused_k": ints(1, 2)[None]}, ValueError, ["seqused_k has shape [1, 2]", "[batch]"]),
    ("aux", {"return_aux": True}, TypeError, ["return_aux is True", "AuxRequest"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, error, words", [case[1:] for case in TORCHS], ids=[case[0] for case in TORCHS]
)
def test_bad_arguments_of_torchs_signature(change: dict[str, Any], error: type, words: list[str]):
    batch = make_batch([5, 3], [5, 3], 4, 2, 16, 12)
    cu = batch.cu_seqlens_q
    good = {
        "query": batch.q,
        "key": batch.k,
        "value": batch.v,
        "cu_seq_q": cu,
        "cu_seq_k": cu,
        "max_q": 5,
        "max_k": 5,
    }
    assert gapless.varlen_attn(**good, enable_gqa=True).shape == (8, 4, 12)
    with pytest.raises(error) as caught:
        gapless.varlen_attn(**good | {"enable_gqa": True} | change)
    for word in words:
        assert word in str(caught.value)


# The raw operators: whatever they are given, they raise a RuntimeError and the process lives on.

TILES = ((0, 0, 5), (1, 0, 3))


def raw(direction: str, change: Callable[[dict], Any] | None = None) -> Any:
    """A good raw call, its arguments changed in place by ``change``."""
    batch = make_batch([5, 3], [5, 3], 4, 2, 16, 12)
    given: dict[str, Any] = {
        "q": batch.q, "k": batch.k, "v": batch.v,
        "plan": [ints(0, 5, 8), ints(0, 5, 8), torch.tensor(TILES).int(), torch.tensor(TILES).int()],
        "seqused_k": None, "block_table": None, "alibi_slopes": None, "sinks": None,
        "score": [0.25, 0.0], "window": [-1, -1],
    }  # fmt: skip
    if direction == "paged":
        pages = scatter_pages(batch.k, batch.v, [5, 3], 4)
        given |= pages._asdict()
    if direction == "bwd":
        out, lse = _native.varlen_attention_fwd(*given.values())
        del given["seqused_k"], given["block_table"]
        given = {"dout": batch.dout, "dlse": batch.dlse, **given, "out": out, "lse": lse}
        order = [
            "dout",
            "dlse",
            "q",
            "k",
            "v",
            "out",
            "lse",
            "plan",
            "alibi_slopes",
            "sinks",
            "score",
            "window",
        ]
        given = {name: given[name] for name in order}
    if change is not None:
        change(given)
    op = _native.varlen_attention_bwd if direction == "bwd" else _native.varlen_attention_fwd
    return op(*given.values())


def put(name: str, value: Any) -> Callable[[dict], None]:
    return lambda given: given.__setitem__(name, value)


def plan(index: int, value: Any) -> Callable[[dict], None]:
    def change(given: dict) -> None:
        given["plan"] = [value if i == index else t for i, t in enumerate(given["plan"])]

    return change


def tiles(*rows: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, 3)


BOTH = {
    "q_rank": put("q", torch.ones(8, 64)),
    "k_rank": put("k", torch.ones(8, 32)),
    "v_rank": put("v", torch.ones(8, 2, 12, 1)),
    "q_integers": put("q", torch.ones(8, 4, 16, dtype=torch.int32)),
    "k_dtype": put("k", torch.ones(8, 2, 16).double()),
    "v_dtype": put("v", torch.ones(8, 2, 12).half()),
    "k_tokens": put("k", torch.ones(4, 2, 16)),
    "v_tokens": put("v", torch.ones(4, 2, 12)),
    "k_dim": put("k", torch.ones(8, 2, 8)),
    "heads_do_not_divide": put("q", torch.ones(8, 3, 16)),
    "no_kv_heads": lambda given: given.update(k=torch.ones(8, 0, 16), v=torch.ones(8, 0, 12)),
    "dim_257": lambda given: given.update(q=torch.ones(8, 4, 257), k=torch.ones(8, 2, 257)),
    "dim_0": lambda given: given.update(q=torch.ones(8, 4, 0), k=torch.ones(8, 2, 0)),
    "plan_empty": put("plan", []),
    "plan_of_3": lambda given: given.update(plan=given["plan"][:3]),
    "plan_of_5": lambda given: given.update(plan=[*given["plan"], given["plan"][0]]),
    "cu_q_int64": plan(0, ints(0, 5, 8, dtype=torch.int64)),
    "cu_q_rank": plan(0, ints(0, 5, 8)[None]),
    "cu_q_no_entry": plan(0, ints()),
    "cu_q_start": plan(0, ints(1, 5, 8)),
    "cu_q_negative": plan(0, ints(-5, 5, 8)),
    "cu_q_decreases": plan(0, ints(0, 9, 8)),
    "cu_q_beyond_the_tokens": plan(0, ints(0, 5, 9)),
    "cu_q_far_beyond": plan(0, ints(0, 5, 2**31 - 1)),
    "cu_k_batch": plan(1, ints(0, 8)),
    "cu_k_decreases": plan(1, ints(0, 9, 8)),
    "cu_k_negative": plan(1, ints(-(2**31), 5, 8)),
    "cu_k_beyond_the_tokens": plan(1, ints(0, 5, 9)),
    "cu_k_float": plan(1, torch.tensor([0.0, 5.0, 8.0])),
    "tiles_rank": plan(2, ints(0, 0, 5)),
    "tiles_columns": plan(2, torch.zeros(2, 2, dtype=torch.int32)),
    "tiles_int64": plan(3, torch.zeros(2, 3, dtype=torch.int64)),
    "score_of_1": put("score", [0.25]),
    "score_of_3": put("score", [0.25, 0.0, 1.0]),
    "window_of_1": put("window", [-1]),
    "window_of_3": put("window", [-1, -1, 0]),
    "window_negative": put("window", [-3, 0]),
    "window_beyond_int32": put("window", [2**40, 0]),
    "slopes_shape": put("alibi_slopes", torch.ones(3)),
    "slopes_batch": put("alibi_slopes", torch.ones(1, 4)),
    "slopes_dtype": put("alibi_slopes", torch.ones(4).half()),
    "slopes_rank": put("alibi_slopes", torch.ones(1, 2, 4)),
    "sinks_shape": put("sinks", torch.ones(3)),
    "sinks_rank": put("sinks", torch.ones(4, 1)),
    "sinks_dtype": put("sinks", torch.ones(4, dtype=torch.int32)),
}
BAD_TILES = {
    "sequence_beyond_the_batch": tiles((2, 0, 3)),
    "sequence_below_-1": tiles((-2, 0, 3)),
    "begin_negative": tiles((0, -1, 3)),
    "end_beyond_the_sequence": tiles((0, 0, 6)),
    "end_before_begin": tiles((0, 4, 2)),
    "huge": tiles((0, 0, 2**31 - 1)),
    "huge_sequence": tiles((2**31 - 1, 0, 1)),
}
BACKWARD = {
    "dout_shape": put("dout", torch.ones(8, 4, 11)),
    "dout_tokens": put("dout", torch.ones(7, 4, 12)),
    "dout_rank": put("dout", torch.ones(8, 48)),
    "dout_dtype": put("dout", torch.ones(8, 4, 12).half()),
    "dlse_shape": put("dlse", torch.ones(8, 4)),
    "dlse_dtype": put("dlse", torch.ones(4, 8).double()),
    "out_shape": put("out", torch.ones(8, 2, 12)),
    "out_dtype": put("out", torch.ones(8, 4, 12).half()),
    "lse_shape": put("lse", torch.ones(4, 7)),
    "lse_dtype": put("lse", torch.ones(4, 8).double()),
}
PAGED = {
    "seqused_shape": put("seqused_k", ints(5)),
    "seqused_dtype": put("seqused_k", ints(5, 3, dtype=torch.int64)),
    "seqused_missing": put("seqused_k", None),
    "seqused_negative": put("seqused_k", ints(-1, 3)),
    "seqused_beyond_the_table": put("seqused_k", ints(2**31 - 1, 3)),
    "page_absurd": put("block_table", ints(0, 1, ABSURD_PAGE, 0).view(2, 2)),
    "page_negative": put("block_table", ints(0, 1, -7, 0).view(2, 2)),
    "table_rank": put("block_table", ints(0, 1)),
    "table_batch": put("block_table", ints(0, 1).view(1, 2)),
    "table_dtype": put("block_table", torch.zeros(2, 2)),
    "table_narrow": put("block_table", torch.zeros(2, 0, dtype=torch.int32)),
    "keys_not_paged": put("k", torch.ones(8, 2, 16)),
    "pages_of_0": lambda given: given.update(k=torch.ones(4, 0, 2, 16), v=torch.ones(4, 0, 2, 12)),
    "values_have_fewer_pages": put("v", torch.ones(1, 4, 2, 12)),
}
RAW = [
    *((direction, name, change) for direction in ("fwd", "bwd") for name, change in BOTH.items()),
    *(("fwd", f"query_tile_{name}", plan(2, rows)) for name, rows in BAD_TILES.items()),
    *(("bwd", f"key_tile_{name}", plan(3, rows)) for name, rows in BAD_TILES.items()),
    *(("bwd", name, change) for name, change in BACKWARD.items()),
    *(("paged", name, change) for name, change in PAGED.items()),
    ("fwd", "seqused_beyond_the_keys", put("seqused_k", ints(6, 3))),
    ("fwd", "seqused_far_beyond", put("seqused_k", ints(5, 2**31 - 1))),
]


@pytest.mark.parametrize(
    "direction, change", [(d, c) for d, _, c in RAW], ids=[f"{d}-{n}" for d, n, _ in RAW]
)
def test_raw_operators_refuse(direction: str, change: Callable[[dict], Any]):
    with pytest.raises(RuntimeError):
        raw(direction, change)


@pytest.mark.parametrize("direction", ["fwd", "bwd", "paged"])
def test_the_good_raw_call_is_good(direction: str):
    assert all(x.isfinite().all() for x in raw(direction))


def test_unused_tiles_are_skipped():
    want = raw("fwd")
    padded = tiles(*TILES, (-1, -1, -1), (-1, 7, 7))
    got = raw("fwd", plan(2, padded))
    assert torch.equal(got[0], want[0])


@given(st.data(), st.sampled_from(["fwd", "bwd", "paged"]))
def test_raw_operators_survive_any_integers(data: st.DataObject, direction: str):
    """Random integers in the plan, the table and the lengths: a result or a RuntimeError, never a crash."""
    number = st.one_of(st.integers(-2, 10), st.sampled_from([2**31 - 1, -(2**31), 2**30, ABSURD_PAGE]))

    def change(given: dict) -> None:
        lengths = st.lists(number, min_size=1, max_size=4).map(lambda x: ints(0, *x))
        rows = st.lists(st.tuples(number, number, number), max_size=3).map(lambda x: tiles(*x))
        for index, strategy in enumerate([lengths, lengths, rows, rows]):
            if data.draw(st.booleans()):
                plan(index, data.draw(strategy))(given)
        if direction == "paged":
            pair = st.lists(number, min_size=2, max_size=2)
            given["seqused_k"] = ints(*data.draw(pair))
            given["block_table"] = ints(*data.draw(pair), *data.draw(pair)).view(2, 2)

    try:
        raw(direction, change)
    except RuntimeError as error:
        assert str(error)
