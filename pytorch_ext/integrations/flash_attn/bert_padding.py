# SPDX-License-Identifier: Apache-2.0
"""``flash_attn.bert_padding``: between padded [batch, seqlen, ...] tensors and packed [tokens, ...] ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapless.integrations.rows import gather_rows, scatter_rows
from gapless.ops.checks import check_device, check_integers, check_range, check_shape, check_tensors, readable

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` [n] of ``input`` [rows, ...], as [n, ...]. No row twice; differentiable."""
    check_tensors(input=input)
    if input.dim() == 0:
        raise ValueError("input has shape []: it has to be [rows, ...]")
    _check_indices(indices, "n", input.shape[0], input)
    return gather_rows(input, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros [first_axis_dim, ...] with ``values`` [n, ...] at rows ``indices`` [n]. No row twice; differentiable."""
    return _put("values", values, indices, {"first_axis_dim": first_axis_dim})


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
    _check_mask("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    indices = kept.flatten().nonzero().flatten()
    if readable(kept) and len(odd := kept[(kept != 0) & (kept != 1)]):
        raise ValueError(f"attention_mask, with unused_mask, holds {odd[0]}: entries have to be 0 or 1")
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
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    check_integers("attention_mask_in_length", attention_mask_in_length, ["batch", "seqlen"], hidden_states)
    seqlen = attention_mask_in_length.shape[1]
    used = attention_mask_in_length.sum(-1, keepdim=True)
    if readable(attention_mask_in_length):
        check_range("attention_mask_in_length", attention_mask_in_length, 0, seqlen, "the places of a row")
        check_range("attention_mask_in_length.sum(-1)", used[:, 0], 0, seqlen, "the places of a row")
    indices = (torch.arange(seqlen, device=used.device) < used).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, longest = _boundaries(lengths[lengths != 0].int())
    return gather_rows(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: [total, ...] to [batch, seqlen, ...], zeros at the padding. Differentiable."""
    sizes = {"batch": batch, "seqlen": seqlen}
    return _put("hidden_states", hidden_states, indices, sizes).unflatten(0, (batch, seqlen))


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    check_tensors(hidden_states=hidden_states)
    if hidden_states.dim() < 2:
        raise ValueError(
            f"hidden_states has shape {list(hidden_states.shape)}: it has to be [batch, seqlen, ...]"
        )
    check_shape(name, mask, hidden_states.shape[:2])
    check_device(name, mask, hidden_states, "hidden_states")


def _check_indices(indices: Tensor, count: int | str, rows: int, like: Tensor) -> None:
    check_integers("indices", indices, [count], like)
    if readable(indices):
        check_range("indices", indices, 0, rows - 1, "the rows there are")


def _put(name: str, x: Tensor, indices: Tensor, sizes: dict[str, int]) -> Tensor:
    """Rows of ``x`` at their places among as many zeros as the product of ``sizes``."""
    check_tensors(**{name: x})
    if x.dim() == 0:
        raise ValueError(f"{name} has shape []: it has to be [n, ...]")
    for size, value in sizes.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{size} is {value!r:.80}: it has to be a whole number, at least 0")
    rows = math.prod(sizes.values())
    _check_indices(indices, x.shape[0], rows, x)
    return scatter_rows(x, indices, rows)


def _boundaries(lengths: Tensor) -> tuple[Tensor, int]:
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0
