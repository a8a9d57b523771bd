# SPDX-License-Identifier: Apache-2.0
"""The diffusers backend and sparse attention in whole pipelines, on tiny random transformers, with no download."""

import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn  # noqa: E402

import gapless.integrations.diffusers as integration  # noqa: E402
from gapless.sparsity.adaspa import AdaSpa  # noqa: E402
from gapless.sparsity.policy import Dense  # noqa: E402
from gapless.sparsity.tile_search import TileSearch  # noqa: E402
from gapless.testing import assert_within_budget  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
FRAMES = 3


def wan():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def cogvideox():
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=2, sample_width=16, sample_height=16, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=8, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def hunyuan():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


MODELS = {"wan": wan, "cogvideox": cogvideox, "hunyuan": hunyuan}
LAYERS = {
    "wan": {"blocks.0.attn1", "blocks.1.attn1"},
    "cogvideox": {"transformer_blocks.0.attn1", "transformer_blocks.1.attn1"},
    "hunyuan": {"transformer_blocks.0.attn", "single_transformer_blocks.0.attn"},
}
TEXT = {"wan": (0, 0), "cogvideox": (0, 8), "hunyuan": (300, 309)}


def model_of(name: str, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():  # queries and keys that are far from uniform attention
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("to_q" in key or "to_k" in key):
                parameter.mul_(3.0)
            elif key.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.fill_(2.0)
    return model.to(dtype)


def normal(*shape: int, seed: int = 1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str, dtype=torch.float32, timestep: float = 500.0, batch: int = 2) -> dict:
    """The transformer's arguments: two videos, the second with fewer text tokens where the model masks them."""
    x = {"timestep": torch.full((batch,), timestep)}
    if name == "cogvideox":
        x["hidden_states"] = normal(batch, FRAMES, 4, 16, 16)
        x["encoder_hidden_states"] = normal(batch, 8, 8, seed=2)
        x["image_rotary_emb"] = rotary_of_cogvideox()
    else:
        side = 16 if name == "wan" else 10
        x["hidden_states"] = normal(batch, 4, FRAMES, side, side)
        x["encoder_hidden_states"] = normal(batch, 7 if name == "wan" else 9, 16, seed=2)
    if name == "hunyuan":
        mask = torch.ones(batch, 9, dtype=torch.int64)
        mask[-1, 5:] = 0
        x |= {"encoder_attention_mask": mask, "pooled_projections": normal(batch, 8, seed=3)}
        x["guidance"] = torch.full((batch,), 6000.0)
    return {key: cast(value, dtype) for key, value in x.items()}


def cast(value, dtype):
    if isinstance(value, tuple):
        return tuple(cast(x, dtype) for x in value)
    return value.to(dtype) if value.is_floating_point() else value


def rotary_of_cogvideox():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return get_3d_rotary_pos_embed(16, ((0, 0), (8, 8)), (8, 8), FRAMES)


@torch.no_grad()
def run(model, name: str, dtype=torch.float32, **options):
    return model(**inputs_of(name, dtype, **options)).sample


def pipeline_of(name: str):
    """A pipeline around a tiny transformer, without tokenizer, text encoder and VAE; and its arguments."""
    transformer, flow = model_of(name), diffusers.FlowMatchEulerDiscreteScheduler()
    none = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    call = {"num_inference_steps": 6, "output_type": "latent", "num_frames": 9, "return_dict": False}
    if name == "wan":  # classifier-free guidance in two calls
        pipe = diffusers.WanPipeline(**none, transformer=transformer, scheduler=flow)
        call |= {"prompt_embeds": normal(1, 7, 16), "negative_prompt_embeds": normal(1, 7, 16, seed=2)}
        call |= {"height": 128, "width": 128}
    elif name == "cogvideox":  # in one call, as a batch of two
        scheduler = diffusers.CogVideoXDDIMScheduler()
        pipe = diffusers.CogVideoXPipeline(**none, transformer=transformer, scheduler=scheduler)
        call |= {"prompt_embeds": normal(1, 8, 8), "negative_prompt_embeds": normal(1, 8, 8, seed=2)}
        call |= {"height": 128, "width": 128}
    else:  # in two calls, with texts of different lengths
        none |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = diffusers.HunyuanVideoPipeline(**none, transformer=transformer, scheduler=flow)
        for prefix, length, seed in (("", 6, 1), ("negative_", 2, 2)):
            call[f"{prefix}prompt_embeds"] = normal(1, 9, 16, seed=seed)
            call[f"{prefix}pooled_prompt_embeds"] = normal(1, 8, seed=seed)
            call[f"{prefix}prompt_attention_mask"] = (torch.arange(9) < length).long()[None]
        call |= {"true_cfg_scale": 3.0, "height": 80, "width": 80}
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def make(name: str, policy=None):
    """Latents of one run, and the policy."""
    pipe, call = pipeline_of(name)
    with nullcontext() if policy is None else policy.attached(pipe.transformer):
        return pipe(**call, generator=torch.Generator().manual_seed(7))[0]


# The backend.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["backend", "attached"])
def test_a_model_computes_what_it_does_without_us(name, how):
    oracle = run(model_of(name, torch.float64), name, torch.float64)
    witness = run(model_of(name), name)
    model = model_of(name)
    if how == "backend":
        with attention_backend("native"):  # it sets the active one too, which ends with this block
            model.set_attention_backend("gapless")
            actual = run(model, name)
    else:
        with Dense().attached(model) as policy:
            actual = run(model, name)
        assert {row.layer for row in policy.statistics()} == LAYERS[name]
    assert_within_budget(actual, oracle, witness)


def test_the_backend_is_found_by_name():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    assert AttentionBackendName("gapless") in _AttentionBackendRegistry.list_backends()
    assert AttentionBackendName("gapless").value == "gapless" == AttentionBackendName("gapless")
    assert "GAPLESS" in AttentionBackendName.__members__ and list(AttentionBackendName)[-1] == "gapless"
    integration.register()  # once more changes nothing
    assert list(AttentionBackendName).count("gapless") == 1


def attend(backend: str, *args, **kwargs):
    with attention_backend(backend):
        return dispatch_attention_fn(*args, **kwargs)


MASKS = {
    "none": None,
    "keys": torch.arange(70) < torch.tensor([[70], [41]]),
    "keys, four dims": (torch.arange(70) < torch.tensor([[70], [41]]))[:, None, None],
    "keys of one for all": (torch.arange(70) < 33)[None, None, None],
    "holes": (torch.arange(70) % 3 > 0).expand(2, 1, 1, 70),
    "left": torch.arange(70) >= torch.tensor([[20], [1]]),
    "queries": torch.rand(50, 70, generator=torch.Generator().manual_seed(0)) > 0.3,
    "batch": torch.rand(2, 1, 50, 70, generator=torch.Generator().manual_seed(0)) > 0.3,
    "heads": torch.rand(2, 4, 50, 70, generator=torch.Generator().manual_seed(0)) > 0.3,
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    q, k, v = normal(2, 50, 4, 16), normal(2, 70, 4, 16, seed=2), normal(2, 70, 4, 16, seed=3)
    options = {"attn_mask": MASKS[mask], "scale": 0.4}
    oracle = attend("native", q.double(), k.double(), v.double(), **options)
    witness = attend("native", q, k, v, **options)
    assert_within_budget(attend("gapless", q, k, v, **options), oracle, witness)


def test_a_mask_that_changed_is_read_again():
    q = normal(1, 40, 2, 16)
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    whole = attend("gapless", q, q, q, attn_mask=mask)
    mask[..., 20:] = False
    half = attend("gapless", q, q, q, attn_mask=mask)
    torch.testing.assert_close(half, attend("gapless", q, q[:, :20], q[:, :20]))
    assert not torch.allclose(half, whole)
    with torch.inference_mode():
        mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
        torch.testing.assert_close(attend("gapless", q, q, q, attn_mask=mask), whole)
        mask[..., 20:] = False
        torch.testing.assert_close(attend("gapless", q, q, q, attn_mask=mask), half)


def test_causal_grouped_heads_and_gradients():
    q, k = normal(2, 30, 4, 16), normal(2, 30, 2, 16, seed=2)
    found = []
    for backend in ("gapless", "native"):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        out = attend(backend, leaves[0], leaves[1], leaves[1], is_causal=True, enable_gqa=True)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)  # gradients are sums of 30 of size 1


Q = torch.zeros(1, 8, 2, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p is 0.1"),
        ({"attn_mask": torch.zeros(8, 8)}, "attn_mask is torch.float32: it has to be torch.bool"),
        ({"attn_mask": torch.ones(3, 5, dtype=torch.bool)}, r"attn_mask has shape \[3, 5\]"),
        ({"attn_mask": torch.ones(8, 8, dtype=torch.bool), "is_causal": True}, "is_causal is True with a mask"),
        ({"attention_kwargs": {"return_lse": True}}, "return_lse is True"),
        ({"parallel_config": "ring"}, "_parallel_config is 'ring'"),
    ],
)  # fmt: skip
def test_what_the_backend_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        attend("gapless", Q, Q, Q, **options)
    with pytest.raises(ValueError, match="is_causal is True with 8 queries, 4 keys"):
        attend("gapless", Q, Q[:, :4], Q[:, :4], is_causal=True)


# AdaSpa and attention tiles.


@pytest.mark.parametrize("name", MODELS)
def test_adaspa_in_a_pipeline(name):
    calls = {"wan": ["cond", "uncond"], "cogvideox": ["cond_uncond"], "hunyuan": ["cond", "uncond"]}[name]
    adaspa = AdaSpa(0.3, block=16, search_steps=(2, 4))
    pipe, call = pipeline_of(name)

    def latents():
        return pipe(**call, generator=torch.Generator().manual_seed(7))[0]

    dense = latents()
    with adaspa.attached(pipe.transformer) as given:
        assert given is adaspa
        sparse = [latents(), latents()]
    assert torch.equal(*sparse)  # the second run forgets the first
    assert torch.equal(latents(), dense)  # and nothing is left behind
    error = (sparse[0] - dense).norm() / dense.norm()
    assert 1e-5 < error < 0.2
    kinds = ["dense", "fused search", "sparse", "cached search", "sparse", "sparse"]
    counted = Counter((row.run, row.call, row.layer, row.step, row.kind) for row in adaspa.statistics())
    assert counted == Counter(
        (run, call, layer, step, kind)
        for run in range(2) for call in calls for layer in LAYERS[name] for step, kind in enumerate(kinds)
    )  # fmt: skip
    for row in adaspa.statistics():
        assert row.kind in ("dense", "fused search") or 0.25 < row.density < 0.45
    for (call_, _), layout in adaspa.layouts.items():
        begin, end = TEXT[name]
        for mask in layout.grid.split(layout.to_mask()):
            assert end == begin or mask[:, begin // 16 : -(-end // 16)].all()
            assert end == begin or mask[:, :, begin // 16 : -(-end // 16)].all()
            assert mask[:, 3].sum(-1).max() < mask.shape[2]
        if name == "hunyuan":
            assert layout.grid.lengths_k == ((306,) if call_ == "cond" else (302,))


@pytest.mark.parametrize("name", MODELS)
def test_density_one_is_dense(name):
    adaspa = AdaSpa(1.0, block=16, search_steps=(1, 3))
    with adaspa.attached(model := model_of(name)):
        outs = [run(model, name, timestep=t) for t in (900.0, 700.0, 500.0, 300.0)]
    assert {row.kind for row in adaspa.statistics()} == {"fused search", "sparse", "cached search"}
    oracle = run(model_of(name, torch.float64), name, torch.float64, timestep=300.0)
    assert_within_budget(outs[-1], oracle, run(model_of(name), name, timestep=300.0))


@pytest.mark.parametrize("name", MODELS)
def test_tile_search_in_a_pipeline(name):
    search = TileSearch(FRAMES, threshold=0.5, block=16, references=[0, 1])
    pipe, call = pipeline_of(name)
    dense = pipe(**call, generator=torch.Generator().manual_seed(7))[0]
    with search.attached(pipe.transformer):
        same = pipe(**call, generator=torch.Generator().manual_seed(7))[0]
    torch.testing.assert_close(
        same, dense, atol=1e-3, rtol=1e-4
    )  # calibration computes in full; six steps of rounding
    result = search.result()
    assert set(result.choice) == LAYERS[name] and len(result.table) == 6
    for layer in result.choice:
        result.choice[layer] = 1
    with result.attached(pipe.transformer):
        sparse = pipe(**call, generator=torch.Generator().manual_seed(7))[0]
    assert {row.kind for row in result.statistics()} == {"sparse"}
    assert 1e-5 < (sparse - dense).norm() / dense.norm() < 0.5


def test_a_loop_without_a_pipeline():
    """Guidance in two calls with timesteps of their own, twice, and a run that breaks."""
    adaspa, model = AdaSpa(0.3, block=16, search_steps=(1,)), model_of("wan")
    with adaspa.attached(model):
        for _ in range(2):
            for t in (900.0, 600.0, 300.0):
                for _ in range(2):
                    run(model, "wan", timestep=t)
        with pytest.raises(RuntimeError):
            model(**{**inputs_of("wan", timestep=200.0), "encoder_hidden_states": torch.zeros(2, 7, 3)})
        run(model, "wan", timestep=100.0)
    counted = Counter((row.run, row.call, row.step, row.kind) for row in adaspa.statistics())
    wanted = Counter(
        (r, call, step, "sparse" if step else "fused search")
        for r in range(2) for call in range(2) for step in range(3) for _ in range(2)
    )  # fmt: skip
    assert counted == wanted + Counter({(2, 0, 0, "fused search"): 2})


def test_compiled_models():
    """Dense attention compiles without a break; layers of a policy run beside the graph."""
    model = model_of("wan")
    dense = run(model, "wan")
    with attention_backend("native"):
        model.set_attention_backend("gapless")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(compiled, "wan"), dense, atol=1e-5, rtol=1e-5)
    outs = []
    for wanted in (model, torch.compile(model, backend="eager")):
        with AdaSpa(0.3, block=16, search_steps=(1,)).attached(wanted) as adaspa:
            outs.append([run(wanted, "wan", timestep=t) for t in (900.0, 600.0)])
        assert [row.kind for row in adaspa.statistics()] == ["fused search"] * 2 + ["sparse"] * 2
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_a_forward_that_offloading_puts_back():
    model, policy = model_of("wan"), Dense()
    with policy.attached(model):
        for timestep in (900.0, 600.0, 300.0):
            run(model, "wan", timestep=timestep)
            model.forward = type(model).forward.__get__(model)
    assert [row.step for row in policy.statistics()] == [0, 0, 1, 1, 2, 2]


def test_other_models_say_layers_and_text():
    class Mine(diffusers.WanTransformer3DModel):
        pass

    model = model_of("wan")
    with Dense().attached(model, layers=r"blocks\.1\.attn1") as policy:
        run(model, "wan")
    assert [row.layer for row in policy.statistics()] == ["blocks.1.attn1"]
    chosen = lambda name, module: "attn1" in name and not module.is_cross_attention  # noqa: E731
    with Dense().attached(model, layers=chosen, text="none", calls_per_step=2) as policy:
        for _ in range(4):
            run(model, "wan")
    assert [(row.call, row.step) for row in policy.statistics()][::2] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert "blocks.0.attn1" in {row.layer for row in policy.statistics()}


def test_wrong_uses():
    model, policy = model_of("wan"), Dense()
    with (
        pytest.raises(ValueError, match="of which only CogVideoXTransformer3DModel"),
        policy.attached(torch.nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(ValueError, match="layers is 'nothing'"), policy.attached(model, layers="nothing"):
        pass
    with pytest.raises(ValueError, match="text is 'middle'"), policy.attached(model, text="middle"):
        pass
    twice = pytest.raises(ValueError, match="has a policy attached already")
    with policy.attached(model), twice, policy.attached(model):
        pass
    with (
        policy.attached(model, layers=r"blocks\.0\.attn2"),
        pytest.raises(ValueError, match="choose them with"),
    ):
        run(model, "wan")
    with policy.attached(model):
        layer = model.blocks[0].attn1
        with pytest.raises(RuntimeError, match="runs outside of its transformer"):
            layer(torch.zeros(1, 4, 24))
    assert all(not m._diffusers_hook.hooks for m in model.modules() if hasattr(m, "_diffusers_hook"))
    run(model, "wan")


def test_gapless_does_not_import_diffusers():
    code = "import sys, gapless, gapless.sparsity; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
