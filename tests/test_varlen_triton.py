# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from torch import Tensor

import gapless
from gapless.ops import registry
from gapless.testing import (
    assert_results,
    assert_within_budget,
    attend,
    make_batch,
    oracle_and_witness,
    scatter_pages,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Numpy, which runs the interpreter, tells of the infinities that masks remove.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

# Several blocks of the interpreter's configuration, their edges, single rows, and sides without tokens.
LENGTHS_Q, LENGTHS_K = (40, 0, 67, 1, 9), (33, 20, 67, 40, 0)
TRUNCATED = (
    "the interpreter cuts float32 to bfloat16 instead of rounding: up to one ulp instead of half of one"
)


def triton_attention(*args, plan=None, **options):
    """gapless.varlen_attention with impl="triton" on DEVICE; results and gradients come back to the CPU."""

    def move(x):
        return x.to(DEVICE) if isinstance(x, Tensor) else x

    options = {name: move(x) for name, x in options.items()}
    plan = plan and plan.to(DEVICE)
    out, lse = gapless.varlen_attention(*map(move, args), plan=plan, impl="triton", **options)
    return out.cpu(), lse.cpu()


def check(batch, **options):
    factor, reason = 2.0, None
    if batch.q.dtype == torch.bfloat16 and DEVICE == "cpu":
        factor, reason = 4.0, TRUNCATED
    plan = options.pop("plan", None)
    oracle, witness = oracle_and_witness(batch, **options)
    assert_results(
        attend(triton_attention, batch, plan=plan, **options), oracle, witness, factor=factor, reason=reason
    )


def slopes(*shape):
    return torch.linspace(0.05, 0.5, torch.Size(shape).numel()).view(shape)


SINKS = torch.tensor([0.5, -1.0])
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (38, 5)},
    "diagonal": {"window": (0, 0)},
    "right only": {"window": (-1, 3)},
    "left only": {"window": (40, -1)},
    "causal window": {"causal": True, "window": (24, 24)},
    "beyond every key": {"window": (2**31 - 1, 2**31 - 1)},
}
SCORES = {
    "softcap": {"softcap": 1.5, "causal": True},
    "wide softcap": {"softcap": 50.0, "scale": 1.0},
    "sinks": {"sinks": SINKS, "causal": True},
    "alibi": {"alibi_slopes": slopes(2), "causal": True},
    "alibi of each sequence": {"alibi_slopes": slopes(5, 2)},
    "all": {"softcap": 3.0, "sinks": SINKS, "alibi_slopes": slopes(2), "window": (30, 2), "scale": 0.3},
}


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in (MASKS | SCORES).items()])
def test_masks_and_scores(options):
    check(make_batch(LENGTHS_Q, LENGTHS_K, heads=2, kv_heads=1), **options)


@pytest.mark.parametrize(
    ("dim", "dim_v"), [(1, 3), (40, 40), (64, 64), (96, 96), (24, 16), (16, 40), (192, 128)], ids=str
)
def test_dims(dim, dim_v):
    check(make_batch((40, 23), dim=dim, dim_v=dim_v), causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_groups(heads, kv_heads):
    check(make_batch((20, 35), heads=heads, kv_heads=kv_heads), causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, SCORES["all"]], ids=["causal", "all"])
def test_low_precision(dtype, options):
    check(make_batch(LENGTHS_Q, LENGTHS_K, heads=2, kv_heads=1, dim=32, dtype=dtype), **options)


def test_low_precision_sinks():
    check(make_batch((30, 9), heads=2, dtype=torch.float16), sinks=SINKS.half(), causal=True)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_nothing(lengths):
    check(make_batch(lengths, heads=2, kv_heads=1), sinks=SINKS)


def test_queries_without_any_key():
    check(make_batch((5, 3), (0, 0), heads=2), sinks=SINKS)
    check(make_batch((5, 3), (0, 0)))


def test_keys_without_any_query():
    check(make_batch((0, 0), (5, 3)))


def test_strides():
    check(make_batch(LENGTHS_Q, LENGTHS_K, heads=2, kv_heads=1, non_contiguous=True), causal=True)


def test_last_dimension_not_contiguous():
    batch = make_batch((20, 9))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (batch.q, batch.k, batch.v))
    actual = triton_attention(q, k, v, batch.cu_seqlens_q, return_lse=True)
    expected = triton_attention(batch.q, batch.k, batch.v, batch.cu_seqlens_q, return_lse=True)
    assert all(map(torch.equal, actual, expected))


def test_expanded_sides():
    batch = make_batch((33, 20), (40, 7))
    sides = {"sinks": torch.tensor(0.5).expand(2), "alibi_slopes": torch.tensor(0.3).expand(2, 2)}
    check(batch, grad=False, seqused_k=torch.tensor(7, dtype=torch.int32).expand(2), **sides)


def test_no_gradient_through_lse():
    check(make_batch((33, 20)), causal=True, dlse=False)


def test_expanded_gradient():
    """The gradient of a sum has strides of 0."""
    batch = make_batch((33, 20))
    leaves = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]
    grads = []
    for dout in (torch.ones(()).expand(batch.dout.shape), torch.ones(batch.dout.shape)):
        out, _ = triton_attention(*leaves, batch.cu_seqlens_q, return_lse=True)
        grads.append(torch.autograd.grad(out, leaves, dout))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize(("block_q", "block_k"), [(24, 40), (128, 128)])
def test_any_tile_length(block_q, block_k):
    batch = make_batch(LENGTHS_Q, LENGTHS_K, heads=2)
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q, batch.cu_seqlens_k, block_q=block_q, block_k=block_k)
    check(batch, causal=True, plan=plan)


def test_seqused():
    batch = make_batch(LENGTHS_Q, LENGTHS_K, heads=2)
    check(batch, grad=False, seqused_k=torch.tensor([33, 0, 40, 7, 0], dtype=torch.int32), causal=True)


@pytest.mark.parametrize("page_size", [1, 8, 48])
def test_pages(page_size):
    lengths_q, lengths_k = (3, 0, 40, 1), (37, 9, 40, 0)
    batch = make_batch(lengths_q, lengths_k, heads=2, kv_heads=1, dim=16, dim_v=24)
    options = {"window": (25, 3), "softcap": 2.0, "sinks": SINKS, "alibi_slopes": slopes(4, 2)}
    oracle, witness = oracle_and_witness(batch, grad=False, **options)
    pages = scatter_pages(batch.k, batch.v, lengths_k, page_size)
    actual = triton_attention(
        batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k, block_table=pages.block_table,
        return_lse=True, **options,
    )  # fmt: skip
    for name, got, want, naive in zip(("out", "lse"), actual, oracle, witness, strict=False):
        assert_within_budget(got, want, naive, name=name)


def test_same_bits_every_time_and_in_any_order():
    lengths = (50, 3, 33)
    batch = make_batch(lengths, heads=2, kv_heads=1)
    first = attend(triton_attention, batch, causal=True, sinks=SINKS)
    again = attend(triton_attention, batch, causal=True, sinks=SINKS)
    assert all(map(torch.equal, first, again))

    order = torch.cat([x.flip(0) for x in torch.arange(sum(lengths)).flip(0).split(lengths[::-1])])
    turned = make_batch(lengths[::-1], heads=2, kv_heads=1)
    for name in ("q", "k", "v", "dout"):
        getattr(turned, name).copy_(getattr(batch, name)[order])
    turned.dlse.copy_(batch.dlse[:, order])
    other = attend(triton_attention, turned, causal=True, sinks=SINKS)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(other, name), getattr(first, name)[order]), name
    assert torch.equal(other.lse, first.lse[:, order])


def test_operators():
    batch = make_batch((20, 0, 5), heads=2, kv_heads=1, dim_v=24)
    q, k, v, dout, dlse, sinks = (
        x.to(DEVICE) for x in (batch.q, batch.k, batch.v, batch.dout, batch.dlse, SINKS)
    )
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q).to(DEVICE).tensors
    score, window = [0.25, 2.0], [-1, 0]
    forward = (q, k, v, plan, None, None, None, sinks, score, window)
    out, lse = registry.varlen_attention_fwd_triton(*forward)
    torch.library.opcheck(registry.varlen_attention_fwd_triton, forward)
    for some_dlse, some_sinks in ((dlse, sinks), (None, None)):
        backward = (dout, some_dlse, q, k, v, out, lse, plan, None, some_sinks, score, window)
        torch.library.opcheck(registry.varlen_attention_bwd_triton, backward)
