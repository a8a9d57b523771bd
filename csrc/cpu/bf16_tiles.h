// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 where the machine has instructions for them, and how their operands are packed.
#pragma once

#include "csrc/cpu/panels.h"

#if defined(__AMX_BF16__)
#include "csrc/cpu/amx_tiles.h"
#elif defined(__AVX512BF16__)
#include "csrc/cpu/dot_tiles.h"
#endif

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// What products without tile registers take hold of.
struct NoTiles {
    NoTiles() {}
};

#if defined(__AVX512BF16__)

/// 16 pairs of a row of `width` values from `at` on, zeros beyond its end.
GAPLESS_INLINE __m512i load_pairs(const bf16* row, int64_t at, int64_t width) {
    const int64_t left = width - at;
    const __mmask32 mask = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
    return _mm512_maskz_loadu_epi16(mask, row + at);
}

/// A operand: rows as they are, [count][round_up(width, 32)].
inline void pack_rows(const bf16* const* rows, int64_t count, int64_t width, bf16* to) {
    const int64_t stride = round_up(width, kTileDepth);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t at = 0; at < width; at += kTileDepth)
            _mm512_storeu_si512(to + i * stride + at, load_pairs(rows[i], at, width));
}

/// B operand with the rows in the lanes: [round_up(width, 32) / 2][lanes], zeros in lanes from `count` on.
inline void pack_lanes(const bf16* const* rows, int64_t count, int64_t width, uint32_t* to, int64_t lanes) {
    for (int64_t lane = 0; lane < lanes; lane += kTile)
        for (int64_t at = 0; at < width; at += kTileDepth) {
            Vec<float> x[kTile];
            for (int i = 0; i < kTile; ++i)
                x[i] = lane + i < count ? (Vec<float>)load_pairs(rows[lane + i], at, width) : Vec<float>{};
            transpose<float>(x);
            for (int i = 0; i < kTile; ++i)
                store(reinterpret_cast<float*>(to) + (at / 2 + i) * lanes + lane, x[i]);
        }
}

/// Pairs of two rows: lane d holds a[d] and b[d].
GAPLESS_INLINE __m512i pair_rows(const bf16* a, const bf16* b, int64_t at, int64_t width) {
    const int64_t left = width - at;
    const __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1 << left) - 1);
    const __m256i low = a ? _mm256_maskz_loadu_epi16(mask, a + at) : _mm256_setzero_si256();
    const __m256i high = b ? _mm256_maskz_loadu_epi16(mask, b + at) : _mm256_setzero_si256();
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/// B operand with the rows along the sum: [lanes / 2][round_up(width, 16)], zeros for rows from `count` on.
inline void pack_pairs(const bf16* const* rows, int64_t count, int64_t width, uint32_t* to, int64_t lanes) {
    const int64_t stride = round_up(width, kTile);
    for (int64_t i = 0; i < lanes; i += 2)
        for (int64_t at = 0; at < width; at += kTile)
            _mm512_storeu_si512(
                to + i / 2 * stride + at,
                pair_rows(i < count ? rows[i] : nullptr, i + 1 < count ? rows[i + 1] : nullptr, at, width));
}

/// A operand with the rows along the sum, zeros up to round_up(count, 32): 32 of them for each of
/// round_up(width, 16) columns, `stride` apart, then the next 32, `step` from the first.
inline void pack_columns(const bf16* const* rows, int64_t count, int64_t width, bf16* to, int64_t stride,
                         int64_t step) {
    for (int64_t i = 0; i < count; i += kTileDepth, to += step)
        for (int64_t at = 0; at < width; at += kTile) {
            Vec<float> x[kTile];
            for (int j = 0; j < kTile; ++j) {
                const int64_t r = i + 2 * j;
                x[j] = (Vec<float>)pair_rows(r < count ? rows[r] : nullptr,
                                             r + 1 < count ? rows[r + 1] : nullptr, at, width);
            }
            transpose<float>(x);
            for (int j = 0; j < kTile; ++j) std::memcpy(to + (at + j) * stride, &x[j], 64);
        }
}

/// Two rows of values, rounded (ties upwards, where the cut-off half decides), as pairs.
GAPLESS_INLINE __m512i round_pairs(Vec<float> even, Vec<float> odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
    const __m512i high = _mm512_add_epi32((__m512i)odd, half);
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(int(0xffff0000)),
                                     0xf8);  // low | (high & mask)
}

#endif

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
