// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 on vectors of pairs: each instruction adds two terms to every lane's float sum.
#pragma once

#include "csrc/cpu/register_blocks.h"
#include "csrc/cpu/tile_product.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// No tile registers here.
struct Tiles {
    Tiles() {}
};

template <int kRows, int kVecs, bool kAhead>
GAPLESS_INLINE void dot_block(const TileProduct& p, int64_t m, int64_t n, const char* const* lines) {
    __m512 acc[kRows][kVecs] = {};
    const uint32_t* b = p.b + n;
    for (int64_t k = 0; k < p.depth; k += kTileDepth) {
        const bf16* a = (p.steps ? p.steps[k / kTileDepth] : p.a + k) + m * p.a_row;
        for (int64_t i = 0; i < kTileDepth; i += 2, b += p.b_row) {
            if constexpr (kAhead) p.ahead->touch_at(lines, (k + i) / 2);
            __m512bh row[kVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + v * kTile);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                int pair;
                std::memcpy(&pair, a + r * p.a_row + i, sizeof(pair));
                const __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], s, row[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
            float* c = p.c + (m + r) * p.c_row + n + v * kTile;
            if (p.add) acc[r][v] = _mm512_add_ps(acc[r][v], _mm512_loadu_ps(c));
            _mm512_storeu_ps(c, acc[r][v]);
        }
}

constexpr int64_t kFewLanes = 12;  // of which another way is better, as most of a vector would be empty
/// Products made while one line ahead is asked for.
constexpr int64_t kStepProducts = kRegisterRows[kMaxVecs] * kMaxVecs * kTile * 2;

template <int kVecs>
void dot_column(const TileProduct& p, int64_t n) {
    in_rows<kVecs>(p.rows, [&]<int kRows>(int64_t m) __attribute__((always_inline)) {
        if (const char* const* lines = p.ahead ? p.ahead->take(p.depth / 2) : nullptr)
            dot_block<kRows, kVecs, true>(p, m, n, lines);
        else
            dot_block<kRows, kVecs, false>(p, m, n, nullptr);
    });
}

inline void multiply(const TileProduct& p) {
    in_columns(p.lanes / kTile, [&]<int kVecs>(int64_t vec) { dot_column<kVecs>(p, vec * kTile); });
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
