# SPDX-License-Identifier: Apache-2.0
"""Arguments that nobody would give, to the raw operators over block lists and over masses of blocks.

As in test_fuzz.py: each call either gives what attention written out gives, or raises; which of the two, a second
statement of the contract in Python decides. Reads and writes out of bounds show under ``make asan``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from gapless import _native
from gapless.plan.block_grid import BLOCK_SIZES
from gapless.reference.block_sparse import masked_attention
from gapless.reference.varlen import visible
from gapless.testing import assert_within_budget
from gapless.testing.block_sparse import layout_batch, layouts
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
    reshaped,
    spoil_dtype,
    spoil_lengths,
    spoil_options,
    spoil_plan,
    spoil_shape,
    spoil_twice,
    spoil_values,
)

OPERATORS = {
    "fwd": _native.block_sparse_fwd,
    "bwd": _native.block_sparse_bwd,
    "mass": _native.block_mass,
    "mass_fwd": _native.attention_mass_fwd,
}
SPARSE = ("fwd", "bwd")
CPU = torch.device("cpu")


@st.composite
def valid_calls(draw: st.DrawFn, direction: str) -> Call:
    """Arguments by name, in the operator's order; "plan" is the layout of the operators that take one."""
    layout, heads, kv_heads, seed = draw(layouts(max_length=130, max_batch=3))
    batch = layout_batch(
        layout,
        heads=heads,
        kv_heads=kv_heads,
        dim=draw(dims),
        dim_v=draw(dims),
        dtype=draw(st.sampled_from(FLOATS)),
        seed=seed,
    )
    call: Call = {"q": batch.q, "k": batch.k, "v": batch.v}
    for name in call:
        call[name] = LAYOUTS[draw(st.sampled_from(["plain", *LAYOUTS]))](call[name])
    if direction in SPARSE:
        plan = [t.clone() for t in layout.tensors]
        for group in ((3,), (5, 6)):  # room that no row uses, of numbers that nobody may read
            room = draw(st.sampled_from([0, 0, 1, 70]))
            for i in group:
                plan[i] = torch.cat([plan[i], plan[i].new_full([room], -(2**30))])
        blocks = [layout.block_q, layout.block_k, layout.heads]
        window = [-1, draw(st.sampled_from([-1, 0, 0, 3, 100, INT32_MAX]))]
    else:
        none = torch.empty(0, 3, dtype=torch.int32)
        plan = [layout.cu_seqlens_q.clone(), layout.cu_seqlens_k.clone(), none, none]
        spare = draw(st.sampled_from([0, 0, 1, 5]))
        blocks = [layout.block_q, layout.block_k, layout.q_blocks, layout.max_k_blocks + spare]
        window = [draw(st.sampled_from([-1, -1, 0, 20])), draw(st.sampled_from([-1, 0, 0, 3, INT32_MAX]))]
    scale = draw(st.sampled_from([call["q"].shape[-1] ** -0.5, 0.0, -0.5]))
    rest = {
        "plan": plan,
        "blocks": blocks,
        "score": [scale, draw(st.sampled_from([0.0, 2.0]))],
        "window": window,
    }
    if direction in ("fwd", "mass_fwd"):
        return call | rest
    if direction == "mass":
        call["lse"] = _native.attention_mass_fwd(*(call | rest).values())[1]
        del call["v"]
        return call | rest
    out, lse = _native.block_sparse_fwd(*(call | rest).values())
    dout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](batch.dout)
    dlse = draw(st.sampled_from([None, batch.dlse]))
    return {"dout": dout, "dlse": dlse, **call, "out": out, "lse": lse, **rest}


# What goes wrong.


def spoil_lists(draw: st.DrawFn, call: Call) -> None:
    """One of offsets, ids, partial_offsets, partial_ids and partial_patterns."""
    plan = call["plan"]
    if len(plan) < 8:
        return
    index = draw(st.integers(2, 6))
    row = plan[index].flatten().tolist()
    kind = draw(st.sampled_from(["number", "near", "near", "swap", "reversed", "shorter", "longer"]))
    at = draw(st.integers(0, len(row) - 1)) if row else 0
    if kind == "number" and row:
        row[at] = draw(numbers)
    elif kind == "near" and row:
        row[at] += draw(st.sampled_from([-1, 1]))
    elif kind == "swap" and at:
        row[at - 1], row[at] = row[at], row[at - 1]
    elif kind == "reversed":
        row.reverse()
    elif kind == "shorter":
        row = row[:-1]
    elif kind == "longer":
        row.append(draw(numbers))
    plan[index] = ints(row)


def spoil_patterns(draw: st.DrawFn, call: Call) -> None:
    """Fewer, more or other patterns."""
    if len(call["plan"]) < 8:
        return
    patterns = call["plan"][7]
    kind = draw(st.sampled_from(["fewer", "none", "shape", "bits"]))
    if kind == "fewer":
        patterns = patterns[:-1]
    elif kind == "none":
        patterns = patterns[:0]
    elif kind == "shape":
        patterns = reshaped(draw, patterns)
    else:
        patterns = torch.full_like(patterns, draw(st.sampled_from([0, -1, INT32_MAX, -(2**31), 0x5555])))
    call["plan"][7] = patterns


def spoil_blocks(draw: st.DrawFn, call: Call) -> None:
    """Sizes of blocks, and the numbers after them."""
    blocks = list(call["blocks"])
    if draw(st.integers(0, 4)) == 0:
        blocks = draw(st.sampled_from([[], blocks[:-1], [*blocks, 7]]))
    else:
        at = draw(st.integers(0, len(blocks) - 1))
        number = st.sampled_from(
            [0, -1, 1, 2, 3, 8, 16, 24, 32, 64, 127, 512, 2**31, 2**32 + 16, 2**62, -(2**62)]
        )
        blocks[at] = draw(st.one_of(number, st.just(blocks[at] - 1), st.just(blocks[at] + 1)))
        if len(blocks) == 4 and blocks[3] > 1000:
            blocks[3] = -blocks[3]  # sizes that no memory could hold have a test of their own
    call["blocks"] = blocks


# Numbers first, then what they are stored in.
SPOILERS = [
    spoil_lengths, spoil_lists, spoil_patterns, spoil_blocks, spoil_options, spoil_values, spoil_shape, spoil_dtype,
    spoil_plan,
]  # fmt: skip


# The raw operators' contract, said a second time.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def good_list(offsets: list[int], ids: list[int], limits: list[int]) -> bool:
    """Each row ascends strictly from 0 to below its limit."""
    if offsets[0] != 0:
        return False
    for begin, end, limit in zip(offsets[:-1], offsets[1:], limits, strict=True):
        if not begin <= end <= len(ids):
            return False
        row = ids[begin:end]
        if not all(0 <= i < limit for i in row) or not all(a < b for a, b in pairwise(row)):
            return False
    return True


def good_tensors(call: Call) -> bool:
    """q, k and v (or k again), lengths, sizes of blocks, score and window."""
    q, k, plan, blocks = call["q"], call["k"], call["plan"], call["blocks"]
    v = call.get("v", k)
    if any(x.dim() != 3 or x.dtype != q.dtype or q.dtype not in FLOATS for x in (q, k, v)):
        return False
    if k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2]:
        return False
    heads, kv_heads = q.shape[1], k.shape[1]
    if not heads or not kv_heads or heads % kv_heads:
        return False
    if not (1 <= q.shape[2] <= 256 and 1 <= v.shape[2] <= 256):
        return False
    if len(call["score"]) != 2 or len(call["window"]) != 2:
        return False
    if any(not -1 <= side <= INT32_MAX for side in call["window"]):
        return False
    batch = plan[0].numel() - 1
    if batch < 0 or not all(is_like(t, (torch.int32,), batch + 1) for t in plan[:2]):
        return False
    if not good_lengths(plan[0].tolist(), q.shape[0]) or not good_lengths(plan[1].tolist(), k.shape[0]):
        return False
    return blocks[0] in BLOCK_SIZES and blocks[1] in BLOCK_SIZES


def counts(cu: torch.Tensor, block: int) -> list[int]:
    return [cdiv(b - a, block) for a, b in pairwise(cu.tolist())]


def lists_overlap(call: Call) -> bool:
    """A row has a block both in whole and in part: it would count twice."""
    offsets, ids, partial_offsets, partial_ids = (t.tolist() for t in call["plan"][2:6])
    return any(
        set(ids[a:b]) & set(partial_ids[c:d])
        for (a, b), (c, d) in zip(pairwise(offsets), pairwise(partial_offsets), strict=True)
    )


def acceptable_sparse(call: Call) -> bool:
    """Whether the operator has to take the call, or to raise."""
    plan, blocks = call["plan"], call["blocks"]
    if len(plan) < 8 or len(blocks) < 3 or not good_tensors(call) or call["window"][0] != -1:
        return False
    heads, kv_heads, pattern_heads = call["q"].shape[1], call["k"].shape[1], blocks[2]
    if pattern_heads < 1 or heads % pattern_heads or (kv_heads % pattern_heads and pattern_heads % kv_heads):
        return False
    queries, keys = counts(plan[0], blocks[0]), counts(plan[1], blocks[1])
    limits = [m for n, m in zip(queries, keys, strict=True) for _ in range(n)] * pattern_heads
    shapes = [[len(limits) + 1], [-1], [len(limits) + 1], [-1], [-1], [-1, blocks[1], cdiv(blocks[0], 32)]]
    if not all(is_like(t, (torch.int32,), *shape) for t, shape in zip(plan[2:8], shapes, strict=True)):
        return False
    offsets, ids, partial_offsets, partial_ids, numbers, patterns = plan[2:8]
    if numbers.shape != partial_ids.shape:
        return False
    if not good_list(offsets.tolist(), ids.tolist(), limits):
        return False
    if not good_list(partial_offsets.tolist(), partial_ids.tolist(), limits):
        return False
    if lists_overlap(call):
        return False
    if not all(0 <= i < patterns.shape[0] for i in numbers[: partial_offsets[-1]].tolist()):
        return False
    return "dout" not in call or good_gradients(call)


def good_gradients(call: Call) -> bool:
    tokens, heads, dim_v = call["q"].shape[0], call["q"].shape[1], call["v"].shape[2]
    wide = torch.float64 if call["q"].dtype == torch.float64 else torch.float32
    return all(
        is_like(call[name], (call["q"].dtype,), tokens, heads, dim_v) for name in ("dout", "out")
    ) and all(is_like(call[name], (wide,), heads, tokens) for name in ("lse", "dlse"))


def acceptable_mass(call: Call) -> bool:
    plan, blocks = call["plan"], call["blocks"]
    if len(plan) < 2 or len(blocks) < 4 or not good_tensors(call):
        return False
    if blocks[2] != sum(counts(plan[0], blocks[0])) or blocks[3] < max(counts(plan[1], blocks[1]), default=0):
        return False
    wide = torch.float64 if call["q"].dtype == torch.float64 else torch.float32
    return "lse" not in call or is_like(call["lse"], (wide,), call["q"].shape[1], call["q"].shape[0])


# What the results have to be.


def masks_of(call: Call) -> list[torch.Tensor]:
    """The cells that each sequence's queries see, bool [heads, len_q, len_k]; block by block, from the raw lists."""
    cu_q, cu_k, *rest = call["plan"]
    window, heads = tuple(call["window"]), call["q"].shape[1]
    lengths = [
        (b - a, d - c) for (a, b), (c, d) in zip(*map(pairwise, (cu_q.tolist(), cu_k.tolist())), strict=True)
    ]
    if len(call["plan"]) < 8:
        return [visible(n, m, window, CPU).expand(heads, n, m) for n, m in lengths]
    offsets, ids, partial_offsets, partial_ids, numbers = (t.tolist() for t in rest[:5])
    block_q, block_k, pattern_heads = call["blocks"][:3]
    words = rest[5].long()[..., None] >> torch.arange(32) & 1
    patterns = words.flatten(2)[..., :block_q].bool().transpose(1, 2)  # [patterns, block_q, block_k]
    masks = [torch.zeros(pattern_heads, n, m, dtype=torch.bool) for n, m in lengths]
    row = 0
    for head in range(pattern_heads):
        for mask, (n, _) in zip(masks, lengths, strict=True):
            for at in range(0, n, block_q):
                for i in range(offsets[row], offsets[row + 1]):
                    mask[head, at : at + block_q, ids[i] * block_k :][:, :block_k] = True
                for i in range(partial_offsets[row], partial_offsets[row + 1]):
                    cells = mask[head, at : at + block_q, partial_ids[i] * block_k :][:, :block_k]
                    cells |= patterns[numbers[i]][: cells.shape[0], : cells.shape[1]]
                row += 1
    return [
        mask.repeat_interleave(heads // pattern_heads, 0) & visible(n, m, window, CPU)
        for mask, (n, m) in zip(masks, lengths, strict=True)
    ]


def per_sequence(call: Call, dtype: torch.dtype, function: Callable[..., Any]) -> list[Any]:
    """function(q, k, v, mask, rows) of each sequence in ``dtype``; rows are its slice of queries."""
    q, k, v = (call.get(name, call["k"]).to(dtype) for name in "qkv")
    results = []
    bounds = zip(*(pairwise(t.tolist()) for t in call["plan"][:2]), strict=True)
    for mask, ((a, b), (c, d)) in zip(masks_of(call), bounds, strict=True):
        results.append(function(q[a:b], k[c:d], v[c:d], mask, slice(a, b)))
    return results


def forward(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    scale, softcap = call["score"]
    found = per_sequence(
        call, dtype, lambda q, k, v, mask, _: masked_attention(q, k, v, mask, scale=scale, softcap=softcap)
    )
    out, lse = zip(*found, strict=True) if found else ((), ())
    empty = call["v"].new_zeros(0, call["q"].shape[1], call["v"].shape[2], dtype=dtype)
    return [torch.cat([empty, *out]), torch.cat([empty[..., 0].T, *lse], 1)]


def backward(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = {name: call[name].to(dtype).requires_grad_() for name in "qkv"}
    out, lse = forward(call | leaves, dtype)
    pairs = [(out, call["dout"].to(dtype))]
    if call["dlse"] is not None:
        pairs.append((lse, call["dlse"].to(lse.dtype)))
    pairs = [(x, dx) for x, dx in pairs if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in leaves.values()]
    outputs, gradients = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            outputs, list(leaves.values()), gradients, allow_unused=True, materialize_grads=True
        )
    )


def masses(call: Call, lse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[heads, q_blocks, k_blocks] by the sizes of the call."""
    (scale, softcap), (block_q, block_k, _, k_blocks) = call["score"], call["blocks"][:4]
    lse = lse.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def one_sequence(q, k, v, mask, rows):
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        scores = (softcap * torch.tanh(scores / softcap) if softcap else scores).to(lse.dtype)
        row = lse[:, rows, None]
        weights = (scores - row.masked_fill(row == -math.inf, 0.0)).exp()
        weights = weights.masked_fill(~mask | (row == -math.inf), 0.0)
        pad = (0, k_blocks * block_k - weights.shape[2], 0, -weights.shape[1] % block_q)
        weights = torch.nn.functional.pad(weights, pad)
        return weights.unflatten(2, (k_blocks, block_k)).unflatten(1, (-1, block_q)).sum((2, 4))

    empty = lse.new_zeros(call["q"].shape[1], 0, k_blocks)
    return torch.cat([empty, *(x for x in per_sequence(call, dtype, one_sequence) if x.shape[1])], 1)


def comparable(call: Call) -> bool:
    """Everything is finite and of a usual size."""
    scale, softcap = call["score"]
    usual = abs(scale) <= 1 and (softcap == 0 or 1e-2 <= softcap <= 1e2)
    inputs = [call[name] for name in ("q", "k", "v", "dout", "dlse") if call.get(name) is not None]
    return usual and all(bool((x.abs() < 100).all()) for x in inputs)


def check(call: Call, direction: str, untouched: bool, *results: torch.Tensor) -> None:
    q, v, dtype = call["q"], call.get("v", call["k"]), call["q"].dtype
    tokens, heads, _ = q.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = {"out": ((tokens, heads, v.shape[2]), dtype), "lse": ((heads, tokens), wide)}
    if not direction.startswith("mass"):
        wanted |= {"d" + name: (call[name].shape, dtype) for name in "qkv"}
    else:
        wanted["mass"] = ((heads, *call["blocks"][2:4]), wide)
    names = {
        "fwd": ["out", "lse"],
        "bwd": ["dq", "dk", "dv"],
        "mass": ["mass"],
        "mass_fwd": ["out", "lse", "mass"],
    }
    names = names[direction]
    assert [(tuple(x.shape), x.dtype) for x in results] == [
        (tuple(wanted[n][0]), wanted[n][1]) for n in names
    ]
    # lse, out and their gradients are of the forward call, so they tell nothing once that is another one.
    if not comparable(call) or not untouched:
        return
    wider = {"factor": 64.0 if dtype == torch.float64 else 16.0, "reason": FEW_NUMBERS}
    if direction == "bwd":
        # One budget for the three, as dq and dk of rows that see one key are nothing but rounding.
        parts = (
            torch.cat([x.flatten() for x in p])
            for p in (results, backward(call, torch.float64), backward(call, dtype))
        )
        return assert_within_budget(*parts, name="dq, dk and dv", **wider)
    found = dict(zip(names, results, strict=True))
    if "out" in found:
        for name, want, naive in zip(
            ("out", "lse"), forward(call, torch.float64), forward(call, dtype), strict=True
        ):
            assert_within_budget(found[name], want, naive, name=name, **wider)
    if "mass" in found:
        lse = call["lse"] if direction == "mass" else found["lse"]
        assert_within_budget(
            found["mass"], masses(call, lse, torch.float64), masses(call, lse, dtype), name="mass", **wider
        )
    return None


@pytest.mark.parametrize("direction", OPERATORS)
@pytest.mark.parametrize("spoil", [nothing, *SPOILERS], ids=lambda x: x.__name__)
@fuzz
@given(data=st.data())
def test_raw_operators(data: st.DataObject, spoil: Callable, direction: str):
    """A right result for what they have to take, an exception for the rest, and never a crash."""
    call = data.draw(valid_calls(direction))
    saved = {
        n: x.clone() if isinstance(x, torch.Tensor) else list(x) for n, x in call.items() if x is not None
    }
    plan = [t.clone() for t in call["plan"]]
    spoil_twice(data.draw, SPOILERS, spoil, call)
    result = attempt(lambda: OPERATORS[direction](*call.values()), call, REFUSALS)
    good = (acceptable_sparse if direction in SPARSE else acceptable_mass)(call)
    event(f"{direction}: {'good' if good else 'bad'}")
    if not good:
        assert isinstance(result, RuntimeError), "the call has to be refused"
        return
    assert not isinstance(result, Exception), f"the call has to be taken: {result}"
    results = [result] if isinstance(result, torch.Tensor) else result
    untouched = direction in ("fwd", "mass_fwd") or (
        len(plan) == len(call["plan"])
        and all(torch.equal(a, b) for a, b in zip(plan, call["plan"], strict=True))
        and all(
            torch.equal(x, call[n]) if isinstance(x, torch.Tensor) else x == call[n]
            for n, x in saved.items()
            if n != "plan" and call[n] is not None
        )
    )
    check(call, direction, untouched, *results)


# One thing wrong, and the message that names it.


def small() -> Call:
    """A call with two sequences, two pattern heads, full and partial blocks."""
    q = torch.randn(50, 2, 8)
    k = torch.randn(50, 2, 8)
    plan = [
        ints([0, 33, 50]), ints([0, 40, 50]),
        ints([0, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]), ints([0, 2, 1, 0, 0, 1, 2, 0]),
        ints([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]), ints([2, 0]), ints([1, 0]),
        torch.full((2, 16, 1), -1, dtype=torch.int32), ints([]),
    ]  # fmt: skip
    return {
        "q": q, "k": k, "v": k, "plan": plan, "blocks": [16, 16, 2], "score": [0.3, 0.0], "window": [-1, -1],
    }  # fmt: skip


def put(index: int, at: int, value: int) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call["plan"][index].view(-1)[at] = value

    return change


def swap(index: int, tensor: torch.Tensor) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call["plan"][index] = tensor

    return change


def give(name: str, value: Any) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call[name] = value

    return change


WRONG = {
    "ids negative": (put(3, 1, -1), r"ids\[1\] is -1: it has to be from 0 to below the key blocks of its sequence, 3"),
    "ids beyond": (put(3, 1, 3), r"ids\[1\] is 3: .*, 3"),
    "ids beyond its own sequence": (put(3, 4, 1), r"ids\[4\] is 1: .*, 1"),
    "ids huge": (put(3, 0, INT32_MAX), r"ids\[0\] is 2147483647"),
    "ids not ascending": (put(3, 1, 0), r"ids\[1\] is 0: it has to be above the one before it in its row, 0"),
    "offsets do not begin at 0": (put(2, 0, 1), r"offsets\[0\] is 1: it has to be 0"),
    "offsets decrease": (put(2, 2, 1), r"offsets\[2\] is 1: it has to be at least 2"),
    "offsets negative": (put(2, 3, -5), r"offsets\[3\] is -5"),
    "offsets beyond": (put(2, 10, 9), r"offsets\[10\] is 9: it has to be at most the room in ids, 8"),
    "offsets huge": (put(2, 4, INT32_MAX), r"offsets\[4\] is 2147483647"),
    "offsets too few": (swap(2, ints([0] * 10)), r"offsets has size 10 in dimension 0: it has to be 11"),
    "offsets int64": (swap(2, torch.zeros(11, dtype=torch.int64)), "offsets is of the wrong dtype"),
    "ids of two dimensions": (swap(3, ints([0] * 8, 4, 2)), "ids has 2 dimensions"),
    "partial_offsets beyond": (put(4, 10, 3), r"partial_offsets\[10\] is 3: .* partial_ids, 2"),
    "partial_ids beyond": (put(5, 0, 3), r"partial_ids\[0\] is 3"),
    "a block in whole and in part": (put(5, 0, 1), r"partial_ids\[0\] is 1"),
    "partial_patterns beyond": (put(6, 0, 2), r"partial_patterns\[0\] is 2: .* number of patterns, 2"),
    "partial_patterns negative": (put(6, 0, -1), r"partial_patterns\[0\] is -1"),
    "partial_patterns too few": (swap(6, ints([0])), "partial_patterns has size 1 in dimension 0: it has to be 2"),
    "patterns of another block": (swap(7, torch.zeros(2, 32, 1, dtype=torch.int32)), "patterns has size 32"),
    "patterns of more words": (swap(7, torch.zeros(2, 16, 2, dtype=torch.int32)), "patterns has size 2"),
    "cu_seqlens_q decreases": (put(0, 1, 60), r"cu_seqlens_q\[2\] is 50: it has to be at least 60"),
    "cu_seqlens_k of other tokens": (put(1, 2, 49), r"cu_seqlens_k\[2\] is 49"),
    "cu_seqlens_k of another batch": (swap(1, ints([0, 50])), "cu_seqlens_k has size 2"),
    "block_q not offered": (give("blocks", [48, 16, 2]), "block_q is 48: it has to be 16, 32, 64, 128 or 256"),
    "block_k not offered": (give("blocks", [16, 512, 2]), "block_k is 512"),
    "block_q beyond int32": (give("blocks", [2**32 + 16, 16, 2]), "block_q is 4294967312"),
    "blocks too few": (give("blocks", [16, 16]), "blocks has 2 entries: it has to have 3"),
    "no heads": (give("blocks", [16, 16, 0]), "the layout has 0 heads"),
    "three heads": (give("blocks", [16, 16, 3]), "the layout has 3 heads, q has 2, k has 2"),
    "another layout's heads": (give("blocks", [16, 16, 1]), "offsets has size 11 in dimension 0: it has to be 6"),
    "negative heads": (give("blocks", [16, 16, -2]), "the layout has -2 heads"),
    "window to the left": (give("window", [5, -1]), r"window\[0\] is 5"),
    "window of one side": (give("window", [-1]), "window has to be left, right"),
    "score of one number": (give("score", [1.0]), "score has 1 entries"),
    "layout too short": (lambda call: call.update(plan=call["plan"][:7]), "layout has 7 entries: it has to have 8"),
    "no layout": (give("plan", []), "layout has 0 entries"),
    "k of other tokens": (give("k", torch.randn(49, 2, 8)), "k and v differ in dimension 0: 49 and 50"),
    "k of another dtype": (give("k", torch.randn(50, 2, 8).half()), "q, k and v have to be of one dtype"),
}  # fmt: skip


@pytest.mark.parametrize("direction", SPARSE)
@pytest.mark.parametrize("name", WRONG)
def test_the_message_names_what_is_wrong(name: str, direction: str):
    call = small()
    out, lse = _native.block_sparse_fwd(*call.values())
    change, message = WRONG[name]
    change(call)
    if direction == "bwd":
        head = {"dout": torch.zeros_like(out), "dlse": None}
        call = head | {n: call[n] for n in "qkv"} | {"out": out, "lse": lse} | call
        call |= {n: call.pop(n) for n in ("plan", "blocks", "score", "window")}
    with pytest.raises(RuntimeError, match=message):
        OPERATORS[direction](*call.values())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([16, 16, 4, 3], r"blocks\[2\] is 4: it has to be the number of blocks of queries, 5"),
        ([16, 16, -1, 3], r"blocks\[2\] is -1"),
        ([16, 16, 5, 2], r"blocks\[3\] is 2: it has to be at least the most blocks of keys of a sequence, 3"),
        ([17, 16, 5, 3], "block_q is 17"),
        ([16, 0, 5, 3], "block_k is 0"),
        ([16, 16, 5], "blocks has 3 entries: it has to have 4"),
        ([16, 16, 5, 2**61], None),  # a size that no memory holds
        ([16, 16, 5, 2**62 + 1], None),
    ],
)
def test_mass_refuses_wrong_numbers_of_blocks(blocks: list[int], message: str | None):
    call = small()
    call = {**call, "plan": call["plan"][:2], "blocks": [16, 16, 5, 3]}
    _, lse, _ = _native.attention_mass_fwd(*call.values())
    call["blocks"] = blocks
    with pytest.raises(RuntimeError, match=message):
        _native.attention_mass_fwd(*call.values())
    with pytest.raises(RuntimeError, match=message):
        _native.block_mass(call["q"], call["k"], lse, *list(call.values())[3:])


HUGE = {
    "heads": {"q": one(0, 2**32, 1), "k": one(0, 2**32, 1), "v": one(0, 2**32, 1)},
    "tokens": {"q": one(2**31, 1, 1)},
    "keys": {"k": one(2**31, 1, 1), "v": one(2**31, 1, 1)},
    "result": {"q": one(INT32_MAX, INT32_MAX, 1), "k": one(0, 1, 1), "v": one(0, 1, 256)},
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("direction", ["fwd", "mass_fwd"])
def test_sizes_beyond_memory_are_refused(name: str, direction: str):
    call = {"q": one(0, 1, 1), "k": one(0, 1, 1), "v": one(0, 1, 1)} | HUGE[name]
    tokens = min(call["q"].shape[0], INT32_MAX)
    plan = [ints([0, tokens]), ints([0, 0])]
    blocks = [256, 256, 1]
    if direction == "fwd":
        none = ints([])
        # Every row's list is empty: no memory for them, and strides of 0.
        offsets = ints([0]).expand(cdiv(tokens, 256) + 1) if name == "result" else ints([0])
        plan += [offsets, none, offsets, none, none, ints([], 0, 256, 8)]
    else:
        blocks = [256, 256, cdiv(tokens, 256), 0]
    with pytest.raises(RuntimeError):
        OPERATORS[direction](*call.values(), plan, blocks, [1.0, 0.0], [-1, -1])
