# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: rows of pairs, ragged products, the whole layer: checks, implementations, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapless import _native
from gapless.ops import expert_registry, registry
from gapless.ops.checks import (
    DTYPES,
    check_device,
    check_integers,
    check_shape,
    check_tensors,
    has_tangent,
    number,
    readable,
)
from gapless.ops.impl import Impl, choose
from gapless.ops.reroute import align, reroute_align
from gapless.plan.expert_dispatch import ExpertDispatch
from gapless.reference import experts as reference
from gapless.reference.experts import ACTIVATIONS, GATED

if TYPE_CHECKING:
    from gapless.experts.virtual_tensor import VirtualTensor
    from gapless.plan.expert_map import ExpertMap

TRITON_BLOCKS = (16, 32, 64, 128)


class TunedExperts(NamedTuple):
    """Experts ``first`` and on, as tensors of their own that take the gradients: rows of the weights, no copies.

    Attributes:
        first: the expert that row 0 belongs to.
        w_gate_up: [n, 2I, H] (ungated: [n, I, H]), the memory of ``w_gate_up[first : first + n]``.
        w_down: [n, H, I], likewise.
        b_gate_up, b_down: rows of the biases, likewise, where those are trained too.
    """

    first: int
    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None = None
    b_down: Tensor | None = None


class Inputs(NamedTuple):
    """Everything that decides which implementation can run."""

    x: Tensor
    has_tangent: bool = False  # of forward-mode derivatives
    block_size: int = 0  # of a dispatch that is given; 0: free to choose


def _triton_reasons(x: Inputs) -> list[str]:
    why = registry.triton_reasons(x.x, x.has_tangent)
    if x.block_size and x.block_size not in TRITON_BLOCKS:
        sizes = ", ".join(map(str, TRITON_BLOCKS))
        why.append(f"dispatch has blocks of {x.block_size}: it takes blocks of {sizes}")
    return why


def _free_of_blocks(x: Inputs) -> list[str]:
    return _triton_reasons(x._replace(block_size=0))


REASONS: dict[str, Callable[[Any], list[str]]] = {
    "native": lambda x: registry.native_reasons(x.x, x.has_tangent),
    "triton": _triton_reasons,
    "reference": lambda x: [],
}
ROW_REASONS = {**REASONS, "triton": _free_of_blocks}  # rows are copied one by one


def _operator(name: str, impl: str) -> Callable[..., Any]:
    return getattr(_native, name) if impl == "native" else getattr(expert_registry, f"{name}_triton")


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _one_dtype(x: Tensor, scale: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales as operators take them: of one dtype, float64 beside an x of float64."""
    wide = _wide(x)
    if wide == torch.float64 or (other is not None and other.dtype != scale.dtype):
        return scale.to(wide), None if other is None else other.to(wide)
    return scale, other


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Dynamo traces no Function that is given one tensor twice: views of them, where it traces."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [None if t is None else t.view_as(t) for t in tensors]


# Rows of pairs.


def permute(x: Tensor, dispatch: ExpertDispatch, *, impl: Impl = "auto") -> Tensor:
    """The tokens of each expert one after another: row ``r`` is token ``dispatch.sorted_ids[r] // top_k``.

    Args:
        x: tokens, [T, H]; float32, bfloat16, float16 or float64.
        dispatch: from :func:`gapless.align` or :func:`gapless.reroute_align`, of ids [T, top_k].
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        rows [len(dispatch.sorted_ids), H] in x's dtype; rows that fill up blocks are 0. Differentiable: the gradient
        of a token is the sum over its choices, in order, in float32.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right.
    """
    _check_floats("x", x, ["tokens", "hidden"])
    _check_dispatch(dispatch, x, "x")
    _check_tokens("x", x, dispatch)
    name = choose(impl, ROW_REASONS, Inputs(x, has_tangent(x)))
    if name == "reference":
        return reference.permute(x, dispatch)
    if not _wants_grad(x):
        return _operator("expert_gather", name)(x, None, dispatch.sorted_ids, dispatch.top_k)
    return _Permute.apply(x, name, dispatch.top_k, dispatch.sorted_ids, dispatch.inverse)


class _Permute(torch.autograd.Function):
    """expert_gather, and expert_combine back."""

    @staticmethod
    def forward(ctx, x, name, top_k, sorted_ids, inverse):
        ctx.save_for_backward(inverse)
        ctx.name = name
        return _operator("expert_gather", name)(x, None, sorted_ids, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        (inverse,) = ctx.saved_tensors
        return _operator("expert_combine", ctx.name)(drows, None, inverse), None, None, None, None


def unpermute(
    rows: Tensor, dispatch: ExpertDispatch, weights: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """The way back of :func:`permute`: each token's sum over its choices of ``weights[t, k]`` times its row.

    Args:
        rows: [len(dispatch.sorted_ids), H]; float32, bfloat16, float16 or float64. Rows that no pair has are not read.
        dispatch: what :func:`permute` was given.
        weights: [T, top_k], float32 or the dtype of rows; None: 1. Those of pairs without an expert are not read.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        out [T, H] in the dtype of rows, summed in float32 (float64 for float64) in the order of the choices; a token
        without an expert gets 0. Differentiable in rows and weights.

    Raises:
        TypeError, ValueError: as :func:`permute`.
    """
    _check_floats("rows", rows, ["rows", "hidden"])
    _check_dispatch(dispatch, rows, "rows")
    if rows.shape[0] != dispatch.sorted_ids.shape[0]:
        raise ValueError(
            f"rows has {rows.shape[0]} rows, dispatch has {dispatch.sorted_ids.shape[0]}: "
            "they have to be what permute gives with it"
        )
    if weights is not None:
        _check_weights("weights", weights, rows, "rows", list(dispatch.inverse.shape))
        weights = _one_dtype(rows, weights)[0]
    name = choose(impl, ROW_REASONS, Inputs(rows, has_tangent(rows, weights)))
    if name == "reference":
        return reference.unpermute(rows, dispatch, weights)
    if not _wants_grad(rows, weights):
        return _operator("expert_combine", name)(rows, weights, dispatch.inverse)
    index = dispatch.sorted_ids, dispatch.inverse
    return _Unpermute.apply(*_distinct(rows, weights), name, dispatch.top_k, *index)


class _Unpermute(torch.autograd.Function):
    """expert_combine, and expert_gather and expert_dot back."""

    @staticmethod
    def forward(ctx, rows, weights, name, top_k, sorted_ids, inverse):
        needs_rows = weights is not None and weights.requires_grad
        ctx.save_for_backward(rows if needs_rows else None, weights, sorted_ids, inverse)
        ctx.name, ctx.top_k = name, top_k
        return _operator("expert_combine", name)(rows, weights, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        rows, weights, sorted_ids, inverse = ctx.saved_tensors
        drows = dweights = None
        if ctx.needs_input_grad[0]:
            drows = _operator("expert_gather", ctx.name)(dout, weights, sorted_ids, ctx.top_k)
        if rows is not None:
            dweights = _operator("expert_dot", ctx.name)(rows, dout, inverse).to(weights.dtype)
        return drows, dweights, None, None, None, None


# Ragged products.


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Each group of rows times its own matrix, as torch.nn.functional.grouped_mm: ``out[s] = a[s] @ b[e]``.

    Group ``e`` holds the rows from ``offs[e - 1]`` (0 for the first) to ``offs[e]``; it may be empty.

    Args:
        a: [S, K]; float32, bfloat16, float16 or float64.
        b: [E, K, N] in the dtype of a, of any strides: weights [E, N, K] go in as ``w.transpose(1, 2)``, uncopied.
        offs: int32 [E], where each group ends: ascending, from 0 to S.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        out [S, N] in the dtype of a, summed in float32 (float64 for float64); rows from ``offs[-1]`` on are 0.
        Differentiable in a and b; the gradient of b lies in memory as b does, and is 0 for empty groups.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right.
    """
    _check_floats("a", a, ["rows", "K"])
    _check_like("b", b, a, "a", ["experts", a.shape[1], "N"])
    check_shape("offs", offs, [b.shape[0]])
    if offs.dtype != torch.int32:
        raise TypeError(f"offs is {offs.dtype}: it has to be torch.int32")
    check_device("offs", offs, a, "a")
    _check_offs(offs, a.shape[0])
    name = choose(impl, ROW_REASONS, Inputs(a, has_tangent(a, b)))
    if name == "reference":
        return reference.grouped_mm(a, b, offs)
    if not _wants_grad(a, b):
        return _operator("expert_grouped_mm", name)(a, b, offs)
    return _GroupedMM.apply(a, b, name, offs)


class _GroupedMM(torch.autograd.Function):
    """expert_grouped_mm; back, the same with each matrix transposed, and expert_grouped_outer."""

    @staticmethod
    def forward(ctx, a, b, name, offs):
        ctx.save_for_backward(a if b.requires_grad else None, b if a.requires_grad else None, offs)
        ctx.name, ctx.columns_first = name, b.stride(1) < b.stride(2)
        return _operator("expert_grouped_mm", name)(a, b, offs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        a, b, offs = ctx.saved_tensors
        da = db = None
        if b is not None:
            da = _operator("expert_grouped_mm", ctx.name)(dout, b.transpose(1, 2), offs)
        if a is not None:
            outer = _operator("expert_grouped_outer", ctx.name)
            db = outer(dout, a, offs).transpose(1, 2) if ctx.columns_first else outer(a, dout, offs)
        return da, db, None, None


# The layer.


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor | VirtualTensor,
    w_down: Tensor | VirtualTensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "swiglu",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    adapter_ids: Tensor | None = None,
    expert_map: ExpertMap | Tensor | None = None,
    identity_weights: Tensor | None = None,
    dispatch: ExpertDispatch | None = None,
    num_valid: Tensor | None = None,
    tuned: TunedExperts | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """A mixture of experts in one call: ``out[t] = sum_k topk_weights[t, k] * expert[topk_ids[t, k]](x[t])``.

    An expert is ``w_down @ activation(w_gate_up @ x + b_gate_up) + b_down``. With ``adapter_ids`` and ``expert_map``
    each token's choices are rerouted to its own adapter's experts first (ExpertWeave, arXiv:2508.17624). A token's
    result does not depend on the other tokens of the batch on a CPU, to the bit.

    Args:
        x: tokens, [T, H]; float32, bfloat16, float16 or float64.
        w_gate_up: [E, 2I, H] in x's dtype, gate rows, then up rows; [E, I, H] if the activation has no gate. A
            :class:`gapless.experts.VirtualTensor` of such rows is taken too: holes are never read, and the gradients
            go to ``tuned``.
        w_down: [E, H, I], likewise.
        topk_weights: [T, top_k], float32 or x's dtype.
        topk_ids: int32 or int64 [T, top_k], -1 for none; the same expert may be listed twice. With ``dispatch`` only
            its shape is looked at.
        activation: ``swiglu`` silu(gate) * up (arXiv:2002.05202), ``geglu`` gelu(gate) * up, ``geglu_tanh`` with the
            tanh form of gelu, ``swiglu_oai`` (gpt-oss, arXiv:2508.10925) (up + 1) * gate * sigmoid(alpha * gate) with
            gate at most ``limit`` and up from -limit to limit, ``relu2`` relu(x)^2, without a gate (arXiv:2109.08668).
        b_gate_up: [E, 2I] (ungated: [E, I]) in x's dtype.
        b_down: [E, H] in x's dtype.
        interleaved: gate and up rows alternate in w_gate_up and b_gate_up.
        alpha, limit: of ``swiglu_oai``.
        adapter_ids: int32 or int64 [T], -1 for the base model; needs ``expert_map``.
        expert_map: of :class:`gapless.ExpertMap`, or int32 [adapters, base experts].
        identity_weights: [T], float32 or x's dtype: ``identity_weights[t] * x[t]`` is added, the share of experts that
            give their token back (LongCat-Flash, arXiv:2509.01322).
        dispatch: which pairs go where, if it is known: from :func:`gapless.align` or :func:`gapless.reroute_align`
            over E experts. It has the reroute and ``num_valid`` in it.
        num_valid: int32 [1] on x's device: choices of tokens at and after it count as -1.
        tuned: experts that are trained in place: the gradient goes to them alone.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        out [T, H] in x's dtype. What goes into ``w_down`` is rounded to x's dtype, the sum over a token's choices is in
        float32. Differentiable in x, topk_weights, identity_weights and weights and biases that require a gradient
        (those of experts without a token are 0), or in ``tuned``.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right.
        IndexError: on a CPU, an expert in use that a virtual tensor has not mapped; elsewhere that is not looked at.
    """
    virtual = [w for w in (w_gate_up, w_down) if not isinstance(w, Tensor)]
    w_gate_up, w_down = _whole("w_gate_up", w_gate_up), _whole("w_down", w_down)
    weights = (w_gate_up, w_down, b_gate_up, b_down)
    scales = (topk_weights, identity_weights)
    ids = (topk_ids, adapter_ids, num_valid)
    floats = (x, *weights, *scales)
    if (
        dispatch is None
        and tuned is None
        and registry.native_at_once(impl, *floats, *ids)
        and not _wants_grad(*floats)
        and not has_tangent(*floats)
    ):
        try:
            found = _native_dispatch(w_gate_up.shape[0], *ids, expert_map)
            return _forward(x, weights, scales, found, virtual, activation, interleaved, alpha, limit)
        except Exception:  # what follows says it better
            pass
    _check_layer(x, *weights, activation, interleaved)
    check_integers("topk_ids", topk_ids, [x.shape[0], "top_k"], x)
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids has shape {list(topk_ids.shape)}: it has to have a choice for each token")
    _check_weights("topk_weights", topk_weights, x, "x", list(topk_ids.shape))
    if identity_weights is not None:
        _check_weights("identity_weights", identity_weights, x, "x", [x.shape[0]])
    limits = [number("alpha", alpha), number("limit", limit)]
    if limits[1] <= 0:
        raise ValueError(f"limit is {limit}: it has to be positive")
    own = (None,) * 4 if tuned is None else _check_tuned(tuned, weights)
    scales = _one_dtype(x, topk_weights, identity_weights)
    tangent = has_tangent(x, *scales, *weights, *own)
    given = 0 if dispatch is None else _check_dispatch(dispatch, x, "x").block_size
    name = choose(impl, REASONS, Inputs(x, tangent, given))
    if dispatch is None:
        dispatch = _dispatch(name, w_gate_up.shape[0], topk_ids, adapter_ids, expert_map, num_valid)
    else:
        _check_given(dispatch, w_gate_up.shape[0], topk_ids, adapter_ids, expert_map, num_valid)
    for w in virtual:
        _check_mapped(w, dispatch.counts)
    if name == "reference":
        return reference.fused_experts(
            x,
            w_gate_up,
            w_down,
            scales[0],
            reference.ids_of(dispatch),
            activation=activation,
            b_gate_up=b_gate_up,
            b_down=b_down,
            interleaved=interleaved,
            alpha=alpha,
            limit=limit,
            identity_weights=scales[1],
            tuned=tuned,
        )
    shape = [dispatch.block_size, int(interleaved)]
    if not _wants_grad(x, *scales, *weights, *own):
        fwd = _operator("fused_experts_fwd", name)
        return fwd(x, *weights, *scales, dispatch.tensors, activation, shape, limits, False)[0]
    wanted = [0, 0]
    if _wants_grad(*weights):
        wanted = [0, w_gate_up.shape[0]]
    elif tuned is not None and _wants_grad(*own):
        wanted = [tuned.first, tuned.w_gate_up.shape[0]]
    tensors = _distinct(x, *scales, *weights, *own, *dispatch.tensors)
    return _FusedExperts.apply(name, activation, shape, limits, wanted, bool(virtual), *tensors)


def _native_dispatch(num_experts, topk_ids, adapter_ids, num_valid, expert_map) -> list[Tensor]:
    if adapter_ids is None and expert_map is None:
        return _native.expert_align(topk_ids, num_experts, 1, num_valid)
    slots = getattr(expert_map, "slots", expert_map)
    if not slots.is_cpu or getattr(expert_map, "num_slots", 0) > num_experts:
        raise ValueError
    return _native.expert_reroute_align(topk_ids, adapter_ids, slots, num_experts, 1, num_valid)[2:]


def _forward(x, weights, scales, dispatch, virtual, activation, interleaved, alpha, limit) -> Tensor:
    """The native operator, and what it does not look at by itself."""
    limits = [number("alpha", alpha), number("limit", limit)]
    if limits[1] <= 0 or (interleaved and activation not in GATED):
        raise ValueError
    for w in virtual:
        _check_mapped(w, dispatch[3])
    fwd = _operator("fused_experts_fwd", "native")
    return fwd(x, *weights, *scales, dispatch, activation, [1, int(interleaved)], limits, False)[0]


class _FusedExperts(torch.autograd.Function):
    """Raw forward and backward operators, with the saved tensors between them."""

    @staticmethod
    def forward(ctx, name, activation, shape, limits, wanted, virtual, x, scale, identity, *tensors):
        weights, dispatch = tensors[:4], tensors[8:]
        fwd = _operator("fused_experts_fwd", name)
        out, saved = fwd(x, *weights, scale, identity, list(dispatch), activation, shape, limits, True)
        # Hooks on what is saved could read it, and a virtual tensor has holes.
        ctx.holes = weights[:2] if virtual else None
        kept = (None, None) if virtual else weights[:2]
        ctx.save_for_backward(x, scale, identity, saved, weights[3], *kept, *dispatch)
        ctx.options, ctx.name = (activation, shape, limits, wanted), name
        ctx.dense = any(t is not None and t.requires_grad for t in weights)
        ctx.biases = weights[2] is not None or weights[3] is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, scale, identity, saved, b_down, w_gate_up, w_down, *dispatch = ctx.saved_tensors
        if ctx.holes is not None:
            w_gate_up, w_down = ctx.holes
        if b_down is None and ctx.biases:  # the operator has gradients of both biases or of none
            b_down = w_down.new_zeros(w_down.shape[:2])
        bwd = _operator("fused_experts_bwd", ctx.name)
        dx, dscale, *dweights = bwd(dout, x, w_gate_up, w_down, b_down, scale, saved, dispatch, *ctx.options)
        didentity = None
        if identity is not None:
            wide = dout.to(_wide(x))
            dx = (dx + identity[:, None] * wide).to(dx.dtype)
            didentity = (x * wide).sum(1).to(identity.dtype)
        none = [None] * 4
        gradients = [*dweights, *none] if ctx.dense else [*none, *dweights]
        needed = ctx.needs_input_grad[9:17]
        gradients = [d if wanted else None for d, wanted in zip(gradients, needed, strict=True)]
        return *[None] * 6, dx, dscale, didentity, *gradients, *[None] * len(dispatch)


def _dispatch(name, num_experts, ids, adapter_ids, expert_map, num_valid) -> ExpertDispatch:
    """Which pairs go where, in blocks that the implementation takes."""
    how: Any = "reference" if name == "reference" else "auto"
    block_size = _block_size(ids.shape[0] * ids.shape[1], num_experts) if name == "triton" else 1
    if adapter_ids is None and expert_map is None:
        return _align(ids, num_experts, block_size, num_valid, how)
    for argument, other, missing in (
        ("adapter_ids", "expert_map", expert_map),
        ("expert_map", "adapter_ids", adapter_ids),
    ):
        if missing is None:
            raise ValueError(f"{argument} is given, {other} is not: a reroute needs both")
    slots = getattr(expert_map, "num_slots", 0)
    if slots > num_experts:
        raise ValueError(f"expert_map leads to {slots} experts, w_gate_up has {num_experts}")
    return reroute_align(
        ids, adapter_ids, expert_map, block_size, num_experts=num_experts, num_valid=num_valid, impl=how
    )[1]


def _align(ids, num_experts, block_size, num_valid, impl) -> ExpertDispatch:
    if torch.compiler.is_compiling():
        return align(ids, num_experts, block_size, num_valid=num_valid, impl=impl)
    try:
        return align(ids, num_experts, block_size, num_valid=num_valid, impl=impl)
    except ValueError as error:  # as align calls its argument
        raise ValueError(str(error).replace("ids[", "topk_ids[", 1)) from None


def _block_size(pairs: int, num_experts: int) -> int:
    """The least that holds an expert's share of the pairs, or the largest."""
    return next((block for block in TRITON_BLOCKS[:-1] if pairs <= block * num_experts), TRITON_BLOCKS[-1])


# Checks.


def _check_floats(name: str, t: Any, shape: list) -> None:
    check_shape(name, t, shape)
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} is {t.dtype}: it has to be float32, bfloat16, float16 or float64")


def _check_like(name: str, t: Any, like: Tensor, of: str, shape: list) -> None:
    check_shape(name, t, shape)
    if t.dtype != like.dtype:
        raise TypeError(f"{name} is {t.dtype}, {of} is {like.dtype}: they have to be the same")
    check_device(name, t, like, of)


def _check_weights(name: str, t: Any, like: Tensor, of: str, shape: list) -> None:
    """float32, or the dtype of ``like``."""
    check_shape(name, t, shape)
    if t.dtype not in (torch.float32, like.dtype):
        both = " or ".join(str(d) for d in dict.fromkeys((torch.float32, like.dtype)))
        raise TypeError(f"{name} is {t.dtype}: for {of} of {like.dtype} it has to be {both}")
    check_device(name, t, like, of)


def _check_dispatch(dispatch: Any, like: Tensor, of: str) -> ExpertDispatch:
    if not isinstance(dispatch, ExpertDispatch):
        raise TypeError(
            f"dispatch is {dispatch!r:.80}, of type {type(dispatch).__name__}: it has to be an ExpertDispatch"
        )
    check_device("dispatch", dispatch.sorted_ids, like, of)
    return dispatch


def _check_tokens(name: str, t: Tensor, dispatch: ExpertDispatch) -> None:
    tokens = dispatch.inverse.shape[0]
    if t.shape[0] != tokens:
        raise ValueError(f"{name} has {t.shape[0]} tokens, dispatch has {tokens}: they have to be the same")


def _check_given(dispatch, num_experts, topk_ids, adapter_ids, expert_map, num_valid) -> None:
    """A dispatch that fits the layer, and nothing beside it that it has in it already."""
    if dispatch.num_experts != num_experts:
        raise ValueError(
            f"dispatch is over {dispatch.num_experts} experts, w_gate_up has {num_experts}: they have to be the same"
        )
    if dispatch.inverse.shape != topk_ids.shape:
        raise ValueError(
            f"dispatch is of ids {list(dispatch.inverse.shape)}, topk_ids has shape {list(topk_ids.shape)}: "
            "they have to be the same"
        )
    for name, t in (("adapter_ids", adapter_ids), ("expert_map", expert_map), ("num_valid", num_valid)):
        if t is not None:
            raise ValueError(
                f"{name} is given beside dispatch: it goes to reroute_align, which makes the dispatch"
            )


def _check_offs(offs: Tensor, rows: int) -> None:
    """Ascending, from 0 to ``rows``, where the values can be read."""
    if not readable(offs):
        return
    low = 0
    for i, end in enumerate(offs.tolist()):
        if not low <= end <= rows:
            raise ValueError(
                f"offs[{i}] is {end}: it has to be from {low} to {rows}, ascending, at most the rows of a"
            )
        low = end


def _whole(name: str, w: Any) -> Tensor:
    """A tensor over the whole range of a virtual tensor; a plain tensor is that itself."""
    if isinstance(w, Tensor):
        return w
    if not hasattr(w, "unsafe_tensor"):
        raise TypeError(
            f"{name} is {w!r:.80}, of type {type(w).__name__}: it has to be a tensor or a VirtualTensor"
        )
    return w.unsafe_tensor()


def _check_mapped(w: Any, counts: Tensor) -> None:
    """A hole is never handed out, where the experts in use can be seen without waiting."""
    if hasattr(w, "check_ids") and readable(counts):
        w.check_ids(counts.nonzero().flatten(), "experts in use")


def _check_layer(x, w_gate_up, w_down, b_gate_up, b_down, activation, interleaved) -> None:
    """Tokens, weights and biases agree."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r:.80}: it has to be one of {', '.join(ACTIVATIONS)}")
    gated = activation in GATED
    if interleaved and not gated:
        raise ValueError(f"interleaved is set, and {activation} has no gate: there is nothing to interleave")
    _check_floats("x", x, ["tokens", "hidden"])
    hidden = x.shape[1]
    _check_like("w_down", w_down, x, "x", ["experts", hidden, "inter"])
    experts, _, inter = w_down.shape
    if experts == 0:
        raise ValueError(f"w_down has shape {list(w_down.shape)}: it has to have an expert")
    rows = 2 * inter if gated else inter
    _check_like("w_gate_up", w_gate_up, x, "x", [experts, rows, hidden])
    if b_gate_up is not None:
        _check_like("b_gate_up", b_gate_up, x, "x", [experts, rows])
    if b_down is not None:
        _check_like("b_down", b_down, x, "x", [experts, hidden])


def _check_tuned(tuned: Any, weights: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Rows of the weights; returns the tensors."""
    if not isinstance(tuned, TunedExperts):
        raise TypeError(f"tuned is {tuned!r:.80}, of type {type(tuned).__name__}: it has to be TunedExperts")
    names = TunedExperts._fields[1:]
    check_tensors(**{"tuned.w_gate_up": tuned.w_gate_up})
    first, count = tuned.first, tuned.w_gate_up.shape[0] if tuned.w_gate_up.dim() else 0
    for name, part, whole in zip(names, tuned[1:], weights, strict=True):
        if part is None:
            continue
        if whole is None:
            raise ValueError(f"tuned.{name} is given, {name} is not")
        _check_like(f"tuned.{name}", part, whole, name, [count, *whole.shape[1:]])
        if not (isinstance(first, int) and 0 <= first <= whole.shape[0] - count):
            raise ValueError(
                f"tuned.first is {first!r:.80}: with {count} of {whole.shape[0]} experts it has to be from 0 to "
                f"{whole.shape[0] - count}"
            )
        if not _is_rows(part, whole, first):
            raise ValueError(
                f"tuned.{name} is no view of {name}[{first} : {first + count}]: it has to be its memory"
            )
    for name, whole in zip(names, weights, strict=True):
        if whole is not None and _wants_grad(whole):
            raise ValueError(f"{name} requires a gradient, and with tuned none goes there: detach it")
    return tuple(tuned[1:])


def _is_rows(part: Tensor, whole: Tensor, first: int) -> bool:
    """The memory of ``whole[first:]``, as far as it can be seen."""
    if torch.compiler.is_compiling() or not part.numel():
        return True
    step = first * whole.stride(0) * whole.element_size()
    strides = [s for s, n in zip(part.stride(), part.shape, strict=True) if n > 1]
    same = strides == [s for s, n in zip(whole.stride(), part.shape, strict=True) if n > 1]
    return same and part.data_ptr() == whole.data_ptr() + step
