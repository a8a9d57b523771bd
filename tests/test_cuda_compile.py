# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources become machine code that keeps to its registers, and bindings that load beside any torch. No GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc/torch").glob("*_cuda.cpp"))
ARCHS = ["sm_80", "sm_90a"]
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))  # where CMake looks
TORCH = Path(torch.__file__).parent
OPERATORS = ["reroute", "expert_align", "expert_reroute_align"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, there is none")

REGISTERED = f"""
import sys, torch, gapless
if sys.argv[1].endswith(".so"):
    torch.ops.load_library(sys.argv[1])
else:
    assert gapless._C.__file__.startswith(sys.argv[1]), gapless._C.__file__
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [op for op in {OPERATORS} if not has("gapless::" + op, "CUDA")]
assert not missing, missing
"""


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_source_is_found():
    assert SOURCES and len(BINDINGS) == len(SOURCES)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_spills(source, arch, tmp_path):
    flags = ["-std=c++17", "-O3", "-lineinfo", "--Werror=all-warnings", f"-arch={arch}", f"-I{ROOT}"]
    text = run(NVCC, *flags, "-Xptxas=-v", "-cubin", "-o", tmp_path / "cubin", source)
    kernels = re.findall(r"Compiling entry function '(\w+)'", text)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert kernels and len(frames) >= len(kernels), text
    assert set(frames) == {("0", "0", "0")}, text
    # Static shared memory, which every GPU has for each block.
    assert all(int(size) <= 48 * 1024 for size in re.findall(r"(\d+) bytes smem", text)), text


def test_bindings_load_beside_this_torch(tmp_path):
    """As a module of their own: registered for CUDA tensors, with CUDA's runtime inside and no symbol unresolved."""
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    macros = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    objects = []
    for source in SOURCES:
        objects.append(tmp_path / f"{source.stem}.o")
        device = ["-std=c++17", "-arch=sm_80", f"-I{ROOT}", "-Xcompiler=-fPIC"]
        run(NVCC, *device, "-c", "-o", objects[-1], source)
    listing = run(NVCC, "--dryrun", "-c", SOURCES[0], "-o", tmp_path / "none")
    top = re.search(r"^#\$ TOP=(.*)$", listing, re.MULTILINE)
    assert top, listing
    runtime = next(Path(top[1]).resolve().glob("**/libcudart_static.a"))
    module = tmp_path / "bindings.so"
    run(
        compiler, *flags, *macros, f"-I{ROOT}", "-isystem", TORCH / "include", *BINDINGS, *objects, "-o", module,
        f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", runtime, "-ldl", "-lrt", "-lpthread", "-Wl,-z,defs",
    )  # fmt: skip
    run(sys.executable, "-c", REGISTERED, module, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.thorough  # a minute: the rest of this file covers every source
def test_package_with_cuda(tmp_path):
    """GAPLESS_CUDA=ON builds the package's own module, which then has both kinds of kernels."""
    import pybind11

    options = {
        "GAPLESS_CUDA": "ON", "GAPLESS_PYTHON": "ON", "GAPLESS_TESTS": "OFF",
        "GAPLESS_TORCH_INCLUDE_DIRS": TORCH / "include", "GAPLESS_TORCH_LIBRARY_DIRS": TORCH / "lib",
        "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(),
        "gapless_flags_avx2": 0, "gapless_flags_avx512": 0, "gapless_flags_avx512_bf16": 0, "gapless_flags_amx": 0,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": tmp_path / "gapless",
    }  # fmt: skip
    if not shutil.which("nvcc"):
        options["CMAKE_CUDA_COMPILER"] = NVCC
    run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path / "build",
        "-G",
        "Ninja",
        *(f"-D{k}={v}" for k, v in options.items()),
    )
    run("cmake", "--build", tmp_path / "build")
    for folder in (ROOT / "pytorch_ext").iterdir():
        if folder.suffix != ".so":
            (tmp_path / "gapless" / folder.name).symlink_to(folder)
    (tmp_path / "gapless/kernels").symlink_to(ROOT / "kernels")
    run(
        sys.executable,
        "-c",
        REGISTERED,
        tmp_path,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
