# SPDX-License-Identifier: Apache-2.0
"""Is a result right? A sample of its rows against the reference in float64, within the error budget."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gapless.bench.cases import Case, Inputs
from gapless.reference.varlen import attention
from gapless.testing import assert_within_budget

ROWS = 64  # rows in a sample: the reference keeps heads x ROWS x keys scores


def _samples(case: Case) -> Iterator[tuple[int, int, int]]:
    """(sequence, first row, end row): both ends of the shortest, the middle and the longest sequence."""
    order = [int(i) for i in np.argsort([q for q, _ in case.lengths], kind="stable") if case.lengths[i][0]]
    if not order:
        return
    for i in dict.fromkeys((order[0], order[len(order) // 2], order[-1])):
        rows = case.lengths[i][0]
        yield i, max(0, rows - ROWS), rows
        if rows > ROWS:
            yield i, 0, ROWS


def _reference(case: Case, tensors: list[Tensor], dout: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (t.detach().to(dtype).requires_grad_(dout is not None) for t in tensors)
    group = case.heads // case.kv_heads
    out, _ = attention(
        q,
        k.repeat_interleave(group, dim=1),
        v.repeat_interleave(group, dim=1),
        scale=case.dim**-0.5,
        window=(-1, 0 if case.causal else -1),
    )
    if dout is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]


def check(inputs: Inputs, out: Tensor, grads: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """Raise an AssertionError if a sampled row is outside the budget.

    Args:
        out: [tokens_q, heads, dim].
        grads: (dq, dk, dv) for ``inputs.dout``. dk and dv are looked at where the sampled rows are the only ones that
            see those keys: in whole sequences of at most ``ROWS``, and in the last keys of causal self-attention.
    """
    case = inputs.case
    first_q = np.cumsum([0, *inputs.lengths_q])
    first_k = np.cumsum([0, *inputs.lengths_k])
    samples: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
    for i, a, b in _samples(case):
        len_q, len_k = case.lengths[i]
        seen = max(0, len_k - len_q + b) if case.causal else len_k
        rows = slice(int(first_q[i]) + a, int(first_q[i]) + b)
        keys = slice(int(first_k[i]), int(first_k[i]) + seen)
        tensors = [inputs.q[rows], inputs.k[keys], inputs.v[keys]]
        dout = None if grads is None else inputs.dout[rows]
        oracle = _reference(case, tensors, dout, torch.float64)
        witness = _reference(case, tensors, dout, inputs.q.dtype)
        actual = [out[rows].detach()]
        if grads is not None:
            own = 0 if b - a == len_q else seen  # first key that no row outside the sample sees
            if case.causal and case.self_attention and b == len_q:
                own = min(own, a)
            actual += [grads[0][rows], *(g[keys][own:] for g in grads[1:])]
            for results in (oracle, witness):
                results[2:] = [g[own:] for g in results[2:]]
        samples.append((actual, oracle, witness))
    # One budget for each tensor, as everywhere: a short sequence alone may have a gradient of exactly zero.
    tensors_of_samples = zip(*(zip(*sample, strict=True) for sample in samples), strict=True)
    for name, parts in zip(("out", "dq", "dk", "dv"), tensors_of_samples, strict=False):
        actual_rows, oracle_rows, witness_rows = (torch.cat(rows) for rows in zip(*parts, strict=True))
        if actual_rows.numel():
            assert_within_budget(actual_rows, oracle_rows, witness_rows, name=name)
