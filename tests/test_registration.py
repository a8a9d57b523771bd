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

# Imports, each in a process of its own.


def run_python(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["gapless", "gapless.reference", "gapless.plan", "gapless.testing"])
def test_import_brings_in_no_optional_package(module: str):
    loaded = run_python(
        f"import sys, torch; before = set(sys.modules); import {module}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*sorted(new & {'triton', 'transformers', 'flash_attn', 'matplotlib', 'typer', 'rich', 'pytest'}))"
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

OPS = sorted({name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gapless::")})


def schema_of(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.gapless, name.partition("::")[2]).default._schema


def test_there_are_ops():
    assert {"gapless::varlen_attention_fwd", "gapless::varlen_attention_bwd"} <= set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_schema(name: str):
    schema = schema_of(name)
    assert len(schema.arguments) <= 12
    assert not schema.is_mutable


@pytest.mark.parametrize("name", ["varlen_attention_fwd", "varlen_attention_bwd"])
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
