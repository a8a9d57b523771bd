# SPDX-License-Identifier: Apache-2.0
"""One training run in a process of its own, so that its peak memory is its own.

``python -m gapless.demo.train '{"kind": "packed", ...}'`` writes a JSON line for each step and one at the end.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from gapless.bench import corpus, memory
from gapless.demo import batches


@dataclass(frozen=True)
class Settings:
    """A run: ``kind`` is padded (torch's SDPA) or packed (gapless); it ends after ``steps`` or ``seconds``."""

    kind: str
    steps: int
    seconds: float = float("inf")
    batch: int = 4
    max_bytes: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    learning_rate: float = 1e-3
    threads: int = 0
    dtype: str = "float32"
    seed: int = 0


def build(settings: Settings) -> torch.nn.Module:
    """A Llama with random weights: the same for the same seed, whatever its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if settings.kind == "packed":
        import gapless.integrations.transformers  # noqa: F401  (registers the attention)
    config = LlamaConfig(
        vocab_size=corpus.VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 8 // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_bytes + 1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation = "gapless" if settings.kind == "packed" else "sdpa"
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config).to(getattr(torch, settings.dtype)).train()


def known(ask) -> int | None:
    try:
        return ask()
    except (OSError, AttributeError):
        return None  # not Linux with glibc


def train(settings: Settings, tell) -> None:
    """Run; ``tell`` gets a dict for each step, then one with the memory of the whole run."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = build(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    make = batches.packed if settings.kind == "packed" else batches.padded
    idle = known(memory.reset_peak)
    first = time.perf_counter()
    for step in range(settings.steps):
        files = batches.files_of_step(step, settings.batch, settings.max_bytes)
        inputs, targets = make(files)
        begin = time.perf_counter()
        logits = model(**inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=batches.IGNORED)
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        tell(
            {
                "step": step,
                "loss": loss.item(),
                "seconds": now - begin,
                "tokens": sum(len(f) for f in files),
                "computed": inputs["input_ids"].numel(),
            }
        )
        if step and now - first > settings.seconds:
            break
    parameters = sum(p.numel() for p in model.parameters())
    tell({"parameters": parameters, "idle_bytes": idle, "peak_bytes": known(memory.peak) if idle else None})


def arguments(settings: Settings) -> list[str]:
    """The command line of a process that runs these settings."""
    known = {name: value for name, value in asdict(settings).items() if value != float("inf")}
    return [sys.executable, "-m", "gapless.demo.train", json.dumps(known)]


if __name__ == "__main__":
    train(Settings(**json.loads(sys.argv[1])), lambda line: print(json.dumps(line), flush=True))
