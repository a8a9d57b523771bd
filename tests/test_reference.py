# SPDX-License-Identifier: Apache-2.0
"""The reference itself: against torch's own attention, and against values worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from gapless import reference
from gapless.reference.varlen import visible
from gapless.testing import assert_within_budget, make_batch, scatter_pages


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_equal_lengths_agree_with_torch(causal: bool):
    batch = make_batch([7, 1, 12], heads=4, kv_heads=2, dim=8, dtype=torch.float64)
    out, lse = reference.varlen_attention(batch.q, batch.k, batch.v, batch.cu_seqlens_q, causal=causal)
    bounds = batch.cu_seqlens_q.tolist()
    for begin, end in pairwise(bounds):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (batch.q, batch.k, batch.v))
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(0, 1)
        torch.testing.assert_close(out[begin:end], want)
    assert lse.shape == (4, 20)


def rows(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


@pytest.mark.parametrize(
    "len_q, len_k, window, want",
    [
        (2, 5, (-1, 0), ["xxxx.", "xxxxx"]),
        (5, 2, (-1, 0), ["..", "..", "..", "x.", "xx"]),
        (3, 3, (1, 0), ["x..", "xx.", ".xx"]),
        (2, 5, (1, 1), ["..xxx", "...xx"]),
        (3, 3, (0, -1), ["xxx", ".xx", "..x"]),
        (3, 2, (-1, -1), ["xx", "xx", "xx"]),
    ],
)
def test_what_each_query_sees(len_q: int, len_k: int, window: tuple[int, int], want: list[str]):
    assert rows(visible(len_q, len_k, window, torch.device("cpu"))) == want


ONES = torch.ones(1, 1, 1, dtype=torch.float64)
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def test_bottom_right_causal_by_hand():
    """Two queries, three keys: scores are the keys themselves, weights 1 : 2 : 4 and 1 : 2."""
    k = torch.tensor([0.0, LN2, LN4], dtype=torch.float64)[:, None, None]
    v = torch.tensor([7.0, 14.0, 21.0], dtype=torch.float64)[:, None, None]
    out, lse = reference.varlen_attention(
        ONES.expand(2, 1, 1), k, v, torch.tensor([0, 2]), torch.tensor([0, 3]), causal=True, scale=1.0
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([35 / 3, 17.0], dtype=torch.float64))
    torch.testing.assert_close(lse, torch.tensor([[LN3, math.log(7)]], dtype=torch.float64))


def test_rows_that_see_nothing_by_hand():
    out, lse = reference.varlen_attention(
        ONES.expand(3, 1, 1),
        ONES,
        5 * ONES,
        torch.tensor([0, 3]),
        torch.tensor([0, 1]),
        causal=True,
        scale=1.0,
    )
    assert out.flatten().tolist() == [0.0, 0.0, 5.0]
    assert lse.flatten().tolist() == [-math.inf, -math.inf, 1.0]


def test_sink_by_hand():
    """A score of 0 and a sink of ln 3: a quarter of the weight is left for the value."""
    out, lse = reference.varlen_attention(
        0 * ONES, ONES, 8 * ONES, torch.tensor([0, 1]), sinks=torch.tensor([LN3]), scale=1.0
    )
    assert out.item() == pytest.approx(2.0)
    assert lse.item() == pytest.approx(LN4)


def test_softcap_comes_before_alibi_by_hand():
    """Two keys with the score ln 2 after the cap; the farther one loses ln 2 by its distance."""
    score = 2.0 * math.atanh(LN2 / 2.0)
    k = torch.full((2, 1, 1), score, dtype=torch.float64)
    out, lse = reference.varlen_attention(
        ONES, k, torch.tensor([3.0, 6.0], dtype=torch.float64)[:, None, None], torch.tensor([0, 1]),
        torch.tensor([0, 2]), softcap=2.0, alibi_slopes=torch.tensor([LN2], dtype=torch.float64), scale=1.0,
    )  # fmt: skip
    assert out.item() == pytest.approx(5.0)  # weights 1 : 2
    assert lse.item() == pytest.approx(LN3)


def test_pages_are_only_another_place():
    lengths = [9, 0, 4]
    batch = make_batch([2, 1, 4], lengths, 2, 1)
    pages = scatter_pages(batch.k, batch.v, lengths, 4)
    assert pages.k.isnan().any()
    want = reference.varlen_attention(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, causal=True
    )
    got = reference.varlen_attention(
        batch.q, pages.k, pages.v, batch.cu_seqlens_q, seqused_k=pages.seqused_k, block_table=pages.block_table,
        causal=True,
    )  # fmt: skip
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_merge_by_hand():
    """Weights 1 and 3."""
    outs = [torch.tensor([[[4.0]]]), torch.tensor([[[8.0]]])]
    out, lse = reference.merge_attention(outs, [torch.zeros(1, 1), torch.full((1, 1), LN3)])
    assert out.item() == pytest.approx(7.0)
    assert lse.item() == pytest.approx(LN4)


class TestBudget:
    """The helper that every other test trusts."""

    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    witness = torch.tensor([1.0, 2.001])

    def test_inside(self):
        assert_within_budget(torch.tensor([1.0, 1.999]), self.oracle, self.witness)

    def test_outside_shows_the_numbers(self):
        with pytest.raises(
            AssertionError, match=r"dq .*error 1\.000e-02 is above the budget 2\.0.*got 1\.99"
        ):
            assert_within_budget(torch.tensor([1.0, 1.99]), self.oracle, self.witness, name="dq")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_non_finite(self, value: float):
        with pytest.raises(AssertionError, match="finite where"):
            assert_within_budget(torch.tensor([1.0, value]), self.oracle, self.witness)

    def test_sign_of_infinity(self):
        infinite = torch.tensor([1.0, torch.inf], dtype=torch.float64)
        assert_within_budget(infinite.float(), infinite, infinite.float())
        with pytest.raises(AssertionError, match="finite where"):
            assert_within_budget(torch.tensor([1.0, -torch.inf]), infinite, infinite.float())

    def test_overflow_of_a_narrow_dtype_is_right(self):
        large = torch.tensor([1e6], dtype=torch.float64)
        assert_within_budget(large.half(), large, large.half())

    def test_shapes(self):
        with pytest.raises(AssertionError, match="shape"):
            assert_within_budget(self.witness[:1], self.oracle, self.witness)

    def test_a_higher_factor_needs_a_reason(self):
        with pytest.raises(ValueError, match="needs a reason"):
            assert_within_budget(self.witness, self.oracle, self.witness, factor=3.0)
