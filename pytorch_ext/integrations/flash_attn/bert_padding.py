# SPDX-License-Identifier: Apache-2.0
"""``flash_attn.bert_padding``: between padded [batch, seqlen, ...] tensors and packed [tokens, ...] ones."""

from __future__ import annotations

import torch
from torch import Tensor

from gapless.integrations.rows import gather_rows, scatter_rows

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` [n] of ``input`` [rows, ...], as [n, ...]. No row twice; differentiable."""
    return gather_rows(input, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros [first_axis_dim, ...] with ``values`` [n, ...] at rows ``indices`` [n]. No row twice; differentiable."""
    return scatter_rows(values, indices, first_axis_dim)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask keeps.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask: bool or integer [batch, seqlen], 1 at tokens.
        unused_mask: bool or integer [batch, seqlen], 1 at places that are packed too, but hold no token.

    Returns:
        packed [total, ...]; indices int64 [total] of its rows in the flattened input; cu_seqlens int32 [batch + 1];
        the longest length; tokens of each sequence without the unused places, int32 [batch].
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, longest = _boundaries(kept.sum(-1, dtype=torch.int32))
    packed = gather_rows(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that hold several short sequences one after another, then padding.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask_in_length: integer [batch, seqlen], the lengths of the sequences in each row, then zeros:
            ``[2, 3, 0, 0, 0, 0]`` is a sequence of 2 tokens, one of 3, and 1 place of padding.

    Returns:
        packed [total, ...]; indices int64 [total]; cu_seqlens int32 [sequences + 1]; the longest length.
    """
    seqlen = attention_mask_in_length.shape[-1]
    used = attention_mask_in_length.sum(-1, keepdim=True)
    indices = (torch.arange(seqlen, device=used.device) < used).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, longest = _boundaries(lengths[lengths != 0].int())
    return gather_rows(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: [total, ...] to [batch, seqlen, ...], zeros at the padding. Differentiable."""
    return scatter_rows(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _boundaries(lengths: Tensor) -> tuple[Tensor, int]:
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0
