# SPDX-License-Identifier: Apache-2.0
"""Take rows out of a tensor and put them back, with a gradient that copies rows instead of adding them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` along the first axis; x [rows, ...], index integer [n], no row twice. Returns [n, ...]."""
    return _Gather.apply(x, index.long())


def scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Zeros [rows, ...] with ``x`` at ``index``; x [n, ...], index integer [n], no row twice."""
    return _Scatter.apply(x, index.long(), rows)


def _place(x: Tensor, index: Tensor, rows: int) -> Tensor:
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _place(grad, ctx.saved_tensors[0], ctx.rows), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, rows):
        ctx.save_for_backward(index)
        return _place(x, index, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
