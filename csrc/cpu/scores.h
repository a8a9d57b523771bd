// SPDX-License-Identifier: Apache-2.0
// From dot products to scores: softcap, ALiBi and the mask, for a strip of rows in its lanes.
#pragma once

#include "csrc/cpu/panels.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// What a dot product is multiplied by: to a score, or to what the softcap takes.
inline double score_factor(const VarlenParams& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale; }

/// Per-lane facts of a strip of rows.
template <class T>
struct Lanes {
    using I = typename IntOf<T>::type;
    I *begin, *end, *position;  // keys seen are [begin, end)
    T* slope;                   // of ALiBi

    template <class Carver>
    void carve(Carver& c, int64_t rows) {
        begin = c.template take<I>(rows), end = c.template take<I>(rows), position = c.template take<I>(rows);
        slope = c.template take<T>(rows);
    }

    void fill(const VarlenParams& p, const RowMap& map, int64_t sequence, int64_t kv_head, int64_t row,
              int64_t rows, int64_t lanes) {
        const float* slopes =
            p.alibi_slopes ? p.alibi_slopes + sequence * p.alibi_batch_stride + kv_head * map.group : nullptr;
        map.each(row, row + rows, [&](int64_t i, int64_t query, int64_t member) {
            const int64_t at = map.position_of(query);
            begin[i] = I(map.begin_at(at)), end[i] = I(map.end_at(at)), position[i] = I(at);
            slope[i] = slopes ? T(slopes[member]) : T(0);
        });
        for (int64_t i = rows; i < lanes; ++i) begin[i] = end[i] = position[i] = 0, slope[i] = 0;
    }
};

/// Scores from scaled dot products. `*tangent` is tanh, if there is a cap.
template <class T>
GAPLESS_INLINE Vec<T> modify_score(Vec<T> s, Vec<T> slope, Vec<T> distance, T cap, Vec<T>* tangent) {
    if (cap > 0) {
        *tangent = vtanh(s);
        s = *tangent * cap;
    }
    return s - slope * (distance < 0 ? -distance : distance);
}

/// Those of key `key` against one vector of rows.
template <class T>
GAPLESS_INLINE Vec<T> modify_score(Vec<T> s, const Lanes<T>& lanes, int64_t lane, int64_t key, T cap,
                                   Vec<T>* tangent) {
    const auto distance = load(lanes.position + lane) - typename Lanes<T>::I(key);
    return modify_score<T>(s, load(lanes.slope + lane), __builtin_convertvector(distance, Vec<T>), cap,
                           tangent);
}

template <class T>
GAPLESS_INLINE IVec<T> sees(const Lanes<T>& lanes, int64_t lane, int64_t key) {
    const auto k = typename Lanes<T>::I(key);
    return (load(lanes.begin + lane) <= k) & (load(lanes.end + lane) > k);
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
