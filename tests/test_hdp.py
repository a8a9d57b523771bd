# SPDX-License-Identifier: Apache-2.0
"""HDP on 4 gloo processes against one process: losses and gradients, whatever the schedule."""

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from gapless.distributed.current import attend, run, running_steps
from gapless.distributed.gradients import sum_gradients
from gapless.distributed.hdp import HDP
from gapless.distributed.losses import from_sequences
from gapless.distributed.rows import Rows, rows_of
from gapless.schedule import Cluster, CostModel, MicroBatch, Pack, Schedule, hydraulis, schedule_of
from gapless.schedule.hydraulis import Replica, Strategy
from gapless.schedule.planners import PLANNERS, planner
from gapless.schedule.wlb import WlbPacker
from gapless.testing import assert_within_budget
from gapless.testing.processes import shared

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

RANKS, VOCABULARY, DIM, HEADS, LAYERS = 4, 50, 32, 4, 3
PATIENCE = 300.0  # seconds; a busy machine takes long to pass messages around
COST = CostModel(cell=1e-9, token=1e-6, layers=LAYERS, activation_bytes=1.0)


def made(lengths: list[int], packs: list[Pack], **options) -> Schedule:
    return schedule_of(lengths, packs, ranks=RANKS, capacity=1000, cost=COST, **options)


# Zeppelin's moves: ranks 0 and 1 hold a long sequence each, ranks 2 and 3 little or nothing.
MOVED = ([24, 20, 5], [Pack([0], [0], 0), Pack([1], [1], 0), Pack([2], [2], 0)])
SCHEDULES = {
    "one rank each": made([9, 5, 1, 12, 0], [Pack([0, 4], [0], 0), Pack([1, 2], [1], 0), Pack([3], [3], 0)]),
    "rings of 1 to 4, unequal": made(
        [37, 23, 16, 9, 8, 5, 3, 1, 0, 30],
        [
            Pack([0, 6], [0, 1, 2, 3], 0),
            Pack([1, 8], [3, 1, 2], 1),
            Pack([2, 3], [0, 1], 2),
            Pack([4], [1], 2),
            Pack([5, 7], [2], 3),
            Pack([9], [2, 0], 5),
        ],
    ),
    "offload": made(
        [40, 30, 12, 3],
        [
            Pack([0], [0, 1, 2], 0, 0.5),
            Pack([1], [3], 0, 1.0),
            Pack([2], [3, 2], 1, 0.25),
            Pack([3], [0], 2),
        ],
    ),
    "a rank without work": made([17, 14, 6], [Pack([0], [0, 1], 0), Pack([1], [1, 0], 1), Pack([2], [2], 0)]),
    "fewer tokens than ranks": made([2, 1, 10], [Pack([0, 1], [0, 1, 2, 3], 0), Pack([2], [1, 3], 1)]),
    "no tokens": made([0, 0], [Pack([0, 1], [0, 1], 0)]),
    "no sequences": made([], []),
    "moves": made(*MOVED, moves=[[0, 0, 2, 4], [0, 0, 3, 6], [0, 1, 3, 5], [0, 1, 2, 1]]),
    "moves beside rings": made(
        [40, 9, 8, 30],
        [Pack([0], [0, 1], 0), Pack([1], [2], 0, 0.5), Pack([2], [0], 1), Pack([3], [3, 1], 1)],
        moves=[[0, 0, 3, 5], [0, 1, 2, 7], [1, 3, 2, 9], [1, 0, 2, 8]],
    ),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, DIM + DIM // 2 * 2), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x, attend):
        width = DIM // HEADS
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, width)).split([HEADS, HEADS // 2, HEADS // 2], 1)
        x = x + self.out(attend(q, k, v).flatten(1))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Plain(nn.Module):
    """A model of no library: tied embeddings, positions, and one parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Embedding(64, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, input_ids, position_ids, attend):
        x = self.embedding(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x, attend)
        return self.head(nn.functional.layer_norm(x, (DIM,)))


def causal(*qkv):
    return attend(*qkv, causal=True)


def plain_loss(model, batch, attention=causal):
    logits = model(batch["input_ids"], batch["position_ids"], attention)
    return nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")


def alone(q, k, v):
    """Causal attention of one sequence, by torch."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
        0, 1
    )


def llama(implementation: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    import gapless.integrations.transformers  # noqa: F401  (registers the attention)

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    config._attn_implementation = implementation
    return LlamaForCausalLM(config)


def model_of(kind: str, dtype: torch.dtype = torch.float32, implementation: str = "gapless") -> nn.Module:
    torch.manual_seed(0)
    model = Plain() if kind == "plain" else llama(implementation)
    with torch.no_grad():  # larger weights than the default, so that attention is far from uniform
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(
                    3.0
                    if kind == "llama"
                    else 0.5
                    if p.shape[1] == DIM and p.shape[0] in (VOCABULARY, 64)
                    else 2.0
                )
    return model.to(dtype)


def sequences_of(schedule: Schedule) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(schedule.lengths))
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in schedule.lengths.tolist()]


def in_one_process(kind: str, schedule: Schedule, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss and gradients, a sequence at a time, with torch's own attention."""
    model = model_of(kind, dtype, "eager")
    total, targets = torch.zeros((), dtype=dtype), 0
    for tokens in sequences_of(schedule):
        if len(tokens) < 2:
            continue
        if kind == "plain":
            batch = {
                "input_ids": tokens[:-1],
                "position_ids": torch.arange(len(tokens) - 1),
                "targets": tokens[1:],
            }
            total = total + plain_loss(model, batch, alone)
        else:
            logits = model(tokens[None], use_cache=False).logits[0, :-1]
            total = total + nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
        targets += len(tokens) - 1
    loss = total / max(targets, 1)
    if loss.requires_grad:
        loss.backward()
    return results(model, loss)


def results(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def digest(tensors) -> str:
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def on_ranks(kind: str, options: dict, schedules: dict[str, Schedule] = SCHEDULES) -> list:
    """Each schedule on this rank: (name, results of rank 0, digest of this rank's gradients, bytes offloaded)."""
    told = []
    for name, schedule in schedules.items():
        hdp = HDP(model_of(kind), smallest=0, bucket_bytes=10_000)
        if options.get("checkpointing"):
            new = "activation_checkpointing_enable"  # older transformers call it by another name
            enable = getattr(hdp.module, new, hdp.module.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            hdp.train()
        loss_fn = {"loss_fn": plain_loss} if kind == "plain" else {}
        loss = hdp.step(schedule, from_sequences(sequences_of(schedule)), **loss_fn)
        found = results(hdp.module, loss)
        kept = found if dist.get_rank() == 0 else None
        told.append((name, kept, digest(found.values()), hdp.offloaded.bytes_out))
    return told


def assert_as_in_one_process(kind: str, schedules: dict[str, Schedule], ranks: list) -> None:
    for i, (name, actual, mine, _) in enumerate(ranks[0]):
        schedule = schedules[name]
        assert all(told[i][2] == mine for told in ranks), f"{name}: ranks have different gradients"
        oracle = in_one_process(kind, schedule, torch.float64)
        witness = in_one_process(kind, schedule, torch.float32)
        assert set(actual) >= set(oracle)
        for key, got in actual.items():
            if key in oracle:
                assert_within_budget(
                    got.to(witness[key].dtype), oracle[key], witness[key], name=f"{name}: {key}"
                )
            else:  # a rank had a micro-batch in which nothing counts
                assert not got.any(), f"{name}: {key}"


@pytest.mark.parametrize(
    "kind, options",
    [
        ("plain", {}),
        ("llama", {}),
        pytest.param("llama", {"checkpointing": True}, marks=pytest.mark.thorough),
    ],
)
def test_losses_and_gradients_are_those_of_one_process(kind, options):
    ranks = shared(RANKS).run(on_ranks, kind, options, timeout=PATIENCE)
    assert_as_in_one_process(kind, SCHEDULES, ranks)
    if kind == "plain":
        assert all("unused" not in told[1] and "frozen" not in told[1] for told in ranks[0])
    if not options:
        at = list(SCHEDULES).index("offload")
        assert [told[at][3] > 0 for told in ranks] == [True] * RANKS


WHOLE = ("multifit", "karmarkar-karp", "lpt", "hydraulis", "wlb")  # planners that never share a sequence
STRATEGIES = [Strategy((Replica(20),) * RANKS), Strategy((Replica(26, tp=2), *[Replica(20)] * (RANKS - 1)))]
LINKS = COST.replace(
    kv_bytes=64.0, hidden_bytes=1.0, node_bandwidth=1e8, network_bandwidth=1e7, host_bandwidth=1e8
)


def planned(name: str, seed: int) -> Schedule:
    """A random batch of a long-tailed kind on two nodes of two ranks of 20 tokens each."""
    rng = np.random.default_rng(seed)
    longest = 20 if name in WHOLE else 64
    lengths = np.clip(rng.lognormal(2.0, 1.2, int(rng.integers(1, 14))), 0, longest).astype(int)
    cluster = Cluster(RANKS, ranks_per_node=2, nics_per_node=1)
    if name == "hydraulis":
        return hydraulis.plan(lengths, strategies=STRATEGIES, cost=LINKS)
    if name == "wlb":
        packer = WlbPacker(
            ranks=cluster, capacity=20, cost=LINKS, micro_batches=4, levels=[21]
        )  # nothing waits
        return packer.next(lengths).schedule
    return planner(name)(lengths, ranks=cluster, capacity=20, cost=LINKS)


@pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(1, 50), marks=pytest.mark.thorough)], ids=["some", "all"]
)
def test_every_planner_trains_as_one_process(seeds):
    schedules = {
        f"{name}, batch {seed}": planned(name, seed)
        for name in (*PLANNERS, "hydraulis", "wlb")
        for seed in seeds
    }
    if len(seeds) > 1:
        assert sum(len(s.moves) > 0 for s in schedules.values()) >= 20
        assert sum((s.widths < s.ring_sizes).any() for s in schedules.values()) >= 20
    assert sum(int(s.ring_sizes.max(initial=1)) > 1 for s in schedules.values()) >= len(seeds)
    ranks = shared(RANKS).run(on_ranks, "plain", {}, schedules, timeout=PATIENCE * len(seeds))
    assert_as_in_one_process("plain", schedules, ranks)


def training(optimizer: str, steps: int) -> tuple[str, list[float]]:
    """Parameters after some steps of AdamW, whole or sharded by torch's ZeRO-1."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(dist.get_rank())  # HDP has to make parameters equal
    hdp = HDP(Plain(), smallest=0)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    if optimizer == "zero":
        adam = ZeroRedundancyOptimizer(hdp.parameters(), torch.optim.AdamW, **options)
    else:
        adam = torch.optim.AdamW(hdp.parameters(), **options)
    losses = []
    for step in range(steps):
        schedule = SCHEDULES["rings of 1 to 4, unequal" if step % 2 else "a rank without work"]
        losses.append(hdp.step(schedule, from_sequences(sequences_of(schedule)), plain_loss).item())
        before = hdp.clip_gradients(0.5)
        norm = torch.stack([p.grad.norm() for p in hdp.parameters() if p.grad is not None]).norm()
        assert torch.allclose(norm, before.clamp(max=0.5), rtol=1e-4)
        adam.step()
        adam.zero_grad()
    return digest(hdp.parameters()), losses, sum(len(s) for s in adam.state.values() if isinstance(s, dict))


def test_zero_1_trains_as_the_whole_optimizer_does():
    whole = shared(RANKS).run(training, "whole", 4, timeout=PATIENCE)
    zero = shared(RANKS).run(training, "zero", 4, timeout=PATIENCE)
    assert len({told[0] for told in whole + zero}) == 1
    assert len({tuple(told[1]) for told in whole + zero}) == 1
    assert whole[0][1][2] < whole[0][1][0]
    assert max(told[2] for told in zero) < whole[0][2]  # a rank has only a part of the state


def test_one_process_needs_no_group():
    schedule = schedule_of([7, 4], [Pack([0], [0], 0), Pack([1], [0], 1)], ranks=1, capacity=10, cost=COST)
    hdp = HDP(model_of("plain"))
    loss = hdp.step(schedule, from_sequences(sequences_of(schedule)), plain_loss)
    oracle, witness = (in_one_process("plain", schedule, dtype) for dtype in (torch.float64, torch.float32))
    for key, got in results(hdp.module, loss).items():
        assert_within_budget(got.to(witness[key].dtype), oracle[key], witness[key], name=key)


def summed() -> list:
    """sum_gradients over odd sizes, missing gradients, tied and frozen parameters, two dtypes."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    found = []
    for bucket in (1, 100, 1 << 20):
        for dtype in (torch.float32, None):
            sizes = [(3, 5), (1,), (0,), (7,), (2, 2), (11,), (4,)]
            parameters = [nn.Parameter(torch.zeros(s, dtype=torch.bfloat16 if i > 3 else torch.float32))
                          for i, s in enumerate(sizes)]  # fmt: skip
            parameters[1].requires_grad = False
            for i, p in enumerate(parameters):
                if i != 1 and i != 6 and (i, rank) not in ((3, 1), (4, 0), (4, 2)):
                    p.grad = (
                        torch.randn(p.shape[::-1], generator=generator)
                        .to(p.dtype)
                        .permute(*reversed(range(p.dim())))
                    )
            own = [None if p.grad is None else p.grad.clone() for p in parameters]
            sum_gradients([*parameters, parameters[0]], dtype=dtype, bucket_bytes=bucket)
            found.append((own, [p.grad for p in parameters], dtype))
    return found


def test_sums_of_gradients():
    ranks = shared(RANKS).run(summed, timeout=PATIENCE)
    for case in zip(*ranks, strict=True):
        for i in range(len(case[0][0])):
            own, got = [told[0][i] for told in case], [told[1][i] for told in case]
            if all(x is None for x in own):
                assert all(x is None for x in got)
                continue
            assert all(torch.equal(x, got[0]) for x in got)
            there = [x for x in own if x is not None]
            exact = torch.stack([x.double() for x in there]).sum(0)
            size = torch.stack([x.double().abs() for x in there]).sum(0)
            eps = torch.finfo(got[0].dtype).eps
            in_bfloat16 = got[0].dtype == torch.bfloat16 and case[0][2] is None
            assert bool(((got[0].double() - exact).abs() <= (3 if in_bfloat16 else 1) * eps * size).all())


def refused() -> list[str]:
    """Messages of what HDP does not take; every rank has to get them, or some would wait."""
    hdp, rank, told = HDP(model_of("plain")), dist.get_rank(), []

    def error(make) -> None:
        try:
            make()
            told.append("")
        except (ValueError, RuntimeError) as problem:
            told.append(f"{type(problem).__name__}: {problem}")

    usual = SCHEDULES["one rank each"]
    batch = from_sequences(sequences_of(usual))
    other = made([9, 5, 1, 12, 0], [Pack([0, 4], [0], 0), Pack([1, 2], [2], 0), Pack([3], [3], 0)])
    few = schedule_of([3], [Pack([0], [0], 0)], ranks=2, capacity=10, cost=COST)
    error(lambda: hdp.step(other if rank == 2 else usual, batch, plain_loss))
    error(lambda: hdp.step(few, batch, plain_loss))
    wrong = MicroBatch((rank + 1) % RANKS, 0, ())
    error(lambda: hdp.micro_batch(wrong).__enter__())
    error(lambda: attend(*torch.zeros(3, 1, 1, 8)))
    with hdp.micro_batch(MicroBatch(rank, 7, ())):
        error(lambda: hdp.micro_batch(MicroBatch(rank, 8, ())).__enter__())
        error(lambda: attend(*torch.zeros(3, 2, 1, 8)))
        assert attend(*torch.zeros(3, 0, 1, 8)).shape == (0, 1, 8)
        assert not attend(*torch.ones(3, 1, 1, 8)).any()
        model = model_of("llama")
        error(lambda: model(torch.zeros(2, 3, dtype=torch.int64)))
    return told


def test_bad_input_is_refused_on_every_rank():
    wanted = [
        "schedule differs between ranks",
        "schedule is for 2 ranks: the group has 4",
        "micro_batch is of rank",
        "RuntimeError: no micro-batch runs",
        "the micro-batch of step 7 runs already",
        "q has 2 tokens",
        "2 rows, 3 queries",
    ]
    for told in shared(RANKS).run(refused, timeout=PATIENCE):
        assert len(told) == len(wanted)
        for message, part in zip(told, wanted, strict=True):
            assert part in message


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_hold_every_token_once(name):
    """The linear modules' rows are all tokens of the batch, and targets are the next tokens, across ranks."""
    schedule = SCHEDULES[name]
    sequences = sequences_of(schedule)
    batch_of = from_sequences(sequences)
    seen, targets = [torch.zeros(n, dtype=torch.int64) for n in schedule.lengths.tolist()], 0
    for rank in range(RANKS):
        for running in running_steps(schedule, rank):
            batch, rows = batch_of(running.rows), running.rows
            begin = 0
            for i, first, last in rows.pieces.tolist():
                seen[i][first:last] += 1
                part = slice(begin, begin + last - first)
                assert torch.equal(batch["input_ids"][part], sequences[i][first:last])
                assert torch.equal(batch["targets"][part][: len(sequences[i]) - first - 1],
                                   sequences[i][first + 1 : last + 1])  # fmt: skip
                assert rows.positions[part].tolist() == list(range(first, last))
                begin = part.stop
            assert begin == rows.tokens == len(batch["targets"])
            targets += int((batch["targets"] != -100).sum())
    assert all(bool((x == 1).all()) for x in seen)
    assert targets == sum(max(n - 1, 0) for n in schedule.lengths.tolist())


def test_rows_follow_the_moves():
    schedule = SCHEDULES["moves"]
    found = [rows_of(schedule, r.micro_batch).pieces.tolist() for rank in range(RANKS)
             for r in running_steps(schedule, rank)]  # fmt: skip
    assert found == [
        [[0, 0, 14]],
        [[1, 0, 14]],
        [[2, 0, 5], [0, 20, 24], [1, 14, 15]],
        [[0, 14, 20], [1, 15, 20]],
    ]


def test_parts_of_rows():
    import numpy as np

    rows = Rows(0, 0, np.array([[3, 5, 9], [1, 0, 2]]))
    assert rows.tokens == 6
    assert rows.part(0, 6).tolist() == [[3, 5, 9], [1, 0, 2]]
    assert rows.part(3, 5).tolist() == [[3, 8, 9], [1, 0, 1]]
    assert rows.part(2, 2).tolist() == []


def test_a_failed_micro_batch_leaves_nothing_behind():
    hdp = HDP(model_of("plain"))
    running = running_steps(schedule_of([7], [Pack([0], [0], 0, 0.5)], ranks=1, capacity=10, cost=COST), 0)[0]
    with pytest.raises(RuntimeError, match="on purpose"), hdp.micro_batch(running):
        raise RuntimeError("on purpose")
    with run(running):
        pass
    assert not any(layer._forward_hooks for layer in hdp.module.layers)


def test_a_batch_of_the_wrong_size():
    schedule = schedule_of([7, 4], [Pack([0, 1], [0], 0)], ranks=1, capacity=11, cost=COST)
    hdp = HDP(model_of("plain"))
    with pytest.raises(ValueError, match=r"targets has shape \[3\]: it has to be \[11\]"):
        hdp.step(schedule, lambda rows: {"targets": torch.zeros(3)}, plain_loss)
    with pytest.raises(ValueError, match="sequence 1 has 2 tokens: the schedule asks for 4"):
        hdp.step(schedule, from_sequences([torch.zeros(7).long(), torch.zeros(2).long()]), plain_loss)
    with pytest.raises(ValueError, match="schedule is for 4 ranks: this process is alone"):
        hdp.step(SCHEDULES["moves"], lambda rows: {}, plain_loss)
    assert math.isfinite(hdp.step(schedule, from_sequences(sequences_of(schedule)), plain_loss).item())
