# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts for tests, and what the reference says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gapless.reference import experts as reference
from gapless.reference.experts import GATED
from gapless.testing.budget import assert_within_budget

Found = dict[str, Tensor]  # "out", and "d" and the name of each tensor that a gradient was asked for


@dataclass(frozen=True)
class Experts:
    """A layer, its tokens, and the gradient that arrives at its result; names as in :func:`gapless.fused_experts`."""

    x: Tensor  # [T, H]
    w_gate_up: Tensor  # [E, 2I, H], or [E, I, H]
    w_down: Tensor  # [E, H, I]
    topk_weights: Tensor  # [T, top_k]
    topk_ids: Tensor  # [T, top_k]
    dout: Tensor  # [T, H]
    b_gate_up: Tensor | None = None
    b_down: Tensor | None = None
    identity_weights: Tensor | None = None
    activation: str = "swiglu"
    interleaved: bool = False
    limit: float = 7.0

    @property
    def floats(self) -> dict[str, Tensor]:
        """The tensors that have a gradient."""
        return {
            name: t
            for name, t in vars(self).items()
            if name != "dout" and isinstance(t, Tensor) and t.is_floating_point()
        }

    @property
    def num_experts(self) -> int:
        return self.w_down.shape[0]

    def options(self) -> dict[str, Any]:
        """Everything that goes in by name."""
        skipped = ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids", "dout")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}

    def map(self, function: Callable[[Tensor], Tensor]) -> Experts:
        """With ``function`` of each floating tensor, dout included."""
        return self.having(dout=function(self.dout), **{n: function(t) for n, t in self.floats.items()})

    def having(self, **changes: Any) -> Experts:
        """With these in place of its own."""
        return replace(self, **changes)


def make_experts(
    tokens: int,
    top_k: int = 2,
    experts: int = 4,
    hidden: int = 32,
    inter: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    activation: str = "swiglu",
    interleaved: bool = False,
    limit: float = 7.0,
    biases: bool = False,
    identity: bool = False,
    wide_weights: bool = True,
    none: float = 0.1,
    ids_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> Experts:
    """Random tensors, the same values in every dtype up to rounding; results are of size 1.

    Ids are drawn with repetition, low ones more often: a token may list an expert twice, and some experts stay empty.

    Args:
        tokens, top_k, experts, hidden, inter, dtype, activation, interleaved, limit: sizes and kind of the layer.
        biases: with both biases.
        identity: with weights of experts that give their token back.
        wide_weights: topk_weights and identity_weights are float32 (float64 for float64), not of ``dtype``.
        none: chance of id -1.
        ids_dtype: int32 or int64.
        seed: of everything drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32 if wide_weights else dtype

    def draw(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * by).to(dtype)

    def share(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(wide)

    rows = 2 * inter if activation in GATED else inter
    skewed = torch.rand(tokens, top_k, generator=generator) ** 2
    ids = (skewed * experts).long().clamp(max=experts - 1)
    ids = ids.masked_fill(torch.rand(tokens, top_k, generator=generator) < none, -1)
    return Experts(
        x=draw(tokens, hidden),
        w_gate_up=draw(experts, rows, hidden, by=1.5 * max(hidden, 1) ** -0.5),
        w_down=draw(experts, hidden, inter, by=max(inter, 1) ** -0.5),
        topk_weights=share(tokens, top_k),
        topk_ids=ids.to(ids_dtype),
        dout=draw(tokens, hidden),
        b_gate_up=draw(experts, rows, by=0.5) if biases else None,
        b_down=draw(experts, hidden, by=0.5) if biases else None,
        identity_weights=share(tokens) if identity else None,
        activation=activation,
        interleaved=interleaved,
        limit=limit,
    )


def surrounded(x: Tensor, swap: bool = False) -> Tensor:
    """The values of ``x`` inside a larger tensor of NaN; ``swap``: with its first and last axes swapped in memory."""
    order = list(range(x.dim()))
    if swap and order:
        order[0], order[-1] = order[-1], order[0]
    holder = x.new_full([x.shape[i] + 3 for i in order], torch.nan)
    view = holder.permute(order)[tuple(slice(1, n + 1) for n in x.shape)]
    view.copy_(x)
    return view


def run_experts(
    function: Callable[..., Tensor], case: Experts, *, grad: bool = True, **options: Any
) -> Found:
    """Call ``function``, which has the signature of :func:`gapless.fused_experts`, and differentiate it.

    Args:
        function: what to call.
        case: inputs and the incoming gradient.
        grad: differentiate with respect to every floating tensor.
        options: passed on, in place of those of the case.
    """
    leaves = {name: t.detach().requires_grad_(grad) for name, t in case.floats.items()}
    made = case.having(**leaves)
    given = made.options() | options
    out = function(made.x, made.w_gate_up, made.w_down, made.topk_weights, made.topk_ids, **given)
    if not grad:
        return {"out": out}
    found: Sequence[Tensor] = [torch.zeros_like(t) for t in leaves.values()]
    if out.requires_grad:  # the reference of a batch without a choice may touch no input
        found = torch.autograd.grad(
            out, list(leaves.values()), case.dout, allow_unused=True, materialize_grads=True
        )
    return {"out": out.detach(), **{f"d{name}": d for name, d in zip(leaves, found, strict=True)}}


def experts_oracle_and_witness(case: Experts, *, grad: bool = True, **options: Any) -> tuple[Found, Found]:
    """The reference in float64, and in the dtype of the case; arguments as in :func:`run_experts`."""
    oracle = run_experts(reference.fused_experts, case.map(Tensor.double), grad=grad, **options)
    return oracle, run_experts(reference.fused_experts, case, grad=grad, **options)


def assert_experts(
    got: Found, oracle: Found, witness: Found, *, factor: float = 2.0, reason: str | None = None
) -> None:
    """Every result in ``got`` is within the budget; float64 may differ from the oracle by its own rounding."""
    if got["out"].dtype == torch.float64 and reason is None:
        factor, reason = 64.0, "the witness is the oracle itself: only the order of sums differs"
    for name, actual in got.items():
        assert_within_budget(actual, oracle[name], witness[name], factor=factor, reason=reason, name=name)


def side_by_side(found: Sequence[Found]) -> Found:
    """Results of many layers of the same shapes as one, whose budget no single lucky number sets."""
    return {name: torch.cat([f[name].flatten() for f in found]) for name in found[0]}
