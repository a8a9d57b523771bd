# SPDX-License-Identifier: Apache-2.0
"""Bad input of the block-sparse functions: Python names the argument and its value, raw operators refuse the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import gapless
from gapless import _native
from gapless.ops.impl import choose
from gapless.ops.registry import REASONS

DIM, TOKENS, HEADS, KV_HEADS = 16, 100, 4, 2
Q, K = torch.ones(TOKENS, HEADS, DIM), torch.ones(TOKENS, KV_HEADS, DIM)
LEAF = torch.ones(TOKENS, HEADS, DIM, requires_grad=True)
LSE = torch.zeros(HEADS, TOKENS)
CU = torch.tensor([0, 70, 100], dtype=torch.int32)
LENGTHS = (70, 30)
# 3 query blocks of 32 and 1; each sequence's key blocks are as many.
MASK = torch.tensor([[[1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0]]], dtype=torch.bool)


def layout_of(heads: int = 1, lengths: Any = LENGTHS, **options: Any) -> gapless.BlockLayout:
    mask = MASK.repeat(heads, 1, 1)
    return gapless.BlockLayout.from_mask(
        mask, block_q=32, block_k=32, lengths_q=lengths, lengths_k=lengths, **options
    )


LAYOUT = layout_of()


def attention(change: dict[str, Any]) -> Any:
    return gapless.block_sparse_attention(**{"q": Q, "k": K, "v": K, "layout": LAYOUT} | change)


def mass(change: dict[str, Any]) -> Any:
    return gapless.block_mass(**{"q": Q, "k": K, "lse": LSE, "cu_seqlens_q": CU} | change)


def with_mass(change: dict[str, Any]) -> Any:
    return gapless.attention_with_mass(**{"q": Q, "k": K, "v": K, "cu_seqlens_q": CU} | change)


FLAT = torch.ones(TOKENS, 4)
TENSORS = [  # what all three say of q, k and v
    ("q_list", {"q": [1.0]}, TypeError, ["q is [1.0]", "tensor"]),
    ("q_rank", {"q": FLAT}, ValueError, ["q has shape [100, 4]", "[tokens, heads, dim]"]),
    ("k_rank", {"k": FLAT}, ValueError, ["k has shape [100, 4]", "[tokens, kv_heads, dim]"]),
    ("k_dtype", {"k": K.half()}, TypeError, ["k is torch.float16", "q is torch.float32"]),
    ("k_device", {"k": K.to("meta")}, ValueError, ["k is on meta", "q is on cpu", "one device"]),
    ("dims", {"k": torch.ones(TOKENS, 2, 8)}, ValueError, ["head dim 8", "16"]),
    ("heads", {"q": torch.ones(TOKENS, 3, DIM)}, ValueError, ["q has 3 heads", "k has 2"]),
    ("scale", {"scale": float("nan")}, ValueError, ["scale is nan", "finite"]),
    ("scale_tensor", {"scale": Q}, TypeError, ["scale is", "number"]),
    ("softcap", {"softcap": -1.0}, ValueError, ["softcap is -1.0", "positive"]),
    ("impl", {"impl": "fast"}, ValueError, ["impl='fast'", "'native'", "'triton'", "'reference'"]),
    ("impl_list", {"impl": []}, TypeError, ["impl is []", "string"]),
]
ATTENTION = [
    *TENSORS,
    ("v_tokens", {"v": K[1:]}, ValueError, ["k has shape [100, 2, 16]", "v has [99, 2, 16]"]),
    ("layout_mask", {"layout": MASK}, TypeError, ["layout is tensor", "BlockLayout"]),
    ("layout_none", {"layout": None}, TypeError, ["layout is None", "BlockLayout"]),
    ("layout_device", {"layout": LAYOUT.to("meta")}, ValueError, ["layout is on meta", "cpu", "to("]),
    ("layout_heads", {"layout": layout_of(3)}, ValueError, ["layout has 3 heads", "q has 4", "k has 2", "1, 2, 4"]),
    ("layout_q", {"q": Q[1:]}, ValueError, ["layout is for 100 tokens in 2 sequences", "q has 99"]),
    ("layout_k", {"k": K[1:], "v": K[1:]}, ValueError, ["layout is for 100 tokens", "k has 99"]),
    ("plan_type", {"plan": LAYOUT}, TypeError, ["plan is BlockLayout", "it has to be a BlockPlan"]),
    ("plan_other", {"plan": layout_of().plan()}, ValueError, ["plan is of BlockLayout", "layout.plan(causal)"]),
    ("plan_causal", {"plan": LAYOUT.plan(True)}, ValueError, ["plan is for causal=True", "causal is False"]),
    ("layout_lengths", {"layout": layout_of(lengths=(70, 31))}, ValueError, ["101 tokens", "q has 100"]),
]  # fmt: skip
DENSE = [
    *TENSORS,
    ("block_q", {"block_q": 48}, ValueError, ["block_q is 48", "16, 32, 64, 128, 256"]),
    ("block_k", {"block_k": True}, ValueError, ["block_k is True", "16, 32, 64, 128, 256"]),
    ("cu_type", {"cu_seqlens_q": [0, 70, 100]}, TypeError, ["cu_seqlens_q is [0, 70, 100]", "tensor"]),
    ("cu_dtype", {"cu_seqlens_q": CU.float()}, TypeError, ["cu_seqlens_q is torch.float32", "int32"]),
    ("cu_end", {"cu_seqlens_q": CU - torch.tensor([0, 0, 1])}, ValueError, ["cu_seqlens_q", "99", "100"]),
    ("cu_falls", {"cu_seqlens_q": torch.tensor([0, 80, 70, 100])}, ValueError, ["cu_seqlens_q[2]", "70"]),
    ("cu_k_batch", {"cu_seqlens_k": torch.tensor([0, 100])}, ValueError, ["cu_seqlens_k has 2", "3"]),
    ("cu_k_missing", {"q": Q[:30], "lse": LSE[:, :30]}, ValueError, ["k has 100", "q has 30", "cu_seqlens_k"]),
    ("plan_type", {"plan": CU}, TypeError, ["plan is tensor", "VarlenPlan"]),
    ("plan_batch", {"plan": gapless.VarlenPlan.make(CU[[0, 2]])}, ValueError, ["1 sequences", "2"]),
    ("plan_tokens", {"plan": gapless.VarlenPlan.make(CU + torch.tensor([0, 0, 1], dtype=torch.int32))},
     ValueError, ["plan.cu_seqlens_q ends at 101", "100"]),
    ("gradient", {"q": LEAF}, ValueError, ["q requires a gradient", "no_grad"]),
    ("cu_device", {"cu_seqlens_q": CU.to("meta")}, ValueError, ["cu_seqlens_q is on meta", "q is on cpu"]),
]  # fmt: skip
MASS = [
    *DENSE,
    ("lse_type", {"lse": 1.0}, TypeError, ["lse is 1.0", "tensor"]),
    ("lse_dtype", {"lse": LSE.half()}, TypeError, ["lse is torch.float16", "torch.float32"]),
    ("lse_wide", {"lse": LSE.double()}, TypeError, ["lse is torch.float64", "torch.float32"]),
    ("lse_shape", {"lse": LSE.mT}, ValueError, ["lse has shape [100, 4]", "[4, 100]"]),
    ("lse_device", {"lse": LSE.to("meta")}, ValueError, ["lse is on meta", "cpu"]),
]
CASES = [
    *((attention, *case) for case in ATTENTION),
    *((mass, *case) for case in MASS),
    *((with_mass, case[0], {k: v for k, v in case[1].items() if k != "lse"}, *case[2:]) for case in DENSE),
]


@pytest.mark.parametrize(
    ("function", "name", "change", "error", "words"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES]
)
def test_bad_arguments_are_named(
    function: Callable[[dict], Any], name: str, change: dict[str, Any], error: type, words: list[str]
):
    if function is mass and name == "k_dtype":
        words = words[:1]
    with pytest.raises(error) as caught:
        function(dict(change))
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_the_good_calls_are_good(impl: str):
    assert attention({"impl": impl}).shape == Q.shape
    assert mass({"impl": impl, "block_q": 32}).shape == (HEADS, 4, 2)
    out, lse, found = with_mass({"impl": impl})
    assert (out.shape, lse.shape, found.shape) == (Q.shape, (HEADS, TOKENS), (HEADS, 3, 2))
    with torch.no_grad():  # where a gradient would be, but is not asked for
        with_mass({"q": LEAF, "impl": impl})


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_good_pattern_heads(heads: int):
    assert attention({"layout": layout_of(heads)}).shape == Q.shape


def test_devices_without_a_kernel_are_refused():
    q = Q.to("meta")
    change = {"q": q, "k": q, "v": q, "layout": LAYOUT.to("meta"), "impl": "native"}
    with pytest.raises(ValueError, match="impl='native' cannot take these inputs: it has no kernel for meta"):
        attention(change)


def test_auto_lists_every_reason():
    with pytest.raises(ValueError, match="no implementation takes these inputs: one: it is full; two: it is"):
        choose("auto", {"one": lambda _: ["it is full"], "two": lambda _: ["it is away"]}, None)


def test_triton_has_no_float64():
    pytest.importorskip("triton")
    wide = {name: x.double() for name, x in (("q", Q), ("k", K), ("v", K))}
    with pytest.raises(ValueError, match=r"impl='triton' cannot take these inputs: .*it has no float64"):
        attention({**wide, "impl": "triton"})
    assert attention(wide).dtype == torch.float64


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # torch's own, in its decompositions
def test_forward_mode_derivatives():
    """Only the reference has them; the others say so, and the mass has none."""

    generator = torch.Generator().manual_seed(0)
    q, tangent, dout = (torch.randn(Q.shape, generator=generator) for _ in range(3))
    keys = {name: torch.randn(K.shape, generator=generator) for name in "kv"}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tangent)
        got = forward_ad.unpack_dual(attention(keys | {"q": dual})).tangent
        with pytest.raises(ValueError, match="it has no forward-mode derivatives"):
            attention(keys | {"q": dual, "impl": "native"})
        with pytest.raises(ValueError, match="q requires a gradient"):
            with_mass({"q": dual})
    leaf = q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(attention(keys | {"q": leaf}), leaf, dout)
    torch.testing.assert_close((got * dout).sum(), (dq * tangent).sum())


def test_every_implementation_is_listed():
    assert list(REASONS) == ["native", "triton", "reference"]


# The raw operators: what would touch memory that is not theirs.


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


NAMES = [
    "cu_seqlens_q",
    "cu_seqlens_k",
    "offsets",
    "ids",
    "partial_offsets",
    "partial_ids",
    "kinds",
    "patterns",
]
GOOD = dict(zip(NAMES, LAYOUT.tensors, strict=True))
OFFSETS = GOOD["offsets"]
RAW = {
    "cu_falls": {"cu_seqlens_q": ints(0, 101, 100)},
    "cu_end": {"cu_seqlens_q": ints(0, 70, 101)},
    "cu_k_end": {"cu_seqlens_k": ints(0, 70, 5000)},
    "too_few_rows": {"offsets": OFFSETS[:-1]},
    "offsets_fall": {"offsets": OFFSETS.flip(0)},
    "offsets_beyond": {"offsets": OFFSETS + 1000},
    "offsets_negative": {"offsets": OFFSETS - 1},
    "ids_beyond": {"ids": GOOD["ids"] + 3},
    "ids_negative": {"ids": GOOD["ids"] - 1},
    "ids_missing": {"ids": GOOD["ids"][:-1]},
    "ids_of_another_type": {"ids": GOOD["ids"].long()},
    "partial_without_patterns": {
        "partial_offsets": ints(0, 1, 1, 1, 1), "partial_ids": ints(1), "kinds": ints(0),
    },
    "kind_beyond": {
        "partial_offsets": ints(0, 1, 1, 1, 1), "partial_ids": ints(1), "kinds": ints(1),
        "patterns": torch.zeros(1, 32, 1, dtype=torch.int32),
    },
    "patterns_of_another_block": {
        "partial_offsets": ints(0, 1, 1, 1, 1), "partial_ids": ints(1), "kinds": ints(0),
        "patterns": torch.zeros(1, 16, 1, dtype=torch.int32),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_raw_operators_refuse_wild_lists(name: str):
    lists = [{**GOOD, **RAW[name]}[key] for key in NAMES]
    shared = [32, 32, 1], [0.25, 0.0], [-1, -1]
    with pytest.raises(RuntimeError):
        _native.block_sparse_fwd(Q, K, K, lists, *shared)
    with pytest.raises(RuntimeError):
        _native.block_sparse_bwd(Q, None, Q, K, K, Q, LSE, lists, *shared)


@pytest.mark.parametrize("blocks", [[32, 32], [32, 32, 3], [32, 48, 1], [0, 32, 1], [64, 32, 1]], ids=str)
def test_raw_operators_refuse_other_blocks(blocks: list[int]):
    with pytest.raises(RuntimeError):
        _native.block_sparse_fwd(Q, K, K, LAYOUT.tensors, blocks, [0.25, 0.0], [-1, -1])


@pytest.mark.parametrize(
    "blocks", [[64, 64, 3], [64, 64, 2, 2], [64, 64, 4, 2], [64, 64, 3, 1], [48, 64, 3, 2]], ids=str
)
def test_raw_masses_refuse_other_blocks(blocks: list[int]):
    plan = gapless.VarlenPlan.make(CU).tensors
    with pytest.raises(RuntimeError):
        _native.block_mass(Q, K, LSE, plan, blocks, [0.25, 0.0], [-1, -1])
    with pytest.raises(RuntimeError):
        _native.attention_mass_fwd(Q, K, K, plan, blocks, [0.25, 0.0], [-1, -1])


def test_a_plan_made_ahead_changes_nothing():
    for impl in ("native", "reference"):
        for causal in (False, True):
            plan = LAYOUT.plan(causal, backward=False)
            assert plan.transposed is None
            change = {"causal": causal, "impl": impl}
            assert torch.equal(attention(change | {"plan": plan}), attention(change))
