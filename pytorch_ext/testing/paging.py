# SPDX-License-Identifier: Apache-2.0
"""Paged keys and values whose unused parts would show if they were read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ABSURD_PAGE = 2147480000  # an unused table entry: reading it is a wild read


class Pages(NamedTuple):
    """Paged keys and values."""

    k: Tensor  # [num_pages, page_size, kv_heads, dim]
    v: Tensor  # [num_pages, page_size, kv_heads, dim_v]
    block_table: Tensor  # int32 [batch, max_pages]
    seqused_k: Tensor  # int32 [batch]


def scatter_pages(
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    page_size: int,
    *,
    seed: int = 0,
    spare_pages: int = 2,
    spare_columns: int = 1,
) -> Pages:
    """Scatter packed keys and values into pages in random order.

    Pages and rows that hold no key are NaN, table entries beyond a sequence's pages are ``ABSURD_PAGE``.

    Args:
        k: [tokens, kv_heads, dim], the sequences of ``lengths`` one after another.
        v: [tokens, kv_heads, dim_v].
        lengths: keys of each sequence; their sum is ``tokens``.
        page_size: rows of a page.
        seed: of the order of pages.
        spare_pages: pages that no sequence uses.
        spare_columns: table columns that no sequence uses.
    """
    counts = [-(-n // page_size) for n in lengths]
    total = sum(counts) + spare_pages
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(lengths), max(counts, default=0) + spare_columns), ABSURD_PAGE, dtype=torch.int32)
    pages = [torch.full((total, page_size, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in (k, v)]
    token = taken = 0
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[i, :count] = order[taken : taken + count]
        for j in range(count):
            rows = min(page_size, length - j * page_size)
            for page, x in zip(pages, (k, v), strict=True):
                page[order[taken + j], :rows] = x[token : token + rows].detach()
            token += rows
        taken += count
    return Pages(pages[0], pages[1], table, torch.tensor(lengths, dtype=torch.int32))
