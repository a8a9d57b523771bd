# SPDX-License-Identifier: Apache-2.0
"""Fakes of every raw operator, and the Triton twins, whose schemas are the native operators' own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from gapless import _native  # noqa: F401  (the twins need the native schemas)
from gapless.plan.varlen import BLOCKS, VarlenPlan

_library = torch.library.Library("gapless", "FRAGMENT")


def _constant(function: Any) -> Any:
    """torch.compiler.assume_constant_result, whose call would import the compiler, and Triton with it."""
    function._dynamo_marked_constant = True
    return function


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fwd_fake(q, k, v, plan, seqused_k, block_table, alibi_slopes, sinks, score, window):
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))


def _bwd_fake(dout, dlse, q, k, v, out, lse, plan, alibi_slopes, sinks, score, window):
    dsinks = q.new_empty(0 if sinks is None else sinks.shape[0], dtype=(q if sinks is None else sinks).dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _sparse_fwd_fake(q, k, v, layout, blocks, score, window):
    return _fwd_fake(q, k, v, None, None, None, None, None, score, window)


def _sparse_bwd_fake(dout, dlse, q, k, v, out, lse, layout, blocks, score, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _mass_fake(q, k, lse, plan, blocks, score, window):
    return q.new_empty(q.shape[1], *blocks[2:], dtype=_lse_dtype(q))


def _fwd_mass_fake(q, k, v, plan, blocks, score, window):
    out, lse = _sparse_fwd_fake(q, k, v, plan, blocks, score, window)
    return out, lse, _mass_fake(q, k, lse, plan, blocks, score, window)


# Planning inside a compiled graph, where Python cannot see the lengths.

_library.define(
    "varlen_plan(Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt total_q, SymInt? total_k, int[] window,"
    " Tensor? q_offset=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _varlen_plan(cu_seqlens_q, cu_seqlens_k, total_q, total_k, window, q_offset=None):
    plan = VarlenPlan.make(
        cu_seqlens_q,
        cu_seqlens_k,
        window=tuple(window),
        total_q=total_q,
        total_k=total_k,
        q_offset=q_offset,
    )
    return tuple(t.clone() for t in plan.tensors[:4])  # whose fifth would be q_offset itself


def _varlen_plan_fake(cu_seqlens_q, cu_seqlens_k, total_q, total_k, window, q_offset=None):
    block_q, block_k = BLOCKS["cuda" if cu_seqlens_q.device.type == "cuda" else "cpu"]
    batch = cu_seqlens_q.shape[0] - 1
    keys = total_q if cu_seqlens_k is None else total_k
    cu = cu_seqlens_q.new_empty(batch + 1, dtype=torch.int32)
    tiles = [
        cu.new_empty(batch + total // block, 3) for total, block in ((total_q, block_q), (keys, block_k))
    ]
    return cu, torch.empty_like(cu), *tiles


_library.impl("varlen_plan", _varlen_plan, "CompositeExplicitAutograd")
torch.library.register_fake("gapless::varlen_plan", _varlen_plan_fake, lib=_library)
varlen_plan = torch.ops.gapless.varlen_plan.default


# Triton twins: opaque to the compiler, imported at their first use.


def triton_unusable(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on tensors of ``device``."""
    why = _triton_unusable(device.type)
    return [why] if why else []


def tangent_reasons(has_tangent: bool) -> list[str]:
    """Why an implementation without forward-mode derivatives cannot run."""
    return ["it has no forward-mode derivatives"] if has_tangent else []


def native_reasons(t: Tensor, has_tangent: bool) -> list[str]:
    """Why the CPU kernels of an operator cannot run on tensors like ``t``."""
    why = tangent_reasons(has_tangent)
    if t.device.type != "cpu":
        why.append(f"it has no kernel for {t.device.type} tensors")
    return why


def triton_reasons(t: Tensor, has_tangent: bool) -> list[str]:
    """Why the Triton kernels of an operator cannot run on tensors like ``t``."""
    why = tangent_reasons(has_tangent) + triton_unusable(t.device)
    if t.dtype == torch.float64:
        why.append("it has no float64 kernels")
    return why


def native_at_once(impl: str, *tensors: Any) -> bool:
    """The native operator may run before anything is checked, as it refuses what is wrong: for little work, checks
    would take longer. Not on a meta tensor among others, which would call the operator's fake."""
    for t in tensors:  # all() takes twice as long
        if t is not None and not (type(t) in (Tensor, Parameter) and t.is_cpu):
            return False
    return impl in ("auto", "native") and not torch.compiler.is_compiling()


class Inputs(NamedTuple):
    """What decides which implementation can run, of operators that take all that is on their device."""

    of: Tensor
    has_tangent: bool = False  # of forward-mode derivatives


REASONS: dict[str, Callable[[Any], list[str]]] = {
    "native": lambda x: native_reasons(x.of, x.has_tangent),
    "triton": lambda x: triton_reasons(x.of, x.has_tangent),
    "reference": lambda x: [],
}


@_constant
def _triton_unusable(device: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device == "cuda":
        return ""
    from triton import knobs

    if knobs.runtime.interpret:
        return ""
    return f"it runs on CUDA tensors, not on {device} (TRITON_INTERPRET=1 emulates it, slowly)"


def define_twin(name: str, module: str, fake: Any) -> Any:
    """The handle of ``name``'s twin, whose kernels are in ``module``; ``fake`` becomes the fake of both."""
    schema = getattr(torch.ops.gapless, name).default._schema
    twin = str(schema).replace(f"gapless::{name}", f"{name}_triton", 1)
    _library.define(twin)
    for op in (name, f"{name}_triton"):
        torch.library.register_fake(f"gapless::{op}", fake, lib=_library)

    def run(*args):
        return getattr(importlib.import_module(f"gapless.kernels.{module}"), name)(*args)

    for key in ("CPU", "CUDA"):
        _library.impl(f"{name}_triton", run, key)
    return getattr(torch.ops.gapless, f"{name}_triton").default


varlen_attention_fwd_triton = define_twin("varlen_attention_fwd", "varlen_attention", _fwd_fake)
varlen_attention_bwd_triton = define_twin("varlen_attention_bwd", "varlen_attention", _bwd_fake)
block_sparse_fwd_triton = define_twin("block_sparse_fwd", "block_sparse_attention", _sparse_fwd_fake)
block_sparse_bwd_triton = define_twin("block_sparse_bwd", "block_sparse_attention", _sparse_bwd_fake)
block_mass_triton = define_twin("block_mass", "block_mass", _mass_fake)
attention_mass_fwd_triton = define_twin("attention_mass_fwd", "block_mass", _fwd_mass_fake)


# flash-attn, an optional peer.


def flash_attn_unusable(device: torch.device) -> list[str]:
    """Why flash-attn's kernels cannot run on tensors of ``device``."""
    if not _flash_attn_installed():
        return ["flash-attn is not installed"]
    return [] if device.type == "cuda" else [f"it runs on CUDA tensors, not on {device.type}"]


@_constant
def _flash_attn_installed() -> bool:
    spec = importlib.util.find_spec("flash_attn")
    return spec is not None and not getattr(spec, "gapless_shim", False)


def flash_attn_varlen(
    x: Any, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, scale: float, window: tuple[int, int]
):
    """Run flash-attn's own varlen function on our arguments."""
    from flash_attn import flash_attn_varlen_func

    cu_q = cu_seqlens_q.int()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.int()
    result = flash_attn_varlen_func(
        x.q,
        x.k,
        x.v,
        cu_q,
        cu_k,
        int(cu_q.diff().max()),
        int(cu_k.diff().max()),
        softmax_scale=scale,
        window_size=window,
        softcap=x.softcap,
        alibi_slopes=x.alibi_slopes,
        return_attn_probs=x.return_lse,
    )
    if not x.return_lse:
        return result
    out, lse, _ = result
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # flash-attn 2 gives +inf to empty rows
