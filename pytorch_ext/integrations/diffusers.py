# SPDX-License-Identifier: Apache-2.0
"""diffusers models on gapless: the attention backend ``"gapless"``, and sparse attention for video transformers.

    import gapless.integrations.diffusers  # registers the name
    pipe.transformer.set_attention_backend("gapless")  # dense attention, everywhere that the model dispatches it

    with gapless.sparsity.AdaSpa().attached(pipe.transformer):  # sparse where it counts
        video = pipe(...).frames

The backend computes what torch's own computes: any boolean mask is exact (keys cut off at the end are not computed at
all), self- and cross-attention, GQA, a scale. A ValueError refuses dropout, float masks and context parallelism.

:func:`attached` brings a :class:`gapless.sparsity.Policy` to the layers of a transformer that attend among all video
tokens: those of CogVideoX, HunyuanVideo and Wan are known; for others say which layers they are and where the text is.
It also reaches models that call torch's attention themselves (CogVideoX), which a backend does not. It uses diffusers'
own hooks, so it goes together with offloading, and pipelines tell it steps, calls of classifier-free guidance and the
end of a run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gapless.integrations.lengths import even_cu_seqlens
from gapless.integrations.steps import StepCounter
from gapless.ops.block_sparse import block_sparse_attention
from gapless.ops.varlen import varlen_attention
from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_layout import BlockLayout
from gapless.sparsity.policy import Policy, pack

NAME = "gapless"
_BLOCK = 64  # of layouts made from masks
_AnyPolicy = TypeVar("_AnyPolicy", bound=Policy)

Text = Literal["first", "last", "none"]


class Model(NamedTuple):
    """Where a transformer attends among all video tokens.

    Attributes:
        layers: a regular expression of whole module names.
        text: where text tokens are among them; their number is that of the layer's ``encoder_hidden_states``.
    """

    layers: str
    text: Text


MODELS = {
    "CogVideoXTransformer3DModel": Model(r"transformer_blocks\.\d+\.attn1", "first"),
    "HunyuanVideoTransformer3DModel": Model(r"(single_)?transformer_blocks\.\d+\.attn", "last"),
    "WanTransformer3DModel": Model(r"blocks\.\d+\.attn1", "none"),
}


@dataclass
class _Layer:
    """A layer whose forward is running."""

    policy: Policy
    name: str
    call: Any
    step: int
    text: Text
    text_tokens: int


_running: ContextVar[_Layer | None] = ContextVar("gapless_running_layer", default=None)


def register() -> None:
    """Make the backend known to diffusers. Importing this module does it."""
    if NAME not in AttentionBackendName._value2member_map_:
        # The names are a closed enumeration and setting a backend looks there: add a member as the class itself would.
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._member_names_.append(member._name_)
        AttentionBackendName._value2member_map_[NAME] = member
    _AttentionBackendRegistry.register(AttentionBackendName(NAME))(attention_forward)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """diffusers' backend interface: query, key, value [batch, tokens, heads, dim], as is the result.

    A boolean mask is [batch, keys], or anything that spreads to [batch, heads, queries, keys]. In a layer that a policy
    is attached to, the policy computes.
    """
    for name, given, usual in (
        ("dropout_p", dropout_p, 0.0),
        ("return_lse", return_lse, False),
        ("_parallel_config", _parallel_config, None),
    ):
        if given != usual:
            raise ValueError(f"{name} is {given!r:.80}: the backend {NAME!r} takes {usual!r} only")
    batch, len_q, heads, _ = query.shape
    len_k = key.shape[1]
    if is_causal and (attn_mask is not None or len_q != len_k):
        raise ValueError(
            f"is_causal is True with {'a mask' if attn_mask is not None else f'{len_q} queries, {len_k} keys'}: "
            f"the backend {NAME!r} takes it without a mask and with as many keys as queries"
        )
    mask = None if attn_mask is None else _read_mask(attn_mask, batch, heads, len_q, len_k)
    # Layers of a policy are not compiled, so what is compiled is none of them.
    layer = None if torch.compiler.is_compiling() else _running.get()
    if layer is not None:
        return _attend(layer, query, key, value, mask, is_causal, scale)
    if isinstance(mask, BlockLayout):
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        out = block_sparse_attention(q, k, v, mask, scale=scale)
    elif mask is None:
        cu_q, cu_k = (even_cu_seqlens(batch, n, query.device) for n in (len_q, len_k))
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        out = varlen_attention(q, k, v, cu_q, cu_k, causal=is_causal, scale=scale)
    else:
        grid = BlockGrid.make([len_q] * batch, mask, block_q=_BLOCK, block_k=_BLOCK, device=query.device)
        out = varlen_attention(
            query.flatten(0, 1), pack(key, mask), pack(value, mask),
            grid.cu_seqlens_q, grid.cu_seqlens_k, scale=scale,
        )  # fmt: skip
    return out.unflatten(0, (batch, len_q))


def _attend(
    layer: _Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: tuple[int, ...] | BlockLayout | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    if isinstance(mask, BlockLayout) or is_causal:
        raise ValueError(
            f"layer {layer.name} has {'a causal' if is_causal else 'another'} mask: a policy takes masks that cut "
            "keys off at the end of a batch item, or none"
        )
    if query.shape[1] != key.shape[1] or layer.text_tokens > query.shape[1]:
        raise ValueError(
            f"layer {layer.name} has {query.shape[1]} queries, {key.shape[1]} keys and {layer.text_tokens} text "
            "tokens: a policy is for layers that attend among all tokens; choose them with layers="
        )
    text = (0, 0)
    if layer.text == "first":
        text = (0, layer.text_tokens)
    elif layer.text == "last":
        text = (query.shape[1] - layer.text_tokens, query.shape[1])
    return layer.policy.attention(
        layer.name, layer.step, query, key, value,
        call=layer.call, text=text, lengths_k=mask, scale=scale,
    )  # fmt: skip


_known_masks = WeakTensorKeyDictionary()  # mask -> (version, sizes, what it says)


@torch.compiler.disable
def _read_mask(mask: Tensor, batch: int, heads: int, len_q: int, len_k: int) -> tuple[int, ...] | BlockLayout:
    """Keys that count of each batch item, if the mask cuts off the rest of them, or a layout of its own.

    The values are needed on the host, once for each mask: the layers of one forward share it.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"attn_mask is {mask.dtype}: it has to be torch.bool, a bias is not taken")
    sizes = (batch, heads, len_q, len_k)
    if mask.is_inference():  # counts no versions
        return _analyse(mask, *sizes)
    known = _known_masks.get(mask)
    if known is None or known[:2] != (mask._version, sizes):
        known = _known_masks[mask] = (mask._version, sizes, _analyse(mask, *sizes))
    return known[2]


def _analyse(mask: Tensor, batch: int, heads: int, len_q: int, len_k: int) -> tuple[int, ...] | BlockLayout:
    if tuple(mask.shape) == (batch, len_k):
        mask = mask[:, None, None]  # what torch's own backend takes it for
    try:
        full = mask.expand(batch, heads, len_q, len_k)
    except RuntimeError:
        raise ValueError(
            f"attn_mask has shape {list(mask.shape)}: it has to be [{batch}, {len_k}], or spread to "
            f"[{batch}, {heads}, {len_q}, {len_k}]"
        ) from None
    dims = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if dims[1:3] == (1, 1):
        keys = full[:, 0, 0]
        lengths = keys.sum(-1, keepdim=True)
        ends = (torch.arange(len_k, device=mask.device) < lengths) == keys
        *found, cut = [*lengths.flatten().tolist(), bool(ends.all())]
        if cut:
            return tuple(found)
    if dims[1] == 1:
        full = full[:, :1]
    return BlockLayout.from_token_mask([m.contiguous() for m in full], block_q=_BLOCK, block_k=_BLOCK)


class _Intercept(TorchFunctionMode):
    """torch's own attention becomes ours, in layers that call it themselves."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _scaled_dot_product_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _scaled_dot_product_attention(query, key, value, attn_mask=None, *args, **kwargs) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attention_forward(query, key, value, attn_mask, *args, **kwargs).transpose(1, 2)


class _Announced(StateManager):
    """What a pipeline says with ``cache_context`` about the forward to come."""

    name: str | None = None
    index: int | None = None

    def __init__(self) -> None:
        super().__init__(BaseState)  # type: ignore[arg-type]  # it wants the class

    def set_context(self, context: Any) -> None:
        self.name = getattr(context, "name", None)
        self.index = getattr(context, "step_index", None)


class _TransformerHook(ModelHook):
    """Counts steps and hears of the end of a run.

    It counts in torch's own hooks: what offloads a whole model puts its old forward back at the end of a run.
    """

    _is_stateful = True

    def __init__(self, model: torch.nn.Module, policy: Policy, calls_per_step: int | None) -> None:
        super().__init__()
        self.policy = policy
        self.announced = _Announced()
        self.counter = StepCounter(policy.end_run, calls_per_step)
        self.now: tuple[Any, int] | None = None
        self._signature = inspect.signature(type(model).forward)

    @torch.compiler.disable
    def begin(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.now is not None:  # the forward before did not come to its end, nor did its run
            self.reset_state(module)
        timestep = self._signature.bind_partial(module, *args, **kwargs).arguments.get("timestep")
        self.now = self.counter.count(self.announced.name, self.announced.index, timestep)

    @torch.compiler.disable
    def end(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self.now = None

    def reset_state(self, module):
        self.counter.reset()
        self.policy.end_run()
        return module


class _LayerHook(ModelHook):
    """Says which layer runs while it does."""

    def __init__(self, policy: Policy, name: str, transformer: _TransformerHook, text: Text) -> None:
        super().__init__()
        self.policy, self.name, self.transformer, self.text = policy, name, transformer, text

    @torch.compiler.disable
    def new_forward(self, module, *args, **kwargs):
        assert self.fn_ref.original_forward is not None
        if self.transformer.now is None:
            raise RuntimeError(f"layer {self.name} runs outside of its transformer: call the transformer")
        tokens = 0
        if self.text != "none":
            other = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            tokens = 0 if other is None else other.shape[1]
        call, step = self.transformer.now
        running = _running.set(_Layer(self.policy, self.name, call, step, self.text, tokens))
        try:
            with ExitStack() as stack:
                if not hasattr(module.processor, "_attention_backend"):
                    stack.enter_context(_Intercept())
                return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            _running.reset(running)


@contextmanager
def attached(
    transformer: torch.nn.Module,
    policy: _AnyPolicy,
    *,
    layers: str | Callable[[str, torch.nn.Module], bool] | None = None,
    text: Text | None = None,
    calls_per_step: int | None = None,
) -> Iterator[_AnyPolicy]:
    """Layers of a diffusers transformer compute by ``policy`` inside of the ``with`` block; gives the policy.

    Args:
        transformer: a diffusers model. A pipeline with two of them takes a policy for each.
        policy: such as :class:`gapless.sparsity.AdaSpa`.
        layers: which attention modules, a regular expression of whole names or a function of name and module; None
            takes those in :data:`MODELS`.
        text: where text tokens are among the tokens of those layers; None takes what :data:`MODELS` says.
        calls_per_step: forwards of each step; None finds out, see :class:`gapless.integrations.steps.StepCounter`.

    Raises:
        ValueError: a model that is not known, no layer of that name, or a policy is attached already.
    """
    register()
    model = unwrap_module(transformer)
    known = next((MODELS[c.__name__] for c in type(model).__mro__ if c.__name__ in MODELS), None)
    if known is None and (layers is None or text is None):
        raise ValueError(
            f"transformer is of type {type(model).__name__}, of which only {', '.join(MODELS)} are known: give layers "
            "(which modules attend among all video tokens) and text ('first', 'last' or 'none')"
        )
    if text not in (None, "first", "last", "none"):
        raise ValueError(f"text is {text!r:.80}: it has to be 'first', 'last' or 'none'")
    wanted: Any = layers if layers is not None else known.layers  # type: ignore[union-attr]
    if isinstance(wanted, str):
        pattern = re.compile(wanted)
        wanted = lambda name, module: pattern.fullmatch(name)  # noqa: E731
    where: Text = text if text is not None else known.text  # type: ignore[union-attr]
    chosen = {n: m for n, m in model.named_modules() if hasattr(m, "processor") and wanted(n, m)}
    if not chosen:
        raise ValueError(f"layers is {layers!r:.80}: no attention module of {type(model).__name__} fits")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    if registry.get_hook(NAME) is not None:
        raise ValueError("transformer has a policy attached already: leave that with block first")
    hook = _TransformerHook(model, policy, calls_per_step)
    with ExitStack() as undo:
        registry.register_hook(hook, NAME)
        undo.callback(registry.remove_hook, NAME)
        undo.callback(model.register_forward_pre_hook(hook.begin, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(hook.end).remove)
        for name, module in chosen.items():
            own = HookRegistry.check_if_exists_or_initialize(module)
            own.register_hook(_LayerHook(policy, name, hook, where), NAME)
            if hasattr(module.processor, "_attention_backend"):
                undo.callback(
                    setattr, module.processor, "_attention_backend", module.processor._attention_backend
                )
                module.processor._attention_backend = AttentionBackendName(NAME)
        undo.callback(policy.end_run)
        yield policy


register()
