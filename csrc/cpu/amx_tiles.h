// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 on AMX tile registers: 16 x 16 blocks of float sums, 32 terms at a time. Rows of A and
// C are padded to whole tiles.
#pragma once

#include "csrc/cpu/tile_product.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

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

constexpr int64_t kFewLanes = 0;  // a tile of a few lanes is as good as any other way
constexpr int64_t kStepProducts = 4 * kTile * kTileDepth;  // made while one line ahead is asked for

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

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
