# SPDX-License-Identifier: Apache-2.0
"""One binary, kernels for several instruction sets: each gives the same results, and the environment caps the choice.

That their objects export no weak symbols is a test of CTest (CMakeLists.txt).
"""

import os
import subprocess
import sys

import pytest
import torch

import gapless
from gapless import _native
from gapless.testing import assert_within_budget

ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
LENGTHS = [1, 37, 0, 130, 64]
CHILD = """
import sys, torch, gapless
from gapless import _native
runs = []
for case in torch.load(sys.argv[1]):
    q, k, v = (case[name].requires_grad_() for name in "qkv")
    out, lse = gapless.varlen_attention(
        q, k, v, case["cu"], causal=True, softcap=20.0, return_lse=True, impl="native", **case["options"]
    )
    runs.append([out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), case["dout"])])
torch.save((_native.cpu_isa(), runs), sys.argv[2])
"""


def child(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("GAPLESS_ISA", "ATEN_CPU_CAPABILITY")}
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=inherited | environment, capture_output=True, text=True
    )


def reference(case: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    q, k, v = (case[name].detach().to(dtype).requires_grad_() for name in "qkv")
    out, lse = gapless.varlen_attention(
        q, k, v, case["cu"], causal=True, softcap=20.0, return_lse=True, impl="reference", **case["options"]
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), case["dout"].to(dtype))]


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """Grouped heads; a head dim that no vector divides; a value dim of its own; queries before and behind the keys."""
    random = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    made = []
    moved = {
        "q_offset": torch.tensor([0, -9, 3, 40, 2**31 - 1], dtype=torch.int32),
        "alibi_slopes": torch.tensor([0.25, 0.125, 0.0625, 0.03125]) * 2.0**-20,
        "window": (90, -1),
    }
    for dtype, dim, dim_v, options in (
        (torch.float32, 64, 64, {}),
        (torch.float32, 20, 24, {}),
        (torch.bfloat16, 64, 64, {}),
        (torch.float32, 20, 24, moved),
        (torch.bfloat16, 64, 64, moved),
    ):
        shapes = {"q": (4, dim), "k": (2, dim), "v": (2, dim_v), "dout": (4, dim_v)}
        tensors = {n: torch.randn(sum(LENGTHS), *s, generator=random).to(dtype) for n, s in shapes.items()}
        made.append({"cu": cu, "options": options, **tensors})
    return made


@pytest.mark.parametrize("isa", ISAS)
def test_isa_gives_the_reference(isa, cases, tmp_path):
    given, taken = tmp_path / "given.pt", tmp_path / "taken.pt"
    torch.save(cases, given)
    done = child(CHILD, str(given), str(taken), GAPLESS_ISA=isa)
    assert done.returncode == 0, done.stderr
    name, runs = torch.load(taken)
    if name != isa:
        pytest.skip(f"this machine or build has no {isa} kernels; the best below it is {name}")
    for case, run in zip(cases, runs, strict=True):
        for actual, oracle, witness in zip(
            run, reference(case, torch.float64), reference(case, case["q"].dtype), strict=True
        ):
            assert_within_budget(actual, oracle, witness)


@pytest.mark.parametrize(
    ("capability", "highest"), [("default", "baseline"), ("avx2", "avx2"), ("avx512", "avx512")]
)
def test_torch_capability_caps_the_choice(capability, highest):
    done = child("from gapless import _native; print(_native.cpu_isa())", ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    assert ISAS.index(done.stdout.strip()) <= ISAS.index(highest)


@pytest.mark.parametrize("cap", ISAS[1:])
def test_a_missing_table_falls_to_the_next_below(cap):
    """Whatever this build lacks: a machine with AVX2 runs no baseline kernels unless it is told to."""
    if not torch.cpu._is_avx2_supported():
        pytest.skip("this machine has no AVX2")
    done = child("from gapless import _native; print(_native.cpu_isa())", GAPLESS_ISA=cap)
    assert done.returncode == 0, done.stderr
    assert 1 <= ISAS.index(done.stdout.strip()) <= ISAS.index(cap)


def test_unknown_isa_is_refused():
    done = child("from gapless import _native; print(_native.cpu_isa())", GAPLESS_ISA="sse9")
    assert done.returncode != 0
    assert 'GAPLESS_ISA is "sse9": it has to be baseline, avx2, avx512, avx512_bf16 or amx' in done.stderr


def test_isa_in_use_has_a_name():
    assert _native.cpu_isa() in ISAS
