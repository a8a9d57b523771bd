# SPDX-License-Identifier: Apache-2.0
"""transformers models on gapless: ``attn_implementation="gapless"``.

    import gapless.integrations.transformers  # registers the name
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="gapless")

Results are those of eager attention wherever there is a token, and 0 at padding. It takes padded batches (a 2-D
``attention_mask``, left or right), packed batches (``position_ids`` that start again, or ``cu_seq_lens_q`` from
``DataCollatorWithFlattening``), sliding windows, softcap, sinks, GQA, caches of any kind, encoders and cross-attention.
Nothing is copied to unpad: in the plan padding is sequences with nothing to see. The plan is made once per forward pass
and kind of mask, for all layers.

Inside of :meth:`gapless.distributed.HDP.micro_batch` the batch is one row with the tokens of a rank's micro-batch, and
attention goes over all ranks that hold parts of its sequences; boundaries are the micro-batch's.

A ValueError says what it does not take: dropout in attention, 4-D masks, position biases (T5), masks other than causal,
bidirectional, windowed and packed (such as chunked or with bidirectional images).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gapless.distributed.current import Running, current
from gapless.integrations.lengths import even_cu_seqlens
from gapless.integrations.rows import gather_rows, scatter_rows
from gapless.ops.varlen import varlen_attention
from gapless.plan.varlen import VarlenPlan

NAME = "gapless"
_ATTRIBUTE = "_gapless_packing"


def register() -> None:
    """Make ``attn_implementation="gapless"`` known to transformers. Importing this module does it."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


@dataclass(eq=False)
class Packing:
    """What a mask says, as a packed batch: made once per forward pass and kind of mask, used by every layer.

    Attributes:
        plan: of the sequences below under the mask.
        window: (left, right), causal folded in.
        rows_q: int64 rows of the flattened queries that are packed; None is all of them, in order.
        rows_k: the same for keys.
        padded: some token of a 2-D mask is left out.
        size: (batch, queries, keys) of the tensors that it is for.
    """

    plan: VarlenPlan
    window: tuple[int, int]
    rows_q: Tensor | None
    rows_k: Tensor | None
    padded: bool
    size: tuple[int, int, int]
    _split: tuple[Tensor, Packing] | None = None

    @staticmethod
    def of_lengths(lengths_q: Tensor, lengths_k: Tensor, window: tuple[int, int], **fields) -> Packing:
        """From integer lengths [sequences] on both sides."""
        some = (lengths_q > 0) | (lengths_k > 0)
        cu_q, cu_k = (
            torch.nn.functional.pad(lengths[some].cumsum(0), (1, 0)) for lengths in (lengths_q, lengths_k)
        )
        return Packing(VarlenPlan.make(cu_q, cu_k, window=window), window, **fields)

    @torch.compiler.disable
    def split_at_resets(self, position_ids: Tensor | None) -> Packing:
        """Cut where positions do not go up: several sequences in a row, one after another.

        As transformers does for flash-attn, this asks that nothing is padded and that no keys are in a cache.
        """
        batch, queries, keys = self.size
        if self.padded or queries != keys or queries == 1 or position_ids is None:
            return self
        if (
            position_ids.dim() != 2
            or position_ids.shape[1] != queries
            or position_ids.shape[0] not in (1, batch)
        ):
            return self  # positions in several dimensions (images) count something else
        if self._split is None or self._split[0] is not position_ids:
            starts = position_ids.diff(prepend=position_ids[:, :1]) <= 0
            packing = self
            if bool(starts[:, 1:].any()):
                lengths = _run_lengths(starts.expand(batch, -1))
                packing = Packing.of_lengths(
                    lengths, lengths, self.window, rows_q=None, rows_k=None, padded=False, size=self.size
                )
            self._split = (position_ids, packing)
        return self._split[1]


@dataclass(frozen=True, eq=False)
class OnRanks:
    """What a mask says inside of a micro-batch: attention over ranks, under a window with causal folded in."""

    running: Running
    window: tuple[int, int]


@torch.compiler.disable  # it plans from values, on the host
def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    config=None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """transformers' mask interface: called once per forward pass and kind of mask, before the layers.

    Returns a one-element tensor of NaN that carries the :class:`Packing` or :class:`OnRanks`. Code that would take it
    for a mask of its own shows it at once; four dims make transformers pass it on as it is.
    """
    device = torch.device(device)
    causal, window, packed = _read(mask_function)
    if (running := current()) is not None:
        if (
            batch_size != 1
            or q_length != kv_length
            or (attention_mask is not None and not bool(attention_mask.all()))
        ):
            raise ValueError(
                f"inside of a micro-batch the model takes one row without padding or cache: it has {batch_size} rows, "
                f"{q_length} queries, {kv_length} keys, attention_mask {None if attention_mask is None else 'given'}"
            )
        return _carrier(OnRanks(running, window), device)
    first = int(q_offset) - kv_offset  # place of the first query among the keys
    reached = torch.arange(kv_length, device=device) < (first + q_length if causal else kv_length)
    keys = reached.expand(batch_size, -1)
    if attention_mask is not None:
        given = attention_mask[:, kv_offset : kv_offset + kv_length].to(device, torch.bool)
        keys = keys & torch.nn.functional.pad(given, (0, kv_length - given.shape[1]))
    padded = attention_mask is not None and not bool((keys == reached).all())
    # In cross-attention the keys' padding says nothing of the queries.
    crossed = q_length != kv_length or any(
        getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention")
    )
    if causal:
        queries = keys[:, first : first + q_length]
    else:
        queries = torch.ones_like(keys[:, :1]).expand(-1, q_length) if crossed else keys
    fields = {"padded": padded, "size": (batch_size, q_length, kv_length)}
    if packed is not None:
        starts = packed.diff(prepend=packed[:, :1] - 1) != 0
        lengths = _run_lengths(starts.expand(batch_size, -1))
        packing = Packing.of_lengths(lengths, lengths, window, rows_q=None, rows_k=None, **fields)
    elif _contiguous(keys) and _contiguous(queries):
        (before_q, now_q, after_q), (before_k, now_k, after_k) = _three_parts(queries), _three_parts(keys)
        none = torch.zeros_like(now_q)
        # Padding joins neither side of the others: queries that see no key, keys that no query sees.
        lengths_q = torch.stack([before_q, none, now_q, after_q, none], 1).flatten()
        lengths_k = torch.stack([none, before_k, now_k, none, after_k], 1).flatten()
        packing = Packing.of_lengths(lengths_q, lengths_k, window, rows_q=None, rows_k=None, **fields)
    elif window[0] >= 0 or (window[1] >= 0 and not causal):
        raise ValueError(
            "attention_mask has zeros between ones: with a sliding window it can have them at the ends only"
        )
    else:
        rows_q, rows_k = (x.flatten().nonzero().flatten() for x in (queries, keys))
        packing = Packing.of_lengths(
            queries.sum(1), keys.sum(1), window, rows_q=rows_q, rows_k=rows_k, **fields
        )
    return _carrier(packing, device)


def _carrier(mask: Packing | OnRanks, device: torch.device) -> Tensor:
    carrier = torch.full((1, 1, 1, 1), torch.nan, device=device)
    setattr(carrier, _ATTRIBUTE, mask)
    return carrier


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [batch, heads, queries, dim].
        key: [batch, kv_heads, keys, dim]; value [batch, kv_heads, keys, dim_v].
        attention_mask: from :func:`attention_mask`, or None where the model makes no mask: then ``is_causal`` (or the
            module's) and ``sliding_window`` say what is seen, and nothing is padded.
        dropout: has to be 0.
        s_aux: sinks, [heads].
        position_ids: [batch or 1, queries]; where they start again a new sequence begins.
        cu_seq_lens_q, cu_seq_lens_k: boundaries in the flattened batch, in place of ``position_ids``.

    Returns:
        out [batch, queries, heads, dim_v], and None for the weights.
    """
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    if dropout:
        raise ValueError(
            f"dropout is {dropout}: gapless has none in attention; set the config's attention dropout to 0"
        )
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is given: gapless has none, use another attn_implementation for this model"
            )
    packing = getattr(attention_mask, _ATTRIBUTE, None)
    if packing is None:
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)} and does not come from gapless: "
                "give the model a 2-D mask of padding, or none"
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = _bare_window(causal, sliding_window)
        if (running := current()) is not None:
            packing = OnRanks(running, window)
    elif isinstance(packing, OnRanks):
        window = packing.window
    else:
        if packing.size != (batch, queries, keys):
            raise ValueError(
                f"attention_mask is for (batch, queries, keys) {packing.size}, not {(batch, queries, keys)}"
            )
        window = packing.window
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))  # [tokens, heads, dim]
    score: dict[str, Any] = {
        "window": window,
        "softcap": softcap or 0.0,
        "scale": scaling,
        "sinks": None if s_aux is None else s_aux.to(dtype),
    }
    if isinstance(packing, OnRanks):
        return packing.running.attend(q, k, v, **score).unflatten(0, (batch, queries)), None
    boundaries: dict[str, Any]
    if cu_seq_lens_q is not None and (packing is None or not packing.padded):
        boundaries = {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
        packing = None
    elif packing is None:
        boundaries = {
            "cu_seqlens_q": even_cu_seqlens(batch, queries, q.device),
            "cu_seqlens_k": even_cu_seqlens(batch, keys, q.device),
        }
    else:
        packing = packing.split_at_resets(position_ids)
        plan = packing.plan
        boundaries = {"cu_seqlens_q": plan.cu_seqlens_q, "cu_seqlens_k": plan.cu_seqlens_k, "plan": plan}
        if packing.rows_q is not None:
            q = gather_rows(q, packing.rows_q)
            k, v = gather_rows(k, packing.rows_k), gather_rows(v, packing.rows_k)
    out = varlen_attention(q, k, v, **score, **boundaries)
    if packing is not None and packing.rows_q is not None:
        out = scatter_rows(out, packing.rows_q, batch * queries)
    return out.unflatten(0, (batch, queries)), None


def _read(mask_function: Callable | None) -> tuple[bool, tuple[int, int], Tensor | None]:
    """(causal, window, ids of packed sequences [batch, queries] or None) of one of transformers' mask functions.

    They are closures of closures: what they close over is what they were made from.
    """
    causal, left, right, packed = mask_function is None, -1, -1, None
    pending = [mask_function] if mask_function is not None else []
    while pending:
        f = pending.pop()
        code, cells = getattr(f, "__code__", None), getattr(f, "__closure__", None) or ()
        held = {n: c.cell_contents for n, c in zip(code.co_freevars if code else (), cells, strict=True)}
        maker = getattr(f, "__qualname__", repr(f)).split(".")[0]
        if maker == "causal_mask_function":
            causal = True
        elif maker == "and_masks":
            pending += held["mask_functions"]
        elif maker == "sliding_window_overlay":
            left = held["sliding_window"] - 1
        elif maker == "sliding_window_bidirectional_overlay":
            left = right = held["sliding_window"]
        elif maker == "packed_sequence_mask_function":
            packed = held["packed_sequence_mask"]
        elif maker == "remap_positions_for_packed_sequence":
            pending.append(held["mask_function"])
        elif maker != "bidirectional_mask_function":
            raise ValueError(
                f"the model masks with {maker}: gapless knows causal, bidirectional, windowed and packed masks"
            )
    return causal, (left, 0 if causal else right), packed


def _bare_window(causal: bool, sliding_window: int | None) -> tuple[int, int]:
    """The window where there is no mask: transformers' sliding window counts the token itself."""
    left = -1 if sliding_window is None else sliding_window - 1
    return left, 0 if causal else left


def _contiguous(kept: Tensor) -> bool:
    """Whether no row of bool [batch, tokens] has a zero between ones."""
    rises = kept.diff(prepend=torch.zeros_like(kept[:, :1])) & kept
    return not bool((rises.sum(1) > 1).any())


def _three_parts(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths [batch] before, of and after the run of ones in each row of bool [batch, tokens]."""
    length = kept.sum(1)
    before = torch.where(length > 0, kept.int().argmax(1), 0) if kept.shape[1] else length
    return before, length, kept.shape[1] - length - before


def _run_lengths(starts: Tensor) -> Tensor:
    """Lengths of the sequences of a flattened batch, from bool [batch, tokens] at their first tokens."""
    starts = starts.clone()
    starts[:, :1] = True
    begins = starts.flatten().nonzero().flatten()
    return begins.diff(append=begins.new_tensor([starts.numel()]))


register()
