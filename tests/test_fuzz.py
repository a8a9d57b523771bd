# SPDX-License-Identifier: Apache-2.0
"""Arguments that nobody would give, to the public function and to the raw operators.

Each call either gives what the reference gives, or raises; which of the two, a second statement of the contract in
Python decides. GAPLESS_FUZZ_EXAMPLES sets how many calls each test makes. Reads and writes out of bounds show under
``make asan``, where tensors here end where their memory ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import gapless
from gapless import _native, reference
from gapless.reference.varlen import gather_pages
from gapless.testing import (
    Batch,
    assert_within_budget,
    make_batch,
    oracle_and_witness,
    scatter_pages,
)
from gapless.testing.fuzz import (
    FEW_NUMBERS,
    FLOATS,
    INT32_MAX,
    LAYOUTS,
    REFUSALS,
    Call,
    attempt,
    dims,
    fuzz,
    good_lengths,
    ints,
    is_like,
    nothing,
    numbers,
    one,
    spoil_dtype,
    spoil_lengths,
    spoil_options,
    spoil_plan,
    spoil_shape,
    spoil_twice,
    spoil_values,
)

# Valid calls: small, at the edges of vectors, strips, tiles and blocks.

lengths = st.one_of(
    st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 47, 49, 63, 65, 95, 97, 127, 129])
)
short = st.integers(0, 5)
sides = st.one_of(st.just(-1), st.integers(0, 40), st.sampled_from([INT32_MAX - 1, INT32_MAX]))


@st.composite
def valid_calls(draw: st.DrawFn, direction: str) -> Call:
    """Arguments of the raw operator ("fwd", "paged", "bwd") that it has to take."""
    # The last sequence is an ordinary one: a budget from a few lucky entries of the witness would mean nothing.
    few, many = (
        st.lists(st.tuples(lengths, lengths), max_size=3),
        st.lists(st.tuples(short, short), min_size=33),
    )
    decode = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1023, 1024, 1025, 2050])), max_size=1)
    pairs = [*draw(st.one_of(few, few, few, many, few if direction == "bwd" else decode)), (24, 24)]
    used = [k for _, k in pairs]
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (1, 8), (3, 1)]))
    heads, dim, dim_v = kv_heads * group, draw(dims), draw(dims)
    seed = draw(st.integers(0, 99))
    batch = make_batch(
        [q for q, _ in pairs], used, heads, kv_heads, dim, dim_v, draw(st.sampled_from(FLOATS)), seed
    )
    generator = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=generator)
    plan = gapless.VarlenPlan.make(
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        block_q=draw(st.sampled_from([1, 7, 64, 384])),
        block_k=draw(st.sampled_from([1, 7, 64, 512] if direction == "bwd" else [512])),
    )
    tables = [t.clone() for t in plan.tensors]
    slopes = draw(st.sampled_from([None, rand(heads), rand(len(pairs), heads)]))
    sinks = draw(st.sampled_from([None, batch.q.dtype, torch.float32]))
    call: Call = {
        "q": batch.q,
        "k": batch.k,
        "v": batch.v,
        "plan": tables,
        "seqused_k": None,
        "block_table": None,
    }
    if direction == "paged":
        call |= scatter_pages(batch.k, batch.v, used, draw(st.integers(1, 20)), seed=seed)._asdict()
    elif direction == "fwd" and draw(st.booleans()):
        call["seqused_k"] = ints([draw(st.integers(0, n)) for n in used])
    call |= {
        "alibi_slopes": slopes,
        "sinks": None if sinks is None else torch.randn(heads, generator=generator).to(sinks),
        "score": [draw(st.sampled_from([dim**-0.5, 0.0, -0.5])), draw(st.sampled_from([0.0, 2.0]))],
        "window": draw(st.tuples(sides, sides).map(list)),
    }
    for name in ("q", "k", "v", "alibi_slopes", "sinks"):
        if call[name] is not None:
            layout = draw(st.sampled_from(["plain", *LAYOUTS]))
            if not (direction == "paged" and layout.startswith("one ")):  # a page's first row may be NaN
                call[name] = LAYOUTS[layout](call[name])
    if direction == "bwd":
        out, lse = _native.varlen_attention_fwd(*call.values())
        del call["seqused_k"], call["block_table"]
        dout, dlse = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](batch.dout), batch.dlse
        options = {name: call.pop(name) for name in ("plan", "alibi_slopes", "sinks", "score", "window")}
        call = {
            "dout": dout,
            "dlse": draw(st.sampled_from([None, dlse])),
            **call,
            "out": out,
            "lse": lse,
            **options,
        }
    return call


# What goes wrong. Each changes one thing; whether that is an error is up to `acceptable`.


def spoil_tiles(draw: st.DrawFn, call: Call) -> None:
    index = draw(st.integers(2, 3))
    rows = call["plan"][index].tolist()
    row = st.tuples(numbers, numbers, numbers)
    kind = draw(st.sampled_from(["number", "near", "reversed", "twice", "empty", "dropped", "unused", "any"]))
    at = draw(st.integers(0, len(rows) - 1)) if rows else 0
    if kind == "number" and rows:
        rows[at][draw(st.integers(0, 2))] = draw(numbers)
    elif kind == "near" and rows:
        rows[at][draw(st.integers(0, 2))] += draw(st.sampled_from([-1, 1]))
    elif kind == "reversed":
        rows.reverse()
    elif kind == "twice":
        rows = [r for r in rows for _ in range(2)]
    elif kind == "empty" and rows:
        sequence, begin, end = rows[at]
        inside = draw(st.integers(begin, max(begin, end)))
        rows[at : at + 1] = [[sequence, begin, inside], [sequence, inside, inside], [sequence, inside, end]]
    elif kind == "dropped" and rows:
        del rows[at]
    elif kind == "unused":
        rows.insert(at, [-1, draw(numbers), draw(numbers)])
    elif kind == "any":
        rows = draw(st.lists(row, max_size=4))
    call["plan"][index] = ints([list(r) for r in rows], len(rows), 3)


def spoil_pages(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from(["seqused_k", "block_table"]))
    if call.get(name) is None:
        return
    x, k, table = call[name].clone(), call["k"], call["block_table"]
    room = k.shape[0] if table is None else table.shape[1] * k.shape[1]
    limits = [k.shape[0] - 1, k.shape[0], room, room + 1]
    for _ in range(draw(st.integers(1, 3)) if x.numel() else 0):
        number = draw(st.one_of(numbers, st.sampled_from(limits)))
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = max(-(2**31), min(number, INT32_MAX))
    call[name] = x


def spoil_presence(draw: st.DrawFn, call: Call) -> None:
    names = [
        n for n in ("seqused_k", "block_table", "dlse", "sinks", "alibi_slopes") if call.get(n) is not None
    ]
    if names:
        call[draw(st.sampled_from(names))] = None


# Numbers first, then what they are stored in.
SPOILERS = [
    spoil_lengths, spoil_tiles, spoil_pages, spoil_options, spoil_values, spoil_presence, spoil_shape, spoil_dtype,
    spoil_plan,
]  # fmt: skip


by_direction = pytest.mark.parametrize("direction", ["fwd", "paged", "bwd"])


def by_spoiler(spoilers: list[Callable]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spoil", [nothing, *spoilers], ids=lambda x: x.__name__)


# The raw operators' contract, said a second time.


def good_tiles(tiles: list[list[int]], lengths: list[int]) -> bool:
    def good(sequence: int, begin: int, end: int) -> bool:
        if sequence == -1:
            return True
        inside = 0 <= sequence < len(lengths) and 0 <= begin <= end <= lengths[sequence]
        return inside and (begin < end or end == 0)

    return all(good(*row) for row in tiles)


def acceptable(call: Call) -> bool:
    """Whether the raw operator has to take the call, or to raise."""
    q, k, v, plan = call["q"], call["k"], call["v"], call["plan"]
    table, seqused = call.get("block_table"), call.get("seqused_k")
    paged = table is not None
    if q.dim() != 3 or k.dim() != 3 + paged or v.dim() != 3 + paged or q.dtype not in FLOATS:
        return False
    tokens, heads, dim = q.shape
    *rows, kv_heads, dim_v = v.shape
    if k.dtype != q.dtype or v.dtype != q.dtype or list(k.shape) != [*rows, kv_heads, dim]:
        return False
    if not heads or not kv_heads or heads % kv_heads or not (1 <= dim <= 256 and 1 <= dim_v <= 256):
        return False
    if len(plan) != 4 or len(call["score"]) != 2 or len(call["window"]) != 2:
        return False
    if any(not -1 <= side <= INT32_MAX for side in call["window"]):
        return False
    int32, wide = (torch.int32,), (torch.float64 if q.dtype == torch.float64 else torch.float32,)
    batch = plan[0].numel() - 1
    if batch < 0 or not all(is_like(t, int32, batch + 1) for t in plan[:2]):
        return False
    if not all(is_like(t, int32, -1, 3) for t in plan[2:]):
        return False
    cu_q, cu_k, query_tiles, key_tiles = (t.tolist() for t in plan)
    if not good_lengths(cu_q, tokens) or not good_lengths(cu_k, None if paged else rows[0]):
        return False
    counts_q, counts_k = ([b - a for a, b in pairwise(cu)] for cu in (cu_q, cu_k))
    if not good_tiles(query_tiles, counts_q) or not good_tiles(key_tiles, counts_k):
        return False
    if not is_like(seqused, int32, batch) or not is_like(table, int32, batch, -1):
        return False
    if paged:
        if seqused is None or rows[1] == 0:
            return False
        for n, pages in zip(seqused.tolist(), table.tolist(), strict=True):
            used = pages[: -(-n // rows[1])]
            if not 0 <= n <= len(pages) * rows[1] or not all(0 <= page < rows[0] for page in used):
                return False
    elif seqused is not None and not all(
        0 <= n <= m for n, m in zip(seqused.tolist(), counts_k, strict=True)
    ):
        return False
    slopes, sinks = call["alibi_slopes"], call["sinks"]
    if not is_like(
        slopes, (torch.float32,), *([batch] if slopes is not None and slopes.dim() == 2 else []), heads
    ):
        return False
    if not is_like(sinks, FLOATS, heads):
        return False
    if "dout" not in call:
        return True
    return (
        all(is_like(call[name], (q.dtype,), tokens, heads, dim_v) for name in ("dout", "out"))
        and all(is_like(call[name], wide, heads, tokens) for name in ("lse", "dlse"))
    )  # fmt: skip


def comparable(call: Call) -> bool:
    """Inputs and scores are finite and of a usual size, so that the reference has something to say."""
    scale, cap = call["score"]
    usual = abs(scale) <= 1 and (cap == 0 or 1e-2 <= cap <= 1e2)
    inputs = [call[name] for name in ("q", "k", "v", "dout", "dlse", "sinks") if call.get(name) is not None]
    if call.get("block_table") is not None:  # rows of pages that no sequence uses are NaN
        rows = list(zip(call["block_table"], call["seqused_k"].tolist(), strict=True))
        inputs[1:3] = [gather_pages(call[name], *row) for name in ("k", "v") for row in rows]
    return usual and all(bool((x.abs() < 100).all()) for x in inputs)


def covered(tiles: list[list[int]], cu: list[int]) -> torch.Tensor:
    """How many tiles hold each token."""
    count = torch.zeros(cu[-1], dtype=torch.int32)
    for sequence, begin, end in tiles:
        if sequence >= 0:
            count[cu[sequence] + begin : cu[sequence] + end] += 1
    return count


def check_forward(call: Call, out: torch.Tensor, lse: torch.Tensor) -> None:
    q, v, (cu_q, cu_k, tiles, _) = call["q"], call["v"], call["plan"]
    tokens, heads, _ = q.shape
    assert out.shape == (tokens, heads, v.shape[-1]) and out.dtype == q.dtype
    assert lse.shape == (heads, tokens)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    if not comparable(call):
        return
    options = {name: call[name] for name in ("alibi_slopes", "sinks", "seqused_k", "block_table")}
    scale, softcap = call["score"]

    def expected(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        cast = {n: x if x is None or not x.is_floating_point() else x.to(dtype) for n, x in options.items()}
        qkv = (call[name].to(dtype) for name in ("q", "k", "v"))
        window = tuple(call["window"])
        return reference.varlen_attention(
            *qkv, cu_q, cu_k, window=window, scale=scale, softcap=softcap, **cast
        )

    (want, want_lse), (naive, naive_lse) = expected(torch.float64), expected(q.dtype)
    rows = covered(tiles.tolist(), cu_q.tolist()) > 0
    wider = {"factor": 64.0 if q.dtype == torch.float64 else 4.0, "reason": FEW_NUMBERS}
    assert_within_budget(out[rows], want[rows], naive[rows], name="out", **wider)
    assert_within_budget(lse[:, rows], want_lse[:, rows], naive_lse[:, rows], name="lse", **wider)


def check_backward(
    call: Call, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dsinks: torch.Tensor
) -> None:
    for gradient, name in ((dq, "q"), (dk, "k"), (dv, "v")):
        assert gradient.shape == call[name].shape and gradient.dtype == call[name].dtype
    sinks = call["sinks"]
    assert (
        dsinks.shape == (0,) if sinks is None else dsinks.shape == sinks.shape and dsinks.dtype == sinks.dtype
    )
    if not comparable(call) or not call["untouched"]:
        return
    q, (cu_q, cu_k, _, tiles) = call["q"], call["plan"]
    dlse = call["lse"].new_zeros(call["lse"].shape) if call["dlse"] is None else call["dlse"]
    batch = Batch(q, call["k"], call["v"], cu_q, cu_k, call["dout"], dlse)
    scale, softcap = call["score"]
    oracle, witness = oracle_and_witness(
        batch,
        sinks=sinks,
        alibi_slopes=call["alibi_slopes"],
        window=tuple(call["window"]),
        scale=scale,
        softcap=softcap,
    )
    wider = {"factor": 64.0 if q.dtype == torch.float64 else 16.0, "reason": FEW_NUMBERS}
    bounds, rows = cu_k.tolist(), [r for r in tiles.tolist() if r[0] >= 0]
    keys = covered(rows, bounds)
    # dk and dv of a key need its tile only; dq needs every key once, in tiles that follow one another.
    once = [
        len([1 for a, b in pairwise([-1, *(r[0] for r in tiles.tolist())]) if b == s != a]) == 1
        and bool((keys[begin:end] == 1).all())
        for s, (begin, end) in enumerate(pairwise(bounds))
    ]
    whole = torch.tensor(once, dtype=torch.bool).repeat_interleave(cu_q.diff())
    # One budget for the three, as dq and dk of rows that see one key are nothing but rounding.
    masks = {"dq": whole, "dk": keys > 0, "dv": keys > 0}
    parts = ({"dq": dq, "dk": dk, "dv": dv}, oracle._asdict(), witness._asdict())
    results = (torch.cat([part[name][at].flatten() for name, at in masks.items()]) for part in parts)
    assert_within_budget(*results, name="dq, dk and dv", **wider)
    # One sum over all rows for each head, whose terms may cancel: no budget for that.
    assert dsinks.isfinite().all()


@by_direction
@by_spoiler(SPOILERS)
@fuzz
@given(data=st.data())
def test_raw_operators(data: st.DataObject, spoil: Callable, direction: str):
    """A right result for what they have to take, an exception for the rest, and never a crash."""
    call = data.draw(valid_calls(direction))
    saved = {
        name: call.get(name)
        for name in ("q", "k", "v", "out", "lse", "score", "window", "sinks", "alibi_slopes")
    }
    spoil_twice(data.draw, SPOILERS, spoil, call)
    op = _native.varlen_attention_bwd if direction == "bwd" else _native.varlen_attention_fwd
    result = attempt(lambda: op(*call.values()), call, REFUSALS)
    good = acceptable(call)
    event(f"{direction}: {'good' if good else 'bad'}")
    if not good:
        assert isinstance(result, RuntimeError), "the call has to be refused"
        return
    assert not isinstance(result, Exception), f"the call has to be taken: {result}"
    if direction == "bwd":
        # out and lse are of the forward call, so they tell nothing once that is another one.
        untouched = all(call[name] is x for name, x in saved.items())
        check_backward(call | {"untouched": untouched}, *result)
    else:
        check_forward(call, *result)


# The public function.


def spoil_cu_seqlens(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from(["cu_seqlens_q", "cu_seqlens_k"]))
    if call[name] is None:
        return
    cu = call[name].view(-1).tolist() or [0]
    cu[draw(st.integers(0, len(cu) - 1))] = draw(
        st.one_of(numbers, st.sampled_from([2**31, 2**33, -(2**40), 2**62]))
    )
    call[name] = torch.tensor(cu, dtype=torch.int64)


PUBLIC_SPOILERS = [
    spoil_cu_seqlens, spoil_pages, spoil_options, spoil_values, spoil_presence, spoil_shape, spoil_dtype,
]  # fmt: skip


def publicly_acceptable(call: Call) -> bool:
    """What the public function has to take: the raw contract, but for what it settles or narrows itself."""
    cu_q, cu_k, q = call["cu_seqlens_q"], call["cu_seqlens_k"], call["q"]
    paged = call["block_table"] is not None
    if cu_k is None or paged:
        cu_k = cu_q
    for cu, x in ((cu_q, q), (cu_k, q if paged else call["k"])):
        if cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or not cu.numel() or not x.dim():
            return False
        if not good_lengths(cu.tolist(), x.shape[0]):
            return False
    if len(call["window"]) != 2 or min(call["window"]) < -1:
        return False
    if not all(map(math.isfinite, call["score"])) or call["score"][1] < 0:
        return False
    if call["sinks"] is not None and call["sinks"].dtype not in (torch.float32, q.dtype):
        return False
    if paged and (call["block_table"].dim() != 2 or call["block_table"].shape[1] == 0):
        return False
    none = torch.empty(0, 3, dtype=torch.int32)
    window = [min(side, INT32_MAX) for side in call["window"]]
    return acceptable(call | {"plan": [cu_q.int(), cu_k.int(), none, none], "window": window})


@by_direction
@by_spoiler(PUBLIC_SPOILERS)
@fuzz
@given(data=st.data(), causal=st.booleans())
def test_public_function(data: st.DataObject, spoil: Callable, direction: str, causal: bool):
    """A right result, or a ValueError or TypeError that says what is wrong."""
    grad = direction == "bwd"
    call = data.draw(valid_calls("fwd" if grad else direction))
    if grad and data.draw(st.booleans()):
        call["seqused_k"] = None
    cu_q, cu_k, *_ = call.pop("plan")
    plan = gapless.VarlenPlan.make(cu_q, cu_q if direction == "paged" else cu_k)
    call |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    spoil_twice(data.draw, PUBLIC_SPOILERS, spoil, call)
    names = [n for n in call if n not in ("score", "window")]
    scale, softcap = call["score"] = call["score"][:2]
    planned = {"plan": plan} if spoil is nothing and data.draw(st.booleans()) else {}
    grad = grad and all(call[n].is_floating_point() or call[n].is_complex() for n in ("q", "k", "v"))
    if grad:
        call |= {name: call[name].detach().requires_grad_() for name in ("q", "k", "v")}

    def run() -> Any:
        options = {"scale": scale, "softcap": softcap, "window": tuple(call["window"]), "causal": causal}
        return gapless.varlen_attention(**{n: call[n] for n in names}, **options, **planned, return_lse=True)

    result = attempt(run, call, (ValueError, TypeError))
    good = publicly_acceptable(call) and not (
        grad and (call["seqused_k"] is not None or call["block_table"] is not None)
    )
    event(f"{direction}: {'good' if good else 'bad'}")
    if not good:
        assert isinstance(result, Exception), "the call has to be refused"
        return
    assert not isinstance(result, Exception), f"the call has to be taken: {result}"
    out, lse = result
    left, right = (side if side <= INT32_MAX else -1 for side in call["window"])
    made = gapless.VarlenPlan.make(
        call["cu_seqlens_q"], None if direction == "paged" else call["cu_seqlens_k"]
    )
    check_forward(
        call | {"plan": made.tensors, "window": [left, 0 if causal else right]}, out.detach(), lse.detach()
    )
    if grad:
        gradients = torch.autograd.grad(
            out.sum() + lse[lse.isfinite()].sum(), [call[n] for n in ("q", "k", "v")]
        )
        assert [(g.shape, g.dtype) for g in gradients] == [
            (call[n].shape, call[n].dtype) for n in ("q", "k", "v")
        ]


# Sizes that no memory could hold, in tensors that take none.


HUGE = {
    "heads": {"q": one(0, 2**32, 1), "k": one(0, 2**32, 1), "v": one(0, 2**32, 1)},
    "tokens": {"q": one(2**31, 1, 1)},
    "keys": {"k": one(2**31, 1, 1), "v": one(2**31, 1, 1)},
    "page size": {
        "k": one(1, 2**62, 1, 1), "v": one(1, 2**62, 1, 1), "seqused_k": ints([]), "block_table": ints([], 0, 4),
    },
    "result": {
        "q": one(INT32_MAX, INT32_MAX, 1), "k": one(0, 1, 1), "v": one(0, 1, 256),
        "plan": [ints([0, INT32_MAX]), ints([0, 0]), ints([], 0, 3), ints([], 0, 3)],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_raw_operators_refuse_sizes_beyond_memory(name: str):
    call = {
        "q": one(0, 1, 1), "k": one(0, 1, 1), "v": one(0, 1, 1),
        "plan": [ints([0]), ints([0]), ints([], 0, 3), ints([], 0, 3)], "seqused_k": None, "block_table": None,
        "alibi_slopes": None, "sinks": None, "score": [1.0, 0.0], "window": [-1, -1],
    }  # fmt: skip
    with pytest.raises(RuntimeError):
        _native.varlen_attention_fwd(*(call | HUGE[name]).values())
