# SPDX-License-Identifier: Apache-2.0
"""The loss of a last layer: time and memory of gapless and of torch's ways, the result checked first.

Memory is measured in processes that do nothing else: ``python -m gapless.bench.cross_entropy TASK`` is one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import gapless
from gapless.bench import measure, memory
from gapless.bench.block_check import verdict
from gapless.bench.calls import Call, Makers, Skipped, row_of, time_calls
from gapless.bench.cases import DIRECTIONS, DTYPES
from gapless.bench.measure import Tell
from gapless.reference import linear_cross_entropy as reference
from gapless.testing import assert_within_budget

SAMPLE = 32  # tokens whose gradients are checked
SMALL = 64  # tokens up to which those of the weights are checked too


@dataclass(frozen=True)
class LossCase:
    """A last layer, and what is asked of it.

    Attributes:
        ignored: share of the tokens that have no target.
    """

    tokens: int = 8192
    classes: int = 128_000
    hidden: int = 2048
    ignored: float = 0.0
    dtype: str = "bfloat16"
    direction: str = "fwd_bwd"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("direction", DIRECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it has to be one of {', '.join(known)}")
        for name in ("tokens", "classes", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be at least 1")
        if not 0 <= self.ignored < 1:
            raise ValueError(f"ignored is {self.ignored}: it has to be from 0 to below 1")

    @property
    def label(self) -> str:
        left = f", {self.ignored:g} ignored" if self.ignored else ""
        size = f"{self.tokens} x {self.classes}, hidden {self.hidden}{left}"
        return f"cross-entropy {size}, {self.dtype} {self.direction}"

    @property
    def flops(self) -> float:
        """Of the products that there have to be, over tokens that have a target."""
        products = 1 if self.direction == "fwd" else 3
        return 2.0 * products * self.tokens * (1 - self.ignored) * self.classes * self.hidden


class Layer(NamedTuple):
    """Tensors of a case; those that are trained require a gradient."""

    x: Tensor
    weight: Tensor
    targets: Tensor

    @staticmethod
    def make(case: LossCase) -> Layer:
        random = torch.Generator().manual_seed(0)
        dtype = DTYPES[case.dtype]
        x = torch.randn(case.tokens, case.hidden, generator=random).to(dtype)
        weight = torch.empty(case.classes, case.hidden, dtype=dtype)
        for part in weight.split(4096):  # in float32, all of it would be a peak of memory
            part.copy_(torch.randn(part.shape, generator=random) * 2 * case.hidden**-0.5)
        targets = torch.randint(0, case.classes, (case.tokens,), generator=random)
        targets[torch.rand(case.tokens, generator=random) < case.ignored] = -100
        x, weight, targets = (t.to(case.device) for t in (x, weight, targets))
        return Layer(x.requires_grad_(), weight.requires_grad_(), targets)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _torch(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def _torch_wide(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As transformers' models do."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def _torch_chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, options=options)


IMPLEMENTATIONS: dict[str, Loss] = {
    "gapless": gapless.linear_cross_entropy,
    "torch": _torch,
    "torch, float32 logits": _torch_wide,
    "torch, in chunks": _torch_chunked,
}


def _call(loss: Loss, layer: Layer, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(*layer),)

    def both() -> tuple[Tensor, ...]:
        found = loss(*layer)
        return found.detach(), *torch.autograd.grad(found, (layer.x, layer.weight))

    return forward if direction == "fwd" else both


class Check:
    """Losses of all tokens in float32 would take longer than what is measured: a sample has its own oracle."""

    def __init__(self, case: LossCase, layer: Layer) -> None:
        used = (layer.targets != -100).nonzero().squeeze(1)
        step = max(len(used) // SAMPLE, 1)
        self.rows = used if case.tokens <= SMALL else used[::step][:SAMPLE]
        self.case, self.layer, self.count = case, layer, len(used)
        self.oracle, self.witness = (self._reference(dtype) for dtype in (torch.float64, layer.x.dtype))

    def _reference(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        layer = self.layer
        x = layer.x[self.rows].detach().to(dtype).requires_grad_()
        weight = layer.weight.detach().to(dtype).requires_grad_(self.case.tokens <= SMALL)
        loss = reference.linear_cross_entropy(x, weight, layer.targets[self.rows], denominator=self.count)
        return loss.detach(), *torch.autograd.grad(loss, [x, weight] if weight.requires_grad else [x])

    def __call__(self, loss: Loss) -> None:
        """Raise an AssertionError unless the sample's loss and gradients are within the budget."""
        layer = self.layer
        part = layer._replace(x=layer.x[self.rows], targets=layer.targets[self.rows])
        with torch.no_grad():
            got = loss(*part).to(torch.float64) * (len(self.rows) / self.count)
        error, most = (got - self.oracle[0]).abs().item(), self.oracle[0].abs().item()
        bound = torch.finfo(layer.x.dtype).eps * most
        assert error <= bound, f"the loss is off by {error:.2e}, {bound:.2e} is a rounding of {layer.x.dtype}"
        if self.case.direction == "fwd":
            return
        _, dx, dweight = _call(loss, layer, "fwd_bwd")()
        found = (dx[self.rows], dweight)
        for name, *tensors in zip(("dx", "dweight"), found, self.oracle[1:], self.witness[1:], strict=False):
            assert_within_budget(*tensors, name=name)


def calls(case: LossCase, names: Sequence[str] | None = None) -> tuple[Makers, Skipped]:
    """The calls of a case: ours, and of the peers those that are named, all if None."""
    layer = cache(lambda: Layer.make(case))
    check = cache(lambda: Check(case, layer()))

    def make(name: str) -> Call:
        loss = IMPLEMENTATIONS[name]
        run = _call(loss, layer(), case.direction)
        others = tuple(n for n in IMPLEMENTATIONS if n != name) if name == "gapless" else ()
        peer = name != "gapless"
        return Call(run, lambda: verdict(lambda: check()(loss)), case.flops, peer=peer, others=others)

    chosen = [n for n in IMPLEMENTATIONS if n == "gapless" or names is None or n in names]
    return {name: lambda name=name: make(name) for name in chosen}, {}


def cases_of(
    *,
    tokens: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
    ignored: float = 0.0,
    device: str = "cpu",
) -> Iterable[LossCase]:
    """Every combination; what is None is as :class:`LossCase` has it.

    Raises:
        ValueError: a value that a case refuses.
    """
    default = LossCase()
    lists = (
        tokens or [default.tokens],
        classes or [default.classes],
        hidden or [default.hidden],
        dtypes or [default.dtype],
        directions or [default.direction],
    )
    for t, c, h, dtype, direction in itertools.product(*lists):
        yield LossCase(t, c, h, ignored, dtype, direction, device)


def check_names(names: Iterable[str] | None) -> None:
    """Raise a ValueError for a name that nobody has."""
    for name in names or ():
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"impl is {name!r}: it has to be one of {', '.join(IMPLEMENTATIONS)}")


def describe(case: LossCase, call: Call) -> dict:
    """What a row says about its case."""
    return row_of(case, call, "cross_entropy", ("tokens", "classes", "hidden", "ignored"))


def extra_bytes(case: LossCase, impl: str, threads: int) -> int | None:
    """Bytes that one call needs beyond inputs and results; None where the system does not tell."""
    task = json.dumps({"case": dataclasses.asdict(case), "impl": impl, "threads": threads})
    command = [sys.executable, "-m", "gapless.bench.cross_entropy", task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def _one_call(case: LossCase, impl: str) -> int:
    run = _call(IMPLEMENTATIONS[impl], Layer.make(case), case.direction)
    cuda = case.device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else memory.reset_peak()
    results = run()
    highest = torch.cuda.max_memory_allocated() if cuda else memory.peak()
    return max(0, highest - before - sum(t.untyped_storage().nbytes() for t in results))


def _main(task: str) -> None:
    asked = json.loads(task)
    torch.set_num_threads(asked["threads"])
    case = LossCase(**asked["case"])
    _one_call(dataclasses.replace(case, tokens=16, classes=64), asked["impl"])  # loads libraries
    print(_one_call(case, asked["impl"]))


def run(
    case: LossCase,
    impls: Iterable[str] | None = None,
    *,
    rounds: int = 5,
    seconds: float = 120.0,
    with_memory: bool = True,
    tell: Tell = lambda text: None,
) -> tuple[list[dict], list[dict]]:
    """Rows of one case, and what was skipped and why; see :func:`gapless.bench.measure.measure`."""
    makers, skipped = calls(case, None if impls is None else list(impls))
    rows = time_calls(
        makers,
        skipped,
        lambda call: describe(case, call),
        may_break=lambda name: name != "gapless",
        rounds=rounds,
        seconds=seconds,
        device=case.device,
        anchors={"sgemm_flops": measure.sgemm(case.device)},
        tell=tell,
    )
    for row in rows if with_memory else ():
        tell(f"memory of {row['impl']}")
        row["extra_bytes"] = extra_bytes(case, row["impl"], torch.get_num_threads())
    return rows, [{"case": case.label, "impl": name, "why": why} for name, why in skipped.items()]


if __name__ == "__main__":
    _main(sys.argv[1])
