# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel, in every configuration of its table, becomes a cubin that fits its GPU. Needs no GPU.

A compiler must not see the interpreter's variable, which the rest of the suite sets: this file is also the script of a
worker process, which compiles one case per line of its input.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback

import pytest

SHARED_KIB = {80: 163, 86: 99, 90: 227}  # CUDA C++ programming guide, maximum of a block
DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]
DTYPES = ["float16", "bfloat16", "float32"]
KERNELS = ["fwd", "dq", "dkdv"]
FEATURES = {
    "causal": ["right"],
    "full": [],
    "everything": ["left", "right", "softcap", "sinks", "slopes", "used", "pages"],
}
# Each kernel, dim and arch once, dtypes and features taking turns.
SOME_CASES = [
    (kernel, dims, arch, DTYPES[i % 3], list(FEATURES)[(i + i // 3) % 3])
    for i, (kernel, dims, arch) in enumerate(itertools.product(KERNELS, DIMS, (80, 90)))
]
OTHER_CASES = [
    x for x in itertools.product(KERNELS, DIMS, SHARED_KIB, DTYPES, FEATURES) if x not in SOME_CASES
]


def name(case):
    kernel, (dim, dim_v), arch, dtype, features = case
    return f"{kernel}-{dim}/{dim_v}-sm{arch}-{dtype}-{features}"


@pytest.fixture(scope="module")
def build():
    """A function that compiles a case in the worker and returns what the worker says of it."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    worker = subprocess.Popen(
        [sys.executable, __file__], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def ask(*case):
        print(json.dumps(case), file=worker.stdin, flush=True)
        found = json.loads(worker.stdout.readline())
        assert "error" not in found, found["error"]
        return found

    yield ask
    worker.communicate()


def check(found, arch):
    assert found["shared"] <= SHARED_KIB[arch] * 1024, found
    assert found["inner_loops"] > 0, found
    # Outside the inner loops a spill costs nothing that can be measured, and larger tiles are worth it.
    assert found["spills_in_inner_loops"] == 0, found


@pytest.mark.parametrize("case", SOME_CASES, ids=name)
def test_fits(build, case):
    check(build(*case), arch=case[2])


def pytest_generate_tests(metafunc):
    """The whole table takes a quarter of an hour: only ``pytest -m slow`` asks for it."""
    if metafunc.function is test_every_case_fits:
        asked = "slow" in metafunc.config.option.markexpr
        metafunc.parametrize("case", OTHER_CASES if asked else [], ids=name)


@pytest.mark.slow
def test_every_case_fits(build, case):
    check(build(*case), arch=case[2])


@pytest.mark.parametrize("arch", [80, 90])
def test_delta(build, arch):
    found = build("delta", (128, 128), arch, "float16", "full")
    assert found["shared"] <= SHARED_KIB[arch] * 1024 and found["spills_in_inner_loops"] == 0, found


def test_table_covers_every_family_of_devices():
    from gapless.kernels.attention_config import ARCHS, TABLE, family, padded

    capabilities = {
        (8, 0): 80,
        (8, 6): 86,
        (8, 7): 80,
        (8, 9): 86,
        (9, 0): 90,
        (10, 0): 90,
        (10, 3): 90,
        (12, 0): 86,
    }
    assert {capability: family(capability) for capability in capabilities} == capabilities
    assert {len(row) for row in TABLE.values()} == {len(ARCHS)}
    assert [padded(dim) for dim in (1, 16, 17, 64, 80, 128, 192, 256)] == [16, 16, 32, 64, 128, 128, 256, 256]


def compile_case(kernel, dims, arch, dtype, features):
    """Compile as the launcher would for heads 8:2 and aligned contiguous tensors."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gapless.kernels import varlen_attention as module
    from gapless.kernels.attention_config import Config, choose, padded

    function = getattr(module, f"{kernel}_kernel")
    config = Config(module.DELTA_ROWS, 0, 4, 3)
    if kernel != "delta":
        config = choose(kernel, max(dims), getattr(torch, dtype), arch)
    absent = {"left", "right", "softcap", "sinks", "slopes", "used", "pages"} - set(FEATURES[features])
    constants = dict.fromkeys(absent) | {
        "HEADS": 8, "GROUP": 4, "DIM": dims[0], "DIM_V": dims[1], "BLOCK_DIM": padded(dims[0]),
        "BLOCK_DIM_V": padded(dims[1]), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "UPCAST": False,
    }  # fmt: skip
    element = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = dict.fromkeys(["q", "k", "v", "out", "dout", "dq", "dk", "dv"], element)
    types |= dict.fromkeys(["lse", "dlse", "delta", "slopes", "sinks"], "*fp32")
    types |= dict.fromkeys(["cu_q", "cu_k", "tiles", "used", "pages"], "*i32")
    types |= dict.fromkeys(["scale", "softcap"], "fp32")
    unaligned = {"scale", "softcap", "tokens", "page_size", "left", "right"}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and name not in unaligned]
    source = ASTSource(
        function,
        signature,
        {name: value for name, value in constants.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    loops, spills = inner_loops(compiled.asm["cubin"])
    return {
        "config": config,
        "shared": compiled.metadata.shared,
        "inner_loops": loops,
        "spills_in_inner_loops": spills,
    }


def inner_loops(cubin):
    """(innermost loops, instructions in them that touch local memory), from the disassembly."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*)", line):
            code.append(instruction[1])
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if target and target[1] in labels:  # a jump back
                loops.append((labels[target[1]], len(code)))
    loops = [(a, b) for a, b in loops if a < b - 1]  # the last instruction of a kernel jumps to itself
    inner = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return len(inner), sum(bool(re.search(r"\b(LDL|STL)\b", i)) for a, b in inner for i in code[a:b])


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            answer = compile_case(*json.loads(line))
        except Exception:  # the test reports it
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
