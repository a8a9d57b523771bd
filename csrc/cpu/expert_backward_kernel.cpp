// SPDX-License-Identifier: Apache-2.0
// Experts backward: the forward's two products the other way round, with the activation's derivative between
// them, then the gradients of the weights, an outer product for each expert.
#include "csrc/cpu/activations.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/linear.h"
#include "csrc/cpu/scratch.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kTileInter = kTilePart;  // what one partial sum of a weight's gradient covers

template <class Linear>
class Backward {
    using E = typename Linear::Element;
    using T = typename Linear::T;

  public:
    using Panels = Strips<Linear>;
    Backward(const ExpertParams& p, const ExpertItem& item, char* dpre)
        : p(p),
          item(item),
          rows(item.end - item.begin),
          parts(p.parts()),
          dpre{{rows, terms(), dpre}, {rows, terms(), dpre + Panels::bytes(rows, terms())}} {}

    /// Panels of the gradients before the activation.
    void up() {
        void* memory;
        T *dh, *gate, *up, *value;
        Linear linear;
        carve_scratch([&](Carver& carver) {
            memory = carver.take<char>(Panels::bytes(rows, p.hidden));
            dh = carver.take<T>(tile_size<Linear>(rows));
            gate = carver.take<T>(kTileOutputs * Linear::kStrip);
            up = carver.take<T>(kTileInter * Linear::kStrip);
            value = carver.take<T>(kTileInter * Linear::kStrip);
            linear.carve(carver);
        });
        const Panels dy(rows, p.hidden, memory);
        for (int64_t s = 0; s < dy.count(); ++s) {
            const E* from[Linear::kStrip];
            for (int64_t i = 0; i < dy[s].count; ++i) from[i] = dout(row(s, i));
            Linear::pack(from, dy[s], p.hidden);
            if (item.from == 0) bias_dots(s, from, dy[s].count);
            for (int part = 0; part < parts && item.to == p.inter; ++part)
                Linear::finish(dpre[part][s], terms());
        }
        const auto part_of = [&](const ExpertItem& i, int, int64_t from) {
            return Matrix<E>::of(p.down.transposed(), i.expert).rows(from, least(kTileInter, i.to - from));
        };
        const auto tile_of = [&](int64_t from, int64_t count, const E* after) {
            linear.multiply(part_of(item, 0, from), dy, dh, false, after);
            for (int64_t s = 0; s < dy.count(); ++s)
                derive(s, dy[s], from, count, dh + s * kTileOutputs * Linear::kStrip, gate, up, value);
        };
        by_tiles(linear, item, kTileInter, 1, dy.few(), part_of, tile_of);
    }

    /// Rows of out_rows: gradients of x, one for each choice.
    void down() {
        T* c;
        Linear linear;
        carve_scratch([&](Carver& carver) {
            c = carver.take<T>(tile_size<Linear>(rows));
            linear.carve(carver);
        });
        const auto part_of = [&](const ExpertItem& i, int part, int64_t from) {
            auto tile = Matrix<E>::of(p.gate_up.transposed(), i.expert);
            tile.terms = terms(), tile.data += part * p.inter * tile.term;
            return tile.rows(from, least(kTileOutputs, i.to - from));
        };
        T ones[Linear::kStrip];
        for (int64_t i = 0; i < Linear::kStrip; ++i) ones[i] = 1;
        const auto tile_of = [&](int64_t from, int64_t count, const E* after) {
            for (int part = 0; part < parts; ++part)
                linear.multiply(part_of(item, part, from), dpre[part], c, part > 0,
                                part + 1 < parts ? part_of(item, part + 1, from).data : after);
            for (int64_t s = 0; s < dpre[0].count(); ++s) {
                const Panel x = dpre[0][s];
                T* to[Linear::kStrip];
                for (int64_t i = 0; i < x.count; ++i)
                    to[i] = static_cast<T*>(p.out_rows) + row(s, i) * p.hidden + from;
                untranspose_rows<T>(c + s * kTileOutputs * Linear::kStrip, x.width, ones, to, x.count, count);
            }
        };
        by_tiles(linear, item, kTileOutputs, parts, dpre[0].few(), part_of, tile_of);
    }

  private:
    const ExpertParams& p;
    const ExpertItem& item;
    const int64_t rows;
    const int parts;
    const Panels dpre[2];

    int64_t row(int64_t s, int64_t i) const { return item.begin + Panels::begin(s) + i; }
    int64_t terms() const { return parts > 1 ? p.inter : p.pre_width(); }
    const E* dout(int64_t r) const {
        return static_cast<const E*>(p.dout.data) + p.pair[r] / p.top_k * p.dout.row;
    }
    T* partial(int64_t tile, int64_t r) const { return static_cast<T*>(p.dtopk_weights) + tile * p.rows + r; }

    /// What the bias adds to the gradients of the weights: the last of the partial sums.
    void bias_dots(int64_t s, const E* const* rows, int64_t count) const {
        const E* bias =
            p.down_bias ? static_cast<const E*>(p.down_bias) + item.expert * p.down_bias_row : nullptr;
        for (int64_t i = 0; i < count; ++i) {
            Vec<T> sum{};
            for (int64_t at = 0; bias && at < p.hidden; at += kLanes<T>)
                sum += load_row(bias, at, p.hidden) * load_row(rows[i], at, p.hidden);
            T total = 0;
            for (int l = 0; l < kLanes<T>; ++l) total += sum[l];
            *partial(p.partials() - 1, row(s, i)) = total;
        }
    }

    void derive(int64_t s, const Panel& x, int64_t from, int64_t count, const T* dh, T* gate, T* up,
                T* value) const {
        const bool pairs = p.interleaved;
        const int64_t width = x.width, at = pairs ? 2 * from : from, each = pairs ? 2 * count : count;
        T weight[Linear::kStrip] = {}, ones[Linear::kStrip];
        const E* rows[Linear::kStrip];
        for (int64_t i = 0; i < Linear::kStrip; ++i) ones[i] = 1;
        const auto rows_at = [&](void* base, int64_t row_width, int64_t column) {
            for (int64_t i = 0; i < x.count; ++i)
                rows[i] = static_cast<const E*>(base) + row(s, i) * row_width + column;
        };
        for (int64_t i = 0; i < x.count; ++i) weight[i] = pair_weight<E>(p, p.pair[row(s, i)]);
        rows_at(p.saved, p.pre_width(), at);
        transpose_rows(rows, x.count, each, T(1), gate, width);
        if (parts > 1) {
            rows_at(p.saved, p.pre_width(), p.inter + from);
            transpose_rows(rows, x.count, count, T(1), up, width);
        }
        T sums[Linear::kStrip] = {};
        by_activation<T>(p, [&](const auto& act) {
            const int64_t step = (pairs ? 2 : 1) * width;
            T *g = gate, *u = pairs ? gate + width : parts > 1 ? up : gate;
            for (int64_t i = 0; i < count; ++i, g += step, u += step)
                for (int64_t lane = 0; lane < width; lane += kLanes<T>) {
                    const auto y = act.template run<true>(load(g + lane), load(u + lane));
                    const Vec<T> d = load(dh + i * width + lane), scaled = d * load(weight + lane);
                    store(sums + lane, load(sums + lane) + y.value * d);
                    store(value + i * width + lane, y.value);
                    if (gated(p.activation)) store(u + lane, y.by_up * scaled);
                    store(g + lane, y.by_gate * scaled);
                }
        });
        for (int64_t i = 0; i < x.count; ++i) *partial(from / kTileInter, row(s, i)) = sums[i];
        const auto put = [&](const T* values, int part, int64_t column, int64_t n) {
            Linear::put(dpre[part][s], part ? column - p.inter : column, values, n);
            if (!p.dpre) return;
            rows_at(p.dpre, p.pre_width(), column);
            untranspose_rows<E>(values, width, ones, const_cast<E* const*>(rows), x.count, n);
        };
        put(gate, 0, at, each);
        if (parts > 1) put(up, 1, p.inter + from, count);
        if (!p.activated_rows) return;
        rows_at(p.activated_rows, p.inter, from);
        untranspose_rows<E>(value, width, weight, const_cast<E* const*>(rows), x.count, count);
    }
};

/// Sums of outer products by fused multiply-add.
template <class E>
class VectorOuter {
  public:
    using Element = E;
    using T = typename Compute<E>::type;
    using Registers = NoTiles;
    static constexpr int64_t kRun = 128, kStrip = kMaxVecs * kLanes<T>;

    static int64_t width(int64_t columns) { return padded<T>(columns); }
    void carve(Carver& c, int64_t columns) {
        a = c.take<T>(kRun * kTileOutputs);
        b = c.take<T>(kRun * round_up(columns, kStrip));
    }
    void pack(const E* const* a_rows, int64_t a_width, const E* const* b_rows, int64_t columns, int64_t n) {
        count = n;
        for (int64_t t = 0; t < n; ++t) {
            copy_row(a_rows[t], a + t * kTileOutputs, a_width);
            for (int64_t at = 0; at < columns; at += kStrip) {
                const int64_t w = least(kStrip, columns - at);
                copy_row(b_rows[t] + at, b + at * kRun + t * width(w), w);
            }
        }
    }
    /// Columns from `at` on, one strip of them.
    void multiply(int64_t rows, int64_t at, int64_t w, T* c, bool add) const {
        const Gemm<T> g{a, 1, kTileOutputs, b + at * kRun, width(w), c, width(w), count};
        if (add)
            gemm<Init::kAdd>(g, rows, width(w) / kLanes<T>);
        else
            gemm<Init::kZero>(g, rows, width(w) / kLanes<T>);
    }

  private:
    T *a, *b;  // [run][kTileOutputs], [strips][run][width]
    int64_t count;
};

#if defined(__AVX512BF16__)
class TileOuter {
  public:
    using Element = bf16;
    using T = float;
    using Registers = Tiles;
    static constexpr int64_t kRun = 256, kStrip = 64;

    static int64_t width(int64_t columns) { return round_up(columns, kTile); }
    void carve(Carver& c, int64_t columns) {
        a = c.take<bf16>(kRun * kTileOutputs);
        b = c.take<uint32_t>(kRun / 2 * round_up(columns, kStrip));
    }
    void pack(const bf16* const* a_rows, int64_t a_width, const bf16* const* b_rows, int64_t columns,
              int64_t n) {
        depth = round_up(n, kTileDepth);
        pack_columns(a_rows, n, a_width, a, kTileDepth, kTileDepth * kTileOutputs);
        const bf16* rows[kRun];
        for (int64_t at = 0; at < columns; at += kStrip) {
            for (int64_t t = 0; t < n; ++t) rows[t] = b_rows[t] + at;
            pack_pairs(rows, n, least(kStrip, columns - at), b + at * kRun / 2, depth);
        }
    }
    void multiply(int64_t rows, int64_t at, int64_t w, float* c, bool add) const {
        const bf16* steps[kRun / kTileDepth];
        for (int64_t i = 0; i < depth / kTileDepth; ++i) steps[i] = a + i * kTileDepth * kTileOutputs;
        gapless::cpu::GAPLESS_ISA::multiply({a, kTileDepth, b + at * kRun / 2, width(w), c, width(w),
                                             round_up(rows, kTile), width(w), depth, add, nullptr, steps});
    }

  private:
    bf16* a;      // [run / 32][kTileOutputs][32]
    uint32_t* b;  // [strips][run / 2][width]
    int64_t depth;
};
#endif

template <class F>
GAPLESS_INLINE void by_outer(DType dtype, const F& f) {
#if defined(__AVX512BF16__)
    if (dtype == DType::kBFloat16) return f.template operator()<TileOuter>();
#endif
    by_dtype(dtype, [&]<class E>() { f.template operator()<VectorOuter<E>>(); });
}

template <class E>
GAPLESS_INLINE const E* row_of(const RowMatrix& m, const int32_t* pair, int64_t top_k, int64_t r) {
    return static_cast<const E*>(m.data) + (pair ? pair[r] / top_k : r) * m.row;
}

template <class Outer>
void outer(const OuterParams& p, const ExpertItem& item) {
    using E = typename Outer::Element;
    using T = typename Outer::T;
    const typename Outer::Registers registers;
    Outer product;
    T* c;
    carve_scratch([&](Carver& carver) {
        product.carve(carver, p.q);
        c = carver.take<T>(kTileOutputs * round_up(p.q, Outer::kStrip));
    });
    for (int64_t from = item.from; from < item.to; from += kTileOutputs) {
        const int64_t rows = least(kTileOutputs, item.to - from);
        for (int64_t begin = item.begin; begin < item.end; begin += Outer::kRun) {
            const int64_t n = least(Outer::kRun, item.end - begin);
            const E *a[Outer::kRun], *b[Outer::kRun];
            for (int64_t t = 0; t < n; ++t) {
                a[t] = row_of<E>(p.a, p.a_pair, p.top_k, begin + t) + from;
                b[t] = row_of<E>(p.b, p.b_pair, p.top_k, begin + t);
            }
            product.pack(a, rows, b, p.q, n);
            for (int64_t at = 0; at < p.q; at += Outer::kStrip)
                product.multiply(rows, at, least(Outer::kStrip, p.q - at), c + at * kTileOutputs,
                                 begin > item.begin);
        }
        for (int64_t i = 0; i < rows; ++i) {
            E* to = static_cast<E*>(p.out) + item.expert * p.out_expert + (from + i) * p.out_row;
            for (int64_t at = 0; at < p.q; at += Outer::kStrip) {
                const int64_t w = least(Outer::kStrip, p.q - at);
                const T* sums = c + at * kTileOutputs + i * Outer::width(w);
                for (int64_t lane = 0; lane < w; lane += kLanes<T>)
                    store_row(to + at, lane, w, item.begin < item.end ? load(sums + lane) : Vec<T>{});
            }
        }
    }
}

}  // namespace

int64_t expert_dpre_bytes(const ExpertParams& p, const ExpertItem& item) {
    int64_t bytes = 0;
    const int64_t parts = p.parts();
    by_linear(p.dtype, [&]<class Linear>() {
        bytes = parts * Strips<Linear>::bytes(item.end - item.begin, p.pre_width() / parts);
    });
    return bytes;
}

void expert_backward_up(const ExpertParams& p, const ExpertItem& item, char* dpre) {
    with_linear(p.dtype, [&]<class Linear>() { Backward<Linear>(p, item, dpre).up(); });
}

void expert_backward_down(const ExpertParams& p, const ExpertItem& item, char* dpre) {
    with_linear(p.dtype, [&]<class Linear>() { Backward<Linear>(p, item, dpre).down(); });
}

void grouped_outer(const OuterParams& p, const ExpertItem& item) {
    by_outer(p.dtype, [&]<class Outer>() { outer<Outer>(p, item); });
}

/// The same with a matrix of one column, factor[row] (null: ones).
void expert_sum_rows(const OuterParams& p, const ExpertItem& item) {
    by_dtype(p.dtype, [&]<class E>() {
        using T = typename Compute<E>::type;
        constexpr int64_t kRun = 128;
        E* to = static_cast<E*>(p.out) + item.expert * p.out_expert;
        for (int64_t at = 0; at < p.q; at += kLanes<T>) {
            Vec<T> sum{};
            for (int64_t begin = item.begin; begin < item.end; begin += kRun) {
                Vec<T> run{};
                for (int64_t r = begin; r < least(item.end, begin + kRun); ++r) {
                    const Vec<T> x = load_row(row_of<E>(p.b, p.b_pair, p.top_k, r), at, p.q);
                    run += p.a.data ? x * static_cast<const T*>(p.a.data)[r] : x;
                }
                sum += run;
            }
            store_row(to, at, p.q, sum);
        }
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
