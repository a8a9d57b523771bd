# SPDX-License-Identifier: Apache-2.0
"""The experts demo: adapters for parts of the standard library, made and served on one mixture of experts."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import gapless
from gapless.bench import corpus, memory
from gapless.demo import experts_report, report, topics
from gapless.experts import (
    ExpertStore,
    RouterStatistics,
    Routing,
    save_adapter,
    select_experts,
    switch_loss,
)

# Shares of the whole time: training the base, and all adapters together.
BASE_SHARE, ADAPTERS_SHARE = 0.45, 0.3
FEWEST_STEPS = 5
BALANCE = 0.02  # of the loss that keeps the base's routers from using a few experts only
Tell = Callable[[str, float, float], object]


@dataclass(frozen=True)
class Settings:
    """Sizes of the model, an eighth of DeepSeek-V2-Lite's, and what is made and served.

    Attributes:
        length: bytes of a window of text.
        batch: windows in a step.
        top_p: share of a layer's choices that the experts selected for a topic have to reach.
        rows: of the batch that is served, for each adapter and for the base model.
        prompt, new: tokens given and generated in serving.
        steps: of training; (0, 0) takes as many as the time allows. The first is the base's, the second each adapter's.
    """

    hidden: int = 256
    layers: int = 5
    heads: int = 4
    rank: int = 64
    experts: int = 64
    top_k: int = 6
    inter: int = 176
    topics: tuple[str, ...] = topics.TOPICS
    length: int = 256
    batch: int = 8
    top_p: float = 0.25
    rows: int = 2
    prompt: int = 64
    new: int = 32
    steps: tuple[int, int] = (0, 0)
    rounds: int = 3
    seed: int = 0


QUICK = Settings(
    hidden=32, layers=3, heads=2, rank=16, experts=8, top_k=2, inter=24, topics=topics.TOPICS[:2], length=64, batch=2,
    rows=1, prompt=16, new=4, steps=(2, 2), rounds=1,
)  # fmt: skip


def build(settings: Settings) -> Any:
    """DeepSeek-V2-Lite's architecture with random weights: a dense layer, then mixtures with two shared experts."""
    head = settings.hidden // settings.heads
    config = transformers.DeepseekV2Config(
        vocab_size=corpus.VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.inter * 8,
        moe_intermediate_size=settings.inter,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        q_lora_rank=None,
        kv_lora_rank=settings.rank,
        qk_nope_head_dim=head // 2,
        qk_rope_head_dim=head // 4,
        v_head_dim=head // 2,
        n_routed_experts=settings.experts,
        n_shared_experts=2,
        num_experts_per_tok=settings.top_k,
        first_k_dense_replace=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        max_position_embeddings=settings.length + 1,
        tie_word_embeddings=True,
        bos_token_id=corpus.BEGIN,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(settings.seed)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="gapless", experts_implementation="gapless"
    ).eval()


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Mean nats per byte of windows [count, 1 + length]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@contextmanager
def balancing(model: Any) -> Iterator[Callable[[], Tensor]]:
    """Inside, the call that is given is the mean balance loss of the routers in the last forward pass."""
    routings: dict[Any, Routing] = {}

    def keep(gate: Any, args: tuple, out: tuple) -> None:
        logits, weights, ids = out
        routings[gate] = Routing(ids, weights, logits)

    gates = [m for name, m in model.named_modules() if name.endswith(".gate")]
    hooks = [gate.register_forward_hook(keep) for gate in gates]
    try:
        yield lambda: torch.stack([switch_loss(r) for r in routings.values()]).mean()
    finally:
        for hook in hooks:
            hook.remove()


def train(
    model: Any, parameters: list[Tensor], topic: str, settings: Settings, *, steps: int, seconds: float, rate: float,
    tell: Callable[[float], object], extra: Callable[[], Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """AdamW on windows of a topic; returns the loss of each step.

    Args:
        steps: how many; 0 takes as many as ``seconds`` allow, at least FEWEST_STEPS.
        rate: of learning, at its highest.
        extra: a loss to add.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    losses: list[float] = []
    begin = time.perf_counter()
    while True:
        done = len(losses) / (steps or FEWEST_STEPS)
        share = done if steps else min(done, (time.perf_counter() - begin) / seconds)
        if share >= 1:
            return losses
        tell(share)
        for group in optimizer.param_groups:  # up fast, then down to nothing
            group["lr"] = rate * min(1.0, 10 * share + 0.1, 1.05 - share)
        loss = loss_of(
            model, topics.batch(topic, settings.batch, settings.length, seed=settings.seed + len(losses))
        )
        losses.append(loss.item())
        if extra is not None:
            loss = loss + BALANCE * extra()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def test_loss(model: Any, topic: str, settings: Settings) -> float:
    """On windows that nothing was trained on; the same ones each time."""
    return loss_of(model, topics.batch(topic, settings.batch, settings.length, seed=1, held_out=True)).item()


@torch.no_grad()
def routes_of(model: Any, topic: str, settings: Settings) -> RouterStatistics:
    """What the routers choose on text of a topic."""
    with gapless.collect_routes(model) as routes:
        for seed in range(4):
            model(input_ids=topics.batch(topic, settings.batch, settings.length, seed=seed), use_cache=False)
    return routes


# The stages


def make_adapters(
    model: Any, store: ExpertStore, chosen: dict[str, dict[int, list[int]]], settings: Settings,
    folder: Path, seconds: float, tell: Tell,
) -> list[dict]:  # fmt: skip
    """Train an adapter for each topic in the store, write it as ESFT does, and load it from there."""
    made = []
    for i, (topic, experts) in enumerate(chosen.items()):

        def told(share: float, i: int = i, topic: str = topic) -> None:
            tell(f"an adapter for {topic}", i + share, len(chosen))

        store.create(topic, experts)
        with gapless.train_adapter(model, topic) as parameters:
            losses = train(
                model, parameters, topic, settings, steps=settings.steps[1], seconds=seconds / len(chosen), rate=4e-3,
                tell=told,
            )  # fmt: skip
        save_adapter(folder / topic, store.export(topic))
        store.evict(topic)
        begin = time.perf_counter()
        store.load(topic, folder / topic)
        took = time.perf_counter() - begin
        sizes = [len(ids) for ids in experts.values()]
        file = sum(f.stat().st_size for f in (folder / topic).glob("*.safetensors"))
        made.append(
            {
                "topic": topic,
                "steps": len(losses),
                "experts": sizes,
                "bytes": file,
                "load_seconds": took,
                "trained": sum(p.numel() for p in parameters),
            }
        )
    return made


def serve(model: Any, plain: Any, store: ExpertStore, settings: Settings, tell: Tell) -> dict:
    """One batch with all adapters, and every merged model on the same batch: tokens and logits to the bit."""
    asked = [adapter for adapter in (None, *settings.topics) for _ in range(settings.rows)]
    prompts = torch.cat(
        [
            topics.batch(a or topics.GENERAL, settings.rows, settings.prompt, seed=2, held_out=True)
            for a in (None, *settings.topics)
        ]
    )

    def generate(of: Any) -> tuple[Tensor, Tensor]:
        """[rows, new] tokens and [rows, new, vocabulary] logits."""
        out = of.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=settings.new, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return out.sequences[:, prompts.shape[1] :], torch.stack(out.logits, 1)

    tell("serving all at once", 0, len(settings.topics) + 2)
    with gapless.adapters(model, asked):
        tokens, logits = generate(model)
    compared, base = [], None
    for i, adapter in enumerate((None, *settings.topics)):
        tell("serving each merged model", i + 1, len(settings.topics) + 2)
        merged = copy.deepcopy(plain)
        if adapter is not None:
            gapless.merge_adapter(merged, store.export(adapter))
        own_tokens, own_logits = generate(merged)
        base = own_tokens if base is None else base
        rows = [j for j, a in enumerate(asked) if a == adapter]
        compared.append(
            {
                "adapter": adapter or "base",
                "rows": len(rows),
                "same_tokens": torch.equal(tokens[rows], own_tokens[rows]),
                "same_logits": torch.equal(logits[rows], own_logits[rows]),
                "difference": (logits[rows] - own_logits[rows]).abs().max().item(),
                "unlike_base": (own_logits[rows] != logits[:1]).any().item() if adapter else None,
                "prompt": topics.text(prompts[rows[0]]),
                "continued": topics.text(tokens[rows[0]]),
                "by_base": topics.text(base[rows[0]]),
            }
        )
        del merged
    return {"asked": [a or "base" for a in asked], "compared": compared}


@torch.no_grad()
def speed(model: Any, settings: Settings, tell: Tell) -> dict:
    """Tokens per second of prefill and of decoding, base-only and mixed, in turns; medians."""
    asked = [adapter for adapter in (None, *settings.topics) for _ in range(settings.rows)]
    prompt = torch.cat([topics.batch(topics.GENERAL, 1, settings.length, seed=s) for s in range(len(asked))])[
        :, 1:
    ]
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(settings.rounds + 1):  # the first warms up
        tell("timing", turn, settings.rounds + 1)
        for name, ids in (("base only", [None] * len(asked)), ("all adapters", asked)):
            with gapless.adapters(model, ids):
                begin = time.perf_counter()
                past = model(input_ids=prompt, use_cache=True).past_key_values
                middle = time.perf_counter()
                for step in range(settings.new):
                    past = model(
                        input_ids=prompt[:, step % settings.length, None], past_key_values=past
                    ).past_key_values
                end = time.perf_counter()
            if turn:
                seconds.setdefault(("prefill", name), []).append(middle - begin)
                seconds.setdefault(("decode", name), []).append(end - middle)
    tokens = {"prefill": prompt.numel(), "decode": len(asked) * settings.new}
    return {
        phase: {name: tokens[phase] / statistics.median(s) for (p, name), s in seconds.items() if p == phase}
        for phase in tokens
    }


def resident() -> int | None:
    """Memory of this process as the system counts it."""
    gc.collect()
    try:
        return memory.reset_peak()
    except (OSError, AttributeError):
        return None  # not Linux with glibc


def run(
    *,
    out: Path = Path("report/experts"),
    seconds: float = 90.0,
    threads: int = 0,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Make a base and its adapters, serve them, print, and write the report to ``out``.

    Args:
        seconds: for everything, roughly.
        threads: of torch; 0 is torch's own choice.
        settings: sizes, in place of the default ones.

    Returns:
        What the report shows: ``adapters``, ``served``, ``memory``, ``speed``, ``machine``, ``report`` and so on.
    """
    import gapless.integrations.transformers
    import gapless.integrations.transformers_experts

    console = Console()
    if threads:
        torch.set_num_threads(threads)
    settings = settings or Settings()
    begin = time.perf_counter()
    console.print(
        f"a mixture of {settings.experts} experts in {settings.layers - 1} layers learns the standard library; then "
        f"adapters for {', '.join(settings.topics)} are made of a few of its experts and served on one base",
        highlight=False,
    )
    result: dict[str, Any] = {"settings": asdict(settings)}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("starting", total=1)

        def tell(text: str, done: float, total: float) -> None:
            progress.update(task, description=text, completed=done, total=total)

        model = build(settings)
        with balancing(model) as balance:
            losses = train(
                model, list(model.parameters()), topics.GENERAL, settings, steps=settings.steps[0], rate=2e-3,
                seconds=seconds * BASE_SHARE, tell=lambda share: tell("the base model", share, 1), extra=balance,
            )  # fmt: skip
        routes = {topic: routes_of(model, topic, settings) for topic in settings.topics}
        chosen = {topic: select_experts(r.scores(), settings.top_p) for topic, r in routes.items()}
        most = max(len(ids) for experts in chosen.values() for ids in experts.values())
        plain = copy.deepcopy(model)
        before = resident()
        store = gapless.expert_store(model, adapters=len(chosen), max_experts_per_adapter=most)
        made = make_adapters(model, store, chosen, settings, out / "adapters", seconds * ADAPTERS_SHARE, tell)
        after = resident()
        names = (None, *settings.topics)
        tell("testing", 0, 1)
        tested = {}
        for adapter in names:
            with gapless.adapters(model, adapter):
                tested[adapter or "base"] = {t: test_loss(model, t, settings) for t in settings.topics}
        served = serve(model, plain, store, settings, tell)
        rates = speed(model, settings, tell)
    whole = sum(p.nbytes for p in plain.parameters())
    stats = store.stats()
    result |= {
        "parameters": sum(p.numel() for p in plain.parameters()),
        "losses": losses,
        "adapters": made,
        "tested": tested,
        "served": served,
        "speed": rates,
        "memory": {
            "model": whole,
            "merged": whole * len(settings.topics),
            "experts": sum(t.nbytes for t in _experts_of(plain)),
            "used": stats.used_bytes,
            "mapped": stats.mapped_bytes,
            "padded": stats.padded_bytes,
            "resident": stats.resident_bytes,
            "fragmentation": stats.fragmentation,
            "sparsity": stats.sparsity,
            "growth": None if before is None or after is None else after - before,
        },
        "maps": {
            topic: {"scores": torch.stack(list(r.scores().values())), "chosen": chosen[topic]}
            for topic, r in routes.items()
        },
    }
    shown = report.printable(experts_report.tables(result))
    return report.finish(result, out, experts_report.write, *shown, begin=begin, console=console)


def _experts_of(model: Any) -> Iterator[Tensor]:
    return (p for name, p in model.named_parameters() if ".experts." in name)
