# SPDX-License-Identifier: Apache-2.0
"""Kernels that compute no gaps: packed attention, block-sparse attention, expert rerouting."""

from importlib.metadata import version as _version

from gapless.integrations.adapter_training import collect_routes, merge_adapter, train_adapter
from gapless.integrations.adapters import adapters, attach_store, detach_store, expert_store
from gapless.ops.block_sparse import attention_with_mass, block_mass, block_sparse_attention
from gapless.ops.experts import TunedExperts, fused_experts, grouped_mm, permute, unpermute
from gapless.ops.linear_cross_entropy import cross_entropy, linear_cross_entropy
from gapless.ops.nested import nested_attention
from gapless.ops.reroute import align, reroute, reroute_align
from gapless.ops.torch_varlen import varlen_attn
from gapless.ops.varlen import merge_attention, varlen_attention
from gapless.plan import BlockLayout, ExpertDispatch, ExpertMap, VarlenPlan

__version__ = _version("gapless")
__all__ = [
    "BlockLayout",
    "ExpertDispatch",
    "ExpertMap",
    "TunedExperts",
    "VarlenPlan",
    "adapters",
    "align",
    "attach_store",
    "attention_with_mass",
    "block_mass",
    "block_sparse_attention",
    "collect_routes",
    "cross_entropy",
    "detach_store",
    "expert_store",
    "fused_experts",
    "grouped_mm",
    "linear_cross_entropy",
    "merge_adapter",
    "merge_attention",
    "nested_attention",
    "permute",
    "reroute",
    "reroute_align",
    "train_adapter",
    "unpermute",
    "varlen_attention",
    "varlen_attn",
]
