// SPDX-License-Identifier: Apache-2.0
// The two products of attention, scores and outputs, for a strip of rows in the lanes and a tile of keys down
// the rows; and the layout in which they read keys and values.
#pragma once

#include "csrc/cpu/bf16_tiles.h"
#include "csrc/cpu/gemm_tiles.h"
#include "csrc/cpu/key_walk.h"
#include "csrc/cpu/scores.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// What the outputs of a strip held: nothing, what they hold now, or that by a factor for each lane.
enum class Before { kNothing, kSame, kScaled };

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
    static constexpr int64_t kTileKeys = 64, kKeyAlign = 1;  // scores of a strip and its keys stay in L1
    using Tile = KeyTile<kTileKeys, kKeyAlign>;

    VectorProducts(const VarlenParams& p, Ahead& ahead)
        : p(p), ahead(ahead), dim(padded<T>(p.dim)), dim_v(padded<T>(p.dim_v)) {}

    static int64_t panel_bytes(const VarlenParams& p, int64_t rows) { return rows * p.dim * sizeof(T); }
    static int64_t out_width(const VarlenParams& p) { return p.dim_v; }
    void carve(Carver&) {}

    static int64_t key_bytes(const VarlenParams& p, int64_t keys) {
        return keys * padded<T>(p.dim) * sizeof(T);
    }
    static int64_t value_bytes(const VarlenParams& p, int64_t keys) {
        return keys * padded<T>(p.dim_v) * sizeof(T);
    }
    /// Packs keys, the first one to row `at`.
    static void pack_keys(const VarlenParams& p, const E* const* key_rows, const E* const* value_rows,
                          int64_t count, const PackedKeys& to, int64_t at) {
        T* k = static_cast<T*>(to.keys) + at * padded<T>(p.dim);
        T* v = static_cast<T*>(to.values) + at * padded<T>(p.dim_v);
        for (int64_t i = 0; i < count; ++i, k += padded<T>(p.dim), v += padded<T>(p.dim_v)) {
            copy_row(key_rows[i], k, p.dim);
            copy_row(value_rows[i], v, p.dim_v);
        }
    }
    void use(const PackedKeys& packed) {
        keys = static_cast<const T*>(packed.keys), values = static_cast<const T*>(packed.values);
    }
    /// Asks for packed keys.
    void expect(int64_t at, int64_t count) const {
        ahead.add(keys + at * dim, count * dim * int64_t(sizeof(T)));
        ahead.add(values + at * dim_v, count * dim_v * int64_t(sizeof(T)));
    }

    static int64_t steps(int64_t products) { return gemm_steps<T>(products); }

    void pack_queries(const E* const* rows, int64_t count, void* panel, int64_t width) const {
        transpose_rows(rows, count, p.dim, T(1), static_cast<T*>(panel), width);
    }

    template <class View>
    static int split(const View& view, const KeyRun& run, int64_t words, Segment* segments) {
        return view.split(run, words, segments);
    }

    void scores(const Strip<T>& strip, const Segment& s) const {
        const int64_t lane = s.vec_begin * kLanes<T>;
        gemm<Init::kZero, T>(
            {keys + s.packed * dim, dim, 1, static_cast<const T*>(strip.queries) + lane, strip.width,
             strip.scores + s.at * strip.width + lane, strip.width, p.dim, nullptr, &ahead},
            s.end - s.begin, s.vec_end - s.vec_begin);
    }

    static GAPLESS_INLINE Vec<T> exponential(Vec<T> x) { return vexp(x); }

    /// exp(score * factor - base) of a segment, added up per lane.
    template <int n>
    static void exponentials(const Strip<T>& strip, const Segment& s, T factor, const Vec<T>* base,
                             Vec<T>* sum) {
        constexpr int w = kLanes<T>;
        const int64_t keys = s.end - s.begin;
        T* block = strip.scores + s.at * strip.width + s.vec_begin * w;
        constexpr int64_t kRun = 16;  // one long chain of additions would lose bits that the LSE needs
        for (int64_t k = 0; k < keys;) {
            Vec<T> run[n] = {};
            for (const int64_t end = least(keys, k + kRun); k < end; ++k, block += strip.width) {
#pragma GCC unroll 4
                for (int v = 0; v < n; ++v) {
                    const Vec<T> e = exponential(load(block + v * w) * factor - base[v]);
                    run[v] += e;
                    store(block + v * w, e);
                }
            }
            for (int v = 0; v < n; ++v) sum[v] += run[v];
        }
    }

    /// Adds a tile's part to the outputs.
    void outputs(const Strip<T>& strip, const Segment* segments, int count, int vecs, Before before) const {
        // The first segment's product clears or rescales what is there, if it has every vector; else that
        // takes a round of its own.
        const bool whole = segments[0].vec_begin == 0 && segments[0].vec_end == vecs;
        if (!whole) prepare(strip, p.dim_v, vecs, before);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            const int64_t lane = s.vec_begin * kLanes<T>;
            const Gemm<T> g{values + s.packed * dim_v,
                            1,
                            dim_v,
                            strip.scores + s.at * strip.width + lane,
                            strip.width,
                            strip.out + lane,
                            strip.width,
                            s.end - s.begin,
                            strip.factor + lane,
                            &ahead};
            if (i > 0 || !whole || before == Before::kSame)
                gemm<Init::kAdd>(g, p.dim_v, s.vec_end - s.vec_begin);
            else if (before == Before::kNothing)
                gemm<Init::kZero>(g, p.dim_v, s.vec_end - s.vec_begin);
            else
                gemm<Init::kScale>(g, p.dim_v, s.vec_end - s.vec_begin);
        }
    }

    /// Clears the outputs, or rescales what they hold.
    static void prepare(const Strip<T>& strip, int64_t dim_v, int vecs, Before before) {
        if (before == Before::kSame) return;
        for (int64_t i = 0; i < dim_v; ++i)
            for (int64_t lane = 0; lane < vecs * kLanes<T>; lane += kLanes<T>) {
                T* o = strip.out + i * strip.width + lane;
                store(o, before == Before::kNothing ? Vec<T>{} : load(o) * load(strip.factor + lane));
            }
    }

  private:
    const VarlenParams& p;
    Ahead& ahead;
    const int64_t dim, dim_v;
    const T *keys, *values;  // [keys][dim], [keys][dim_v]
};

#if defined(__AVX512BF16__)
/// Products of bfloat16 by its own instructions, so segments are of 32 keys and two vectors, padded if need
/// be; the exponentials, rounded to bfloat16, are pairs of keys.
class TileProducts {
  public:
    using T = float;
    using Registers = Tiles;

    static constexpr int kStripVecs = 4;  // two pairs of tiles
    static constexpr int64_t kTileKeys = 128, kKeyAlign = kTileDepth;
    using Tile = KeyTile<kTileKeys, kKeyAlign>;

    TileProducts(const VarlenParams& p, Ahead& ahead)
        : p(p), ahead(ahead), depth(round_up(p.dim, kTileDepth)), dim_v(out_width(p)) {}

    static int64_t panel_bytes(const VarlenParams& p, int64_t rows) {
        return rows * round_up(p.dim, kTileDepth) * 2;
    }
    static int64_t out_width(const VarlenParams& p) { return round_up(p.dim_v, kTile); }
    void carve(Carver& c) { pairs = c.take<uint32_t>(kTileKeys / 2 * kStripVecs * kTile); }

    static int64_t key_bytes(const VarlenParams& p, int64_t keys) {
        return round_up(keys, kTileDepth) * round_up(p.dim, kTileDepth) * 2;
    }
    static int64_t value_bytes(const VarlenParams& p, int64_t keys) {
        return round_up(keys, kTileDepth) * out_width(p) * 2;
    }
    /// Packs keys, the first one to row `at`, a multiple of 32.
    static void pack_keys(const VarlenParams& p, const bf16* const* key_rows, const bf16* const* value_rows,
                          int64_t count, const PackedKeys& to, int64_t at) {
        pack_rows(key_rows, count, p.dim, static_cast<bf16*>(to.keys) + at * round_up(p.dim, kTileDepth));
        pack_columns(value_rows, count, p.dim_v, static_cast<bf16*>(to.values) + at * out_width(p),
                     kTileDepth, kTileDepth * out_width(p));
    }
    void use(const PackedKeys& packed) {
        keys = static_cast<const bf16*>(packed.keys), values = static_cast<const bf16*>(packed.values);
    }
    void expect(int64_t, int64_t) const {}  // tile loads run through whole rows, which the hardware foresees

    static int64_t steps(int64_t products) { return products / kStepProducts; }

    void pack_queries(const bf16* const* rows, int64_t count, void* panel, int64_t width) const {
        pack_lanes(rows, count, p.dim, static_cast<uint32_t*>(panel), width);
    }

    template <class View>
    static int split(const View& view, const KeyRun& run, int64_t words, Segment* segments) {
        const int64_t from = run.begin, to = least(run.end, view.end());
        if (from >= to || to <= view.begin()) return 0;
        // The first half of the lanes may see fewer keys.
        const int64_t half =
            view.vecs > 2 ? least(to, from + round_up(most(0, view.last_end[1] - from), kTileDepth)) : to;
        int count = 0;
        const auto add = [&](int64_t begin, int64_t end, int vec) {
            if (begin >= end) return;
            Segment& s = segments[count++];
            static_cast<KeyRun&>(s) = run.from(begin, words);
            s.end = end, s.vec_begin = vec, s.vec_end = view.vecs;
            s.partial = run.bits || view.cuts(begin, end, vec, view.vecs);
        };
        add(from, half, 0);
        add(half, to, 2);
        return count;
    }

    void scores(const Strip<float>& strip, const Segment& s) const {
        const int64_t lane = s.vec_begin * kTile;
        multiply({keys + s.packed * depth, depth, static_cast<const uint32_t*>(strip.queries) + lane,
                  strip.width, strip.scores + s.at * strip.width + lane, strip.width, s.end - s.begin,
                  strip.width - lane, depth, false, &ahead});
    }

    static GAPLESS_INLINE Vec<float> exponential(Vec<float> x) { return vexp<4>(x); }

    template <int n>
    void exponentials(const Strip<float>& strip, const Segment& s, float factor, const Vec<float>* base,
                      Vec<float>* sum) const {
        const int64_t lane = s.vec_begin * kTile, count = s.end - s.begin;
        const float* block = strip.scores + s.at * strip.width + lane;
        uint32_t* to = pairs + s.at / 2 * strip.width + lane;
        for (int64_t k = 0; k < count; k += 2, block += 2 * strip.width, to += strip.width)
#pragma GCC unroll 4
            for (int v = 0; v < n; ++v) {
                const Vec<float> even = exponential(load(block + v * kTile) * factor - base[v]);
                const Vec<float> odd =
                    k + 1 < count ? exponential(load(block + strip.width + v * kTile) * factor - base[v])
                                  : Vec<float>{};
                sum[v] += even + odd;
                _mm512_storeu_si512(to + v * kTile, round_pairs(even, odd));
            }
        for (int64_t k = round_up(count, 2); k < round_up(count, kTileDepth); k += 2, to += strip.width)
            std::memset(to, 0, n * kTile * sizeof(uint32_t));
    }

    void outputs(const Strip<float>& strip, const Segment* segments, int count, int vecs,
                 Before before) const {
        bool whole = true;  // every segment has every vector
        for (int i = 0; i < count; ++i) whole &= segments[i].vec_begin == 0;
        bool fresh = before == Before::kNothing && whole;
        if (!fresh) VectorProducts<float>::prepare(strip, dim_v, vecs, before);
        // Segments that follow one another, of the same vectors, are one product.
        const bf16* steps[kTileKeys / kTileDepth];
        for (int i = 0; i < count;) {
            const int64_t at = segments[i].at, lane = segments[i].vec_begin * kTile;
            int64_t depth = 0;
            for (const int vec = segments[i].vec_begin;
                 i < count && segments[i].vec_begin == vec && segments[i].at == at + depth; ++i)
                for (int64_t key = 0; key < segments[i].end - segments[i].begin; key += kTileDepth)
                    steps[depth / kTileDepth] = values + (segments[i].packed + key) * dim_v,
                                  depth += kTileDepth;
            multiply({steps[0], kTileDepth, pairs + at / 2 * strip.width + lane, strip.width,
                      strip.out + lane, strip.width, dim_v, strip.width - lane, depth, !fresh, &ahead,
                      steps});
            fresh = false;
        }
    }

  private:
    const VarlenParams& p;
    Ahead& ahead;
    const int64_t depth, dim_v;
    const bf16 *keys, *values;  // [keys][depth], [keys / 32][dim_v][32]
    uint32_t* pairs;
};
#endif

/// Calls f.operator()<E, Products>() with the types of dtype.
template <class F>
GAPLESS_INLINE void by_products(DType dtype, const F& f) {
#if defined(__AVX512BF16__)
    if (dtype == DType::kBFloat16) return f.template operator()<bf16, TileProducts>();
#endif
    by_dtype(dtype, [&]<class E>() { f.template operator()<E, VectorProducts<E>>(); });
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
