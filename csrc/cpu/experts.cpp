// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/experts.h"

#include <algorithm>
#include <vector>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/recycle.h"
#include "csrc/cpu/work.h"

namespace gapless::cpu {
namespace {

constexpr int64_t kMostRows = 256, kRowAlign = 64, kOutputAlign = 128;
constexpr int64_t kRowsOfItem = 32;  // of tokens that are gathered or summed

int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Memory for as long as this lives.
struct Memory {
    void* data;
    explicit Memory(int64_t bytes) : data(take(static_cast<size_t>(std::max<int64_t>(bytes, 1)))) {}
    Memory(const Memory&) = delete;
    ~Memory() { give_back(data); }
};

/// Items of about equal size, whole strips where an expert has more rows than one item takes.
std::vector<ExpertItem> items_of(const ExpertRows& rows, int64_t outputs) {
    std::vector<ExpertItem> items;
    for (size_t e = 0; e < rows.count.size(); ++e) {
        const int64_t n = rows.count[e], parts = cdiv(n, kMostRows);
        const int64_t each = parts > 1 ? cdiv(cdiv(n, parts), kRowAlign) * kRowAlign : n;
        for (int64_t at = 0; at < n; at += each)
            items.push_back(
                {int32_t(e), rows.offset[e] + at, rows.offset[e] + std::min(n, at + each), 0, outputs});
    }
    return items;
}

struct Piece {
    ExpertItem item;
    size_t whole;  // which item it is of
};

/// Each item in `parts`, by its outputs.
std::vector<Piece> split(const std::vector<ExpertItem>& items, int64_t outputs, int64_t parts) {
    const int64_t each = std::max(cdiv(cdiv(outputs, parts), kOutputAlign), int64_t{1}) * kOutputAlign;
    std::vector<Piece> pieces;
    for (size_t i = 0; i < items.size(); ++i)
        for (int64_t from = 0; from < outputs; from += each) {
            pieces.push_back({items[i], i});
            pieces.back().item.from = from, pieces.back().item.to = std::min(outputs, from + each);
        }
    return pieces;
}

/// Calls run(item, whole) for all pieces; each item knows the one after it.
template <class Run>
void run_pieces(const std::vector<Piece>& pieces, const Threads& threads, const Run& run) {
    in_order(pieces.size(), threads, [&](int64_t i, int64_t next) {
        ExpertItem item = pieces[i].item;
        item.next = next < 0 ? nullptr : &pieces[next].item;
        run(item, pieces[i].whole);
    });
}

/// The kernels of a pass: a product, what follows it, and a second product over the panels between them.
struct Pass {
    int64_t (*panel_bytes)(const ExpertParams&, const ExpertItem&);
    void (*first)(const ExpertParams&, const ExpertItem&, char* panels);
    void (*second)(const ExpertParams&, const ExpertItem&, char* panels);
};

void two_products(const Pass& pass, const ExpertParams& p, const std::vector<ExpertItem>& items,
                  const Threads& threads) {
    std::vector<int64_t> at(items.size() + 1);
    for (size_t i = 0; i < items.size(); ++i) at[i + 1] = at[i] + pass.panel_bytes(p, items[i]);
    const int64_t enough = kItemsPerThread * threads.count;
    if (int64_t(items.size()) >= enough || threads.count == 1) {
        // An item's activations stay where they are used.
        int64_t most = 0;
        for (size_t i = 0; i < items.size(); ++i) most = std::max(most, at[i + 1] - at[i]);
        in_order(items.size(), threads, [&](int64_t i) {
            const Memory panels(most);
            pass.first(p, items[i], static_cast<char*>(panels.data));
            ExpertItem down = items[i];
            down.to = p.hidden;
            pass.second(p, down, static_cast<char*>(panels.data));
        });
    } else {
        const Memory panels(at.back());
        char* const base = static_cast<char*>(panels.data);
        const int64_t parts = items.empty() ? 1 : cdiv(enough, int64_t(items.size()));
        const auto ups = split(items, p.inter, parts), downs = split(items, p.hidden, parts);
        run_pieces(ups, threads, [&](const ExpertItem& up, size_t i) { pass.first(p, up, base + at[i]); });
        run_pieces(downs, threads,
                   [&](const ExpertItem& down, size_t i) { pass.second(p, down, base + at[i]); });
    }
}

/// to[pair] of each row in use: its partial sums, in their order.
template <class T>
void add_partials(const ExpertParams& p, const ExpertRows& rows, T* to) {
    const T* partial = static_cast<const T*>(p.dtopk_weights);
    for (size_t e = 0; e < rows.count.size(); ++e)
        for (int64_t r = rows.offset[e]; r < rows.offset[e] + rows.count[e]; ++r) {
            T sum = 0;
            for (int64_t i = 0; i < p.partials(); ++i) sum += partial[i * rows.rows + r];
            to[p.pair[r]] = sum;
        }
}

}  // namespace

ExpertRows ExpertRows::of_dispatch(const int32_t* offsets, const int32_t* counts, int64_t experts,
                                   int64_t rows) {
    ExpertRows r{std::vector<int64_t>(experts), std::vector<int64_t>(experts), rows};
    int64_t end = 0;
    for (int64_t e = 0; e < experts; ++e) {
        check(offsets[e] >= end && offsets[e] <= rows, "offsets", e, offsets[e],
              "between " + std::to_string(end) + " and " + std::to_string(rows));
        check(counts[e] >= 0 && counts[e] <= rows - offsets[e], "counts", e, counts[e],
              "between 0 and " + std::to_string(rows - offsets[e]));
        r.offset[e] = offsets[e], r.count[e] = counts[e];
        end = r.offset[e] + r.count[e];
    }
    return r;
}

ExpertRows ExpertRows::of_ends(const int32_t* ends, int64_t experts, int64_t rows) {
    ExpertRows r{std::vector<int64_t>(experts), std::vector<int64_t>(experts), rows};
    int64_t end = 0;
    for (int64_t e = 0; e < experts; ++e) {
        check(ends[e] >= end && ends[e] <= rows, "offs", e, ends[e],
              "between " + std::to_string(end) + " and " + std::to_string(rows));
        r.offset[e] = end, r.count[e] = ends[e] - end;
        end = ends[e];
    }
    return r;
}

ExpertRows ExpertRows::part(int64_t first, int64_t n) const {
    return {{offset.begin() + first, offset.begin() + first + n},
            {count.begin() + first, count.begin() + first + n},
            rows};
}

void pair_rows(PairRowsKernel run, const PairRowsParams& p, int64_t count, const Threads& threads) {
    in_order(cdiv(count, kRowsOfItem), enough_threads(count * p.top_k * p.width, threads),
             [&](int64_t i) { run(p, i * kRowsOfItem, std::min(count, (i + 1) * kRowsOfItem)); });
}

void fused_experts_forward(ExpertParams p, const ExpertRows& rows, PairRowsParams combine, int64_t tokens,
                           const Threads& all_threads) {
    const Kernels& k = kernels();
    const auto items = items_of(rows, p.inter);
    int64_t computed = 0;
    for (const int64_t n : rows.count) computed += n;
    const Threads threads = enough_threads(computed * p.hidden * p.inter, all_threads);
    const Memory out_rows(rows.rows * p.hidden * wide_size_of(p.dtype));
    p.out_rows = combine.rows.data = out_rows.data;
    combine.rows.row = p.hidden;

    two_products({k.expert_panel_bytes, k.expert_up, k.expert_down}, p, items, threads);
    pair_rows(k.expert_combine, combine, tokens, all_threads);
}

void grouped_mm(const GroupedParams& p, const ExpertRows& rows, const Threads& all_threads) {
    const Kernels& k = kernels();
    const auto items = items_of(rows, p.w.outputs);
    int64_t computed = 0;
    for (const int64_t n : rows.count) computed += n;
    const Threads threads = enough_threads(computed * p.w.outputs * p.w.terms, all_threads);
    const int64_t enough = kItemsPerThread * threads.count;
    const auto pieces = split(items, p.w.outputs, items.empty() ? 1 : cdiv(enough, int64_t(items.size())));
    run_pieces(pieces, threads, [&](const ExpertItem& item, size_t) { k.grouped_mm(p, item); });
}

void grouped_outer(const OuterParams& p, const ExpertRows& rows, int64_t outputs,
                   const Threads& all_threads) {
    const Kernels& k = kernels();
    std::vector<ExpertItem> items;
    int64_t computed = 0;
    for (size_t e = 0; e < rows.count.size(); ++e)
        for (int64_t from = 0; from < outputs; from += kOutputAlign) {
            items.push_back({int32_t(e), rows.offset[e], rows.offset[e] + rows.count[e], from,
                             std::min(outputs, from + kOutputAlign)});
            computed += (rows.count[e] + 1) * p.q * kOutputAlign;
        }
    in_order(items.size(), enough_threads(computed, all_threads),
             [&](int64_t i) { k.grouped_outer(p, items[i]); });
}

void fused_experts_backward(ExpertParams p, const ExpertRows& rows, PairRowsParams combine, int64_t tokens,
                            const WeightGradients& w, void* dtopk_weights, const Threads& all_threads) {
    const Kernels& k = kernels();
    const auto items = items_of(rows, p.inter);
    int64_t computed = 0;
    for (const int64_t n : rows.count) computed += n;
    const Threads threads = enough_threads(computed * p.hidden * p.inter, all_threads);
    const int64_t element = size_of(p.dtype), wide = wide_size_of(p.dtype);
    p.rows = rows.rows;
    const Memory out_rows(rows.rows * p.hidden * wide), partials(p.partials() * rows.rows * wide),
        dpre(w.count ? rows.rows * p.pre_width() * element : 0),
        activated(w.count ? rows.rows * p.inter * element : 0);
    p.out_rows = combine.rows.data = out_rows.data, combine.rows.row = p.hidden;
    p.dtopk_weights = partials.data;
    if (w.count) p.dpre = dpre.data, p.activated_rows = activated.data;
    two_products({k.expert_dpre_bytes, k.expert_backward_up, k.expert_backward_down}, p, items, threads);
    pair_rows(k.expert_combine, combine, tokens, all_threads);
    if (p.dtype == DType::kFloat64)
        add_partials<double>(p, rows, static_cast<double*>(dtopk_weights));
    else
        add_partials<float>(p, rows, static_cast<float*>(dtopk_weights));
    if (!w.count) return;

    const ExpertRows wanted = rows.part(w.first, w.count);
    OuterParams o{};
    o.dtype = p.dtype, o.top_k = p.top_k;
    o.a = {p.dpre, p.pre_width()}, o.b = p.x, o.b_pair = p.pair, o.q = p.hidden;
    o.out = w.gate_up, o.out_expert = p.pre_width() * p.hidden, o.out_row = p.hidden;
    grouped_outer(o, wanted, p.pre_width(), all_threads);
    OuterParams d{};
    d.dtype = p.dtype, d.top_k = p.top_k;
    d.a = p.dout, d.a_pair = p.pair, d.b = {p.activated_rows, p.inter}, d.q = p.inter;
    d.out = w.down, d.out_expert = p.hidden * p.inter, d.out_row = p.inter;
    grouped_outer(d, wanted, p.hidden, all_threads);
    const auto sums = [&](const OuterParams& sum) {
        in_order(w.count, threads, [&](int64_t e) {
            k.expert_sum_rows(sum, {int32_t(e), wanted.offset[e], wanted.offset[e] + wanted.count[e], 0, 1});
        });
    };
    if (w.gate_up_bias) {
        OuterParams b{};
        b.dtype = p.dtype, b.top_k = p.top_k, b.b = o.a, b.q = p.pre_width();
        b.out = w.gate_up_bias, b.out_expert = p.pre_width();
        sums(b);
    }
    if (w.down_bias) {
        OuterParams b{};
        b.dtype = p.dtype, b.top_k = p.top_k, b.a = {w.row_weights, 1}, b.b = p.dout, b.b_pair = p.pair;
        b.q = p.hidden, b.out = w.down_bias, b.out_expert = p.hidden;
        sums(b);
    }
}

}  // namespace gapless::cpu
