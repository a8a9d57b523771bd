// SPDX-License-Identifier: Apache-2.0
// Attention forward, transposed: queries lie in the lanes of vectors, keys run down the rows. Then keys and
// values are read as they lie in memory, one scalar at a time, softmax needs no horizontal operation, and a
// mask is a comparison of lanes. Online softmax as in FlashAttention-2 (arXiv:2307.08691).
#include "csrc/cpu/amx_tiles.h"
#include "csrc/cpu/few_rows.h"
#include "csrc/cpu/gemm_tiles.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/key_rows.h"
#include "csrc/cpu/scores.h"
#include "csrc/cpu/scratch.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kTileKeys = 128;  // scores of a strip stay in L1
constexpr int64_t kSharingRows =
    576;  // rows that share one packing of keys and values; their state stays in L2

/// Part of a strip: its panel of queries, scores, exponentials and outputs, all `width` lanes wide.
template <class T>
struct Strip {
    const void* queries;
    T* scores;  // of the tile's keys; the exponentials take their place, in the products' own layout
    T* out;     // [dim_v][width]
    T* factor;  // what is in `out` has to be multiplied by, per lane
    int64_t width;
};

/// Products by fused multiply-add, for any type. Keys and values are copied even if they need no widening:
/// rows of one head lie a page or so apart in memory, where they would push each other out of the cache.
template <class E>
class VectorProducts {
  public:
    using T = typename Compute<E>::type;
    using Registers = NoTiles;

    static constexpr int kStripVecs = kMaxVecs;

    VectorProducts(const VarlenParams& p, Ahead& ahead)
        : p(p), ahead(ahead), dim(padded<T>(p.dim)), dim_v(padded<T>(p.dim_v)) {}

    static int64_t panel_bytes(const VarlenParams& p, int64_t rows) { return rows * p.dim * sizeof(T); }
    static int64_t out_width(const VarlenParams& p) { return p.dim_v; }
    void carve(Carver& c) {
        keys = c.take<T>(kTileKeys * dim);
        values = c.take<T>(kTileKeys * dim_v);
    }

    void pack_queries(const E* const* rows, int64_t count, void* panel, int64_t width) const {
        transpose_rows(rows, count, p.dim, T(1), static_cast<T*>(panel), width);
    }
    void pack_keys(const E* const* key_rows, const E* const* value_rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            copy_row(key_rows[i], keys + i * dim, p.dim);
            copy_row(value_rows[i], values + i * dim_v, p.dim_v);
        }
    }

    template <class View>
    static int split(const View& view, int64_t from, int64_t to, Segment* segments) {
        return view.split(from, to, segments);
    }

    void scores(const Strip<T>& strip, const Segment& s, int64_t from) const {
        const int64_t at = s.begin - from, lane = s.vec_begin * kLanes<T>;
        gemm<Init::kZero, T>(
            {keys + at * dim, dim, 1, static_cast<const T*>(strip.queries) + lane, strip.width,
             strip.scores + at * strip.width + lane, strip.width, p.dim, nullptr, &ahead},
            s.end - s.begin, s.vec_end - s.vec_begin);
    }

    /// exp(score * factor - base) of a segment, added up per lane.
    template <int n>
    static void exponentials(const Strip<T>& strip, const Segment& s, int64_t from, T factor,
                             const Vec<T>* base, Vec<T>* sum) {
        constexpr int w = kLanes<T>;
        const int64_t keys = s.end - s.begin;
        T* block = strip.scores + (s.begin - from) * strip.width + s.vec_begin * w;
        constexpr int64_t kRun = 16;  // one long chain of additions would lose bits that the LSE needs
        for (int64_t k = 0; k < keys;) {
            Vec<T> run[n] = {};
            for (const int64_t end = least(keys, k + kRun); k < end; ++k, block += strip.width) {
#pragma GCC unroll 4
                for (int v = 0; v < n; ++v) {
                    const Vec<T> e = vexp(load(block + v * w) * factor - base[v]);
                    run[v] += e;
                    store(block + v * w, e);
                }
            }
            for (int v = 0; v < n; ++v) sum[v] += run[v];
        }
    }

    void outputs(const Strip<T>& strip, const Segment* segments, int count, int64_t from, int vecs) const {
        // The first segment's product rescales what is there, if it has every vector; else that takes a round
        // of its own.
        const bool fused = segments[0].vec_begin == 0 && segments[0].vec_end == vecs;
        if (!fused) rescale(strip, p.dim_v, vecs);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            const int64_t at = s.begin - from, lane = s.vec_begin * kLanes<T>;
            const Gemm<T> g{values + at * dim_v,
                            1,
                            dim_v,
                            strip.scores + at * strip.width + lane,
                            strip.width,
                            strip.out + lane,
                            strip.width,
                            s.end - s.begin,
                            strip.factor + lane,
                            &ahead};
            if (fused && i == 0)
                gemm<Init::kScale>(g, p.dim_v, s.vec_end - s.vec_begin);
            else
                gemm<Init::kAdd>(g, p.dim_v, s.vec_end - s.vec_begin);
        }
    }

    static void rescale(const Strip<T>& strip, int64_t dim_v, int vecs) {
        for (int64_t i = 0; i < dim_v; ++i)
            for (int64_t lane = 0; lane < vecs * kLanes<T>; lane += kLanes<T>) {
                T* o = strip.out + i * strip.width + lane;
                store(o, load(o) * load(strip.factor + lane));
            }
    }

  private:
    const VarlenParams& p;
    Ahead& ahead;
    const int64_t dim, dim_v;
    T *keys, *values;  // [keys][dim], [keys][dim_v]
};

#if defined(__AMX_BF16__)
/// Products of bfloat16 on tile registers, so segments are of 32 keys and two vectors, padded if need be; the
/// exponentials, rounded to bfloat16, are pairs of keys.
class TileProducts {
  public:
    using T = float;
    using Registers = Tiles;

    static constexpr int kStripVecs = 4;  // two pairs of tiles

    TileProducts(const VarlenParams& p, Ahead& ahead) : p(p), ahead(ahead) {}

    static int64_t panel_bytes(const VarlenParams& p, int64_t rows) {
        return rows * round_up(p.dim, kTileDepth) * 2;
    }
    static int64_t out_width(const VarlenParams& p) { return round_up(p.dim_v, kTile); }
    void carve(Carver& c) {
        keys = c.take<bf16>(kTileKeys * round_up(p.dim, kTileDepth));
        values = c.take<bf16>(kTileKeys * out_width(p));
        pairs = c.take<uint32_t>(kTileKeys / 2 * kStripVecs * kTile);
    }

    void pack_queries(const bf16* const* rows, int64_t count, void* panel, int64_t width) const {
        pack_lanes(rows, count, p.dim, static_cast<uint32_t*>(panel), width);
    }
    void pack_keys(const bf16* const* key_rows, const bf16* const* value_rows, int64_t count) {
        pack_rows(key_rows, count, p.dim, keys);
        pack_columns(value_rows, count, p.dim_v, values, kTileKeys);
    }

    template <class View>
    static int split(const View& view, int64_t from, int64_t to, Segment* segments) {
        to = least(to, view.end());
        if (from >= to || to <= view.begin()) return 0;
        // The first half of the lanes may see fewer keys.
        const int64_t half =
            view.vecs > 2 ? least(to, from + round_up(most(0, view.last_end[1] - from), kTileDepth)) : to;
        int count = 0;
        if (from < half) segments[count++] = {from, half, 0, view.vecs, view.cuts(from, half)};
        if (half < to) segments[count++] = {half, to, 2, view.vecs, view.cuts(half, to, 2, view.vecs)};
        return count;
    }

    void scores(const Strip<float>& strip, const Segment& s, int64_t from) const {
        const int64_t depth = round_up(p.dim, kTileDepth), at = s.begin - from, lane = s.vec_begin * kTile;
        multiply({keys + at * depth, depth, static_cast<const uint32_t*>(strip.queries) + lane, strip.width,
                  strip.scores + at * strip.width + lane, strip.width, s.end - s.begin, strip.width - lane,
                  depth, false, &ahead});
    }

    template <int n>
    void exponentials(const Strip<float>& strip, const Segment& s, int64_t from, float factor,
                      const Vec<float>* base, Vec<float>* sum) const {
        const int64_t at = s.begin - from, lane = s.vec_begin * kTile, count = s.end - s.begin;
        const float* block = strip.scores + at * strip.width + lane;
        uint32_t* to = pairs + at / 2 * strip.width + lane;
        for (int64_t k = 0; k < count; k += 2, block += 2 * strip.width, to += strip.width)
#pragma GCC unroll 4
            for (int v = 0; v < n; ++v) {
                const Vec<float> even = vexp<4>(load(block + v * kTile) * factor - base[v]);
                const Vec<float> odd = k + 1 < count
                                           ? vexp<4>(load(block + strip.width + v * kTile) * factor - base[v])
                                           : Vec<float>{};
                sum[v] += even + odd;
                _mm512_storeu_si512(to + v * kTile, round_pairs(even, odd));
            }
        for (int64_t k = round_up(count, 2); k < round_up(count, kTileDepth); k += 2, to += strip.width)
            std::memset(to, 0, n * kTile * sizeof(uint32_t));
    }

    void outputs(const Strip<float>& strip, const Segment* segments, int count, int64_t from,
                 int vecs) const {
        bool same = true;
        for (int v = 0; v < vecs; ++v)
            same &= _mm512_cmpeq_ps_mask((__m512)load(strip.factor + v * kTile), _mm512_set1_ps(1)) == 0xffff;
        if (!same) VectorProducts<float>::rescale(strip, p.dim_v, vecs);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            const int64_t at = s.begin - from, lane = s.vec_begin * kTile;
            multiply({values + at, kTileKeys, pairs + at / 2 * strip.width + lane, strip.width,
                      strip.out + lane, strip.width, out_width(p), strip.width - lane,
                      round_up(s.end - s.begin, kTileDepth), true, &ahead});
        }
    }

  private:
    const VarlenParams& p;
    Ahead& ahead;
    bf16 *keys, *values;  // [keys][dim], [dim_v][keys]
    uint32_t* pairs;
};
#endif

template <class E, class Products>
class Forward {
  public:
    using T = typename Compute<E>::type;
    static constexpr int kStripVecs = Products::kStripVecs;
    static constexpr int64_t kStripRows = kStripVecs * kLanes<T>;
    static_assert(kSharingRows % kStripRows == 0);

    Forward(const VarlenParams& params, const ForwardItem& item)
        : p(params), item(item), keys(params, params.tiles[3 * item.tile]), products(params, ahead) {
        const int32_t* tile = p.tiles + 3 * item.tile;
        group = p.heads / p.kv_heads;
        const int32_t* cu_q = p.cu_seqlens_q + tile[0];
        first_token = cu_q[0];
        map = {group, cu_q[1] - cu_q[0], keys.length, p.left, p.right};
        row_begin = tile[1] * group, row_end = tile[2] * group;
        rewritten = p.softcap > 0 || p.alibi_slopes || !(p.scale > 0);
    }

    void run() {
        const typename Products::Registers registers;
        carve_scratch([this](Carver& c) { carve(c); });
        kv_head = item.kv_head;
        ahead.clear();
        expect(row_begin, block_end(row_begin));
        ahead.rush();
        for (; kv_head < item.kv_head + item.kv_heads; ++kv_head)
            for (int64_t row = row_begin; row < row_end; row += kSharingRows)
                block(row, block_end(row) - row);
    }

  private:
    const VarlenParams& p;
    const ForwardItem& item;
    const KeyRows<E> keys;
    Ahead ahead;
    Products products;
    int64_t kv_head, group, first_token, row_begin, row_end;
    RowMap map;
    bool rewritten;  // scores are more than the dot product times a positive factor

    char* queries;
    T *out, *top, *sum, *scores, *factor;
    const E **query_rows, **key_rows, **value_rows;
    E** out_rows;
    T** lse_of_row;
    Lanes<T> lanes;

    void carve(Carver& c) {
        const int64_t rows = least(kSharingRows, padded<T>(row_end - row_begin));
        queries = c.take<char>(Products::panel_bytes(p, rows));
        out = c.take<T>(rows * Products::out_width(p));
        top = c.take<T>(rows);
        sum = c.take<T>(rows);
        factor = c.take<T>(kStripRows);
        scores = c.take<T>(kTileKeys * kStripRows);
        query_rows = c.take<const E*>(rows);
        key_rows = c.take<const E*>(kTileKeys);
        value_rows = c.take<const E*>(kTileKeys);
        out_rows = c.take<E*>(rows);
        lse_of_row = c.take<T*>(rows);
        lanes.carve(c, rows);
        products.carve(c);
        ahead.carve(c, (rows + kTileKeys) *
                           (ahead.lines_of(p.dim * sizeof(E)) + ahead.lines_of(p.dim_v * sizeof(E))));
    }

    void locate(int64_t from, int64_t to) const {
        for (int64_t key = from; key < to; ++key)
            key_rows[key - from] = keys.key(kv_head, key), value_rows[key - from] = keys.value(kv_head, key);
    }

    int64_t block_end(int64_t row) const { return least(row_end, row + kSharingRows); }
    int64_t keys_begin(int64_t row) const { return most(item.key_begin, map.begin(row)); }
    int64_t keys_end(int64_t end_row) const { return least(item.key_end, map.end(end_row - 1)); }

    /// Rows of queries or outputs: calls f(i, row in memory) for each of [row, end).
    template <class X, class F>
    GAPLESS_INLINE void each_row(const Packed& x, int64_t row, int64_t end, const F& f) const {
        map.each(row, end, [&](int64_t i, int64_t query, int64_t member) {
            f(i, static_cast<X*>(x.data) + (first_token + query) * x.token_stride +
                     (kv_head * group + member) * x.head_stride);
        });
    }

    /// Asks for a block's queries and its first tile of keys.
    void expect(int64_t row, int64_t end) {
        each_row<const E>(p.q, row, end,
                          [&](int64_t, const E* at) { ahead.add(at, p.dim * int64_t(sizeof(E))); });
        const int64_t begin = keys_begin(row);
        expect_keys(begin, least(keys_end(end), begin + kTileKeys));
    }
    void expect_keys(int64_t from, int64_t to) {
        for (int64_t key = from; key < to; ++key) {
            ahead.add(keys.key(kv_head, key), p.dim * int64_t(sizeof(E)));
            ahead.add(keys.value(kv_head, key), p.dim_v * int64_t(sizeof(E)));
        }
    }
    /// Asks for what is needed after the last tile: where results go, and the next block.
    void expect_next(int64_t row, int64_t rows) {
        if (!item.partial)
            for (int64_t i = 0; i < rows; ++i) ahead.add(out_rows[i], p.dim_v * int64_t(sizeof(E)));
        if (row + rows < row_end) return expect(row + rows, block_end(row + rows));
        if (kv_head + 1 == item.kv_head + item.kv_heads) return;
        ++kv_head;
        expect(row_begin, block_end(row_begin));
        --kv_head;
    }

    void block(int64_t row, int64_t rows) {
        const int64_t begin = keys_begin(row), end = keys_end(row + rows);
        lanes.fill(p, map, keys.sequence, kv_head, row, rows, padded<T>(rows));
        start(row, rows);
        for (int64_t from = begin; from < end; from += kTileKeys) {
            const int64_t to = least(end, from + kTileKeys);
            locate(from, to);
            products.pack_keys(key_rows, value_rows, to - from);
            ahead.clear();
            if (to < end)
                expect_keys(to, least(end, to + kTileKeys));
            else
                expect_next(row, rows);
            for (int64_t at = 0; at < rows; at += kStripRows)
                strip(row, at, least(kStripRows, rows - at), from, to);
        }
        for (int64_t at = 0; at < rows; at += kStripRows) finish(row, at, least(kStripRows, rows - at));
    }

    void start(int64_t row, int64_t rows) {
        map.each(row, row + rows, [&](int64_t i, int64_t query, int64_t member) {
            const int64_t token = first_token + query, head = kv_head * group + member;
            query_rows[i] =
                static_cast<const E*>(p.q.data) + token * p.q.token_stride + head * p.q.head_stride;
            out_rows[i] = static_cast<E*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride;
            lse_of_row[i] = static_cast<T*>(p.lse) + head * p.total_q + token;
            // The sink is one more score, of a key without a value. Of several parts of the keys, the first
            // has it.
            const bool sink = p.sinks && item.key_begin == 0;
            top[i] = sink ? T(p.sinks[head]) : -kInfinity<T>;
            sum[i] = sink ? 1 : 0;
        });
        for (int64_t i = rows; i < padded<T>(rows); ++i) top[i] = -kInfinity<T>, sum[i] = 0;
        for (int64_t at = 0; at < rows; at += kStripRows) {
            const int64_t count = least(kStripRows, rows - at);
            products.pack_queries(query_rows + at, count, queries + Products::panel_bytes(p, at),
                                  padded<T>(count));
        }
        std::memset(out, 0, padded<T>(rows) * Products::out_width(p) * sizeof(T));
    }

    void strip(int64_t row, int64_t at, int64_t rows, int64_t from, int64_t to) {
        constexpr int w = kLanes<T>;
        const StripView<T, kStripVecs> view(map, row + at, rows);
        Segment segments[view.kMaxSegments];
        const int count = Products::split(view, from, to, segments);
        if (count == 0) return;
        const Strip<T> strip{queries + Products::panel_bytes(p, at), scores,
                             out + at * Products::out_width(p), factor, padded<T>(rows)};
        const T unit = rewritten ? T(1) : T(score_factor(p));

        Vec<T> best[kStripVecs], base[kStripVecs], part[kStripVecs];
        for (int v = 0; v < view.vecs; ++v) best[v] = splat(-kInfinity<T>);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            products.scores(strip, s, from);
            T* block = scores + (s.begin - from) * strip.width + s.vec_begin * w;
            if (s.partial || rewritten) modify(s, at, block, strip.width);
            by_width(s,
                     [&]<int n>() { largest<n>(block, strip.width, s.end - s.begin, best + s.vec_begin); });
        }
        for (int v = 0; v < view.vecs; ++v) {
            const Vec<T> old_top = load(top + at + v * w), new_top = vmax<T>(best[v] * unit, old_top);
            base[v] = new_top == -kInfinity<T> ? Vec<T>{} : new_top;
            const Vec<T> f = vexp(old_top - base[v]);
            store(factor + v * w, f);
            store(top + at + v * w, new_top);
            part[v] = load(sum + at + v * w) * f;
        }
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            by_width(s, [&]<int n>() {
                Vec<T> b[n], total[n];
                for (int v = 0; v < n; ++v) b[v] = base[s.vec_begin + v], total[v] = part[s.vec_begin + v];
                products.template exponentials<n>(strip, s, from, unit, b, total);
                for (int v = 0; v < n; ++v) part[s.vec_begin + v] = total[v];
            });
        }
        products.outputs(strip, segments, count, from, view.vecs);
        for (int v = 0; v < view.vecs; ++v) store(sum + at + v * w, part[v]);
    }

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

    template <int n>
    static void largest(const T* block, int64_t width, int64_t keys, Vec<T>* top) {
        constexpr int w = kLanes<T>;
        Vec<T> best[n];
        for (int v = 0; v < n; ++v) best[v] = top[v];
        for (int64_t k = 0; k < keys; ++k, block += width)
#pragma GCC unroll 4
            for (int v = 0; v < n; ++v) best[v] = vmax<T>(load(block + v * w), best[v]);
        for (int v = 0; v < n; ++v) top[v] = best[v];
    }

    void modify(const Segment& s, int64_t at, T* block, int64_t width) const {
        constexpr int w = kLanes<T>;
        const T unit = T(score_factor(p)), cap = T(p.softcap);
        for (int64_t key = s.begin; key < s.end; ++key, block += width)
            for (int v = s.vec_begin; v < s.vec_end; ++v) {
                T* cell = block + (v - s.vec_begin) * w;
                const int64_t lane = at + v * w;
                Vec<T> x = load(cell), tangent;
                if (rewritten) x = modify_score<T>(x * unit, lanes, lane, key, cap, &tangent);
                if (s.partial) x = sees<T>(lanes, lane, key) ? x : splat(-kInfinity<T>);
                store(cell, x);
            }
    }

    void finish(int64_t row, int64_t at, int64_t rows) {
        constexpr int w = kLanes<T>;
        const int64_t width = padded<T>(rows);
        if (item.partial) return keep_partial(row, at, rows);
        T lse[kStripRows];
        for (int64_t i = 0; i < rows; i += w) {
            const Vec<T> s = load(sum + at + i);
            store(factor + i, s == T(0) ? Vec<T>{} : T(1) / s);
            const Vec<T> l = load(top + at + i) + vlog(s);
            store(lse + i, s == T(0) ? splat(-kInfinity<T>) : l);
        }
        untranspose_rows(out + at * Products::out_width(p), width, factor, out_rows + at, rows, p.dim_v);
        for (int64_t i = 0; i < rows; ++i) *lse_of_row[at + i] = lse[i];
    }

    void keep_partial(int64_t row, int64_t at, int64_t rows) const {
        const int64_t width = padded<T>(rows), stride = p.dim_v + 2;
        T* to = static_cast<T*>(item.partial) + (kv_head - item.kv_head) * item.partial_stride +
                (row + at - row_begin) * stride;
        for (int64_t i = 0; i < rows; ++i, to += stride) {
            for (int64_t d = 0; d < p.dim_v; ++d) to[d] = out[at * Products::out_width(p) + d * width + i];
            to[p.dim_v] = top[at + i], to[p.dim_v + 1] = sum[at + i];
        }
    }
};

}  // namespace

void varlen_forward(const VarlenParams& p, const ForwardItem& item) {
    const int32_t* tile = p.tiles + 3 * item.tile;
    if ((tile[2] - tile[1]) * (p.heads / p.kv_heads) <= kFewRows)
        return by_dtype(p.dtype, [&]<class E>() { FewRows<E>(p, item).run(); });
#if defined(__AMX_BF16__)
    if (p.dtype == DType::kBFloat16) return Forward<bf16, TileProducts>(p, item).run();
#endif
    by_dtype(p.dtype, [&]<class E>() { Forward<E, VectorProducts<E>>(p, item).run(); });
}

void varlen_merge(const VarlenParams& p, const MergeItem& item) {
    by_dtype(p.dtype, [&]<class E>() {
        using T = typename Compute<E>::type;
        const int32_t* tile = p.tiles + 3 * item.tile;
        const int64_t group = p.heads / p.kv_heads, rows = (tile[2] - tile[1]) * group, width = p.dim_v + 2;
        for (int64_t row = 0; row < rows; ++row)
            merge_row<E>(p, static_cast<const T*>(item.partials) + row * width, item.parts, rows * width,
                         p.cu_seqlens_q[tile[0]] + tile[1] + row / group, item.kv_head * group + row % group);
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
