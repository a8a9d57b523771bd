# SPDX-License-Identifier: Apache-2.0
"""Checks that public functions share: what is wrong, with its name and its value, and what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

INT32_MAX = 2**31 - 1
MAX_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(**tensors: Any) -> None:
    """Each is a strided tensor."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is {t!r:.80}, of type {type(t).__name__}: it has to be a tensor")
        if t.layout != torch.strided:
            raise TypeError(f"{name} is of layout {t.layout}: it has to be strided (dense)")


def check_shape(name: str, t: Tensor, shape: Sequence[int | str]) -> None:
    """``shape`` holds sizes, and names of sizes that may be any."""
    check_tensors(**{name: t})
    given = t.shape
    if len(given) == len(shape):
        for n, m in zip(shape, given, strict=True):  # any() takes three times as long
            if n != m and not isinstance(n, str):
                break
        else:
            return
    raise ValueError(f"{name} has shape {list(given)}: it has to be [{', '.join(map(str, shape))}]")


def check_device(name: str, t: Tensor | None, like: Tensor, of: str = "q") -> None:
    """``t``, if there is one, is where ``like`` is, the argument called ``of``."""
    if t is not None and t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, {of} is on {like.device}: they have to be on one device")


def check_integers(name: str, t: Tensor, shape: Sequence[int | str], like: Tensor) -> None:
    """int32 or int64, of the shape, on the device of ``like``."""
    check_tensors(**{name: t})
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {t.dtype}: it has to be torch.int32 or torch.int64")
    check_shape(name, t, shape)
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}: it has to be on {like.device}, as the rest")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, paged: bool = False) -> None:
    """Shapes, dtypes and devices of packed queries, keys and values agree; with ``paged`` keys lie in pages."""
    check_tensors(q=q, k=k, v=v)
    if q.dim() != 3:
        raise ValueError(f"q has shape {list(q.shape)}: it has to be [tokens, heads, dim]")
    _, heads, dim = q.shape
    dtype, device = q.dtype, q.device
    for name, t in (("k", k), ("v", v)):
        if t.dim() != (4 if paged else 3):
            raise ValueError(f"{name} has shape {list(t.shape)}: it has to be {key_shape(paged)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} is {t.dtype}, q is {dtype}: they have to be the same")
        if t.device != device:  # a call for each tensor would cost more than the comparison
            check_device(name, t, q)
    if dtype not in DTYPES:
        raise TypeError(f"q is {dtype}: it has to be float32, bfloat16, float16 or float64")
    *tokens, kv_heads, dim_k = k.shape
    *tokens_v, kv_heads_v, dim_v = v.shape
    if tokens != tokens_v or kv_heads != kv_heads_v:
        raise ValueError(f"k has shape {list(k.shape)}, v has {list(v.shape)}: only the last may differ")
    if dim_k != dim:
        raise ValueError(f"k has head dim {dim_k}, q has {dim}: they have to be the same")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads, k has {kv_heads}: the first has to be a multiple of the second"
        )
    if not (1 <= dim <= MAX_DIM and 1 <= dim_v <= MAX_DIM):
        raise ValueError(f"head dims are {dim} (q, k) and {dim_v} (v): they have to be from 1 to {MAX_DIM}")


def check_softcap(softcap: Any) -> None:
    """None (0) or a cap."""
    if number("softcap", softcap) < 0:
        raise ValueError(f"softcap is {softcap}: it has to be 0 (none) or positive")


def has_tangent(*tensors: Tensor | None) -> bool:
    """Forward-mode derivatives are asked of one of them; nobody asks outside of a dual level."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def key_shape(paged: bool) -> str:
    """How messages write the shape of keys and values."""
    return "[num_pages, page_size, kv_heads, dim]" if paged else "[tokens, kv_heads, dim]"


def number(name: str, value: Any) -> float:
    """A finite number of Python or numpy; a tensor's gradient would be lost."""
    if not isinstance(value, (int, float)):
        if not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r:.80}, of type {type(value).__name__}: it has to be a number")
        value = float(value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}: it has to be finite")
    return float(value)


def window_sides(name: str, window: Any) -> tuple[Any, Any]:
    """The two whole numbers of a window, whatever their size."""
    if isinstance(window, (tuple, list)) and len(window) == 2:
        left, right = window
        if isinstance(left, int) and isinstance(right, int):
            return left, right
        if hasattr(left, "__index__") and hasattr(right, "__index__"):
            return int(left), int(right)
    raise ValueError(
        f"{name} is {window!r:.80}: it has to be (left, right), each a whole number, -1 for no limit"
    )


def to_int32(t: Tensor) -> Tensor:
    """int64 to int32; what does not fit becomes the nearest that does, which is still out of any range."""
    return t if t.dtype == torch.int32 else t.clamp(-INT32_MAX - 1, INT32_MAX).int()


def readable(*tensors: Tensor | None) -> bool:
    """Their values are there: no compiler traces, and no device has to be waited for."""
    return not torch.compiler.is_compiling() and all(
        t is None or (type(t) is Tensor and t.device.type == "cpu") for t in tensors
    )


def check_range(
    name: str, t: Tensor, low: Any, high: Any, wanted: str, used: np.ndarray | None = None
) -> None:
    """Every entry of a readable ``t`` that is ``used`` lies from ``low`` to ``high``; ``wanted`` says what those are.

    ``low`` and ``high`` may be arrays. All in numpy, which takes a third of torch's time on few numbers.
    """
    values = t.numpy()
    wrong = (values < low) | (values > high)
    if used is not None:
        wrong &= used
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0].tolist())
        least, most = (np.broadcast_to(x, values.shape)[at] for x in (low, high))
        raise ValueError(
            f"{name}[{', '.join(map(str, at))}] is {values[at]}: it has to be from {least} to {most}, {wanted}"
        )


def check_pages(block_table: Tensor, seqused_k: Tensor, page_size: int, pages: int) -> None:
    """A readable table [batch, max_pages] has room for the keys in use, and the pages that hold them exist."""
    columns = block_table.shape[1]
    room = "the keys that a row of block_table has room for"
    check_range("seqused_k", seqused_k, 0, columns * page_size, room)
    used = np.arange(0, columns * page_size, page_size) < seqused_k.numpy()[:, None]
    check_range("block_table", block_table, 0, pages - 1, "the pages there are", used)
