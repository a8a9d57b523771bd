# SPDX-License-Identifier: Apache-2.0
"""The block-sparse Triton kernels against the reference: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import gapless
from gapless.ops import registry
from gapless.testing import (
    Batch,
    Results,
    assert_results,
    assert_within_budget,
    make_batch,
    oracle_and_witness,
)
from gapless.testing.block_sparse import attend_layout, layout_oracle_and_witness, make_layout

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Numpy, which runs the interpreter, tells of the infinities that masks remove.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:All-NaN slice encountered:RuntimeWarning"
)

TRUNCATED = (
    "the interpreter cuts float32 to bfloat16 instead of rounding: up to one ulp instead of half of one"
)
ONE_KEY = (
    "with one key to a row, dout . v - delta cancels to rounding that the reference's softmax does not have"
)
# Lengths off the block size, longer and shorter on either side, and sides without tokens.
LENGTHS_Q, LENGTHS_K = (50, 0, 33, 9), (40, 20, 70, 0)


def triton_attention(q, k, v, layout, **options):
    """gapless.block_sparse_attention with impl="triton" on DEVICE; results and gradients come back to the CPU."""
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    found = gapless.block_sparse_attention(q, k, v, layout.to(DEVICE), impl="triton", **options)
    return tuple(x.cpu() for x in found)


def run(batch: Batch, layout, **options) -> Results:
    return attend_layout(triton_attention, batch, layout, **options)


def check(batch: Batch, layout, factor: float = 2.0, reason: str | None = None, **options) -> Results:
    if batch.q.dtype == torch.bfloat16 and DEVICE == "cpu":
        factor, reason = 4.0, TRUNCATED
    actual = run(batch, layout, **options)
    oracle, witness = layout_oracle_and_witness(batch, layout, **options)
    assert_results(actual, oracle, witness, factor=factor, reason=reason)
    return actual


def layout_of(*lengths, **options):
    """Random blocks of 32 x 32, small enough to be many."""
    return make_layout(*lengths, **{"block_q": 32, "block_k": 32, "density": 0.6, **options})


class Case(NamedTuple):
    heads: int = 2
    kv_heads: int = 1
    layout: dict = {}
    options: dict = {}


CASES = {
    "full": Case(),
    "causal": Case(options={"causal": True}),
    "partial": Case(layout={"partial": 0.6}),
    "partial causal": Case(layout={"partial": 0.6}, options={"causal": True}),
    "softcap": Case(options={"softcap": 1.5, "scale": 0.7, "causal": True}),
    "everything kept": Case(layout={"density": 1.0}, options={"causal": True}),
    "nothing kept": Case(layout={"density": 0.0}),
    "pattern of each head": Case(layout={"heads": 2}, options={"causal": True}),
    "pattern of each kv head": Case(4, 2, {"heads": 2}),
    "patterns between": Case(4, 1, {"heads": 2, "partial": 0.6}),
    "one pattern, many kv heads": Case(3, 3, {"partial": 0.6}, {"causal": True}),
    "more kv heads than patterns": Case(4, 4, {"heads": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str):
    case = CASES[name]
    batch = make_batch(LENGTHS_Q, LENGTHS_K, case.heads, case.kv_heads, dim=16, dim_v=24)
    check(batch, layout_of(LENGTHS_Q, LENGTHS_K, **case.layout), **case.options)


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (16, 128), (256, 16)])
def test_blocks(block_q: int, block_k: int):
    lengths = (150, 20)
    layout = layout_of(lengths, block_q=block_q, block_k=block_k, partial=0.6)
    check(make_batch(lengths, heads=1), layout, causal=True)


@pytest.mark.parametrize(("dim", "dim_v"), [(1, 3), (40, 16), (64, 64), (128, 128)])
def test_dims(dim: int, dim_v: int):
    check(make_batch((40, 23), dim=dim, dim_v=dim_v), layout_of((40, 23)), causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype):
    batch = make_batch(LENGTHS_Q, LENGTHS_K, heads=2, kv_heads=1, dim=32, dtype=dtype)
    check(batch, layout_of(LENGTHS_Q, LENGTHS_K, partial=0.6), causal=True, softcap=3.0)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_nothing(lengths):
    check(make_batch(lengths, heads=2, kv_heads=1), layout_of(lengths), causal=True)


def test_sequences_of_one_token():
    """Many, as a single witness may be lucky; the first of them alone is the same."""
    lengths = (1,) * 9
    batch = make_batch(lengths)
    found = check(batch, layout_of(lengths, density=1.0), factor=4.0, reason=ONE_KEY, causal=True)
    q, k, v, dout = (t[:1] for t in (batch.q, batch.k, batch.v, batch.dout))
    first = Batch(q, k, v, batch.cu_seqlens_q[:2], None, dout, batch.dlse[:, :1])
    alone = run(first, layout_of((1,), density=1.0), causal=True)
    assert torch.equal(alone.lse, found.lse[:, :1])
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(alone, name), getattr(found, name)[:1]), name


def test_one_side_is_empty():
    check(make_batch((5, 0), (0, 5)), layout_of((5, 0), (0, 5)))


@pytest.mark.parametrize("causal", [False, True])
def test_what_nobody_lists_is_not_read(causal: bool):
    """Rows without keys and keys without rows: 0, -inf and exactly zero gradients; NaN there goes nowhere."""
    mask = torch.tensor([[[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 0, 1]]], dtype=torch.bool)
    layout = gapless.BlockLayout.from_mask(mask, block_q=16, block_k=16, lengths_q=60)
    batch = make_batch((60,), heads=2, kv_heads=1)
    clean = check(batch, layout, causal=causal)
    for x in (batch.k, batch.v):
        x[32:48] = torch.nan
    batch.q[16:32] = torch.nan
    dirty = run(batch, layout, causal=causal)
    assert all(map(torch.equal, clean[:5], dirty[:5]))
    for rows in (dirty.out[16:32], dirty.dq[16:32], dirty.dk[32:48], dirty.dv[32:48]):
        assert not rows.any()
    assert (dirty.lse[:, 16:32] == -torch.inf).all()


def test_blocks_above_the_diagonal_are_skipped():
    """A causal call does not read what it cannot see, though the layout lists it."""
    layout = layout_of((64,), density=1.0, block_q=16, block_k=16)
    batch = make_batch((64,), heads=1)
    want = run(batch, layout, causal=True)
    batch.k[48:], batch.v[48:] = torch.nan, torch.nan
    got = run(batch, layout, causal=True)
    assert torch.equal(got.out[:48], want.out[:48])
    assert torch.equal(got.dq[:48], want.dq[:48])


def test_every_block_is_dense_attention():
    lengths = (70, 33)
    batch = make_batch(lengths, heads=2, kv_heads=1)
    layout = layout_of(lengths, density=1.0, block_q=64, block_k=64)
    actual = run(batch, layout, causal=True)

    assert_results(actual, *oracle_and_witness(batch, causal=True))


def test_strides():
    batch = make_batch(LENGTHS_Q, LENGTHS_K, heads=2, kv_heads=1, non_contiguous=True)
    check(batch, layout_of(LENGTHS_Q, LENGTHS_K), causal=True)


def test_last_dimension_not_contiguous():
    batch, layout = make_batch((40, 9)), layout_of((40, 9))
    want = run(batch, layout)
    odd = {name: getattr(batch, name).mT.contiguous().mT for name in ("q", "k", "v", "dout")}
    assert all(map(torch.equal, run(Batch(**{**vars(batch), **odd}), layout)[:5], want[:5]))


def test_without_a_gradient_of_the_lse():
    check(make_batch((40, 23)), layout_of((40, 23)), dlse=False)


def test_same_bits_every_time():
    lengths = (70, 33)
    batch = make_batch(lengths, heads=2, kv_heads=1)
    layout = layout_of(lengths, heads=2, partial=0.6)
    first, again = (run(batch, layout, causal=True) for _ in range(2))
    assert all(map(torch.equal, first[:5], again[:5]))


def test_operators():
    batch = make_batch((40, 0, 5), heads=2, kv_heads=1, dim_v=24)
    layout = layout_of((40, 0, 5), partial=0.6).to(DEVICE)
    q, k, v, dout, dlse = (x.to(DEVICE) for x in (batch.q, batch.k, batch.v, batch.dout, batch.dlse))
    lists = [*layout.tensors, layout.order(True)]
    shared = [32, 32, 1], [0.25, 2.0], [-1, 0]
    out, lse = registry.block_sparse_fwd_triton(q, k, v, lists, *shared)
    torch.library.opcheck(registry.block_sparse_fwd_triton, (q, k, v, lists, *shared))
    backward = (dout, dlse, q, k, v, out, lse, [*lists, *layout.transposed], *shared)
    torch.library.opcheck(registry.block_sparse_bwd_triton, backward)


# Mass.

MASS_CASES = {
    "causal": ((50, 0, 33, 9), (40, 20, 70, 0), {"causal": True, "block_q": 32, "block_k": 32}),
    "full": ((50, 0, 33, 9), (40, 20, 70, 0), {"block_q": 16, "block_k": 32, "softcap": 2.0, "scale": 0.4}),
    "64": ((130,), None, {"causal": True}),
    "more queries": ((150,), (70,), {"causal": True, "block_q": 128, "block_k": 64}),
    "blocks longer than tiles": ((150, 20), None, {"block_q": 256, "block_k": 16, "causal": True}),
    "no keys": ((5, 3), (0, 0), {}),
    "no batch": ((), None, {}),
}


def run_mass(batch: Batch, impl: str, double: bool = False, **options):
    """(out, LSE, mass in one, mass from the LSE)."""
    device = DEVICE if impl == "triton" else "cpu"
    q, k, v = (x.to(device, torch.float64 if double else None) for x in (batch.q, batch.k, batch.v))
    cu_k = batch.cu_seqlens_k
    where = {
        "cu_seqlens_q": batch.cu_seqlens_q.to(device),
        "cu_seqlens_k": cu_k if cu_k is None else cu_k.to(device),
    }
    out, lse, mass = gapless.attention_with_mass(q, k, v, impl=impl, **where, **options)
    alone = gapless.block_mass(q, k, lse, impl=impl, **where, **options)
    return tuple(x.cpu() for x in (out, lse, mass, alone))


def check_mass(batch: Batch, **options) -> tuple[Tensor, ...]:
    factor, reason = 2.0, None
    if batch.q.dtype == torch.bfloat16 and DEVICE == "cpu":
        factor, reason = 4.0, TRUNCATED
    actual = run_mass(batch, "triton", **options)
    oracle, witness = (
        run_mass(batch, "reference", double=True, **options),
        run_mass(batch, "reference", **options),
    )
    names = ("out", "lse", "mass", "mass alone")
    for name, got, want, naive in zip(names, actual, oracle, witness, strict=True):
        assert_within_budget(got, want, naive, name=name, factor=factor, reason=reason)
    return actual


@pytest.mark.parametrize("name", MASS_CASES)
def test_mass(name: str):
    lengths_q, lengths_k, options = MASS_CASES[name]
    check_mass(make_batch(lengths_q, lengths_k, heads=4, kv_heads=2), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mass_in_low_precision(dtype: torch.dtype):
    check_mass(make_batch((70, 9), heads=2, dim=64, dtype=dtype), causal=True, block_q=32, block_k=32)


@pytest.mark.parametrize("heads_at_a_time", [2, 0])
def test_mass_with_little_memory(heads_at_a_time: int, monkeypatch: pytest.MonkeyPatch):
    """Groups of heads one after another, or the keys read twice: the same as all at once."""
    from gapless.kernels import block_mass

    batch = make_batch((70, 9), heads=6, kv_heads=3)
    options = {"causal": True, "block_q": 32, "block_k": 32}
    want = run_mass(batch, "triton", **options)
    bytes_of_head = 4 * 79 * 3 * (32 // 16 if DEVICE == "cpu" else 1)
    monkeypatch.setattr(block_mass, "SCRATCH", heads_at_a_time * bytes_of_head)
    got = run_mass(batch, "triton", **options)
    assert all(map(torch.equal, got[:2], want[:2]))
    # Reading the keys twice weighs them as the mass alone does.
    assert torch.equal(got[2], want[2] if heads_at_a_time else want[3])


def test_mass_operators():
    batch = make_batch((40, 0, 5), heads=2, kv_heads=1, dim_v=24)
    q, k, v = (x.to(DEVICE) for x in (batch.q, batch.k, batch.v))
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q).to(DEVICE).tensors
    shared = plan, [32, 32, 3, 2], [0.25, 2.0], [-1, 0]
    _, lse, _ = registry.attention_mass_fwd_triton(q, k, v, *shared)
    torch.library.opcheck(registry.attention_mass_fwd_triton, (q, k, v, *shared))
    torch.library.opcheck(registry.block_mass_triton, (q, k, lse, *shared))
