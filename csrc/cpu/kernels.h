// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels, one for each instruction set that they are compiled for.
#pragma once

#include "csrc/common/cross_entropy_params.h"
#include "csrc/common/expert_params.h"
#include "csrc/common/varlen_params.h"

namespace gapless::cpu {

/// Bytes of a sequence's packed keys and values of one kv head.
struct PackedSize {
    int64_t keys, values;
};

/// What the tiles of a sequence and kv head share in the backward pass.
struct BackwardSpace {
    int64_t blocks;  ///< of rows: the number of BackwardItem::turn
    int64_t dq;      ///< bytes of BackwardItem::dq
};

struct Kernels {
    const char* isa;
    PackedSize (*packed_size)(const VarlenParams&, int64_t keys);
    /// One item of attention forward.
    void (*varlen_forward)(const VarlenParams&, const ForwardItem&);
    void (*varlen_merge)(const VarlenParams&, const MergeItem&);
    /// Fills params.mass from a known LSE; the item's bundles are heads, its tiles whole blocks of queries.
    void (*block_mass)(const VarlenParams&, const ForwardItem&);
    /// Attention backward: delta for tokens [begin, end), then the items. `next` is what this thread runs
    /// after this one, if that is known.
    void (*varlen_delta)(const VarlenBackwardParams&, int64_t begin, int64_t end);
    void (*varlen_backward)(const VarlenBackwardParams&, const BackwardItem&, const BackwardItem* next);
    BackwardSpace (*backward_space)(const VarlenParams&, int64_t queries);
    /// Experts: the products of an item, with the activated panels between them.
    int64_t (*expert_panel_bytes)(const ExpertParams&, const ExpertItem&);
    void (*expert_up)(const ExpertParams&, const ExpertItem&, char* activated);
    void (*expert_down)(const ExpertParams&, const ExpertItem&, char* activated);
    void (*grouped_mm)(const GroupedParams&, const ExpertItem&);
    /// The same backward: gradients before the activation in panels, then those of x in rows.
    int64_t (*expert_dpre_bytes)(const ExpertParams&, const ExpertItem&);
    void (*expert_backward_up)(const ExpertParams&, const ExpertItem&, char* dpre);
    void (*expert_backward_down)(const ExpertParams&, const ExpertItem&, char* dpre);
    /// All rows of an expert, or none: then zeros.
    void (*grouped_outer)(const OuterParams&, const ExpertItem&);
    void (*expert_sum_rows)(const OuterParams&, const ExpertItem&);
    /// Rows [begin, end), tokens for the last two.
    void (*expert_gather)(const PairRowsParams&, int64_t begin, int64_t end);
    void (*expert_combine)(const PairRowsParams&, int64_t begin, int64_t end);
    void (*expert_dot)(const PairRowsParams&, int64_t begin, int64_t end);
    /// Rows [begin, end) of logits.
    void (*softmax_sums)(const CrossEntropyParams&, int64_t begin, int64_t end);
    void (*softmax_gradient)(const CrossEntropyParams&, int64_t begin, int64_t end);
};

/// The best table that this machine can run, not above GAPLESS_ISA (baseline, avx2, avx512, avx512_bf16, amx)
/// or torch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) where the environment sets them. Chosen once.
const Kernels& kernels();

}  // namespace gapless::cpu
