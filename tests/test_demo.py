# SPDX-License-Identifier: Apache-2.0
"""The packing demo, with a tiny model and two steps."""

import json
from dataclasses import replace

import pytest
import torch

from gapless.testing import assert_within_budget

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from gapless.demo import batches, pack
from gapless.demo.train import Settings

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
