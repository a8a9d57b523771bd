# SPDX-License-Identifier: Apache-2.0
"""On what was it measured: one line that goes with every number."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    """The git revision of the source tree that this package runs from, with a + if it was changed."""
    here = Path(__file__).resolve().parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or without git
    return said.stdout.strip()


def machine() -> dict[str, str | int | None]:
    """What decides speed, as plain values."""
    import gapless
    from gapless import _native

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _native.cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "gapless": gapless.__version__,
        "revision": _revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_line(about: dict[str, str | int | None]) -> str:
    """:func:`machine` in one line."""
    gpu = f", {about['gpu']}" if about["gpu"] else ""
    revision = f" ({about['revision']})" if about["revision"] else ""
    gapless = f"gapless {about['gapless']}{revision} with {about['isa']}"
    pytorch = f"torch {about['torch']} with {about['torch_isa']}"
    threads = f"{about['cores']} cores, {about['threads']} threads"
    return f"{about['cpu']}, {threads}{gpu}; {gapless}, {pytorch}; {about['date']}"
