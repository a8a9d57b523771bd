# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="gapless"`` against transformers' own eager attention, on small random models."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gapless.integrations.transformers as integration  # noqa: E402
from gapless.testing import assert_within_budget  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

SMALL = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, **WINDOWED, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, **WINDOWED, query_pre_attn_scalar=16),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **GROUPED,
        **WINDOWED,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "bert": lambda: transformers.BertConfig(
        **SMALL, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    ),
}
DECODERS = [name for name in CONFIGS if name != "bert"]
LENGTHS = [9, 3, 12, 1]


def model_of(name: str, attention: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    experts = {"experts_implementation": "eager"} if name == "gpt_oss" else {}  # the default has no float64
    model = auto.from_config(config, attn_implementation=attention, **experts)
    with torch.no_grad():  # larger weights than the default, so that attention is far from uniform
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
            elif key.endswith("sinks"):
                parameter.normal_()
    return model.to(dtype).eval()


def run(
    name: str, attention: str, dtype: torch.dtype, batches: list[dict], kept: torch.Tensor | None
) -> dict:
    """Logits of all batches where ``kept`` [batch, tokens] is true, and the gradients of a fixed loss over them."""
    model = model_of(name, attention, dtype)
    use_cache = {} if name == "bert" else {"use_cache": False}
    logits = torch.cat([model(**batch, **use_cache).logits.flatten(0, 1) for batch in batches])
    logits = logits if kept is None else logits[kept.flatten()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights.to(dtype)).sum().backward()
    return {
        "logits": logits.detach(),
        **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


def check(name: str, batch: dict, eager_batch: dict, sequences: list[tuple[int, torch.Tensor]]) -> None:
    """gapless on ``batch`` and eager on ``eager_batch``, against eager in float64 on each sequence alone.

    ``sequences`` are (row, places) in the batch, in the order of rows and places.
    """
    ids = batch["input_ids"]
    positions = eager_batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
    kept = torch.zeros_like(ids, dtype=torch.bool)
    alone = []
    for row, places in sequences:
        kept[row, places] = True
        one = {"input_ids": ids[row, places][None], "position_ids": positions[row, places][None]}
        alone.append({**one, "attention_mask": torch.ones_like(one["input_ids"])})
    oracle = run(name, "eager", torch.float64, alone, None)
    witness = run(name, "eager", torch.float32, [eager_batch], kept)
    actual = run(name, "gapless", torch.float32, [batch], kept)
    assert actual.keys() == witness.keys()
    # A bias of the keys has no gradient at all, and some parameters a dozen entries: there the witness's error is luck.
    reason = "gradients of few entries, or of none but rounding, through two layers"
    for key in actual:
        few = {"factor": 4.0, "reason": reason} if oracle[key].numel() <= 64 else {}
        assert_within_budget(actual[key], oracle[key], witness[key], **few)


def padded_sequences(mask: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(row, kept.nonzero().flatten()) for row, kept in enumerate(mask)]


def packed_sequences(lengths: list[int]) -> list[tuple[int, torch.Tensor]]:
    return [(0, places) for places in torch.arange(sum(lengths)).split(lengths)]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, 100, shape, generator=torch.Generator().manual_seed(2))


def padding_mask(side: str) -> torch.Tensor:
    place = torch.arange(max(LENGTHS))
    lengths = torch.tensor(LENGTHS)[:, None]
    return (place < lengths if side == "right" else place >= max(LENGTHS) - lengths).long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded(name, side):
    mask = padding_mask(side)
    batch = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    check(name, batch, batch, padded_sequences(mask))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_mask(name):
    batch = {"input_ids": tokens(3, 11)}
    check(name, batch, batch, padded_sequences(torch.ones(3, 11)))


@pytest.mark.parametrize("name", DECODERS)
def test_packed_by_position_ids(name):
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    batch = {"input_ids": tokens(1, sum(LENGTHS)), "position_ids": positions}
    check(name, batch, batch, packed_sequences(LENGTHS))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("positions", [True, False])
def test_packed_by_collator(name, positions):
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": tokens(n).tolist()} for n in LENGTHS], return_tensors="pt")
    batch = {key: x for key, x in batch.items() if key != "labels"}
    eager = {key: batch[key] for key in ("input_ids", "position_ids")}
    if not positions:  # the boundaries decide alone, also beside a mask that leaves nothing out
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    check(name, batch, eager, packed_sequences(LENGTHS))


def test_packed_with_a_new_cache():
    """Resets are found with ``use_cache`` (the default) too, as with flash-attn."""
    ids, positions = tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    model = model_of("llama", "gapless", torch.float32)
    with torch.no_grad():
        cached = model(input_ids=ids, position_ids=positions, use_cache=True).logits
        alone = model(input_ids=ids[:, 5:], use_cache=False).logits
    torch.testing.assert_close(cached[:, 5:], alone)


def test_mask_with_holes():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1]])
    batch = {"input_ids": tokens(2, 6), "attention_mask": mask}
    check("llama", batch, batch, padded_sequences(mask))
    with pytest.raises(ValueError, match="zeros between ones"):
        model_of("mistral", "gapless", torch.float32)(input_ids=tokens(2, 6), attention_mask=mask)


def test_cross_attention():
    config = transformers.BartConfig(
        vocab_size=100, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, pad_token_id=0,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    mask = padding_mask("right")
    for queries in (7, 12):  # the second: as many queries as keys
        outs = []
        for attention, dtype in (
            ("gapless", torch.float32),
            ("eager", torch.float64),
            ("eager", torch.float32),
        ):
            torch.manual_seed(0)
            model = transformers.BartModel._from_config(copy.deepcopy(config), attn_implementation=attention)
            model = model.to(dtype).eval()
            with torch.no_grad():
                out = model(
                    input_ids=tokens(4, 12), attention_mask=mask, decoder_input_ids=tokens(4, queries)
                )
            outs.append(out.last_hidden_state)
        assert_within_budget(*outs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, cache):
    mask = padding_mask("left")
    ids = tokens(*mask.shape) * mask
    made = [
        model_of(name, attention, torch.float32).generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )
        for attention in ("eager", "gapless")
    ]
    assert torch.equal(*made)


def test_chunked_prefill():
    """Several queries against a filled cache: bottom-right alignment, also when the window's cache is full."""
    ids = tokens(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for name in ("llama", "gemma3"):
        model = model_of(name, "gapless", torch.float32)
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask).logits
            past, parts = None, []
            for begin, end in ((0, 6), (6, 11), (11, 12), (12, 15)):
                out = model(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=past)
                past = out.past_key_values
                parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


def test_gradient_checkpointing():
    mask = padding_mask("left")
    grads = []
    for checkpointing in (False, True):
        model = model_of("gemma3", "gapless", torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=tokens(*mask.shape), attention_mask=mask, labels=tokens(*mask.shape)).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*grads)


def test_one_plan_for_all_layers(monkeypatch):
    made = []
    make = integration.VarlenPlan.make
    monkeypatch.setattr(integration.VarlenPlan, "make", lambda *a, **k: made.append(1) or make(*a, **k))
    mask = padding_mask("right")
    model_of("llama", "gapless", torch.float32)(input_ids=tokens(*mask.shape), attention_mask=mask)
    assert len(made) == 1
    model_of("gemma3", "gapless", torch.float32)(input_ids=tokens(*mask.shape), attention_mask=mask)
    assert len(made) == 3  # one for each kind of mask


def test_autocast():
    mask = padding_mask("right")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, eager = (
            model_of("qwen3", attention, torch.float32)(
                input_ids=tokens(*mask.shape), attention_mask=mask
            ).logits
            for attention in ("gapless", "eager")
        )
    with torch.no_grad():
        oracle = model_of("qwen3", "eager", torch.float64)(
            input_ids=tokens(*mask.shape), attention_mask=mask
        ).logits
    assert_within_budget(*(x[mask.bool()] for x in (out, oracle, eager)))


def test_padding_gives_zeros():
    mask = padding_mask("left")
    q = torch.randn(4, 4, 12, 8)
    carrier = integration.attention_mask(4, 12, 12, attention_mask=mask.bool())
    out, _ = integration.attention_forward(torch.nn.Module(), q, q, q, carrier)
    assert out.shape == (4, 12, 4, 8) and not out[~mask.bool()].any() and out[mask.bool()].any(-1).all()


def test_refusals():
    ids = tokens(2, 6)
    llama = model_of("llama", "gapless", torch.float32)
    with pytest.raises(ValueError, match="2-D mask"):
        llama(input_ids=ids, attention_mask=torch.zeros(2, 1, 6, 6))
    llama.config.attention_dropout = 0.5
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match=r"dropout is 0\.5"):
        llama.train()(input_ids=ids)
    gemma = CONFIGS["gemma3"]()
    gemma.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="or_masks"):
        transformers.AutoModelForCausalLM.from_config(gemma, attn_implementation="gapless")(input_ids=ids)
    t5 = transformers.T5Config(
        vocab_size=100,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    with pytest.raises(ValueError, match="position_bias is given"):
        transformers.T5Model._from_config(t5, attn_implementation="gapless")(
            input_ids=ids, decoder_input_ids=ids
        )
