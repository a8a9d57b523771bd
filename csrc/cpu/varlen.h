// SPDX-License-Identifier: Apache-2.0
// Varlen attention on the CPU: checks the plan, cuts it into work items and runs them. Knows no torch.
#pragma once

#include <cstdint>
#include <functional>

#include "csrc/common/varlen_params.h"

namespace gapless::cpu {

/// Some pool of threads. `run` calls its argument once on each of them, and waits.
struct Threads {
    int64_t count;
    std::function<void(const std::function<void()>&)> run;
};

/// The plan's tiles, and the sizes that its numbers are checked against; kernels trust them afterwards.
struct VarlenSizes {
    int64_t batch, total_q, total_k, pages;
    const int32_t *query_tiles, *key_tiles;
    int64_t query_tile_count, key_tile_count;
};

/// Throws std::runtime_error if the plan, the lengths or the pages point outside of the tensors.
void check_varlen(const VarlenParams& p, const VarlenSizes& sizes);

void varlen_forward(const VarlenParams& p, const VarlenSizes& sizes, const Threads& threads);

/// Fills delta, dq, dk and dv, and dsinks [heads] if there are sinks.
void varlen_backward(const VarlenBackwardParams& b, const VarlenSizes& sizes, double* dsinks,
                     const Threads& threads);

}  // namespace gapless::cpu
