# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention by others, under the contract of :mod:`gapless.bench.peers`; masks are made beforehand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gapless.bench import peers
from gapless.bench.block_cases import BlockCase, Problem
from gapless.bench.cases import DTYPES
from gapless.bench.peers import Run


@dataclass(frozen=True)
class Implementation(peers.Implementation):
    """``dense``: it computes every block, whatever the mask."""

    dense: bool = False


def _leaves(problem: Problem) -> list[Tensor]:
    wanted = problem.case.direction == "bwd"
    return [t.detach().requires_grad_(wanted) for t in (problem.q, problem.k, problem.v)]


def _gapless(problem: Problem) -> Run:
    from gapless import block_sparse_attention

    q, k, v = _leaves(problem)
    layout = problem.layout
    return Run(lambda: [block_sparse_attention(q, k, v, layout)], [q, k, v], [problem.dout])


def _dense(problem: Problem) -> Run:
    from gapless import varlen_attention

    q, k, v = _leaves(problem)
    cu, plan = problem.cu_seqlens, problem.plan
    return Run(lambda: [varlen_attention(q, k, v, cu, plan=plan)], [q, k, v], [problem.dout])


def _by_heads(x: Tensor) -> Tensor:
    """[tokens, heads, dim] as a view [1, heads, tokens, dim], and back."""
    return x.transpose(0, 1)[None]


def _by_tokens(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def _pack_grads(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return _by_tokens(grads[0]), _by_tokens(grads[1]), _by_tokens(grads[2])


def _sdpa(problem: Problem) -> Run:
    """torch's dense attention."""
    q, k, v = leaves = [_by_heads(x).detach().requires_grad_(x.requires_grad) for x in _leaves(problem)]
    return Run(
        lambda: [F.scaled_dot_product_attention(q, k, v)],
        leaves,
        [_by_heads(problem.dout)],
        lambda outs: _by_tokens(outs[0]),
        _pack_grads,
    )


def _sdpa_mask(problem: Problem) -> Run:
    """torch's attention with a boolean mask of all (query, key) pairs."""
    q, k, v = leaves = [_by_heads(x).detach().requires_grad_(x.requires_grad) for x in _leaves(problem)]
    mask = problem.layout.to_token_mask()[0][None]
    return Run(
        lambda: [F.scaled_dot_product_attention(q, k, v, attn_mask=mask)],
        leaves,
        [_by_heads(problem.dout)],
        lambda outs: _by_tokens(outs[0]),
        _pack_grads,
    )


def _sdpa_mask_unusable(case: BlockCase) -> list[str]:
    # The mask, and what SDPA makes of it: an addend in the dtype of the scores.
    nbytes = case.heads * case.tokens**2 * (1 + DTYPES[case.dtype].itemsize)
    return [f"its mask takes {nbytes / 1e9:.0f} GB"] if nbytes > 8e9 else []


# FlexAttention


def no_compiler(device: str) -> list[str]:
    found = device != "cpu" or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    return [] if found else ["torch.compile needs a C++ compiler, and none is here"]


def _flex_unusable(case: BlockCase) -> list[str]:
    why = no_compiler(case.device)
    if case.device == "cpu" and case.direction == "bwd":
        why.append("it has no backward on the CPU")
    return why


def _mask_mod(problem: Problem) -> Callable[..., Tensor]:
    blocks, size = problem.mask, problem.case.block
    return lambda b, h, i, j: blocks[h, i // size, j // size]


def flex_lists(problem: Problem):
    """FlexAttention's mask from a boolean mask of blocks, all of them full: the shortest way there is."""
    from torch.nn.attention.flex_attention import BlockMask

    mask, tokens = problem.mask[None], problem.case.tokens
    counts = mask.sum(-1, dtype=torch.int32)
    order = torch.argsort(mask.int(), dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), order.clone(), counts, order,  # torch 2.13 does not compile one tensor for both
        BLOCK_SIZE=problem.case.block, mask_mod=_mask_mod(problem), seq_lengths=(tokens, tokens),
    )  # fmt: skip


def flex_builder(problem: Problem) -> Callable[[], object]:
    """FlexAttention's own builder, compiled, from a function that looks up the block; uncompiled it is far slower."""
    from torch.nn.attention.flex_attention import create_block_mask

    case, mask_mod = problem.case, _mask_mod(problem)
    torch.compiler.reset()
    compiled = torch.compile(create_block_mask, dynamic=False)
    return lambda: compiled(
        mask_mod, 1, case.heads, case.tokens, case.tokens, device=case.device, BLOCK_SIZE=case.block
    )


def _flex(problem: Problem) -> Run:
    """Compiled FlexAttention; the mask and the compilation are not timed."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # every shape compiles anew; after eight it would quietly run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = flex_lists(problem)
    q, k, v = leaves = [_by_heads(x).detach().requires_grad_(x.requires_grad) for x in _leaves(problem)]
    return Run(
        lambda: [compiled(q, k, v, block_mask=mask)],
        leaves,
        [_by_heads(problem.dout)],
        lambda outs: _by_tokens(outs[0]),
        _pack_grads,
    )


IMPLEMENTATIONS = {
    i.name: i
    for i in (
        Implementation("gapless", lambda case: [], _gapless, peer=False),
        Implementation("dense", lambda case: [], _dense, peer=False, dense=True),
        Implementation("sdpa", lambda case: [], _sdpa, dense=True),
        Implementation("sdpa_mask", _sdpa_mask_unusable, _sdpa_mask),
        Implementation("flex", _flex_unusable, _flex),
    )
}


def from_path(path: str) -> Implementation:
    """A user's callable ``module:function``.

    It is called as ``function(q, k, v, layout)`` with tensors [tokens, heads, dim] and a :class:`gapless.BlockLayout`,
    the same object every time, and returns [tokens, heads, dim].
    """
    function = peers.load(path)

    def prepare(problem: Problem) -> Run:
        q, k, v = _leaves(problem)
        layout = problem.layout
        return Run(lambda: [function(q, k, v, layout)], [q, k, v], [problem.dout])

    return Implementation(path, lambda case: [], prepare)


def select(
    names: Sequence[str] | None, case: BlockCase
) -> tuple[list[peers.Implementation], dict[str, list[str]]]:
    """Implementations that run ``case``, and why the others do not; names as in :func:`gapless.bench.peers.select`."""
    running, skipped = [], {}
    for implementation in peers.asked(names, IMPLEMENTATIONS, from_path):
        if why := implementation.unusable(case):
            skipped[implementation.name] = why
        else:
            running.append(implementation)
    return running, skipped
