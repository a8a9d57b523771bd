# SPDX-License-Identifier: Apache-2.0
"""What commands share: options that mean the same in several of them, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
Repeated = list[str] | None

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Threads = Annotated[int, typer.Option(help="Of torch; 0 is torch's own choice.", min=0)]
Planners = Annotated[Repeated, typer.Option(help="May be repeated. [static-cp, naive-hdp, hdp, zeppelin]")]

# Of benches.
Dims = Annotated[list[int] | None, typer.Option(help="Of a head; may be repeated. [default: 64]")]
Dtypes = Annotated[Repeated, typer.Option(help="May be repeated. [default: float32]")]
Directions = Annotated[Repeated, typer.Option(help="fwd or fwd_bwd; may be repeated. [fwd]")]
Peers = Annotated[
    Repeated, typer.Option(help="Of peers: a name, or module:function to add your own; may be repeated.")
]
Rounds = Annotated[int, typer.Option(help="Most rounds of a case.", min=1)]
CaseSeconds = Annotated[float, typer.Option(help="Time for the rounds of one case.", min=0)]
Memory = Annotated[bool, typer.Option(help="Measure peak memory too, each in a process of its own.")]
Isa = Annotated[str | None, typer.Option(help=f"Most of gapless's instruction sets: {', '.join(ISAS)}.")]
JsonFile = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]

# Of demos.
Steps = Annotated[int, typer.Option(help="Training steps; 0 takes as many as the time allows.", min=0)]
Folder = Annotated[Path, typer.Option(help="Folder of the report.")]
Seconds = Annotated[float, typer.Option(help="Time for all of it, roughly.", min=1)]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny: that it runs, nothing of speed.")]


@contextmanager
def plain_errors(*more: type[Exception]) -> Iterator[None]:
    """Bad values, and errors of the types in ``more``, as one line and exit status 2, in place of a traceback."""
    expected: tuple[type[Exception], ...] = (ValueError, TypeError, *more)
    try:
        yield
    except expected as error:
        raise typer.BadParameter(str(error)) from error
