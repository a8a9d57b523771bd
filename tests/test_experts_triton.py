# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on experts against the reference: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import itertools
import mmap
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gapless.ops import expert_registry as registry
from gapless.plan.expert_dispatch import ExpertDispatch, max_blocks
from gapless.reference import experts as reference
from gapless.testing import assert_within_budget

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreter_only = pytest.mark.skipif(DEVICE == "cuda", reason="reads the interpreter's mind")
# Numpy, which runs the interpreter, tells of infinities and NaN, and of rows that are masked.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)

TRUNCATED = (
    "the interpreter cuts float32 to bfloat16 instead of rounding: up to one ulp instead of half of one"
)
BLOCK = 16


def align(ids: Tensor, experts: int, block_size: int = BLOCK) -> ExpertDispatch:
    """What expert_align gives, with a sort; on the CPU."""
    flat, pairs = ids.flatten().long(), ids.numel()
    blocks = max_blocks(pairs, experts, block_size)
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    padded = (counts + block_size - 1) // block_size * block_size
    offsets = torch.cat((padded.new_zeros(1), padded.cumsum(0)))
    order = flat.argsort(stable=True)[(flat < 0).sum() :]
    first = counts.cumsum(0) - counts
    rows = torch.arange(order.numel()) - first[flat[order]] + offsets[flat[order]]
    sorted_ids = torch.full((blocks * block_size,), pairs)
    sorted_ids[rows] = order
    inverse = torch.full((pairs,), -1)
    inverse[order] = rows
    expert_ids = torch.full((blocks,), -1)
    used = torch.repeat_interleave(torch.arange(experts), padded // block_size)
    expert_ids[: used.numel()] = used
    tensors = (sorted_ids, expert_ids, offsets, counts, inverse.view(ids.shape))
    return ExpertDispatch(*(t.int() for t in tensors), block_size)


class Layer(NamedTuple):
    """Inputs of a layer, and what it is."""

    x: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None
    b_down: Tensor | None
    topk_weights: Tensor
    identity_weights: Tensor | None
    ids: Tensor
    dout: Tensor
    activation: str = "swiglu"
    interleaved: bool = False
    limit: float = 1.0

    @property
    def options(self) -> dict:
        return {"activation": self.activation, "interleaved": self.interleaved, "limit": self.limit}

    @property
    def scalars(self) -> tuple[str, list[int], list[float]]:
        return self.activation, [BLOCK, int(self.interleaved)], [1.702, self.limit]


def make_layer(
    tokens: int = 9,
    top_k: int = 3,
    hidden: int = 40,
    inner: int = 36,
    experts: int = 4,
    dtype: torch.dtype = torch.float32,
    ids: Tensor | None = None,
    bias: bool = False,
    identity: bool = False,
    seed: int = 0,
    **options,
) -> Layer:
    """A layer of random weights; random ids, some of which are -1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    rows = inner if options.get("activation") == "relu2" else 2 * inner
    return Layer(
        draw(tokens, hidden),
        draw(experts, rows, hidden, scale=hidden**-0.5),
        draw(experts, hidden, inner, scale=max(inner, 1) ** -0.5),
        draw(experts, rows) if bias else None,
        draw(experts, hidden) if bias else None,
        torch.rand(tokens, top_k, generator=generator),
        torch.rand(tokens, generator=generator) if identity else None,
        torch.randint(-1, experts, (tokens, top_k), generator=generator) if ids is None else ids,
        draw(tokens, hidden),
        **options,
    )


NAMES = ("out", "dx", "dtopk_weights", "dw_gate_up", "dw_down", "db_gate_up", "db_down")


def run(layer: Layer, block_size: int = BLOCK, wanted: tuple[int, int] | None = None) -> list[Tensor]:
    """Results and gradients, named NAMES, of the operators on DEVICE; they come back to the CPU.

    dx has no part of the identity weights', which the operator leaves to its caller.
    """
    experts = layer.w_gate_up.shape[0]
    tensors = [t if t is None else t.to(DEVICE) for t in layer[:7]]
    x, w_gate_up, w_down, _, b_down, topk_weights, _ = tensors
    dispatch = align(layer.ids, experts, block_size).to(DEVICE).tensors
    activation, shape, limits = layer.scalars
    shape[0] = block_size
    out, saved = registry.fused_experts_fwd_triton(*tensors, dispatch, activation, shape, limits, True)
    grads = registry.fused_experts_bwd_triton(
        layer.dout.to(DEVICE), x, w_gate_up, w_down, b_down, topk_weights, saved, dispatch, activation, shape,
        limits, list(wanted or (0, experts)),
    )  # fmt: skip
    return [t.cpu() for t in (out, *grads)]


def expected(layer: Layer, double: bool) -> list[Tensor]:
    """What the reference gives for :func:`run`, in float64 or in the layer's own dtype."""
    leaves = [None if t is None else t.to(torch.float64 if double else t.dtype) for t in layer[:7]]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    x, w_gate_up, w_down, b_gate_up, b_down, topk_weights, identity = leaves
    out = reference.fused_experts(
        x, w_gate_up, w_down, topk_weights, layer.ids,
        b_gate_up=b_gate_up, b_down=b_down, identity_weights=identity, **layer.options,
    )  # fmt: skip
    alone = out if identity is None else out - (identity[:, None] * x).to(out.dtype)
    inputs = [x, topk_weights, w_gate_up, w_down, b_gate_up, b_down]
    given = [t for t in inputs if t is not None]
    zeros = {"allow_unused": True, "materialize_grads": True}
    found = iter(torch.autograd.grad(alone, given, layer.dout.to(alone.dtype), **zeros))
    shapes = (w_gate_up.shape[1], w_down.shape[1])
    empty = iter(out.new_empty(0, size) for size in shapes)
    return [out.detach(), *(next(empty) if t is None else next(found) for t in inputs)]


def check(layer: Layer, block_size: int = BLOCK) -> list[Tensor]:
    actual = run(layer, block_size)
    factor, reason = (4.0, TRUNCATED) if layer.x.dtype == torch.bfloat16 and DEVICE == "cpu" else (2.0, None)
    for name, *results in zip(NAMES, actual, expected(layer, True), expected(layer, False), strict=True):
        assert_within_budget(*results, name=name, factor=factor, reason=reason)
    return actual


LAYERS = {
    "swiglu": {"identity": True},
    "geglu": {"activation": "geglu", "bias": True},
    "geglu_tanh": {"activation": "geglu_tanh", "interleaved": True},
    "swiglu_oai": {"activation": "swiglu_oai", "interleaved": True, "bias": True},
    "relu2": {"activation": "relu2", "bias": True},
    "one choice": {"top_k": 1, "tokens": 40},
    "many choices": {"tokens": 2, "top_k": 16, "inner": 20, "experts": 3},
    "whole tiles": {"hidden": 64, "inner": 32},
    "several tiles": {"hidden": 70, "inner": 70, "tokens": 20, "top_k": 1, "experts": 2},
    "tiny": {"hidden": 1, "inner": 1},
    "one token": {"tokens": 1},
    "no expert": {"ids": torch.full((4, 2), -1), "tokens": 4, "top_k": 2, "identity": True},
    "one expert, over and over": {"ids": torch.full((20, 2), 1), "tokens": 20, "top_k": 2, "experts": 2},
    "experts without tokens": {"ids": torch.tensor([[1, -1, 1], [3, 1, 3]]), "tokens": 2, "bias": True},
    "more experts than pairs": {"tokens": 2, "experts": 9, "inner": 20},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str):
    check(make_layer(**LAYERS[name]))


@pytest.mark.parametrize("odd", [{"tokens": 0}, {"top_k": 0}, {"inner": 0}], ids=str)
def test_nothing(odd: dict):
    """Without tokens, choices or inner columns: only biases and identity weights are left."""
    layer = make_layer(**{"inner": 8, "bias": True, "identity": True, **odd})
    out, *grads = run(layer)
    alone = (layer.identity_weights[:, None] * layer.x).double()
    if "inner" in odd:
        there = layer.topk_weights.masked_fill(layer.ids < 0, 0.0).double()
        alone = alone + (there[..., None] * layer.b_down[layer.ids]).sum(1)
    assert_within_budget(out, alone, alone.float())
    assert [g.shape for g in grads] == [
        t.shape for t in (layer.x, layer.topk_weights, *layer[1:3], *layer[3:5])
    ]
    assert not any(g.any() for g in (grads[0], *grads[2:5]))
    assert bool(grads[5].any()) == ("inner" in odd)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype):
    check(make_layer(dtype=dtype, bias=True, identity=True, hidden=48, inner=32))


def test_narrow_weights_of_choices():
    layer = make_layer(tokens=4, inner=20, dtype=torch.float16)
    check(layer._replace(topk_weights=layer.topk_weights.half()))


def test_block_sizes():
    """Results do not depend on them: an expert's rows are summed in the same order."""
    layer = make_layer(tokens=20, inner=20, experts=2)
    assert all(map(torch.equal, check(layer, 64), run(layer)))


@pytest.mark.parametrize("block_size", [1, 48])
def test_block_size_of_no_tile(block_size: int):
    with pytest.raises(ValueError, match=f"block_size is {block_size}: .* power of two"):
        run(make_layer(), block_size)


def test_wanted_experts():
    """Gradients of weights for some experts only; the others' are not computed."""
    layer = make_layer(tokens=4, hidden=20, inner=20, bias=True)
    whole, part = run(layer), run(layer, wanted=(1, 3))
    assert all(map(torch.equal, part[:3], whole[:3]))
    assert all(torch.equal(some, all_[1:4]) for some, all_ in zip(part[3:], whole[3:], strict=True))
    assert [t.shape[0] for t in run(layer, wanted=(2, 0))[3:]] == [0] * 4


def test_without_saving():
    layer = make_layer(bias=True, identity=True)
    tensors = [t if t is None else t.to(DEVICE) for t in layer[:7]]
    dispatch = align(layer.ids, 4).to(DEVICE).tensors
    (out, saved), (want, _) = (
        registry.fused_experts_fwd_triton(*tensors, dispatch, *layer.scalars, save) for save in (False, True)
    )
    assert torch.equal(out, want) and saved.shape == (0, 72)


def test_same_bits_every_time():
    layer = make_layer(tokens=4, inner=20, bias=True, identity=True)
    assert all(map(torch.equal, run(layer), run(layer)))


def test_strides():
    """Weights, rows and gradients that are views: the same bits as of copies."""
    layer = make_layer(tokens=4, inner=20, bias=True)
    odd = layer._replace(
        x=torch.cat((layer.x, layer.x), 1)[:, :40],
        w_gate_up=layer.w_gate_up.transpose(0, 1).contiguous().transpose(0, 1),
        w_down=layer.w_down.mT.contiguous().mT,
        b_gate_up=layer.b_gate_up.t().contiguous().t(),
        b_down=layer.b_down.t().contiguous().t(),
        topk_weights=layer.topk_weights.t().contiguous().t(),
        dout=layer.dout.t().contiguous().t(),
    )
    assert not any(t.is_contiguous() for t in (*odd[:6], odd.dout))
    assert all(map(torch.equal, run(odd), run(layer)))


def test_nan_stays_with_its_expert_and_token():
    """Experts without tokens hold NaN, and so does one token: only that token, and its experts' gradients, do."""
    ids = torch.tensor([[1, 3], [1, -1], [3, 3], [-1, 0]])
    layer = make_layer(4, 2, inner=20, ids=ids, bias=True)
    want = run(layer)
    for t in layer[1:5]:
        t[2] = torch.nan
    assert all(map(torch.equal, run(layer), want))
    layer.x[3] = torch.nan
    dirty = run(layer)
    for name, got, clean in zip(NAMES, dirty, want, strict=True):
        tokens = name in NAMES[:3]
        untouched = slice(0, 3) if tokens else slice(1, None)
        assert torch.equal(got[untouched], clean[untouched]), name
    assert dirty[0][3].isnan().all() and dirty[3][0].isnan().any()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_odd_values(activation: str):
    """At and beyond limits, where exponentials overflow; NaN and infinities are where the reference has them."""
    gates, ups = torch.ones(3, 1), torch.tensor([[1.0], [-1.0], [0.5]])
    rows = gates if activation == "relu2" else torch.cat((gates, ups))
    weights = rows[None], torch.ones(1, 1, 3), None, None

    def layer(values: list[float]) -> Layer:
        """Gates are the values, up values too, their opposites and halves."""
        x = torch.tensor(values)[:, None]
        one = torch.ones_like(x)
        return Layer(x, *weights, one, None, torch.zeros_like(x).long(), one, activation, limit=1.0)

    check(layer([0.0, 1.0, -1.0, 2.0, 40.0, -40.0]))
    odd = layer([torch.nan, torch.inf, -torch.inf, 1e4, -1e4])
    assert_within_budget(run(odd)[0], expected(odd, True)[0], expected(odd, False)[0])


class Reads:
    """Which bytes of some tensors the interpreter reads while it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        self.offsets: list[set[int]] = [set() for _ in tensors]
        load = InterpreterBuilder.create_masked_load

        def watched(builder, ptrs, mask, *rest):
            there = torch.from_numpy(ptrs.data[mask.data].astype("int64"))
            for (begin, end), offsets in zip(self.spans, self.offsets, strict=True):
                offsets.update((there[(there >= begin) & (there < end)] - begin).tolist())
            return load(builder, ptrs, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)


@interpreter_only
def test_only_experts_with_tokens_are_read(monkeypatch: pytest.MonkeyPatch):
    """Every byte of theirs and none of their neighbours', which need not be mapped."""
    layer = make_layer(3, 2, hidden=20, inner=18, ids=torch.tensor([[1, 3], [1, -1], [3, 3]]), bias=True)
    weights = [layer.w_gate_up, layer.w_down, layer.b_gate_up, layer.b_down]
    reads = Reads(monkeypatch, weights)
    run(layer)
    for t, offsets in zip(weights, reads.offsets, strict=True):
        size = t[0].nbytes
        assert offsets == {e * size + at for e in (1, 3) for at in range(0, size, t.element_size())}


def spread(t: Tensor) -> Tensor:
    """A copy whose first dimension has a step of about 2^30 elements, in memory that is there where it is used."""
    step = (1 << 30) + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    whole = torch.frombuffer(mmap.mmap(-1, t.element_size() * step * t.shape[0], flags=flags), dtype=t.dtype)
    return whole.as_strided(t.shape, (step, *t.stride()[1:])).copy_(t)


@interpreter_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="flags of Linux")
def test_distances_beyond_int32():
    """Experts and tokens so far apart that their distance in elements is no int32."""
    ids = torch.tensor([[0, 3]] * 4)
    layer = make_layer(4, 2, 20, 18, dtype=torch.float16, bias=True, identity=True, ids=ids)
    far = {name: spread(getattr(layer, name)) for name in ("x", "dout", *Layer._fields[1:5])}
    assert all(map(torch.equal, run(layer._replace(**far)), run(layer)))

    dispatch = align(ids, 4)
    x, weights, b, offs = layer.x, layer.topk_weights, layer.w_down, torch.tensor([1, 1, 2, 4]).int()
    inverse = torch.tensor([[3, 0], [-1, 2]]).int()
    calls = [
        (registry.expert_gather_triton, (x, weights, dispatch.sorted_ids, 2), 0),
        (registry.expert_combine_triton, (x, weights[:2], inverse), 0),
        (registry.expert_dot_triton, (x, x[:2], inverse), 0),
        (registry.expert_dot_triton, (x[:2], x, torch.tensor([[0], [1], [0], [1]]).int()), 1),
        (registry.expert_grouped_mm_triton, (x, b, offs), 0),
        (registry.expert_grouped_mm_triton, (x, b, offs), 1),
        (registry.expert_grouped_outer_triton, (x, x, offs), 0),
        (registry.expert_grouped_outer_triton, (x, x, offs), 1),
    ]
    for function, arguments, place in calls:
        apart = list(arguments)
        apart[place] = spread(arguments[place])
        assert torch.equal(function(*apart), function(*arguments)), function


# Rows.


class Rows(NamedTuple):
    """x [T, H], weights [T, K], rows [R, H] and a dispatch."""

    x: Tensor
    weights: Tensor
    rows: Tensor
    dispatch: ExpertDispatch


def make_rows(
    dtype: torch.dtype = torch.float32, tokens: int = 11, top_k: int = 3, block_size: int = BLOCK
) -> Rows:
    layer = make_layer(tokens, top_k, hidden=70, dtype=dtype)
    dispatch = align(layer.ids, 4, block_size)
    rows = torch.randn(dispatch.rows, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[dispatch.sorted_ids == dispatch.pairs] = torch.nan  # nobody reads a filler
    return Rows(layer.x, layer.topk_weights, rows, dispatch)


ROWS = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "no padding": {"block_size": 1},
    "one choice": {"top_k": 1},
    "many choices": {"top_k": 16, "tokens": 3},
    "no token": {"tokens": 0},
    "no choice": {"top_k": 0},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, weighted: bool):
    case = make_rows(**ROWS[name])
    weights = case.weights if weighted else None
    x, rows, there = case.x.to(DEVICE), case.rows.to(DEVICE), None if weights is None else weights.to(DEVICE)
    dispatch = case.dispatch.to(DEVICE)
    truncated = case.x.dtype == torch.bfloat16 and DEVICE == "cpu"
    budget = {"factor": 4.0, "reason": TRUNCATED} if truncated else {}

    gathered = registry.expert_gather_triton(x, there, dispatch.sorted_ids, dispatch.top_k).cpu()
    real = case.dispatch.sorted_ids < case.dispatch.pairs
    wide = reference.permute(case.x.double(), case.dispatch)
    if weighted:
        wide[real] *= case.weights.flatten()[case.dispatch.sorted_ids[real].long(), None]
    assert_within_budget(gathered, wide, wide.to(gathered.dtype), name="gather", **budget)
    if not weighted:
        assert torch.equal(gathered, wide.to(gathered.dtype))

    combined = registry.expert_combine_triton(rows, there, dispatch.inverse).cpu()
    oracle = reference.unpermute(case.rows.double(), case.dispatch, weights)
    witness = reference.unpermute(case.rows, case.dispatch, weights)
    assert_within_budget(combined, oracle, witness, name="combine", **budget)


@pytest.mark.parametrize("name", ROWS)
def test_dot(name: str):
    case = make_rows(**ROWS[name])
    found = registry.expert_dot_triton(
        case.rows.to(DEVICE), case.x.to(DEVICE), case.dispatch.inverse.to(DEVICE)
    ).cpu()
    inverse = case.dispatch.inverse.long()
    oracle, witness = (
        torch.where(inverse < 0, 0.0, (rows[inverse.clamp(min=0)] * x[:, None]).sum(-1))
        if rows.shape[0]
        else rows.new_zeros(inverse.shape)
        for rows, x in ((case.rows.double(), case.x.double()), (case.rows.float(), case.x.float()))
    )
    assert found.dtype == torch.float32
    assert_within_budget(found, oracle, witness)


# Grouped products.

OFFS = {
    "ragged": [3, 3, 40, 41, 50],
    "all rows": [10, 20, 30, 40, 53],
    "no rows": [0, 0, 0, 0, 0],
    "first and last are empty": [0, 20, 30, 53, 53],
}


def matrices(rows: int, depth: int, columns: int, experts: int = 5, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = (rows, depth), (experts, depth, columns), (rows, columns)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def outer(a: Tensor, c: Tensor, offs: Tensor) -> Tensor:
    """[E, P, Q], one expert after the other."""
    bounds = [0, *offs.tolist()]
    parts = [a[begin:end].mT @ c[begin:end] for begin, end in itertools.pairwise(bounds)]
    return torch.stack(parts) if parts else a.new_zeros(0, a.shape[1], c.shape[1])


def check_grouped(a: Tensor, b: Tensor, c: Tensor, offs: Tensor) -> None:
    """Both products."""
    truncated = a.dtype == torch.bfloat16 and DEVICE == "cpu"
    budget = {"factor": 4.0, "reason": TRUNCATED} if truncated else {}
    on_device = [t.to(DEVICE) for t in (a, b, c, offs)]
    product = registry.expert_grouped_mm_triton(on_device[0], on_device[1], on_device[3]).cpu()
    sums = registry.expert_grouped_outer_triton(on_device[0], on_device[2], on_device[3]).cpu()
    want, dwant = reference.grouped_mm(a.double(), b.double(), offs), outer(a.double(), c.double(), offs)
    naive, dnaive = reference.grouped_mm(a, b, offs), outer(a, c, offs)
    assert_within_budget(product, want, naive, name="product", **budget)
    assert_within_budget(sums, dwant, dnaive, name="outer", **budget)
    assert not product[int(offs[-1]) if offs.numel() else 0 :].any()


@pytest.mark.parametrize("name", OFFS)
def test_grouped(name: str):
    check_grouped(*matrices(53, 40, 36), torch.tensor(OFFS[name], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grouped_in_low_precision(dtype: torch.dtype):
    check_grouped(*matrices(53, 40, 36, dtype=dtype), torch.tensor(OFFS["ragged"], dtype=torch.int32))


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "experts"),
    [(0, 8, 8, 2), (5, 0, 8, 2), (5, 8, 0, 2), (1, 1, 1, 1), (3, 4, 5, 0)],
)
def test_grouped_edges(rows: int, depth: int, columns: int, experts: int):
    offs = torch.full((experts,), rows, dtype=torch.int32)
    check_grouped(*matrices(rows, depth, columns, experts), offs)


def test_grouped_strides():
    """Any strides of b, one matrix for all experts among them; rows of a that lie apart."""
    a, b, c = matrices(53, 40, 36)
    offs = torch.tensor(OFFS["ragged"], dtype=torch.int32)
    a, c = (torch.cat((t, t), 1)[:, : t.shape[1]] for t in (a, c))
    for odd in (
        b.mT.contiguous().mT,
        b.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        b[:1].expand(5, -1, -1),
    ):
        check_grouped(a, odd, c, offs)


@interpreter_only
def test_grouped_reads_no_other_expert(monkeypatch: pytest.MonkeyPatch):
    a, b, _ = matrices(53, 20, 18)
    reads = Reads(monkeypatch, [b])
    registry.expert_grouped_mm_triton(a, b, torch.tensor([0, 20, 20, 53, 53], dtype=torch.int32))
    size = b[0].nbytes
    assert reads.offsets[0] == {e * size + at for e in (1, 3) for at in range(0, size, 4)}


# Operators.


def test_operators_of_the_layer():
    # Every row has a pair: the others of what is saved are anything, and the check compares them.
    layer = make_layer(16, 1, 8, 8, ids=torch.zeros(16, 1), experts=1, bias=True, identity=True)
    tensors = [t.to(DEVICE) for t in layer[:7]]
    x, w_gate_up, w_down, _, b_down, topk_weights, _ = tensors
    dispatch = align(layer.ids, 1).to(DEVICE).tensors
    forward = (*tensors, dispatch, *layer.scalars, True)
    torch.library.opcheck(registry.fused_experts_fwd_triton, forward)
    _, saved = registry.fused_experts_fwd_triton(*forward)
    backward = (layer.dout.to(DEVICE), x, w_gate_up, w_down, b_down, topk_weights, saved, dispatch)
    torch.library.opcheck(registry.fused_experts_bwd_triton, (*backward, *layer.scalars, [0, 1]))


def test_operators_of_rows_and_groups():
    case = make_rows()
    x, weights, rows = (t.to(DEVICE) for t in case[:3])
    dispatch = case.dispatch.to(DEVICE)
    torch.library.opcheck(registry.expert_gather_triton, (x, weights, dispatch.sorted_ids, 3))
    torch.library.opcheck(registry.expert_combine_triton, (rows.nan_to_num(), weights, dispatch.inverse))
    torch.library.opcheck(registry.expert_dot_triton, (rows.nan_to_num(), x, dispatch.inverse))
    a, b, c, offs = (t.to(DEVICE) for t in (*matrices(9, 8, 4, 2), torch.tensor([4, 7], dtype=torch.int32)))
    torch.library.opcheck(registry.expert_grouped_mm_triton, (a, b, offs))
    torch.library.opcheck(registry.expert_grouped_outer_triton, (a, c, offs))
