# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy of a batch of tokens, with or without the product that makes its logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapless.ops import cross_entropy_registry, registry
from gapless.ops.checks import (
    DTYPES,
    check_device,
    check_integers,
    check_range,
    check_shape,
    check_softcap,
    check_tensors,
    has_tangent,
    number,
    readable,
)
from gapless.ops.cross_entropy_chunks import kept, wide
from gapless.ops.impl import Impl, choose
from gapless.reference import linear_cross_entropy as reference

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(x @ weight.T + bias, targets)`` without the logits in memory.

    Logits are made a chunk of 64 MiB at a time, in x's dtype, and once more for the gradients (arXiv:2411.09009 does so
    on GPUs); the backward pass needs the LSE alone. Up to 256 MiB of logits are kept instead. On a CPU tokens that are
    left out cost nothing.

    Args:
        x: what goes into the last layer, [T, H]; float32, bfloat16, float16 or float64. Under autocast, as F.linear.
        weight: of the last layer, [V, H], in x's dtype, of any strides.
        targets: int64 or int32 [T], each a class from 0 to V - 1, or ``ignore_index``.
        bias: [V] in x's dtype.
        weights: of the tokens' losses, [T], float32 or x's dtype. Those of tokens left out are not read.
        ignore_index: the target of tokens that are left out. Their loss, LSE and gradients are 0, whatever x holds.
        softcap: logits become ``softcap * tanh(logit / softcap)``; 0 is none.
        label_smoothing: share of the loss that goes to all classes alike, from 0 to 1.
        reduction: ``mean`` divides the sum by that of the weights of tokens that are not left out, ``none`` gives [T].
        denominator: what ``mean`` divides by instead: the sum over all ranks and micro-batches of a step, for a loss by
            tokens; a number, or a tensor of one.
        return_lse: also return the LSE, [T], differentiable: ``z * lse.square().sum()`` is a z-loss.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        loss, or (loss, lse), in float32 (float64 for float64). ``mean`` over no weight at all is NaN, as in torch.
        Differentiable in x, weight, bias, weights and a denominator.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right. Targets are looked
            at on a CPU; elsewhere, and in compiled code, one that is no class makes the loss NaN.
    """
    check_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    _check_floats("x", x, ["tokens", "hidden"])
    check_shape("weight", weight, ["classes", x.shape[1]])
    if bias is not None:
        check_shape("bias", bias, [weight.shape[0]])
    for name, t in (("weight", weight), ("bias", bias)):
        check_device(name, t, x, "x")
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} is {t.dtype}, x is {x.dtype}: they have to be the same")
    _check_tokens("x", x, targets, weights)
    _check_options(softcap, label_smoothing, reduction, denominator)
    _check_classes(targets, ignore_index, weight.shape[0])
    name = choose(impl, registry.REASONS, registry.Inputs(x, has_tangent(x, weight, bias, weights)))
    if name == "reference":
        return reference.linear_cross_entropy(
            x, weight, targets.long(), bias=bias, weights=weights, ignore_index=ignore_index, softcap=softcap,
            label_smoothing=label_smoothing, reduction=reduction, denominator=denominator, return_lse=return_lse,
        )  # fmt: skip
    classes = _classes(targets, ignore_index, weight.shape[0])
    options = float(softcap), float(label_smoothing)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        keep = kept(x.shape[0], weight.shape[0], x.element_size())
        losses, lse = _LinearCrossEntropy.apply(x, weight, bias, classes, *options, keep, name)
    else:
        run = cross_entropy_registry.linear_cross_entropy_fwd
        losses, lse, _ = run(x, weight, bias, classes, *options, False, name)
    loss = _reduce(losses, classes, weights, reduction, denominator)
    return (loss, lse) if return_lse else loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses and LSE of tokens; what becomes of them is torch's own arithmetic on [T]."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, softcap, smoothing, keep, name):
        run = cross_entropy_registry.linear_cross_entropy_fwd
        losses, lse, logits = run(x, weight, bias, targets, softcap, smoothing, keep, name)
        ctx.save_for_backward(x, weight, bias, targets, lse, logits)
        ctx.options = softcap, smoothing
        ctx.name = name
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, dlse):
        x, weight, bias, targets, lse, logits = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if dlosses is None:
            dlosses = torch.zeros_like(lse)
        grads = cross_entropy_registry.linear_cross_entropy_bwd(
            dlosses, dlse, x, weight, bias, targets, lse, logits, *ctx.options, wanted, ctx.name
        )
        return *(grad if w else None for grad, w in zip(grads, wanted, strict=True)), *[None] * 5


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
    return_lse: bool = False,
    inplace: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax cross-entropy of logits that are there, in float32, with nothing of their size made but a gradient.

    The fused kernel of ByteScale's trainer (arXiv:2502.21231): logits of a narrow type are widened in registers, and
    their gradient is of that type.

    Args:
        logits: [T, V]; float32, bfloat16, float16 or float64.
        targets, weights, ignore_index, softcap, label_smoothing, reduction, denominator, return_lse, impl: as in
            :func:`linear_cross_entropy`.
        inplace: the backward pass may write the gradient over the logits. Nothing else may read them afterwards; a
            second backward pass is an error.

    Returns, raises:
        As :func:`linear_cross_entropy`.
    """
    _check_floats("logits", logits, ["tokens", "classes"])
    _check_tokens("logits", logits, targets, weights)
    _check_options(softcap, label_smoothing, reduction, denominator)
    _check_classes(targets, ignore_index, logits.shape[1])
    name = choose(impl, registry.REASONS, registry.Inputs(logits, has_tangent(logits, weights)))
    if name == "reference":
        return reference.cross_entropy(
            logits, targets.long(), weights=weights, ignore_index=ignore_index, softcap=softcap,
            label_smoothing=label_smoothing, reduction=reduction, denominator=denominator, return_lse=return_lse,
        )  # fmt: skip
    classes = _classes(targets, ignore_index, logits.shape[1])
    options = float(softcap), float(label_smoothing), name
    if torch.is_grad_enabled() and logits.requires_grad:
        # A compiler plans memory itself.
        over = inplace and logits.stride(1) == 1 and not torch.compiler.is_compiling()
        losses, lse = _CrossEntropy.apply(logits, classes, options, over)
    else:
        losses, lse = cross_entropy_registry.cross_entropy_fwd(logits, classes, *options)
    loss = _reduce(losses, classes, weights, reduction, denominator)
    return (loss, lse) if return_lse else loss


class _CrossEntropy(torch.autograd.Function):
    """Losses and LSE of tokens from their logits."""

    @staticmethod
    def forward(ctx, logits, targets, options, over):
        losses, lse = cross_entropy_registry.cross_entropy_fwd(logits, targets, *options)
        ctx.save_for_backward(logits, targets, lse)
        ctx.options, ctx.over = options, over
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, dlse):
        logits, targets, lse = ctx.saved_tensors
        if dlosses is None:
            dlosses = torch.zeros_like(lse)
        given = dlosses, dlse, logits, targets, lse, *ctx.options
        if not ctx.over:
            return cross_entropy_registry.cross_entropy_bwd(*given), None, None, None
        cross_entropy_registry.cross_entropy_bwd_in_place(*given)
        torch.autograd.graph.increment_version(logits)  # so that whoever needs them again is told
        return logits.detach(), None, None, None


def _classes(targets: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Targets as operators take them: -1 is left out, what is no class is above all classes."""
    wrong = targets.long().masked_fill(targets < 0, classes)
    return wrong.masked_fill(targets == ignore_index, -1)


def _reduce(
    losses: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    reduction: str,
    denominator: Tensor | float | None,
) -> Tensor:
    """The loss of the losses of tokens; sums are made in float64, so that nothing depends on their order."""
    left_out = targets < 0
    if weights is not None:
        weights = weights.to(losses.dtype).masked_fill(left_out, 0.0)
        losses = losses * weights
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        if denominator is None:
            share = (~left_out).sum() if weights is None else weights.sum(dtype=torch.float64)
            total = total / share
        else:
            total = total / (denominator.reshape(()) if isinstance(denominator, Tensor) else denominator)
    return total.to(losses.dtype)


def _check_floats(name: str, t: Tensor, shape: list[int | str]) -> None:
    check_shape(name, t, shape)
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} is {t.dtype}: it has to be float32, bfloat16, float16 or float64")


def _check_tokens(name: str, x: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    check_integers("targets", targets, [x.shape[0]], x)
    if weights is None:
        return
    check_shape("weights", weights, [x.shape[0]])
    check_device("weights", weights, x, name)
    if weights.dtype not in (x.dtype, wide(x)):
        raise TypeError(f"weights is {weights.dtype}: it has to be {wide(x)} or as {name}, {x.dtype}")


def _check_options(softcap: Any, smoothing: Any, reduction: Any, denominator: Any) -> None:
    check_softcap(softcap)
    if not 0 <= number("label_smoothing", smoothing) <= 1:
        raise ValueError(f"label_smoothing is {smoothing}: it has to be from 0 to 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: it has to be {', '.join(map(repr, REDUCTIONS))}")
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(f"denominator is given with reduction={reduction!r}: it has to be with 'mean'")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            shape = list(denominator.shape)
            raise ValueError(f"denominator has shape {shape}: it has to be a number, or a tensor of one")
    elif number("denominator", denominator) < 0:
        raise ValueError(f"denominator is {denominator}: it has to be 0 or more")


def _check_classes(targets: Tensor, ignore_index: Any, classes: int) -> None:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        kind = type(ignore_index).__name__
        raise TypeError(f"ignore_index is {ignore_index!r:.80}, of type {kind}: it has to be an int")
    if readable(targets):
        used = targets.numpy() != ignore_index
        check_range("targets", targets, 0, classes - 1, f"the classes, or {ignore_index} for none", used)
