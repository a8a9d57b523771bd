// SPDX-License-Identifier: Apache-2.0
// The one matrix multiplication that every kernel is made of: C[m][lane] (+)= sum_k A(m, k) * B[k][lane].
// B and C are rows of vectors; A is read one scalar at a time and broadcast, so any strides will do and
// nothing has to be transposed. Blocks of C stay in registers for the whole sum.
#pragma once

#include "csrc/cpu/ahead.h"
#include "csrc/cpu/register_blocks.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// What C holds before the sum is added: nothing, itself, or itself times one factor per lane.
enum class Init { kZero, kAdd, kScale };

template <class T>
struct Gemm {
    const T* a;
    int64_t a_row, a_col;  // strides of m and k
    const T* b;
    int64_t b_row;
    T* c;
    int64_t c_row;
    int64_t depth;                   // number of k
    const T* lane_factor = nullptr;  // for Init::kScale
    Ahead* ahead = nullptr;          // what to bring near meanwhile
};

template <class T, int kRows, int kVecs, Init kInit, bool kAhead>
GAPLESS_INLINE void register_block(const Gemm<T>& g, const T* a, const T* b, T* c, const T* factor,
                                   const char* const* lines) {
    constexpr int w = kLanes<T>;
    Vec<T> acc[kRows][kVecs] = {};
    for (int64_t k = 0; k < g.depth; ++k, a += g.a_col, b += g.b_row) {
        if constexpr (kAhead) g.ahead->touch_at(lines, k);
        Vec<T> row[kVecs];
#pragma GCC unroll 4
        for (int n = 0; n < kVecs; ++n) row[n] = load(b + n * w);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const Vec<T> s = splat(a[m * g.a_row]);
#pragma GCC unroll 4
            for (int n = 0; n < kVecs; ++n) acc[m][n] += s * row[n];
        }
    }
    // What C held joins at the end: a long chain of sums keeps more bits if it starts at 0.
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < kVecs; ++n) {
            T* to = c + m * g.c_row + n * w;
            if constexpr (kInit == Init::kAdd) acc[m][n] += load(to);
            if constexpr (kInit == Init::kScale) acc[m][n] += load(to) * load(factor + n * w);
            store(to, acc[m][n]);
        }
}

template <class T, int kVecs, Init kInit>
void column(const Gemm<T>& g, int64_t rows, int64_t vec) {
    constexpr int w = kLanes<T>;
    const T* b = g.b + vec * w;
    const T* factor = kInit == Init::kScale ? g.lane_factor + vec * w : nullptr;
    in_rows<kVecs>(rows, [&]<int kRows>(int64_t m) __attribute__((always_inline)) {
        const T* a = g.a + m * g.a_row;
        T* c = g.c + m * g.c_row + vec * w;
        if (const char* const* lines = g.ahead ? g.ahead->take(g.depth) : nullptr)
            register_block<T, kRows, kVecs, kInit, true>(g, a, b, c, factor, lines);
        else
            register_block<T, kRows, kVecs, kInit, false>(g, a, b, c, factor, nullptr);
    });
}

/// Steps in which so many products are made, and lines ahead asked for.
template <class T>
constexpr int64_t gemm_steps(int64_t products) {
    return products / (kRegisterRows[kMaxVecs] * kMaxVecs * kLanes<T>);
}

/// C over `rows` x `vecs` vectors.
template <Init kInit, class T>
void gemm(const Gemm<T>& g, int64_t rows, int64_t vecs) {
    in_columns(vecs, [&]<int kVecs>(int64_t vec) { column<T, kVecs, kInit>(g, rows, vec); });
}

/// The same with the sum cut into runs of `longest` terms: one long chain of additions would lose bits.
template <Init kInit, class T>
void gemm_in_runs(Gemm<T> g, int64_t longest, int64_t rows, int64_t vecs) {
    const int64_t depth = g.depth;
    for (int64_t k = 0; k < depth; k += longest) {
        g.depth = depth - k < longest ? depth - k : longest;
        if (k == 0)
            gemm<kInit>(g, rows, vecs);
        else
            gemm<Init::kAdd>(g, rows, vecs);
        g.a += g.a_col * g.depth, g.b += g.b_row * g.depth;
    }
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
