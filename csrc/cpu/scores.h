// SPDX-License-Identifier: Apache-2.0
// From dot products to scores: softcap, ALiBi and the mask, for a strip of rows in its lanes.
#pragma once

#include "csrc/cpu/panels.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// What a dot product is multiplied by: to a score, or to what the softcap takes.
inline double score_factor(const VarlenParams& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale; }

template <class T>
GAPLESS_INLINE Vec<T> distance_of(IVec<T> difference) {
    const Vec<T> d = __builtin_convertvector(difference, Vec<T>);
    return d < 0 ? -d : d;
}

/// Per-lane facts of a strip of rows.
template <class T>
struct Lanes {
    using I = typename IntOf<T>::type;
    I *begin, *end;     // keys seen are [begin, end)
    I* query;           // within its block
    I* position;        // among the keys, or where they begin or end
    T *beyond, *slope;  // of ALiBi: how far a row lies from there, and its slope
    bool any_beyond;

    template <class Carver>
    void carve(Carver& c, int64_t rows) {
        begin = c.template take<I>(rows), end = c.template take<I>(rows), position = c.template take<I>(rows);
        query = c.template take<I>(rows), beyond = c.template take<T>(rows), slope = c.template take<T>(rows);
    }

    void fill(const VarlenParams& p, const RowMap& map, int64_t sequence, int64_t bundle, int64_t row,
              int64_t rows, int64_t lanes) {
        const float* slopes =
            p.alibi_slopes ? p.alibi_slopes + sequence * p.alibi_batch_stride + bundle * map.group : nullptr;
        const int64_t block = p.blocks ? p.blocks->block_q : 1;
        any_beyond = false;
        map.each(row, row + rows, [&](int64_t i, int64_t at, int64_t member) {
            const int64_t p = map.position_of(at), near = map.nearest(p);
            begin[i] = I(map.begin_at(p)), end[i] = I(map.end_at(p)), position[i] = I(near);
            beyond[i] = T(p < near ? near - p : p - near), any_beyond |= p != near;
            query[i] = I(at % block), slope[i] = slopes ? T(slopes[member]) : T(0);
        });
        for (int64_t i = rows; i < lanes; ++i)
            begin[i] = end[i] = position[i] = query[i] = 0, beyond[i] = slope[i] = 0;
    }

    Vec<T> distance(int64_t lane, int64_t key) const {
        const Vec<T> d = distance_of<T>(load(position + lane) - I(key));
        return any_beyond ? d + load(beyond + lane) : d;
    }
};

/// Scores from scaled dot products. `*tangent` is tanh, if there is a cap.
template <class T>
GAPLESS_INLINE Vec<T> modify_score(Vec<T> s, Vec<T> slope, Vec<T> distance, T cap, Vec<T>* tangent) {
    if (cap > 0) {
        *tangent = vtanh(s);
        s = *tangent * cap;
    }
    return s - slope * distance;
}

/// Those of key `key` against one vector of rows.
template <class T>
GAPLESS_INLINE Vec<T> modify_score(Vec<T> s, const Lanes<T>& lanes, int64_t lane, int64_t key, T cap,
                                   Vec<T>* tangent) {
    return modify_score<T>(s, load(lanes.slope + lane), lanes.distance(lane, key), cap, tangent);
}

/// Which rows see a key; `bits` are its words in the block's pattern, or null.
template <class T>
GAPLESS_INLINE IVec<T> sees(const Lanes<T>& lanes, int64_t lane, int64_t key, const uint32_t* bits) {
    using I = typename Lanes<T>::I;
    IVec<T> seen = (load(lanes.begin + lane) <= I(key)) & (load(lanes.end + lane) > I(key));
    if (bits)
        for (int l = 0; l < kLanes<T>; ++l) {
            const I query = lanes.query[lane + l];
            seen[l] &= -I(bits[query / 32] >> (query % 32) & 1);
        }
    return seen;
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
