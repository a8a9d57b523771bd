# SPDX-License-Identifier: Apache-2.0
"""Selective activation offload: a share of what layers save for the backward pass waits in host memory.

ByteScale (arXiv:2502.21231, section 4.2): the first and the last layer's activations stay, of all others a share
``ratio`` goes, first in last out. Results are bitwise those without it: bytes come back as they were, with the same
strides.

    with offload(0.5, layers=model.model.layers) as moved:
        loss = model(tokens)
    loss.backward()
    print(moved.stats)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gapless.distributed.host_copies import copies_of
from gapless.distributed.host_pool import HostPool, Ready, shared_pool

ALIGNED = 64  # bytes: where a storage is cut, so that what comes back is aligned as it was


@dataclass
class OffloadStats:
    """What one :class:`offload` context did.

    Attributes:
        moved: ranges of storages of which a share went to the host.
        shared: saved tensors whose bytes had gone already.
        bytes_saved: of those ranges, as saved by the layers.
        bytes_out: to the host.
        bytes_back: from the host.
    """

    moved: int = 0
    shared: int = 0
    bytes_saved: int = 0
    bytes_out: int = 0
    bytes_back: int = 0


class _Range:
    """A range of a storage, its last bytes on the host. Dies with the last saved tensor in it."""

    def __init__(self, flat: Tensor, ratio: float, pool: HostPool, stats: OffloadStats) -> None:
        size = flat.numel()
        self._cut = int(size * (1 - ratio)) // ALIGNED * ALIGNED
        self._size, self._pool, self._stats = size, pool, stats
        self._copies = copies_of(flat.device)
        self._kept = flat[: self._cut].clone()  # a view would keep the rest
        self._host, free = pool.take(size - self._cut)
        self._ready = self._copies.out(flat[self._cut :], self._host[: size - self._cut], free)
        self._restored: tuple[Tensor, Ready] | None = None
        self.holders = self.waiting = self.turn = 0
        stats.moved += 1
        stats.bytes_saved += size
        stats.bytes_out += size - self._cut

    def fetch(self) -> tuple[Tensor, Ready]:
        """Start to bring the bytes back, unless that is under way: uint8 [size], and what to wait for."""
        if self._restored is None:
            whole = torch.empty(self._size, dtype=torch.uint8, device=self._kept.device)
            whole[: self._cut] = self._kept
            host = self._host[: self._size - self._cut]
            self._ready = self._copies.back(host, whole[self._cut :], self._ready)
            self._stats.bytes_back += host.numel()
            self._restored = whole, self._ready
        return self._restored

    def use(self) -> Tensor:
        """The bytes on the device, for one of the holders."""
        whole, ready = self.fetch()
        self._copies.wait(ready)
        return whole

    def one_less_waits(self) -> None:
        """Drop the copy on the device when each holder has had it; another backward pass fetches it again."""
        self.waiting -= 1
        if self.waiting == 0:
            self._restored, self.waiting = None, self.holders
            self.turn += 1

    def __del__(self) -> None:
        if hasattr(self, "_ready"):
            self._pool.give(self._host, self._ready)


class _Moved:
    """In place of a saved tensor: where its bytes are."""

    def __init__(self, tensor: Tensor, layer: int, held: _Range, offset: int) -> None:
        self.layer, self._held, self._offset = layer, held, offset
        self._dtype, self._size, self._stride = tensor.dtype, tensor.size(), tensor.stride()
        self._turn = held.turn  # in which this one still waits
        held.holders += 1
        held.waiting += 1

    def unpack(self) -> Tensor:
        whole = self._held.use()
        self._had_its_turn()
        empty = torch.empty(0, dtype=self._dtype, device=whole.device)
        return empty.set_(whole.untyped_storage(), self._offset, self._size, self._stride)

    def _had_its_turn(self) -> None:
        if self._turn == self._held.turn:
            self._turn += 1
            self._held.one_less_waits()

    def __del__(self) -> None:
        self._held.holders -= 1
        self._had_its_turn()


class _Kept:
    """In place of a saved tensor that stays."""

    def __init__(self, tensor: Tensor, layer: int | None) -> None:
        self.layer = layer
        self._tensor = tensor.detach()  # with its history it would be a cycle
        self._version = tensor._version

    def unpack(self) -> Tensor:
        # Autograd leaves this check to those who set hooks.
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {list(self._tensor.shape)} that the backward pass needs was changed in place: "
                f"it is at version {self._tensor._version}, saved at version {self._version}"
            )
        return self._tensor


class offload:
    """Context in which a share of what is saved for the backward pass goes to the host.

    Left alone are parameters and their views, leaves that want a gradient, integers, tensors below ``smallest`` bytes,
    tensor subclasses, and, where ``layers`` are given, all that is saved outside of them or in the first or last one.
    The rest goes by storage: a storage that several tensors share is moved once. Tokens are the outer dimension of
    what layers save, so the last bytes of a storage are its last tokens.

    Args:
        ratio: share of the bytes that goes, 0 to 1.
        layers: modules in the order in which they run, or a number of layers that are marked with :meth:`layer`. None:
            all that is saved may go, and nothing is fetched ahead.
        smallest: bytes of a tensor that is worth moving.
        pool: host memory; None is the one that the process shares for the device.

    Raises:
        ValueError: a ratio outside of 0 to 1, or fewer than 0 bytes.
    """

    def __init__(
        self,
        ratio: float,
        layers: Sequence[nn.Module] | int | None = None,
        *,
        smallest: int = 1 << 16,
        pool: HostPool | None = None,
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio is {ratio}: it has to be between 0 and 1")
        if smallest < 0:
            raise ValueError(f"smallest is {smallest}: it has to be at least 0 bytes")
        self.stats = OffloadStats()
        self._ratio, self._smallest, self._pool = ratio, smallest, pool
        self._modules: Sequence[nn.Module] = () if layers is None or isinstance(layers, int) else layers
        self._count = (
            layers if isinstance(layers, int) else len(self._modules) if layers is not None else None
        )
        self._layer: int | None = None  # the one that runs forward
        self._backward: int | None = None  # the one that runs backward
        self._known: dict[tuple, weakref.ref[_Range]] = {}
        self._ranges: dict[int, list[weakref.ref[_Range]]] = {}
        self._parameters: set[StorageWeakRef] = set()
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> offload:
        if self._undo:
            raise RuntimeError("this offload context is entered already: make one for each micro-batch")
        for module in self._modules:
            self._parameters |= {StorageWeakRef(x.untyped_storage()) for x in _plain(module)}
        for i, module in enumerate(self._modules):
            before = module.register_forward_pre_hook(lambda *_, i=i: self._enter_layer(i))
            after = module.register_forward_hook(lambda *_: self._enter_layer(None), always_call=True)
            self._undo += [before.remove, after.remove]
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._undo.append(lambda: hooks.__exit__(None, None, None))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._known.clear()
        self._parameters.clear()
        self._layer = None

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """What is saved inside is layer ``index``'s, where layers are counted by hand."""
        if self._count is None or not 0 <= index < self._count:
            raise ValueError(f"index is {index}: there are {self._count or 0} layers")
        before = self._layer
        self._layer = index
        try:
            yield
        finally:
            self._layer = before

    def _enter_layer(self, index: int | None) -> None:
        self._layer = index

    def _pack(self, tensor: Tensor) -> _Moved | _Kept:
        layer = 0 if self._count is None else self._layer
        stays = layer is None or (self._count is not None and layer in (0, self._count - 1))
        if stays or self._ratio == 0 or not self._movable(tensor):
            return _Kept(tensor, layer)
        with torch.no_grad():
            storage, item = tensor.untyped_storage(), tensor.element_size()
            begin = tensor.storage_offset() * item
            span = (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * item
            first, end = begin // ALIGNED * ALIGNED, begin + span
            if 2 * span >= storage.nbytes():  # else it is a small part of something that may well stay anyway
                first, end = 0, storage.nbytes()
            key = (StorageWeakRef(storage), first, end, tensor._version)
            reference = self._known.get(key)
            held = None if reference is None else reference()
            if held is None:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                flat.set_(storage, first, (end - first,), (1,))
                pool = self._pool or shared_pool(tensor.device.type)
                held = _Range(flat, self._ratio, pool, self.stats)
                self._known[key] = weakref.ref(held)
                self._ranges.setdefault(layer or 0, []).append(self._known[key])
            else:
                self.stats.shared += 1
            return _Moved(tensor, layer or 0, held, (begin - first) // item)

    def _unpack(self, packed: _Moved | _Kept) -> Tensor:
        layer = packed.layer
        if self._count is not None and layer is not None and layer != self._backward:
            self._backward = layer
            for reference in reversed(self._ranges.get(layer - 1, ())):
                if (held := reference()) is not None:
                    held.fetch()
        return packed.unpack()

    def _movable(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type == "meta":
            return False
        if not tensor.dtype.is_floating_point or tensor.is_neg() or tensor.nbytes < max(self._smallest, 1):
            return False
        origin = tensor if tensor._base is None else tensor._base
        if (
            isinstance(origin, nn.Parameter)
            or (origin.is_leaf and origin.requires_grad)
            or _is_cast_leaf(origin)
        ):
            return False
        return StorageWeakRef(tensor.untyped_storage()) not in self._parameters


def _plain(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that have a storage."""
    for group in (module.parameters(), module.buffers()):
        for x in group:
            if x.layout == torch.strided and type(x) in (Tensor, nn.Parameter, nn.Buffer):
                yield x


def _is_cast_leaf(tensor: Tensor) -> bool:
    """Whether it is a parameter in autocast's dtype: that stays for all micro-batches."""
    node = tensor.grad_fn
    if not type(node).__name__.startswith("ToCopyBackward"):
        return False
    before = node.next_functions[0][0]  # type: ignore[union-attr]
    return before is not None and hasattr(before, "variable")


def layers_of(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of a model: its longest list of modules, the first of equally long ones; empty if it has none."""
    lists = [tuple(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=())
