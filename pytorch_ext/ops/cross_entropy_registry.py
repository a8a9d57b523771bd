# SPDX-License-Identifier: Apache-2.0
"""Raw operators of cross-entropy: fakes and twins of the two kernels, and whole losses, which are made of them."""

from __future__ import annotations

from typing import Any

import torch

from gapless import _native
from gapless.ops import cross_entropy_chunks as chunks
from gapless.ops.cross_entropy_chunks import Kernels, wide
from gapless.ops.registry import _library, define_twin


def _sums_fake(logits, bias, targets, sums, first, softcap, total):
    return sums.new_empty(sums.shape)


def _gradient_fake(logits, bias, targets, factors, first, softcap, out, sideways):
    return None


sums_triton = define_twin("cross_entropy_sums", "linear_cross_entropy", _sums_fake)
gradient_triton = define_twin("cross_entropy_gradient", "linear_cross_entropy", _gradient_fake)


def _kernels(impl: str) -> Kernels:
    if impl == "native":
        return Kernels(_native.cross_entropy_sums, _native.cross_entropy_gradient, turns=True)
    return Kernels(sums_triton, gradient_triton, turns=False)


def _define(schema: str, run: Any, fake: Any) -> Any:
    """The handle of an operator of torch's own operators and the kernels."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gapless::{name}", fake, lib=_library)
    return getattr(torch.ops.gapless, name).default


# Of logits that are there. A target below 0 leaves its token out.


def _fwd(logits, targets, softcap, smoothing, impl):
    sums = chunks.sums_of(_kernels(impl), logits, targets, softcap, smoothing > 0)
    return chunks.losses_of(sums, targets, logits.shape[1], smoothing)


def _fwd_fake(logits, targets, softcap, smoothing, impl):
    return tuple(logits.new_empty(targets.shape, dtype=wide(logits)) for _ in range(2))


def _bwd_to(dlosses, dlse, logits, targets, lse, softcap, smoothing, impl, out):
    factors = chunks.factors_of(dlosses, dlse, lse, logits.shape[1], smoothing)
    _kernels(impl).gradient(logits, None, targets, factors, 0, softcap, out, None)
    return out


def _bwd(dlosses, dlse, logits, *rest):
    return _bwd_to(dlosses, dlse, logits, *rest, logits.new_empty(logits.shape))


def _bwd_in_place(dlosses, dlse, logits, *rest):
    _bwd_to(dlosses, dlse, logits, *rest, logits)


cross_entropy_fwd = _define(
    "cross_entropy_fwd(Tensor logits, Tensor targets, float softcap, float smoothing, str impl) "
    "-> (Tensor losses, Tensor lse)",
    _fwd,
    _fwd_fake,
)
_GIVEN = "Tensor targets, Tensor lse, float softcap, float smoothing, str impl"
cross_entropy_bwd = _define(
    f"cross_entropy_bwd(Tensor dlosses, Tensor? dlse, Tensor logits, {_GIVEN}) -> Tensor",
    _bwd,
    lambda dlosses, dlse, logits, *rest: logits.new_empty(logits.shape),
)
cross_entropy_bwd_in_place = _define(
    f"cross_entropy_bwd_in_place(Tensor dlosses, Tensor? dlse, Tensor(a!) logits, {_GIVEN}) -> ()",
    _bwd_in_place,
    lambda *given: None,
)


# Of logits that are products. keep: the logits, of which nothing is returned otherwise. wanted: gradients of x, weight
# and bias.


def _linear_fwd(*given):
    return chunks.forward(_kernels(given[-1]), *given[:-1])


def _linear_fwd_fake(x, weight, bias, targets, softcap, smoothing, keep, impl):
    losses, lse = (x.new_empty(targets.shape, dtype=wide(x)) for _ in range(2))
    return losses, lse, x.new_empty(x.shape[0] if keep else 0, weight.shape[0])


def _linear_bwd(*given):
    return chunks.backward(_kernels(given[-1]), *given[:-1])


def _linear_bwd_fake(dlosses, dlse, x, weight, bias, targets, lse, logits, softcap, smoothing, wanted, impl):
    (tokens, hidden), classes = x.shape, weight.shape[0]
    dx, dweight = (
        x.new_empty(n if w else 0, hidden) for n, w in zip((tokens, classes), wanted[:2], strict=True)
    )
    return dx, dweight, x.new_empty(classes if wanted[2] else 0)


linear_cross_entropy_fwd = _define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor targets, float softcap, float smoothing, "
    "bool keep, str impl) -> (Tensor losses, Tensor lse, Tensor logits)",
    _linear_fwd,
    _linear_fwd_fake,
)
linear_cross_entropy_bwd = _define(
    "linear_cross_entropy_bwd(Tensor dlosses, Tensor? dlse, Tensor x, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor lse, Tensor logits, float softcap, float smoothing, bool[] wanted, str impl) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _linear_bwd,
    _linear_bwd_fake,
)
