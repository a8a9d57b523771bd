// SPDX-License-Identifier: Apache-2.0
// Experts forward: gate-up product, activation and down product for the rows of one expert. Tiles of the
// weights pass by strips of tokens that stay in the cache.
#include "csrc/cpu/activations.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/linear.h"
#include "csrc/cpu/scratch.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

template <class Linear>
class Forward {
    using E = typename Linear::Element;
    using T = typename Linear::T;

  public:
    using Panels = Strips<Linear>;
    Forward(const ExpertParams& p, const ExpertItem& item, char* activated)
        : p(p),
          item(item),
          rows(item.end - item.begin),
          parts(p.parts()),
          activated(rows, p.inter, activated) {}

    /// Fills the activated panels.
    void up() {
        void* memory;
        T* c;
        Linear linear;
        carve_scratch([&](Carver& carver) {
            memory = carver.take<char>(Panels::bytes(rows, p.hidden));
            c = carver.take<T>(parts * tile_size<Linear>(rows));
            linear.carve(carver);
        });
        const Panels x(rows, p.hidden, memory);
        for (int64_t s = 0; s < x.count(); ++s) {
            const E* from[Linear::kStrip];
            for (int64_t i = 0; i < x[s].count; ++i)
                from[i] = static_cast<const E*>(p.x.data) + p.pair[row(s, i)] / p.top_k * p.x.row;
            Linear::pack(from, x[s], p.hidden);
            if (item.to == p.inter) Linear::finish(activated[s], p.inter);
        }
        const int64_t each = p.interleaved ? 2 : 1, tile = gated(p.activation) ? kTilePart : kTileOutputs;
        const auto part_of = [&](const ExpertItem& i, int part, int64_t from) {
            return Matrix<E>::of(p.gate_up, i.expert)
                .rows(part * p.inter + from * each, least(tile, i.to - from) * each);
        };
        T* const c2 = c + tile_size<Linear>(rows);
        const auto tile_of = [&](int64_t from, int64_t count, const E* after) {
            const auto first = part_of(item, 0, from), second = part_of(item, parts - 1, from);
            linear.multiply(first, x, c, false, parts > 1 ? second.data : after);
            if (parts > 1) linear.multiply(second, x, c2, false, after);
            for (int64_t s = 0; s < x.count(); ++s) {
                const int64_t at = s * kTileOutputs * Linear::kStrip;
                finish_tile(c + at, c2 + at, x[s], s, from, count);
                Linear::put(activated[s], from, c + at, count);
            }
        };
        by_tiles(linear, item, tile, parts, x.few(), part_of, tile_of);
    }

    /// Rows of out_rows, times their weights.
    void down() {
        T* c;
        Linear linear;
        carve_scratch([&](Carver& carver) {
            c = carver.take<T>(tile_size<Linear>(rows));
            linear.carve(carver);
        });
        const E* bias =
            p.down_bias ? static_cast<const E*>(p.down_bias) + item.expert * p.down_bias_row : nullptr;
        const auto part_of = [&](const ExpertItem& i, int, int64_t from) {
            return Matrix<E>::part(p.down, i, from);
        };
        const auto tile_of = [&](int64_t from, int64_t count, const E* after) {
            for (int64_t i = 0; !activated.few() && i < rows; ++i)
                linear.ahead.add(out_row(item.begin + i) + from, count * int64_t(sizeof(T)));
            linear.multiply(part_of(item, 0, from), activated, c, false, after);
            for (int64_t s = 0; s < activated.count(); ++s) {
                const Panel x = activated[s];
                T* const sums = c + s * kTileOutputs * Linear::kStrip;
                if (bias) add_bias(sums, x.width, bias + from, count);
                T weight[Linear::kStrip] = {};
                T* to[Linear::kStrip];
                for (int64_t i = 0; i < x.count; ++i) {
                    const int64_t r = row(s, i);
                    weight[i] = pair_weight<E>(p, p.pair[r]);
                    to[i] = out_row(r) + from;
                }
                untranspose_rows<T>(sums, x.width, weight, to, x.count, count);
            }
        };
        by_tiles(linear, item, kTilePart, 1, activated.few(), part_of, tile_of);
    }

  private:
    const ExpertParams& p;
    const ExpertItem& item;
    const int64_t rows;
    const int parts;
    const Panels activated;

    int64_t row(int64_t s, int64_t i) const { return item.begin + Panels::begin(s) + i; }
    T* out_row(int64_t r) const { return static_cast<T*>(p.out_rows) + r * p.hidden; }

    static void add_bias(T* c, int64_t width, const E* bias, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const Vec<T> b = splat(load_row(bias + i, 0, 1)[0]);
            for (int64_t lane = 0; lane < width; lane += kLanes<T>)
                store(c + i * width + lane, load(c + i * width + lane) + b);
        }
    }

    /// Bias, what backward wants to see, and the activation, whose results take the place of the gates.
    void finish_tile(T* c, T* c2, const Panel& x, int64_t s, int64_t from, int64_t count) {
        const bool pairs = p.interleaved;
        if (p.gate_up_bias) {
            const E* bias = static_cast<const E*>(p.gate_up_bias) + item.expert * p.gate_up_bias_row;
            add_bias(c, x.width, bias + (pairs ? 2 * from : from), pairs ? 2 * count : count);
            if (parts > 1) add_bias(c2, x.width, bias + p.inter + from, count);
        }
        if (p.saved) {
            save(c, x, s, pairs ? 2 * from : from, pairs ? 2 * count : count);
            if (parts > 1) save(c2, x, s, p.inter + from, count);
        }
        by_activation<T>(p, [&](const auto& act) {
            const T *gate = c, *up = pairs ? c + x.width : parts > 1 ? c2 : c;
            const int64_t step = (pairs ? 2 : 1) * x.width;
            T* to = c;
            for (int64_t i = 0; i < count; ++i, gate += step, up += step, to += x.width)
                for (int64_t lane = 0; lane < x.width; lane += kLanes<T>)
                    store(to + lane, act.template run<false>(load(gate + lane), load(up + lane)).value);
        });
    }

    void save(const T* c, const Panel& x, int64_t s, int64_t at, int64_t count) const {
        T ones[Linear::kStrip];
        E* rows[Linear::kStrip];
        for (int64_t i = 0; i < Linear::kStrip; ++i) ones[i] = 1;
        for (int64_t i = 0; i < x.count; ++i)
            rows[i] = static_cast<E*>(p.saved) + row(s, i) * p.pre_width() + at;
        untranspose_rows<E>(c, x.width, ones, rows, x.count, count);
    }
};

}  // namespace

int64_t expert_panel_bytes(const ExpertParams& p, const ExpertItem& item) {
    int64_t bytes = 0;
    by_linear(p.dtype,
              [&]<class Linear>() { bytes = Strips<Linear>::bytes(item.end - item.begin, p.inter); });
    return bytes;
}

void expert_up(const ExpertParams& p, const ExpertItem& item, char* activated) {
    with_linear(p.dtype, [&]<class Linear>() { Forward<Linear>(p, item, activated).up(); });
}

void expert_down(const ExpertParams& p, const ExpertItem& item, char* activated) {
    with_linear(p.dtype, [&]<class Linear>() { Forward<Linear>(p, item, activated).down(); });
}

void grouped_mm(const GroupedParams& p, const ExpertItem& item) {
    with_linear(p.dtype, [&]<class Linear>() {
        using E = typename Linear::Element;
        using T = typename Linear::T;
        const int64_t rows = item.end - item.begin;
        const int64_t terms = p.w.terms;
        void* memory;
        T* c;
        Linear linear;
        carve_scratch([&](Carver& carver) {
            memory = carver.take<char>(Strips<Linear>::bytes(rows, terms));
            c = carver.take<T>(tile_size<Linear>(rows));
            linear.carve(carver);
        });
        const Strips<Linear> x(rows, terms, memory);
        E* row[Linear::kStrip];
        const auto rows_of = [&](const RowMatrix& m, int64_t s, int64_t at) {
            for (int64_t i = 0; i < x[s].count; ++i)
                row[i] = static_cast<E*>(m.data) + (item.begin + x.begin(s) + i) * m.row + at;
        };
        for (int64_t s = 0; s < x.count(); ++s) {
            rows_of(p.x, s, 0);
            Linear::pack(row, x[s], terms);
        }
        T ones[Linear::kStrip];
        for (int64_t i = 0; i < Linear::kStrip; ++i) ones[i] = 1;
        const auto part_of = [&](const ExpertItem& i, int, int64_t from) {
            return Matrix<E>::part(p.w, i, from);
        };
        const auto tile_of = [&](int64_t from, int64_t count, const E* after) {
            for (int64_t s = 0; !x.few() && s < x.count(); ++s) {
                rows_of(p.out, s, from);
                for (int64_t i = 0; i < x[s].count; ++i) linear.ahead.add(row[i], count * int64_t(sizeof(E)));
            }
            linear.multiply(part_of(item, 0, from), x, c, false, after);
            for (int64_t s = 0; s < x.count(); ++s) {
                rows_of(p.out, s, from);
                untranspose_rows<E>(c + s * kTileOutputs * Linear::kStrip, x[s].width, ones, row, x[s].count,
                                    count);
            }
        };
        by_tiles(linear, item, kTilePart, 1, x.few(), part_of, tile_of);
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
