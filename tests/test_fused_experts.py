# SPDX-License-Identifier: Apache-2.0
"""fused_experts on the CPU: values, gradients, edges, bitwise promises, rerouted adapters."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import gapless
from gapless import ExpertMap, TunedExperts, _native
from gapless.experts import VirtualTensor
from gapless.experts.backing import open_backing
from gapless.reference import experts as reference
from gapless.reference.experts import ACTIVATIONS, GATED
from gapless.testing.experts import (
    Experts,
    assert_experts,
    experts_oracle_and_witness,
    make_experts,
    run_experts,
    side_by_side,
    surrounded,
)

native = partial(gapless.fused_experts, impl="native")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (FP32, BF16, FP16, FP64)]
FEW_NUMBERS = "the witness of few tokens may meet the oracle by luck"


class Case(NamedTuple):
    """One named layer."""

    id: str
    how: dict[str, Any]  # to make_experts
    reason: str | None = None  # why the budget is twice as wide

    def make(self, dtype: torch.dtype, **how: Any) -> Experts:
        return make_experts(**({"tokens": 40} | self.how | how), dtype=dtype)


CASES = [
    *(Case(name, {"activation": name}) for name in ACTIVATIONS),
    *(
        Case(f"{name}_everything", {"activation": name, "biases": True, "identity": True, "limit": 1.0,
                                    "interleaved": name in GATED})
        for name in ACTIVATIONS
    ),
    Case("oai_limit", {"activation": "swiglu_oai", "limit": 0.7}),
    Case("biases", {"biases": True}),
    Case("identity", {"identity": True}),
    Case("narrow_weights", {"wide_weights": False, "identity": True}),
    Case("interleaved", {"interleaved": True, "inter": 33}),
    Case("int32", {"ids_dtype": torch.int32}),
    # Tokens, choices, experts.
    *(Case(f"tokens_{n}", {"tokens": n, "none": 0.0}, FEW_NUMBERS) for n in (1, 2, 3, 5, 8, 17)),
    *(Case(f"top_{k}", {"top_k": k, "tokens": 23, "experts": 20}) for k in (1, 3, 4, 6, 8, 16)),
    *(Case(f"experts_{n}", {"experts": n}) for n in (1, 2, 7, 64, 300)),
    Case("one_token_many_choices", {"tokens": 1, "top_k": 16, "experts": 32, "none": 0.0}, FEW_NUMBERS),
    Case("most_choose_nothing", {"none": 0.95, "tokens": 60}),
    Case("many_rows_to_an_expert", {"tokens": 700, "experts": 2, "top_k": 1, "none": 0.0}),
    # Sizes off the vectors and the tiles.
    *(
        Case(f"hidden_{h}_inter_{i}", {"hidden": h, "inter": i, "tokens": 19})
        for h, i in ((1, 1), (1, 9), (7, 1), (7, 33), (33, 7), (100, 40), (31, 129), (64, 64), (130, 257), (300, 70))
    ),
    Case("off_the_vectors_ungated", {"hidden": 45, "inter": 51, "activation": "relu2", "biases": True}),
    # Nothing to do.
    Case("no_tokens", {"tokens": 0}),
    Case("no_choices", {"none": 1.0, "identity": True, "biases": True}),
    Case("no_inter", {"inter": 0, "biases": True}),
    Case("no_hidden", {"hidden": 0}),
]  # fmt: skip
BY_ID = {case.id: case for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_backward(case: Case, dtype: torch.dtype):
    layer = case.make(dtype)
    wider = {"factor": 4.0, "reason": case.reason} if case.reason and dtype != FP64 else {}
    assert_experts(run_experts(native, layer), *experts_oracle_and_witness(layer), **wider)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["swiglu_everything", "relu2_everything", "no_choices", "no_tokens"])
def test_the_reference_is_the_reference(case: str, dtype: torch.dtype):
    layer = BY_ID[case].make(dtype)
    got = run_experts(partial(gapless.fused_experts, impl="reference"), layer)
    for name, want in run_experts(reference.fused_experts, layer).items():
        assert torch.equal(got[name], want), name


@settings(max_examples=40)
@given(
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((0, 50), (1, 6), (1, 12), (1, 70), (1, 70)))),
    how=st.fixed_dictionaries({
        "activation": st.sampled_from(ACTIVATIONS),
        "biases": st.booleans(),
        "identity": st.booleans(),
        "none": st.sampled_from([0.0, 0.3, 0.9]),
    }),
    dtype=st.sampled_from([FP32, BF16, FP16, FP64]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_layer(sizes: tuple[int, ...], how: dict[str, Any], dtype: torch.dtype, seed: int):
    pairs = int(sizes[0] * sizes[1] * (1 - how["none"]))
    copies = range(2 + 32 // (1 + pairs))  # few numbers could all be lucky in the witness
    layers = [make_experts(*sizes, **how, dtype=dtype, seed=seed + i) for i in copies]
    got = side_by_side([run_experts(native, layer) for layer in layers])
    oracle, witness = map(
        side_by_side, zip(*(experts_oracle_and_witness(layer) for layer in layers), strict=True)
    )
    wider = {} if dtype == FP64 else {"factor": 4.0, "reason": FEW_NUMBERS}
    assert_experts(got, oracle, witness, **wider)


# Gradients.


@pytest.mark.parametrize(
    ("activation", "interleaved"), [(a, i) for a, i in product(ACTIVATIONS, (False, True)) if not i or a in GATED]
)  # fmt: skip
def test_gradcheck(activation: str, interleaved: bool):
    layer = make_experts(
        3, 2, 3, 3, 2, dtype=FP64, activation=activation, interleaved=interleaved, biases=True, identity=True, seed=1
    )  # fmt: skip
    leaves = {name: t.requires_grad_() for name, t in layer.floats.items()}

    def run(*tensors: Tensor) -> Tensor:
        made = layer.having(**dict(zip(leaves, tensors, strict=True)))
        options = made.options() | {"limit": 1.0}
        return native(made.x, made.w_gate_up, made.w_down, made.topk_weights, made.topk_ids, **options)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "wanted", [["x"], ["w_gate_up"], ["w_down"], ["topk_weights"], ["b_gate_up"], ["b_down"], ["identity_weights"],
               ["x", "topk_weights"], ["w_gate_up", "b_down"]], ids=lambda names: "+".join(names),
)  # fmt: skip
def test_gradients_of_some_inputs(wanted: list[str], dtype: torch.dtype):
    layer = BY_ID["swiglu_everything"].make(dtype)
    full = run_experts(native, layer)
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in layer.floats.items()}
    made = layer.having(**leaves)
    out = native(made.x, made.w_gate_up, made.w_down, made.topk_weights, made.topk_ids, **made.options())
    assert torch.equal(out, full["out"])
    out.backward(layer.dout)
    for name, t in leaves.items():
        assert (t.grad is not None) == (name in wanted)
        if name in wanted:
            assert torch.equal(t.grad, full[f"d{name}"]), name


@pytest.mark.parametrize("only", ["b_gate_up", "b_down"])
def test_one_bias(only: str):
    layer = BY_ID["biases"].make(FP32).having(**{n: None for n in ("b_gate_up", "b_down") if n != only})
    assert_experts(run_experts(native, layer), *experts_oracle_and_witness(layer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_and_tokens_without_a_choice_have_zero_gradients(dtype: torch.dtype):
    layer = BY_ID["experts_64"].make(dtype, biases=True, tokens=20, none=0.5)
    got = run_experts(native, layer)
    idle = torch.tensor([not (layer.topk_ids == e).any() for e in range(layer.num_experts)])
    assert idle.any() and not idle.all()
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        d = got[f"d{name}"].flatten(1)
        assert (d[idle] == 0).all() and (d[~idle] != 0).any(1).all(), name
    none = (layer.topk_ids < 0).all(1)
    assert none.any()
    assert (got["out"][none] == 0).all() and (got["dx"][none] == 0).all()
    assert (got["dtopk_weights"][layer.topk_ids < 0] == 0).all()


def test_second_derivatives_are_refused():
    layer = BY_ID["swiglu"].make(FP32)
    x = layer.x.requires_grad_()
    out = native(x, layer.w_gate_up, layer.w_down, layer.topk_weights, layer.topk_ids)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_nothing_is_saved_without_a_gradient(monkeypatch: pytest.MonkeyPatch):
    from gapless.ops import experts

    saves = []

    def spy(*args):
        saves.append(args[-1])
        return _native.fused_experts_fwd(*args)

    monkeypatch.setattr(experts, "_operator", lambda name, impl: spy)
    layer = BY_ID["swiglu"].make(FP32)
    run_experts(native, layer, grad=False)
    with torch.no_grad():
        args = [t.requires_grad_() for t in (layer.x, layer.w_gate_up, layer.w_down, layer.topk_weights)]
        native(*args, layer.topk_ids)
    assert saves == [False, False]


# How tensors lie in memory.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swap", [False, True], ids=["rows", "columns"])
def test_tensors_inside_larger_ones(swap: bool, dtype: torch.dtype):
    """Padding of NaN around every tensor, and other orders of the axes."""
    layer = BY_ID["swiglu_everything"].make(dtype, hidden=33, inter=20)
    got = run_experts(native, layer.map(lambda t: surrounded(t, swap)))
    assert_experts(got, *experts_oracle_and_witness(layer))
    if not swap:
        for name, want in run_experts(native, layer).items():
            assert torch.equal(got[name], want), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_one_gradient_for_all(dtype: torch.dtype):
    """What out.sum() sends back: strides of 0."""
    layer = BY_ID["swiglu"].make(dtype)
    flat = layer.having(dout=torch.ones(1, dtype=dtype).expand(layer.dout.shape))
    dense = layer.having(dout=torch.ones_like(layer.dout))
    want = run_experts(native, dense)
    for name, got in run_experts(native, flat).items():
        assert torch.equal(got, want[name]), name


def far_apart(w: Tensor, stride: int) -> Tensor:
    """Experts ``stride`` elements apart, in memory that the system gives when it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = ((w.shape[0] - 1) * stride + w[0].numel()) * w.element_size()
    storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=w.dtype)
    return storage.as_strided(w.shape, (stride, w.shape[2], 1)).copy_(w)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_experts_beyond_32_bits(dtype: torch.dtype):
    """Three experts at multiples of 2^31 - 8 elements: the last begins beyond what 32 bits count, signed or not."""
    layer = make_experts(20, 2, 4, 16, 12, dtype=dtype)
    want = run_experts(native, layer)
    moved = layer.having(**{n: far_apart(getattr(layer, n), 2**31 - 8) for n in ("w_gate_up", "w_down")})
    for name, got in run_experts(native, moved).items():
        assert torch.equal(got, want[name]), name


# Values that are not numbers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["x", "dout", "topk_weights"])
def test_a_bad_token_stays_alone(where: str, poison: float, dtype: torch.dtype):
    layer = make_experts(50, 3, 6, 40, 24, dtype=dtype, biases=True, identity=True)
    token = 17
    assert (layer.topk_ids[token] >= 0).any()
    bad = getattr(layer, where).clone()
    bad[token] = poison
    want = run_experts(native, layer)
    got = run_experts(native, layer.having(**{where: bad}))
    others = torch.arange(50) != token
    for name in ("out", "dx", "dtopk_weights", "didentity_weights"):
        assert torch.equal(got[name][others], want[name][others]), name
    assert not got["dx" if where == "dout" else "out"][token].isfinite().all()
    theirs = torch.isin(torch.arange(6), layer.topk_ids[token])
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        assert torch.equal(got[f"d{name}"][~theirs], want[f"d{name}"][~theirs]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_experts_that_nobody_chooses_are_not_read(dtype: torch.dtype):
    layer = make_experts(30, 2, 5, 20, 12, dtype=dtype, biases=True)
    ids = layer.topk_ids.masked_fill(layer.topk_ids == 3, -1)
    clean = layer.having(topk_ids=ids)
    bad = clean.map(torch.clone)
    for t in (bad.w_gate_up, bad.w_down, bad.b_gate_up, bad.b_down):
        t[3] = torch.nan
    bad.topk_weights[ids < 0] = torch.nan
    want = run_experts(native, clean)
    for name, got in run_experts(native, bad).items():
        assert torch.equal(got, want[name]), name


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values(activation: str, dtype: torch.dtype):
    """Activations far out, where exp and the powers of gelu's polynomial overflow: finite where the reference is."""
    layer = make_experts(20, 2, 3, 16, 12, dtype=dtype, activation=activation)
    layer = layer.having(w_gate_up=layer.w_gate_up * (60 if dtype != FP16 else 15))
    assert_experts(run_experts(native, layer), *experts_oracle_and_witness(layer))


# Bitwise promises.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_a_token_does_not_depend_on_the_batch(tokens: int, dtype: torch.dtype, threads):
    """Alone, in a batch of any size, with other loads of the experts; sums are longer than a run of terms."""
    threads(2)
    layer = make_experts(150, 3, 5, 150, 140, dtype=dtype, biases=True, identity=True)
    want = run_experts(native, layer)
    part = layer.having(**{n: getattr(layer, n)[:tokens].clone() for n in
                             ("x", "topk_weights", "topk_ids", "dout", "identity_weights")})  # fmt: skip
    part.topk_ids[tokens // 2 + 1 :] = 0  # all others now go to one expert
    got = run_experts(native, part)
    for name in ("out", "dx", "dtopk_weights", "didentity_weights"):
        same = slice(0, tokens // 2 + 1)
        assert torch.equal(got[name][same], want[name][same]), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_number_of_tokens_gives_the_same_bits(dtype: torch.dtype):
    """A row of a product takes the same sums whatever rows lie beside it."""
    layer = make_experts(70, 1, 1, 140, 130, dtype=dtype, none=0.0)
    want = run_experts(native, layer)
    for n in range(1, 70):
        tokens = {t: getattr(layer, t)[70 - n :] for t in ("x", "topk_weights", "topk_ids", "dout")}
        got = run_experts(native, layer.having(**tokens))
        for name in ("out", "dx", "dtopk_weights"):
            assert torch.equal(got[name], want[name][70 - n :]), (name, n)


# Few items are cut by their outputs, many are not: 128 outputs are a piece, 16 items a thread's share.
THREADED = {
    "one_token": {"tokens": 1, "hidden": 300, "inter": 270},
    "few_experts": {"tokens": 60, "hidden": 270, "inter": 300},
    "many_rows": {"tokens": 300, "hidden": 72},
    "many_experts": {"tokens": 200, "experts": 90, "hidden": 40, "inter": 20},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", THREADED)
def test_any_number_of_threads_gives_the_same_bits(case: str, dtype: torch.dtype, threads):
    how = {"top_k": 3, "none": 0.0, "biases": True, "identity": True} | THREADED[case]
    layer = make_experts(**how, dtype=dtype)
    threads(1)
    want = run_experts(native, layer)
    for count in (2, 5):
        threads(count)
        for name, got in run_experts(native, layer).items():
            assert torch.equal(got, want[name]), (name, count)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_hundred_runs_give_the_same_bits(dtype: torch.dtype):
    layer = make_experts(60, 3, 6, 32, 16, dtype=dtype)
    want = run_experts(native, layer)
    for _ in range(100):
        for name, got in run_experts(native, layer).items():
            assert torch.equal(got, want[name]), name


ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
CHILD = """
import sys, torch, gapless
from functools import partial
from gapless import _native
from gapless.testing.experts import run_experts
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
layers, groups = torch.load(sys.argv[1], weights_only=False)
runs = [run_experts(partial(gapless.fused_experts, impl="native"), layer) for layer in layers]
products = [gapless.grouped_mm(*group, impl="native") for group in groups]
torch.save((_native.cpu_isa(), runs, products), sys.argv[2])
"""


@pytest.fixture(scope="module")
def layers() -> list[Experts]:
    return [
        make_experts(n, 3, 6, h, i, dtype=dtype, activation=a, biases=True, identity=True)
        for dtype, n, h, i, a in [
            (FP32, 90, 72, 40, "swiglu"), (FP32, 1, 33, 7, "geglu"), (BF16, 90, 72, 40, "swiglu_oai"),
            (BF16, 2, 65, 33, "relu2"), (FP16, 50, 40, 24, "geglu_tanh"), (FP64, 30, 20, 12, "swiglu"),
        ]
    ]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa: str, layers: list[Experts], tmp_path):
    if ISAS.index(isa) >= ISAS.index(_native.cpu_isa()):
        pytest.skip("all other tests run on it, or this CPU has no such instructions")
    generator = torch.Generator().manual_seed(1)
    groups = [
        (
            torch.randn(70, 45, generator=generator).to(dtype),
            torch.randn(3, 21, 45, generator=generator).to(dtype).transpose(1, 2),
            torch.tensor([40, 40, 65], dtype=torch.int32),
        )
        for dtype in (FP32, BF16, FP16)
    ]
    torch.save((layers, groups), tmp_path / "layers.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "layers.pt"), str(tmp_path / "found.pt")],
        env=os.environ | {"GAPLESS_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    taken, runs, products = torch.load(tmp_path / "found.pt", weights_only=True)
    assert taken in (isa, "baseline")  # a build may leave out the ones between
    for layer, got in zip(layers, runs, strict=True):
        assert_experts(got, *experts_oracle_and_witness(layer))
    for (a, b, offs), got in zip(groups, products, strict=True):
        wide = reference.grouped_mm(a.double(), b.double(), offs)
        assert_experts({"out": got}, {"out": wide}, {"out": reference.grouped_mm(a, b, offs)})


# A dispatch of one's own.


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_dispatch_is_taken_as_it_is(block_size: int, dtype: torch.dtype):
    layer = make_experts(50, 3, 6, 40, 24, dtype=dtype, biases=True)
    dispatch = gapless.align(layer.topk_ids, 6, block_size)
    want = run_experts(native, layer)
    blind = layer.having(topk_ids=torch.full_like(layer.topk_ids, 10**6))  # its values are not looked at
    for impl in ("native", "reference"):
        got = run_experts(partial(gapless.fused_experts, impl=impl), blind, dispatch=dispatch)
        for name, result in got.items():
            if impl == "native":
                assert torch.equal(result, want[name]), name
        assert_experts(got, *experts_oracle_and_witness(layer))


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("valid", [0, 1, 13, 30])
def test_tokens_beyond_num_valid_choose_nothing(valid: int, impl: str):
    layer = make_experts(30, 2, 4, 20, 12, biases=True)
    ids = layer.topk_ids.clone()
    ids[valid:] = -1
    function = partial(gapless.fused_experts, impl=impl)
    want = run_experts(function, layer.having(topk_ids=ids))
    got = run_experts(function, layer, num_valid=torch.tensor([valid], dtype=torch.int32))
    for name, result in got.items():
        assert torch.equal(result, want[name]), name


# Rerouted adapters.

BASE, ADAPTERS = 6, [[4, 1], [], [5, 0, 1]]
MAP = ExpertMap.from_adapters(num_experts=BASE, adapters=ADAPTERS)


def mixed_batch(dtype: torch.dtype, tokens: int = 60) -> tuple[Experts, Tensor]:
    """A layer of base experts and all slots, ids of base experts, and each token's adapter."""
    layer = make_experts(tokens, 3, MAP.num_slots, 40, 24, dtype=dtype, biases=True)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(-1, BASE, layer.topk_ids.shape, generator=generator)
    return layer.having(topk_ids=ids), torch.randint(-1, len(ADAPTERS), (tokens,), generator=generator)


def merged(layer: Experts, adapter: int) -> Experts:
    """The base model with an adapter's experts in their places."""
    experts = list(range(BASE)) if adapter < 0 else MAP.slots[adapter].tolist()
    return layer.having(
        **{n: getattr(layer, n)[experts] for n in ("w_gate_up", "w_down", "b_gate_up", "b_down")}
    )


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["map", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_is_each_merged_model(dtype: torch.dtype, as_tensor: bool, impl: str):
    """Bitwise, and so are the gradients that belong to one token; those of experts are sums over their tokens."""
    layer, adapters = mixed_batch(dtype)
    function = partial(gapless.fused_experts, impl=impl)
    expert_map = MAP.slots if as_tensor else MAP
    got = run_experts(function, layer, adapter_ids=adapters, expert_map=expert_map)
    for adapter in range(-1, len(ADAPTERS)):
        mine = adapters == adapter
        assert mine.any()
        want = run_experts(function, merged(layer, adapter))
        if impl == "native":
            for name in ("out", "dx", "dtopk_weights"):
                assert torch.equal(got[name][mine], want[name][mine]), (name, adapter)
        else:  # torch's products may depend on the number of rows
            oracle = run_experts(function, merged(layer.map(Tensor.double), adapter))
            assert_experts(*({"out": found["out"][mine]} for found in (got, oracle, want)))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_training_through_rerouted_adapters_is_training_each_merged_model(dtype: torch.dtype):
    """All adapters at once: each one's slots get what its own tokens give, the base what is left, to the bit."""
    layer, adapters = mixed_batch(dtype)
    got = run_experts(native, layer, adapter_ids=adapters, expert_map=MAP)
    for adapter, tuned in enumerate(ADAPTERS):
        mine = (adapters == adapter).nonzero().flatten()
        tokens = {n: getattr(layer, n)[mine] for n in ("x", "topk_weights", "topk_ids", "dout")}
        alone = run_experts(native, merged(layer, adapter).having(**tokens))
        for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
            slots = got[f"d{name}"][MAP.slots[adapter][tuned].long()]
            assert torch.equal(slots, alone[f"d{name}"][tuned]), (name, adapter)
            unused = MAP.first_slot(adapter) + len(tuned)
            assert (
                got[f"d{name}"][unused : MAP.first_slot(adapter) + MAP.max_experts_per_adapter] == 0
            ).all()


def tuned_rows(layer: Experts, first: int, count: int) -> TunedExperts:
    rows = (
        t[first : first + count].detach().requires_grad_()
        for t in (layer.w_gate_up, layer.w_down, layer.b_gate_up, layer.b_down)
    )
    return TunedExperts(first, *rows)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_gradients_land_in_tuned_experts_alone(dtype: torch.dtype, impl: str):
    layer, adapters = mixed_batch(dtype)
    function = partial(gapless.fused_experts, impl=impl)
    options = {"adapter_ids": adapters, "expert_map": MAP}
    full = run_experts(function, layer, **options)
    first = MAP.first_slot(2)
    tuned = tuned_rows(layer, first, len(ADAPTERS[2]))
    x = layer.x.detach().requires_grad_()
    out = function(
        x, layer.w_gate_up, layer.w_down, layer.topk_weights, layer.topk_ids, tuned=tuned, **options,
        **layer.options(),
    )  # fmt: skip
    assert torch.equal(out, full["out"])
    out.backward(layer.dout)
    assert torch.equal(x.grad, full["dx"])
    for name, rows in tuned._asdict().items():
        if name != "first":
            assert torch.equal(rows.grad, full[f"d{name}"][first : first + len(ADAPTERS[2])]), name
            assert (rows.grad != 0).any()


def test_an_optimizer_steps_tuned_experts_in_place():
    """Two steps on views of the weights: the layer sees what they write, and nothing else of it changes."""
    layer, adapters = mixed_batch(FP32)
    before = layer.w_gate_up.clone(), layer.w_down.clone()
    first, count = MAP.first_slot(0), len(ADAPTERS[0])
    tuned = tuned_rows(layer, first, count)._replace(b_gate_up=None, b_down=None)
    optimizer = torch.optim.SGD([tuned.w_gate_up, tuned.w_down], lr=0.02)
    losses = []
    for _ in range(3):
        out = native(
            layer.x, layer.w_gate_up, layer.w_down, layer.topk_weights, layer.topk_ids, tuned=tuned,
            adapter_ids=torch.zeros_like(adapters), expert_map=MAP,
        )  # fmt: skip
        loss = (out - layer.dout).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    for old, new in zip(before, (layer.w_gate_up, layer.w_down), strict=True):
        changed = (old != new).flatten(1).any(1)
        assert changed[first : first + count].all() and changed.sum() == count


HOLES = """
import ctypes, mmap, torch, gapless
from functools import partial
from gapless.ops.experts import TunedExperts
from gapless.testing.experts import make_experts, run_experts

class Virtual:
    def __init__(self, tensor):
        self.tensor = tensor
    def unsafe_tensor(self):
        return self.tensor

layer = make_experts(30, 2, 9, 32, 16)
ids = torch.where(layer.topk_ids == 4, -1, layer.topk_ids)
layer = layer.having(topk_ids=torch.where((ids > 1) & (ids < 7), ids % 2, ids))  # 2 to 6 are holes
want = run_experts(partial(gapless.fused_experts, impl="native"), layer)
page, flags = mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
libc = ctypes.CDLL(None, use_errno=True)
holders, virtual = [], []
for w in (layer.w_gate_up, layer.w_down):
    step = -(-w[0].nbytes // page) * page
    memory = mmap.mmap(-1, 9 * step, flags=flags)
    t = torch.frombuffer(memory, dtype=w.dtype).as_strided(w.shape, (step // w.element_size(), w.shape[2], 1))
    t.copy_(w)
    address = ctypes.c_void_p(t.data_ptr() + 2 * step)
    assert libc.mprotect(address, ctypes.c_size_t(5 * step), 0) == 0  # to look is to crash
    virtual.append(Virtual(t))
tuned = TunedExperts(7, *(v.tensor[7:9].detach().requires_grad_() for v in virtual))
x = layer.x.requires_grad_()
sizes = []
def pack(t):
    sizes.append(t.numel())
    return t.clone()  # as offloading does
with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
    out = gapless.fused_experts(x, *virtual, layer.topk_weights, layer.topk_ids, tuned=tuned)
out.backward(layer.dout)
assert torch.equal(out, want["out"]) and torch.equal(x.grad, want["dx"])
assert torch.equal(tuned.w_gate_up.grad, want["dw_gate_up"][7:9])
assert torch.equal(tuned.w_down.grad, want["dw_down"][7:9])
print(len(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
def test_holes_are_never_read():
    """Forward and backward over memory of which half may not be touched, and hooks that copy what is saved."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.mark.parametrize("backing", ["auto", "padded"])
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_virtual_tensors(impl: str, backing: Any):
    """Views of mapped rows are trained; experts that have no memory are refused."""
    layer = make_experts(30, 2, 9, 16, 8)
    holes = (layer.topk_ids > 1) & (layer.topk_ids < 7)
    layer = layer.having(topk_ids=torch.where(holes, -1, layer.topk_ids))
    virtual = []
    for name in ("w_gate_up", "w_down"):
        w = getattr(layer, name)
        made = VirtualTensor(w.shape, w.dtype, w.device, open_backing(backing, w.device), name=name)
        for first in (0, 7):
            made.resize(first, 2)
            made[first : first + 2].copy_(w[first : first + 2])
        virtual.append(made)
    function = partial(gapless.fused_experts, impl=impl)
    tuned = TunedExperts(7, *(w[7:9].detach().requires_grad_() for w in virtual))
    out = function(layer.x, *virtual, layer.topk_weights, layer.topk_ids, tuned=tuned)
    out.backward(layer.dout)
    want = run_experts(function, layer)
    assert torch.equal(out, want["out"])
    for name in ("w_gate_up", "w_down"):
        assert torch.equal(getattr(tuned, name).grad, want[f"d{name}"][7:9])
    layer.topk_ids[3, 1] = 4
    with pytest.raises(IndexError, match=r"experts in use.* is 4: it has to be .*0 to 1, 7 to 8"):
        function(layer.x, *virtual, layer.topk_weights, layer.topk_ids)


# Operators, and the compiler.


def raw_inputs(layer: Experts, block_size: int = 1) -> tuple:
    dispatch = gapless.align(layer.topk_ids, layer.num_experts, block_size)
    return dispatch.tensors, layer.activation, [block_size, int(layer.interleaved)], [1.702, layer.limit]


@pytest.mark.parametrize(
    ("case", "dtype", "save", "wanted"),
    [
        ("swiglu_everything", FP32, False, [1, 2]),
        ("relu2", FP64, True, [0, 4]),
        ("narrow_weights", BF16, True, [4, 0]),
        ("no_tokens", FP16, True, [0, 4]),
        ("no_choices", BF16, False, [3, 1]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_opcheck(case: str, dtype: torch.dtype, save: bool, wanted: list[int]):
    layer = BY_ID[case].make(dtype)
    rest = raw_inputs(layer, 4)
    weights = layer.w_gate_up, layer.w_down, layer.b_gate_up, layer.b_down
    forward = (layer.x, *weights, layer.topk_weights, layer.identity_weights, *rest)
    torch.library.opcheck(_native.fused_experts_fwd, (*forward, save))
    _, saved = _native.fused_experts_fwd(*forward, True)
    backward = (layer.dout, layer.x, *weights[:2], layer.b_down, layer.topk_weights, saved, *rest, wanted)
    torch.library.opcheck(_native.fused_experts_bwd, backward)


def rerouted_layers(x, w_gate_up, w_down, weights, ids, adapters, slots, identity):
    """Two layers, one of which reroutes."""
    options = {"impl": "native", "identity_weights": identity}
    x = x + gapless.fused_experts(
        x, w_gate_up, w_down, weights, ids, adapter_ids=adapters, expert_map=slots, **options
    )
    return gapless.fused_experts(x * 2, w_gate_up, w_down, weights, ids, activation="geglu", **options) * 3


# Dynamo and Inductor use what torch itself deprecates.
TRACING = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@TRACING
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "inference"])
def test_compile(gradient: bool):
    torch._dynamo.reset()
    compiled = torch.compile(rerouted_layers, fullgraph=True, backend="aot_eager")
    for tokens in (12, 31):
        layer, adapters = mixed_batch(FP32, tokens)
        identity = torch.rand(tokens)

        def run(function, layer=layer, adapters=adapters, identity=identity):
            leaves = [
                t.detach().requires_grad_(gradient)
                for t in (layer.x, layer.w_gate_up, layer.w_down, layer.topk_weights)
            ]
            last = identity.detach().requires_grad_(gradient)
            out = function(*leaves, layer.topk_ids, adapters, MAP.slots, last)
            if not gradient:
                return [out]
            return [out, *torch.autograd.grad(out, [*leaves, last], layer.dout)]

        for got, want in zip(run(compiled), run(rerouted_layers), strict=True):
            torch.testing.assert_close(got, want)


@TRACING
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "inference"])
def test_compile_with_one_tensor_twice(gradient: bool):
    """One matrix for both products, tokens for weights: Dynamo traces no Function that is given one tensor twice."""
    torch._dynamo.reset()

    def layer(x, w, ids):
        return gapless.fused_experts(x, w, w, x, ids, activation="relu2", impl="native")

    x, w = torch.rand(5, 4).requires_grad_(gradient), torch.randn(3, 4, 4).requires_grad_(gradient)
    ids = torch.tensor([[0, 1, 2, -1]] * 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, want = (f(x, w, ids) for f in (compiled, layer))
    assert torch.equal(got, want)
    if gradient:
        for a, b in zip(*(torch.autograd.grad(out.sum(), (x, w)) for out in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


@TRACING
def test_compile_with_inductor():
    """Which looks at the strides of what operators return."""
    torch._dynamo.reset()
    compiled = torch.compile(native, fullgraph=True)
    layer = make_experts(13, 2, 4, 16, 8)
    leaves = [t.requires_grad_() for t in (layer.x, layer.w_gate_up, layer.w_down, layer.topk_weights)]
    got, want = (f(*leaves, layer.topk_ids) for f in (compiled, native))
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(out, leaves, layer.dout) for out in (got, want)), strict=True):
        assert torch.equal(a, b)


@TRACING
def test_compile_with_a_dispatch():
    torch._dynamo.reset()

    def both(x, w_gate_up, w_down, weights, ids):
        dispatch = gapless.align(ids, 4)
        options = {"dispatch": dispatch, "impl": "native"}
        x = x + gapless.fused_experts(x, w_gate_up, w_down, weights, ids, **options)
        return gapless.unpermute(
            gapless.permute(x, dispatch, impl="native"), dispatch, weights, impl="native"
        )

    layer = make_experts(13, 2, 4, 16, 8)
    args = [t.requires_grad_() for t in (layer.x, layer.w_gate_up, layer.w_down, layer.topk_weights)]
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, want = (f(*args, layer.topk_ids) for f in (compiled, both))
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(out, args, layer.dout) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


# Bad input.

GOOD = make_experts(5, 2, 4, 8, 6, biases=True)
IDS = GOOD.topk_ids
ADAPTER_IDS = torch.zeros(5, dtype=torch.int64)
SLOTS = torch.arange(4, dtype=torch.int32)[None]


def a_dispatch(**how: Any) -> Any:
    return gapless.align(**{"ids": IDS, "num_experts": 4} | how)


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


ERRORS = [
    ("x_list", {"x": [1.0]}, TypeError, ["x is [1.0]", "tensor"]),
    ("x_rank", {"x": torch.ones(5)}, ValueError, ["x has shape [5]", "[tokens, hidden]"]),
    ("x_dtype", {"x": torch.ones(5, 8, dtype=torch.int64)}, TypeError, ["x is torch.int64", "float32"]),
    ("hidden", {"x": torch.ones(5, 9)}, ValueError, ["w_down has shape [4, 8, 6]", "[experts, 9, inter]"]),
    ("w_down_dtype", {"w_down": GOOD.w_down.half()}, TypeError, ["w_down is torch.float16", "x is torch.float32"]),
    ("w_down_list", {"w_down": [GOOD.w_down]}, TypeError, ["w_down is [tensor", "VirtualTensor"]),
    ("w_gate_up", {"w_gate_up": GOOD.w_gate_up[:, :11]}, ValueError, ["w_gate_up has shape [4, 11, 8]", "[4, 12, 8]"]),
    ("w_experts", {"w_gate_up": GOOD.w_gate_up[:3]}, ValueError, ["w_gate_up has shape [3, 12, 8]", "[4, 12, 8]"]),
    ("ungated", {"activation": "relu2"}, ValueError, ["w_gate_up has shape [4, 12, 8]", "[4, 6, 8]"]),
    ("w_device", {"w_down": GOOD.w_down.to("meta")}, ValueError, ["w_down is on meta", "x is on cpu"]),
    ("activation", {"activation": "silu"}, ValueError, ["activation is 'silu'", "swiglu", "relu2"]),
    ("interleaved", {"activation": "relu2", "interleaved": True}, ValueError, ["interleaved", "relu2"]),
    ("b_gate_up", {"b_gate_up": torch.ones(4, 6)}, ValueError, ["b_gate_up has shape [4, 6]", "[4, 12]"]),
    ("b_down", {"b_down": torch.ones(4, 8).half()}, TypeError, ["b_down is torch.float16"]),
    ("ids_dtype", {"topk_ids": IDS.float()}, TypeError, ["topk_ids is torch.float32", "int32"]),
    ("ids_shape", {"topk_ids": IDS[:4]}, ValueError, ["topk_ids has shape [4, 2]", "[5, top_k]"]),
    ("ids_none", {"topk_ids": IDS[:, :0]}, ValueError, ["topk_ids has shape [5, 0]", "choice"]),
    ("ids_range", {"topk_ids": torch.full_like(IDS, 4)}, ValueError, ["topk_ids[0, 0] is 4", "-1 to 3"]),
    ("ids_low", {"topk_ids": IDS - 7}, ValueError, ["topk_ids[0, 0] is -"]),
    ("experts", {"w_down": GOOD.w_down[:0]}, ValueError, ["w_down has shape [0, 8, 6]", "an expert"]),
    ("weights", {"topk_weights": torch.ones(5, 3)}, ValueError, ["topk_weights has shape [5, 3]", "[5, 2]"]),
    ("weights_dtype", {"topk_weights": torch.ones(5, 2).half()}, TypeError, ["topk_weights is torch.float16"]),
    ("identity", {"identity_weights": torch.ones(4)}, ValueError, ["identity_weights has shape [4]", "[5]"]),
    ("limit", {"limit": 0.0}, ValueError, ["limit is 0.0", "positive"]),
    ("alpha", {"alpha": float("nan")}, ValueError, ["alpha is nan", "finite"]),
    ("alpha_type", {"alpha": "1"}, TypeError, ["alpha is '1'", "number"]),
    ("adapters", {"adapter_ids": ADAPTER_IDS}, ValueError, ["adapter_ids is given, expert_map is not"]),
    ("map", {"expert_map": SLOTS}, ValueError, ["expert_map is given, adapter_ids is not"]),
    ("slots", {"adapter_ids": ADAPTER_IDS, "expert_map": MAP}, ValueError, ["expert_map leads to 15", "has 4"]),
    ("dispatch", {"dispatch": 3}, TypeError, ["dispatch is 3", "ExpertDispatch"]),
    ("impl", {"impl": "fast"}, ValueError, ["impl='fast'", "native"]),
    ("tuned", {"tuned": (0, GOOD.w_gate_up, GOOD.w_down)}, TypeError, ["tuned is", "TunedExperts"]),
    ("tuned_copy", {"tuned": TunedExperts(0, GOOD.w_gate_up[:2].clone(), GOOD.w_down[:2])}, ValueError,
     ["tuned.w_gate_up is no view of w_gate_up[0 : 2]"]),
    ("tuned_other", {"tuned": TunedExperts(1, GOOD.w_gate_up[:2], GOOD.w_down[:2])}, ValueError,
     ["tuned.w_gate_up is no view of w_gate_up[1 : 3]"]),
    ("tuned_range", {"tuned": TunedExperts(3, GOOD.w_gate_up[:2], GOOD.w_down[:2])}, ValueError,
     ["tuned.first is 3", "from 0 to 2"]),
    ("tuned_count", {"tuned": TunedExperts(0, GOOD.w_gate_up[:2], GOOD.w_down[:1])}, ValueError,
     ["tuned.w_down has shape [1, 8, 6]", "[2, 8, 6]"]),
    ("tuned_bias", {"b_down": None, "tuned": TunedExperts(0, GOOD.w_gate_up[:1], GOOD.w_down[:1], None, SLOTS)},
     ValueError, ["tuned.b_down is given, b_down is not"]),
    ("tuned_dense", {"w_down": leaf(GOOD.w_down), "tuned": TunedExperts(0, GOOD.w_gate_up[:1], GOOD.w_down[:1])},
     ValueError, ["w_down requires a gradient", "tuned"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(change: dict, error: type, words: list[str]):
    given = {n: getattr(GOOD, n) for n in ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids")}
    with pytest.raises(error) as caught:
        gapless.fused_experts(**given | GOOD.options() | change)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dispatch": lambda: a_dispatch(num_experts=5)}, ["dispatch is over 5 experts", "w_gate_up has 4"]),
        ({"dispatch": lambda: a_dispatch(ids=IDS[:4])}, ["dispatch is of ids [4, 2]", "[5, 2]"]),
        ({"dispatch": a_dispatch, "num_valid": lambda: torch.tensor([2], dtype=torch.int32)}, ["num_valid is given"]),
        ({"dispatch": a_dispatch, "adapter_ids": lambda: ADAPTER_IDS}, ["adapter_ids is given beside dispatch"]),
    ],
    ids=["experts", "ids", "num_valid", "adapters"],
)  # fmt: skip
def test_errors_of_a_dispatch(change: dict, words: list[str]):
    given = {n: getattr(GOOD, n) for n in ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids")}
    with pytest.raises(ValueError) as caught:
        gapless.fused_experts(**given, **{name: make() for name, make in change.items()})
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch compiles its own derivatives
def test_forward_mode_goes_to_the_reference():
    layer = make_experts(5, 2, 4, 8, 6, dtype=FP64)
    args = layer.w_gate_up, layer.w_down, layer.topk_weights, layer.topk_ids
    with forward_ad.dual_level():
        x = forward_ad.make_dual(layer.x, layer.dout)
        tangent = forward_ad.unpack_dual(gapless.fused_experts(x, *args)).tangent
        with pytest.raises(ValueError, match="forward-mode"):
            native(x, *args)
    step = 1e-6
    near = [native(layer.x + sign * step * layer.dout, *args) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (near[0] - near[1]) / (2 * step), rtol=1e-6, atol=1e-6)
