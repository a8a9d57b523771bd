# SPDX-License-Identifier: Apache-2.0
"""The gapless command, as a user types it."""

import json
import sys

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
    for op in ("varlen_attention", "block_sparse_attention", "reroute", "fused_experts"):
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


SMALL_EXPERTS = (
    *("--experts", "9", "--top-k", "3", "--hidden", "32", "--inter", "16", "--adapters", "3"),
    *("--max-experts", "4", "--block", "4", "--seconds", "0.1", "--rounds", "3"),
)


def test_bench_of_expert_ids(tmp_path):
    out = tmp_path / "out.json"
    studies = [x for name in ("reroute", "align", "reroute_align") for x in ("--study", name)]
    result = invoke(
        *("bench", "experts", *SMALL_EXPERTS, *studies, "--tokens", "1", "--tokens", "70", "--ids", "int32"),
        *("--json", "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said == json.loads(out.read_text())
    assert {row["check"] for row in said["rows"]} == {"ok"} and not said["skipped"]
    rows = {(row["workload"], row["tokens"], row["impl"]): row for row in said["rows"]}
    for tokens in (1, 70):
        own, *peers = (
            rows["reroute", tokens, name] for name in ("gapless", "torch ops", "torch table", "torch rows")
        )
        assert own["ratio"] == pytest.approx(min(row["seconds"] for row in peers) / own["seconds"])
        assert rows["reroute_align", tokens, "reroute_align"]["relative"] > 0
    shown = invoke("bench", "report", str(out))
    assert shown.exit_code == 0, shown.output
    assert "align: 70 x 3 int32, 9 experts, block 4" in shown.stdout and "of align" in shown.stdout


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
def test_bench_of_expert_layers(direction):
    result = invoke(
        *("bench", "experts", *SMALL_EXPERTS, "--study", "layer", "--tokens", "1", "--tokens", "40"),
        *("--dtype", "bfloat16", "--direction", direction, "--impl", "torch_loop", "--impl", "math:sqrt"),
        *("--impl", "transformers_grouped_mm", "--impl", "gapless:fused_experts", "--json"),
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    rows = {(row["tokens"], row["impl"]): row for row in said["rows"]}
    names = {"gapless", "torch_loop", "transformers_grouped_mm", "gapless:fused_experts"}
    assert rows.keys() == {(tokens, name) for tokens in (1, 40) for name in names}
    assert {row["check"] for row in rows.values()} == {"ok"}
    assert {row["impl"] for row in said["skipped"]} == {"math:sqrt"}  # a peer that breaks
    expert_bytes = 3 * 32 * 16 * 2
    for (tokens, _), row in rows.items():
        assert row["flops"] == tokens * 3 * 6 * 32 * 16 * (1 if direction == "fwd" else 3)
        assert row["share_of_sgemm"] > 0
        reads = {1: 3, 40: 9}[tokens] * expert_bytes if direction == "fwd" else 0
        assert row["key_bytes"] == reads and (row["share_of_bandwidth"] is not None) == bool(reads)


def test_bench_of_rerouted_layers():
    studies = [x for name in ("grouped_mm", "merged", "adapters") for x in ("--study", name)]
    result = invoke("bench", "experts", *SMALL_EXPERTS, *studies, "--tokens", "1", "--tokens", "40", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {row["check"] for row in said["rows"]} == {"ok"} and not said["skipped"]
    rows = {(row["workload"], row["tokens"], row["impl"]): row for row in said["rows"]}
    for tokens in (1, 40):
        assert rows["merged", tokens, "gapless"]["relative"] > 0
        served, given, base = (
            rows["adapters", tokens, name] for name in ("gapless", "rerouted before", "base only")
        )
        assert served["baseline"] == given["impl"] and served["others"].keys() == {base["impl"]}
        assert served["active_experts"] == given["active_experts"]
    assert served["active_experts"] > base["active_experts"]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux")
def test_bench_of_an_expert_store(tmp_path):
    out = tmp_path / "out.json"
    result = invoke(
        *("bench", "experts", *SMALL_EXPERTS, "--study", "store", "--layers", "2", "--hidden", "256"),
        *("--inter", "128", "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    rows = {row["impl"]: row for row in json.loads(out.read_text())["rows"]}
    sizes = {rows[name]["moved_bytes"] for name in ("load", "evict", "swap", "copy, new memory")}
    assert len(sizes) == 1 and sizes.pop() % (3 * 256 * 128 * 4) == 0
    for name, base in (("load", "copy, new memory"), ("swap", "copy, memory that is there")):
        assert rows[name]["baseline"] == base and rows[name]["relative"] > 0
    assert rows["layer beside loads"]["worst"] >= rows["layer beside loads"]["seconds"]
    memory = rows["base and tuned experts"]
    assert 1 <= memory["resident_of_ranges"] < memory["padded"]
    for head in ("GB/s", "99%", "resident", "of layer alone"):
        assert head in result.stdout


def test_wrong_results_of_experts_are_seen():
    from gapless.bench import expert_check, expert_grouped, expert_ids, expert_peers
    from gapless.bench.expert_cases import ExpertCase, Layer

    sizes = {"experts": 9, "top_k": 3, "hidden": 32, "inter": 16}
    check = expert_check.LayerCheck(Layer.make(ExpertCase("layer", 70, direction="fwd_bwd", **sizes)))
    right = expert_peers.IMPLEMENTATIONS["torch_loop"].prepare
    check(right)

    def spoiled(change):
        def prepare(layer):
            run = right(layer)
            train = run.train
            run.train = lambda: change(*train())
            return run

        return prepare

    def scaled(i):
        return lambda outs, grads: (outs, [g * (1.01 if j == i else 1) for j, g in enumerate(grads)])

    def stray(outs, grads):
        grads[0][1] += 1e-6  # of a token whose result has no gradient
        return outs, grads

    for change, name in (
        (lambda outs, grads: ([outs[0] * 1.01], grads), "out"),
        *((scaled(i), name) for i, name in enumerate(expert_check.GRADS)),
        (stray, "dx"),
    ):
        with pytest.raises(AssertionError, match=name):
            check(spoiled(change))

    case = ExpertCase("align", 7, **sizes, block=4)
    ids = case.choices(case.generator())
    found = expert_ids.torch_align(ids, 9, 4)
    with pytest.raises(AssertionError, match=r"tensor 4: 1 of 21"):
        wrong = found[4].clone()
        wrong[3, 1] += 1
        expert_check.same([*found[:4], wrong], found)

    groups = expert_grouped.Groups.make(ExpertCase("grouped_mm", 7, **sizes))
    for change in (lambda x: x, lambda x: x * 1.01):
        run = expert_grouped.Run(
            lambda f=change: [f(expert_grouped.torch_loop(groups.a, groups.b, groups.offs))]
        )
        verdict = expert_check.verdict(lambda r=run: expert_check.check_groups(groups, r))
        assert verdict == "ok" if change(1) == 1 else verdict.startswith("rows")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--study", "nothing"], "study is 'nothing'"),
        (["--tokens", "0"], "tokens is 0"),
        (["--top-k", "10"], "top_k is 10"),
        (["--max-experts", "10"], "max_experts is 10"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--ids", "int16"], "ids is 'int16'"),
        (["--direction", "bwd"], "direction is 'bwd'"),
        (["--impl", "nothing"], "impl is 'nothing'"),
        (["--impl", "no_such_module:function"], "no_such_module"),
    ],
)
def test_bad_options_of_the_experts_bench(options, message):
    result = invoke("bench", "experts", *SMALL_EXPERTS, *options)
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


def test_demo_without_a_name_runs_all(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("diffusers")
    from gapless.demo import experts, pack, schedules, video

    ran = []
    monkeypatch.setattr(pack, "run", lambda **how: ran.append(("pack", how["out"], how["seconds"])))
    monkeypatch.setattr(video, "run", lambda **how: ran.append(("video", how["out"], how["steps"])))
    monkeypatch.setattr(experts, "run", lambda **how: ran.append(("experts", how["out"], how["settings"])))
    monkeypatch.setattr(schedules, "run", lambda **how: ran.append(("train", how["out"], how["settings"])))
    assert invoke("demo", "--out", str(tmp_path), "--seconds", "7", "--steps", "2").exit_code == 0
    assert ran == [
        ("pack", tmp_path, 7.0),
        ("video", tmp_path / "video", 0),
        ("experts", tmp_path / "experts", None),
        ("train", tmp_path / "train", None),
    ]
    assert invoke("demo", "experts", "--quick", "--out", str(tmp_path)).exit_code == 0
    assert ran[-1] == ("experts", tmp_path, experts.QUICK)


# Schedules.


def test_plan_compares_planners(tmp_path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(map(str, [9000, 100, 2500, 31, 0, 4096, 700])) + "\n")
    asked = ["plan", "--lengths", str(lengths), "--ranks", "4", "--capacity", "4096", "--ranks-per-node", "2"]
    result = invoke(*asked, "--json", "--out", str(tmp_path / "drawn"))
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert set(said["plans"]) == {"static-cp", "naive-hdp", "hdp", "zeppelin"} and not said["refused"]
    for row in said["plans"].values():
        assert row["tokens"] == 16427 and row["makespan"] >= row["lower_bound"] > 0
    assert all((tmp_path / "drawn" / f"{name}.svg").stat().st_size > 1000 for name in said["plans"])
    result = invoke(*asked, "--planner", "lpt", "--planner", "hdp", "--model", "llama-8b")
    assert result.exit_code == 0, result.output
    assert "7 sequences, 16427 tokens, the longest 9000" in result.stdout
    assert "lpt cannot: lengths[0] is 9000" in result.stdout and "llama-8b at 200 TFLOP/s" in result.stdout


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--planner", "best"], "planner is 'best'"),
        (["--trace", "books"], "name is 'books'"),
        (["--cost", "mine"], "name is 'mine'"),
        (["--model", "/nowhere.json"], "nowhere.json"),
        (["--lengths", __file__], "is not a whole number of tokens"),
        (["--ranks", "2", "--planner", "hdp"], "a capacity of"),
    ],
)
def test_plan_says_what_is_wrong(arguments, why):
    result = invoke("plan", *arguments)
    assert result.exit_code == 2, result.output
    assert why in " ".join(result.output.split())


def test_calibrate_writes_a_cost_model(tmp_path):
    from gapless.schedule import CostModel, planners

    path = tmp_path / "cost.json"
    result = invoke(
        "calibrate", "--tokens", "256", "--seconds", "1", "--no-link", "--out", str(path), "--json"
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    cost = CostModel.load(path)
    assert cost.to_dict() == said["cost"] and cost.cell >= 0 < cost.token and cost.host_bandwidth > 0
    assert {row["part"] for row in said["samples"]} == {"attention", "linear"}
    assert all(row["fitted"] > 0 for row in said["samples"])
    schedule = planners.planner("hdp")([300, 20], ranks=2, capacity=256, cost=cost)
    assert 0 < schedule.lower_bound <= schedule.makespan


def test_bench_schedule_refuses_unknown_studies():
    result = invoke("bench", "schedule", "--study", "speed")
    assert result.exit_code == 2 and "study is 'speed'" in " ".join(result.output.split())
