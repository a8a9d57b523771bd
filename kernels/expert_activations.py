# SPDX-License-Identifier: Apache-2.0
"""Activations of experts and their derivatives, on float32 tiles of gates and of up values."""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# tanh of GeGLU's approximation: 2 * sqrt(2 / pi), as tanh(z) = 2 * sigmoid(2 z) - 1, and the cubic term.
TANH_SCALE = tl.constexpr(1.5957691216057308)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.constexpr_function
def gated(activation: str) -> bool:
    """Whether an activation takes gates and up values; others take the gates alone."""
    return activation != "relu2"


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def bend(gate, alpha, ACTIVATION: tl.constexpr):
    """(f, f') of the gates, so that an activation is f(gate) * up, or f(gate) where it is not gated."""
    if ACTIVATION == "swiglu":
        s = sigmoid(gate)
        value = gate * s
        slope = s + value * sigmoid(-gate)  # 1 - s has no digits left where s is near 1
    elif ACTIVATION == "swiglu_oai":
        s = sigmoid(alpha * gate)
        value = gate * s
        slope = s + alpha * value * sigmoid(-alpha * gate)
    elif ACTIVATION == "geglu":
        cdf = 0.5 * (1.0 + tl.erf(gate * SQRT_HALF))
        value = gate * cdf
        slope = cdf + gate * INV_SQRT_2PI * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "geglu_tanh":
        square = gate * gate
        x = gate * TANH_SCALE * (square * TANH_CUBIC + 1.0)
        s = sigmoid(x)
        value = gate * s
        slope = s + value * sigmoid(-x) * TANH_SCALE * (square * TANH_CUBIC * 3.0 + 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(gate < 0.0, 0.0, gate)  # a NaN stays one
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def clamp(gate, up, limit, ACTIVATION: tl.constexpr):
    """Gates and up values as f and the product see them; comparisons, so that a NaN stays one."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    return gate, up


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """What goes into the down projection."""
    gate, up = clamp(gate, up, limit, ACTIVATION)
    value, _ = bend(gate, alpha, ACTIVATION)
    return value * up if gated(ACTIVATION) else value


@triton.jit
def activate_backward(gate, up, grad, alpha, limit, ACTIVATION: tl.constexpr):
    """(result, gradient of the gates, of the up values) for the gradient ``grad`` of the result."""
    clamped, factor = clamp(gate, up, limit, ACTIVATION)
    value, slope = bend(clamped, alpha, ACTIVATION)
    if gated(ACTIVATION):
        result = value * factor
        dgate = grad * factor * slope
        dup = grad * value
    else:
        result = value
        dgate = grad * slope
        dup = dgate
    if ACTIVATION == "swiglu_oai":
        dgate = tl.where(gate > limit, 0.0, dgate)
        dup = tl.where((up > limit) | (up < -limit), 0.0, dup)
    return result, dgate, dup
