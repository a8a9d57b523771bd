# SPDX-License-Identifier: Apache-2.0
"""The gapless command, as a user types it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from gapless.cli import app

runner = CliRunner()
QUICK = ["--rounds", "2", "--seconds", "0.1", "--no-memory"]


def invoke(*arguments: str):
    return runner.invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_info_json():
    result = invoke("info", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["versions"]["torch"] == torch.__version__
    assert {"cpu", "isa", "threads", "gpu"} <= said["machine"].keys()
    why_not = {(r["device"], r["impl"]): r["why_not"] for r in said["implementations"]}
    assert why_not["cpu", "native"] == [] == why_not["cpu", "reference"]
    assert why_not["cpu", "flash_attn"]


def test_info_table():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert "varlen_attention" in result.stdout
    assert "flash-attn is not installed" in result.stdout


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
def test_bench_json(direction, tmp_path):
    out = tmp_path / "out.json"
    result = invoke(
        *("bench", "varlen", "--lengths", "3,2x17", "--kv-heads", "2", "--direction", direction, *QUICK),
        *("--impl", "gapless", "--impl", "sdpa_loop", "--impl", "gapless:varlen_attention"),
        *("--json", "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said == json.loads(out.read_text())
    rows = {row["impl"]: row for row in said["rows"]}
    assert rows.keys() == {"gapless", "sdpa_loop", "gapless:varlen_attention"}
    for row in rows.values():
        cells = 3 * 4 // 2 + 2 * (17 * 18 // 2)
        assert row["flops"] == 4 * cells * 8 * 64 * (1 if direction == "fwd" else 3.5)
        assert row["seconds"] > 0
        assert row["gflops"] == pytest.approx(row["flops"] / row["seconds"] / 1e9)
    assert rows["gapless"]["check"] == "ok"
    best = min(row["seconds"] for row in rows.values() if row["peer"])
    assert rows["gapless"]["ratio"] == pytest.approx(best / rows["gapless"]["seconds"])
    shown = invoke("bench", "report", str(out))
    assert shown.exit_code == 0, shown.output
    assert "sdpa_loop" in shown.stdout


def test_bench_paged_table_with_memory():
    result = invoke("bench", "varlen", "--lengths", "3x1:200", "--paged", *QUICK[:-1], "--impl", "gapless")
    assert result.exit_code == 0, result.output
    assert "3x1:200" in result.stdout
    for head in ("GFLOP/s", "sgemm", "read"):
        assert head in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "Q"], "case is 'Q'"),
        (["--lengths", "12,seven"], "lengths has 'seven'"),
        (["--lengths", "-4"], "lengths has '-4'"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--kv-heads", "3"], "kv_heads 3"),
        (["--dim", "512"], "dim is 512"),
        (["--direction", "sideways"], "direction is 'sideways'"),
        (["--impl", "nothing"], "impl is 'nothing'"),
        (["--impl", "no_such_module:function"], "no_such_module"),
        (["--impl", "math:no_such_function"], "no_such_function"),
        (["--isa", "mmx"], "isa is 'mmx'"),
    ],
)
def test_bad_options_name_themselves(options, message):
    default = [] if "--lengths" in options else ["--lengths", "4"]
    result = invoke("bench", "varlen", *QUICK, *options, *(default if "--case" not in options else []))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_bench_report_of_a_missing_file():
    result = invoke("bench", "report", "no_such.json")
    assert result.exit_code == 2
    assert "no_such.json" in result.output
