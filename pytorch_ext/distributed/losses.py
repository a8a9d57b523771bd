# SPDX-License-Identifier: Apache-2.0
"""Sums of token losses, and the batches that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gapless.distributed.rows import Rows

IGNORED = -100  # target of a position that predicts nothing
TokenBatch = Mapping[str, Tensor]


def causal_lm_loss(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Sum of the token losses of a transformers causal language model.

    Args:
        model: takes ``input_ids`` and ``position_ids`` [1, tokens] and returns ``logits`` [1, tokens, vocabulary].
        batch: ``input_ids``, ``position_ids`` and ``targets``, int64 [tokens]; a target of -100 does not count.

    Returns:
        A scalar in float32 or wider.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    targets = batch["targets"]
    if not len(targets):  # these models take no empty input: one token that predicts nothing
        inputs = {name: x.new_zeros(1) for name, x in inputs.items()}
        targets = targets.new_full((1,), IGNORED)
    logits = model(**{name: x[None] for name, x in inputs.items()}, use_cache=False).logits[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")


def from_sequences(
    sequences: Sequence[Tensor] | Mapping[int, Tensor], device: torch.device | str | None = None
) -> Callable[[Rows], dict[str, Tensor]]:
    """What makes a rank's batch out of whole sequences: its tokens, and for each the one that follows as target.

    Args:
        sequences: int64 [tokens] each, the global batch, in the order of the schedule's lengths.
        device: of the batches; None is that of the sequences.
    """

    def batch(rows: Rows) -> dict[str, Tensor]:
        tokens, targets = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for i, begin, end in rows.pieces.tolist():
            sequence = sequences[i]
            if end > len(sequence):
                raise ValueError(f"sequence {i} has {len(sequence)} tokens: the schedule asks for {end}")
            tokens.append(sequence[begin:end])
            following = sequence[begin + 1 : end + 1]
            targets.append(
                following
                if len(following) == end - begin
                else torch.cat([following, following.new_full((1,), IGNORED)])
            )
        made = {"input_ids": torch.cat(tokens), "targets": torch.cat(targets)}
        return {name: x if device is None else x.to(device, non_blocking=True) for name, x in made.items()}

    return batch
