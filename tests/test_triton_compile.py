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
SPARSE = ["sparse_fwd", "sparse_dq", "sparse_dkdv"]
FEATURES = {
    "causal": ["right"],
    "full": [],
    "everything": ["left", "right", "softcap", "sinks", "slopes", "used", "q_offset", "pages", "patterns"],
}
WITH_PARTS = {"causal": ["right", "parts"], "full": ["parts"]}  # of the fused mass
OPTIONAL = {
    "left", "right", "softcap", "sinks", "slopes", "used", "q_offset", "pages", "parts",
    "partial_offsets", "partial_ids", "kinds", "patterns",
}  # fmt: skip
BLOCKS = [(64, 64), (128, 128), (128, 64), (64, 128)]
ODD_BLOCKS = [(16, 16), (32, 32), (16, 256), (256, 16), (256, 256)]


def turns(kernels, dims, blocks):
    """Each kernel, dim and of two archs once; dtypes, features and blocks taking turns."""
    return [
        (
            kernel,
            dims,
            arch,
            DTYPES[i % 3],
            list(FEATURES)[(i + i // 3) % 3],
            blocks[(i + i // 4) % len(blocks)],
        )
        for i, (kernel, dims, arch) in enumerate(itertools.product(kernels, dims, (80, 90)))
    ]


SOME_CASES = turns(KERNELS, DIMS, [None]) + turns([*SPARSE, "mass"], DIMS[:2], BLOCKS)
ALL_CASES = [
    *itertools.product(KERNELS, DIMS, SHARED_KIB, DTYPES, FEATURES, [None]),
    *itertools.product(SPARSE, DIMS, SHARED_KIB, DTYPES, FEATURES, BLOCKS),
    *itertools.product(SPARSE, [(64, 64), (128, 128)], SHARED_KIB, DTYPES, ["everything"], ODD_BLOCKS),
    *itertools.product(["mass"], DIMS, SHARED_KIB, DTYPES, ["causal", "full"], BLOCKS + ODD_BLOCKS),
    *itertools.product(["fwd_parts"], DIMS, SHARED_KIB, DTYPES, WITH_PARTS, [(64, 64), (64, 16)]),
]
OTHER_CASES = [x for x in ALL_CASES if x not in SOME_CASES]

# Kernels on experts: their modules, and arguments that are 1 and None in a mode.
EXPERT_MODULES = {
    "gate_up": "fused_experts", "rows": "fused_experts", "hidden_backward": "fused_experts",
    "weight_gradient": "fused_experts", "expert_sums": "fused_experts",
    "grouped_mm": "grouped_mm", "outer": "grouped_mm",
    "gather": "expert_rows", "combine": "expert_rows", "dot": "expert_rows",
}  # fmt: skip
EXPERT_MODES = {
    "gate_up": {"train": ["w_column", "bias_row"], "infer": ["w_column", "bias", "saved"]},
    "rows": {"down": ["w_step", "bias_column"], "dx": ["w_column", "bias"]},
    "hidden_backward": {"train": ["w_column"], "frozen": ["w_column", "weighted"]},
    "grouped_mm": {"columns": ["b_column"], "steps": ["b_step"]},
    "outer": {"gather a": ["b_pairs"], "gather b": ["a_pairs"], "gather none": ["a_pairs", "b_pairs"]},
}
EXPERT_OPTIONAL = {"bias", "saved", "weighted", "a_pairs", "b_pairs"}
SMALL_EXPERT_KERNELS = ["gather", "combine", "dot", "weight_gradient", "expert_sums"]
ALL_EXPERT_CASES = [
    (kernel, rows, arch, dtype, mode)
    for kernel, modes in EXPERT_MODES.items()
    for rows, arch, dtype, mode in itertools.product(
        [None] if kernel == "outer" else [16, 32, 64, 128, 256], SHARED_KIB, DTYPES, modes
    )
]
# Each kernel and mode once; heights, archs and dtypes taking turns.
SOME_EXPERT_CASES = [
    (kernel, None if kernel == "outer" else (16, 128, 64)[i % 3], (80, 90)[i % 2], DTYPES[i // 2 % 3], mode)
    for i, (kernel, mode) in enumerate((k, mode) for k, modes in EXPERT_MODES.items() for mode in modes)
]
OTHER_EXPERT_CASES = [x for x in ALL_EXPERT_CASES if x not in SOME_EXPERT_CASES]

# Kernels of cross-entropy: dtypes and archs taking turns, with bias and softcap or without.
ENTROPY_CASES = [
    ("entropy_sums", 80, "bfloat16", True), ("entropy_sums", 90, "float32", False),
    ("entropy_gradient", 80, "float16", False), ("entropy_gradient", 90, "bfloat16", True),
]  # fmt: skip


def name(case):
    kernel, (dim, dim_v), arch, dtype, features, blocks = case
    return f"{kernel}-{dim}/{dim_v}-sm{arch}-{dtype}-{features}" + (
        f"-{blocks[0]}x{blocks[1]}" if blocks else ""
    )


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


def expert_name(case):
    kernel, rows, arch, dtype, mode = case
    return f"{kernel}-{rows or 'sums'}-sm{arch}-{dtype}-{mode}"


@pytest.mark.parametrize("case", SOME_EXPERT_CASES, ids=expert_name)
def test_experts_fit(build, case):
    check(build(*case), arch=case[2])


def pytest_generate_tests(metafunc):
    """The whole tables take half an hour: only ``pytest -m slow`` asks for them."""
    asked = "slow" in metafunc.config.option.markexpr
    if metafunc.function is test_every_case_fits:
        metafunc.parametrize("case", OTHER_CASES if asked else [], ids=name)
    if metafunc.function is test_every_expert_case_fits:
        metafunc.parametrize("case", OTHER_EXPERT_CASES if asked else [], ids=expert_name)


@pytest.mark.slow
def test_every_case_fits(build, case):
    check(build(*case), arch=case[2])


@pytest.mark.slow
def test_every_expert_case_fits(build, case):
    check(build(*case), arch=case[2])


@pytest.mark.parametrize("arch", [80, 90])
def test_forward_with_parts(build, arch):
    check(build("fwd_parts", (64, 64), arch, "bfloat16", "causal", (64, 64)), arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["delta", "locate", "fold"])
def test_small_kernels(build, kernel, arch):
    found = build(kernel, (128, 128), arch, "float16", "causal", (64, 128))
    assert found["shared"] <= SHARED_KIB[arch] * 1024 and found["spills_in_inner_loops"] == 0, found


@pytest.mark.parametrize("kernel", SMALL_EXPERT_KERNELS)
def test_small_expert_kernels(build, kernel):
    found = build(kernel, None, 80, "bfloat16", "")
    assert found["shared"] <= SHARED_KIB[80] * 1024 and found["spills_in_inner_loops"] == 0, found


@pytest.mark.parametrize("case", ENTROPY_CASES, ids=lambda case: f"{case[0]}-sm{case[1]}-{case[2]}")
def test_cross_entropy_fits(build, case):
    found = build(*case)
    assert found["shared"] <= SHARED_KIB[case[1]] * 1024 and found["spills_in_inner_loops"] == 0, found
    assert (found["inner_loops"] > 0) == (case[0] == "entropy_sums"), found


def test_table_covers_every_family_of_devices():
    from gapless.kernels.attention_config import ARCHS, SPARSE_TABLE, TABLE, family, padded

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
    assert {len(row) for row in (TABLE | SPARSE_TABLE).values()} == {len(ARCHS)}
    assert [padded(dim) for dim in (1, 16, 17, 64, 80, 128, 192, 256)] == [16, 16, 32, 64, 128, 128, 256, 256]


def compile_case(kernel, dims, arch, dtype, features, blocks):
    """Compile as the launcher would for heads 8:2, lists of 4 heads, and aligned contiguous tensors."""
    import importlib

    import torch

    from gapless.kernels.attention_config import Config, choose, fit, padded

    parts = kernel == "fwd_parts"
    kernel = kernel.removesuffix("_parts")
    module = "varlen_attention"
    if kernel in SPARSE:
        module = "block_sparse_attention"
    module = {
        "delta": "attention_launch", "locate": "block_rows", "fold": "block_mass", "mass": "block_mass",
    }.get(kernel, module)  # fmt: skip
    function = getattr(importlib.import_module(f"gapless.kernels.{module}"), f"{kernel}_kernel")
    config = Config(64, 64, 4, 3)
    if kernel in (*KERNELS, *SPARSE, "mass"):
        config = choose(kernel, max(dims), getattr(torch, dtype), arch)
    if kernel in SPARSE:
        config = fit(config, kernel, max(dims), *blocks)
    elif blocks:
        config = config._replace(block_n=min(config.block_n, blocks[1]))
    present = set((WITH_PARTS if parts or kernel == "fold" else FEATURES)[features])
    if "patterns" in present:
        present |= {"partial_offsets", "partial_ids", "kinds"}
    constants = dict.fromkeys(OPTIONAL - present) | {
        "HEADS": 8, "GROUP": 4, "SHARE": 2, "MEMBERS": 1, "DIM": dims[0], "DIM_V": dims[1],
        "BLOCK_DIM": padded(dims[0]), "BLOCK_DIM_V": padded(dims[1]), "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "UPCAST": False, "TILE": 128, "BLOCK": 64, "ROWS": 64,
    }  # fmt: skip
    if blocks:
        constants |= {"BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "UNIT": min(blocks[0], config.block_m)}
        constants["COUNT"] = max(4096 // (blocks[0] * (blocks[1] // config.block_n)), 1)
    element = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = dict.fromkeys(["q", "k", "v", "out", "dout", "dq", "dk", "dv"], element)
    types |= dict.fromkeys(["lse", "dlse", "delta", "slopes", "sinks", "parts", "mass"], "*fp32")
    types |= dict.fromkeys(["cu_q", "cu_k", "cu_seqlens", "tiles", "used", "q_offset"], "*i32")
    types |= dict.fromkeys(["pages", "table", "order"], "*i32")
    types |= dict.fromkeys(["offsets", "ids", "partial_offsets", "partial_ids", "kinds", "patterns"], "*i32")
    types |= dict.fromkeys(["scale", "softcap"], "fp32")
    unaligned = {"scale", "softcap", "tokens", "page_size", "left", "right", "blocks", "batch", "count"}
    unaligned |= {"parts_head", "row_units", "key_tiles", "q_blocks", "k_blocks"}
    return compile_kernel(function, constants, types, unaligned, config, arch)


def compile_expert_case(kernel, rows, arch, dtype, mode):
    """Compile as the launcher would for aligned contiguous tensors with experts far apart."""
    import importlib

    import torch

    from gapless.kernels.expert_config import MOVE, choose

    module = importlib.import_module(f"gapless.kernels.{EXPERT_MODULES[kernel]}")
    function = getattr(module, kernel.removesuffix("_kernel") + "_kernel")
    config = choose(rows, getattr(torch, dtype), arch)
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "UPCAST": False,
        "BLOCK_SIZE": rows or 16, "SHARE": (rows or 16) // config.block_m,
        "ACTIVATION": "swiglu_oai" if mode == "train" else "swiglu", "INTERLEAVED": mode == "train",
    }  # fmt: skip
    if kernel in SMALL_EXPERT_KERNELS:
        constants |= MOVE
    constants |= {
        name: None if name in EXPERT_OPTIONAL else 1 for name in EXPERT_MODES.get(kernel, {}).get(mode, [])
    }
    element = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = dict.fromkeys(["x", "w", "a", "b", "bias", "rows", "saved", "h", "out", "dout"], element)
    types |= dict.fromkeys(["dsaved", "weighted"], element)
    types |= dict.fromkeys(["weights", "topk_weights", "identity", "products"], "*fp32")
    types |= dict.fromkeys(
        ["sorted_ids", "expert_ids", "inverse", "table", "cu_rows", "begins", "ends"], "*i32"
    )
    types |= dict.fromkeys(["a_pairs", "b_pairs", "pairs_of_rows"], "*i32")
    types |= dict.fromkeys(["alpha", "limit"], "fp32") | dict.fromkeys(["w_expert", "b_expert"], "i64")
    unaligned = {"pairs", "top_k", "tiles", "parts", "experts", "tokens", "alpha", "limit"}
    if kernel == "gather":  # where it is a number
        types["rows"] = "i32"
        unaligned.add("rows")
    return compile_kernel(function, constants, types, unaligned, config, arch)


def compile_entropy_case(kernel, arch, dtype, everything):
    """Compile as the launcher would, with a bias and a cap if ``everything``."""
    from gapless.kernels import linear_cross_entropy as module
    from gapless.kernels.attention_config import Config

    tile = dict(module.TILE)
    config = Config(tile["BLOCK_M"], tile["BLOCK_N"], tile.pop("num_warps"), 3)
    constants = tile | ({} if everything else {"bias": None, "softcap": None})
    element = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    types = dict.fromkeys(["logits", "bias", "out"], element)
    types |= dict.fromkeys(["before", "after", "factors"], "*fp32") | {"targets": "*i64", "softcap": "fp32"}
    function = getattr(module, kernel.removeprefix("entropy_") + "_kernel")
    return compile_kernel(function, constants, types, {"rows", "columns", "first", "softcap"}, config, arch)


def compile_kernel(function, constants, types, unaligned, config, arch):
    """What the tests check of a kernel; arguments without a type are int32, divisible by 16 if not ``unaligned``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    loops = natural_loops(*flow(text))
    inner = [body for head, body in loops.items() if not any(x != head and x in body for x in loops)]
    return len(inner), sum(
        bool(re.search(r"\b(LDL|STL)\b", x)) for body in inner for code in body.values() for x in code
    )


def flow(text):
    """(instructions of each block, blocks that may follow each), from the text of a disassembly."""
    blocks, after, now = {"entry": []}, {"entry": set()}, "entry"
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            following = label[1]
            after[now].add(following)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*)", line):
            code = instruction[1]
            blocks[now].append(code)
            # A call that does not count on coming back is a jump too.
            jump = re.search(r"\b(?:BRA|CALL\.REL\.NOINC)\b(.*)`\((\.L_\w+)\)", code)
            if not jump and not re.search(r"\b(EXIT|RET)\b", code):
                continue
            following = f"{now}+"
            if jump:
                after[now].add(jump[2])
            if code.startswith("@") or (jump and re.search(r"\bU?P\d", jump[1])):
                after[now].add(following)
        else:
            continue
        now = following
        blocks.setdefault(now, [])
        after.setdefault(now, set())
    return blocks, after


def natural_loops(blocks, after):
    """Head -> its body's blocks: those that a jump back to a block that they cannot be reached without closes."""
    reached, todo = set(), ["entry"]
    while todo:
        if (x := todo.pop()) not in reached:
            reached.add(x)
            todo.extend(after[x])
    before = {x: {y for y in reached if x in after[y]} for x in reached}
    over = {x: set(reached) for x in reached} | {"entry": {"entry"}}  # blocks without which it is not reached
    changed = True
    while changed:
        changed = False
        for x in reached - {"entry"}:
            found = {x} | set.intersection(*(over[y] for y in before[x]))
            changed, over[x] = changed or found != over[x], found
    loops = {}
    for x in reached:
        for head in after[x] & over[x]:
            body, todo = loops.setdefault(head, {head: blocks[head]}), [x]
            while todo:
                if (y := todo.pop()) not in body:
                    body[y] = blocks[y]
                    todo.extend(before[y])
    return {head: body for head, body in loops.items() if sum(map(len, body.values())) > 1}


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            case = json.loads(line)
            compile_it = compile_expert_case if case[0] in EXPERT_MODULES else compile_case
            compile_it = compile_entropy_case if case[0].startswith("entropy_") else compile_it
            answer = compile_it(*case)
        except Exception:  # the test reports it
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
