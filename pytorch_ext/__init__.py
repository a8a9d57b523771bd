# SPDX-License-Identifier: Apache-2.0
"""Kernels that compute no gaps: packed attention, block-sparse attention, expert rerouting."""

from importlib.metadata import version as _version

from gapless.ops.block_sparse import attention_with_mass, block_mass, block_sparse_attention
from gapless.ops.nested import nested_attention
from gapless.ops.torch_varlen import varlen_attn
from gapless.ops.varlen import merge_attention, varlen_attention
from gapless.plan import BlockLayout, VarlenPlan

__version__ = _version("gapless")
__all__ = [
    "BlockLayout",
    "VarlenPlan",
    "attention_with_mass",
    "block_mass",
    "block_sparse_attention",
    "merge_attention",
    "nested_attention",
    "varlen_attention",
    "varlen_attn",
]
