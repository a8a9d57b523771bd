# SPDX-License-Identifier: Apache-2.0
"""AdaSpa by hand: its schedule, its masks, what it keeps; and the policy it shares with others."""

import math

import pytest
import torch

from gapless import reference
from gapless.ops.block_sparse import attention_with_mass, block_mass, block_sparse_attention
from gapless.plan.block_grid import BlockGrid
from gapless.sparsity.adaspa import AdaSpa, head_densities
from gapless.sparsity.policy import Dense
from gapless.sparsity.selectors import Keep, top_k, top_k_global
from gapless.testing import assert_within_budget

HEADS, DIM = 4, 16


def draw(tokens: int, step: int = 0, batch: int = 1, dtype=torch.float32, tokens_k: int | None = None):
    """q, k, v [batch, tokens, heads, dim] that change a little with the step; keys near a query weigh most."""
    generator = torch.Generator().manual_seed(0)
    later = torch.Generator().manual_seed(1 + step)
    place = torch.linspace(0, 40, tokens)[:, None, None] * torch.linspace(0.2, 2, DIM // 2)
    wave = torch.cat([place.sin(), place.cos()], -1) * torch.linspace(0.4, 1.6, HEADS)[:, None]

    def one(scale: float, n: int):
        x = torch.randn(batch, n, HEADS, DIM, generator=generator)
        return scale * (x + 0.2 * torch.randn(x.shape, generator=later))

    n = tokens if tokens_k is None else tokens_k
    q, k, v = one(0.3, tokens) + wave, one(0.3, n) + wave[:n], one(1.0, n)
    return tuple(x.to(dtype) for x in (q, k, v))


def dense(q, k, v, lengths_k=None):
    """float64, item by item."""
    outs = []
    for i in range(q.shape[0]):
        n = k.shape[1] if lengths_k is None else lengths_k[i]
        cu = [torch.tensor([0, x], dtype=torch.int32) for x in (q.shape[1], n)]
        outs.append(reference.varlen_attention(q[i].double(), k[i, :n].double(), v[i, :n].double(), *cu)[0])
    return torch.stack(outs)


def kinds(policy, **wanted) -> list[str]:
    rows = [row for row in policy.statistics() if all(getattr(row, k) == v for k, v in wanted.items())]
    return [row.kind for row in rows]


def test_the_schedule():
    adaspa = AdaSpa(0.3, block=16, search_steps=(2, 4))
    for step in range(6):
        for call in ("cond", "uncond"):
            for layer in range(2):
                out = adaspa.attention(layer, step, *draw(200, step + 10 * layer), call=call)
                assert out.shape == (1, 200, HEADS, DIM)
    wanted = ["dense", "fused search", "sparse", "cached search", "sparse", "sparse"]
    for call in ("cond", "uncond"):
        for layer in range(2):
            assert kinds(adaspa, call=call, layer=layer) == wanted
    for row in adaspa.statistics():
        assert row.run == 0 and row.attention_seconds > 0
        searched = "search" in row.kind
        assert (row.search_seconds > 0) == (searched or row.kind == "sparse")
        assert math.isnan(row.recall) != searched
        assert row.density == 1.0 if row.kind in ("dense", "fused search") else 0.25 < row.density < 0.35
    assert sorted(adaspa.layouts) == [("cond", 0), ("cond", 1), ("uncond", 0), ("uncond", 1)]


def test_defaults_are_the_papers():
    adaspa = AdaSpa()
    assert (adaspa.density, adaspa.block_q, adaspa.block_k) == (0.2, 64, 64)
    assert adaspa.search_steps == (10, 30)
    tokens = draw(64)
    found = [adaspa.attention("layer", step, *tokens) is not None and kinds(adaspa)[-1] for step in range(50)]
    assert (
        found.count("dense") == 9 and found.index("fused search") == 9
    )  # ten dense steps, the last one searches
    assert found.index("cached search") == 29 and found.count("sparse") == 39


def test_dense_steps_and_density_one_are_dense_attention():
    for adaspa in (AdaSpa(0.2, search_steps=(3,)), AdaSpa(1.0, block=16, search_steps=(1, 3))):
        for step in range(3):
            q, k, v = draw(150, step, batch=2)
            out = adaspa.attention(0, step, q, k, v)
            double = [x.double() for x in (q, k, v)]
            witness = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / DIM**0.5, -1)
            witness = torch.einsum("bhij,bjhd->bihd", witness, v)
            assert_within_budget(out, dense(*double), witness)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("selection", ["row", "global"])
def test_sparse_steps_compute_the_heaviest_blocks(selection, compact):
    """The whole of it written down: masses by the first LSE, three levels of density, attention over the blocks."""
    adaspa = AdaSpa(0.25, block=32, search_steps=(1, 3), selection=selection, compact=compact)
    steps = [draw(300, step) for step in range(4)]
    outs = [adaspa.attention("x", step, *tokens) for step, tokens in enumerate(steps)]
    grid = BlockGrid.make(300, block_q=32, block_k=32)
    choose = top_k if selection == "row" else top_k_global
    blocks = {"cu_seqlens_q": grid.cu_seqlens_q, "block_q": 32, "block_k": 32}
    _, lse, _ = attention_with_mass(*(x[0] for x in steps[0]), **blocks)
    for searched, used in ((0, (1,)), (2, (2, 3))):
        q, k, _ = (x[0] for x in steps[searched])
        mass = block_mass(q, k, lse, **blocks)
        if selection == "global" and searched:
            queries = torch.tensor([32.0] * 9 + [12.0])
            mass = mass / mass.sum(-1, keepdim=True) * queries[:, None]
        recalls = choose(mass, grid, density=0.25).recall(mass)
        found = choose(mass, grid, density=head_densities(recalls, 0.25))
        assert len(set(found.density_per_head.tolist())) == 3  # the inputs give every level
        for step in used:
            q, k, v = (x[0] for x in steps[step])
            torch.testing.assert_close(outs[step][0], block_sparse_attention(q, k, v, found.layout))
    assert torch.equal(adaspa.layouts["", "x"].to_mask(), found.mask)


def test_levels_of_density():
    recall = torch.tensor([0.95, 0.3, 0.85, 0.5, 0.7, 0.75])
    assert head_densities(recall, 0.2).tolist() == pytest.approx([0.1, 0.3, 0.1, 0.3, 0.2, 0.2])
    # More heads above the threshold than half: the best half and the worst half, and no overlap.
    assert head_densities(torch.tensor([0.9, 0.99, 0.95]), 0.2).tolist() == pytest.approx([0.3, 0.1, 0.2])
    assert head_densities(torch.full((4,), 0.9), 0.2).tolist() == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert head_densities(torch.full((4,), 0.5), 0.2).tolist() == [0.2] * 4
    assert head_densities(torch.tensor([0.9]), 0.2).tolist() == [0.2]
    # (3s - 1) / 2 would be below zero here: levels move as far as the densest one can.
    assert head_densities(torch.tensor([0.9, 0.1]), 0.9).tolist() == pytest.approx([0.8, 1.0])
    assert head_densities(torch.tensor([0.9, 0.1]), 1.0).tolist() == [1.0, 1.0]
    assert head_densities(torch.tensor([0.9, math.nan, 0.5]), 0.2).tolist() == pytest.approx([0.1, 0.3, 0.2])
    each = torch.tensor([[0.9, 0.2], [0.1, 0.9]])
    assert head_densities(each, 0.5).tolist() == [[0.25, 0.75], [0.75, 0.25]]


def test_the_mean_density_is_kept():
    for density in (0.1, 0.2, 0.5, 0.9):
        adaspa = AdaSpa(density, block=16, search_steps=(1,), recall_threshold=0.1)
        adaspa.attention(0, 0, *draw(640))
        (layout,) = adaspa.layouts.values()
        per_head = layout.density_per_head
        assert per_head.mean().item() == pytest.approx(density, abs=0.02)
        assert per_head.max() > per_head.min() + 0.04
        rows = layout.to_mask().sum(-1)
        assert (rows == rows[:, :1]).all()  # every row the same number


@pytest.mark.parametrize("in_budget", [True, False])
@pytest.mark.parametrize("text", [(0, 20), (180, 200)])
def test_text_sees_and_is_seen_by_all(text, in_budget):
    adaspa = AdaSpa(0.3, block=16, search_steps=(1,), text_in_budget=in_budget, head_adaptive=False)
    adaspa.attention(0, 0, *draw(200), text=text)
    mask = adaspa.layouts["", 0].to_mask()
    blocks = slice(0, 2) if text[0] == 0 else slice(11, 13)
    assert mask[:, blocks].all() and mask[:, :, blocks].all()
    others = mask.clone()
    others[:, blocks] = False
    expected = 4 if in_budget else 6  # 0.3 of 13 blocks, and two blocks of text
    assert others.sum(-1).max() == expected == others.sum(-1)[:, 5].min()


def test_keys_that_are_cut_off_do_not_count():
    q, k, v = draw(130, batch=3)
    lengths = (130, 77, 0)
    adaspa = AdaSpa(1.0, block=16, search_steps=(1,))
    outs = [adaspa.attention(0, step, q, k, v, lengths_k=lengths) for step in range(2)]
    for out in outs:
        torch.testing.assert_close(out.double(), dense(q, k, v, lengths), atol=1e-5, rtol=1e-5)
    k[1, 77:] = v[1, 77:] = k[2] = v[2] = math.nan
    assert torch.equal(adaspa.attention(0, 2, q, k, v, lengths_k=lengths), outs[1])
    assert adaspa.layouts["", 0].grid.lengths_k == lengths


def test_without_the_lse_cache_each_search_is_dense():
    adaspa = AdaSpa(0.3, block=16, search_steps=(1, 3), lse_cache=False)
    for step in range(4):
        q, k, v = draw(100, step)
        out = adaspa.attention(0, step, q, k, v)
        if step in (0, 2):
            torch.testing.assert_close(out.double(), dense(q, k, v), atol=1e-5, rtol=1e-5)
    assert kinds(adaspa) == ["fused search", "sparse", "fused search", "sparse"]


def test_an_lse_of_another_size_changes_no_mask():
    """A step whose scores grew by a constant for each query: the kept LSE is off by that, the masks are not."""
    for selection in ("row", "global"):
        masks, recalls = [], []
        for shift in (0.0, 3.0):
            adaspa = AdaSpa(0.3, block=16, search_steps=(1, 2), selection=selection)
            q, k, v = draw(128)
            k = torch.cat(
                [k, torch.ones(1, 128, HEADS, 1)], -1
            )  # one more dim, which adds q's entry to each score
            q = torch.cat([q, torch.zeros(1, 128, HEADS, 1)], -1)
            adaspa.attention(0, 0, q, k, v)
            grown = q.clone()
            grown[..., -1] = shift * torch.linspace(0, 1, 128)[:, None]
            adaspa.attention(0, 1, grown, k, v)
            masks.append(adaspa.layouts["", 0].to_mask())
            recalls.append(adaspa.statistics()[-1].recall)
        assert (masks[0] != masks[1]).float().mean() < 0.02  # rows of one block grew by different amounts
        assert recalls[0] == pytest.approx(recalls[1], abs=0.01) and 0.3 < recalls[0] < 1


def test_what_is_kept():
    adaspa = AdaSpa(0.2, block=16, search_steps=(1, 3))
    sizes = []
    for step in range(3):
        adaspa.attention(0, step, *draw(640))
        sizes.append(adaspa.nbytes)
    bits = HEADS * 40 * 2 * 4  # two words of 32 blocks for each row
    assert sizes == [
        bits + HEADS * 640 * 4,
        bits + HEADS * 640 * 4,
        bits,
    ]  # the LSE goes after the last search
    lists = AdaSpa(0.2, block=16, search_steps=(1,), compact=False)
    lists.attention(0, 0, *draw(640))
    assert lists.nbytes > 4 * bits


def test_a_new_run_searches_anew():
    adaspa = AdaSpa(0.3, block=16, search_steps=(2,))
    for run in range(2):
        for step in range(3):
            adaspa.attention(0, step, *draw(100, 7 * run + step))
        kept = adaspa.layouts["", 0].to_mask()
        adaspa.end_run()
        assert torch.equal(adaspa.layouts["", 0].to_mask(), kept)  # to look at, until the next run
    assert kinds(adaspa, run=0) == kinds(adaspa, run=1) == ["dense", "fused search", "sparse"]
    adaspa.reset()
    assert adaspa.statistics() == [] and adaspa.layouts == {} and adaspa.nbytes == 0


def test_another_length_searches_anew_and_late_layers_search_when_seen():
    adaspa = AdaSpa(0.3, block=16, search_steps=(1, 5))
    for step, tokens in enumerate((100, 100, 160, 160)):
        adaspa.attention(0, step, *draw(tokens))
    assert kinds(adaspa) == ["fused search", "sparse", "fused search", "sparse"]
    adaspa.attention("late", 3, *draw(100))
    adaspa.attention("late", 4, *draw(100))
    assert kinds(adaspa, layer="late") == ["fused search", "cached search"]


def test_grouped_heads_low_precision_and_other_blocks():
    q, k, v = draw(150, dtype=torch.bfloat16)
    adaspa = AdaSpa(0.5, block=(32, 16), search_steps=(1,))
    for step in range(2):
        out = adaspa.attention(0, step, q, k[:, :, :2], v[:, :, :2], scale=0.3)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    layout = adaspa.layouts["", 0]
    assert (layout.block_q, layout.block_k, layout.heads) == (32, 16, HEADS)
    packed = [x[0] for x in (q, k[:, :, :2], v[:, :, :2])]
    assert torch.equal(out[0], block_sparse_attention(*packed, layout, scale=0.3))


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_few_tokens(tokens):
    adaspa = AdaSpa(0.2, search_steps=(1, 2))
    for step in range(3):
        q, k, v = draw(tokens, step, batch=2)
        out = adaspa.attention(0, step, q, k, v)
        torch.testing.assert_close(out.double(), dense(q, k, v), atol=1e-5, rtol=1e-5)


def test_selecting_reads_nothing_from_the_device():
    for selection in ("row", "global"):
        adaspa = AdaSpa(0.2, selection=selection)
        grid = BlockGrid.make([780, 780], [780, 700], block_q=64, block_k=64, device="meta")
        mass = torch.empty(4, grid.q_blocks, grid.max_k_blocks, device="meta")
        found = adaspa.select(mass, grid, text=(0, 100))
        assert found.layout.compact().expand().ids.shape == (found.capacity,)


def test_the_dense_policy():
    policy = Dense()
    q, k, v = draw(90, batch=2)
    torch.testing.assert_close(policy.attention(0, 0, q, k, v).double(), dense(q, k, v), atol=1e-5, rtol=1e-5)
    assert kinds(policy) == ["dense"]


def test_keep_is_what_text_becomes():
    adaspa = AdaSpa(0.3, block=16, head_adaptive=False)
    grid = BlockGrid.make(200, block_q=16, block_k=16)
    mass = torch.rand(2, 13, 13, generator=torch.Generator().manual_seed(0))
    wanted = top_k(mass, grid, density=0.3, keep=Keep(text=(3, 9)))
    assert torch.equal(adaspa.select(mass, grid, text=(3, 9)).mask, wanted.mask)


Q = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaSpa(0.0), "density is 0.0: it has to be above 0"),
        (lambda: AdaSpa(1.2), "density is 1.2"),
        (lambda: AdaSpa(block=48), "block_q is 48: it has to be one of 16, 32"),
        (lambda: AdaSpa(search_steps=()), r"search_steps is \(\)"),
        (lambda: AdaSpa(search_steps=(0, 30)), r"search_steps\[0\] is 0: it has to be at least 1"),
        (lambda: AdaSpa(search_steps=(10, 10)), "they have to go up"),
        (lambda: AdaSpa(search_steps=(1.5,)), "has to be a list of whole numbers"),
        (lambda: AdaSpa(selection="column"), "selection is 'column'"),
        (lambda: AdaSpa().attention(0, -1, Q, Q, Q), "step is -1"),
        (lambda: AdaSpa().attention(0, 0, Q[0], Q, Q), r"q has shape \[4, 2, 8\]"),
        (lambda: AdaSpa().attention(0, 0, Q, Q[:, :, :, :4], Q), "k has shape"),
        (lambda: AdaSpa().attention(0, 0, Q, Q, Q[:, :3]), "v has shape"),
        (lambda: AdaSpa().attention(0, 0, Q, Q, Q, lengths_k=[5]), r"lengths_k\[0\] is 5: it has to be from 0 to 4"),
        (lambda: AdaSpa().attention(0, 0, Q, Q, Q, lengths_k=[1, 2]), "lengths_k are 2: they have to be 1"),
        (lambda: AdaSpa().attention(0, 0, Q, Q, Q, scale=math.inf), "scale is inf"),
        (lambda: AdaSpa().attention(0, 0, Q.clone().requires_grad_(), Q, Q), "AdaSpa is for inference"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
