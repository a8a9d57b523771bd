# SPDX-License-Identifier: Apache-2.0
"""Cost models: what they count, what they refuse, and the published ones against their sources."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.schedule import CostModel
from gapless.schedule.fit import fit_times
from gapless.schedule.published import BYTESCALE_ATTENTION, BYTESCALE_MLP, NAMES


def test_a_micro_batch_by_hand():
    cost = CostModel(
        cell=2.0,
        token=3.0,
        fixed=5.0,
        layers=4,
        kv_bytes=8.0,
        node_bandwidth=4.0,
        network_bandwidth=1.0,
        latency=0.5,
    )
    # 3 tokens are 6 pairs; forward and 2.5 or 2 times that backward, 4 layers.
    assert cost.cells([3, 0]).tolist() == [6, 0]
    attention, linear, overhead = 6 * 2 * 3.5 * 4, 3 * 3 * 3 * 4, 5 * 3 * 4
    assert cost.attention(6) == attention and cost.linear(3) == linear and cost.overhead == overhead
    assert cost.work([3]).tolist() == [attention + linear]
    assert cost.seconds(3, 6) == attention + linear + overhead
    # Over 3 ranks two hops of one token's keys and values, forward, and twice the bytes backward.
    assert cost.ring(3, 3) == 2 * 4 * (8 * 3 / 4 + 2 * 0.5)
    assert cost.ring(3, 3, True) == 2 * 4 * (8 * 3 / 1 + 2 * 0.5)
    assert cost.seconds(3, 6, 3) == max(attention / 3, 56) + linear / 3 + overhead
    assert cost.seconds(3, 6, 3, True) == max(attention / 3, 200) + linear / 3 + overhead
    assert cost.ring(3, [1, 3]).tolist() == [0, 56]
    # Over 2 nodes of 2 ranks: two hops inside nodes, beside one to the next node.
    assert cost.ring(4, 4, True, 2) == max(2 * 4 * (8 * 3 / 4 + 2 * 0.5), 4 * (8 * 3 / 1 + 2 * 0.5))
    assert cost.seconds(4, 10, 4, True, 2) == max(10 * 28 / 4, 100) + 4 * 36 / 4 + overhead
    assert CostModel(cell=1, token=1, causal=False).cells(3) == 9


def test_offloaded_layers_are_the_inner_ones():
    assert CostModel(cell=1, token=1, layers=8).resident_share([0, 0.5, 1]).tolist() == [1, 0.625, 0.25]
    assert CostModel(cell=1, token=1, layers=2).resident_share(1) == 1
    assert CostModel(cell=1, token=1, layers=1).resident_share(1) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cell": -1.0}, ValueError, r"cell is -1.0: it has to be finite and at least 0"),
        ({"token": math.nan}, ValueError, "token is nan"),
        ({"fixed": math.inf}, ValueError, "fixed is inf"),
        ({"node_bandwidth": 0.0}, ValueError, "node_bandwidth is 0: it has to be above 0"),
        ({"latency": "1 us"}, TypeError, "latency is '1 us': it has to be a number"),
        ({"layers": 0}, ValueError, "layers is 0: it has to be a whole number of at least 1"),
        ({"layers": 1.5}, ValueError, "layers is 1.5"),
    ],
)
def test_impossible_numbers(changes, error, message):
    with pytest.raises(error, match=message):
        CostModel(**{"cell": 1.0, "token": 1.0} | changes)


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "cost.json"
    for cost in (CostModel(cell=1e-9, token=1e-6), CostModel.published("bytescale")):
        cost.save(path)
        assert CostModel.load(path) == cost
    assert "Infinity" not in path.read_text()
    for text, message in (
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ('{"cell": 1, "token": 1, "speed": 2}', r"unknown fields \['speed'\]"),
        ('{"cell": 1}', r"the fields \['token'\] are missing"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            CostModel.load(path)


def test_bytescale_gives_back_its_table():
    cost = CostModel.published("bytescale")
    ((at, mlp),) = BYTESCALE_MLP.items()
    for tokens, ms in BYTESCALE_ATTENTION.items():
        attention = (
            cost.cell * cost.cells(tokens) + cost.token * tokens + cost.fixed - mlp * 1e-3 / at * tokens
        )
        assert attention == pytest.approx(ms * 1e-3, rel=0.015)
    assert cost.cell * cost.cells(at) + cost.token * at + cost.fixed == pytest.approx(8.4e-3, rel=0.015)
    # What the reading of the table rests on: with the MLP in the time at 16K alone, no fit comes near it.
    tokens = np.array(list(BYTESCALE_ATTENTION), np.float64)
    times = np.array(list(BYTESCALE_ATTENTION.values()))
    times[tokens == at] += mlp
    cell, token, fixed = fit_times(tokens, cost.cells(tokens), times)
    assert np.abs((cell * cost.cells(tokens) + token * tokens + fixed) / times - 1).max() > 0.3


def test_flexsp_gives_back_its_formula():
    cost = CostModel.published("flexsp")
    for s in (1024, 32768):
        published = (5.128e-6 * s**2 + 0.18396 * s + 629.36) * 1e-3
        assert cost.seconds(s, cost.cells(s)) == pytest.approx(published, rel=1e-3)
    assert cost.activation(1) == pytest.approx(4.71e6)


def test_published_by_name():
    for name in NAMES:
        assert CostModel.published(name).name.startswith(name)
    with pytest.raises(
        ValueError, match="name is 'megascale': it has to be one of bytescale, bytescale-gpu, flexsp"
    ):
        CostModel.published("megascale")


positive = st.floats(1e-3, 1e3)


@settings(max_examples=50, deadline=None)
@given(positive, positive, positive)
def test_a_fit_finds_exact_numbers(cell, token, fixed):
    tokens = np.array([1.0, 2, 5, 9, 30])
    cells = tokens * (tokens + 1) / 2
    assert fit_times(tokens, cells, cell * cells + token * tokens + fixed) == pytest.approx(
        (cell, token, fixed), rel=1e-6
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 10.0)), min_size=1, max_size=8))
def test_a_fit_is_never_negative_nor_worse_than_one_term(samples):
    tokens, seconds = (np.array(x, np.float64) for x in zip(*samples, strict=True))
    cells = tokens * tokens / 2
    found = fit_times(tokens, cells, seconds)
    assert min(found) >= 0

    def error(cell, token, fixed):
        return np.square((cell * cells + token * tokens + fixed) / seconds - 1).sum()

    for column in (cells, tokens, np.ones(len(tokens))):
        one = (column / seconds).sum() / np.square(column / seconds).sum()
        alone = [one * (column is c) for c in (cells, tokens)] + [0.0]
        if column is not cells and column is not tokens:
            alone[2] = one
        assert error(*found) <= error(*alone) * (1 + 1e-6) + 1e-9
