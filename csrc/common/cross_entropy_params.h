// SPDX-License-Identifier: Apache-2.0
// What a cross-entropy kernel is told of some columns of the logits. Plain data: no torch, no ownership.
#pragma once

#include <cstdint>

#include "csrc/common/expert_params.h"

namespace gapless {

/// Logits of all rows and of classes [first, first + columns). "Wide" is float, or double for kFloat64.
struct CrossEntropyParams {
    DType dtype;  ///< of logits, bias and gradients
    int64_t rows, columns, first;
    RowMatrix logits;
    const void* bias;        ///< [columns], or null
    double softcap;          ///< 0: none
    const int64_t* targets;  ///< [rows]: a class, or below 0: the row is not read, its gradients are 0

    /// Forward: [4][rows], wide: maximum, sum of exp(logit - maximum), the target's logit, sum of all logits;
    /// taken up from `before`, which may be the same memory.
    const void* before;
    void* after;
    bool total;  ///< the last of the four is wanted

    /// Backward: [4][rows], wide: LSE, and what the softmax, the target and every class are multiplied by.
    const void* factors;
    RowMatrix out;   ///< [rows][columns]; may be the logits
    void* sideways;  ///< the same, [columns][rows], or null
    int64_t sideways_row;
};

}  // namespace gapless
