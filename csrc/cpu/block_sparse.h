// SPDX-License-Identifier: Apache-2.0
// Attention over listed blocks, and the mass of blocks, on the CPU: checks the lists, cuts them into work
// items and runs them. Knows no torch.
#pragma once

#include <vector>

#include "csrc/cpu/varlen.h"

namespace gapless::cpu {

/// Sizes that the lists and lengths are checked against; kernels trust them afterwards.
struct BlockSizes {
    int64_t batch, total_q, total_k;
    int64_t ids, partial_ids, patterns;  ///< capacities
};

/// Blocks of each sequence, counted on: [batch], and their sum.
struct BlockCounts {
    explicit BlockCounts(const int32_t* cu_seqlens, int64_t batch, int64_t size);
    std::vector<int64_t> first;
    int64_t total = 0, most = 0;
};

/// Throws std::runtime_error if the lengths or p.blocks are not what they have to be.
void check_block_lists(const VarlenParams& p, const BlockSizes& sizes);

void block_sparse_forward(const VarlenParams& p, int64_t batch, const Threads& threads);
void block_sparse_backward(const VarlenBackwardParams& b, int64_t batch, const Threads& threads);

/// Fills p.mass, which holds zeros: from p.lse, or in a dense forward that fills p.out and p.lse too.
void block_mass(const VarlenParams& p, int64_t batch, bool with_outputs, const Threads& threads);

}  // namespace gapless::cpu
