# SPDX-License-Identifier: Apache-2.0
"""Set-up of the tests: Triton's interpreter where no GPU is, poisoned memory, hypothesis profiles, markers."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported

slow_machine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, max_examples=25, suppress_health_check=slow_machine)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

M_PERTURB = -6  # glibc: fill what malloc gives with a pattern


def pytest_configure(config: pytest.Config) -> None:
    # A raw operator called with tensors that need a gradient would drop it in silence.
    config.addinivalue_line("filterwarnings", "error:.*an autograd kernel was not registered")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, there is none"))


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """NaN in every torch.empty, C++ ones included, and 0x7f7f.. (huge, or NaN) in every other allocation."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0x80)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
