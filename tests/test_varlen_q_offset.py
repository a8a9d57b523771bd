# SPDX-License-Identifier: Apache-2.0
"""Queries that sit anywhere among their keys: every implementation, and parts of a sequence against the whole."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gapless
from gapless import _native, _planner, reference
from gapless.ops import registry
from gapless.ops.varlen import REASONS, Inputs
from gapless.plan.varlen import PlanCache
from gapless.reference.varlen import visible
from gapless.testing import (
    Batch,
    Results,
    assert_results,
    attend,
    make_batch,
    oracle_and_witness,
    scatter_pages,
)
from gapless.testing.varlen import cumulative

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LOWEST, HIGHEST = -(2**31), 2**31 - 1
native = partial(gapless.varlen_attention, impl="native")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Few rows, one block, several blocks and tiles; no queries, no keys; two tiles of the backward pass.
LENGTHS_Q, LENGTHS_K = [1, 37, 0, 130, 64, 5, 3, 150], [50, 37, 9, 64, 130, 0, 200, 530]
OFFSETS = {
    "part": int32(20, 5, 3, -70, 40, 2, 197, 300),
    "behind the keys": int32(*(n + 30 for n in LENGTHS_K)),
    "before the keys": int32(*(-n - 30 for n in LENGTHS_Q)),
    "at the edges": int32(0, -36, 0, 63, 129, -1, 199, -149),
    "the lowest": int32(*[LOWEST] * 8),
    "the highest": int32(*[HIGHEST] * 8),
    "all kinds": int32(HIGHEST, -12, LOWEST, LOWEST, 129, HIGHEST, 0, 380),
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (38, 5)},
    "to the left": {"window": (40, -1)},
    "to the right": {"window": (-1, 11)},
    "widest": {"window": (HIGHEST, HIGHEST)},
}
EVERYTHING = {
    "causal": True, "window": (90, -1), "softcap": 3.0, "scale": 0.4, "sinks": torch.tensor([0.5, -2.0, 3.0, 0.0]),
    "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]) / 8,
}  # fmt: skip
ONE_KEY = (
    "with one key to a row, dout . v - delta cancels to rounding that the reference's softmax does not have"
)


def batch_of(dtype: torch.dtype = FP32, **how: Any) -> Batch:
    return make_batch(LENGTHS_Q, LENGTHS_K, 4, 2, 20, 12, dtype, **how)


def wider(dtype: torch.dtype) -> dict[str, Any]:
    return {} if dtype == FP64 else {"factor": 4.0, "reason": ONE_KEY}


def written_out(
    q, k, v, cu_q, cu_k, *, q_offset, causal=False, window=(-1, -1), softcap=0.0, scale=None, alibi_slopes=None,
    sinks=None, return_lse=True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formulas, a row and a head at a time."""
    group = q.shape[1] // k.shape[1]
    out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    left, right = window[0], 0 if causal else window[1]
    rows, logs = [], []
    for s in range(len(cu_q) - 1):
        begin, end = int(cu_k[s]), int(cu_k[s + 1])
        for i in range(int(cu_q[s]), int(cu_q[s + 1])):
            p = i - int(cu_q[s]) + int(q_offset[s])
            low = 0 if left < 0 else max(0, p - left)
            high = end - begin if right < 0 else min(end - begin, p + right + 1)
            seen = range(begin + low, begin + max(low, high))
            for h in range(q.shape[1]):
                x = k[seen.start : seen.stop, h // group] @ q[i, h] * (scale or q.shape[-1] ** -0.5)
                x = torch.tanh(x / softcap) * softcap if softcap else x
                if alibi_slopes is not None:
                    x = x - alibi_slopes[h] * torch.tensor([abs(p - j + begin) for j in seen], dtype=x.dtype)
                if sinks is not None:
                    x = torch.cat([x, sinks[h : h + 1]])
                weights = x.softmax(0)[: len(seen)]
                rows.append(weights @ v[seen.start : seen.stop, h // group])
                logs.append(x.logsumexp(0) if len(x) else x.new_tensor(-torch.inf))
    if rows:
        out, lse = torch.stack(rows).view(out.shape), torch.stack(logs).view(q.shape[:2]).t()
    return out, lse


@pytest.mark.parametrize("offsets", [x for x in OFFSETS if x not in ("the lowest", "the highest")])
@pytest.mark.parametrize("options", [*MASKS.values(), EVERYTHING], ids=[*MASKS, "everything"])
def test_reference_against_formulas(options: dict[str, Any], offsets: str):
    lengths = [1, 7, 0, 13, 6, 5, 3, 0], [5, 7, 2, 6, 13, 0, 20, 3]
    if offsets == "part":
        q_offset = int32(2, 3, 1, -5, 4, 2, 17, 0)
    else:
        q_offset = OFFSETS[offsets] // 8 if offsets != "all kinds" else OFFSETS[offsets]
    batch = make_batch(*lengths, 4, 2, 5, 3, FP64)
    options = {**options, "sinks": options["sinks"].double()} if "sinks" in options else options
    got = attend(partial(gapless.varlen_attention, impl="reference"), batch, q_offset=q_offset, **options)
    want = attend(written_out, batch, q_offset=q_offset, **options)
    # ALiBi's bias of rows 2^31 away leaves a score few bits.
    atol = 1e-6 if "alibi_slopes" in options and offsets == "all kinds" else 1e-10
    for name, a, b in zip(Results._fields, got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_native(offsets: str, dtype: torch.dtype):
    batch, q_offset = batch_of(dtype), OFFSETS[offsets]
    for name, options in MASKS.items() if dtype == FP32 else [("window", MASKS["window"])]:
        actual = attend(native, batch, q_offset=q_offset, **options)
        oracle, witness = oracle_and_witness(batch, q_offset=q_offset, **options)
        assert torch.equal(actual.lse == -torch.inf, oracle.lse == -torch.inf), name
        assert_results(actual, oracle, witness, **wider(dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("offsets", ["part", "at the edges", "behind the keys"])
def test_native_with_every_option(offsets: str, dtype: torch.dtype):
    batch, options = batch_of(dtype, non_contiguous=True), {**EVERYTHING, "q_offset": OFFSETS[offsets]}
    assert_results(attend(native, batch, **options), *oracle_and_witness(batch, **options), **wider(dtype))


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_alibi_of_rows_far_from_the_keys(impl: str):
    """Distances beyond int32, exact to the type's rounding."""
    batch = make_batch([3, 40, 2, 33], [20, 33, 20, 50], 2, 1)
    options = {
        "q_offset": int32(HIGHEST, LOWEST, LOWEST, HIGHEST - 10),
        "alibi_slopes": torch.tensor([2.0**-20, 2.0**-22]),
    }
    function = native if impl == "native" else triton_attention
    actual, (oracle, witness) = attend(function, batch, **options), oracle_and_witness(batch, **options)
    # Scores of 2^11 end at 2^-13, where Triton rounds them once more: to powers of two.
    room = {"factor": 8.0, "reason": "base 2"} if impl == "triton" else {}
    assert_results(actual, oracle, witness, **room)
    assert 2040 < -oracle.lse.min() < 2060  # 2^31 * 2^-20


# Few rows over many keys, which are split.


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("window", [(-1, 0), (1300, 7), (-1, -1), (5, -1)], ids=str)
def test_few_rows_over_many_keys(window: tuple[int, int], dtype: torch.dtype):
    batch = make_batch([1, 3, 20, 1, 2], [2500, 1100, 3000, 2100, 1500], 4, 2, 16, dtype=dtype)
    options = {
        "window": window, "q_offset": int32(1500, -1, 2990, 5000, -9), "sinks": EVERYTHING["sinks"],
        "alibi_slopes": EVERYTHING["alibi_slopes"] / 64,
    }  # fmt: skip
    oracle, witness = oracle_and_witness(batch, grad=False, **options)
    assert_results(attend(native, batch, grad=False, **options), oracle, witness)


def test_pages_and_used_keys():
    lengths_q, lengths_k = [3, 0, 40, 1, 1], [37, 9, 40, 0, 60]
    batch = make_batch(lengths_q, lengths_k, 4, 2)
    options = {"window": (25, 3), "q_offset": int32(10, 0, -20, 5, 30), "sinks": EVERYTHING["sinks"]}
    oracle, witness = oracle_and_witness(batch, grad=False, **options)
    pages = scatter_pages(batch.k, batch.v, lengths_k, 8)
    for impl in ("native", "reference", "triton"):
        function = triton_attention if impl == "triton" else partial(gapless.varlen_attention, impl=impl)
        out, lse = function(
            batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k, block_table=pages.block_table,
            return_lse=True, **options,
        )  # fmt: skip
        assert_results(Results(out, lse), oracle, witness)
    used = {**options, "seqused_k": int32(20, 9, 11, 0, 33)}
    oracle, witness = oracle_and_witness(batch, grad=False, **used)
    assert_results(attend(native, batch, grad=False, **used), oracle, witness)


# What offsets mean.


@pytest.mark.parametrize("impl", ["native", "triton", "reference"])
def test_bottom_right_is_one_offset(impl: str):
    lengths_q, lengths_k = ((40, 0, 3), (33, 5, 50)) if impl == "triton" else (LENGTHS_Q, LENGTHS_K)
    batch = make_batch(lengths_q, lengths_k, 4, 2, 20, 12)
    q_offset = int32(*(k - q for q, k in zip(lengths_q, lengths_k, strict=True)))
    function = triton_attention if impl == "triton" else partial(gapless.varlen_attention, impl=impl)
    with_offsets = attend(function, batch, q_offset=q_offset, **EVERYTHING)
    for a, b in zip(with_offsets, attend(function, batch, **EVERYTHING), strict=True):
        assert torch.equal(a, b)


def test_rows_that_see_nothing():
    batch = make_batch([40, 1], [30, 50], 2, 1)
    options = {"causal": True, "q_offset": int32(-40, -1)}
    result = attend(native, batch, **options)
    for x in (result.out, result.dq, result.dk, result.dv):
        assert torch.equal(x, torch.zeros_like(x))
    assert (result.lse == -torch.inf).all()
    result = attend(native, batch, sinks=torch.tensor([0.25, -4.0]), **options)
    assert torch.equal(result.lse, torch.tensor([0.25, -4.0])[:, None].expand(2, 41))
    assert torch.equal(result.out, torch.zeros_like(result.out))


def test_no_sequences():
    batch, q_offset = make_batch([], [], 2, 1), int32()
    for impl in ("native", "reference"):
        assert (
            attend(partial(gapless.varlen_attention, impl=impl), batch, q_offset=q_offset).out.shape[0] == 0
        )


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (2, 1), "softcap": 1.5}], ids=str)
def test_gradcheck(options: dict[str, Any]):
    batch = make_batch([3, 0, 2], [4, 1, 5], 2, 1, 3, 2, FP64)
    options = {**options, "q_offset": int32(1, 0, 3), "alibi_slopes": torch.tensor([0.3, 0.1])}
    tensors = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]

    def function(q, k, v):
        return native(q, k, v, batch.cu_seqlens_q, batch.cu_seqlens_k, return_lse=True, **options)

    assert torch.autograd.gradcheck(function, tensors)


def test_any_tile_size_and_number_of_threads(threads):
    batch, q_offset = batch_of(), OFFSETS["part"]
    options = {"window": (70, 9), "softcap": 5.0}
    oracle, witness = oracle_and_witness(batch, q_offset=q_offset, **options)
    for block_q, block_k in ((16, 16), (48, 96), (7, 1), (1000, 1000)):
        made = gapless.VarlenPlan.make(
            batch.cu_seqlens_q, batch.cu_seqlens_k, block_q=block_q, block_k=block_k, q_offset=q_offset
        )
        threads(1)
        alone = attend(native, batch, plan=made, **options)
        threads(3)
        assert all(
            a is None or torch.equal(a, b)
            for a, b in zip(alone, attend(native, batch, plan=made, **options), strict=True)
        )
        assert_results(alone, oracle, witness, **wider(FP32))


# Parts of a sequence.


def in_parts(
    q, k, v, cu_q, cu_k, *, cuts_q, cuts_k, sinks=None, impl="native", return_lse=True, **options
) -> tuple[Tensor, Tensor]:
    """Every part of the queries against every part of the keys, joined; one sequence, or several of one length."""
    batch, len_q, len_k = len(cu_q) - 1, int(cu_q[1]), int(cu_k[1])
    q, k, v = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
    outs, lses = [], []
    for q_begin, q_end in pairwise(cuts_q):
        parts = []
        for k_begin, k_end in pairwise(cuts_k):
            chunks = (q[:, q_begin:q_end], k[:, k_begin:k_end], v[:, k_begin:k_end])
            how = {
                "q_offset": torch.full((batch,), q_begin + (len_k - len_q) - k_begin, dtype=torch.int32),
                "sinks": None if parts else sinks,  # of one part of the keys
            }
            lengths = cumulative([q_end - q_begin] * batch), cumulative([k_end - k_begin] * batch)
            flat = [x.flatten(0, 1) for x in chunks]
            parts.append(
                gapless.varlen_attention(*flat, *lengths, return_lse=True, impl=impl, **how, **options)
            )
        out, lse = gapless.merge_attention(*map(list, zip(*parts, strict=True)), return_lse=True)
        outs.append(out.unflatten(0, (batch, -1)))
        lses.append(lse.unflatten(1, (batch, -1)))
    return torch.cat(outs, 1).flatten(0, 1), torch.cat(lses, 2).flatten(1, 2)


@st.composite
def cut(draw: st.DrawFn, length: int) -> list[int]:
    """0, up to three places inside, the length; parts may be empty."""
    return [0, *sorted(draw(st.lists(st.integers(0, length), max_size=3))), length]


sides = st.one_of(st.just(-1), st.integers(0, 60))


@settings(max_examples=30)
@given(
    st.data(), st.integers(1, 2), st.integers(1, 100), st.integers(1, 100), st.sampled_from(["native", "reference"]),
    st.sampled_from([FP32, FP64]),
)  # fmt: skip
def test_parts_equal_the_whole(data, count, len_q, len_k, impl, dtype):
    batch = make_batch([len_q] * count, [len_k] * count, 4, 2, 8, 5, dtype)
    draw = data.draw
    options = {
        "causal": draw(st.booleans()), "window": draw(st.tuples(sides, sides)),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "alibi_slopes": draw(st.sampled_from([None, EVERYTHING["alibi_slopes"]])),
        "sinks": draw(st.sampled_from([None, EVERYTHING["sinks"].to(dtype)])),
    }  # fmt: skip
    cuts = {"cuts_q": draw(cut(len_q)), "cuts_k": draw(cut(len_k)), "impl": impl}
    actual, (oracle, witness) = (
        attend(in_parts, batch, **cuts, **options),
        oracle_and_witness(batch, **options),
    )
    if dtype == FP64:
        for name, a, b in zip(Results._fields, actual, oracle, strict=True):
            if a is not None:
                torch.testing.assert_close(
                    a, b, atol=1e-11, rtol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
                )
        return
    why = "parts are rounded before they are joined, and sums over few rows may be right by luck"
    assert_results(actual, oracle, witness, factor=16.0, reason=why)


def test_parts_of_rows_that_see_nothing():
    """Rows of -inf in every part go through the merge, and no NaN comes back."""
    batch = make_batch([30], [12], 2, 1)
    options = {"causal": True, "window": (4, -1)}
    cuts = {"cuts_q": [0, 7, 20, 30], "cuts_k": [0, 5, 12]}
    actual = attend(in_parts, batch, **cuts, **options)
    assert torch.equal(actual.out[:18], torch.zeros_like(actual.out[:18]))
    assert torch.equal(actual.dq[:18], torch.zeros_like(actual.dq[:18]))
    assert_results(
        actual, *oracle_and_witness(batch, **options), factor=4.0, reason="rounded before the merge"
    )


# Triton.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_attention(*args: Any, plan: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """gapless.varlen_attention with impl="triton" on DEVICE; results and gradients come back to the CPU."""
    pytest.importorskip("triton")

    def move(x: Any) -> Any:
        return x.to(DEVICE) if isinstance(x, Tensor) else x

    options = {name: move(x) for name, x in options.items()}
    out, lse = gapless.varlen_attention(
        *map(move, args), plan=plan and plan.to(DEVICE), impl="triton", **options
    )
    return out.cpu(), lse.cpu()


TRITON_OFFSETS = {
    "part": int32(7, 0, -30, 20, 0),
    "behind the keys": int32(*[70] * 5),
    "before the keys": int32(*[-70] * 5),
    "the limits": int32(LOWEST, 3, HIGHEST, LOWEST, HIGHEST),
    "the other limits": int32(HIGHEST, 3, LOWEST, HIGHEST, LOWEST),
}
TRITON_OPTIONS = {
    **MASKS,
    "everything": {
        "window": (30, 2), "softcap": 3.0, "sinks": torch.tensor([0.5, -1.0]), "scale": 0.3,
        "alibi_slopes": torch.tensor([0.05, 0.5]) * 2.0**-8,
    },
}  # fmt: skip


TRITON_PAIRS = [
    *((options, "part") for options in TRITON_OPTIONS),
    *((options, "the limits") for options in ("causal", "window", "to the left")),
    *((options, "the other limits") for options in ("full", "window", "to the right", "widest")),
    ("window", "behind the keys"), ("causal", "behind the keys"), ("window", "before the keys"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("options", "offsets"), TRITON_PAIRS)
def test_triton(options: str, offsets: str):
    batch = make_batch((36, 0, 40, 1, 9), (33, 20, 37, 40, 0), heads=2, kv_heads=1, dim=8)
    how = {**TRITON_OPTIONS[options], "q_offset": TRITON_OFFSETS[offsets]}
    actual, (oracle, witness) = attend(triton_attention, batch, **how), oracle_and_witness(batch, **how)
    assert torch.equal(actual.lse == -torch.inf, oracle.lse == -torch.inf)
    assert_results(actual, oracle, witness, **wider(FP32))


# The plan.

pairs = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(-100, 100)), max_size=8)


@given(pairs, st.integers(1, 40), st.integers(1, 40), st.tuples(st.integers(-1, 50), st.integers(-1, 50)))
def test_tiles_come_costliest_first(sizes, block_q, block_k, window):
    cu_q, cu_k = (cumulative([x[side] for x in sizes]).numpy() for side in (0, 1))
    firsts = int32(*(x[2] for x in sizes)).numpy()
    query, key = _planner.varlen_tiles(cu_q, cu_k, block_q, block_k, *window, firsts)
    plain_query, plain_key = _planner.varlen_tiles(cu_q, cu_k, block_q, block_k, *window)

    def rows(tiles):
        return [row for row in tiles.reshape(-1, 3).tolist() if row[0] >= 0]

    def cost(s, begin, end):
        len_q, len_k, first = sizes[s]
        return int(visible(len_q, len_k, window, torch.device("cpu"), first)[begin:end].sum())

    assert sorted(rows(query)) == sorted(rows(plain_query)) and sorted(rows(key)) == sorted(rows(plain_key))
    order = [(-cost(s, begin, end), s, begin) for s, begin, end in rows(query)]
    assert order == sorted(order)
    order = [(-cost(s, 0, sizes[s][0]), s, begin) for s, begin, _ in rows(key)]
    assert order == sorted(order)


def test_plan_has_offsets_of_its_own():
    batch, q_offset = batch_of(), OFFSETS["part"].clone()
    plain = gapless.VarlenPlan.make(batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True)
    made = gapless.VarlenPlan.make(batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True, q_offset=q_offset)
    assert plain.q_offset is None and len(plain.tensors) == 4 and len(made.tensors) == 5
    assert torch.equal(made.q_offset, q_offset) and made.tensors[4] is made.q_offset
    assert torch.equal(made.to("cpu").q_offset, q_offset) and made.to("meta").q_offset.device.type == "meta"
    want = attend(native, batch, causal=True, q_offset=q_offset)
    q_offset.zero_()
    for impl in ("native", "reference"):  # the plan's count without being named again
        function = partial(gapless.varlen_attention, impl=impl)
        got = attend(function, batch, causal=True, plan=made)
        torch.testing.assert_close(got.out, want.out)
        torch.testing.assert_close(got.dk, want.dk, atol=1e-4, rtol=1e-4)
    assert all(
        a is None or torch.equal(a, b)
        for a, b in zip(attend(native, batch, causal=True, plan=made), want, strict=True)
    )
    native(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True, plan=made,
        q_offset=OFFSETS["part"],
    )  # fmt: skip


def test_plans_are_found_by_their_offsets():
    cu, other, plans = torch.tensor([0, 4]), int32(1), PlanCache()
    q_offset, how = int32(3), {"window": (-1, 0), "total_q": 4, "total_k": 4}
    first = plans.get(cu, None, q_offset=q_offset, **how)
    assert plans.get(cu, None, q_offset=q_offset, **how) is first
    assert plans.get(cu, None, **how).q_offset is None
    assert plans.get(cu, None, q_offset=other, **how).q_offset.tolist() == [1]
    q_offset[0] = 7
    assert plans.get(cu, None, q_offset=q_offset, **how).q_offset.tolist() == [7]
    # The same tensor on either side of the keys' lengths is not the same call.
    lengths = int32(0, 4)
    assert plans.get(cu, lengths, window=(-1, 0), total_q=4, total_k=4).q_offset is None


def test_change_of_offsets_in_place_is_seen():
    batch, q_offset = make_batch([3], [5]), int32(0)
    first = native(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True, q_offset=q_offset
    )
    q_offset[0] = 2
    second = native(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True, q_offset=q_offset
    )
    want = native(batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True)
    assert not torch.equal(first, second) and torch.equal(second, want)


# The compiler, and the operators.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo's own
def test_compiles_whole():
    batch, q_offset = make_batch([20, 0, 33], [40, 7, 12], 2, 1), int32(5, 0, -10)
    made = gapless.VarlenPlan.make(batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True, q_offset=q_offset)

    def layer(q, k, v, cu_q, cu_k, *, sinks, return_lse, **options):
        return gapless.varlen_attention(
            q * 2, k, v, cu_q, cu_k, causal=True, window=(9, -1), return_lse=True, impl="native", **options
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for options in ({"q_offset": q_offset}, {"plan": made}):
        for a, b in zip(attend(compiled, batch, **options), attend(layer, batch, **options), strict=True):
            assert a is None or torch.equal(a, b)


def test_operators():
    batch, q_offset = make_batch([20, 0, 33], [40, 7, 12], 2, 1, 12, 20), int32(5, 0, -10)
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q, batch.cu_seqlens_k, q_offset=q_offset).tensors
    score, window = [0.25, 2.0], [9, 0]
    forward = batch.q, batch.k, batch.v, plan, None, None, None, None, score, window
    torch.library.opcheck(_native.varlen_attention_fwd, forward)
    out, lse = _native.varlen_attention_fwd(*forward)
    backward = batch.dout, batch.dlse, batch.q, batch.k, batch.v, out, lse, plan, None, None, score, window
    torch.library.opcheck(_native.varlen_attention_bwd, backward)
    arguments = batch.cu_seqlens_q, batch.cu_seqlens_k, 53, 59, window, q_offset
    torch.library.opcheck(registry.varlen_plan, arguments)
    assert all(map(torch.equal, registry.varlen_plan(*arguments)[:2], plan[:2]))


@pytest.mark.parametrize(
    ("fifth", "message"),
    [
        ([int32(1, 2, 3)], "q_offset"),
        ([torch.tensor([1, 2])], "q_offset"),
        ([int32(1, 2).float()], "q_offset"),
        ([int32(1, 2)[None]], "q_offset"),
        ([int32(1, 2), int32(1, 2)], "plan has 6 tensors: it has to have 4, or 5 with q_offset"),
    ],
)
def test_operators_refuse(fifth: list[Tensor], message: str):
    batch = make_batch([5, 3])
    plan = [*gapless.VarlenPlan.make(batch.cu_seqlens_q).tensors, *fifth]
    with pytest.raises(RuntimeError, match=message):
        _native.varlen_attention_fwd(
            batch.q, batch.k, batch.v, plan, None, None, None, None, [1.0, 0.0], [-1, -1]
        )


# Errors.

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([1, 2], TypeError, "q_offset is of type list: it has to be a tensor"),
    "int64": (torch.tensor([1, 2]), TypeError, "q_offset is torch.int64: it has to be torch.int32"),
    "float": (torch.ones(2), TypeError, "q_offset is torch.float32: it has to be torch.int32"),
    "too long": (int32(1, 2, 3), ValueError, "q_offset has shape [3]: it has to be [2]"),
    "a number": (int32(1)[0], ValueError, "q_offset has shape []: it has to be [2]"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_wrong_offsets(name: str, impl: str):
    wrong, error, message = WRONG[name]
    batch = make_batch([5, 3])
    with pytest.raises(error) as raised:
        gapless.varlen_attention(batch.q, batch.k, batch.v, batch.cu_seqlens_q, q_offset=wrong, impl=impl)
    assert str(raised.value) == message
    with pytest.raises(error) as raised:
        gapless.VarlenPlan.make(batch.cu_seqlens_q, q_offset=wrong)
    assert str(raised.value) == message


def test_wrong_company():
    batch, q_offset = make_batch([5, 3]), int32(1, 2)
    args = batch.q, batch.k, batch.v, batch.cu_seqlens_q
    with pytest.raises(ValueError, match="q_offset is on meta"):
        native(*args, q_offset=q_offset.to("meta"))
    with pytest.raises(ValueError, match="plan has no q_offset, q_offset is given"):
        native(*args, q_offset=q_offset, plan=gapless.VarlenPlan.make(batch.cu_seqlens_q))
    made = gapless.VarlenPlan.make(batch.cu_seqlens_q, q_offset=q_offset)
    with pytest.raises(
        ValueError, match=r"q_offset is \[1, 3\], plan.q_offset is \[1, 2\]: they have to be the same"
    ):
        native(*args, q_offset=int32(1, 3), plan=made)
    with pytest.raises(
        ValueError, match=r"window is \(-1, 2147483648\): with q_offset each has to be at most"
    ):
        native(*args, q_offset=q_offset, window=(-1, 2**31))
    native(*args, q_offset=q_offset, window=(-1, 2**31), causal=True)
    with pytest.raises(ValueError, match="plan has a q_offset: blocks"):
        gapless.attention_with_mass(*args[:3], cu_seqlens_q=args[3], plan=made)
    with pytest.raises(ValueError, match="it has no q_offset"):
        gapless.varlen_attention(*args, q_offset=q_offset, impl="flash_attn")


def test_flash_attn_is_not_for_offsets():
    q = torch.empty(1, 1, 64, dtype=FP16)
    none = Inputs(q, q, q, None, None, None, None, 0.0, False, False)
    assert "it has no q_offset" in REASONS["flash_attn"](none._replace(q_offset=int32(1)))
    assert "it has no q_offset" not in REASONS["flash_attn"](none)


def test_reference_function_takes_offsets():
    batch = make_batch([4], [4])
    out, _ = reference.varlen_attention(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, causal=True, q_offset=int32(-2)
    )
    assert (out[:2] == 0).all() and (out[2:] != 0).any()
