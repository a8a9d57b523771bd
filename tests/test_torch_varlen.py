# SPDX-License-Identifier: Apache-2.0
"""gapless.varlen_attn against torch's signature and the reference."""

import inspect

import pytest
import torch

import gapless
from gapless.reference.varlen import varlen_attention as reference
from gapless.testing import assert_within_budget

theirs = pytest.importorskip("torch.nn.attention.varlen")

CU_Q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
CU_K = torch.tensor([0, 4, 6, 11], dtype=torch.int32)


def inputs(dtype=torch.float32, kv_heads=4):
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 4, 16), (11, kv_heads, 16), (11, kv_heads, 16)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def test_signature_is_torchs():
    ours, torchs = (
        inspect.signature(f).parameters.values() for f in (gapless.varlen_attn, theirs.varlen_attn)
    )
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in torchs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
def test_values_and_gradients(window, dtype):
    def run(f, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out, lse = f(*tensors)
        (out.double().sum() + lse.double()[lse.isfinite()].sum()).backward()
        return [out.detach(), lse.detach(), *(t.grad for t in tensors)]

    tensors = inputs(dtype, kv_heads=2)
    actual = run(
        lambda q, k, v: gapless.varlen_attn(
            q,
            k,
            v,
            CU_Q,
            CU_K,
            5,
            5,
            return_aux=theirs.AuxRequest(lse=True),
            window_size=window,
            enable_gqa=True,
        ),
        *tensors,
    )
    naive = lambda q, k, v: reference(q, k, v, CU_Q, CU_K, window=window)  # noqa: E731
    for got in zip(actual, run(naive, *(t.double() for t in tensors)), run(naive, *tensors), strict=True):
        assert_within_budget(*got)


def test_returns():
    q, k, v = inputs()
    assert isinstance(gapless.varlen_attn(q, k, v, CU_Q, CU_K, 5, 5), torch.Tensor)
    assert isinstance(
        gapless.varlen_attn(q, k, v, CU_Q, CU_K, 5, 5, return_aux=theirs.AuxRequest()), torch.Tensor
    )
    out, lse = gapless.varlen_attn(
        q, k, v, CU_Q, CU_K, 5, 5, return_aux=theirs.AuxRequest(lse=True), num_splits=1
    )
    assert out.shape == (8, 4, 16) and lse.shape == (4, 8) and lse.dtype == torch.float32


@torch.no_grad()
def test_paged():
    q, k, v = inputs(torch.float32)
    used = torch.tensor([3, 2, 5])
    dense = gapless.varlen_attn(q, k, v, CU_Q, CU_K, 5, 5, seqused_k=used, window_size=(-1, 0))
    pages = [torch.randn(9, 2, 4, 16) for _ in range(2)]
    table = torch.randperm(9).reshape(3, 3).int()
    for x, cache in ((k, pages[0]), (v, pages[1])):
        for i in range(3):
            for j in range(int(used[i])):
                cache[table[i, j // 2], j % 2] = x[CU_K[i] + j]
    paged = gapless.varlen_attn(
        q, *pages, CU_Q, None, 5, 5, seqused_k=used.int(), block_table=table, window_size=(-1, 0)
    )
    torch.testing.assert_close(paged, dense)


def test_unequal_heads_need_enable_gqa():
    with pytest.raises(ValueError, match="enable_gqa"):
        gapless.varlen_attn(*inputs(kv_heads=2), CU_Q, CU_K, 5, 5)
