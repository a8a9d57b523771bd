# SPDX-License-Identifier: Apache-2.0
"""State dicts as a structure of plain values and a flat table of tensors, which is what checkpoints store well."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a tensor was: its key in the table."""

    key: str


@dataclass(frozen=True)
class Structure:
    """A structure as one value: torch.distributed.checkpoint takes dicts and lists apart."""

    root: Any


def split(state: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """``state`` with a :class:`Slot` in place of each tensor, and the tensors by key; equal views share one."""
    tensors: dict[str, Tensor] = {}
    keys: dict[tuple, str] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            same = (value.data_ptr() or id(value), value.dtype, value.shape, value.stride())
            key = keys.setdefault(same, path if path not in tensors else f"{path}#{len(tensors)}")
            tensors[key] = value
            return Slot(key)
        if isinstance(value, Mapping):
            made: dict = OrderedDict() if isinstance(value, OrderedDict) else {}
            for k, v in value.items():
                made[k] = walk(v, f"{path}/{k}")
            if isinstance(value, OrderedDict):
                vars(made).update(vars(value))  # modules put their versions there
            return made
        if isinstance(value, (list, tuple)):
            items = [walk(v, f"{path}/{i}") for i, v in enumerate(value)]
            if type(value) in (list, tuple):
                return type(value)(items)
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return walk(state, name), tensors


def join(structure: Any, tensors: Mapping[str, Any]) -> Any:
    """What :func:`split` took apart."""
    if isinstance(structure, Slot):
        return tensors[structure.key]
    if isinstance(structure, Mapping):
        made: dict = OrderedDict() if isinstance(structure, OrderedDict) else {}
        made.update((k, join(v, tensors)) for k, v in structure.items())
        if isinstance(structure, OrderedDict):
            vars(made).update(vars(structure))
        return made
    if isinstance(structure, (list, tuple)):
        items = [join(v, tensors) for v in structure]
        return type(structure)(*items) if hasattr(structure, "_fields") else type(structure)(items)
    return structure
