# SPDX-License-Identifier: Apache-2.0
"""Which blocks of attention to keep: patterns that are known beforehand, scores, selections, policies of a pipeline."""

from gapless.sparsity.adaspa import AdaSpa
from gapless.sparsity.patterns import (
    attention_tile,
    bigbird,
    causal,
    radial,
    sink_window,
    sliding_tile,
    sliding_window,
    strided,
    tile_order,
)
from gapless.sparsity.policy import Dense, Policy
from gapless.sparsity.scorers import antidiagonal, exact_mass, pooled, vertical_slash
from gapless.sparsity.selectors import Keep, Selection, recall, top_k, top_k_global, top_p
from gapless.sparsity.tile_search import TileMasks, TileSearch

__all__ = [
    "AdaSpa",
    "Dense",
    "Keep",
    "Policy",
    "Selection",
    "TileMasks",
    "TileSearch",
    "antidiagonal",
    "attention_tile",
    "bigbird",
    "causal",
    "exact_mass",
    "pooled",
    "radial",
    "recall",
    "sink_window",
    "sliding_tile",
    "sliding_window",
    "strided",
    "tile_order",
    "top_k",
    "top_k_global",
    "top_p",
    "vertical_slash",
]
