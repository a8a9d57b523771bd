# SPDX-License-Identifier: Apache-2.0
"""Choice of implementation: each lists why it cannot take an input, ``auto`` takes the first that can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

Impl = Literal["auto", "native", "triton", "reference", "flash_attn"]


def choose(impl: str, reasons: Mapping[str, Callable[[Any], list[str]]], inputs: Any) -> str:
    """The name of the implementation to run.

    An explicit ``impl`` never falls back: if it cannot take ``inputs``, a ValueError lists every reason.
    ``reasons`` maps implementation names, best first, to functions that list what stands in their way.
    """
    if not isinstance(impl, str):
        raise TypeError(f"impl is {impl!r:.80}, of type {type(impl).__name__}: it has to be a string")
    if impl == "auto":
        refused = {}
        for name, unsupported in reasons.items():
            refused[name] = unsupported(inputs)
            if not refused[name]:
                return name
        listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
        raise ValueError(f"no implementation takes these inputs: {listing}")
    if impl not in reasons:
        raise ValueError(f"impl={impl!r} is not one of 'auto', {', '.join(map(repr, reasons))}")
    if why := reasons[impl](inputs):
        raise ValueError(f"impl={impl!r} cannot take these inputs: {'; '.join(why)}")
    return impl
