// SPDX-License-Identifier: Apache-2.0
// Which keys a row sees, and how a strip of rows splits a range of keys into pieces that whole vectors of
// rows share.
#pragma once

#include "csrc/cpu/simd.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

GAPLESS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GAPLESS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
GAPLESS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// Rows of one kv head of one sequence. The query heads that share the head are rows of their own, beside
/// each other, so that a row's position never decreases: row = query * group + head in group.
struct RowMap {
    int64_t group, first, len_k;  // heads of a query, key position of query 0, keys
    int32_t left, right;

    int64_t query(int64_t row) const { return group == 1 ? row : row / group; }
    int64_t position(int64_t row) const { return position_of(query(row)); }
    int64_t position_of(int64_t query) const { return query + first; }
    /// The key next to a position, or the end of the keys.
    int64_t nearest(int64_t position) const { return most(0, least(len_k, position)); }
    /// Calls f(i, query, head in group) of every row + i before `end`.
    template <class F>
    GAPLESS_INLINE void each(int64_t row, int64_t end, const F& f) const {
        int64_t at = query(row), member = row - at * group;
        for (int64_t i = 0; i < end - row; ++i) {
            f(i, at, member);
            if (++member == group) member = 0, ++at;
        }
    }
    /// First key seen, and one past the last; empty where end <= begin. Neither ever decreases with the row.
    int64_t begin(int64_t row) const { return begin_at(position(row)); }
    int64_t end(int64_t row) const { return end_at(position(row)); }
    int64_t begin_at(int64_t position) const { return left < 0 ? 0 : nearest(position - left); }
    int64_t end_at(int64_t position) const { return right < 0 ? len_k : nearest(position + right + 1); }
};

/// Keys that follow one another: [begin, end).
struct KeyRun {
    int64_t begin, end;
    int64_t at;            ///< row of the first one's scores
    int64_t packed;        ///< and its row among the packed keys
    const uint32_t* bits;  ///< its words in a pattern of what each query of the block sees, or null

    /// The part from key `from` on.
    KeyRun from(int64_t key, int64_t words) const {
        const int64_t skip = key - begin;
        return {key, end, at + skip, packed + skip, bits ? bits + skip * words : nullptr};
    }
};

/// Of those, the keys that the vectors of rows [vec_begin, vec_end) see some of.
struct Segment : KeyRun {
    int vec_begin, vec_end;
    bool partial;  ///< some row does not see some key
};

// Shorter pieces would leave the matrix multiplication's register blocks half empty.
constexpr int64_t kSegmentKeys = 16;

/// What each vector of rows of a strip sees, and the pieces of a tile of keys that follow from it.
template <class T, int kMaxVecs>
struct StripView {
    static constexpr int kMaxSegments = 2 * kMaxVecs + 2;
    int vecs;
    int64_t first_begin[kMaxVecs], last_begin[kMaxVecs];  // over the rows of a vector
    int64_t first_end[kMaxVecs], last_end[kMaxVecs];

    StripView(const RowMap& map, int64_t row, int64_t rows) : vecs(int((rows + kLanes<T> - 1) / kLanes<T>)) {
        for (int v = 0; v < vecs; ++v) {
            const int64_t first = row + v * kLanes<T>, last = row + least(rows, (v + 1) * kLanes<T>) - 1;
            first_begin[v] = map.begin(first), last_begin[v] = map.begin(last);
            first_end[v] = map.end(first), last_end[v] = map.end(last);
        }
    }
    int64_t begin() const { return first_begin[0]; }
    int64_t end() const { return last_end[vecs - 1]; }

    /// Some row of vectors [a, b) does not see some key of [from, to).
    bool cuts(int64_t from, int64_t to, int a, int b) const {
        bool partial = false;
        for (int v = a; v < b; ++v) partial |= from < last_begin[v] || to > first_end[v];
        return partial;
    }
    bool cuts(int64_t from, int64_t to) const { return cuts(from, to, 0, vecs); }

    int split(const KeyRun& run, int64_t words, Segment* out) const {
        int64_t from = most(run.begin, begin());
        const int64_t to = least(run.end, end());
        int count = 0;
        while (from < to) {
            int a = 0, b = vecs;
            while (a < b && last_end[a] <= from) ++a;
            int64_t next = to;
            for (int v = a; v < vecs; ++v) {
                if (last_end[v] > from) next = least(next, last_end[v]);
                if (first_begin[v] > from) next = least(next, first_begin[v]);
            }
            next = least(to, most(next, from + kSegmentKeys));
            while (b > a && first_begin[b - 1] >= next) --b;
            if (a < b) {
                Segment& s = out[count++];
                static_cast<KeyRun&>(s) = run.from(from, words);
                s.end = next, s.vec_begin = a, s.vec_end = b;
                s.partial = run.bits || cuts(from, next, a, b);
            }
            from = next;
        }
        return count;
    }
};

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
