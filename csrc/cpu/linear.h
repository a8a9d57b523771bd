// SPDX-License-Identifier: Apache-2.0
// y = W x for a few tokens or many: tokens lie in the lanes, W is read where it is. Sums run over kRun terms
// at a time in the order of the terms, whatever the number of tokens: what else is in the batch does not
// change a token's bits.
#pragma once

#include <type_traits>

#include "csrc/common/expert_params.h"
#include "csrc/cpu/bf16_tiles.h"
#include "csrc/cpu/gemm_tiles.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kLinesAhead = 8192;
constexpr int64_t kTileOutputs = 128;  // as many as stay in the L2 cache while strips of tokens pass by
constexpr int64_t kTilePart = 64;      // of each of two matrices, or if their results are to stay there too

/// Outputs x terms of one expert.
template <class E>
struct Matrix {
    const E* data;
    int64_t output, term;  // strides
    int64_t outputs, terms;

    static Matrix of(const ExpertMatrices& w, int64_t expert) {
        return {static_cast<const E*>(w.data) + expert * w.expert, w.output, w.term, w.outputs, w.terms};
    }
    /// What lies side by side, asked for bit by bit.
    void expect(Ahead& ahead) const {
        const bool by_term = output == 1;
        const int64_t lines = by_term ? terms : outputs, step = by_term ? term : output;
        for (int64_t i = 0; i < lines; ++i)
            ahead.add(data + i * step, (by_term ? outputs : terms) * int64_t(sizeof(E)));
    }
    Matrix rows(int64_t from, int64_t count) const {
        return {data + from * output, output, term, count, terms};
    }
    /// The outputs of an item from `from` on, a kTilePart of them at most.
    static Matrix part(const ExpertMatrices& w, const ExpertItem& item, int64_t from) {
        return of(w, item.expert).rows(from, least(kTilePart, item.to - from));
    }
};

/// Tokens side by side: panel[term][lane], `width` lanes of which `count` are tokens.
struct Panel {
    void* data;
    int64_t width, count;
};

/// What FewTokens takes for one term of a sum: a value, widened.
template <class E>
struct WideTerm {
    using Element = E;
    using T = typename Compute<E>::type;
    using Cell = T;  // of a panel
    static constexpr int kValues = 1;
    static GAPLESS_INLINE Vec<T> load(const E* row) { return load_wide(row); }
    static GAPLESS_INLINE Vec<T> load(const E* row, int64_t at, int64_t width) {
        return load_row(row, at, width);
    }
    /// Of `count` values that lie side by side.
    static GAPLESS_INLINE Vec<T> side_by_side(const E* const* values, int64_t count) {
        return load_row(values[0], 0, count);
    }
    static GAPLESS_INLINE Vec<T> add(Vec<T> sum, Vec<T> x, Cell y) { return sum + x * splat(y); }
};

/// C[output][lane] of a few tokens: here the outputs are in the lanes, so that none is empty. The sums are
/// those of the product for many.
template <class Term, int kTokens>
class FewTokens {
    using E = typename Term::Element;
    using T = typename Term::T;
    using Cell = typename Term::Cell;
    static constexpr int n = kLanes<T>;
    static constexpr int64_t kSquare = n * Term::kValues;

  public:
    FewTokens(const Matrix<E>& w, const Panel& x)
        : w(w), panel(static_cast<const Cell*>(x.data)), width(x.width) {}

    /// after: the rows that come next.
    void multiply(int64_t run, T* c, bool add, const E* after) const {
        for (int64_t m = 0; m < w.outputs; m += n, c += n * width) {
            const int64_t count = least(n, w.outputs - m);
            const E* rows = w.data + m * w.output;
            const E* next = m + n < w.outputs ? rows + n * w.output : after;
            Vec<T> sum[kTokens] = {};
            for (int t = 0; add && t < kTokens; ++t)
                for (int i = 0; i < count; ++i) sum[t][i] = c[i * width + t];
            for (int64_t begin = 0; begin < w.terms; begin += run) {
                const int64_t end = least(w.terms, begin + run);
                Vec<T> part[kTokens] = {};
                int64_t k = begin;
                if (count == n && w.term == 1)
                    for (; k + kSquare <= end; k += kSquare) add_square(rows, next, k, part);
                for (; k < end; k += kSquare) add_rest(rows, count, k, least(kSquare, end - k), part);
                for (int t = 0; t < kTokens; ++t) sum[t] = begin || add ? part[t] + sum[t] : part[t];
            }
            for (int t = 0; t < kTokens; ++t)
                for (int i = 0; i < count; ++i) c[i * width + t] = sum[t][i];
        }
    }

  private:
    const Matrix<E>& w;
    const Cell* const panel;
    const int64_t width;

    GAPLESS_INLINE void add_square(const E* rows, const E* next, int64_t k, Vec<T>* part) const {
        // Lines that come later: of these rows, then of the next ones.
        constexpr int64_t kAhead = 2048 / sizeof(E);
        const E* later = k + kAhead < w.terms ? rows + k + kAhead : next + k + kAhead - w.terms;
        Vec<T> x[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
            x[i] = Term::load(rows + i * w.output + k);
            Ahead::touch(reinterpret_cast<const char*>(later + i * w.output));
        }
        transpose<T>(x);
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) add_term(x[j], k / Term::kValues + j, part);
    }

    /// Values [k, k + values), of fewer rows, or of rows that lie otherwise.
    void add_rest(const E* rows, int64_t count, int64_t k, int64_t values, Vec<T>* part) const {
        const int64_t terms = (values + Term::kValues - 1) / Term::kValues;
        Vec<T> x[n] = {};
        if (w.term == 1) {
            for (int i = 0; i < count; ++i) x[i] = Term::load(rows + i * w.output, k, k + values);
            transpose<T>(x);
        } else {
            for (int j = 0; j < terms; ++j) x[j] = gather(rows, count, k + j * Term::kValues, k + values);
        }
        for (int j = 0; j < terms; ++j) add_term(x[j], k / Term::kValues + j, part);
    }

    /// The term at k of `count` outputs.
    Vec<T> gather(const E* rows, int64_t count, int64_t k, int64_t end) const {
        E gathered[Term::kValues][n];
        const E* values[Term::kValues] = {};
        for (int v = 0; v < Term::kValues && k + v < end; ++v) {
            values[v] = rows + (k + v) * w.term;
            if (w.output == 1) continue;
            for (int64_t i = 0; i < count; ++i) gathered[v][i] = values[v][i * w.output];
            values[v] = gathered[v];
        }
        return Term::side_by_side(values, count);
    }

    GAPLESS_INLINE void add_term(Vec<T> x, int64_t k, Vec<T>* part) const {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) part[t] = Term::add(part[t], x, panel[k * width + t]);
    }
};

constexpr int64_t kMostFew = 12;
/// c of a panel [output][token] = or += W times it. No more tokens than a panel of the narrowest vectors, two
/// lanes, is wide.
template <class Term>
void multiply_few(const Matrix<typename Term::Element>& w, const Panel& x, int64_t run, typename Term::T* c,
                  bool add, const typename Term::Element* after) {
    const auto by = [&]<int kTokens>() {
        FewTokens<Term, kTokens>(w, x).multiply(run, c, add, after ? after : w.data);
    };
    if (x.count <= 1) return by.template operator()<1>();
    if (x.count <= 2) return by.template operator()<2>();
    if (x.count <= 3) return by.template operator()<3>();
    if (x.count <= 4) return by.template operator()<4>();
    if (x.count <= 6) return by.template operator()<6>();
    if (x.count <= 8) return by.template operator()<8>();
    if (x.count <= 10) return by.template operator()<10>();
    return by.template operator()<kMostFew>();
}

/// Sums of no terms.
template <class Panels, class T>
void clear(int64_t outputs, const Panels& panels, T* c) {
    for (int64_t s = 0; s < panels.count(); ++s)
        std::memset(c + s * kTileOutputs * Panels::kStrip, 0, outputs * panels[s].width * sizeof(T));
}

/// Products by fused multiply-add, for any type.
template <class E>
class VectorLinear {
  public:
    using Element = E;
    using T = typename Compute<E>::type;
    using Registers = NoTiles;
    static constexpr int64_t kStrip = kMaxVecs * kLanes<T>;  // lanes whose terms of a run stay in L1
    static constexpr int64_t kFew = kStrip < kMostFew ? kStrip : kMostFew;  // of one strip

    static int64_t width(int64_t count) { return padded<T>(count); }
    static int64_t panel_bytes(int64_t terms, int64_t width) { return terms * width * sizeof(T); }
    void carve(Carver& c) {
        a = c.take<T>(kTileOutputs * kRun);
        ahead.carve(c, kLinesAhead);
    }

    static void pack(const E* const* rows, const Panel& to, int64_t terms) {
        transpose_rows(rows, to.count, terms, T(1), static_cast<T*>(to.data), to.width);
    }
    /// Rounds values [count][width] to E: terms [at, at + count) of the panel.
    static void put(const Panel& to, int64_t at, const T* values, int64_t count) {
        T* panel = static_cast<T*>(to.data) + at * to.width;
        for (int64_t i = 0; i < count * to.width; i += kLanes<T>) {
            Vec<T> x = load(values + i);
            if constexpr (!std::is_same_v<E, T>) {
                E rounded[kLanes<T>];
                store_narrow(rounded, x);
                x = load_wide(rounded);
            }
            store(panel + i, x);
        }
    }
    /// Clears what put() does not reach.
    static void finish(const Panel&, int64_t) {}
    static int64_t steps(int64_t products) { return gemm_steps<T>(products); }

    /// c of each panel [output][lane] = or += W times the panel. Many tokens read a copy of W, a few terms at
    /// a time: its rows are a page or so apart, where they would push each other out of the cache. A few ask
    /// for the next rows by themselves: those at `after`.
    template <class Panels>
    void multiply(const Matrix<E>& w, const Panels& panels, T* c, bool add, const E* after) {
        if (w.terms == 0 && !add) return clear(w.outputs, panels, c);
        if (panels.few()) return multiply_few<WideTerm<E>>(w, panels[0], kRun, c, add, after);
        for (int64_t k = 0; k < w.terms; k += kRun) {
            const int64_t run = least(kRun, w.terms - k);
            const Gemm<T> packed = pack(w, k, run);
            for (int64_t s = 0; s < panels.count(); ++s) {
                const Panel x = panels[s];
                Gemm<T> g = packed;
                g.b = static_cast<const T*>(x.data) + k * x.width, g.b_row = x.width;
                g.c = c + s * kTileOutputs * kStrip, g.c_row = x.width;
                if (add || k)
                    gemm<Init::kAdd>(g, w.outputs, x.width / kLanes<T>);
                else
                    gemm<Init::kZero>(g, w.outputs, x.width / kLanes<T>);
            }
        }
    }
    Ahead ahead;

  private:
    static constexpr int64_t kRun = 128;
    T* a;  // [outputs][kRun], or [run][outputs] if these lie side by side

    Gemm<T> pack(const Matrix<E>& w, int64_t k, int64_t run) {
        Gemm<T> g{a, kRun, 1, nullptr, 0, nullptr, 0, run, nullptr, &ahead};
        if (w.term == 1) {
            for (int64_t i = 0; i < w.outputs; ++i) copy_row(w.data + i * w.output + k, a + i * kRun, run);
            return g;
        }
        g.a_row = 1, g.a_col = kTileOutputs;
        for (int64_t j = 0; j < run; ++j) {
            const E* from = w.data + (k + j) * w.term;
            T* to = a + j * kTileOutputs;
            if (w.output == 1)
                copy_row(from, to, w.outputs);
            else
                for (int64_t i = 0; i < w.outputs; ++i) to[i] = load_row(from + i * w.output, 0, 1)[0];
        }
        return g;
    }
};

#if defined(__AVX512BF16__)
/// Two rows of values, rounded to nearest, as pairs.
GAPLESS_INLINE __m512i nearest_pairs(Vec<float> even, Vec<float> odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/// Two values of bfloat16, as they are.
struct PairTerm {
    using Element = bf16;
    using T = float;
    using Cell = uint32_t;
    static constexpr int kValues = 2;
    static GAPLESS_INLINE Vec<float> load(const bf16* row) {
        return gapless::cpu::GAPLESS_ISA::load(reinterpret_cast<const float*>(row));
    }
    static GAPLESS_INLINE Vec<float> load(const bf16* row, int64_t at, int64_t width) {
        return (Vec<float>)load_pairs(row, at, width);
    }
    static GAPLESS_INLINE Vec<float> side_by_side(const bf16* const* values, int64_t count) {
        return (Vec<float>)pair_rows(values[0], values[1], 0, count);
    }
    static GAPLESS_INLINE Vec<float> add(Vec<float> sum, Vec<float> x, uint32_t y) {
        return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(int(y)));
    }
};

/// Products of bfloat16 by its own instructions.
class TileLinear {
  public:
    using Element = bf16;
    using T = float;
    using Registers = Tiles;
    static constexpr int64_t kStrip = 64, kFew = kFewLanes;

    static int64_t width(int64_t count) { return round_up(count, kTile); }
    static int64_t panel_bytes(int64_t terms, int64_t width) {
        return round_up(terms, kTileDepth) * width * 2;
    }
    void carve(Carver& c) {
        copy = c.take<bf16>(kTileOutputs * kRun);
        ahead.carve(c, kLinesAhead);
    }

    static void pack(const bf16* const* rows, const Panel& to, int64_t terms) {
        pack_lanes(rows, to.count, terms, static_cast<uint32_t*>(to.data), to.width);
    }
    /// Rounds values [count][width]: terms [at, at + count) of the panel; at is even.
    static void put(const Panel& to, int64_t at, const float* values, int64_t count) {
        uint32_t* panel = static_cast<uint32_t*>(to.data) + at / 2 * to.width;
        for (int64_t i = 0; i < count; i += 2, panel += to.width)
            for (int64_t lane = 0; lane < to.width; lane += kTile) {
                const float* row = values + i * to.width + lane;
                const Vec<float> odd = i + 1 < count ? load(row + to.width) : Vec<float>{};
                _mm512_storeu_si512(panel + lane, nearest_pairs(load(row), odd));
            }
    }
    /// Clears what put() does not reach: terms up to a whole tile.
    static void finish(const Panel& to, int64_t terms) {
        const int64_t from = (terms + 1) / 2, end = round_up(terms, kTileDepth) / 2;
        std::memset(static_cast<uint32_t*>(to.data) + from * to.width, 0,
                    (end - from) * to.width * sizeof(uint32_t));
    }
    static int64_t steps(int64_t products) { return products / kStepProducts; }

    /// c of each panel [output][lane] = or += W times the panel. Whole tiles are read where they are; nothing
    /// outside of the matrix is touched.
    template <class Panels>
    void multiply(const Matrix<bf16>& w, const Panels& panels, float* c, bool add,
                  [[maybe_unused]] const bf16* after) {
        if (w.terms == 0 && !add) return clear(w.outputs, panels, c);
        if constexpr (kFew > 0)
            if (panels.few()) return multiply_few<PairTerm>(w, panels[0], kRun, c, add, after);
        const int64_t outputs = round_up(w.outputs, kTile);
        TileProduct p{w.data, w.output, nullptr, 0, nullptr, 0, outputs, 0, 0, add, &ahead};
        const auto run = [&](int64_t k, int64_t s) {
            const Panel x = panels[s];
            p.b = static_cast<const uint32_t*>(x.data) + k / 2 * x.width, p.b_row = x.width;
            p.c = c + s * kTileOutputs * kStrip, p.c_row = p.lanes = x.width;
            p.depth = round_up(least(kRun, w.terms - k), kTileDepth), p.add = add || k;
            gapless::cpu::GAPLESS_ISA::multiply(p);
        };
        if (w.term == 1 && w.terms % kTileDepth == 0 && w.outputs == outputs) {
            for (int64_t s = 0; s < panels.count(); ++s)
                for (int64_t k = 0; k < w.terms; k += kRun) p.a = w.data + k, run(k, s);
            return;
        }
        const bf16 *rows[kTileOutputs], *steps[kRun / kTileDepth];
        for (int64_t k = 0; k < w.terms; k += kRun) {
            const int64_t terms = least(kRun, w.terms - k);
            p.a = copy;
            if (w.term == 1) {
                for (int64_t i = 0; i < w.outputs; ++i) rows[i] = w.data + i * w.output + k;
                pack_rows(rows, w.outputs, terms, copy);
                p.a_row = round_up(terms, kTileDepth);
            } else {
                pack_transposed(w, k, terms, outputs);
                for (int64_t i = 0; i < kRun / kTileDepth; ++i) steps[i] = copy + i * kTileDepth * outputs;
                p.a_row = kTileDepth, p.steps = steps;
            }
            for (int64_t s = 0; s < panels.count(); ++s) run(k, s);
        }
    }
    Ahead ahead;

  private:
    static constexpr int64_t kRun = 256;
    bf16* copy;

    /// [terms / 32][outputs][32]
    void pack_transposed(const Matrix<bf16>& w, int64_t from, int64_t terms, int64_t outputs) {
        const bf16* rows[kTileDepth];
        bf16 gathered[kTileDepth][kTileOutputs];
        for (int64_t k = 0; k < terms; k += kTileDepth) {
            const int64_t count = least(kTileDepth, terms - k);
            for (int64_t j = 0; j < count; ++j) {
                rows[j] = w.data + (from + k + j) * w.term;
                if (w.output == 1) continue;
                for (int64_t i = 0; i < w.outputs; ++i) gathered[j][i] = rows[j][i * w.output];
                rows[j] = gathered[j];
            }
            pack_columns(rows, count, w.outputs, copy + k * outputs, kTileDepth, 0);
        }
    }
};
#endif

/// Calls f.operator()<Linear>() with the products of dtype.
template <class F>
GAPLESS_INLINE void by_linear(DType dtype, const F& f) {
#if defined(__AVX512BF16__)
    if (dtype == DType::kBFloat16) return f.template operator()<TileLinear>();
#endif
    by_dtype(dtype, [&]<class E>() { f.template operator()<VectorLinear<E>>(); });
}

/// The same, with the registers that they need.
template <class F>
GAPLESS_INLINE void with_linear(DType dtype, const F& f) {
    by_linear(dtype, [&]<class Linear>() {
        const typename Linear::Registers registers;
        f.template operator()<Linear>();
    });
}

/// Calls tile(from, count, after) for tiles of `each` of an item's outputs, one after another. The weights
/// that come next, part(item, i, from) for each of `parts`, are asked for meanwhile; the first of them lie at
/// `after`.
template <class Linear, class Part, class Tile>
GAPLESS_INLINE void by_tiles(Linear& linear, const ExpertItem& item, int64_t each, int parts, bool few,
                             const Part& part, const Tile& tile) {
    for (int64_t from = item.from; from < item.to; from += each) {
        const int64_t count = least(each, item.to - from);
        const bool more = from + count < item.to;
        const ExpertItem* const then = more ? &item : item.next;
        const int64_t at = more ? from + count : then ? then->from : 0;
        linear.ahead.clear();
        if (then && !few) {
            for (int i = 0; i < parts; ++i) part(*then, i, at).expect(linear.ahead);
            const auto now = part(item, 0, from);
            linear.ahead.spread(Linear::steps((item.end - item.begin) * parts * now.outputs * now.terms));
        }
        tile(from, count, then ? part(*then, 0, at).data : nullptr);
    }
}

/// The weight of a pair, from topk_weights.
template <class E, class T = typename Compute<E>::type>
GAPLESS_INLINE T pair_weight(const ExpertParams& p, int64_t pair) {
    if (p.weights_wide) return static_cast<const T*>(p.topk_weights)[pair];
    return load_row(static_cast<const E*>(p.topk_weights) + pair, 0, 1)[0];
}

/// The rows of an item in strips of lanes, their panels one behind the other.
template <class Linear>
class Strips {
  public:
    static constexpr int64_t kStrip = Linear::kStrip;
    Strips(int64_t rows, int64_t terms, void* base)
        : rows(rows), terms(terms), base(static_cast<char*>(base)) {}

    int64_t count() const { return (rows + Linear::kStrip - 1) / Linear::kStrip; }
    static int64_t begin(int64_t s) { return s * Linear::kStrip; }
    Panel operator[](int64_t s) const {
        const int64_t count = least(Linear::kStrip, rows - begin(s));
        return {base + s * bytes_of(terms, Linear::kStrip), Linear::width(count), count};
    }
    static int64_t bytes(int64_t rows, int64_t terms) {
        const int64_t whole = rows / Linear::kStrip, rest = rows % Linear::kStrip;
        return whole * bytes_of(terms, Linear::kStrip) + (rest ? bytes_of(terms, rest) : 0);
    }
    bool few() const { return rows <= Linear::kFew; }

  private:
    const int64_t rows, terms;
    char* const base;

    static int64_t bytes_of(int64_t terms, int64_t lanes) {
        return round_up(Linear::panel_bytes(terms, Linear::width(lanes)), 64);
    }
};

/// Room for the products of a tile of outputs with every strip of an item.
template <class Linear>
int64_t tile_size(int64_t rows) {
    return round_up(rows, Linear::kStrip) * kTileOutputs;
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
