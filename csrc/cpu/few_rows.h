// SPDX-License-Identifier: Apache-2.0
// Attention forward of a few rows, as in decoding. Here head dims lie in the lanes, for both products: keys
// and values are read once, where they lie, and no lane is left empty. The scores of a row lie along the
// keys.
#pragma once

#include "csrc/cpu/ahead.h"
#include "csrc/cpu/key_rows.h"
#include "csrc/cpu/merge_parts.h"
#include "csrc/cpu/scores.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kFewRows = 8;

/// Sums of x[0], ..., x[kLanes - 1], each over its lanes, in the lanes of one vector; x comes in runs that
/// fill 16 bytes, which add_in_lanes() folds.
template <class T>
GAPLESS_INLINE Vec<T> add_in_lanes(const Vec<T>* x) {
    const auto pair = [](Vec<T> a, Vec<T> b) { return interleave<0, T>(a, b) + interleave<1, T>(a, b); };
    if constexpr (sizeof(T) == 8)
        return pair(x[0], x[1]);
    else
        return pair(pair(x[0], x[2]), pair(x[1], x[3]));
}
template <class T>
GAPLESS_INLINE Vec<T> add_lanes(const Vec<T>* x) {
    constexpr int n = kVectorBytes / kLaneBytes;
    if constexpr (n == 1) return x[0];
    if constexpr (n == 2) return gather_lanes<0, 1, T>(x[0], x[1]) + gather_lanes<1, 1, T>(x[0], x[1]);
    if constexpr (n == 4) {
        const auto halves = [](Vec<T> a, Vec<T> b) {
            return gather_lanes<0, 1, T>(a, b) + gather_lanes<2, 1, T>(a, b);
        };
        const Vec<T> a = halves(x[0], x[1]), b = halves(x[2], x[3]);
        return gather_lanes<0, 2, T>(a, b) + gather_lanes<1, 2, T>(a, b);
    }
}

template <class E>
class FewRows {
  public:
    using T = typename Compute<E>::type;

    FewRows(const VarlenParams& p, const ForwardItem& item)
        : p(p),
          item(item),
          keys(p, p.tiles[3 * item.tile]),
          dim(padded<T>(p.dim)),
          dim_v(padded<T>(p.dim_v)) {
        const int32_t* tile = p.tiles + 3 * item.tile;
        const int32_t* cu_q = p.cu_seqlens_q + tile[0];
        first_token = cu_q[0];
        map = {p.heads / p.kv_heads, p.first_position(keys.sequence, cu_q[1] - cu_q[0], keys.length),
               keys.length, p.left, p.right};
        row_begin = tile[1] * map.group, rows = (tile[2] - tile[1]) * map.group;
    }

    void run() {
        carve_scratch([this](Carver& c) { carve(c); });
        begin = most(item.key_begin, map.begin(row_begin));
        end = least(item.key_end, map.end(row_begin + rows - 1));
        const int32_t first = item.bundle, last = first + item.bundles - 1;
        for (int32_t head = first; head <= last; ++head) start(head);
        locate(begin, now);
        for (int64_t from = begin; from < end; from += kTile, now = 1 - now) {
            const int64_t to = least(end, from + kTile);
            count = to - from;
            next_count = to < end ? locate(to, 1 - now) : 0;
            // The heads of a key lie beside each other: one way through memory for all of them.
            for (int64_t key = 0; key < count; key += kLanes<T>)
                for (int32_t head = first; head <= last; ++head) {
                    choose(head);
                    by_rows([&]<int n>(int64_t row) { dots_of_keys<n>(row, key); });
                }
            for (int32_t head = first; head <= last; ++head) {
                choose(head);
                for (int64_t row = 0; row < rows; ++row) probabilities(row, head, from, to);
                by_rows([&]<int n>(int64_t row) { add_values<n>(row); });
            }
        }
        for (int32_t head = first; head <= last; ++head) finish(head);
    }

  private:
    static constexpr int64_t kTile = 128;  // keys at once
    static constexpr int64_t kStreams = 16;
    static constexpr int kRun = kLaneBytes / sizeof(T);        // keys whose dot products end in one vector
    static constexpr int kGroups = kVectorBytes / kLaneBytes;  // vectors that add_lanes() folds
    static constexpr int kChunk = kVectorBytes == 64 ? 4 : 2;  // vectors of outputs in registers, per row

    const VarlenParams& p;
    const ForwardItem& item;
    const KeyRows<E> keys;
    const int64_t dim, dim_v;
    int64_t first_token, row_begin, rows, begin, end;
    int64_t count, next_count;  // keys of this tile and the next
    RowMap map;
    T* all;                                  // what follows, of all heads
    T *queries, *out, *scores, *top, *sum;   // [rows][dim], [rows][dim_v], [rows][kTile], [rows], [rows]
    int64_t key_shift, value_shift;          // from the first head's rows to this one's
    const E **key_rows[2], **value_rows[2];  // of this tile and the next, of the first head
    int now = 0;
    T* part;

    void carve(Carver& c) {
        all = c.take<T>(item.bundles * head_size());
        part = c.take<T>(p.dim_v + 2);
        for (int i = 0; i < 2; ++i)
            key_rows[i] = c.take<const E*>(kTile), value_rows[i] = c.take<const E*>(kTile);
    }

    int64_t head_size() const { return rows * (dim + dim_v + kTile) + 2 * padded<T>(rows); }
    void choose(int32_t kv_head) {
        const int64_t i = kv_head - item.bundle;
        queries = all + i * head_size(), out = queries + rows * dim, scores = out + rows * dim_v;
        top = scores + rows * kTile, sum = top + padded<T>(rows);
        key_shift = i * p.k.head_stride, value_shift = i * p.v.head_stride;
    }

    /// Of all rows, in fours, twos and ones.
    template <class F>
    GAPLESS_INLINE void by_rows(const F& f) const {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) f.template operator()<4>(row);
        if (row + 2 <= rows) f.template operator()<2>(row), row += 2;
        if (row < rows) f.template operator()<1>(row);
    }

    int64_t locate(int64_t from, int which) {
        const int64_t count = least(kTile, end - from);
        for (int64_t i = 0; i < count; ++i) {
            key_rows[which][i] = keys.key(item.bundle, from + i);
            value_rows[which][i] = keys.value(item.bundle, from + i);
        }
        // Whole vectors of scores are computed; what lies beyond the last key is masked.
        for (int64_t i = count; i > 0 && i < padded<T>(count); ++i)
            key_rows[which][i] = key_rows[which][count - 1],
            value_rows[which][i] = value_rows[which][count - 1];
        return count;
    }

    int64_t token(int64_t row) const { return first_token + map.query(row_begin + row); }
    int64_t head_of(int64_t row, int32_t kv_head) const {
        return kv_head * map.group + (row_begin + row) % map.group;
    }

    void start(int32_t kv_head) {
        choose(kv_head);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t head = head_of(row, kv_head);
            const E* q =
                static_cast<const E*>(p.q.data) + token(row) * p.q.token_stride + head * p.q.head_stride;
            copy_row(q, queries + row * dim, p.dim);
            const bool sink = p.sinks && item.key_begin == 0;
            top[row] = sink ? T(p.sinks[head]) : -kInfinity<T>;
            sum[row] = sink ? 1 : 0;
        }
        std::memset(out, 0, rows * dim_v * sizeof(T));
    }

    /// A vector of keys against n rows.
    template <int n>
    void dots_of_keys(int64_t row, int64_t key) {
        Vec<T> folded[n][kGroups];
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
            const E* const* at = key_rows[now] + key + g * kRun;
            if (row == 0)
                for (int i = 0; i < kRun; ++i)
                    touch(value_rows[now], value_shift, p.dim_v, key + g * kRun + i, count);
            Vec<T> acc[n][kRun] = {};
            int64_t d = 0;
            for (; d + kLanes<T> <= p.dim; d += kLanes<T>) {
                Vec<T> k[kRun];
#pragma GCC unroll 4
                for (int i = 0; i < kRun; ++i) k[i] = load_wide(at[i] + key_shift + d);
                add_products<n>(row, d, k, acc);
            }
            if (d < p.dim) {
                Vec<T> k[kRun];
#pragma GCC unroll 4
                for (int i = 0; i < kRun; ++i) k[i] = load_row(at[i] + key_shift, d, p.dim);
                add_products<n>(row, d, k, acc);
            }
#pragma GCC unroll 4
            for (int r = 0; r < n; ++r) folded[r][g] = add_in_lanes<T>(acc[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < n; ++r) store(scores + (row + r) * kTile + key, add_lanes<T>(folded[r]));
    }

    template <int n>
    GAPLESS_INLINE void add_products(int64_t row, int64_t d, const Vec<T>* k, Vec<T> (*acc)[kRun]) const {
#pragma GCC unroll 4
        for (int r = 0; r < n; ++r) {
            const Vec<T> q = load(queries + (row + r) * dim + d);
#pragma GCC unroll 4
            for (int i = 0; i < kRun; ++i) acc[r][i] += q * k[i];
        }
    }

    /// Turns a row's dot products into exponentials and brings its sum and output to the new maximum.
    void probabilities(int64_t row, int32_t kv_head, int64_t from, int64_t to) {
        using I = typename IntOf<T>::type;
        constexpr int w = kLanes<T>;
        const int64_t position = map.position(row_begin + row), count = padded<T>(to - from);
        const I seen_begin = I(map.begin_at(position)), seen_end = I(least(to, map.end_at(position)));
        const T slope = p.alibi_slopes
                            ? T(p.alibi_slopes[keys.sequence * p.alibi_batch_stride + head_of(row, kv_head)])
                            : T(0);
        const I near = I(map.nearest(position));
        const T beyond = T(position < near ? near - position : position - near);
        T* s = scores + row * kTile;
        Vec<T> best = splat(-kInfinity<T>);
        for (int64_t i = 0; i < count; i += w) {
            IVec<T> key;
            for (int l = 0; l < w; ++l) key[l] = I(from + i + l);
            Vec<T> x = load(s + i) * T(score_factor(p)), tangent;
            if (p.softcap > 0 || slope != T(0))
                x = modify_score<T>(x, splat(slope), distance_of<T>(near - key) + beyond, T(p.softcap),
                                    &tangent);
            x = (key >= seen_begin) & (key < seen_end) ? x : splat(-kInfinity<T>);
            best = vmax<T>(x, best);
            store(s + i, x);
        }
        T new_top = top[row];
        for (int l = 0; l < w; ++l) new_top = best[l] <= new_top ? new_top : best[l];  // a NaN stays
        const T base = new_top == -kInfinity<T> ? T(0) : new_top;
        const T factor = vexp(splat(top[row] - base))[0];
        Vec<T> total = {};
        for (int64_t i = 0; i < count; i += w) {
            const Vec<T> e = vexp(load(s + i) - base);
            total += e;
            store(s + i, e);
        }
        top[row] = new_top;
        sum[row] *= factor;
        for (int l = 0; l < w; ++l) sum[row] += total[l];
        if (factor != T(1))
            for (int64_t d = 0; d < dim_v; d += w)
                store(out + row * dim_v + d, load(out + row * dim_v + d) * factor);
    }

    template <int n>
    void add_values(int64_t row) {
        constexpr int w = kLanes<T>;
        int64_t d = 0;
        for (; d + kChunk * w <= p.dim_v; d += kChunk * w) add_chunk<n, kChunk, true>(row, d);
        for (; d < p.dim_v; d += w) add_chunk<n, 1, false>(row, d);
    }

    template <int n, int kVecs, bool kWhole>
    void add_chunk(int64_t row, int64_t d) {
        constexpr int w = kLanes<T>;
        Vec<T> acc[n][kVecs] = {};
        const T* e = scores + row * kTile;
        for (int64_t key = 0; key < count; ++key) {
            if (row == 0 && d == 0) touch(key_rows[1 - now], key_shift, p.dim, key, next_count);
            Vec<T> v[kVecs];
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; ++i)
                v[i] = kWhole ? load_wide(value_rows[now][key] + value_shift + d + i * w)
                              : load_row(value_rows[now][key] + value_shift, d + i * w, p.dim_v);
#pragma GCC unroll 4
            for (int r = 0; r < n; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < kVecs; ++i) acc[r][i] += v[i] * e[r * kTile + key];
        }
#pragma GCC unroll 4
        for (int r = 0; r < n; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; ++i) {
                T* to = out + (row + r) * dim_v + d + i * w;
                store(to, load(to) + acc[r][i]);
            }
    }

    /// Row i of an order that takes turns over kStreams places: in several pages at once memory is read
    /// faster than in one.
    static GAPLESS_INLINE void touch(const E* const* rows, int64_t shift, int64_t width, int64_t i,
                                     int64_t count) {
        const int64_t row = (i & (kStreams - 1)) * (kTile / kStreams) + i / kStreams;
        if (row >= count) return;
        for (int64_t at = 0; at < width * int64_t(sizeof(E)); at += 64)
            Ahead::touch(reinterpret_cast<const char*>(rows[row] + shift) + at);
    }

    void finish(int32_t kv_head) {
        choose(kv_head);
        for (int64_t row = 0; row < rows; ++row) {
            T* to = item.partial ? static_cast<T*>(item.partial) +
                                       (kv_head - item.bundle) * item.partial_stride + row * (p.dim_v + 2)
                                 : part;
            std::memcpy(to, out + row * dim_v, p.dim_v * sizeof(T));
            to[p.dim_v] = top[row], to[p.dim_v + 1] = sum[row];
            if (!item.partial) merge_row<E>(p, part, 1, 0, token(row), head_of(row, kv_head));
        }
    }
};

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
