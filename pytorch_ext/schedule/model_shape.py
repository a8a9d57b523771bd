# SPDX-License-Identifier: Apache-2.0
"""Sizes of a decoder-only transformer, and the bytes that follow from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gapless.schedule.inputs import check_count


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like model: gated MLP, RMSNorm, grouped-query attention.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, dim, vocabulary: as in a transformers config.
        value_bytes: of a parameter or an activation: 2 for bfloat16, 4 for float32.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int = 32000
    value_bytes: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            check_count(getattr(self, field.name), field.name)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}: it has to be a multiple of kv_heads, {self.kv_heads}")

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token of one layer."""
        return 2 * self.kv_heads * self.dim * self.value_bytes

    @property
    def hidden_bytes(self) -> int:
        """One token's hidden state."""
        return self.hidden * self.value_bytes

    @property
    def activation_bytes(self) -> int:
        """What one token of one layer keeps for the backward pass, with nothing recomputed.

        Two norms keep their input and their output; attention its queries, keys, values, result and LSE (float32); the
        MLP its gate, its up projection, and their product.
        """
        attention = (2 * self.heads + 2 * self.kv_heads) * self.dim
        return (4 * self.hidden + attention + 3 * self.intermediate) * self.value_bytes + 4 * self.heads

    @property
    def linear_parameters(self) -> int:
        """Weights of one layer's matrices: twice that many operations a token forward."""
        attention = 2 * (self.heads + self.kv_heads) * self.dim * self.hidden
        return attention + 3 * self.hidden * self.intermediate

    @property
    def cell_flops(self) -> int:
        """Operations of one visible (query, key) pair in one layer, forward: two products."""
        return 4 * self.heads * self.dim

    @staticmethod
    def of(config: Any, value_bytes: int = 2) -> ModelShape:
        """From a transformers config, or a dict or the path of a ``config.json`` with its fields.

        Raises:
            ValueError: a field that is needed is missing.
        """
        if isinstance(config, (str, Path)):
            config = json.loads(Path(config).read_text())
        known = config if isinstance(config, dict) else config.to_dict()
        known = known.get("text_config") or known
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in needed if not known.get(name)]:
            raise ValueError(f"the model's config has no {', '.join(missing)}")
        heads = known["num_attention_heads"]
        return ModelShape(
            hidden=known["hidden_size"],
            intermediate=known["intermediate_size"],
            layers=known["num_hidden_layers"],
            heads=heads,
            kv_heads=known.get("num_key_value_heads") or heads,
            dim=known.get("head_dim") or known["hidden_size"] // heads,
            vocabulary=known.get("vocab_size") or 32000,
            value_bytes=value_bytes,
        )
