# SPDX-License-Identifier: Apache-2.0
"""What is installed, under which names, and what importing it does not do."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import gapless

ROOT = Path(__file__).parent.parent
PACKAGES = {"pytorch_ext": "gapless", "kernels": "gapless.kernels", "bench": "gapless.bench"}


def listed() -> tuple[str, set[str]]:
    """The version and the package list of pyproject.toml (tomllib is not in Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    number = re.search(r'^version = "(.*)"', text, re.MULTILINE)
    assert packages and number
    return number[1], set(re.findall(r'"([^"]+)"', packages[1]))


def run(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def packages_of(pattern: str) -> set[str]:
    return {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob(pattern)
    }


def test_package_list_is_the_folders():
    assert packages_of("*.py") == packages_of("__init__.py") == listed()[1]


def test_versions_agree():
    assert gapless.__version__ == version("gapless") == listed()[0]


def test_command_is_installed():
    assert [e.value for e in entry_points(group="console_scripts", name="gapless")] == ["gapless.cli:app"]


def test_import_is_light(tmp_path):
    code = """
import sys, gapless, torch
heavy = {"triton", "transformers", "flash_attn", "matplotlib", "typer", "rich"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    run(code, tmp_path)


def test_folder_names_are_not_packages(tmp_path):
    code = "import importlib.util as u, gapless; assert not u.find_spec('kernels') and not u.find_spec('pytorch_ext')"
    run(code, tmp_path)


@pytest.mark.slow
def test_wheel_works_by_itself(tmp_path):
    """Built from a bare environment, a wheel holds our packages only and runs with nothing else on the path."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
        ROOT,
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("gapless-*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {n.split("/")[0] for n in names} == {"gapless", f"gapless-{listed()[0]}.dist-info"}
    for part in ("_C.abi3.so", "_planner.pyi", "py.typed", "kernels/__init__.py", "bench/__init__.py"):
        assert f"gapless/{part}" in names
    assert any(re.fullmatch(r"gapless/_planner\..*\.so", n) for n in names)
    for module in (tmp_path / "site/gapless").glob("*.so"):
        assert str(ROOT).encode() not in module.read_bytes()
    code = """
import importlib.util, sys, torch, gapless
assert not importlib.util.find_spec("kernels") and not importlib.util.find_spec("pytorch_ext")
q = torch.randn(9, 2, 16)
out = gapless.varlen_attention(q, q, q, torch.tensor([0, 4, 9]), causal=True)
torch.testing.assert_close(out[0], q[0])
print(gapless.__file__)
"""
    place = run(code, tmp_path, PYTHONPATH=str(tmp_path / "site"), ATEN_CPU_CAPABILITY="default")
    assert place.startswith(str(tmp_path / "site"))
