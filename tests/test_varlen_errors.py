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

# The public function. Lengths used and pages are read only in C++, whose guard raises a RuntimeError.

GUARD = (ValueError, RuntimeError)


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
    return ints(*pages).view(2, 2)


C64 = torch.complex64
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
    ("seqused_too_long", {"seqused_k": ints(6, 3)}, GUARD, ["seqused_k", "6"]),
    ("seqused_negative", {"seqused_k": ints(5, -1)}, GUARD, ["seqused_k", "-1"]),
    ("pages_without_seqused", {"pages": True, "seqused_k": None}, ValueError, ["block_table", "seqused_k"]),
    ("pages_rank", {"pages": True, "k": torch.ones(8, 2, 16)}, ValueError, ["k has shape", "[8, 2, 16]", "page_size"]),
    ("pages_grad", {"pages": True, "q": LEAF}, ValueError, ["block_table"]),
    ("table_dtype", {"pages": True, "block_table": torch.zeros(2, 2)}, TypeError, ["block_table", "float32", "int32"]),
    ("table_shape", {"pages": True, "block_table": torch.zeros(3, 2).int()}, ValueError, ["block_table", "[3, 2]"]),
    ("table_rank", {"pages": True, "block_table": ints(0, 1)}, ValueError, ["block_table", "[2]"]),
    ("page_out_of_range", {"pages": True, "block_table": table(0, 1, 2, 99)}, None, []),  # 99 is not used
    ("page_too_large", {"pages": True, "block_table": table(0, 99, 2, 3)}, GUARD, ["block_table", "99"]),
    ("page_negative", {"pages": True, "block_table": table(0, 1, -1, 3)}, GUARD, ["block_table", "-1"]),
    ("pages_too_few", {"pages": True, "seqused_k": ints(13, 3)}, GUARD, ["seqused_k", "13"]),
    ("impl_unknown", {"impl": "cuda"}, ValueError, ["impl", "'cuda'", "'native'"]),
    ("impl_flash_attn", {"impl": "flash_attn"}, ValueError, ["impl='flash_attn'", "flash-attn"]),
    ("plan_of_another_batch", {"plan": gapless.VarlenPlan.make(ints(0, 8))}, ValueError, ["plan is for 1", "2"]),
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


def test_a_plan_that_does_not_fit_the_tensors_is_refused():
    """Same number of sequences, other lengths."""
    for cu in (ints(0, 5, 9), ints(0, 9, 9), ints(0, 2**30, 2**31 - 1)):
        with pytest.raises((ValueError, RuntimeError), match="cu_seqlens"):
            call({"plan": gapless.VarlenPlan.make(cu, block_q=2**30, block_k=2**30)})


@pytest.mark.parametrize(
    "outs, lses, words",
    [
        ([], [], ["0 outs"]),
        ([torch.ones(3, 2, 4)], [], ["1 outs", "0 lses"]),
        ([torch.ones(3, 2, 4)], [torch.ones(3, 2)], ["lses[0]", "[3, 2]"]),
        ([torch.ones(3, 2, 4), torch.ones(3, 2, 5)], [torch.ones(2, 3)] * 2, ["outs[1]", "[3, 2, 5]"]),
    ],
    ids=["nothing", "no_lse", "lse_shape", "out_shapes"],
)
def test_bad_parts_to_merge(outs: list, lses: list, words: list[str]):
    with pytest.raises(ValueError) as caught:
        gapless.merge_attention(outs, lses)
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
