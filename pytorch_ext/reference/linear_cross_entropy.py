# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy of logits, or of the product that makes them: all of it at once, in eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of :func:`gapless.cross_entropy`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    used = targets != ignore_index
    wide = torch.where(used[:, None], wide, 0.0)
    if softcap > 0:
        wide = softcap * torch.tanh(wide / softcap)
    highest = wide.detach().amax(1, keepdim=True)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    lse = (wide - shift).exp().sum(1).log() + shift.squeeze(1)
    chosen = wide.gather(1, targets.where(used, 0)[:, None]).squeeze(1)
    losses = lse - chosen
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - wide.mean(1))
    losses, lse = (t.masked_fill(~used, 0.0) for t in (losses, lse))
    share = used.to(losses.dtype)
    if weights is not None:
        share = weights.to(losses.dtype).masked_fill(~used, 0.0)
    loss = losses * share
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (share.sum() if denominator is None else denominator)
    return (loss, lse) if return_lse else loss


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of :func:`gapless.linear_cross_entropy`; ``options`` are those of :func:`cross_entropy`."""
    return cross_entropy(F.linear(x, weight, bias), targets, **options)
