// SPDX-License-Identifier: Apache-2.0
// Rows of q, k, v and out, in memory's type and strides, to and from the panels that matrix multiplications
// read.
#pragma once

#include "csrc/cpu/simd.h"
#include "csrc/cpu/visibility.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

template <class E>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};

/// Calls f.operator()<E>() with the C++ type of dtype.
template <class F>
GAPLESS_INLINE void by_dtype(DType dtype, const F& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f.template operator()<float>();
        case DType::kBFloat16:
            return f.template operator()<bf16>();
        case DType::kFloat16:
            return f.template operator()<f16>();
        case DType::kFloat64:
            return f.template operator()<double>();
    }
}

/// Width rounded up to whole vectors.
template <class T>
GAPLESS_INLINE int64_t padded(int64_t width) {
    return (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

/// Vector `at` of a row of `width` values, widened; zeros beyond the row's end, which is not read.
template <class E, class T = typename Compute<E>::type>
GAPLESS_INLINE Vec<T> load_row(const E* row, int64_t at, int64_t width) {
    if (at + kLanes<T> <= width) return load_wide(row + at);
    E tail[kLanes<T>] = {};
    std::memcpy(tail, row + at, (width - at) * sizeof(E));
    return load_wide(tail);
}

template <class E, class T = typename Compute<E>::type>
GAPLESS_INLINE void store_row(E* row, int64_t at, int64_t width, Vec<T> x) {
    if (at + kLanes<T> <= width) return store_narrow(row + at, x);
    E tail[kLanes<T>];
    store_narrow(tail, x);
    std::memcpy(row + at, tail, (width - at) * sizeof(E));
}

template <class E, class T = typename Compute<E>::type>
void copy_row(const E* from, T* to, int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes<T>) store(to + i, load_row(from, i, width));
}

/// One square of transpose_rows: vectors of kLanes whole rows become the same columns of a panel.
template <class E, class T>
__attribute__((noinline)) void transpose_square(const E* const* rows, int64_t at, T factor, T* panel,
                                                int64_t panel_row) {
    constexpr int w = kLanes<T>;
    Vec<T> x[w];
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) x[i] = load_wide(rows[i] + at) * factor;
    transpose<T>(x);
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) store(panel + i * panel_row, x[i]);
}

/// panel[i][lane] = factor * rows[lane][i] for lanes [0, count), zeros for the rest of the last vector.
template <class E, class T = typename Compute<E>::type>
void transpose_rows(const E* const* rows, int64_t count, int64_t width, T factor, T* panel,
                    int64_t panel_row) {
    constexpr int w = kLanes<T>;
    for (int64_t lane = 0; lane < count; lane += w) {
        const int64_t whole = lane + w <= count ? width / w * w : 0;
        for (int64_t at = 0; at < whole; at += w)
            transpose_square(rows + lane, at, factor, panel + at * panel_row + lane, panel_row);
        for (int64_t at = whole; at < width; at += w) {
            Vec<T> x[w];
            for (int i = 0; i < w; ++i)
                x[i] = lane + i < count ? load_row(rows[lane + i], at, width) * factor : Vec<T>{};
            transpose<T>(x);
            for (int i = 0; i < least(w, width - at); ++i) store(panel + (at + i) * panel_row + lane, x[i]);
        }
    }
}

/// One square of untranspose_rows.
template <class E, class T>
__attribute__((noinline)) void untranspose_square(const T* panel, int64_t panel_row, Vec<T> factor,
                                                  E* const* rows, int64_t at) {
    constexpr int w = kLanes<T>;
    Vec<T> x[w];
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) x[i] = load(panel + i * panel_row) * factor;
    transpose<T>(x);
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) store_narrow(rows[i] + at, x[i]);
}

/// rows[lane][i] = panel[i][lane] * factor[lane], rounded to memory's type.
template <class E, class T = typename Compute<E>::type>
void untranspose_rows(const T* panel, int64_t panel_row, const T* factor, E* const* rows, int64_t count,
                      int64_t width) {
    constexpr int w = kLanes<T>;
    for (int64_t lane = 0; lane < count; lane += w) {
        const Vec<T> scale = load(factor + lane);
        const int64_t whole = lane + w <= count ? width / w * w : 0;
        for (int64_t at = 0; at < whole; at += w)
            untranspose_square(panel + at * panel_row + lane, panel_row, scale, rows + lane, at);
        for (int64_t at = whole; at < width; at += w) {
            Vec<T> x[w];
            for (int i = 0; i < w; ++i)
                x[i] = at + i < width ? load(panel + (at + i) * panel_row + lane) * scale : Vec<T>{};
            transpose<T>(x);
            for (int i = 0; i < least(w, count - lane); ++i) store_row(rows[lane + i], at, width, x[i]);
        }
    }
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
