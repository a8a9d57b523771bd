# SPDX-License-Identifier: Apache-2.0
"""The demos, with tiny models and few steps."""

import json
from dataclasses import replace

import pytest
import torch

from gapless.testing import assert_within_budget

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

from gapless.bench import corpus
from gapless.demo import batches, experts, fields, pack, schedules, topics, video
from gapless.demo.train import Settings
from gapless.experts import load_adapter

TINY = Settings("", steps=2, batch=3, max_bytes=400, hidden=32, layers=2, heads=4, kv_heads=2, threads=1)


def losses(run: dict) -> torch.Tensor:
    return torch.tensor([step["loss"] for step in run["steps"]], dtype=torch.float64)


def test_batches_hold_the_same_tokens():
    files = batches.files_of_step(step=0, batch=3, max_bytes=400)
    (padded, padded_targets), (packed, packed_targets) = batches.padded(files), batches.packed(files)
    kept = padded["attention_mask"].bool()
    assert torch.equal(padded["input_ids"][kept], packed["input_ids"][0])
    assert torch.equal(padded_targets[kept], packed_targets[0])
    assert (padded_targets[~kept] == batches.IGNORED).all()
    assert packed["cu_seq_lens_q"].tolist() == [0, *torch.tensor([len(f) for f in files]).cumsum(0).tolist()]
    assert (packed["position_ids"][0] == 0).sum() == len(files)
    assert torch.equal(files[1], batches.files_of_step(step=0, batch=3, max_bytes=400)[1])


def test_padded_and_packed_learn_the_same(tmp_path):
    result = pack.run(steps=2, out=tmp_path, threads=1, base=TINY, with_bench=False)
    padded, packed = (result["runs"][kind] for kind in ("padded", "packed"))
    oracle = losses(pack.train(replace(TINY, kind="padded", dtype="float64")))
    assert [s["tokens"] for s in padded["steps"]] == [s["tokens"] for s in packed["steps"]]
    assert packed["padding"] == 0 < padded["padding"]
    assert_within_budget(losses(packed).float(), oracle, losses(padded).float(), name="loss")
    for name in ("index.html", "result.json", "loss.png", "speed.png", "lengths.png"):
        assert (tmp_path / name).stat().st_size > 1000
    page = (tmp_path / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert json.loads((tmp_path / "result.json").read_text())["loss_difference"] == result["loss_difference"]


def test_a_run_that_fails_says_why():
    with pytest.raises(RuntimeError, match="the padded run failed"):
        pack.train(replace(TINY, kind="padded", heads=3))


# The video demo.


def test_smooth_fields_have_the_structure_that_they_are_made_for():
    shape = (9, 12, 16)
    q, k, v = fields.attention_inputs(shape, 4, 64)
    assert q.shape == k.shape == v.shape == (9 * 12 * 16, 4, 64)
    again = fields.attention_inputs(shape, 4, 64)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    weights = torch.einsum("qhd,khd->hqk", q, k).mul(64**-0.5).softmax(-1)
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in shape))
    in_time, in_space = (torch.cdist(x, x) for x in (places[:, :1], places[:, 1:]))
    # How far away each head looks, beside what looking anywhere would give.
    time, space = ((weights * d).sum(-1).mean(-1) / d.mean() for d in (in_time, in_space))
    assert list(fields.AXES) == ["all positions", "place", "time", "content"]
    assert time[1] > 2 * time[2] and space[2] > 1.5 * space[1]
    assert time[0] < 0.3 and space[0] < 0.6
    assert time[3] < 0.3 and space[3] < 0.6


def test_rotation_keeps_sizes_and_depends_on_differences_only():
    x = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(60, 30)
    turned = fields.rotate(x, (3, 4, 5), (1, 1, 1)).double()
    torch.testing.assert_close(turned.norm(dim=1), x.double().norm(dim=1), atol=1e-5, rtol=0)
    scores = turned @ turned.T
    torch.testing.assert_close(scores[:40, :40], scores[20:, 20:], atol=1e-4, rtol=0)  # a frame later
    torch.testing.assert_close(scores[::5, ::5], scores[4::5, 4::5], atol=1e-4, rtol=0)  # four columns on
    assert torch.equal(fields.rotate(x, (3, 4, 5), (0, 0, 0)), x)


def test_psnr():
    wanted = torch.tensor([0.0, 4.0])
    assert video.psnr(wanted, wanted) == float("inf")
    assert video.psnr(torch.tensor([0.4, 4.4]), wanted) == pytest.approx(20.0)


def test_the_video_demo(tmp_path):
    result = video.run(out=tmp_path, steps=6, threads=1, settings=video.QUICK)
    weights, structured = result["weights"], result["fields"]
    names = [v["name"] for v in weights["variants"]]
    assert names == [
        "dense, torch", "dense", "AdaSpa, density 0.5", "AdaSpa, density 0.25",
        "attention tile, 1 reference frames", "attention tile, searched",
    ]  # fmt: skip
    variants = dict(zip(names, weights["variants"], strict=True))
    assert variants["dense, torch"]["psnr"] > 100  # the same model by another implementation
    half = variants["AdaSpa, density 0.5"]
    kinds = [step["kind"] for step in half["steps"]]
    assert kinds == ["dense", "fused search", "sparse", "cached search", "sparse", "sparse"]
    assert half["density"] == 0.5 < half["recall"] < 1
    assert 0 < half["search_share"] < 1
    assert half["psnr"] > variants["AdaSpa, density 0.25"]["psnr"] > 20
    tile = variants["attention tile, 1 reference frames"]
    assert tile["density"] == tile_density(frames=4, references=1)
    assert {row["layer"] for row in weights["tiles"]} == {"blocks.0.attn1", "blocks.1.attn1"}
    rows = {row["name"]: row for row in structured["rows"]}
    found, blind = rows["AdaSpa, density 0.25"], rows["at random, density 0.25"]
    assert found["density"] == pytest.approx(blind["density"])
    assert found["recall"] > 2 * blind["recall"] and found["psnr"] > blind["psnr"] + 6
    for name in (
        "weights-speed-quality",
        "weights-steps",
        "weights-maps",
        "fields-speed-quality",
        "fields-maps",
    ):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    page = (tmp_path / "index.html").read_text()
    assert "Random weights show speed, not quality" in page
    assert page.count("data:image/png;base64,") == 5 and 'src="http' not in page
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["weights"]["variants"][2]["psnr"] == half["psnr"]
    assert "maps" not in written["weights"]


def tile_density(frames: int, references: int) -> float:
    return 1 - (frames - references) * (frames - references - 1) / frames**2


def test_one_half_of_the_video_demo(tmp_path):
    result = video.run(out=tmp_path, inputs="fields", threads=1, settings=video.QUICK)
    assert result["weights"] is None and result["fields"]["rows"]
    assert not (tmp_path / "weights-maps.png").exists()
    with pytest.raises(ValueError, match="inputs is 'dream': it has to be one of both, weights, fields"):
        video.run(out=tmp_path, inputs="dream")
    with pytest.raises(ValueError, match="steps is 3: it has to be 4 or more"):
        video.run(out=tmp_path, steps=3)


def test_search_steps_are_the_papers_to_scale():
    assert video.search_steps(50) == (10, 30)
    for steps in range(4, 60):
        first, second = video.search_steps(steps)
        assert 2 <= first < second <= steps


# The experts demo.


def test_windows_are_cut_from_a_package():
    train, test = (topics.windows("json", 64, held_out=held_out) for held_out in (False, True))
    assert train.shape[1] == test.shape[1] == 65 and (train[:, 0] == corpus.BEGIN).all()
    assert len(train) > 3 * len(test) > 0
    assert "def " in topics.text(train.flatten()) and train[:, 1:].max() < 256
    seen = {tuple(w) for w in train.tolist()}
    assert sum(tuple(w) in seen for w in test.tolist()) < len(test) / 4  # but for what repeats in the files
    assert torch.equal(topics.batch("json", 3, 64, seed=1), topics.batch("json", 3, 64, seed=1))


def test_the_experts_demo(tmp_path):
    result = experts.run(out=tmp_path, threads=1, settings=experts.QUICK)
    names = list(experts.QUICK.topics)
    assert [a["topic"] for a in result["adapters"]] == names
    for adapter in result["adapters"]:
        assert adapter["steps"] == 2 and len(adapter["experts"]) == 2 and adapter["bytes"] > 0
        found = load_adapter(tmp_path / "adapters" / adapter["topic"])
        assert [len(ids) for ids in found.experts.values()] == adapter["experts"]
    for compared in result["served"]["compared"]:
        assert compared["same_tokens"] and compared["same_logits"] and compared["difference"] == 0
        assert compared["unlike_base"] or compared["adapter"] == "base"
    memory = result["memory"]
    tuned = sum(sum(a["experts"]) for a in result["adapters"])
    assert memory["used"] == memory["experts"] * (1 + tuned / (2 * experts.QUICK.experts))
    assert memory["experts"] < memory["used"] <= memory["padded"] < memory["experts"] * 3
    assert all(set(rates) == {"base only", "all adapters"} for rates in result["speed"].values())
    changed = [result["tested"][t][t] != result["tested"]["base"][t] for t in names]
    assert all(changed)
    for name in ("losses", "matrix", "routes", "memory", "speed"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and 'src="http' not in page
    assert page.count("the same to the bit") == 3
    assert json.loads((tmp_path / "result.json").read_text())["tested"] == result["tested"]


def test_balancing_looks_at_every_router():
    model = experts.build(experts.QUICK)
    tokens = topics.batch("json", 2, 32, seed=0)
    with experts.balancing(model) as balance:
        experts.loss_of(model, tokens)
        balance().backward()
    gates = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert len(gates) == 2 and all(p.grad.any() for p in gates)
    assert not any(m._forward_hooks for m in model.modules())


# The training demo.


def test_planners_train_the_same_model(tmp_path):
    result = schedules.run(out=tmp_path, settings=schedules.QUICK, planners=("static-cp", "hdp"))
    one, *others = result["rows"]
    assert [row["planner"] for row in others] == ["static-cp", "hdp"]
    for row in others:
        # A loss near 5.5 nats, summed in another order by every planner.
        assert max(abs(a - b) for a, b in zip(one["losses"], row["losses"], strict=True)) < 1e-5
        assert row["bytes"] > 0 == one["bytes"] and 0 <= row["idle"] < 1
    for name in ("index.html", "result.json", "speed.png", "lengths.png", "measured.png", "hdp.png"):
        assert (tmp_path / name).stat().st_size > 1000
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and 'src="http' not in page
