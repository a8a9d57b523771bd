# SPDX-License-Identifier: Apache-2.0
"""The ``gapless`` command: what can run here, how fast it is, and what it is good for."""

from __future__ import annotations

import json
import sys

import torch

try:
    import typer
    from rich.console import Console
    from rich.table import Table

    from gapless import cli_bench, cli_demo, cli_schedule
    from gapless.cli_options import Json
except ImportError as missing:
    sys.exit(f"the gapless command needs {missing.name}: pip install 'gapless[cli]'")

app = typer.Typer(
    help="Kernels for transformers that compute no gaps.", no_args_is_help=True, add_completion=False
)
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_demo.app, name="demo")
app.command()(cli_schedule.plan)
app.command()(cli_schedule.calibrate)


def _implementations() -> list[dict]:
    """Of each operator on each device: which implementations take a plain bfloat16 batch with gradients, or why not."""
    from gapless.ops import experts, registry, reroute, varlen

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    rows = []
    for device in devices:
        x = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
        dense = varlen.Inputs(
            x,
            x,
            x,
            alibi_slopes=None,
            sinks=None,
            seqused_k=None,
            block_table=None,
            softcap=0.0,
            needs_grad=True,
            return_lse=False,
        )
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        ops = {
            "varlen_attention": (varlen.REASONS, dense),
            "block_sparse_attention": (registry.REASONS, registry.Inputs(x)),
            "reroute": (reroute.REASONS, reroute.Inputs(ids, "reroute")),
            "fused_experts": (experts.REASONS, experts.Inputs(x)),
            "linear_cross_entropy": (registry.REASONS, registry.Inputs(x)),
        }
        for op, (implementations, inputs) in ops.items():
            for impl, unsupported in implementations.items():
                why_not = unsupported(inputs)
                rows.append({"op": op, "device": device, "impl": impl, "why_not": why_not})
    return rows


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("gapless", "torch", "triton", "flash-attn", "transformers", "diffusers", "numpy")
    return {"python": sys.version.split()[0]} | {name: installed(name) for name in names}


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, instruction sets, devices, and which implementations can run here."""
    from gapless.bench.machine import machine, machine_line

    about = machine()
    versions, implementations = _versions(), _implementations()
    if as_json:
        found = {"versions": versions, "machine": about, "implementations": implementations}
        print(json.dumps(found, indent=2))
        return
    console = Console()
    console.print(machine_line(about), highlight=False, markup=False)
    packages = ", ".join(f"{name} {text or 'absent'}" for name, text in versions.items())
    console.print(packages, highlight=False, markup=False)
    table = Table("operator", "device", "implementation", "usable", box=None, pad_edge=False)
    for row in implementations:
        usable = "yes" if not row["why_not"] else "no: " + "; ".join(row["why_not"])
        table.add_row(row["op"], row["device"], row["impl"], usable)
    console.print(table)


if __name__ == "__main__":
    app(prog_name="gapless")
