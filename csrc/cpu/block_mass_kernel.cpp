// SPDX-License-Identifier: Apache-2.0
// The softmax weight that falls to each block of keys, from scores computed again and a known LSE: AdaSpa's
// LSE-cached search (arXiv:2502.21079, Algorithm 2; its p is exp(s - LSE)).
#include "csrc/cpu/block_sums.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/row_blocks.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

template <class E, class Products>
class Mass : public RowBlocks<E, Products> {
    using Base = RowBlocks<E, Products>;
    using Base::p, Base::map, Base::queries, Base::scores, Base::bundle, Base::first_token;
    using typename Base::T, typename Base::Tile, typename Base::View;

  public:
    using Base::Base;

    void run() {
        const typename Products::Registers registers;
        carve_scratch([this](Carver& c) { carve(c); });
        Base::walk(*this);
    }

  private:
    friend Base;
    T *lse, *zeros, *ones;
    BlockSums<T> masses;

    void carve(Carver& c) {
        Base::carve(c);
        lse = c.take<T>(Base::most_rows()), zeros = c.take<T>(Base::most_rows());
        ones = c.take<T>(Base::kStripRows);
        masses.carve(c, *p.mass, map.len_k, Base::most_rows());
    }

    void start(int64_t row, int64_t rows) {
        const T* from = static_cast<const T*>(p.lse) + bundle * p.total_q + first_token + row;
        for (int64_t i = 0; i < padded<T>(rows); ++i)
            lse[i] = i < rows && from[i] != -kInfinity<T> ? from[i] : kInfinity<T>;
        for (int64_t i = 0; i < padded<T>(rows); ++i) zeros[i] = 0;
        for (int64_t i = 0; i < Base::kStripRows; ++i) ones[i] = 1;
        masses.clear();
    }
    void expect_results(int64_t, int64_t) {}

    void strip(int64_t row, int64_t at, int64_t rows, const Tile& tile) {
        constexpr int w = kLanes<T>;
        const View view(map, row + at, rows);
        const Strip<T> strip{queries + Products::panel_bytes(p, at), scores, nullptr, nullptr,
                             padded<T>(rows)};
        Segment segments[Base::kMostSegments];
        const int count = Base::strip_scores(strip, view, tile, at, segments);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            const T* block = scores + s.at * strip.width + s.vec_begin * w;
            Base::by_width(s, [&]<int n>() {
                Vec<T> total[n] = {}, log[n];
                const int64_t lane = at + s.vec_begin * w;
                for (int v = 0; v < n; ++v) log[v] = load(lse + lane + v * w);
                add_exponentials<n>(block, strip.width, s.end - s.begin, log, total);
                for (int v = 0; v < n; ++v) masses.add(s.begin, lane + v * w, total[v], Vec<T>{});
            });
        }
    }

    template <int n>
    void add_exponentials(const T* block, int64_t width, int64_t keys, const Vec<T>* log,
                          Vec<T>* total) const {
        constexpr int w = kLanes<T>;
        const T unit = Base::unit();
        constexpr int64_t kRun = 16;  // one long chain of additions would lose bits
        for (int64_t k = 0; k < keys;) {
            Vec<T> run[n] = {};
            for (const int64_t end = least(keys, k + kRun); k < end; ++k, block += width)
#pragma GCC unroll 4
                for (int v = 0; v < n; ++v) {
                    const Vec<T> x = load(block + v * w) * unit - log[v];
                    run[v] += Products::exponential(x);
                }
            for (int v = 0; v < n; ++v) total[v] += run[v];
        }
    }

    void finish(int64_t row, int64_t at, int64_t rows) {
        masses.write(*p.mass, Base::keys.sequence, bundle, row + at, rows, at, zeros, ones);
    }
};

}  // namespace

void block_mass(const VarlenParams& p, const ForwardItem& item) {
    by_products(p.dtype, [&]<class E, class Products>() { Mass<E, Products>(p, item).run(); });
}

}  // namespace gapless::cpu::GAPLESS_ISA
