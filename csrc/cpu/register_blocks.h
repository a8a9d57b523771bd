// SPDX-License-Identifier: Apache-2.0
// How a matrix of sums is cut into blocks that stay in registers.
#pragma once

#include "csrc/cpu/simd.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

// Accumulators + one row of B + the broadcast have to fit the register file: 32 registers with AVX-512, 16
// before. Eight rows divide the usual head dims and tiles of keys; a taller block would leave a ragged rest.
#if defined(__AVX512F__)
constexpr int kMaxVecs = 4;
constexpr int kRegisterRows[kMaxVecs + 1] = {0, 16, 12, 8, 6};
#else
constexpr int kMaxVecs = 2;
constexpr int kRegisterRows[kMaxVecs + 1] = {0, 8, 6};
#endif

/// Calls f.operator()<rows of a block>(first row) for blocks of kVecs vectors.
template <int kVecs, class F>
GAPLESS_INLINE void in_rows(int64_t rows, const F& f) {
    constexpr int kRows = kRegisterRows[kVecs];
    int64_t m = 0;
    for (; rows - m >= kRows; m += kRows) f.template operator()<kRows>(m);
    if constexpr (kRows > 8)
        if (rows - m >= 8) f.template operator()<8>(m), m += 8;
    if constexpr (kRows > 4)
        if (rows - m >= 4) f.template operator()<4>(m), m += 4;
    if (rows - m >= 2) f.template operator()<2>(m), m += 2;
    if (rows - m >= 1) f.template operator()<1>(m);
}

/// Calls f.operator()<vectors of a block>(first vector). Widths that kMaxVecs does not divide are split as
/// evenly as can be.
template <class F>
GAPLESS_INLINE void in_columns(int64_t vecs, const F& f) {
    for (int64_t vec = 0; vec < vecs;) {
        const int64_t left = vecs - vec, columns = (left + kMaxVecs - 1) / kMaxVecs;
        const int64_t width = (left + columns - 1) / columns;
        if constexpr (kMaxVecs >= 3)
            if (width == 3) f.template operator()<3>(vec);
        if constexpr (kMaxVecs >= 4)
            if (width == 4) f.template operator()<4>(vec);
        if (width == 2) f.template operator()<2>(vec);
        if (width == 1) f.template operator()<1>(vec);
        vec += width;
    }
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
