// SPDX-License-Identifier: Apache-2.0
// What a product of bfloat16 is asked for. An A operand is rows of bfloat16; a B operand has pairs: its row i
// holds terms 2i and 2i + 1 of each lane, side by side in 32 bits. Lanes come in tiles of 16, terms in runs
// of 32, padded with zeros along the sum.
#pragma once

#include "csrc/cpu/ahead.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kTile = 16, kTileDepth = 32;

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

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
