# SPDX-License-Identifier: Apache-2.0
"""Batches of whole source files as byte tokens, padded or packed: the same tokens and targets either way."""

from __future__ import annotations

import torch
from torch import Tensor

from gapless.bench import corpus
from gapless.bench.cases import offsets

IGNORED = -100  # target of a position that predicts nothing


def files_of_step(step: int, batch: int, max_bytes: int) -> list[Tensor]:
    """int64 tokens of ``batch`` files, drawn without replacement within a step; the same for the same step."""
    paths = corpus.files(max_bytes)
    drawn = torch.randperm(len(paths), generator=torch.Generator().manual_seed(step))[:batch]
    return [torch.from_numpy(corpus.tokens(paths[i])) for i in drawn.tolist()]


def targets(tokens: Tensor) -> Tensor:
    """The next token at each place of a file; the last place has none."""
    return torch.cat([tokens[1:], tokens.new_tensor([IGNORED])])


def padded(files: list[Tensor]) -> tuple[dict, Tensor]:
    """Model inputs [batch, longest] with a 2-D mask, and targets."""
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {
        "input_ids": pad(files, batch_first=True),
        "attention_mask": pad([torch.ones_like(f) for f in files], batch_first=True),
    }
    return inputs, pad([targets(f) for f in files], batch_first=True, padding_value=IGNORED)


def packed(files: list[Tensor]) -> tuple[dict, Tensor]:
    """Model inputs [1, tokens] with what ``DataCollatorWithFlattening`` says of the boundaries, and targets."""
    lengths = [len(f) for f in files]
    cu, longest = offsets(lengths), max(lengths)
    inputs = {
        "input_ids": torch.cat(files)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return inputs, torch.cat([targets(f) for f in files])[None]
