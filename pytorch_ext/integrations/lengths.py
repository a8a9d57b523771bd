# SPDX-License-Identifier: Apache-2.0
"""``cu_seqlens`` of dense batches, the same tensor each time, so that the plan made from it is found again."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def even_cu_seqlens(batch: int, length: int, device: torch.device) -> Tensor:
    """int32 [batch + 1]: ``batch`` sequences of ``length`` tokens each."""
    return _even(batch, length, device) if not torch.compiler.is_compiling() else _make(batch, length, device)


def _make(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


@lru_cache(maxsize=64)
def _even(batch: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not serve a later training step
        return _make(batch, length, device)
