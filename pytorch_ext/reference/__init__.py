# SPDX-License-Identifier: Apache-2.0
"""Readable references in eager torch: differentiable, in any dtype, and the definition of correct."""

from gapless.reference.block_sparse import block_mass, block_sparse_attention
from gapless.reference.varlen import merge_attention, varlen_attention

__all__ = ["block_mass", "block_sparse_attention", "merge_attention", "varlen_attention"]
