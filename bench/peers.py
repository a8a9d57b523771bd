# SPDX-License-Identifier: Apache-2.0
"""What is timed: each implementation turns the packed inputs of a case into a run, or says why it cannot.

Whatever a user would have ready before the call (views, padding, masks, plans, pages) is made by ``prepare`` and is not
timed; results are allocated inside the run. A peer gets its own best layout, even where ours is less kind to it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gapless.bench.cases import Case, Inputs
from gapless.reference.varlen import visible


@dataclass
class Run:
    """One implementation, ready to be timed.

    Attributes:
        forward: computes the results from ``leaves``, in the implementation's own layout.
        leaves: what gradients are taken of; the results of :meth:`gradients` have their layout.
        douts: gradients of the results.
        pack: brings results to [tokens_q, heads, dim]; for the check only.
        pack_grads: brings gradients to (dq, dk, dv) in the layout of the inputs; for the check only.
    """

    forward: Callable[[], list[Tensor]]
    leaves: list[Tensor] = field(default_factory=list)
    douts: list[Tensor] = field(default_factory=list)
    pack: Callable[[Sequence[Tensor]], Tensor] = lambda outs: outs[0]
    pack_grads: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor, Tensor]] = lambda grads: tuple(grads)

    def infer(self) -> list[Tensor]:
        with torch.no_grad():
            return self.forward()

    def train(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        outs = self.forward()
        return outs, torch.autograd.grad(outs, self.leaves, self.douts)

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """The gradients alone, of a forward pass that is over."""
        outs = self.forward()
        return lambda: torch.autograd.grad(outs, self.leaves, self.douts, retain_graph=True)

    def call(self, direction: str) -> Callable[[], object]:
        """What is timed."""
        if direction == "bwd":
            return self.backward()
        return self.infer if direction == "fwd" else self.train


@dataclass(frozen=True)
class Implementation:
    """A name, what stands in its way, and how it is made ready.

    ``asked_only``: too slow for every table; it runs where it is named.
    """

    name: str
    unusable: Callable[[Any], list[str]]
    prepare: Callable[[Any], Run]
    peer: bool = True
    asked_only: Callable[[Any], bool] = lambda case: False


def _leaves(case: Case, *tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_(case.direction == "fwd_bwd") for t in tensors]


# gapless


def _gapless(inputs: Inputs) -> Run:
    from gapless import VarlenPlan, varlen_attention

    case = inputs.case
    q, k, v = _leaves(case, inputs.q, inputs.k, inputs.v)
    cu_q, cu_k = inputs.cu_seqlens_q, None if case.self_attention else inputs.cu_seqlens_k
    if case.paged:
        keys, values, used, table = inputs.pages
        plan = VarlenPlan.make(cu_q, causal=case.causal)
        return Run(
            lambda: [
                varlen_attention(
                    q, keys, values, cu_q, causal=case.causal, seqused_k=used, block_table=table, plan=plan
                )
            ]
        )
    plan = VarlenPlan.make(cu_q, cu_k, causal=case.causal)
    return Run(
        lambda: [varlen_attention(q, k, v, cu_q, cu_k, causal=case.causal, plan=plan)],
        [q, k, v],
        [inputs.dout],
    )


# torch's scaled_dot_product_attention (SDPA)


def _sdpa_mask(case: Case, len_q: int, len_k: int) -> dict:
    """Arguments that give SDPA our mask: its ``is_causal`` aligns top-left, ours bottom-right."""
    if not case.causal or len_q == 1:
        return {}
    if len_q == len_k:
        return {"is_causal": True}
    return {"attn_mask": visible(len_q, len_k, (-1, 0), torch.device(case.device))}


def _sequences(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Views [1, heads, length, dim] of packed [tokens, heads, dim]."""
    return [part.transpose(0, 1)[None] for part in x.split(lengths)]


def _unsequence(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def _attend(case: Case, q: list[Tensor], k: list[Tensor], v: list[Tensor], masks: list[dict]) -> list[Tensor]:
    gqa = case.heads != case.kv_heads
    return [
        F.scaled_dot_product_attention(*qkv, enable_gqa=gqa, **mask)
        for *qkv, mask in zip(q, k, v, masks, strict=True)
    ]


def _sdpa_loop(inputs: Inputs) -> Run:
    """Packed in, packed out: one split, one call for each sequence, one cat."""
    case = inputs.case
    q, k, v = _leaves(case, inputs.q, inputs.k, inputs.v)
    masks = [_sdpa_mask(case, *pair) for pair in case.lengths]

    def forward() -> list[Tensor]:
        parts = (
            _sequences(x, n)
            for x, n in zip((q, k, v), (inputs.lengths_q, *[inputs.lengths_k] * 2), strict=True)
        )
        return [_unsequence(_attend(case, *parts, masks))]

    return Run(forward, [q, k, v], [inputs.dout])


def _sdpa_list(inputs: Inputs) -> Run:
    """A separate tensor for each sequence, in and out: SDPA without the cost of packing."""
    case = inputs.case
    n_q, n_k = inputs.lengths_q, inputs.lengths_k
    q, k, v, dout = (
        _leaves(case, *_sequences(x, n))
        for x, n in ((inputs.q, n_q), (inputs.k, n_k), (inputs.v, n_k), (inputs.dout, n_q))
    )
    masks = [_sdpa_mask(case, *pair) for pair in case.lengths]
    batch = len(masks)

    def pack_grads(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(_unsequence(grads[i : i + batch]) for i in range(0, 3 * batch, batch))

    return Run(
        lambda: _attend(case, q, k, v, masks),
        [*q, *k, *v],
        [d.detach() for d in dout],
        _unsequence,
        pack_grads,
    )


def _pad(x: Tensor, lengths: list[int]) -> Tensor:
    """[batch, heads, longest, dim], transposed from [batch, longest, heads, dim] as a model's projections leave it."""
    return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)


def _sdpa_padded(inputs: Inputs) -> Run:
    """One call over a right-padded batch. A causal mask hides the padding from real rows: no other mask is needed."""
    case, n_q, n_k = inputs.case, inputs.lengths_q, inputs.lengths_k
    tensors = _leaves(case, _pad(inputs.q, n_q), _pad(inputs.k, n_k), _pad(inputs.v, n_k))
    mask: dict = {}
    if case.causal and case.self_attention:
        mask = {"is_causal": True}
    elif len(set(case.lengths)) > 1 or (case.causal and max(n_q) > 1):
        device = torch.device(case.device)
        dense = torch.zeros(len(n_q), 1, max(n_q), max(n_k), dtype=torch.bool, device=device)
        for i, (a, b) in enumerate(case.lengths):
            dense[i, 0, :a, :b] = visible(a, b, (-1, 0 if case.causal else -1), device)
            dense[i, 0, a:, 0] = True  # a padding row that sees nothing would be NaN
        mask = {"attn_mask": dense}

    def unpad(x: Tensor, lengths: list[int]) -> Tensor:
        return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(x, lengths, strict=True)])

    def forward() -> list[Tensor]:
        return [F.scaled_dot_product_attention(*tensors, enable_gqa=case.heads != case.kv_heads, **mask)]

    return Run(
        forward,
        tensors,
        [_pad(inputs.dout, n_q)],
        lambda outs: unpad(outs[0], n_q),
        lambda grads: (unpad(grads[0], n_q), unpad(grads[1], n_k), unpad(grads[2], n_k)),
    )


def _no_empty(case: Case) -> list[str]:
    return ["it cannot take empty sequences"] if any(min(pair) == 0 for pair in case.lengths) else []


def _padded_unusable(case: Case) -> list[str]:
    longest = max(max(pair) for pair in case.lengths)
    padded = len(case.lengths) * longest * (case.heads + case.kv_heads) * case.dim * 8
    return _no_empty(case) + ([f"its padded tensors take {padded / 1e9:.0f} GB"] if padded > 8e9 else [])


# torch's other attentions


def _flex_unusable(case: Case) -> list[str]:
    why = []
    if case.device == "cpu" and case.direction == "fwd_bwd":
        why.append("it has no backward on the CPU")
    if not case.self_attention or case.paged:
        why.append("its document mask is made for self-attention")
    return why + _no_empty(case)


def document_block_mask(lengths: list[int], causal: bool, device: str, block: int = 128):
    """FlexAttention's BlockMask of a packed batch, from the lengths alone: the dense mask is never made."""
    from torch.nn.attention.flex_attention import BlockMask

    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    starts = torch.arange(0, total, block, device=device)
    first, last = document[starts], document[(starts + block - 1).clamp(max=total - 1)]
    index = torch.arange(len(starts), device=device)
    touched = (first[:, None] <= last) & (first <= last[:, None])
    inside = (first == last)[:, None] & (first == last) & (first[:, None] == first)
    inside &= (starts + block <= total) & (starts + block <= total)[:, None]
    if causal:
        touched &= index[:, None] >= index
        inside &= index[:, None] > index

    def listing(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
        return blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None]

    def mask_mod(b, h, i, j):
        seen = document[i] == document[j]
        return seen & (i >= j) if causal else seen

    return BlockMask.from_kv_blocks(
        *listing(touched & ~inside),
        *listing(inside),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(total, total),
    )


def _flex(inputs: Inputs) -> Run:
    """Compiled FlexAttention with a document mask; the mask and the compilation are not timed."""
    from torch.nn.attention.flex_attention import flex_attention

    case = inputs.case
    torch.compiler.reset()  # every shape compiles anew; after eight it would quietly run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = document_block_mask(inputs.lengths_q, case.causal, case.device)
    q, k, v = leaves = _leaves(case, *(x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v)))

    def unpack(x: Tensor) -> Tensor:
        return x[0].transpose(0, 1)

    return Run(
        lambda: [compiled(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)],
        leaves,
        [inputs.dout.transpose(0, 1)[None]],
        lambda outs: unpack(outs[0]),
        lambda grads: (unpack(grads[0]), unpack(grads[1]), unpack(grads[2])),
    )


def _cuda_varlen_unusable(case: Case) -> list[str]:
    why = [] if case.device == "cuda" else [f"it runs on CUDA tensors, not on {case.device}"]
    if case.dtype not in ("float16", "bfloat16"):
        why.append(f"it takes float16 and bfloat16, not {case.dtype}")
    return why + (["it is called without pages here"] if case.paged else [])


def _cu_and_longest(inputs: Inputs) -> tuple[Tensor, Tensor, int, int]:
    return inputs.cu_seqlens_q, inputs.cu_seqlens_k, max(inputs.lengths_q), max(inputs.lengths_k)


def _torch_varlen(inputs: Inputs) -> Run:
    from torch.nn.attention.varlen import varlen_attn

    case = inputs.case
    leaves = _leaves(case, inputs.q, inputs.k, inputs.v)
    how = {"window_size": (-1, 0 if case.causal else -1), "enable_gqa": case.heads != case.kv_heads}
    return Run(lambda: [varlen_attn(*leaves, *_cu_and_longest(inputs), **how)], leaves, [inputs.dout])


def _flash_attn_unusable(case: Case) -> list[str]:
    from gapless.ops.registry import flash_attn_unusable

    missing = flash_attn_unusable(torch.device(case.device))
    return list(dict.fromkeys(missing + _cuda_varlen_unusable(case)))


def _flash_attn(inputs: Inputs) -> Run:
    from flash_attn import flash_attn_varlen_func

    leaves = _leaves(inputs.case, inputs.q, inputs.k, inputs.v)
    return Run(
        lambda: [flash_attn_varlen_func(*leaves, *_cu_and_longest(inputs), causal=inputs.case.causal)],
        leaves,
        [inputs.dout],
    )


def _slow_padded(case: Case) -> bool:
    return case.direction == "fwd_bwd" and len(set(case.lengths)) > 1


IMPLEMENTATIONS = {
    i.name: i
    for i in (
        Implementation("gapless", lambda case: [], _gapless, peer=False),
        Implementation("sdpa_loop", _no_empty, _sdpa_loop),
        Implementation("sdpa_list", _no_empty, _sdpa_list),
        Implementation("sdpa_padded", _padded_unusable, _sdpa_padded, asked_only=_slow_padded),
        Implementation("flex", _flex_unusable, _flex, asked_only=lambda case: True),
        Implementation("torch_varlen", _cuda_varlen_unusable, _torch_varlen),
        Implementation("flash_attn", _flash_attn_unusable, _flash_attn),
    )
}


def load(path: str) -> Callable[..., Any]:
    """The callable of ``module:function``."""
    module, _, name = path.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"impl is {path!r}: {error}") from None
    return function


def from_path(path: str) -> Implementation:
    """A user's callable ``module:function``.

    It is called as ``function(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=...)`` with packed tensors and returns
    [tokens_q, heads, dim]; a paged case adds ``seqused_k=..., block_table=...`` and hands pages over as k and v.
    """
    function = load(path)

    def prepare(inputs: Inputs) -> Run:
        case = inputs.case
        q, k, v = _leaves(case, inputs.q, inputs.k, inputs.v)
        how: dict = {"causal": case.causal}
        if case.paged:
            k, v, how["seqused_k"], how["block_table"] = inputs.pages
        cu_q, cu_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
        return Run(lambda: [function(q, k, v, cu_q, cu_k, **how)], [q, k, v], [inputs.dout])

    return Implementation(path, lambda case: [], prepare)


def asked(
    names: Sequence[str] | None,
    known: Mapping[str, Implementation],
    from_path: Callable[[str], Implementation],
) -> list[Implementation]:
    """Those of ``known`` that are named, all of them if none is, and what paths lead to."""
    paths = [n for n in names or () if ":" in n]
    chosen = [n for n in names or () if ":" not in n]
    for name in chosen:
        if name not in known:
            raise ValueError(f"impl is {name!r}: it has to be module:function or one of {', '.join(known)}")
    return ([known[n] for n in chosen] or list(known.values())) + [from_path(p) for p in paths]


def select(names: Sequence[str] | None, case: Case) -> tuple[list[Implementation], dict[str, list[str]]]:
    """Implementations that run ``case``, and why the others do not.

    Names choose among ``IMPLEMENTATIONS`` (None: all but the slow ones); paths ``module:function`` are added to those.
    """
    running, skipped = [], {}
    for implementation in asked(names, IMPLEMENTATIONS, from_path):
        why = implementation.unusable(case)
        if implementation.name not in (names or ()) and implementation.asked_only(case):
            why = why or [f"it is slow here; --impl {implementation.name} asks for it"]
        if case.paged and case.direction == "fwd_bwd":
            why = why or ["paged keys are for inference"]
        if why:
            skipped[implementation.name] = why
        else:
            running.append(implementation)
    return running, skipped
