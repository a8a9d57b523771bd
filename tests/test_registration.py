# SPDX-License-Identifier: Apache-2.0
"""How the package enters a process and torch: imports, schemas, fakes, opcheck, torch.compile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import gapless
from gapless import _native
from gapless.testing import Batch, attend, make_batch, scatter_pages
from gapless.testing.block_sparse import layout_batch, make_layout

# Imports, each in a process of its own.


def run_python(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_in_no_optional_package():
    loaded = run_python(
        "import sys, torch; before = set(sys.modules)\n"
        "import gapless, gapless.reference, gapless.plan, gapless.testing\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not torch.cuda.is_initialized()\n"
        "optional = {'triton', 'transformers', 'diffusers', 'scipy', 'flash_attn', 'matplotlib', 'typer', 'rich'}\n"
        "print(*sorted(new & (optional | {'pytest', 'hypothesis'})))"
    )
    assert loaded.split() == []


def test_a_call_on_the_cpu_brings_in_no_triton():
    loaded = run_python(
        "import sys, torch, gapless\n"
        "x = torch.randn(4, 1, 8, requires_grad=True)\n"
        "gapless.varlen_attention(x, x, x, torch.tensor([0, 4]), causal=True).sum().backward()\n"
        "print('triton' in sys.modules)",
        TRITON_INTERPRET="0",
    )
    assert loaded.strip() == "False"


# Schemas.

NATIVE = [
    "varlen_attention_fwd", "varlen_attention_bwd", "block_sparse_fwd", "block_sparse_bwd", "block_mass",
    "attention_mass_fwd", "reroute", "expert_align", "expert_reroute_align", "expert_gather", "expert_combine",
    "expert_dot", "expert_grouped_mm", "expert_grouped_outer", "fused_experts_fwd", "fused_experts_bwd",
]  # fmt: skip
OPS = sorted({name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gapless::")})


def schema_of(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.gapless, name.partition("::")[2]).default._schema


def test_there_are_ops():
    assert {f"gapless::{name}" for name in NATIVE} <= set(OPS)


# Logits become their gradient where they lie: a second tensor of that size is what these are there to avoid.
IN_PLACE = {
    "gapless::cross_entropy_bwd_in_place",
    "gapless::cross_entropy_gradient",
    "gapless::cross_entropy_gradient_triton",
}


@pytest.mark.parametrize("name", OPS)
def test_schema(name: str):
    schema = schema_of(name)
    assert len(schema.arguments) <= 12
    assert schema.is_mutable == (name in IN_PLACE)


@pytest.mark.parametrize("name", NATIVE)
def test_triton_twin_has_the_same_schema(name: str):
    native, twin = (schema_of(f"gapless::{n}") for n in (name, name + "_triton"))
    assert str(twin).replace("_triton", "") == str(native)


# opcheck: schema, autograd registration, fake against real, and symbolic shapes.


def forward_args(batch: Batch, *, sinks=None, slopes=None, pages=None) -> tuple:
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q, batch.cu_seqlens_k).tensors
    k, v, table, used = (batch.k, batch.v, None, None) if pages is None else pages
    return batch.q, k, v, plan, used, table, slopes, sinks, [0.25, 2.0], [-1, 0]


FORWARD = {
    "plain": lambda: forward_args(make_batch([5, 0, 9])),
    "dims_and_heads": lambda: forward_args(make_batch([5, 3], [7, 2], 4, 2, 12, 20)),
    "bfloat16": lambda: forward_args(make_batch([5, 3], dtype=torch.bfloat16)),
    "float64": lambda: forward_args(make_batch([5, 3], dtype=torch.float64)),
    "non_contiguous": lambda: forward_args(make_batch([5, 3], non_contiguous=True)),
    "sinks_and_slopes": lambda: forward_args(
        make_batch([5, 3]), sinks=torch.randn(2), slopes=torch.rand(2, 2)
    ),
    "paged": lambda: forward_args(make_batch([5, 3]), pages=paged(make_batch([5, 3]))),
    "empty": lambda: forward_args(make_batch([])),
}


def paged(batch: Batch) -> tuple:
    pages = scatter_pages(batch.k, batch.v, batch.cu_seqlens_q.diff().tolist(), 4)
    return pages.k, pages.v, pages.block_table, pages.seqused_k


@pytest.mark.parametrize("name", FORWARD)
def test_opcheck_forward(name: str):
    args = FORWARD[name]()
    if name == "non_contiguous":  # NaN around the windows is equal to nothing
        args = tuple(torch.nan_to_num(x) if isinstance(x, torch.Tensor) else x for x in args)
    if name == "paged":
        args = (args[0], torch.nan_to_num(args[1]), torch.nan_to_num(args[2]), *args[3:])
    torch.library.opcheck(_native.varlen_attention_fwd, args)


@pytest.mark.parametrize("dlse", [True, False], ids=["dlse", "no_dlse"])
@pytest.mark.parametrize("name", [n for n in FORWARD if n != "paged"])
def test_opcheck_backward(name: str, dlse: bool):
    q, k, v, plan, _, _, slopes, sinks, score, window = FORWARD[name]()
    out, lse = _native.varlen_attention_fwd(q, k, v, plan, None, None, slopes, sinks, score, window)
    lse = torch.nan_to_num(lse, neginf=-torch.inf)
    dout, dlse_in = torch.randn_like(out), torch.randn_like(lse) if dlse else None
    args = (dout, dlse_in, q, k, v, out, lse, plan, slopes, sinks, score, window)
    torch.library.opcheck(_native.varlen_attention_bwd, args)


@pytest.mark.parametrize("how", ["make", "windowed"])
def test_opcheck_plan(how: str):
    cu = torch.tensor([0, 3, 3, 300], dtype=torch.int32)
    window = [-1, -1] if how == "make" else [8, 0]
    torch.library.opcheck(torch.ops.gapless.varlen_plan.default, (cu, None, 300, 300, window))


SPARSE = {
    "plain": lambda: make_layout([70, 0, 30]),
    "partial": lambda: make_layout([70, 30], [40, 90], block_q=32, block_k=16, partial=0.5),
    "heads": lambda: make_layout([70, 30], heads=2, empty_rows=0.3, empty_columns=0.3),
    "empty": lambda: make_layout([]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_opcheck_block_sparse(name: str, dtype: torch.dtype):
    layout = SPARSE[name]()
    batch = layout_batch(layout, heads=4, kv_heads=2, dim=12, dim_v=20, dtype=dtype)
    inputs, lists = (batch.q, batch.k, batch.v), layout.tensors
    shared = [layout.block_q, layout.block_k, layout.heads], [0.25, 2.0], [-1, 0]
    torch.library.opcheck(_native.block_sparse_fwd, (*inputs, lists, *shared))
    results = _native.block_sparse_fwd(*inputs, lists, *shared)
    for dlse in (torch.ones_like(results[1]), None):
        torch.library.opcheck(_native.block_sparse_bwd, (batch.dout, dlse, *inputs, *results, lists, *shared))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[70, 0, 30], []], ids=str)
def test_opcheck_mass(lengths: list[int], dtype: torch.dtype):
    batch = make_batch(lengths, heads=4, kv_heads=2, dim_v=20, dtype=dtype)
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q).tensors
    shared = plan, [32, 64, 4 if lengths else 0, 2 if lengths else 0], [0.25, 0.0], [-1, 0]
    torch.library.opcheck(_native.attention_mass_fwd, (batch.q, batch.k, batch.v, *shared))
    _, lse, _ = _native.attention_mass_fwd(batch.q, batch.k, batch.v, *shared)
    torch.library.opcheck(_native.block_mass, (batch.q, batch.k, lse, *shared))


# torch.compile: no graph break, both directions, two sizes of each input.


def layers(q, k, v, cu_seqlens, plan, sinks):
    """Two layers over one plan."""
    x = gapless.varlen_attention(q, k, v, cu_seqlens, causal=True, sinks=sinks, plan=plan, impl="native")
    x, lse = gapless.varlen_attention(
        x + q, k * 2, v, cu_seqlens, window=(6, 0), softcap=5.0, plan=plan, return_lse=True, impl="native"
    )
    return x * 3, lse


def differentiated(function, batch: Batch, plan, sinks):
    leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v, sinks)]
    out, lse = function(*leaves[:3], batch.cu_seqlens_q, plan, leaves[3])
    return [out, lse, *torch.autograd.grad([out, lse], leaves, [batch.dout, batch.dlse])]


# Dynamo and Inductor use what torch itself deprecates.
TRACING = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@TRACING
@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
def test_compile(planned: bool, dynamic: bool | None):
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sinks = torch.tensor([0.3, -1.5])
    for lengths in ([5, 0, 9], [40, 3, 1, 20]):
        batch = make_batch(lengths, heads=2, kv_heads=1)
        plan = gapless.VarlenPlan.make(batch.cu_seqlens_q) if planned else None
        want = differentiated(layers, batch, plan, sinks)
        for got, expected in zip(differentiated(compiled, batch, plan, sinks), want, strict=True):
            torch.testing.assert_close(got, expected)


@TRACING
def test_compile_with_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, dynamic=True)
    sinks = torch.tensor([0.3, -1.5])
    for lengths in ([5, 0, 9], [40, 3, 1, 20]):
        batch = make_batch(lengths, heads=2, kv_heads=1)
        plan = gapless.VarlenPlan.make(batch.cu_seqlens_q)
        want = differentiated(layers, batch, plan, sinks)
        for got, expected in zip(differentiated(compiled, batch, plan, sinks), want, strict=True):
            torch.testing.assert_close(got, expected)


@TRACING
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "inference"])
@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("made", ["argument", "inside"])
def test_compile_with_one_tensor_three_times(made: str, planned: bool, gradient: bool):
    """Dynamo traces no autograd.Function that is given one tensor twice: what it gets are views."""
    torch._dynamo.reset()

    def attention(x, cu_seqlens, plan):
        x = x if made == "argument" else x * 2
        return gapless.varlen_attention(x, x, x, cu_seqlens, causal=True, plan=plan, impl="native")

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 0, 9], [40, 3, 1, 20]):
        batch = make_batch(lengths)
        plan = gapless.VarlenPlan.make(batch.cu_seqlens_q) if planned else None
        x = batch.q.requires_grad_(gradient)
        got, want = (f(x, batch.cu_seqlens_q, plan) for f in (compiled, attention))
        assert torch.equal(got, want)
        if gradient:
            dx, want_dx = (torch.autograd.grad(out, x, batch.dout)[0] for out in (got, want))
            torch.testing.assert_close(dx, want_dx)


def sparse_layers(q, k, v, layout):
    """Two layers over one layout."""
    x = gapless.block_sparse_attention(q, k, v, layout, causal=True, impl="native")
    x, lse = gapless.block_sparse_attention(
        x + q, k * 2, v, layout, softcap=5.0, return_lse=True, impl="native"
    )
    return x * 3, lse


@TRACING
@pytest.mark.parametrize(
    ("dynamic", "backend"), [(False, "aot_eager"), (None, "aot_eager"), (None, "inductor")], ids=str
)
def test_compile_block_sparse(dynamic: bool | None, backend: str):
    torch._dynamo.reset()
    compiled = torch.compile(sparse_layers, fullgraph=True, dynamic=dynamic, backend=backend)
    for lengths in ([70, 0, 30], [40, 90]):
        layout = make_layout(lengths, lengths[::-1])
        batch = layout_batch(layout, heads=2, kv_heads=1)

        def differentiated(function, batch=batch, layout=layout):
            leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
            found = function(*leaves, layout)
            return [*found, *torch.autograd.grad(found, leaves, [batch.dout, batch.dlse])]

        for got, want in zip(differentiated(compiled), differentiated(sparse_layers), strict=True):
            torch.testing.assert_close(got, want)


@TRACING
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "inference"])
def test_compile_block_sparse_with_one_tensor_three_times(gradient: bool):
    torch._dynamo.reset()

    def attention(x, layout):
        return gapless.block_sparse_attention(x, x, x, layout, impl="native")

    layout = make_layout([70, 30])
    batch = layout_batch(layout)
    x = batch.q.requires_grad_(gradient)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got, want = (f(x, layout) for f in (compiled, attention))
    assert torch.equal(got, want)
    if gradient:
        dx, want_dx = (torch.autograd.grad(out, x, batch.dout)[0] for out in (got, want))
        torch.testing.assert_close(dx, want_dx)


@TRACING
@pytest.mark.parametrize("op", ["varlen", "block_sparse"])
def test_compile_triton(op: str):
    """Whether Triton can run is asked while tracing; what it needs of a layout is made there too."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = make_layout([40, 9], block_q=32, block_k=32).to(device)

    def attention(q, k, v, cu_seqlens):
        if op == "varlen":
            return gapless.varlen_attention(q, k, v, cu_seqlens, causal=True, impl="triton")
        return gapless.block_sparse_attention(q, k, v, layout, causal=True, impl="triton")

    batch = make_batch([40, 9], heads=2, kv_heads=1)
    leaves = [x.to(device).requires_grad_() for x in (batch.q, batch.k, batch.v)]
    found = []
    for function in (torch.compile(attention, fullgraph=True, backend="aot_eager"), attention):
        out = function(*leaves, batch.cu_seqlens_q.to(device))
        found.append([out, *torch.autograd.grad(out, leaves, batch.dout.to(device))])
    assert all(map(torch.equal, *found))


@TRACING
def test_compiled_mass_of_one_sequence():
    """Its lengths are those of its tensors; the lengths of several would have to be read."""
    torch._dynamo.reset()

    def search(q, k, v, cu_seqlens):
        options = {"cu_seqlens_q": cu_seqlens, "causal": True, "impl": "native"}
        out, lse, mass = gapless.attention_with_mass(q, k, v, **options)
        return out, mass, gapless.block_mass(q, k, lse, block_q=32, **options)

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    for lengths in ([70], [130]):
        batch = make_batch(lengths)
        args = (batch.q, batch.k, batch.v, batch.cu_seqlens_q)
        assert all(map(torch.equal, compiled(*args), search(*args)))


def test_compiled_inference_with_pages():
    torch._dynamo.reset()

    def decode(q, k, v, cu_seqlens, used, table):
        return gapless.varlen_attention(
            q, k, v, cu_seqlens, causal=True, seqused_k=used, block_table=table, impl="native"
        )

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 9], [30, 1]):
        batch = make_batch([1, 1], lengths, 4, 2)
        pages = scatter_pages(batch.k, batch.v, lengths, 4)
        args = (batch.q, pages.k, pages.v, batch.cu_seqlens_q, pages.seqused_k, pages.block_table)
        assert torch.equal(compiled(*args), decode(*args))


# Autograd of the raw operators: there is none, and it says so.


@pytest.mark.filterwarnings("default:.*an autograd kernel was not registered")
def test_a_raw_op_has_no_gradient_and_warns():
    batch = make_batch([5, 3])
    plan = gapless.VarlenPlan.make(batch.cu_seqlens_q).tensors
    q = batch.q.requires_grad_()
    out, _ = _native.varlen_attention_fwd(
        q, batch.k, batch.v, plan, None, None, None, None, [0.25, 0.0], [-1, -1]
    )
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        out.sum().backward()


def test_second_derivatives_are_refused():
    batch = make_batch([5, 3])
    q = batch.q.requires_grad_()
    out = gapless.varlen_attention(q, batch.k, batch.v, batch.cu_seqlens_q, impl="native")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_attend_through_auto_takes_native_on_the_cpu():
    batch = make_batch([5, 3])
    for got, want in zip(
        attend(gapless.varlen_attention, batch)[:5],
        attend(lambda *a, **o: gapless.varlen_attention(*a, impl="native", **o), batch)[:5],
        strict=True,
    ):
        assert torch.equal(got, want)
