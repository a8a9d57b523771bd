# SPDX-License-Identifier: Apache-2.0
"""Rerouting of expert ids to adapters' slots and their alignment: public functions, checks, implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gapless import _native
from gapless.ops import expert_registry, registry
from gapless.ops.checks import INT32_MAX, check_integers, check_range, check_shape, check_tensors, readable
from gapless.ops.impl import Impl, choose
from gapless.plan.expert_dispatch import ExpertDispatch, max_blocks
from gapless.plan.expert_map import ExpertMap
from gapless.reference import reroute as reference


class Inputs(NamedTuple):
    """Everything that decides which implementation can run."""

    ids: Tensor
    name: str  # of the raw operator


def _native_reasons(x: Inputs) -> list[str]:
    device = x.ids.device.type
    if device == "cpu" or (device == "cuda" and _has_cuda(x.name)):
        return []
    return [f"it has no kernel for {device} tensors in this build"]


@registry._constant
def _has_cuda(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gapless::{name}", "CUDA")


REASONS: dict[str, Callable[[Any], list[str]]] = {
    "native": _native_reasons,
    "triton": lambda x: registry.triton_unusable(x.ids.device),
    "reference": lambda x: [],
}


def reroute(
    topk_ids: Tensor,
    adapter_ids: Tensor,
    expert_map: ExpertMap | Tensor,
    *,
    num_valid: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """From the experts that a router chose to the slots of each token's adapter (ExpertWeave, arXiv:2508.17624).

    ``out[t, k]`` is ``expert_map[adapter_ids[t], topk_ids[t, k]]``, or ``topk_ids[t, k]`` for tokens of the base model.
    The weights of the choices stay what they are. Ids have no gradient.

    Args:
        topk_ids: int32 or int64 [tokens, top_k], ids of base experts; -1 is none. Any strides; an id may come twice.
        adapter_ids: int32 or int64 [tokens], the adapter of each token; -1 is the base model.
        expert_map: the map of one layer, or its ``slots``, int32 [adapters, experts]. A tensor may hold a negative
            number for an expert that is somewhere else: its id becomes -1.
        num_valid: int32 [1] on the device of the ids: rows from this one on are not read, their ids become -1. It is
            read where it is, so that a recorded graph can run with another number.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Returns:
        [tokens, top_k], contiguous, in the dtype of ``topk_ids``.

    Raises:
        TypeError: an argument of another type, or a tensor of a dtype that is not taken.
        ValueError: any other bad argument; the message names it, its value, and what would be right. On the CPU that
            includes ids and adapters out of range; elsewhere, where to look is to wait, they give -1.
    """
    slots = expert_map.slots if isinstance(expert_map, ExpertMap) else expert_map
    if registry.native_at_once(impl, topk_ids, adapter_ids, slots, num_valid):
        try:
            return _native.reroute(topk_ids, adapter_ids, slots, num_valid)
        except Exception:  # what follows says it better
            pass
    _check_ids("topk_ids", topk_ids, num_valid)
    _check_map(topk_ids, adapter_ids, slots)
    name = choose(impl, REASONS, Inputs(topk_ids, "reroute"))
    _check_values(topk_ids, adapter_ids, slots, num_valid, None)
    if name == "reference":
        return reference.reroute(topk_ids, adapter_ids, slots, num_valid)
    run = _native.reroute if name == "native" else expert_registry.reroute_triton
    return run(topk_ids, adapter_ids, slots, num_valid)


def align(
    ids: Tensor,
    num_experts: int,
    block_size: int = 1,
    *,
    num_valid: Tensor | None = None,
    impl: Impl = "auto",
) -> ExpertDispatch:
    """Sort the pairs of a token and one of its experts by expert, in blocks that have one expert each.

    The order is stable, so the result is the same every time, for any number of threads, and in every implementation.
    The sizes of its tensors depend on the arguments' shapes alone.

    Args:
        ids: int32 or int64 [tokens, top_k], from 0 to ``num_experts - 1``; -1 is none. Any strides; an id may come
            twice in a row.
        num_experts: slots of the weights, at least 1 and below 2^31 - 1.
        block_size: rows in a block; 1 sorts without fillers, which is what kernels for the CPU want.
        num_valid: as in :func:`reroute`.
        impl: ``auto`` takes the first implementation that can; a name takes that one or raises with its reasons.

    Raises:
        TypeError, ValueError: as :func:`reroute`.
    """
    if registry.native_at_once(impl, ids, num_valid):
        try:
            return ExpertDispatch.of(
                _native.expert_align(ids, num_experts, block_size, num_valid), block_size
            )
        except Exception:  # what follows says it better
            pass
    _check_ids("ids", ids, num_valid)
    _check_sizes(ids, num_experts, block_size)
    name = choose(impl, REASONS, Inputs(ids, "expert_align"))
    _check_values(ids, None, None, num_valid, num_experts)
    if name == "reference":
        found = reference.align(ids, num_experts, block_size, num_valid)
    else:
        run = _native.expert_align if name == "native" else expert_registry.expert_align_triton
        found = run(ids, num_experts, block_size, num_valid)
    return ExpertDispatch.of(found, block_size)


def reroute_align(
    topk_ids: Tensor,
    adapter_ids: Tensor,
    expert_map: ExpertMap | Tensor,
    block_size: int = 1,
    *,
    num_experts: int | None = None,
    num_valid: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, ExpertDispatch, Tensor]:
    """:func:`reroute` and :func:`align` in one, with the load of the experts before the map as well.

    Args:
        topk_ids, adapter_ids, expert_map, num_valid, impl: as in :func:`reroute`.
        block_size: as in :func:`align`.
        num_experts: slots of the weights; None are those of an :class:`ExpertMap`. What is in the map is below it.

    Returns:
        (ids, dispatch, logical counts): ids after the map; where their pairs go, with ``dispatch.counts`` pairs in each
        slot; int32 [experts], how often each base expert was chosen, whatever the adapter: what balances a router.

    Raises:
        TypeError, ValueError: as :func:`reroute`.
    """
    slots: Any = expert_map
    if isinstance(expert_map, ExpertMap):
        slots = expert_map.slots
        if num_experts is None:
            num_experts = expert_map.num_slots
    if registry.native_at_once(impl, topk_ids, adapter_ids, slots, num_valid):
        try:
            ids, logical, *found = _native.expert_reroute_align(
                topk_ids, adapter_ids, slots, num_experts, block_size, num_valid
            )
            return ids, ExpertDispatch.of(found, block_size), logical
        except Exception:  # what follows says it better
            pass
    _check_ids("topk_ids", topk_ids, num_valid)
    _check_map(topk_ids, adapter_ids, slots)
    if num_experts is None:
        raise TypeError("num_experts is None: with a tensor for a map it has to be the number of slots")
    _check_sizes(topk_ids, num_experts, block_size)
    name = choose(impl, REASONS, Inputs(topk_ids, "expert_reroute_align"))
    _check_values(topk_ids, adapter_ids, slots, num_valid, num_experts)
    if name == "reference":
        ids, logical, found = reference.reroute_align(
            topk_ids, adapter_ids, slots, num_experts, block_size, num_valid
        )
    else:
        native = name == "native"
        run = _native.expert_reroute_align if native else expert_registry.expert_reroute_align_triton
        ids, logical, *found = run(topk_ids, adapter_ids, slots, num_experts, block_size, num_valid)
    return ids, ExpertDispatch.of(found, block_size), logical


def _check_ids(name: str, ids: Tensor, num_valid: Tensor | None) -> None:
    check_tensors(**{name: ids})
    check_integers(name, ids, ["tokens", "top_k"], ids)
    if ids.shape[0] * ids.shape[1] > INT32_MAX:
        raise ValueError(f"{name} has shape {list(ids.shape)}: it may have {INT32_MAX} entries")
    if num_valid is None:
        return
    check_integers("num_valid", num_valid, [1], ids)
    if num_valid.dtype != torch.int32:
        raise TypeError(f"num_valid is {num_valid.dtype}: it has to be torch.int32")
    if readable(num_valid):
        check_range("num_valid", num_valid, 0, ids.shape[0], f"the rows of {name}")


def _check_map(topk_ids: Tensor, adapter_ids: Tensor, slots: Any) -> None:
    check_integers("adapter_ids", adapter_ids, [topk_ids.shape[0]], topk_ids)
    if not isinstance(slots, Tensor):
        raise TypeError(
            f"expert_map is {slots!r:.80}, of type {type(slots).__name__}: it has to be an ExpertMap or a tensor"
        )
    if slots.dtype != torch.int32:
        raise TypeError(f"expert_map is {slots.dtype}: it has to be torch.int32")
    if slots.dim() == 3:
        raise ValueError(
            f"expert_map has shape {list(slots.shape)}: give the map of one layer, .layer(index)"
        )
    check_shape("expert_map", slots, ["adapters", "experts"])
    if slots.shape[1] == 0:
        raise ValueError(f"expert_map has shape {list(slots.shape)}: it has to have a column for each expert")
    if slots.device != topk_ids.device:
        raise ValueError(f"expert_map is on {slots.device}: it has to be on {topk_ids.device}, as the rest")


def _check_sizes(ids: Tensor, num_experts: int, block_size: int) -> None:
    for name, value, most in (
        ("num_experts", num_experts, INT32_MAX - 1),
        ("block_size", block_size, INT32_MAX),
    ):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r:.80}, of type {type(value).__name__}: it has to be an int")
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}: it has to be from 1 to {most}")
    rows = max_blocks(ids.shape[0] * ids.shape[1], num_experts, block_size) * block_size
    if rows > INT32_MAX:
        raise ValueError(
            f"block_size is {block_size}: with ids of shape {list(ids.shape)} and {num_experts} experts up to {rows} "
            f"rows are needed, it has to leave at most {INT32_MAX}"
        )


def _check_values(
    topk_ids: Tensor,
    adapter_ids: Tensor | None,
    slots: Tensor | None,
    num_valid: Tensor | None,
    limit: int | None,
) -> None:
    """Ids that can be read are in range, and so is what becomes of them: at most ``limit`` experts."""
    if not readable(topk_ids, adapter_ids, slots, num_valid):
        return
    rows = topk_ids.shape[0] if num_valid is None else int(num_valid)
    ids = topk_ids[:rows]
    if adapter_ids is None or slots is None:
        assert limit is not None
        check_range("ids", ids, -1, limit - 1, "the experts, or -1 for none")
        return
    adapters, experts = slots.shape
    check_range("adapter_ids", adapter_ids[:rows], -1, adapters - 1, "the adapters, or -1 for the base model")
    check_range("topk_ids", ids, -1, experts - 1, "the experts of the map, or -1 for none")
    if limit is None:
        return
    base = (adapter_ids[:rows] == -1)[:, None]
    check_range("topk_ids", ids, -1, limit - 1, "the experts, or -1 for none", base.expand_as(ids).numpy())
    used = torch.zeros(adapters, experts + 1, dtype=torch.bool)
    if adapters:
        row = adapter_ids[:rows].long().clamp(min=0)[:, None]
        used[row, torch.where(base, -1, ids.long())] = True
    wanted = "the experts, or negative for one that is somewhere else"
    check_range("expert_map", slots, -INT32_MAX - 1, limit - 1, wanted, used[:, :-1].numpy())
