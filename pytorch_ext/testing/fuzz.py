# SPDX-License-Identifier: Apache-2.0
"""What the fuzz tests of raw operators share: settings, memory layouts, and what goes wrong. Needs hypothesis.

GAPLESS_FUZZ_EXAMPLES sets how many calls each test makes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

from gapless.testing.paging import ABSURD_PAGE

fuzz = settings(
    max_examples=int(os.environ.get("GAPLESS_FUZZ_EXAMPLES") or 12),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    deadline=None,
)
INT32_MAX = 2**31 - 1
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSALS = (RuntimeError, ValueError, TypeError)
FEW_NUMBERS = "the witness of a small batch, or of rows with one key, may meet the oracle by luck"
Call = dict[str, Any]  # arguments by name, in the order of the operator's
dims = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 64, 65]))
numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**30, INT32_MAX, -(2**31), ABSURD_PAGE, 129, 512]))


def ints(values: list, *shape: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).view(shape or -1)


def window(holder: torch.Tensor, offset: int, x: torch.Tensor) -> torch.Tensor:
    view = holder[offset : offset + x.numel()].view(x.shape)
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x,
    "ends with its memory": lambda x: window(x.new_full([x.numel() + 5], math.nan), 5, x),
    "begins with its memory": lambda x: window(x.new_full([x.numel() + 5], math.nan), 0, x),
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "heads first": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 1 else x,
    "every other": lambda x: torch.stack([torch.full_like(x, math.nan), x], -1)[..., 1],
    "one row for all": lambda x: x[:1].expand(x.shape) if x.shape[0] else x,
    "one number for all": lambda x: x[..., :1].expand(x.shape),
    "negated on reading": lambda x: (-x)._neg_view(),
}


def reshaped(draw: st.DrawFn, x: torch.Tensor) -> torch.Tensor:
    """Another rank or another size, of the same dtype."""
    kind = draw(st.sampled_from(["fewer", "more", "size"]))
    if kind == "fewer" and x.dim():
        return x.flatten(0, min(1, x.dim() - 1)) if x.dim() > 1 else x.sum().to(x.dtype)
    if kind == "more" or not x.dim():
        return x.unsqueeze(draw(st.integers(0, x.dim())))
    shape, axis = list(x.shape), draw(st.integers(0, x.dim() - 1))
    shape[axis] = draw(
        st.sampled_from([0, 1, shape[axis] + 1, max(0, shape[axis] - 1), 257, 2 * shape[axis]])
    )
    return x.new_ones(shape)


def spoil_shape(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from([n for n, x in call.items() if isinstance(x, torch.Tensor)]))
    call[name] = reshaped(draw, call[name])


def spoil_dtype(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from([n for n, x in call.items() if isinstance(x, torch.Tensor)]))
    call[name] = call[name].to(
        draw(st.sampled_from([*FLOATS, torch.int32, torch.int64, torch.bool, torch.complex64]))
    )


def spoil_lengths(draw: st.DrawFn, call: Call) -> None:
    index = draw(st.integers(0, 1))
    cu = call["plan"][index].tolist()
    kind = draw(st.sampled_from(["number", "end", "longer", "any"]))
    if kind == "number":
        cu[draw(st.integers(0, len(cu) - 1))] = draw(numbers)
    elif kind == "end":
        cu[-1] += draw(st.sampled_from([-1, 1, 1000]))
    elif kind == "longer":
        cu = [*cu, cu[-1]]
    else:
        cu = draw(st.lists(numbers, max_size=5))
    call["plan"][index] = ints(cu)


def spoil_plan(draw: st.DrawFn, call: Call) -> None:
    plan = call["plan"]
    kind, index = draw(st.sampled_from(["count", "shape", "dtype"])), draw(st.integers(0, 3))
    if kind == "count":
        call["plan"] = draw(st.sampled_from([[], plan[:3], [*plan, plan[0]]]))
    elif kind == "shape":
        plan[index] = reshaped(draw, plan[index])
    else:
        plan[index] = plan[index].to(draw(st.sampled_from([torch.int64, torch.float32, torch.int16])))


def spoil_options(draw: st.DrawFn, call: Call) -> None:
    if draw(st.booleans()):
        side = st.one_of(
            st.integers(-3, 3), st.sampled_from([INT32_MAX + 1, 2**40, 2**62, -(2**31), -(2**40)])
        )
        call["window"] = draw(st.lists(side, min_size=1, max_size=3))
    else:
        number = st.floats(width=32) if draw(st.booleans()) else st.sampled_from([1e300, -1e300, 1e-300])
        call["score"] = draw(st.lists(number, min_size=2, max_size=draw(st.integers(2, 3))))


def spoil_values(draw: st.DrawFn, call: Call) -> None:
    name = draw(
        st.sampled_from(
            [n for n in ("q", "k", "v", "dout", "out", "lse", "dlse", "sinks") if call.get(n) is not None]
        )
    )
    x = call[name].clone(memory_format=torch.contiguous_format)
    if x.is_floating_point() and x.numel():
        at = draw(st.lists(st.integers(0, x.numel() - 1), min_size=1, max_size=4))
        x.view(-1)[at] = draw(st.sampled_from([math.nan, math.inf, -math.inf, torch.finfo(x.dtype).max]))
    call[name] = x


def nothing(draw: st.DrawFn, call: Call) -> None:
    """Valid calls have to be taken."""


def spoil_twice(draw: st.DrawFn, spoilers: list[Callable], first: Callable, call: Call) -> None:
    """Apply the first one and, at times, another one, in the order of the list."""
    other = draw(st.sampled_from([first, first, *spoilers])) if first is not nothing else first
    for spoil in spoilers:
        if spoil in (first, other):
            spoil(draw, call)


def good_lengths(cu: list[int], total: int | None) -> bool:
    """They split ``total`` tokens; None: they are not read."""
    return total is None or (cu[0] == 0 and cu[-1] == total and all(a <= b for a, b in pairwise(cu)))


def is_like(x: torch.Tensor | None, dtypes: tuple, *shape: int) -> bool:
    """``x`` is missing, or of one of the dtypes and of that shape; -1 is any size."""
    if x is None:
        return True
    same = x.dim() == len(shape) and all(n in (-1, m) for n, m in zip(shape, x.shape, strict=True))
    return x.dtype in dtypes and same


def tensors_of(call: Call) -> list[torch.Tensor]:
    flat = [x for value in call.values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def attempt(function: Callable[[], Any], call: Call, errors: tuple) -> Any:
    """The result, or the exception if it is one of ``errors``; the arguments have to stay as they are."""
    before = [x.detach().clone() for x in tensors_of(call)]
    try:
        return function()
    except errors as error:
        assert str(error)
        return error
    finally:
        assert all(same(x, y) for x, y in zip(tensors_of(call), before, strict=True))


def one(*shape: int) -> torch.Tensor:
    return torch.ones(1).expand(shape)
