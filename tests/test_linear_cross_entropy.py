# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy and cross_entropy on the CPU: values, gradients, edges, chunks, instruction sets, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import gapless
from gapless import _native
from gapless.bench import memory
from gapless.ops import cross_entropy_chunks as chunks
from gapless.ops import cross_entropy_registry as registry
from gapless.reference import linear_cross_entropy as reference
from gapless.testing import assert_within_budget

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (FP32, BF16, FP16, FP64)]
FEW = 256  # numbers of which the witness may meet the oracle by luck


class Case(NamedTuple):
    """A last layer and its targets."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    weights: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        def cast(t: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if t is None else t.detach().to(to)

        floats = cast(self.x, dtype), cast(self.weight, dtype)
        return Case(*floats, self.targets, cast(self.bias, dtype), cast(self.weights, chunks.wide(floats[0])))


def make(
    tokens: int = 37,
    hidden: int = 24,
    classes: int = 203,
    *,
    ignored: float = 0.2,
    bias: bool = True,
    weights: bool = True,
    dtype: torch.dtype = FP32,
    seed: int = 0,
) -> Case:
    """Random; a share ``ignored`` of the targets is -100."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, max(classes, 1), (tokens,), generator=random)
    targets[torch.rand(tokens, generator=random) < ignored] = -100
    return Case(
        torch.randn(tokens, hidden, generator=random),
        torch.randn(classes, hidden, generator=random) * 0.4,
        targets,
        torch.randn(classes, generator=random) if bias else None,
        torch.rand(tokens, generator=random) if weights else None,
    ).to(dtype)


def run(function: Callable[..., Any], case: Case, *, dlse: bool = True, **options: Any) -> dict[str, Tensor]:
    """The loss, the LSE and all gradients, of a loss in which the LSE has a part."""
    leaves = {name: getattr(case, name) for name in ("x", "weight", "bias", "weights")}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    loss, lse = function(**leaves, targets=case.targets, return_lse=True, **options)
    total = loss.sum() + (0.01 * lse.square().sum() if dlse else 0.0)
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"loss": loss.detach(), "lse": lse.detach()} | {
        f"d{name}": g for name, g in zip(leaves, grads, strict=True)
    }


def assert_right(function: Callable[..., Any], case: Case, **options: Any) -> None:
    """Within the budget of the reference in float64 and in the case's dtype; one number is the sum of its parts."""
    actual = run(function, case, **options)
    given = {k: v for k, v in options.items() if k != "impl"}
    oracle, witness = (run(reference.linear_cross_entropy, case.to(d), **given) for d in (FP64, case.x.dtype))
    if options.get("reduction") != "none":
        parts = options | {"reduction": "none", "denominator": None}
        losses = run(function, case, **parts)["loss"]
        assert_right(function, case, **parts)
        total, used = losses.double().sum(), case.targets != -100
        if options.get("reduction") != "sum":
            share = (used if case.weights is None else case.weights[used]).double().sum()
            total = total / options.get("denominator", share)
        wide = actual.pop("loss")
        torch.testing.assert_close(wide, total.to(wide.dtype), equal_nan=True)
    for name, got in actual.items():
        assert_tensor(got, oracle[name], witness[name], parts_of(case), name)


def assert_tensor(
    got: Tensor, oracle: Tensor, witness: Tensor, made_of: tuple[Tensor, ...], name: str
) -> None:
    """Within the budget; of a few numbers, within some roundings of the largest that they are made of."""
    dtype = made_of[0].dtype
    if got.numel() < FEW:
        largest = max((t.detach().abs().max().item() for t in (*made_of, oracle) if t.numel()), default=0)
        error = (got.double() - oracle).abs()
        assert got.shape == oracle.shape, name
        assert (error <= 4 * torch.finfo(dtype).eps * (largest + 1)).all(), (name, error.max())
    else:
        wider = {"factor": 64.0, "reason": "both round by a few ulps"} if dtype == FP64 else {}
        assert_within_budget(got, oracle, witness, name=name, **wider)


def parts_of(case: Case) -> tuple[Tensor, ...]:
    """Of what results are made, the logits among it."""
    return case.x, case.weight, F.linear(case.x, case.weight, case.bias)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "denominator": {"denominator": 41.5},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "everything": {"softcap": 3.0, "label_smoothing": 0.3, "denominator": torch.tensor(13.0)},
    "no_lse": {"dlse": False},
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of tokens and of classes even in small cases, and nothing kept."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(chunks, "KEEP_BYTES", 0)
    monkeypatch.setattr(chunks, "MIN_CLASSES", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_one_chunk(options: dict, dtype: torch.dtype):
    assert_right(gapless.linear_cross_entropy, make(dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("keep", [0, 1 << 20], ids=["again", "kept"])
def test_in_many_chunks(keep: int, options: dict, dtype: torch.dtype, small_chunks, monkeypatch):
    monkeypatch.setattr(chunks, "KEEP_BYTES", keep)
    rows, columns = chunks.chunks(30, 203, dtype.itemsize)
    assert len(rows) > 1 and len(columns) > 1
    assert_right(gapless.linear_cross_entropy, make(dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1), (3, 1, 2), (1, 7, 1000), (33, 5, 15), (32, 8, 16), (65, 40, 257), (40, 3, 1025)],
    ids=str,
)
def test_sizes(size: tuple[int, int, int], dtype: torch.dtype):
    # The mean over one token has no gradient for its weight but rounding.
    assert_right(gapless.linear_cross_entropy, make(*size, dtype=dtype, ignored=0.0), reduction="sum")


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(0, 70), st.integers(1, 20), st.integers(1, 400)),
    how=st.fixed_dictionaries(
        {"ignored": st.sampled_from([0.0, 0.3]), "bias": st.booleans(), "weights": st.booleans(),
         "seed": st.integers(0, 999), "dtype": st.sampled_from([FP32, BF16, FP16, FP64])}
    ),
    softcap=st.sampled_from([0.0, 2.0]),
    smoothing=st.sampled_from([0.0, 0.2]),
    chunk=st.sampled_from([1 << 10, 1 << 13, 1 << 20]),
    keep=st.sampled_from([0, 1 << 30]),
)  # fmt: skip
def test_any(size, how, softcap, smoothing, chunk, keep):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", chunk)
        patch.setattr(chunks, "KEEP_BYTES", keep)
        patch.setattr(chunks, "MIN_CLASSES", 32)
        options = {"softcap": softcap, "label_smoothing": smoothing, "reduction": "sum"}
        assert_right(gapless.linear_cross_entropy, make(*size, **how), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_of_logits(options: dict, inplace: bool, dtype: torch.dtype):
    case = make(dtype=dtype)
    logits = F.linear(case.x, case.weight, case.bias)

    def found(function, dtype, **more):
        leaf, shares = (
            logits.to(dtype, copy=True).requires_grad_(),
            case.weights.to(chunks.wide(logits.to(dtype))),
        )
        shares.requires_grad_()
        given = {k: v for k, v in options.items() if k != "dlse"}
        loss, lse = function(leaf, case.targets, weights=shares, return_lse=True, **given, **more)
        grads = torch.autograd.grad(loss.sum() + 0.01 * lse.square().sum(), (leaf, shares))
        return loss.detach(), lse.detach(), *grads

    actual = found(gapless.cross_entropy, dtype, inplace=inplace)
    oracle, witness = found(reference.cross_entropy, FP64), found(reference.cross_entropy, dtype)
    for name, got, *wanted in zip(("loss", "lse", "grad", "dweights"), actual, oracle, witness, strict=True):
        assert_tensor(got, *wanted, (logits,), name)


def test_torch_agrees():
    """The reference is ours; this is not."""
    case = make(dtype=FP64, weights=False)
    for smoothing in (0.0, 0.2):
        want = F.cross_entropy(
            F.linear(case.x, case.weight, case.bias), case.targets, label_smoothing=smoothing
        )
        given = case.x, case.weight, case.targets
        got = gapless.linear_cross_entropy(*given, bias=case.bias, label_smoothing=smoothing)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_inplace_takes_the_memory_once():
    logits = torch.randn(6, 11, requires_grad=True)
    made = logits * 1
    loss = gapless.cross_entropy(made, torch.arange(6), inplace=True)
    (grad,) = torch.autograd.grad(loss, made, retain_graph=True)
    assert grad.data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, made)


# Gradients.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: dict, small_chunks):
    case = make(7, 3, 70, dtype=FP64)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias, case.weights)]
    given = {k: v for k, v in options.items() if k != "dlse"}

    def loss(x, weight, bias, weights):
        return gapless.linear_cross_entropy(
            x, weight, case.targets, bias=bias, weights=weights, return_lse=True, **given
        )

    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["bias"], ["weights"], ["x", "bias"]], ids="+".join)
def test_gradients_of_some(wanted: list[str], small_chunks):
    case = make(dtype=BF16)
    everything = run(gapless.linear_cross_entropy, case, dlse=False)
    given = {
        name: getattr(case, name).detach().requires_grad_(name in wanted)
        for name in ("x", "weight", "bias", "weights")
    }
    loss = gapless.linear_cross_entropy(**given, targets=case.targets)
    for name, got in zip(wanted, torch.autograd.grad(loss, [given[n] for n in wanted]), strict=True):
        assert torch.equal(got, everything[f"d{name}"])


@pytest.mark.parametrize("chunked", [False, True], ids=["kept", "again"])
def test_backward_twice_and_scaled(chunked: bool, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    case = make()
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    loss = gapless.linear_cross_entropy(x, weight, case.targets)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight), torch.tensor(4.0))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(4 * a, b)


def test_denominator_has_a_gradient():
    case = make(weights=False)
    denominator = torch.tensor(5.0, requires_grad=True)
    loss = gapless.linear_cross_entropy(case.x, case.weight, case.targets, denominator=denominator)
    loss.backward()
    torch.testing.assert_close(denominator.grad, -loss.detach() / 5)


def test_parts_of_a_batch_add_up():
    """Two ranks with the count of both have the gradient of one."""
    case = make(weights=False, ignored=0.4)
    count = float((case.targets != -100).sum())
    whole = run(gapless.linear_cross_entropy, case, dlse=False)
    parts = [
        run(
            gapless.linear_cross_entropy,
            case._replace(x=case.x[part], targets=case.targets[part]),
            dlse=False,
            denominator=count,
        )
        for part in (slice(0, 11), slice(11, None))
    ]
    torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], whole["loss"])
    torch.testing.assert_close(parts[0]["dweight"] + parts[1]["dweight"], whole["dweight"])
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts]), whole["dx"])


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    seen = []
    op = registry.linear_cross_entropy_fwd
    monkeypatch.setattr(registry, "linear_cross_entropy_fwd", lambda *a: seen.append(op(*a)) or seen[-1])
    case = make()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            gapless.linear_cross_entropy(case.x, case.weight.requires_grad_(), case.targets)
    assert [found[2].shape[0] for found in seen] == [37, 0]


# Edges.


def test_no_tokens():
    case = make(0)
    for reduction in ("sum", "none", "mean"):
        found = run(gapless.linear_cross_entropy, case, reduction=reduction)
        assert found["loss"].shape == ((0,) if reduction == "none" else ())
        assert reduction == "none" or found["loss"].isnan() == (reduction == "mean")
        assert not found["dweight"].any() and not found["dbias"].any() and found["dx"].shape == (0, 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ignored(dtype: torch.dtype):
    """mean is 0 / 0, as in torch; no NaN gets into a gradient, whatever the tokens hold."""
    case = make(dtype=dtype, ignored=1.1)
    case.x.fill_(torch.nan)
    for reduction in ("mean", "sum"):
        found = run(gapless.linear_cross_entropy, case, reduction=reduction, dlse=False)
        assert found["loss"].isnan() if reduction == "mean" else found["loss"] == 0
        assert not any(found[name].any() for name in ("lse", "dx", "dweight", "dbias", "dweights"))
    assert gapless.linear_cross_entropy(case.x, case.weight, case.targets, denominator=3) == 0


def test_what_is_ignored_is_not_read(small_chunks):
    case = make(weights=True)
    want = run(gapless.linear_cross_entropy, case)
    out = case.targets == -100
    case.x[out], case.weights[out] = torch.nan, torch.inf
    for name, got in run(gapless.linear_cross_entropy, case).items():
        assert torch.equal(got, want[name]), name
    logits = torch.where(out[:, None], torch.nan, torch.randn(37, 5)).requires_grad_()
    gapless.cross_entropy(logits, case.targets.clamp(max=4)).backward()
    assert logits.grad.isfinite().all() and not logits.grad[out].any()


def test_another_index_is_ignored():
    case = make(weights=False, ignored=0.0)
    case.targets[::3] = 0
    got = gapless.linear_cross_entropy(case.x, case.weight, case.targets, ignore_index=0)
    want = F.cross_entropy(F.linear(case.x, case.weight), case.targets, ignore_index=0)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype):
    """As in torch: NaN and +inf make their own row NaN, -inf is a class that cannot be."""
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(8) * 30
    logits[0, 5], logits[1, 7], logits[2, 9], logits[3, targets[3]] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    logits[4, targets[4]], logits[5], logits[6, 17:] = torch.inf, -torch.inf, -torch.inf
    targets[6] = 3
    found = []
    for function in (gapless.cross_entropy, reference.cross_entropy):
        leaf = logits.clone().requires_grad_()
        losses, lse = function(leaf, targets, reduction="none", return_lse=True)
        found.append((losses.detach(), lse.detach(), *torch.autograd.grad(losses.sum(), leaf)))
    (losses, lse, grad), (want, want_lse, want_grad) = found
    assert losses.isnan().tolist() == [True, True, False, False, True, True, False, False]
    assert losses[3] == torch.inf and lse[5] == -torch.inf
    for got, wanted in ((losses, want), (lse, want_lse), (grad, want_grad)):
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(got, wanted, equal_nan=True, **tolerance)
    torch.testing.assert_close(losses, F.cross_entropy(logits.double(), targets, reduction="none").to(losses.dtype),
                               equal_nan=True, rtol=1e-5, atol=1e-6)  # fmt: skip


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e38, 3e38, -3e38], [-3e38, -3e38, -3e38]], requires_grad=True)
    losses, lse = gapless.cross_entropy(logits, torch.tensor([0, 1]), reduction="none", return_lse=True)
    assert lse.isfinite().all() and losses.isfinite().all()
    assert torch.autograd.grad(losses.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_any_strides(dtype: torch.dtype, small_chunks):
    case = make(dtype=dtype)
    want = run(gapless.linear_cross_entropy, case)
    apart = Case(
        case.x.t().contiguous().t(),
        torch.stack([case.weight, case.weight], 2)[:, :, 0],
        torch.stack([case.targets, case.targets], 1)[:, 0],
        torch.stack([case.bias, case.bias], 1)[:, 0],
        torch.stack([case.weights, case.weights], 1)[:, 0],
    )
    for name, got in run(gapless.linear_cross_entropy, apart).items():
        torch.testing.assert_close(got, want[name], msg=name)
    logits = torch.randn(33, 40, dtype=dtype).t()
    targets = torch.arange(40) % 33
    got, want_loss = (gapless.cross_entropy(t, targets) for t in (logits, logits.contiguous()))
    assert torch.equal(got, want_loss)


def test_int32_targets():
    case = make()
    got, want = (
        gapless.linear_cross_entropy(case.x, case.weight, t) for t in (case.targets.int(), case.targets)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_threads_do_not_matter(dtype: torch.dtype, threads):
    """To the kernels: products are torch's."""
    logits = torch.randn(300, 777, dtype=dtype)
    targets = torch.randint(0, 777, (300,))
    found = []
    for count in (1, 2, 5):
        threads(count)
        leaf = logits.clone().requires_grad_()
        loss, lse = gapless.cross_entropy(leaf, targets, return_lse=True)
        found.append((loss.detach(), lse.detach(), torch.autograd.grad(loss, leaf)[0]))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_chunks_cover_everything_once():
    for tokens in (0, 1, 100, 8192, 1 << 20):
        for classes in (0, 1, 2049, 32000, 128256):
            for itemsize in (2, 4, 8):
                ranges = chunks.chunks(tokens, classes, itemsize)
                for size, parts in zip((tokens, classes), ranges, strict=True):
                    assert [p.start for p in parts] == [0, *(p.stop for p in parts)][: len(parts)]
                    assert (parts[-1].stop if parts else 0) == size
                biggest = max((r.stop for r in ranges[0][:1]), default=0) * max(
                    (r.stop for r in ranges[1][:1]), default=0
                )
                assert biggest * itemsize <= 1.05 * chunks.CHUNK_BYTES


def test_memory_does_not_grow_with_the_classes():
    """Beyond inputs and gradients there are two chunks and float32 sums for x, not logits."""
    case = make(2048, 16, 70_000, dtype=BF16, bias=False, weights=False)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    small = run(gapless.linear_cross_entropy, make(9, 16, 99, dtype=BF16))  # libraries are loaded
    assert small["loss"].isfinite()
    before = memory.reset_peak()
    gapless.linear_cross_entropy(x, weight, case.targets).backward()
    extra = memory.peak() - before - x.grad.nbytes - weight.grad.nbytes
    logits = 2048 * 70_000 * 2
    assert extra < 2.5 * chunks.CHUNK_BYTES < 0.7 * logits


# Under autocast, forward mode, compilation.


def test_autocast():
    case = make(bias=True)
    with torch.autocast("cpu", BF16):
        x = case.x.requires_grad_()
        got = gapless.linear_cross_entropy(x, case.weight, case.targets, bias=case.bias)
    narrow = case.to(BF16)
    want = gapless.linear_cross_entropy(narrow.x, narrow.weight, case.targets, bias=narrow.bias)
    assert torch.equal(got, want) and torch.autograd.grad(got, x)[0].dtype == FP32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch compiles its own derivatives
def test_forward_mode_goes_to_the_reference():
    case = make(dtype=FP64, weights=False)
    given = case.weight, case.targets
    with forward_ad.dual_level():
        x = forward_ad.make_dual(case.x, torch.ones_like(case.x))
        tangent = forward_ad.unpack_dual(gapless.linear_cross_entropy(x, *given)).tangent
        with pytest.raises(ValueError, match="forward-mode"):
            gapless.linear_cross_entropy(x, *given, impl="native")
    step = 1e-6
    near = [gapless.linear_cross_entropy(case.x + sign * step, *given) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (near[0] - near[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_second_derivatives_are_refused():
    case = make(weights=False)
    x = case.x.requires_grad_()
    loss = gapless.linear_cross_entropy(x, case.weight, case.targets)
    for outer, words in ((loss.square(), "once_differentiable"), (loss, "does not require grad")):
        (dx,) = torch.autograd.grad(outer, x, create_graph=True)
        with pytest.raises(RuntimeError, match=words):
            dx.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize(("tokens", "dtype"), [(9, BF16), (9, FP64), (0, FP32)], ids=str)
def test_opcheck(tokens: int, dtype: torch.dtype):
    case = make(tokens, 8, 40, dtype=dtype)
    targets = case.targets.masked_fill(case.targets < 0, -1)
    score = 2.0, 0.1
    logits = F.linear(case.x, case.weight)
    sums = chunks.no_sums(targets, chunks.wide(logits)).nan_to_num(0.0, 0.0, 0.0)
    check = torch.library.opcheck
    check(_native.cross_entropy_sums, (logits, case.bias, targets, sums, 3, 2.0, True))
    factors = torch.rand(4, tokens, dtype=sums.dtype)
    for sideways in (None, torch.zeros(40, tokens, dtype=dtype)):
        out = torch.zeros_like(logits)
        check(_native.cross_entropy_gradient, (logits, case.bias, targets, factors, 0, 2.0, out, sideways))
    dlosses = torch.rand(tokens, dtype=sums.dtype)
    check(registry.cross_entropy_fwd, (logits, targets, *score, "native"))
    given = (dlosses, dlosses, logits, targets, factors[0], *score, "native")
    check(registry.cross_entropy_bwd, given)
    check(registry.cross_entropy_bwd_in_place, (*given[:2], logits.clone(), *given[3:]))
    for keep, dlse, wanted in ((True, None, [True, True, True]), (False, dlosses, [False, True, False])):
        forward = case.x, case.weight, case.bias, targets, *score, keep, "native"
        check(registry.linear_cross_entropy_fwd, forward)
        _, lse, kept = registry.linear_cross_entropy_fwd(*forward)
        backward = *forward[:4], lse, kept, *score, wanted, "native"
        check(registry.linear_cross_entropy_bwd, (dlosses, dlse, *backward))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("op", "dynamic"), [("linear", False), ("linear", None), ("logits", True)], ids=str)
def test_compile(op: str, dynamic: bool | None):
    torch._dynamo.reset()

    def loss(x, weight, targets, weights):
        options = {"weights": weights, "softcap": 5.0, "return_lse": True}
        if op == "linear":
            found, lse = gapless.linear_cross_entropy(x * 2, weight, targets, **options)
        else:
            found, lse = gapless.cross_entropy((x * 2) @ weight.t(), targets, inplace=True, **options)
        return found + 1e-3 * lse.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (12, 31):
        case = make(tokens)
        leaves = [t.detach().requires_grad_() for t in (case.x, case.weight, case.weights)]
        found = []
        for function in (compiled, loss):
            total = function(*leaves[:2], case.targets, leaves[2])
            found.append((total.detach(), *torch.autograd.grad(total, leaves)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)


def test_compiled_targets_that_are_no_class_make_nan():
    torch._dynamo.reset()
    case = make(weights=False, ignored=0.0)
    compiled = torch.compile(gapless.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert compiled(case.x, case.weight, case.targets).isfinite()
    for wrong in (203, -3):
        targets = case.targets.clone()
        targets[4] = wrong
        losses = compiled(case.x, case.weight, targets, reduction="none")
        assert losses.isnan().nonzero().tolist() == [[4]]


# Instruction sets.

CHILD = """
import sys, torch, gapless
from gapless import _native
from gapless.ops import cross_entropy_chunks as chunks
chunks.CHUNK_BYTES, chunks.KEEP_BYTES, chunks.MIN_CLASSES = 4000, 0, 64
runs = []
for case in torch.load(sys.argv[1]):
    leaves = [case[n].requires_grad_() for n in ("x", "weight", "bias")]
    loss, lse = gapless.linear_cross_entropy(*leaves[:2], case["targets"], bias=leaves[2], softcap=4.0,
        label_smoothing=0.1, return_lse=True, impl="native")
    runs.append([loss.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)])
torch.save((_native.cpu_isa(), runs), sys.argv[2])
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_isa(isa: str, tmp_path):
    cases = [make(37, 24, 203, dtype=dtype, seed=1) for dtype in (FP32, BF16, FP16, FP64)]
    given_path, taken = tmp_path / "given.pt", tmp_path / "taken.pt"
    names = ("x", "weight", "bias", "targets")
    torch.save([{n: getattr(case, n) for n in names} for case in cases], given_path)
    inherited = {k: v for k, v in os.environ.items() if k not in ("GAPLESS_ISA", "ATEN_CPU_CAPABILITY")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(given_path), str(taken)],
        env=inherited | {"GAPLESS_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, runs = torch.load(taken)
    if name != isa:
        pytest.skip(f"this machine or build has no {isa} kernels; the best below it is {name}")
    for case, got in zip(cases, runs, strict=True):
        options = {"softcap": 4.0, "label_smoothing": 0.1, "dlse": False}
        oracle, witness = (
            run(reference.linear_cross_entropy, case.to(d)._replace(weights=None), **options)
            for d in (FP64, case.x.dtype)
        )
        for name, actual in zip(oracle, got, strict=True):
            assert_tensor(actual, oracle[name], witness[name], parts_of(case), name)


# Errors.

GOOD = make(5, 8, 12)
BAD = GOOD.targets.clone().masked_fill(GOOD.targets < 0, 0)


def with_target(value: int) -> Tensor:
    targets = BAD.clone()
    targets[3] = value
    return targets


ERRORS: list[tuple[str, dict[str, Any], type, list[str]]] = [
    ("x_list", {"x": [1.0]}, TypeError, ["x is [1.0]", "a tensor"]),
    ("x_dims", {"x": torch.zeros(5)}, ValueError, ["x has shape [5]", "[tokens, hidden]"]),
    ("x_int", {"x": torch.zeros(5, 8, dtype=torch.int32)}, TypeError, ["x is torch.int32", "bfloat16"]),
    ("weight_shape", {"weight": torch.zeros(12, 9)}, ValueError, ["weight has shape [12, 9]", "[classes, 8]"]),
    ("weight_dtype", {"weight": torch.zeros(12, 8, dtype=BF16)}, TypeError, ["weight is torch.bfloat16", "float32"]),
    ("bias_shape", {"bias": torch.zeros(11)}, ValueError, ["bias has shape [11]", "[12]"]),
    ("targets_shape", {"targets": BAD[:4]}, ValueError, ["targets has shape [4]", "[5]"]),
    ("targets_float", {"targets": BAD.float()}, TypeError, ["targets is torch.float32", "int64"]),
    ("target_high", {"targets": with_target(12)}, ValueError, ["targets[3] is 12", "from 0 to 11", "-100"]),
    ("target_low", {"targets": with_target(-1)}, ValueError, ["targets[3] is -1", "from 0 to 11"]),
    ("weights_shape", {"weights": torch.ones(4)}, ValueError, ["weights has shape [4]", "[5]"]),
    ("weights_dtype", {"weights": torch.ones(5, dtype=FP16)}, TypeError, ["weights is torch.float16", "float32"]),
    ("ignore_index", {"ignore_index": 1.5}, TypeError, ["ignore_index is 1.5", "an int"]),
    ("softcap", {"softcap": -1.0}, ValueError, ["softcap is -1.0", "positive"]),
    ("smoothing", {"label_smoothing": 1.5}, ValueError, ["label_smoothing is 1.5", "from 0 to 1"]),
    ("reduction", {"reduction": "avg"}, ValueError, ["reduction is 'avg'", "'mean', 'sum', 'none'"]),
    ("denominator_sum", {"reduction": "sum", "denominator": 2.0}, ValueError, ["denominator", "'sum'", "'mean'"]),
    ("denominator_shape", {"denominator": torch.ones(2)}, ValueError, ["denominator has shape [2]", "of one"]),
    ("denominator_low", {"denominator": -2.0}, ValueError, ["denominator is -2.0", "0 or more"]),
    ("impl", {"impl": "cuda"}, ValueError, ["impl='cuda'", "'native'"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(change: dict, error: type, words: list[str]):
    given = {"x": GOOD.x, "weight": GOOD.weight, "targets": BAD}
    with pytest.raises(error) as caught:
        gapless.linear_cross_entropy(**given | change)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_errors_of_logits():
    logits = torch.zeros(5, 12)
    for change, word in (
        ({"logits": torch.zeros(5)}, "logits has shape [5]"),
        ({"targets": with_target(99)}, "targets[3] is 99"),
        ({"weights": torch.ones(3)}, "weights has shape [3]"),
    ):
        with pytest.raises(ValueError) as caught:
            gapless.cross_entropy(**{"logits": logits, "targets": BAD} | change)
        assert word in str(caught.value)
