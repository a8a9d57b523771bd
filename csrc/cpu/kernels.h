// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels, one for each instruction set that they are compiled for.
#pragma once

#include "csrc/common/varlen_params.h"

namespace gapless::cpu {

struct Kernels {
    const char* isa;
    /// One item of attention forward.
    void (*varlen_forward)(const VarlenParams&, const ForwardItem&);
    void (*varlen_merge)(const VarlenParams&, const MergeItem&);
    /// Attention backward: delta for tokens [begin, end), then the items. `next` is what this thread runs
    /// after this one, if that is known.
    void (*varlen_delta)(const VarlenBackwardParams&, int64_t begin, int64_t end);
    void (*varlen_backward)(const VarlenBackwardParams&, const BackwardItem&, const BackwardItem* next);
    /// Most rows of a block, which is the unit of BackwardItem::turn.
    int64_t backward_block_rows;
};

/// The best table that this machine can run, not above GAPLESS_ISA (baseline, avx2, avx512, amx) or torch's
/// own ATEN_CPU_CAPABILITY (default, avx2, avx512) where the environment sets them. Chosen once.
const Kernels& kernels();

}  // namespace gapless::cpu
