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
    why_not = {(r["op"], r["device"], r["impl"]): r["why_not"] for r in said["implementations"]}
    for op in ("varlen_attention", "block_sparse_attention"):
        assert why_not[op, "cpu", "native"] == [] == why_not[op, "cpu", "reference"]
    assert why_not["varlen_attention", "cpu", "flash_attn"]


def test_info_table():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert "varlen_attention" in result.stdout and "block_sparse_attention" in result.stdout
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


SMALL = (
    "--tokens",
    "320",
    "--heads",
    "2",
    "--dim",
    "32",
    "--block",
    "32",
    "--seconds",
    "0.1",
    "--rounds",
    "3",
)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_bench_of_sparse_efficiency(direction, tmp_path):
    out = tmp_path / "out.json"
    result = invoke(
        *("bench", "blocksparse", *SMALL, "--study", "efficiency", "--density", "0.5", "--density", "0.2"),
        *("--direction", direction, "--json", "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said == json.loads(out.read_text())
    rows = {row["impl"]: row for row in said["rows"]}
    assert list(rows) == ["dense", "density 0.5", "density 0.2"]
    assert {row["samples"] for row in rows.values()} != {0} and {row["check"] for row in rows.values()} == {
        "ok"
    }
    flops = (2 if direction == "fwd" else 5) * 2 * 320**2 * 2 * 32
    for name, density in (("density 0.5", 0.5), ("density 0.2", 0.2)):
        row = rows[name]
        assert row["density"] == pytest.approx(density)
        assert row["flops"] == pytest.approx(flops * density)
        assert row["efficiency"] == pytest.approx(density / row["relative"])
    shown = invoke("bench", "report", str(out))
    assert shown.exit_code == 0, shown.output
    assert "efficiency: 320 tokens, h2 d32 fp32, block 32" in shown.stdout and "of dense" in shown.stdout


def test_bench_of_sparse_peers():
    result = invoke(
        *("bench", "blocksparse", *SMALL, "--study", "peers", "--impl", "gapless", "--impl", "sdpa_mask"),
        *("--impl", "gapless:block_sparse_attention", "--impl", "math:sqrt", "--json"),
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    rows = {row["impl"]: row for row in said["rows"]}
    assert rows.keys() == {"gapless", "sdpa_mask", "gapless:block_sparse_attention"}
    assert {row["check"] for row in rows.values()} == {"ok"}
    best = min(row["seconds"] for row in rows.values() if row["peer"])
    assert rows["gapless"]["ratio"] == pytest.approx(best / rows["gapless"]["seconds"])
    assert [row["impl"] for row in said["skipped"]] == ["math:sqrt"]  # a peer that breaks


def test_bench_of_masks_heads_and_searches():
    studies = [x for name in ("build", "heads", "mass", "selection") for x in ("--study", name)]
    result = invoke("bench", "blocksparse", *SMALL, *studies, "--impl", "gapless")  # no compilation
    assert result.exit_code == 0, result.output
    for text in (
        "from_kv_blocks",
        "of uniform",
        "block_mass",
        "dense with mass",
        "AdaSpa's rule",
        "of sparse",
    ):
        assert text in result.stdout
    assert "over budget" not in result.stdout


def test_bench_of_adaspa():
    pytest.importorskip("diffusers")
    result = invoke(
        "bench", "blocksparse", *SMALL[2:], "--tokens", "256", "--study", "adaspa", "--steps", "12", "--json"
    )
    assert result.exit_code == 0, result.output
    dense, sparse, ideal = json.loads(result.stdout)["rows"]
    attention = dense["kinds"]["dense"]["attention"] * 12
    wanted = dense["seconds"] - attention * (1 - (10 + 1 / 2 + 0.2 * 2) / 12)
    assert ideal["seconds"] == pytest.approx(wanted)
    assert sparse["efficiency"] == pytest.approx(wanted / sparse["seconds"])
    assert {kind: found["steps"] for kind, found in sparse["kinds"].items()} == {
        "dense": 9, "fused search": 1, "sparse": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--study", "nothing"], "study is 'nothing'"),
        (["--study", "adaspa"], "tokens is 320"),
        (["--study", "adaspa", "--tokens", "256", "--steps", "9"], "steps is 9"),
        (["--density", "1.5"], "density is 1.5"),
        (["--block", "48"], "block_q is 48"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--direction", "fwd_bwd"], "direction is 'fwd_bwd'"),
        (["--dim", "512"], "dim is 512"),
        (["--impl", "nothing"], "impl is 'nothing'"),
        (["--impl", "no_such_module:function"], "no_such_module"),
    ],
)
def test_bad_options_of_the_sparse_bench(options, message):
    result = invoke("bench", "blocksparse", *SMALL, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_bench_report_of_a_missing_file():
    result = invoke("bench", "report", "no_such.json")
    assert result.exit_code == 2
    assert "no_such.json" in result.output


def test_demo_video(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("diffusers")
    result = invoke("demo", "video", "--quick", "--out", str(tmp_path / "made"), "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "AdaSpa, density 0.25" in result.stdout and "at random, density 0.25" in result.stdout
    assert (tmp_path / "made" / "index.html").stat().st_size > 10_000
    for wrong in (["--inputs", "dream"], ["--steps", "2"]):
        refused = invoke("demo", "video", *wrong)
        assert refused.exit_code == 2 and wrong[1] in refused.output


def test_demo_without_a_name_runs_both(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("diffusers")
    from gapless.demo import pack, video

    ran = []
    monkeypatch.setattr(pack, "run", lambda **how: ran.append(("pack", how["out"], how["seconds"])))
    monkeypatch.setattr(video, "run", lambda **how: ran.append(("video", how["out"], how["steps"])))
    assert invoke("demo", "--out", str(tmp_path), "--seconds", "7", "--steps", "2").exit_code == 0
    assert ran == [("pack", tmp_path, 7.0), ("video", tmp_path / "video", 0)]
