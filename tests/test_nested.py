# SPDX-License-Identifier: Apache-2.0
"""gapless.nested_attention against scaled_dot_product_attention on each sequence alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import gapless
from gapless.testing import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore:.*nested:UserWarning", "ignore:.*is_fx_tracing.*")

LENGTHS_Q, LENGTHS_K = [3, 0, 5, 2], [4, 2, 5, 0]


def parts(lengths, heads, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, dim, generator=generator, requires_grad=True) for n in lengths]


def nest(tensors, offsets=None):
    if offsets is None:
        offsets = torch.tensor([0, *(t.shape[0] for t in tensors)]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.cat(tensors), offsets=offsets)


def alone(qs, ks, vs, dtype):
    """[tokens, heads, dim] from torch, sequence by sequence; rows without keys give 0."""
    outs = []
    for q, k, v in zip(qs, ks, vs, strict=True):
        if k.shape[0] == 0 or q.shape[0] == 0:
            outs.append((q * 0.0).to(dtype))
            continue
        q, k, v = (t.to(dtype).transpose(0, 1)[None] for t in (q, k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        outs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(transposed):
    qs, ks, vs = parts(LENGTHS_Q, 4), parts(LENGTHS_K, 2, seed=1), parts(LENGTHS_K, 2, seed=2)
    leaves = [*qs, *ks, *vs]

    def gradients(out):
        (out.double() * torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape)).sum().backward()
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        for t in leaves:
            t.grad = None
        return [out.detach(), *grads]

    q, k, v = nest(qs), nest(ks), nest(vs)
    if transposed:
        out = gapless.nested_attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        assert out.shape[1] == 4 and out._ragged_idx == 2
        out = out.transpose(1, 2)
    else:
        out = gapless.nested_attention(q, k, v, causal=True)
    assert out.shape == q.shape and (out + q).shape == q.shape  # the same jagged size
    actual = gradients(out.values())
    oracle, witness = (gradients(alone(qs, ks, vs, dtype)) for dtype in (torch.float64, torch.float32))
    for got in zip(actual, oracle, witness, strict=True):
        assert_within_budget(*got)


def test_lse():
    q = nest(parts(LENGTHS_Q, 2))
    _, lse = gapless.nested_attention(q, q, q, return_lse=True)
    assert lse.shape == (*q.shape[:2], 2) and lse.values().isfinite().all()


def test_refusals():
    q, k = nest(parts(LENGTHS_Q, 2)), nest(parts(LENGTHS_K, 2))
    with pytest.raises(TypeError, match="nt_k is dense"):
        gapless.nested_attention(q, torch.randn(4, 3, 2, 8), k)
    with pytest.raises(ValueError, match="nt_v are"):
        gapless.nested_attention(q, q, k)
    with pytest.raises(ValueError, match="jagged dims"):
        gapless.nested_attention(q, k.transpose(1, 2), k)
    with pytest.raises(ValueError, match="3 dims"):
        gapless.nested_attention(q, nest([torch.randn(3, 8)]), k)
    holes = torch.nested.nested_tensor_from_jagged(
        torch.randn(6, 2, 8), offsets=torch.tensor([0, 3, 6]), lengths=torch.tensor([1, 2])
    )
    with pytest.raises(ValueError, match="holes"):
        gapless.nested_attention(holes, k, k)
