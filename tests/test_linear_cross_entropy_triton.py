# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of cross-entropy against the reference: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gapless
from gapless.ops import cross_entropy_chunks as chunks
from gapless.ops import cross_entropy_registry as registry
from gapless.reference import linear_cross_entropy as reference
from gapless.testing import assert_within_budget

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Numpy, which runs the interpreter, tells of infinities and NaN.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TRUNCATED = (
    "the interpreter cuts float32 to bfloat16, and the witness of few numbers may meet the oracle by luck"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "softcap": {"softcap": 3.0, "reduction": "none"},
    "smoothing": {"label_smoothing": 0.2, "denominator": 11.0},
}


def make(tokens: int, hidden: int, classes: int, dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(0, classes, (tokens,), generator=random)
    targets[::4] = -100
    floats = {
        "x": torch.randn(tokens, hidden, generator=random),
        "weight": torch.randn(classes, hidden, generator=random) * 0.4,
        "bias": torch.randn(classes, generator=random),
    }
    return {name: t.to(dtype) for name, t in floats.items()} | {
        "targets": targets, "weights": torch.rand(tokens, generator=random)
    }  # fmt: skip


def run(function: Any, given: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Losses, LSE and gradients of x, weight, bias, weights, from DEVICE."""
    made = {n: t if n in ("targets", "weights") else t.to(dtype) for n, t in given.items()}
    made["weights"] = given["weights"].to(torch.float64 if dtype == torch.float64 else FP32)
    made = {n: t.detach().to(DEVICE) for n, t in made.items()}
    leaves = [made[n].requires_grad_() for n in ("x", "weight", "bias", "weights")]
    loss, lse = function(**made, return_lse=True, **options)
    total = loss.sum() + 0.01 * lse.square().sum()
    return [t.detach().cpu() for t in (loss, lse, *torch.autograd.grad(total, leaves))]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunked", [False, True], ids=["one", "chunks"])
def test_linear(chunked: bool, options: dict, dtype: torch.dtype, monkeypatch):
    if chunked:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
        monkeypatch.setattr(chunks, "KEEP_BYTES", 0)
        monkeypatch.setattr(chunks, "MIN_CLASSES", 64)
    given = make(13, 12, 150, dtype)
    actual = run(gapless.linear_cross_entropy, given, dtype, impl="triton", **options)
    oracle, witness = (
        run(reference.linear_cross_entropy, given, d, **options) for d in (torch.float64, dtype)
    )
    for i, (got, *wanted) in enumerate(zip(actual, oracle, witness, strict=True)):
        if got.numel() == 1:  # a sum of what other options show one by one
            torch.testing.assert_close(got.double(), wanted[0], rtol=torch.finfo(dtype).eps, atol=0.0)
            continue
        assert_within_budget(got, *wanted, factor=8.0, reason=TRUNCATED, name=f"result {i}")


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
def test_of_logits_that_are_not_finite(inplace: bool):
    """Columns off the tiles; NaN and infinities where the CPU has them."""
    logits = torch.randn(8, 1300, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8) * 150
    logits[0, 5], logits[1, 1200], logits[2, 9], logits[3, targets[3]] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    logits[4], logits[5] = -torch.inf, torch.nan
    targets[5] = -100
    found = []
    for function, more in ((gapless.cross_entropy, {"impl": "triton", "inplace": inplace}),
                           (reference.cross_entropy, {})):  # fmt: skip
        leaf = logits.to(DEVICE, copy=True).requires_grad_()
        losses, lse = function(leaf * 1, targets.to(DEVICE), reduction="none", return_lse=True, **more)
        found.append((losses.detach(), lse.detach(), *torch.autograd.grad(losses.sum(), leaf)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_targets_that_are_no_class_make_nan():
    logits = torch.randn(4, 30, device=DEVICE)
    targets = torch.tensor([3, 30, -1, 5], device=DEVICE)
    losses, _ = registry.cross_entropy_fwd(logits, targets, 0.0, 0.0, "triton")
    assert losses.isnan().tolist() == [False, True, False, False] and losses[2] == 0


def test_nothing():
    for tokens, classes in ((0, 7), (0, 0)):
        logits = torch.zeros(tokens, classes, device=DEVICE, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
        gapless.cross_entropy(logits, targets, reduction="sum", impl="triton").backward()
        assert logits.grad.shape == (tokens, classes)


def test_float64_is_refused():
    logits = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        gapless.cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), impl="triton")


def test_opcheck():
    given = {name: t.to(DEVICE) for name, t in make(5, 8, 40, FP32).items()}
    logits = given["x"] @ given["weight"].t()
    targets = given["targets"].masked_fill(given["targets"] < 0, -1)
    sums = torch.zeros(4, 5, device=DEVICE)
    check = torch.library.opcheck
    check(registry.sums_triton, (logits, given["bias"], targets, sums, 0, 2.0, True))
    check(
        registry.gradient_triton,
        (
            logits,
            given["bias"],
            targets,
            sums,
            0,
            0.0,
            torch.zeros_like(logits),
            torch.zeros_like(logits.t()),
        ),
    )
