# SPDX-License-Identifier: Apache-2.0
"""Handles of the raw operators. They are private: they check memory safety only and have no gradient."""

import torch

from gapless import _C  # noqa: F401  (its import registers the operators)

varlen_attention_fwd = torch.ops.gapless.varlen_attention_fwd.default
varlen_attention_bwd = torch.ops.gapless.varlen_attention_bwd.default
block_sparse_fwd = torch.ops.gapless.block_sparse_fwd.default
block_sparse_bwd = torch.ops.gapless.block_sparse_bwd.default
block_mass = torch.ops.gapless.block_mass.default
attention_mass_fwd = torch.ops.gapless.attention_mass_fwd.default
reroute = torch.ops.gapless.reroute.default
expert_align = torch.ops.gapless.expert_align.default
expert_reroute_align = torch.ops.gapless.expert_reroute_align.default
expert_gather = torch.ops.gapless.expert_gather.default
expert_combine = torch.ops.gapless.expert_combine.default
expert_dot = torch.ops.gapless.expert_dot.default
expert_grouped_mm = torch.ops.gapless.expert_grouped_mm.default
expert_grouped_outer = torch.ops.gapless.expert_grouped_outer.default
fused_experts_fwd = torch.ops.gapless.fused_experts_fwd.default
fused_experts_bwd = torch.ops.gapless.fused_experts_bwd.default
cross_entropy_sums = torch.ops.gapless.cross_entropy_sums.default
cross_entropy_gradient = torch.ops.gapless.cross_entropy_gradient.default
cpu_isa = torch.ops.gapless.cpu_isa.default
