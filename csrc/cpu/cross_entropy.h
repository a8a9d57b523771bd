// SPDX-License-Identifier: Apache-2.0
// Drivers of the cross-entropy kernels: rows of logits handed to threads. Results do not depend on how many.
#pragma once

#include "csrc/common/cross_entropy_params.h"
#include "csrc/cpu/varlen.h"

namespace gapless::cpu {

void cross_entropy_forward(const CrossEntropyParams& p, const Threads& threads);
void cross_entropy_backward(const CrossEntropyParams& p, const Threads& threads);

}  // namespace gapless::cpu
