# SPDX-License-Identifier: Apache-2.0
"""Lists of blocks and sparse matrices, as other libraries hold them, and layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gapless.plan import block_layout
from gapless.plan.block_grid import BlockGrid, Lengths
from gapless.plan.block_lists import on_host
from gapless.plan.block_masks import from_parts, token_blocks
from gapless.plan.block_patterns import to_cells, words

if TYPE_CHECKING:
    from scipy.sparse import bsr_array


def from_lists(
    indices: Tensor,
    counts: Tensor,
    *,
    block_q: int,
    block_k: int,
    lengths_q: Lengths | None = None,
    lengths_k: Lengths | None = None,
    capacity: int | None = None,
) -> block_layout.BlockLayout:
    """Full blocks from padded lists, in any order.

    Args:
        indices: int32 or int64 [heads, q_blocks, n], key blocks of each query block, counted from the sequence's first;
            the query blocks of all sequences follow one another. Entries at and after the count are not read.
        counts: int32 or int64 [heads, q_blocks], entries that count.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.
        lengths_q, lengths_k: tokens of the sequence, or of each. None: as many as the blocks hold, and as queries.
        capacity: see :meth:`BlockLayout.from_mask`.

    Raises:
        TypeError: lists that are no integer tensors.
        ValueError: a block that the sequence does not have, one listed twice, a count beyond the list, shapes or
            lengths that do not fit together. On a device the errors about values come when it gets there.
    """
    _check_integers("indices", indices, 3)
    _check_integers("counts", counts, 2)
    heads, rows, n = indices.shape
    if tuple(counts.shape) != (heads, rows):
        raise ValueError(f"counts has shape {list(counts.shape)}: indices make it [{heads}, {rows}]")
    if counts.device != indices.device:
        raise ValueError(f"counts is on {counts.device}, indices is on {indices.device}")
    grid = _grid_of_rows(rows, "indices", block_q, block_k, lengths_q, lengths_k, indices.device)
    width = grid.max_k_blocks
    used = torch.arange(n, device=indices.device) < counts[..., None]
    row_width = grid.k_blocks_of_row[:, None]
    _refuse(
        "counts",
        (counts < 0) | (counts > n),
        counts,
        lambda at: f"it has to be from 0 to {n}, the entries of a list",
    )
    _refuse(
        "indices",
        used & ((indices < 0) | (indices >= row_width)),
        indices,
        lambda at: f"the sequence of query block {at[1]} has {int(row_width[at[1]])} key blocks",
    )
    # One more column takes the entries that do not count.
    mask = torch.zeros(heads, rows, width + 1, dtype=torch.bool, device=indices.device)
    mask.scatter_(2, torch.where(used, indices.long(), width), True)
    mask = mask[..., :width].contiguous()
    short = mask.sum(2) != counts
    _refuse("indices", short, indices, lambda at: "it lists a block twice")
    return block_layout.BlockLayout.from_packed(grid, mask, capacity=capacity)


def to_padded_lists(layout: block_layout.BlockLayout) -> tuple[Tensor, Tensor]:
    """(indices int32 [heads, q_blocks, max_k_blocks], counts int32 [heads, q_blocks]), ascending, then zeros.

    Raises:
        ValueError: the layout has room for partial blocks, which lists cannot hold.
    """
    if layout.partial_ids.shape[0]:
        raise ValueError(
            f"layout has up to {layout.partial_ids.shape[0]} partial blocks, which lists of blocks cannot hold: call "
            "cover() to take them in full"
        )
    rows, width = layout.rows, layout.max_k_blocks
    counts = layout.offsets.diff()
    nth = torch.arange(width, device=layout.device, dtype=torch.int32)
    if layout.ids.shape[0] == 0:
        indices = torch.zeros(rows, width, dtype=torch.int32, device=layout.device)
    else:
        at = (layout.offsets[:-1, None] + nth).clamp(max=layout.ids.shape[0] - 1)
        indices = torch.where(nth < counts[:, None], layout.ids[at], 0)
    return indices.view(layout.heads, layout.q_blocks, width), counts.view(layout.heads, layout.q_blocks)


def from_csr(
    indptr: Tensor,
    indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    lengths_q: Lengths | None = None,
    lengths_k: Lengths | None = None,
) -> block_layout.BlockLayout:
    """Full blocks from (indptr, indices), as SciPy and FlashInfer hold sparse matrices of blocks. Nothing is copied.

    Args:
        indptr: int32 or int64 [heads * q_blocks + 1], where each row's entries begin, starting at 0, never decreasing.
            Rows follow one another head by head; with one head all query heads share it.
        indices: int32 or int64 [at least indptr[-1]], key blocks of each row, strictly ascending, counted from the
            sequence's first.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.
        lengths_q, lengths_k: tokens of the sequence, or of each. None: one head, as many as the blocks hold.

    Raises:
        TypeError: no integer tensors.
        ValueError: a block that the sequence does not have, one out of order, offsets that decrease or end beyond the
            indices, lengths that do not fit. On a device the errors about values come when it gets there.
    """
    _check_integers("indptr", indptr, 1)
    _check_integers("indices", indices, 1)
    if indices.device != indptr.device:
        raise ValueError(f"indices is on {indices.device}, indptr is on {indptr.device}")
    rows = indptr.shape[0] - 1
    if lengths_q is None:
        grid = _grid_of_rows(rows, "indptr", block_q, block_k, None, lengths_k, indptr.device)
    else:
        grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k, device=indptr.device)
    if rows % max(grid.q_blocks, 1) or (rows == 0) != (grid.q_blocks == 0):
        raise ValueError(f"indptr has {rows} rows: the lengths make it {grid.q_blocks} for each head")
    steps = indptr.diff()
    _refuse("indptr", indptr[:1] != 0, indptr, lambda at: "it has to be 0")
    _refuse("indptr", steps < 0, indptr, lambda at: "the next is less")
    _refuse(
        "indptr",
        indptr[-1:] > indices.shape[0],
        indptr[-1:],
        lambda at: f"indices has {indices.shape[0]} entries",
    )
    heads, width = rows // grid.q_blocks if rows else 1, grid.max_k_blocks
    offsets, ids = indptr.int(), indices.int()
    if ids.shape[0]:
        entry = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
        row = torch.searchsorted(offsets[1:].contiguous(), entry, right=True)
        used = row < rows
        limit = torch.cat([grid.k_blocks_of_row.repeat(heads), grid.k_blocks_of_row[:1]])[row]
        wrong = used & ((ids < 0) | (ids >= limit))
        _refuse("indices", wrong, indices, lambda at: f"its sequence has {int(limit[at[0]])} key blocks")
        place = row * width + ids
        wrong = torch.cat([used[:1] & False, used[1:] & (place[1:] <= place[:-1])])
        _refuse("indices", wrong, indices, lambda at: "it has to be above the entry before, sort each row")
    none = ids.new_zeros(0)
    patterns = ids.new_zeros(0, block_k, words(block_q))
    return block_layout.BlockLayout(
        grid, heads, offsets, ids, torch.zeros_like(offsets), none, none, patterns
    )


def from_bsr(
    matrix: Any, *, lengths_q: int | None = None, lengths_k: int | None = None
) -> block_layout.BlockLayout:
    """Exactly the nonzero cells of sparse matrices of tokens, whose block size is the layout's.

    Args:
        matrix: ``scipy.sparse`` BSR matrix or array [queries, keys], or one for each head.
        lengths_q, lengths_k: tokens of the sequence, where the last block is short; None: as many as the matrix has.

    Raises:
        ModuleNotFoundError: SciPy is not installed.
        TypeError: a matrix of another format.
        ValueError: matrices of different shapes or blocks, lengths of another number of blocks.
    """
    sparse = _scipy_sparse()
    matrices: list[Any] = list(matrix) if isinstance(matrix, (list, tuple)) else [matrix]
    if not matrices:
        raise ValueError("matrix is empty: it has to hold one matrix for each head")
    for h, m in enumerate(matrices):
        if not sparse.issparse(m) or m.format != "bsr":
            raise TypeError(
                f"matrix {h} is of type {type(m).__name__}: it has to be a BSR matrix; those of blocks go to from_csr"
            )
        if m.shape != matrices[0].shape or m.blocksize != matrices[0].blocksize:
            raise ValueError(
                f"matrix {h} has shape {m.shape} in blocks of {m.blocksize}, the first has {matrices[0].shape} in "
                f"{matrices[0].blocksize}"
            )
    (rows, columns), (block_q, block_k) = matrices[0].shape, matrices[0].blocksize
    length_q = rows if lengths_q is None else lengths_q
    length_k = columns if lengths_k is None else lengths_k
    grid = BlockGrid.make(length_q, length_k, block_q=block_q, block_k=block_k)
    nq, nk = rows // block_q, columns // block_k
    if (grid.q_blocks, grid.k_blocks) != (nq, nk):
        raise ValueError(
            f"lengths_q, lengths_k are {length_q}, {length_k}: matrix has {nq} x {nk} blocks of {block_q} x {block_k}"
        )
    heads = []
    for m in matrices:
        row = np.repeat(np.arange(nq), np.diff(m.indptr))
        # Entries of a block that stands twice add up, as they do in SciPy.
        summed = np.zeros((nq * nk, block_q, block_k), dtype=m.data.dtype)
        np.add.at(summed, row * nk + m.indices, m.data)
        tokens = torch.from_numpy(summed != 0)
        heads.append(tokens.view(nq, nk, block_q, block_k).transpose(1, 2).reshape(rows, columns))
    mask = torch.stack(heads)[:, :length_q, :length_k]
    return from_parts(grid, [token_blocks(mask, block_q, block_k)])


def to_bsr(layout: block_layout.BlockLayout, head: int = 0) -> bsr_array:
    """One head as ``scipy.sparse.bsr_array`` of bool, [query blocks * block_q, key blocks * block_k].

    Cells beyond the sequence's lengths are False.

    Raises:
        ModuleNotFoundError: SciPy is not installed.
        ValueError: the layout has not one sequence, or no such head.
    """
    sparse = _scipy_sparse()
    if layout.batch != 1:
        raise ValueError(f"layout has {layout.batch} sequences: a matrix holds one")
    if not 0 <= head < layout.heads:
        raise ValueError(f"head is {head}: it has to be from 0 to {layout.heads - 1}")
    grid = layout.grid
    nq, nk = grid.q_blocks, grid.k_blocks
    full, slots = layout.full_mask()[head].cpu(), layout.slots()[head].cpu()
    row, block = (full | (slots > 0)).nonzero(as_tuple=True)
    data = torch.ones(row.shape[0], grid.block_q, grid.block_k, dtype=torch.bool)
    slot = slots[row, block].long()
    data[slot > 0] = to_cells(layout.patterns.cpu(), grid.block_q)[slot[slot > 0] - 1]
    query = row[:, None, None] * grid.block_q + torch.arange(grid.block_q)[:, None]
    key = block[:, None, None] * grid.block_k + torch.arange(grid.block_k)
    data &= (query < grid.lengths_q[0]) & (key < grid.lengths_k[0])
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row.numpy(), minlength=nq))])
    return sparse.bsr_array(
        (data.numpy(), block.int().numpy(), indptr.astype(np.int32)),
        shape=(nq * grid.block_q, nk * grid.block_k),
        blocksize=(grid.block_q, grid.block_k),
    )


def _scipy_sparse() -> Any:
    try:
        from scipy import sparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("BSR matrices need SciPy: pip install scipy") from error
    return sparse


def _grid_of_rows(
    rows: int,
    name: str,
    block_q: int,
    block_k: int,
    lengths_q: Lengths | None,
    lengths_k: Lengths | None,
    device: torch.device,
) -> BlockGrid:
    lengths_q = rows * block_q if lengths_q is None else lengths_q
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k, device=device)
    if grid.q_blocks != rows:
        raise ValueError(
            f"{name} has {rows} rows of query blocks: the lengths, in blocks of {block_q}, make it {grid.q_blocks}"
        )
    return grid


def _check_integers(name: str, t: Tensor, dims: int) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} is {kind}: it has to be a tensor of torch.int32 or torch.int64")
    if t.dim() != dims or (dims == 1 and name == "indptr" and t.shape[0] == 0):
        raise ValueError(f"{name} has shape {list(t.shape)}: it has to have {dims} dimensions")


def _refuse(name: str, wrong: Tensor, values: Tensor, why: Any) -> None:
    """Raise at the first place that is ``wrong``; on a device when it gets there."""
    if not on_host(wrong):
        torch._assert_async(~wrong.any(), f"{name} has a wrong entry")
        return
    if not wrong.any():
        return
    at = np.argwhere(wrong.numpy())[0].tolist()
    value = values[tuple(at)]
    shown = value.item() if value.dim() == 0 else value.tolist()
    raise ValueError(f"{name}[{', '.join(map(str, at))}] is {shown}: {why(at)}")
