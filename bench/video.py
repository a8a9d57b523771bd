# SPDX-License-Identifier: Apache-2.0
"""A video transformer with random weights, as diffusers has it (Wan), and the pipeline around it: nothing is loaded."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch
from torch import Tensor

CHANNELS, TEXT_TOKENS, TEXT_DIM = 16, 32, 64
PIXELS = 16  # of a token's side: 8 by the VAE, 2 by the patches
FRAMES_PER_LATENT = 4


@contextmanager
def quietly():
    """Without what diffusers says of packages and dtypes that do not matter here."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def transformer(
    heads: int, dim: int, layers: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.nn.Module:
    """A Wan transformer for inference, the same for the same seed.

    Its feed-forward layers are no wider than the rest, so that attention has the share of the time at some thousand
    tokens that it has in large models at a hundred thousand. Norms of queries and keys have a gain of 2: the attention
    of random weights is otherwise next to uniform.
    """
    with quietly():
        from diffusers import WanTransformer3DModel

        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=dim, in_channels=CHANNELS,
            out_channels=CHANNELS, text_dim=TEXT_DIM, freq_dim=64, ffn_dim=heads * dim, num_layers=layers,
            cross_attn_norm=True,
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn1.norm_q.weight", "attn1.norm_k.weight")):
                parameter.fill_(2.0)
    with quietly():
        return model.to(dtype).eval().requires_grad_(False)


def text(seed: int = 0) -> Tensor:
    """float32 [1, tokens, dim], in place of an embedded prompt."""
    return torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(seed + 1))


def inputs(frames: int, height: int, width: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the transformer for a video of ``frames`` latent frames of height x width tokens each."""
    make = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, CHANNELS, frames, 2 * height, 2 * width, generator=make),
        "encoder_hidden_states": text(seed),
    }


def pipeline(model: torch.nn.Module):
    """diffusers' WanPipeline around ``model``, with its flow-matching scheduler, without text encoder and VAE."""
    with quietly():
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

        pipe = WanPipeline(
            tokenizer=None, text_encoder=None, vae=None,
            transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe, frames: int, height: int, width: int, steps: int, *, seed: int = 0, **options) -> Tensor:
    """Latents [1, channels, frames, 2 * height, 2 * width] of one run of the pipeline; the same for the same seed."""
    with quietly():
        return pipe(
            prompt_embeds=text(seed), guidance_scale=1.0, num_inference_steps=steps, output_type="latent",
            num_frames=(frames - 1) * FRAMES_PER_LATENT + 1, height=height * PIXELS, width=width * PIXELS,
            generator=torch.Generator().manual_seed(seed), return_dict=False, **options,
        )[0]  # fmt: skip
