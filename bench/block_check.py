# SPDX-License-Identifier: Apache-2.0
"""Is a result of block-sparse attention right? A few rows of blocks against the reference, within the error budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gapless.bench.block_cases import Problem
from gapless.reference import block_sparse as reference
from gapless.testing import assert_within_budget

if TYPE_CHECKING:
    from gapless import BlockLayout
    from gapless.bench.peers import Run


def verdict(check: Callable[[], None]) -> str:
    """``ok``, or in what the result is wrong."""
    try:
        check()
    except AssertionError as error:
        return (str(error).strip().splitlines() or ["wrong"])[0]
    return "ok"


def _sample(problem: Problem) -> tuple[Tensor, Tensor]:
    """Query blocks at both ends and in the middle, and the rows of their queries."""
    blocks = problem.mask.shape[1]
    chosen = torch.tensor(sorted({0, blocks // 2, blocks - 1}), device=problem.q.device)
    size = problem.case.block
    rows = (chosen[:, None] * size + torch.arange(size, device=chosen.device)).flatten()
    return chosen, rows[rows < problem.case.tokens]


def _sub_layout(problem: Problem, chosen: Tensor, rows: Tensor) -> BlockLayout:
    """The sampled rows as a sequence of their own, over all keys."""
    from gapless import BlockLayout

    case = problem.case
    mask = problem.mask[:, chosen]
    return BlockLayout.from_mask(
        mask, block_q=case.block, block_k=case.block, lengths_q=len(rows), lengths_k=case.tokens
    )


def sampled(problem: Problem) -> Problem:
    """With a gradient of the result in the sampled rows only: then those alone decide all other gradients."""
    _, rows = _sample(problem)
    dout = torch.zeros_like(problem.dout)
    dout[rows] = problem.dout[rows]
    return dataclasses.replace(problem, dout=dout)


def check_attention(problem: Problem, run: Run) -> None:
    """Raise an AssertionError if a sampled row is outside the budget.

    Args:
        problem: from :func:`sampled` where gradients are checked, that is in direction ``bwd``.
        run: of that problem.
    """
    with_grads = problem.case.direction == "bwd"
    outs, grads = run.train() if with_grads else (run.infer(), ())
    chosen, rows = _sample(problem)
    layout = _sub_layout(problem, chosen, rows)

    def expected(dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            x.detach().to(dtype).requires_grad_(with_grads) for x in (problem.q[rows], problem.k, problem.v)
        ]
        out, _ = reference.block_sparse_attention(*leaves, layout)
        if not with_grads:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, problem.dout[rows].to(dtype))]

    oracle, witness = expected(torch.float64), expected(problem.q.dtype)
    actual = [run.pack(outs)[rows].detach()]
    if with_grads:
        dq, dk, dv = run.pack_grads(grads)
        actual += [dq[rows], dk, dv]
    for name, a, o, w in zip(("out", "dq", "dk", "dv"), actual, oracle, witness, strict=False):
        assert_within_budget(a, o, w, name=name)


def check_mass(problem: Problem, lse: Tensor, mass: Tensor) -> None:
    """Raise an AssertionError if the mass of a sampled row of blocks is outside the budget.

    Args:
        lse: [heads, tokens], by which the mass was made.
        mass: [heads, blocks, blocks].
    """
    chosen, rows = _sample(problem)
    layout = _sub_layout(problem.all_blocks(), chosen, rows)
    grid = layout.grid

    def expected(dtype: torch.dtype) -> Tensor:
        q, k, v = (x.to(dtype) for x in (problem.q[rows], problem.k, problem.v))
        _, own = reference.block_sparse_attention(q, k, v, layout)
        return reference.block_mass(
            q, k, own if dtype == torch.float64 else lse[:, rows],
            cu_seqlens_q=grid.cu_seqlens_q, cu_seqlens_k=grid.cu_seqlens_k,
            block_q=grid.block_q, block_k=grid.block_k,
        )  # fmt: skip

    assert_within_budget(mass[:, chosen], expected(torch.float64), expected(problem.q.dtype), name="mass")
