// SPDX-License-Identifier: Apache-2.0
// Attention forward, transposed: queries lie in the lanes of vectors, keys run down the rows. Then keys and
// values are read as they lie in memory, one scalar at a time, softmax needs no horizontal operation, and a
// mask is a comparison of lanes. Online softmax as in FlashAttention-2 (arXiv:2307.08691).
#include "csrc/cpu/block_sums.h"
#include "csrc/cpu/few_rows.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/row_blocks.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

template <class E, class Products>
class Forward : public RowBlocks<E, Products> {
    using Base = RowBlocks<E, Products>;
    using Base::p, Base::item, Base::map, Base::products, Base::queries, Base::scores, Base::bundle,
        Base::group, Base::first_token, Base::row_begin;
    using typename Base::T, typename Base::Tile, typename Base::View;
    static constexpr int kStripVecs = Base::kStripVecs;
    static constexpr T kTopSlack = 8;  // exponentials grow to e^8 then, far from overflow
    static constexpr int64_t kStripRows = Base::kStripRows;

  public:
    using Base::Base;

    void run() {
        const typename Products::Registers registers;
        carve_scratch([this](Carver& c) { carve(c); });
        Base::walk(*this);
    }

  private:
    friend Base;
    T *out, *top, *sum, *factor;
    bool* begun;  // whether `out` holds anything, at a strip's first row
    E** out_rows;
    T** lse_of_row;
    BlockSums<T> masses;

    void carve(Carver& c) {
        Base::carve(c);
        const int64_t rows = Base::most_rows();
        out = c.take<T>(rows * Products::out_width(p));
        top = c.take<T>(rows);
        sum = c.take<T>(rows);
        factor = c.take<T>(kStripRows);
        begun = c.take<bool>(rows);
        out_rows = c.take<E*>(rows);
        lse_of_row = c.take<T*>(rows);
        if (p.mass) masses.carve(c, *p.mass, map.len_k, rows);
    }

    void start(int64_t row, int64_t rows) {
        Base::template each_row<E>(p.out, row, row + rows, [&](int64_t i, E* at) { out_rows[i] = at; });
        map.each(row, row + rows, [&](int64_t i, int64_t query, int64_t member) {
            const int64_t head = bundle * group + member;
            lse_of_row[i] = static_cast<T*>(p.lse) + head * p.total_q + first_token + query;
            // The sink is one more score, of a key without a value. Of several parts of the keys, the first
            // has it.
            const bool sink = p.sinks && item.key_begin == 0;
            top[i] = sink ? T(p.sinks[head]) : -kInfinity<T>;
            sum[i] = sink ? 1 : 0;
        });
        for (int64_t i = rows; i < padded<T>(rows); ++i) top[i] = -kInfinity<T>, sum[i] = 0;
        std::memset(begun, 0, padded<T>(rows));
        if (p.mass) masses.clear();
    }

    void expect_results(int64_t, int64_t rows) {
        if (item.partial) return;
        for (int64_t i = 0; i < rows; ++i) Base::ahead.add(out_rows[i], p.dim_v * int64_t(sizeof(E)));
    }

    void strip(int64_t row, int64_t at, int64_t rows, const Tile& tile) {
        constexpr int w = kLanes<T>;
        const View view(map, row + at, rows);
        const Strip<T> strip{queries + Products::panel_bytes(p, at), scores,
                             out + at * Products::out_width(p), factor, padded<T>(rows)};
        Segment segments[Base::kMostSegments];
        const int count = Base::strip_scores(strip, view, tile, at, segments);
        if (count == 0) return;
        const T unit = Base::unit();

        Vec<T> best[kStripVecs], base[kStripVecs], part[kStripVecs];
        IVec<T> raised{};
        for (int v = 0; v < view.vecs; ++v) best[v] = splat(-kInfinity<T>);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            const T* block = scores + s.at * strip.width + s.vec_begin * w;
            Base::by_width(
                s, [&]<int n>() { largest<n>(block, strip.width, s.end - s.begin, best + s.vec_begin); });
        }
        for (int v = 0; v < view.vecs; ++v) {
            // A little above the old top is near enough: most tiles then leave the outputs as they are.
            const Vec<T> old_top = load(top + at + v * w), found = best[v] * unit;
            const Vec<T> new_top = found > old_top + kTopSlack ? found : old_top;
            raised |= new_top != old_top;
            base[v] = new_top == -kInfinity<T> ? Vec<T>{} : new_top;
            const Vec<T> f = vexp(old_top - base[v]);
            store(factor + v * w, f);
            store(top + at + v * w, new_top);
            part[v] = load(sum + at + v * w) * f;
        }
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            Base::by_width(s, [&]<int n>() {
                Vec<T> b[n], total[n] = {};
                for (int v = 0; v < n; ++v) b[v] = base[s.vec_begin + v];
                products.template exponentials<n>(strip, s, unit, b, total);
                for (int v = 0; v < n; ++v) part[s.vec_begin + v] += total[v];
                if (p.mass)
                    for (int v = 0; v < n; ++v)
                        masses.add(s.begin, at + (s.vec_begin + v) * w, total[v], b[v]);
            });
        }
        const Before before = !begun[at]       ? Before::kNothing
                              : any<T>(raised) ? Before::kScaled
                                               : Before::kSame;
        products.outputs(strip, segments, count, view.vecs, before);
        begun[at] = true;
        for (int v = 0; v < view.vecs; ++v) store(sum + at + v * w, part[v]);
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

    void finish(int64_t row, int64_t at, int64_t rows) {
        constexpr int w = kLanes<T>;
        const int64_t width = padded<T>(rows);
        if (!begun[at])
            std::memset(out + at * Products::out_width(p), 0, width * Products::out_width(p) * sizeof(T));
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
        if (p.mass) masses.write(*p.mass, Base::keys.sequence, bundle, row + at, rows, at, top, factor);
    }

    void keep_partial(int64_t row, int64_t at, int64_t rows) const {
        const int64_t width = padded<T>(rows), stride = p.dim_v + 2;
        T* to = static_cast<T*>(item.partial) + (bundle - item.bundle) * item.partial_stride +
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
    if (!p.blocks && !p.mass && (tile[2] - tile[1]) * (p.heads / p.kv_heads) <= kFewRows)
        return by_dtype(p.dtype, [&]<class E>() { FewRows<E>(p, item).run(); });
    by_products(p.dtype, [&]<class E, class Products>() { Forward<E, Products>(p, item).run(); });
}

PackedSize packed_size(const VarlenParams& p, int64_t keys) {
    PackedSize size{};
    by_products(p.dtype, [&]<class E, class Products>() {
        const int64_t rows = packed_row<Products>(p, round_up(keys, kPackedPiece));
        size = {Products::key_bytes(p, rows), Products::value_bytes(p, rows)};
    });
    return size;
}

void varlen_merge(const VarlenParams& p, const MergeItem& item) {
    by_dtype(p.dtype, [&]<class E>() {
        using T = typename Compute<E>::type;
        const int32_t* tile = p.tiles + 3 * item.tile;
        const int64_t group = p.heads / p.bundles, rows = (tile[2] - tile[1]) * group, width = p.dim_v + 2;
        for (int64_t row = 0; row < rows; ++row)
            merge_row<E>(p, static_cast<const T*>(item.partials) + row * width, item.parts, rows * width,
                         p.cu_seqlens_q[tile[0]] + tile[1] + row / group, item.bundle * group + row % group);
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
