// SPDX-License-Identifier: Apache-2.0
// A row of the result from its parts, each over some of the keys: [dim_v] of outputs before division, then
// the maximum of its scores and the sum of its exponentials.
#pragma once

#include "csrc/cpu/panels.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// Parts in their order, `stride` numbers apart.
template <class E, class T = typename Compute<E>::type>
void merge_row(const VarlenParams& p, const T* part, int64_t parts, int64_t stride, int64_t token,
               int64_t head) {
    T top = -kInfinity<T>;
    for (int64_t i = 0; i < parts; ++i)
        top = part[i * stride + p.dim_v] > top ? part[i * stride + p.dim_v] : top;
    const T base = top == -kInfinity<T> ? T(0) : top;
    T sum = 0;
    T row[256] = {};
    for (int64_t i = 0; i < parts; ++i, part += stride) {
        const T weight = vexp(splat(part[p.dim_v] - base))[0];
        sum += part[p.dim_v + 1] * weight;
        for (int64_t d = 0; d < p.dim_v; ++d) row[d] += part[d] * weight;
    }
    E* out = static_cast<E*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride;
    for (int64_t d = 0; d < p.dim_v; ++d) narrow(sum == T(0) ? T(0) : row[d] / sum, out + d);
    static_cast<T*>(p.lse)[head * p.total_q + token] =
        sum == T(0) ? -kInfinity<T> : top + vlog(splat(sum))[0];
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
