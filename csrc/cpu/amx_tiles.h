// SPDX-License-Identifier: Apache-2.0
// bfloat16 products on AMX tile registers: 16 x 16 blocks of float sums, 32 terms at a time. An A operand is
// rows of bfloat16; a B operand has pairs: its row i holds terms 2i and 2i + 1 of each lane, side by side in
// 32 bits. All sizes are padded to whole tiles, with zeros along the sum.
#pragma once

#include "csrc/cpu/ahead.h"
#include "csrc/cpu/panels.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// What products without tile registers take hold of.
struct NoTiles {
    NoTiles() {}
};

#if defined(__AMX_BF16__)

constexpr int64_t kTile = 16, kTileDepth = 32;

/// Tile registers in use by this thread, all of full size.
class Tiles {
  public:
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
};

/// C[m][lane] (+)= sum over `depth` terms, for `rows` x `lanes`. Strides count elements: bfloat16, pairs,
/// float.
struct TileProduct {
    const bf16* a;
    int64_t a_row;
    const uint32_t* b;
    int64_t b_row;
    float* c;
    int64_t c_row;
    int64_t rows, lanes, depth;
    bool add;
    Ahead* ahead = nullptr;              // what to bring near meanwhile
    const bf16* const* steps = nullptr;  // where each run of 32 terms of a begins, if not after the last one
};

template <int kRows, int kLanes_>
GAPLESS_INLINE void tile_block(const TileProduct& p, int64_t m, int64_t n) {
    const char* a = reinterpret_cast<const char*>(p.a + m * p.a_row);
    const char* b = reinterpret_cast<const char*>(p.b + n);
    float* c = p.c + m * p.c_row + n;
    float* c2 = c + kTile * p.c_row;
    const int64_t a_stride = p.a_row * 2, b_stride = p.b_row * 4, c_stride = p.c_row * 4;
    if (p.add) {
        _tile_loadd(0, c, c_stride);
        if constexpr (kLanes_ > 1) _tile_loadd(1, c + kTile, c_stride);
        if constexpr (kRows > 1) _tile_loadd(2, c2, c_stride);
        if constexpr (kRows > 1 && kLanes_ > 1) _tile_loadd(3, c2 + kTile, c_stride);
    } else {
        _tile_zero(0);
        if constexpr (kLanes_ > 1) _tile_zero(1);
        if constexpr (kRows > 1) _tile_zero(2);
        if constexpr (kRows > 1 && kLanes_ > 1) _tile_zero(3);
    }
    for (int64_t k = 0; k < p.depth; k += kTileDepth, a += 64, b += kTile * b_stride) {
        if (p.steps) a = reinterpret_cast<const char*>(p.steps[k / kTileDepth] + m * p.a_row);
        if (p.ahead) p.ahead->touch_next(kTile);
        _tile_loadd(4, a, a_stride);
        _tile_loadd(6, b, b_stride);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kLanes_ > 1) {
            _tile_loadd(7, b + 64, b_stride);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kRows > 1) {
            _tile_loadd(5, a + kTile * a_stride, a_stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kRows > 1 && kLanes_ > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride);
    if constexpr (kLanes_ > 1) _tile_stored(1, c + kTile, c_stride);
    if constexpr (kRows > 1) _tile_stored(2, c2, c_stride);
    if constexpr (kRows > 1 && kLanes_ > 1) _tile_stored(3, c2 + kTile, c_stride);
}

/// Steps in which so many products are made, and lines ahead asked for.
constexpr int64_t tile_steps(int64_t products) { return products / (4 * kTile * kTileDepth); }

__attribute__((noinline)) inline void multiply(const TileProduct& p) {
    asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
    for (int64_t m = 0; m < p.rows; m += 2 * kTile)
        for (int64_t n = 0; n < p.lanes; n += 2 * kTile) {
            const bool two_rows = m + kTile < p.rows, two_lanes = n + kTile < p.lanes;
            if (two_rows && two_lanes)
                tile_block<2, 2>(p, m, n);
            else if (two_rows)
                tile_block<2, 1>(p, m, n);
            else if (two_lanes)
                tile_block<1, 2>(p, m, n);
            else
                tile_block<1, 1>(p, m, n);
        }
    asm volatile("" ::: "memory");
}

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
