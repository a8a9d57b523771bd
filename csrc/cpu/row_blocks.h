// SPDX-License-Identifier: Apache-2.0
// What every kernel with queries in the lanes does: go over the blocks of rows of an item and the tiles of
// keys that each meets, pack both, and ask for what comes next while the present strip computes.
#pragma once

#include "csrc/cpu/key_rows.h"
#include "csrc/cpu/products.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/wait.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kSharingRows = 768;  // rows that share one packing of keys; their state stays in L2

/// Row of a key among the packed keys: blocks begin where the products can begin.
template <class Products>
GAPLESS_INLINE int64_t packed_row(const VarlenParams& p, int64_t key) {
    const int64_t block = p.blocks ? p.blocks->block_k : kPackedPiece;
    return key / block * round_up(block, Products::kKeyAlign) + key % block;
}

template <class E, class Products>
class RowBlocks {
  public:
    using T = typename Compute<E>::type;
    using Tile = typename Products::Tile;
    static constexpr int kStripVecs = Products::kStripVecs;
    static constexpr int64_t kStripRows = kStripVecs * kLanes<T>;
    static constexpr int64_t kTileKeys = Products::kTileKeys;
    static_assert(kSharingRows % kStripRows == 0);
    using View = StripView<T, kStripVecs>;
    static constexpr int kMostSegments = Tile::kMostRuns * View::kMaxSegments;

    RowBlocks(const VarlenParams& params, const ForwardItem& item)
        : p(params), item(item), keys(params, params.tiles[3 * item.tile]), products(params, ahead) {
        const int32_t* tile = p.tiles + 3 * item.tile;
        group = p.heads / p.bundles;
        const int32_t* cu_q = p.cu_seqlens_q + tile[0];
        first_token = cu_q[0];
        map = {group, p.first_position(keys.sequence, cu_q[1] - cu_q[0], keys.length), keys.length, p.left,
               p.right};
        row_begin = tile[1] * group, row_end = tile[2] * group;
        words = p.blocks ? p.blocks->words : 0;
        rewritten = p.softcap > 0 || p.alibi_slopes || !(p.scale > 0);
    }

  protected:
    const VarlenParams& p;
    const ForwardItem& item;
    const KeyRows<E> keys;
    Ahead ahead;
    Products products;
    int64_t bundle, group, first_token, row_begin, row_end, words;
    RowMap map;
    bool rewritten;  // scores are more than the dot product times a positive factor

    char* queries;
    T* scores;
    const E **query_rows, **key_rows, **value_rows;
    PackedKeys packed;  // of the present tile
    Lanes<T> lanes;

    int64_t most_rows() const {
        const int64_t rows = padded<T>(row_end - row_begin);
        if (!p.blocks) return least(kSharingRows, rows);
        return item.chunk ? rows : least(p.blocks->block_q * group, rows);
    }
    void carve(Carver& c) {
        const int64_t rows = most_rows();
        queries = c.take<char>(Products::panel_bytes(p, rows));
        scores = c.take<T>(kTileKeys * kStripRows);
        query_rows = c.take<const E*>(rows);
        key_rows = c.take<const E*>(kTileKeys);
        value_rows = c.take<const E*>(kTileKeys);
        packed = item.packed;
        if (!packed.pieces) {
            packed.keys = c.take<char>(Products::key_bytes(p, kTileKeys));
            packed.values = c.take<char>(Products::value_bytes(p, kTileKeys));
        }
        lanes.carve(c, rows);
        products.carve(c);
        ahead.carve(c, (rows + kTileKeys) *
                           (ahead.lines_of(p.dim * sizeof(E)) + ahead.lines_of(p.dim_v * sizeof(E))));
    }

    /// Calls kernel.start(row, rows), kernel.strip(row, first row of the strip, rows of it, tile) for each
    /// tile of keys, and kernel.finish(row, first row, rows of it), for each block;
    /// kernel.expect_results(row, rows) before the last tile.
    template <class Kernel>
    void walk(Kernel& kernel) {
        products.use(packed);
        bundle = item.bundle;
        ahead.clear();
        expect(row_begin);
        ahead.rush();
        for (; bundle < item.bundle + item.bundles; ++bundle)
            for (int64_t row = row_begin; row < row_end; row = block_end(row)) block(kernel, row);
    }

    int64_t kv_head() const { return bundle * p.kv_heads / p.bundles; }

    /// Rows of queries or outputs: calls f(i, row in memory) for each of [row, end).
    template <class X, class F>
    GAPLESS_INLINE void each_row(const Packed& x, int64_t row, int64_t end, const F& f) const {
        map.each(row, end, [&](int64_t i, int64_t query, int64_t member) {
            f(i, static_cast<X*>(x.data) + (first_token + query) * x.token_stride +
                     (bundle * group + member) * x.head_stride);
        });
    }

    /// The dot products of a strip that some row of it sees, in segments, as scores.
    int strip_scores(const Strip<T>& strip, const View& view, const Tile& tile, int64_t at,
                     Segment* segments) {
        int count = 0;
        for (int i = 0; i < tile.count; ++i)
            count += Products::split(view, tile.runs[i], words, segments + count);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            products.scores(strip, s);
            if (s.partial || rewritten) modify(s, at, strip);
        }
        return count;
    }

    /// What `scores` has to be multiplied by to be scores.
    T unit() const { return rewritten ? T(1) : T(score_factor(p)); }

    /// Calls with the number of vectors of a segment as a constant, so that their state stays in registers.
    template <class F>
    static GAPLESS_INLINE void by_width(const Segment& s, const F& f) {
        static_assert(kStripVecs <= 4);
        switch (s.vec_end - s.vec_begin) {
            case 1:
                return f.template operator()<1>();
            case 2:
                return f.template operator()<2>();
            case 3:
                return f.template operator()<(kStripVecs >= 3 ? 3 : 1)>();
            default:
                return f.template operator()<(kStripVecs >= 4 ? 4 : 1)>();
        }
    }

  private:
    int64_t block_end(int64_t row) const {
        if (!p.blocks) return least(row_end, row + kSharingRows);
        const int64_t rows = p.blocks->block_q * group;  // that have one list
        return item.chunk ? row_end : least(row_end, (row / rows + 1) * rows);
    }

    /// Rows [at, at + rows) of a block, and keys that they meet.
    struct Meeting {
        int64_t at, rows;
        Tile tile;
    };
    /// All of a block. Rows that have lists of their own meet one chunk of the keys after another, so that
    /// what one of them has brought near is still there for the next.
    class Meetings {
      public:
        Meetings(const RowBlocks& b, int64_t row)
            : b_(b),
              row_(row),
              rows_(b.block_end(row) - row),
              span_(b.p.blocks ? b.p.blocks->block_q * b.group : rows_),
              chunk_(b.item.chunk ? b.item.chunk : INT64_MAX),
              end_(b.keys_end(row + rows_)),
              walk_(b.keys_of(row, row + span_end(), 0, chunk_)) {}

        int64_t span_end() const { return least(rows_, at_ + span_); }
        bool next(Meeting& m) {
            while (!walk_.next(m.tile)) {
                at_ = span_end();
                if (at_ == rows_) {
                    at_ = 0;
                    if (chunk_ >= end_ - from_) return false;
                    from_ += chunk_;
                }
                walk_ = b_.keys_of(row_ + at_, row_ + span_end(), from_, least(chunk_, end_ - from_));
            }
            m.at = at_, m.rows = span_end() - at_;
            return true;
        }

      private:
        const RowBlocks& b_;
        const int64_t row_, rows_, span_, chunk_, end_;
        int64_t at_ = 0, from_ = 0;
        KeyWalk walk_;
    };

    int64_t keys_end(int64_t end_row) const { return least(item.key_end, map.end(end_row - 1)); }
    /// Of the keys from `from` on, `count` at most, those that rows [row, end_row) with one list meet.
    KeyWalk keys_of(int64_t row, int64_t end_row, int64_t from, int64_t count) const {
        const int64_t begin = most(from, most(item.key_begin, map.begin(row)));
        int64_t end = keys_end(end_row);
        if (count < end - from) end = from + count;
        if (p.blocks)
            return {*p.blocks, p.blocks->row(bundle, p.bundles, keys.sequence, map.query(row)),
                    Products::kKeyAlign, begin, end};
        return {begin, end, p.mass ? p.mass->block_k : INT64_MAX};
    }

    /// Calls f(at, rows) for each strip of rows [begin, end) of a block.
    template <class F>
    static GAPLESS_INLINE void each_strip(int64_t begin, int64_t end, const F& f) {
        for (int64_t at = begin; at < end; at += kStripRows) f(at, least(kStripRows, end - at));
    }
    /// And of all its rows, none of which crosses from one list to the next.
    template <class F>
    GAPLESS_INLINE void each_strip(int64_t rows, const F& f) const {
        const int64_t span = p.blocks ? p.blocks->block_q * group : rows;
        for (int64_t at = 0; at < rows; at += span) each_strip(at, least(rows, at + span), f);
    }

    /// Packs keys [begin, end), the first one to row `at`.
    void pack(int64_t begin, int64_t end, int64_t at) const {
        for (int64_t i = 0; i < end - begin; ++i) {
            key_rows[i] = keys.key(kv_head(), begin + i);
            value_rows[i] = keys.value(kv_head(), begin + i);
        }
        Products::pack_keys(p, key_rows, value_rows, end - begin, packed, at);
    }
    void pack_piece(int64_t piece) const {
        const int64_t begin = piece * kPackedPiece, end = least(keys.length, begin + kPackedPiece);
        const int64_t block = p.blocks ? least(p.blocks->block_k, kPackedPiece) : kPackedPiece;
        if (block % Products::kKeyAlign == 0) return pack(begin, end, packed_row<Products>(p, begin));
        for (int64_t key = begin; key < end; key += block)
            pack(key, least(end, key + block), packed_row<Products>(p, key));
    }
    void pack(Tile& tile) const {
        for (int i = 0; i < tile.count; ++i) {
            KeyRun& run = tile.runs[i];
            if (!packed.pieces) {
                pack(run.begin, run.end, run.packed = run.at);
                continue;
            }
            for (int64_t piece = run.begin / kPackedPiece; piece * kPackedPiece < run.end; ++piece) {
                int32_t* state = packed.pieces + piece;
                int32_t nobody = 0;
                if (__atomic_load_n(state, __ATOMIC_ACQUIRE) == 2) continue;
                if (__atomic_compare_exchange_n(state, &nobody, 1, false, __ATOMIC_RELAXED,
                                                __ATOMIC_RELAXED)) {
                    pack_piece(piece);
                    __atomic_store_n(state, 2, __ATOMIC_RELEASE);
                } else {
                    wait_until([&] { return __atomic_load_n(state, __ATOMIC_ACQUIRE) == 2; });
                }
            }
        }
    }
    bool is_packed(const KeyRun& run) const {
        return packed.pieces &&
               __atomic_load_n(packed.pieces + run.begin / kPackedPiece, __ATOMIC_RELAXED) == 2;
    }

    /// Asks for a block's queries and its first tile of keys.
    void expect(int64_t row) {
        each_row<const E>(p.q, row, block_end(row),
                          [&](int64_t, const E* at) { ahead.add(at, p.dim * int64_t(sizeof(E))); });
        Meeting first;
        if (Meetings(*this, row).next(first)) expect(first.tile);
    }
    void expect(const Tile& tile) {
        for (int i = 0; i < tile.count; ++i) {
            const KeyRun& run = tile.runs[i];
            if (is_packed(run)) {
                products.expect(run.packed, run.end - run.begin);
                continue;
            }
            for (int64_t key = run.begin; key < run.end; ++key) {
                ahead.add(keys.key(kv_head(), key), p.dim * int64_t(sizeof(E)));
                ahead.add(keys.value(kv_head(), key), p.dim_v * int64_t(sizeof(E)));
            }
        }
    }
    /// Asks for the block after the one at `row`.
    void expect_next(int64_t row) {
        if (block_end(row) < row_end) return expect(block_end(row));
        if (bundle + 1 == item.bundle + item.bundles) return;
        ++bundle;
        expect(row_begin);
        --bundle;
    }

    template <class Kernel>
    void block(Kernel& kernel, int64_t row) {
        const int64_t rows = block_end(row) - row;
        lanes.fill(p, map, keys.sequence, bundle, row, rows, padded<T>(rows));
        each_row<const E>(p.q, row, row + rows, [&](int64_t i, const E* at) { query_rows[i] = at; });
        kernel.start(row, rows);
        each_strip(rows, [&](int64_t at, int64_t count) {
            products.pack_queries(query_rows + at, count, queries + Products::panel_bytes(p, at),
                                  padded<T>(count));
        });
        Meetings meetings(*this, row);
        Meeting now, next;
        for (bool any = meetings.next(now); any;) {
            const bool more = meetings.next(next);
            pack(now.tile);
            ahead.clear();
            if (more) {
                expect(next.tile);
            } else {
                kernel.expect_results(row, rows);
                expect_next(row);
            }
            ahead.spread(Products::steps(now.rows * now.tile.keys() * (p.dim + p.dim_v)));
            each_strip(now.at, now.at + now.rows,
                       [&](int64_t at, int64_t count) { kernel.strip(row, at, count, now.tile); });
            now = next, any = more;
        }
        each_strip(rows, [&](int64_t at, int64_t count) { kernel.finish(row, at, count); });
    }

    void modify(const Segment& s, int64_t at, const Strip<T>& strip) const {
        constexpr int w = kLanes<T>;
        const T unit = T(score_factor(p)), cap = T(p.softcap);
        T* block = strip.scores + s.at * strip.width;
        const uint32_t* bits = s.bits;
        for (int64_t key = s.begin; key < s.end; ++key, block += strip.width, bits += bits ? words : 0)
            for (int v = s.vec_begin; v < s.vec_end; ++v) {
                const int64_t lane = at + v * w;
                Vec<T> x = load(block + v * w), tangent;
                if (rewritten) x = modify_score<T>(x * unit, lanes, lane, key, cap, &tangent);
                if (s.partial) x = sees<T>(lanes, lane, key, bits) ? x : splat(-kInfinity<T>);
                store(block + v * w, x);
            }
    }
};

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
