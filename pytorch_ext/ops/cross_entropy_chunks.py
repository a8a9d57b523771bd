# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a product, chunk by chunk: logits never exist as a whole.

A chunk is a product by torch, of which a kernel makes sums, or gradients. The backward pass makes each chunk again: 4
products of tokens x classes x hidden instead of 3, for which memory does not grow with the classes, gradients are added
up in float32 and rounded once, any gradient may arrive, and nothing is computed for a backward pass that never comes.
Few logits are kept for it instead. A token that is left out costs a CPU nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of logits
KEEP_BYTES = 256 << 20  # up to which all logits are kept for the backward pass
MIN_CLASSES = 2048  # of a chunk, if there are so many: products of fewer are slow
ROUND_CLASSES = 64


class Kernels(NamedTuple):
    """Operators on chunks of logits, as csrc/torch/library.cpp describes them.

    Attributes:
        sums: (logits, bias, targets, sums, first class, softcap, total) to sums.
        gradient: (logits, bias, targets, factors, first class, softcap, out, sideways).
        turns: it makes ``sideways`` in passing.
    """

    sums: Callable[..., Tensor]
    gradient: Callable[..., None]
    turns: bool


def wide(t: Tensor) -> torch.dtype:
    """The dtype of losses, and of sums over values of ``t``."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def kept(tokens: int, classes: int, itemsize: int) -> bool:
    """Whether logits are so few that they are kept for the backward pass."""
    return tokens * classes * itemsize <= KEEP_BYTES


def chunks(tokens: int, classes: int, itemsize: int) -> tuple[list[slice], list[slice]]:
    """Ranges of tokens and ranges of classes: one of each makes a chunk of logits."""
    columns = max(CHUNK_BYTES // (max(tokens, 1) * itemsize), MIN_CLASSES)
    if columns < classes:  # chunks of about one size
        columns = -(-classes // -(-classes // columns))
        columns = -(-columns // ROUND_CLASSES) * ROUND_CLASSES
    rows = max(CHUNK_BYTES // (max(min(columns, classes), 1) * itemsize), 1)
    return _ranges(tokens, rows), _ranges(classes, columns)


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, size)) for at in range(0, size, step)]


def sums_of(kernels: Kernels, logits: Tensor, targets: Tensor, softcap: float, total: bool) -> Tensor:
    """Sums over all classes, of logits that are there."""
    return kernels.sums(logits, None, targets, no_sums(targets, wide(logits)), 0, softcap, total)


def no_sums(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """What sums start from. A target that none of the classes is leaves its NaN in the loss."""
    sums = torch.zeros(4, targets.shape[0], dtype=dtype, device=targets.device)
    sums[0].fill_(-torch.inf)
    sums[2].fill_(torch.nan)
    return sums


def losses_of(sums: Tensor, targets: Tensor, classes: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """(losses, LSE) of the tokens, 0 where a token is left out."""
    highest, total, target, every = sums.unbind()
    lse = highest + total.log()
    losses = lse - target
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (lse - every / classes)
    out = targets < 0
    return losses.masked_fill(out, 0.0), lse.masked_fill(out, 0.0)


def factors_of(dlosses: Tensor, dlse: Tensor | None, lse: Tensor, classes: int, smoothing: float) -> Tensor:
    """[4, tokens] that make gradients of logits: LSE, factors of the softmax, of the target, of every class."""
    softmax = dlosses if dlse is None else dlosses + dlse
    return torch.stack([lse, softmax, (smoothing - 1) * dlosses, (-smoothing / max(classes, 1)) * dlosses])


class _Product:
    """A sum of products, added up in float32 and rounded once to a narrow ``out``; 0 of no ``terms``."""

    def __init__(self, out: Tensor, terms: int) -> None:
        self.out = self.sum = out
        if terms == 0:
            out.zero_()
        elif terms > 1 and out.dtype != wide(out):
            self.sum = torch.zeros(out.shape, dtype=wide(out), device=out.device)
            self.term = torch.empty_like(out)

    def add(self, a: Tensor, b: Tensor, rows: slice = slice(None), *, first: bool) -> None:
        """``a @ b`` to some rows, of which it is the first."""
        if self.sum is not self.out:
            self.sum[rows] += torch.mm(a, b, out=self.term[rows])
        elif first:
            torch.mm(a, b, out=self.out[rows])
        else:
            self.out[rows].addmm_(a, b)

    def finish(self) -> None:
        if self.sum is not self.out:
            self.out.copy_(self.sum)


class _Chunk:
    """Memory for one chunk of logits at a time."""

    def __init__(self, like: Tensor, rows: list[slice], columns: list[slice]) -> None:
        most = (max((r.stop - r.start for r in ranges), default=0) for ranges in (rows, columns))
        self.memory = like.new_empty(next(most) * next(most))

    def of(self, rows: int, columns: int) -> Tensor:
        return self.memory[: rows * columns].view(rows, columns)


def _size(r: slice) -> int:
    return r.stop - r.start


def _used(targets: Tensor) -> Tensor | None:
    """Tokens that are not left out, if some are; of other devices nobody waits for the answer."""
    if targets.device.type != "cpu":
        return None
    used = targets >= 0
    return None if used.all() else used.nonzero().squeeze(1)


def forward(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [T], LSE [T], logits [T, V]; without ``keep`` [0, V])."""
    tokens, classes = x.shape[0], weight.shape[0]
    logits = x.new_empty(tokens if keep else 0, classes)
    used, chosen = _used(targets), targets
    if used is not None:
        x, chosen = x[used], targets[used]
        logits[x.shape[0] :].zero_()
    sums = no_sums(chosen, wide(x))
    rows, columns = [slice(0, x.shape[0])], [slice(0, classes)]
    if not keep:
        rows, columns = chunks(x.shape[0], classes, x.element_size())
        chunk = _Chunk(x, rows, columns)
    for c in columns:
        for r in rows:
            made = torch.mm(x[r], weight[c].t(), out=logits[r] if keep else chunk.of(_size(r), _size(c)))
            part = None if bias is None else bias[c]
            sums[:, r] = kernels.sums(made, part, chosen[r], sums[:, r], c.start, softcap, smoothing > 0)
    losses, lse = losses_of(sums, chosen, classes, smoothing)
    if used is not None:
        losses, lse = (t.new_zeros(tokens).index_copy_(0, used, t) for t in (losses, lse))
    return losses, lse, logits


def backward(
    kernels: Kernels,
    dlosses: Tensor,
    dlse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    logits: Tensor,
    softcap: float,
    smoothing: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; of those that are not wanted, nothing."""
    (tokens, hidden), classes = x.shape, weight.shape[0]
    factors = factors_of(dlosses, dlse, lse, classes, smoothing)
    used = _used(targets)
    if used is not None:
        x, targets, factors = x[used], targets[used], factors[:, used]
    rows, columns = chunks(x.shape[0], classes, x.element_size())
    dx = x.new_empty(x.shape[0] if wanted[0] else 0, hidden)
    dweight = x.new_empty(classes if wanted[1] else 0, hidden)
    dbias = x.new_zeros(classes if wanted[2] else 0, dtype=wide(x))
    chunk = _Chunk(x, rows, columns)
    # Of narrow types, torch multiplies by rows in place of columns at half the rate: the kernel turns them.
    sideways = wanted[1] and kernels.turns and x.dtype != wide(x)
    turned = _Chunk(x, rows, columns) if sideways else None
    to_x = _Product(dx, len(columns) if wanted[0] else 0)
    for c in columns:
        part = None if bias is None else bias[c]
        to_weight = _Product(dweight[c] if wanted[1] else dweight, len(rows) if wanted[1] else 0)
        for r in rows:
            shape = _size(r), _size(c)
            grad, turn = chunk.of(*shape), turned.of(*shape[::-1]) if turned else None
            made = logits[r, c] if logits.shape[0] else torch.mm(x[r], weight[c].t(), out=grad)
            kernels.gradient(made, part, targets[r], factors[:, r], c.start, softcap, grad, turn)
            if wanted[0]:
                to_x.add(grad, weight[c], r, first=c.start == 0)
            if wanted[1]:
                to_weight.add(grad.t() if turn is None else turn, x[r], first=r.start == 0)
            if wanted[2]:
                dbias[c] += grad.sum(0, dtype=dbias.dtype)
        to_weight.finish()
    to_x.finish()
    if used is not None and wanted[0]:
        dx = dx.new_zeros(tokens, hidden).index_copy_(0, used, dx)
    return dx, dweight, dbias.to(x.dtype)
