# SPDX-License-Identifier: Apache-2.0
"""The error budget: the only tolerance in the project."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    witness: Tensor,
    *,
    factor: float = 2.0,
    reason: str | None = None,
    name: str = "result",
) -> None:
    """Fail unless ``err(actual) <= factor * (err(witness) + eps(actual.dtype) * max|oracle|)``.

    ``err`` is the largest absolute difference from the oracle. NaN and infinities have to be where the oracle,
    rounded to the dtype of ``actual``, has them, with the same signs.

    Args:
        actual: what is tested, any shape and floating dtype.
        oracle: the same computed in float64, same shape.
        witness: the same computed by the plain implementation in the dtype of the operator, same shape.
        factor: how much worse than the witness is still good.
        reason: why ``factor`` has to be above 2.
        name: what to call it in the message.

    Raises:
        AssertionError: outside the budget; the message shows the numbers and the worst position.
        ValueError: the factor is above 2 without a reason.
    """
    if factor > 2.0 and not reason:
        raise ValueError(f"factor is {factor}: above 2 it needs a reason")
    assert actual.shape == oracle.shape == witness.shape, (
        f"{name} has shape {list(actual.shape)}, the oracle {list(oracle.shape)}, the witness {list(witness.shape)}"
    )
    if actual.numel() == 0:
        return
    got, want, naive = (x.detach().double().cpu() for x in (actual, oracle, witness))
    rounded = oracle.detach().cpu().to(actual.dtype).double()  # a value may overflow the narrow dtype
    finite = rounded.isfinite()
    same = torch.where(finite, got.isfinite(), (got == rounded) | (got.isnan() & rounded.isnan()))
    if not same.all():
        at = tuple(torch.nonzero(~same)[0].tolist())
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} entries are finite where the oracle is not, or the other "
            f"way round; first at {at}: got {got[at].item()}, oracle {rounded[at].item()}, witness {naive[at].item()}"
        )
    if not finite.any():
        return
    error = torch.where(finite, (got - want).abs(), 0.0)
    # A witness that overflowed says nothing about precision there.
    witness_error = torch.where(finite & naive.isfinite(), (naive - want).abs(), 0.0).max().item()
    largest = torch.where(finite, want.abs(), 0.0).max().item()
    rounding = torch.finfo(actual.dtype).eps * largest
    budget = factor * (witness_error + rounding)
    if error.max().item() <= budget:
        return
    at = tuple(torch.nonzero(error == error.max())[0].tolist())
    raise AssertionError(
        f"{name} ({actual.dtype}): error {error.max().item():.3e} is above the budget {budget:.3e} = {factor:g} * "
        f"(witness error {witness_error:.3e} + eps * largest {rounding:.3e}); worst at {at}: got {got[at].item():.9g}, "
        f"oracle {want[at].item():.9g}, witness {naive[at].item():.9g}; {int((error > budget).sum())} of "
        f"{error.numel()} entries are outside"
    )
