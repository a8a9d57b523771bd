// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/cross_entropy.h"

#include <algorithm>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/work.h"

namespace gapless::cpu {
namespace {

constexpr int64_t kRowsOfItem = 32;

void by_rows(void (*run)(const CrossEntropyParams&, int64_t, int64_t), const CrossEntropyParams& p,
             const Threads& threads) {
    in_order((p.rows + kRowsOfItem - 1) / kRowsOfItem, enough_threads(p.rows * p.columns, threads),
             [&](int64_t i) { run(p, i * kRowsOfItem, std::min(p.rows, (i + 1) * kRowsOfItem)); });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& p, const Threads& threads) {
    by_rows(kernels().softmax_sums, p, threads);
}

void cross_entropy_backward(const CrossEntropyParams& p, const Threads& threads) {
    by_rows(kernels().softmax_gradient, p, threads);
}

}  // namespace gapless::cpu
