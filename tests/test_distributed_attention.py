# SPDX-License-Identifier: Apache-2.0
"""Attention over rings of real processes against one process: values, gradients, edges, and what is said on failure."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import gapless
from gapless import distributed
from gapless.distributed.peers import Exchange
from gapless.distributed.ring_plan import RingPlan, seen_chunks
from gapless.schedule import Cluster, CostModel, MicroBatch, Pack, Schedule, schedule_of
from gapless.testing import (
    Batch,
    Results,
    assert_results,
    assert_within_budget,
    make_batch,
    oracle_and_witness,
)
from gapless.testing.processes import Failure, Processes, ProcessesError, shared

RANKS = 4
COST = CostModel(cell=1e-9, token=1e-6)
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ONE_SUM = "a few numbers, each the sum over all tokens of terms that cancel, so the witness is near by chance"


@dataclass(frozen=True)
class Case:
    """One global batch, how it is spread, and the mask. Sent to the processes as it is."""

    lengths: list[int]
    packs: list[Pack]
    dtype: torch.dtype = FP32
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    dim_v: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the mask
    slopes: str = ""  # "", "heads" or "sequences"
    sinks: bool = False
    dlse: bool = True
    seed: int = 0
    per_node: int = RANKS  # below the number of ranks, rings even over nodes are of two levels
    ranks: int = RANKS

    def schedule(self) -> Schedule:
        cluster = Cluster(self.ranks, ranks_per_node=self.per_node)
        return schedule_of(self.lengths, self.packs, ranks=cluster, capacity=10**6, cost=COST, two_level=True)

    def batch(self) -> Batch:
        sizes = self.heads, self.kv_heads, self.dim, self.dim_v
        return make_batch(self.lengths, None, *sizes, self.dtype, seed=self.seed)

    def side(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """ALiBi slopes, of heads or of each sequence of the batch, and sinks."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.heads,) if self.slopes == "heads" else (len(self.lengths), self.heads)
        slopes = torch.rand(shape, generator=generator) / 4 if self.slopes else None
        wide = FP64 if self.dtype == FP64 else FP32
        return slopes, torch.randn(self.heads, generator=generator).to(wide) if self.sinks else None


def rows_of(micro_batch: MicroBatch, lengths: list[int]) -> torch.Tensor:
    """Where the micro-batch's tokens lie in the packed global batch."""
    first = np.cumsum([0, *lengths])
    rows = [np.arange(first[s] + a, first[s] + b) for s, a, b in micro_batch.pieces]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *rows]))


def attend_case(case: Case) -> list[tuple[torch.Tensor, Results]]:
    """In a process: this rank's rows and results, one micro-batch after another."""
    batch, (slopes, sinks) = case.batch(), case.side()
    found = []
    for micro_batch in case.schedule().micro_batches(dist.get_rank()):
        rows = rows_of(micro_batch, case.lengths)
        leaves = [x[rows].requires_grad_() for x in (batch.q, batch.k, batch.v)]
        if sinks is not None:
            leaves.append(sinks.clone().requires_grad_())
        mine = slopes
        if case.slopes == "sequences":
            mine = slopes[np.concatenate([s.sequences for s in micro_batch.shards])]
        out, lse = distributed.varlen_attention(
            *leaves[:3],
            micro_batch,
            alibi_slopes=mine,
            sinks=leaves[3] if case.sinks else None,
            return_lse=True,
            **case.options,
        )
        pairs = [(out, batch.dout[rows]), (lse, batch.dlse[:, rows])][: 2 if case.dlse else 1]
        outputs, incoming = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outputs, leaves, incoming)
        found.append((rows, Results(out.detach(), lse.detach(), *gradients)))
    return found


def attend_cases(cases: list[Case]) -> list[list[tuple[torch.Tensor, Results]]]:
    torch._C._set_deterministic_algorithms(True)  # torch's own function would import its compiler first
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN in every torch.empty
    return [attend_case(case) for case in cases]


def assemble(case: Case, parts: list[tuple[torch.Tensor, Results]]) -> Results:
    """The global batch's results from those of all micro-batches of all ranks."""
    batch = case.batch()
    tokens = batch.q.shape[0]
    wide = FP64 if case.dtype == FP64 else FP32
    whole = Results(
        torch.full_like(batch.dout, torch.nan),
        torch.full((case.heads, tokens), torch.nan, dtype=wide),
        *(torch.full_like(x, torch.nan) for x in (batch.q, batch.k, batch.v)),
        torch.zeros(case.heads, dtype=wide) if case.sinks else None,
    )
    for rows, got in parts:
        for name in ("out", "dq", "dk", "dv"):
            getattr(whole, name)[rows] = getattr(got, name)
        whole.lse[:, rows] = got.lse
        if case.sinks:
            whole.dsinks.add_(got.dsinks)
    return whole


def check(cases: list[Case]) -> None:
    by_rank = shared(cases[0].ranks).run(attend_cases, cases)
    for i, case in enumerate(cases):
        slopes, sinks = case.side()
        oracle, witness = oracle_and_witness(
            case.batch(), sinks=sinks, dlse=case.dlse, alibi_slopes=slopes, **case.options
        )
        actual = assemble(case, [part for rank in by_rank for part in rank[i]])
        try:
            assert_results(*(x._replace(dsinks=None) for x in (actual, oracle, witness)))
            if case.sinks:
                factor = 64.0 if case.dtype == FP64 else 4.0
                sinks_of = (x.dsinks for x in (actual, oracle, witness))
                assert_within_budget(*sinks_of, factor=factor, reason=ONE_SUM, name="dsinks")
        except AssertionError as error:
            raise AssertionError(f"case {i}, {case}: {error}") from None


CAUSAL = {"causal": True}
RING = [Pack([0, 1, 2], [0, 1, 2, 3], 0)]
MIXED = [70, 33, 1]

NAMED = {
    "causal": Case(MIXED, RING, options=CAUSAL),
    "full": Case(MIXED, RING),
    "window": Case(MIXED, RING, options={"window": (9, 0)}),
    "window_both": Case(MIXED, RING, options={"window": (3, 12)}),
    "window_right": Case(MIXED, RING, options={"window": (-1, 5)}),
    "window_wide": Case(MIXED, RING, options={"window": (2**40, 40), "causal": True}),
    "softcap": Case(MIXED, RING, options={"causal": True, "softcap": 5.0, "scale": 0.5}),
    "alibi": Case(MIXED, RING, options=CAUSAL, slopes="heads"),
    "alibi_full": Case(MIXED, RING, slopes="sequences"),
    "sinks": Case(MIXED, RING, options=CAUSAL, sinks=True),
    "everything": Case(
        MIXED, RING, options={"window": (20, 2), "softcap": 9.0}, slopes="sequences", sinks=True, dim_v=24
    ),
    "no_dlse": Case(MIXED, RING, options=CAUSAL, dlse=False),
    "mqa": Case(MIXED, RING, options=CAUSAL, kv_heads=1, dim=24, dim_v=8),
    "mha": Case(MIXED, RING, options=CAUSAL, kv_heads=4),
    "bf16": Case(MIXED, RING, BF16, options=CAUSAL, sinks=True),
    "fp16": Case(MIXED, RING, FP16, options=CAUSAL),
    "fp64": Case(MIXED, RING, FP64, options={"window": (30, 0)}, slopes="heads", sinks=True),
    # Two levels: two nodes of two, four of one, and rings that are not even over nodes.
    "nodes": Case(MIXED, RING, options=CAUSAL, per_node=2),
    "nodes_of_one": Case(MIXED, RING, options=CAUSAL, per_node=1),
    "nodes_full": Case(MIXED, RING, per_node=2, slopes="heads"),
    "nodes_window": Case(MIXED, RING, options={"window": (9, 0)}, per_node=2),
    "nodes_far_window": Case(MIXED, RING, options={"window": (2, 30)}, per_node=1, sinks=True),
    "nodes_order": Case(MIXED, [Pack([0, 1, 2], [3, 2, 0, 1], 0)], options=CAUSAL, per_node=2),
    "nodes_mixed": Case(MIXED, [Pack([0, 1, 2], [0, 2, 1, 3], 0)], options=CAUSAL, per_node=2),
    "nodes_uneven": Case(MIXED, [Pack([0, 1, 2], [0, 1, 3], 0)], options=CAUSAL, per_node=2),
    "nodes_short": Case([3, 1, 0, 5], [Pack([0, 1, 2, 3], [2, 3, 0, 1], 0)], options=CAUSAL, per_node=2),
    "nodes_bf16": Case(MIXED, RING, BF16, options=CAUSAL, per_node=2),
    "nodes_shared": Case(
        [40, 30, 20, 11],
        [Pack([0], [0, 1, 2, 3], 0), Pack([1], [1, 2], 0), Pack([2], [2, 3, 0, 1], 0), Pack([3], [1], 0)],
        options=CAUSAL,
        per_node=2,
    ),
    # Rings: in any order, of any members, some of whom hold no token.
    "order": Case(MIXED, [Pack([0, 1, 2], [2, 0, 3, 1], 0)], options=CAUSAL),
    "pair": Case(MIXED, [Pack([0, 1, 2], [3, 1], 0)], options=CAUSAL),
    "short": Case([3, 1, 0, 5], [Pack([0, 1, 2, 3], [1, 2, 3], 0)], options=CAUSAL),
    "one_token": Case([1], [Pack([0], [3, 0, 2, 1], 0)], options=CAUSAL),
    "no_tokens": Case([0, 0], [Pack([0, 1], [0, 1, 2], 0)], options=CAUSAL),
    "empty_pack": Case([5], [Pack([], [0, 1], 0), Pack([0], [1, 2], 0)], options=CAUSAL),
    # Micro-batches: rings that share ranks in one step, holes, different numbers.
    "shared": Case(
        [40, 30, 20, 11, 9, 7],
        [
            Pack([0], [0, 1], 0),
            Pack([1], [2, 1, 3], 0),
            Pack([2], [3, 2, 1, 0], 0),
            Pack([3, 4], [1], 0),
            Pack([5], [2], 0),
        ],
        options=CAUSAL,
    ),
    "cycle": Case(
        [20, 20, 20, 20],
        [Pack([i], [i, (i + 1) % 4], 0) for i in range(4)],
        options=CAUSAL,
    ),
    "holes": Case(
        [30, 20, 10, 5, 6],
        [
            Pack([0], [0, 3], 0),
            Pack([1], [1, 2], 2),
            Pack([2], [0, 1], 5),
            Pack([3], [3], 1),
            Pack([4], [3], 4),
        ],
        options=CAUSAL,
    ),
    "local": Case(
        [10, 0, 20, 5], [Pack([0, 1], [0], 0), Pack([2], [2], 0), Pack([3], [2], 0)], options=CAUSAL
    ),
}


def random_case(seed: int) -> Case:
    """Any lengths on any rings in any steps, under any mask."""
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.choice([0, 1, 2, 5, 9, 17, 40, 77], rng.integers(1, 8))]
    packs, left = [], list(rng.permutation(len(lengths)))
    while left:
        some = [int(left.pop()) for _ in range(min(len(left), int(rng.integers(1, 4))))]
        ring = [int(r) for r in rng.permutation(RANKS)[: rng.integers(1, RANKS + 1)]]
        packs.append(Pack(some, ring, int(rng.integers(0, 3))))
    options: dict[str, Any] = {"causal": bool(rng.integers(0, 4))}
    if rng.integers(0, 3) == 0:
        options["window"] = tuple(int(n) for n in rng.choice([-1, 0, 1, 4, 10, 30], 2))
    if rng.integers(0, 4) == 0:
        options["softcap"] = 8.0
    groups = int(rng.integers(1, 4))
    kv_heads = int(rng.integers(1, 3))
    return Case(
        lengths,
        packs,
        [FP32, FP32, BF16, FP64][rng.integers(0, 4)],
        groups * kv_heads,
        kv_heads,
        int(rng.choice([8, 16, 20])),
        [None, 12][rng.integers(0, 2)],
        options,
        ["", "", "heads", "sequences"][rng.integers(0, 4)],
        bool(rng.integers(0, 3) == 0),
        bool(rng.integers(0, 2)),
        seed,
        int(rng.choice([1, 2, RANKS])),
    )


def test_named_cases():
    check(list(NAMED.values()))


def test_two_nodes_of_three():
    # With two places, the next and the one before are the same.
    ring = {"lengths": MIXED, "packs": [Pack([0, 1, 2], range(6), 0)], "per_node": 3, "ranks": 6}
    options = [CAUSAL, {}, {"window": (9, 0)}, {"window": (2, 30)}]
    check([Case(**ring, options=how, sinks=not how) for how in options])
    check([Case(**{**ring, "per_node": 2}, options=how) for how in options])


@pytest.mark.parametrize(
    "some", [range(12), pytest.param(range(12, 50), marks=pytest.mark.thorough)], ids=["some", "many"]
)
def test_random_batches(some):
    check([random_case(seed) for seed in some])


def attend_twice(cases: list[Case]) -> list[bool]:
    """Whether results are the same bits when ranks come late in another way."""
    same = []
    for case in cases:
        first = attend_case(case)
        time.sleep(0.02 * ((dist.get_rank() * 7 + case.seed) % 4))
        second = attend_case(case)
        same.append(
            all(
                torch.equal(x, y)
                for (_, a), (_, b) in zip(first, second, strict=True)
                for x, y in zip(a, b, strict=True)
                if x is not None
            )
        )
    return same


def test_bitwise_the_same_in_every_run():
    cases = [NAMED["shared"], NAMED["everything"], NAMED["bf16"], *map(random_case, range(3))]
    assert shared(RANKS).run(attend_twice, cases) == [[True] * len(cases)] * RANKS


def groups_after(case: Case) -> int:
    attend_case(case)
    return len(dist.distributed_c10d._world.pg_map)


def test_no_group_is_made():
    assert shared(RANKS).run(groups_after, NAMED["shared"]) == [1] * RANKS


# Plans, without processes.


def cells(length: int, window: tuple[int, int]) -> np.ndarray:
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    left, right = window
    return ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))


def positions(shard, held: list[int]) -> np.ndarray:
    """(sequence, position) of each row of some chunks of a ring."""
    rows = []
    for chunk in held:
        begin, end = shard.chunk(chunk)
        for sequence, a, b in zip(shard.sequences, begin, end, strict=True):
            rows += [(sequence, p) for p in range(a, b)]
    return np.array(rows, np.int64).reshape(-1, 2)


def visit(plan: RingPlan, seen: dict[int, np.ndarray]) -> None:
    """Count each visible cell of each call of one rank; a call without any is an error."""
    own = plan.micro_batch.pieces
    for sequence, begin, end in own:
        seen[sequence][begin:end, begin:end] += cells(end - begin, plan.window)
    rows = np.concatenate(
        [
            np.stack([np.full(end - begin, sequence), np.arange(begin, end)], 1)
            for sequence, begin, end in [(0, 0, 0), *own]
        ]
    )
    for ring in plan.rings:
        shard, size = ring.shard, len(ring.shard.ranks)
        wanted = wanted_by(shard, plan.window)
        for number, round_ in enumerate(ring.rounds):
            turn, hop = divmod(number, shard.width)
            assert round_ is ring.round(turn, hop) and (round_.turn, round_.hop) == (turn, hop)
            chunks = [round_.member, 2 * size - 1 - round_.member]
            keys = positions(shard, [c for c in chunks if number == 0 or wanted(c, turn, hop)])
            assert len(keys) == round_.rows
            for pair in round_.pairs:
                q, k = rows[pair.queries], keys[pair.keys]
                counted = 0
                for i, sequence in enumerate(shard.sequences):
                    a, b = (x[i : i + 2].tolist() for x in (pair.plan.cu_seqlens_q, pair.plan.cu_seqlens_k))
                    at_q, at_k = q[a[0] : a[1], 1], k[b[0] : b[1], 1]
                    assert (q[a[0] : a[1], 0] == sequence).all() and (k[b[0] : b[1], 0] == sequence).all()
                    if not len(at_q) or not len(at_k):
                        continue
                    visible = cells(len(seen[sequence]), plan.window)[np.ix_(at_q, at_k)]
                    if pair.plan.q_offset is None:
                        assert visible.all() and pair.window == (-1, -1)
                    else:
                        assert at_q[0] - at_k[0] == pair.plan.q_offset[i]
                        assert visible.all() or pair.window == plan.window
                    seen[sequence][np.ix_(at_q, at_k)] += visible
                    counted += visible.sum()
                assert counted


def wanted_by(shard, window: tuple[int, int]):
    """Whether this rank has to have a chunk in a round: for itself, for who comes later in its group, or for others."""
    size, width = len(shard.ranks), shard.width
    sees = seen_chunks(np.stack([shard.chunk(j)[0] for j in range(2 * size)] + [shard.lengths]), window)

    def wanted(chunk: int, turn: int, hop: int) -> bool:
        owner = min(chunk, 2 * size - 1 - chunk)
        for rank in set(range(size)) - {owner}:
            at = (rank // width - owner // width) % (size // width), (rank - owner) % width
            if not (sees[rank, chunk] or sees[2 * size - 1 - rank, chunk]):
                continue
            if (at[0] == turn and at[1] >= hop) or (at[0] > turn and hop == 0):
                return True
        return False

    return wanted


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (4, 0), (0, 3), (-1, 2), (30, 30)])
def test_plans_see_each_cell_once(window):
    for seed in range(15):
        case = random_case(seed)
        schedule = case.schedule()
        seen = {i: np.zeros((n, n), np.int64) for i, n in enumerate(case.lengths)}
        plans = {
            (rank, b.step): RingPlan.make(b, window=window)
            for rank in range(RANKS)
            for b in schedule.micro_batches(rank)
        }
        for plan in plans.values():
            visit(plan, seen)
        for i, n in enumerate(case.lengths):
            assert (seen[i] == cells(n, window)).all(), (seed, i)
        check_messages(plans)


def test_plans_of_many_nodes_see_each_cell_once():
    lengths = [90, 7, 31]
    for ranks, per_node in ((12, 3), (12, 4), (12, 1), (6, 5), (10, 5)):
        for window in ((-1, 0), (-1, -1), (9, 0), (30, 5)):
            cluster = Cluster(ranks, ranks_per_node=per_node)
            packs = [Pack([0, 1, 2], range(ranks), 0)]
            schedule = schedule_of(lengths, packs, ranks=cluster, capacity=100, cost=COST, two_level=True)
            assert schedule.widths.tolist() == [ranks if ranks % per_node else per_node]
            seen = {i: np.zeros((n, n), np.int64) for i, n in enumerate(lengths)}
            plans = {(r, 0): RingPlan.make(schedule.micro_batch(r, 0), window=window) for r in range(ranks)}
            for plan in plans.values():
                visit(plan, seen)
            assert all((seen[i] == cells(n, window)).all() for i, n in enumerate(lengths))
            check_messages(plans)


def count(rows: slice) -> int:
    return rows.stop - rows.start


def check_messages(plans: dict[tuple[int, int], RingPlan]) -> None:
    """What each rank sends is what its peer has room for."""
    for (_, step), plan in plans.items():
        for ring in plan.rings:
            size, width, mine = len(ring.rounds), ring.shard.width, ring.shard.index
            peers = [
                next(r for r in plans[rank, step].rings if r.shard.pack == ring.shard.pack)
                for rank in ring.shard.ranks
            ]
            group = mine - mine % width
            neighbour, other = peers[group + (mine + 1 - group) % width], peers[(mine + width) % size]
            for round_ in ring.rounds:
                turn, hop = round_.turn, round_.hop
                assert round_.member == (group - turn * width) % size + (mine - group - hop) % width
                onward = neighbour.round(turn, hop + 1).rows if hop + 1 < width else 0
                assert count(round_.onward) == onward
                outward = other.round(turn + 1, 0).rows if hop == 0 and (turn + 1) * width < size else 0
                assert count(round_.outward) == outward
                at_home = peers[round_.member].round(turn, hop)
                assert at_home.finder == mine and count(round_.homeward) == count(at_home.arriving)
                assert hop == 0 or onward + count(round_.homeward) == round_.rows


def test_a_window_stops_keys_that_nobody_sees():
    schedule = schedule_of([80], [Pack([0], [0, 1, 2, 3], 0)], ranks=4, capacity=100, cost=COST)
    sent = {}
    for window in ((-1, 0), (10, 0)):
        plans = [RingPlan.make(schedule.micro_batches(r)[0], window=window) for r in range(RANKS)]
        sent[window] = sum(
            r.onward.stop - r.onward.start for p in plans for ring in p.rings for r in ring.rounds
        )
    # All chunks go to all three other ranks, but the last one, which only its own rank sees; with the window chunk j
    # is seen by chunk j + 1 alone: 0, 1, 2 one rank on, 4, 5, 6 all the way to the rank before, 3 and 7 nowhere.
    assert sent == {(-1, 0): 10 * (3 * 7), (10, 0): 10 * (3 * 1 + 3 * 3)}


def test_a_plan_is_made_once():
    micro_batch = NAMED["causal"].schedule().micro_batches(0)[0]
    cpu = torch.device("cpu")
    how = {"causal": True, "alibi": False, "device": cpu}
    first = RingPlan.of(micro_batch, window=(-1, -1), **how)
    assert RingPlan.of(micro_batch, window=(-1, -1), **how) is first
    assert RingPlan.of(micro_batch, window=(-1, 0), **how) is first  # causal says so already
    assert RingPlan.of(micro_batch, window=(3, 0), **how) is not first


# Arguments.


def inputs(tokens: int, heads: int = 2) -> list[torch.Tensor]:
    return [torch.zeros(tokens, heads, 8) for _ in range(3)]


def test_one_rank_needs_no_group():
    schedule = schedule_of([5, 7], [Pack([0, 1], [0], 0)], ranks=1, capacity=100, cost=COST)
    batch = make_batch([5, 7])
    slopes = torch.rand(2, 2)
    got = distributed.varlen_attention(
        batch.q, batch.k, batch.v, schedule.micro_batches(0)[0], causal=True, alibi_slopes=slopes
    )
    want = gapless.varlen_attention(
        batch.q, batch.k, batch.v, batch.cu_seqlens_q, causal=True, alibi_slopes=slopes
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"tokens": 4},
            ValueError,
            r"q has 4 tokens: it has to have the 3 of rank 1's micro-batch in step 2",
        ),
        ({}, ValueError, "rank 1 has packs on several ranks, and torch.distributed is not initialised"),
        ({"window": (-2, 0)}, ValueError, r"window is \(-2, 0\)"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes has shape \[3\]"),
        ({"sinks": torch.zeros(2, dtype=FP16)}, TypeError, "sinks is torch.float16"),
        ({"micro_batch": 3}, TypeError, "micro_batch is of type int"),
    ],
)
def test_bad_arguments(change, error, message):
    schedule = schedule_of([6], [Pack([0], [0, 1], 2)], ranks=2, capacity=100, cost=COST)
    change = dict(change)
    micro_batch = change.pop("micro_batch", schedule.micro_batches(1)[0])
    with pytest.raises(error, match=message):
        distributed.varlen_attention(*inputs(change.pop("tokens", 3)), micro_batch, **change)


def refused() -> list[str]:
    """What is said about the micro-batch of another rank, rows of slopes, and an implementation without rings."""
    schedule = schedule_of([8], [Pack([0], [0, 1, 2, 3], 0)], ranks=RANKS, capacity=100, cost=COST)
    mine, other = (schedule.micro_batches((dist.get_rank() + i) % RANKS)[0] for i in (0, 1))
    told = []
    for micro_batch, options in (
        (other, {}),
        (mine, {"alibi_slopes": torch.zeros(3, 2)}),
        (mine, {"impl": "reference"}),
    ):
        with pytest.raises(ValueError) as error:
            distributed.varlen_attention(*inputs(2), micro_batch, **options)
        told.append(str(error.value))
    return told


def test_refusals_in_a_group():
    for rank, told in enumerate(shared(RANKS).run(refused)):
        assert told[0] == f"micro_batch is of rank {(rank + 1) % RANKS}: this is rank {rank} of the group"
        assert told[1].startswith("alibi_slopes has 3 rows: it has to have 1")
        assert "it takes no part in rings" in told[2]


# Agreement.


def agreement(lengths: list[list[int]], ranks: int) -> str:
    mine = lengths[dist.get_rank()]
    schedule = schedule_of(mine, [Pack(range(len(mine)), [0], 0)], ranks=ranks, capacity=100, cost=COST)
    try:
        distributed.agree(schedule)
    except ValueError as error:
        return str(error)
    return ""


def test_agree():
    processes = shared(RANKS)
    assert processes.run(agreement, [[3, 4]] * RANKS, RANKS) == [""] * RANKS
    told = processes.run(agreement, [[3, 4], [3, 4], [3, 5], [3, 4]], RANKS)
    assert len(set(told)) == 1
    assert "ranks [0, 1, 3] have" in told[0] and "ranks [2] have" in told[0]
    told = processes.run(agreement, [[3, 4]] * RANKS, RANKS + 1)
    assert told == [f"schedule is for {RANKS + 1} ranks: the group has {RANKS}"] * RANKS


# Remapping.

MOVES = [(0, 0, 1, 3), (0, 0, 3, 2), (0, 2, 3, 1), (0, 0, 1, 1), (1, 3, 0, 2)]


def moving_schedule() -> Schedule:
    packs = [Pack([i], [i], 0) for i in range(3)] + [Pack([3], [3], 1)]
    return schedule_of([9, 2, 4, 5], packs, ranks=RANKS, capacity=100, cost=COST, moves=MOVES)


def remapped(step: int) -> tuple[list[int], bool, bool]:
    """Token numbers after the moves, whether the way back is the inverse, and the adjoint."""
    schedule, rank = moving_schedule(), dist.get_rank()
    held = sum(b.tokens for b in schedule.micro_batches(rank) if b.step == step)
    tokens = torch.arange(held) + 100 * rank
    there = distributed.to_linear(tokens[:, None], schedule, step)
    back = distributed.to_attention(there, schedule, step)
    x = torch.randn(held, 2, 3, dtype=FP64, requires_grad=True)
    y = distributed.to_linear(x, schedule, step)
    z = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, z)
    inverse = torch.equal(back, tokens[:, None]) and torch.equal(
        distributed.to_attention(y, schedule, step), x
    )
    # <to_linear x, z> = <x, gradient>, summed over ranks.
    sums = torch.stack([(y * z).sum(), (x * gradient).sum()]).detach()
    dist.all_reduce(sums)
    return there[:, 0].tolist(), inverse, torch.allclose(sums[0], sums[1], rtol=1e-12)


def test_remap():
    got = shared(RANKS).run(remapped, 0)
    assert [tokens for tokens, _, _ in got] == [
        [0, 1, 2],  # gave 6, 7, 8 to rank 1, then 4, 5 to rank 3, then 3 to rank 1
        [100, 101, 6, 7, 8, 3],
        [200, 201, 202],
        [4, 5, 203],
    ]
    assert all(inverse and adjoint for _, inverse, adjoint in got)
    assert [tokens for tokens, _, _ in shared(RANKS).run(remapped, 1)] == [
        [303, 304],
        [],
        [],
        [300, 301, 302],
    ]


def test_remap_counts_rows():
    schedule = schedule_of([4], [Pack([0], [0], 0)], ranks=1, capacity=100, cost=COST)
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="x has 3 rows: rank 0 has 4 tokens under attention in step 0"):
        distributed.to_linear(x, schedule, 0)
    with pytest.raises(ValueError, match="x has 3 rows: rank 0 has 4 tokens in linear modules in step 0"):
        distributed.to_attention(x, schedule, 0)


# Ranks that are lost, or late.


def lose(how: str) -> None:
    """Rank 2 dies, or sleeps, when it waits for the second time."""
    if dist.get_rank() == 2:
        receive, calls = Exchange.receive, []

        def interrupted(self: Exchange) -> None:
            calls.append(None)
            if len(calls) == 2 and how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if len(calls) == 2:
                time.sleep(60)
            receive(self)

        Exchange.receive = interrupted  # type: ignore[method-assign]
    attend_case(Case([400, 30], [Pack([0, 1], [0, 1, 2, 3], 3)], options=CAUSAL))


@pytest.mark.parametrize(
    ("how", "timeout"), [("die", 20.0), pytest.param("sleep", 2.0, marks=pytest.mark.thorough)]
)
def test_a_lost_rank_ends_the_job(how, timeout):
    with Processes(RANKS, group_timeout=timeout) as processes:
        processes.run(groups_after, NAMED["causal"])  # they have started
        begin = time.monotonic()
        if how == "die":
            results = processes.run(lose, how, check=False)
            assert results[2] == Failure(2, "died, exit code -9", died=True)
        else:
            with pytest.raises(ProcessesError, match="ranks \\[2\\] gave no result within 15 s") as error:
                processes.run(lose, how, check=False, timeout=15)
            results = [Failure(r, str(error.value), False) for r in range(RANKS)]
        assert time.monotonic() - begin < 20
    for rank in (0, 1, 3):
        assert isinstance(results[rank], Failure)
        assert "PeerError: rank" in results[rank].message
        assert "step 3, pack 0 on ranks [0, 1, 2, 3]" in results[rank].message
    if how == "die":
        assert "waited for rank 2" in results[3].message
