// SPDX-License-Identifier: Apache-2.0
// The CPU kernels with neither Python nor torch, against attention written out, by the project's error
// budget. CTest runs this once for each ISA; it returns 77, a skip, where the machine or the build lacks that
// one.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "budget.h"
#include "check.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/varlen.h"
#include "csrc/plan/varlen.h"
#include "floats.h"

using namespace gapless;

namespace {

struct Problem {
    const char* name;
    std::vector<int32_t> len_q, len_k;
    int heads = 4, kv_heads = 2, dim = 24, dim_v = 24;
    int left = -1, right = -1;
    double softcap = 0;
    bool slopes = false, sinks = false;
    int page_size = 0;                   // 0: packed keys
    std::vector<int32_t> q_offset = {};  // none: bottom right

    int64_t position(int s, int i) const {
        return q_offset.empty() ? int64_t{i} + len_k[s] - len_q[s] : int64_t{i} + q_offset[s];
    }
};

const Problem problems[] = {
    {.name = "causal, grouped heads, widths that no vector divides",
     .len_q = {1, 37, 0, 130, 64},
     .len_k = {1, 37, 0, 130, 64},
     .dim = 20,
     .dim_v = 33,
     .right = 0},
    {.name = "window, rows that see nothing, no keys, no queries",
     .len_q = {90, 5, 0, 40},
     .len_k = {47, 0, 6, 120},
     .left = 9,
     .right = 0},
    {.name = "window to both sides, sinks, also of rows that see nothing",
     .len_q = {60, 3, 70},
     .len_k = {31, 0, 100},
     .kv_heads = 4,
     .dim = 16,
     .left = 7,
     .right = 3,
     .sinks = true},
    {.name = "softcap, ALiBi, sinks",
     .len_q = {50, 0, 21},
     .len_k = {50, 4, 140},
     .kv_heads = 1,
     .softcap = 2,
     .slopes = true,
     .sinks = true},
    {.name = "few queries over keys that are split",
     .len_q = {1, 3, 0, 1},
     .len_k = {2500, 1100, 9, 0},
     .heads = 8,
     .dim = 32,
     .right = 0,
     .sinks = true},
    {.name = "paged keys",
     .len_q = {1, 20, 2, 0, 1},
     .len_k = {1300, 45, 0, 7, 16},
     .dim = 32,
     .right = 0,
     .page_size = 16},
    {.name = "queries before, amid and behind the keys",
     .len_q = {90, 5, 70, 33, 40, 3},
     .len_k = {47, 9, 100, 60, 0, 1500},
     .left = 40,
     .right = 3,
     .slopes = true,
     .sinks = true,
     .q_offset = {-50, 9, 20, 58, 3, 1400}},
    {.name = "causal, queries as far from the keys as int32 goes",
     .len_q = {90, 5, 70, 1},
     .len_k = {47, 9, 100, 60},
     .kv_heads = 4,
     .right = 0,
     .q_offset = {-20, INT32_MIN, INT32_MAX, 30}},
};

std::vector<int32_t> offsets(const std::vector<int32_t>& lengths) {
    std::vector<int32_t> cu(lengths.size() + 1);
    std::partial_sum(lengths.begin(), lengths.end(), cu.begin() + 1);
    return cu;
}

/// [tokens, heads, dim] of NaN, with gaps between heads that nobody may touch.
template <class E>
struct Tensor {
    static constexpr int kGap = 3;
    int64_t tokens, heads, dim;
    std::vector<E> data;

    Tensor(int64_t tokens, int64_t heads, int64_t dim)
        : tokens(tokens), heads(heads), dim(dim), data(tokens * heads * (dim + kGap), E(NAN)) {}
    E& at(int64_t token, int64_t head, int64_t d) { return data[(token * heads + head) * (dim + kGap) + d]; }
    const E* row(int64_t token, int64_t head) const { return &data[(token * heads + head) * (dim + kGap)]; }
    Packed packed() { return {data.data(), heads * (dim + kGap), dim + kGap}; }

    std::vector<double> values() const {
        std::vector<double> all;
        bool gaps_untouched = true;
        for (size_t i = 0; i < data.size(); ++i)
            if (int64_t(i) % (dim + kGap) < dim)
                all.push_back(double(data[i]));
            else
                gaps_untouched &= std::isnan(double(data[i]));
        CHECK(gaps_untouched);
        return all;
    }
};

template <class E>
using Lse = std::conditional_t<std::is_same_v<E, double>, double, float>;

template <class E>
struct Inputs {
    const Problem& p;
    const int batch = int(p.len_q.size());
    const std::vector<int32_t> cu_q = offsets(p.len_q), cu_k = offsets(p.len_k);
    const int max_pages = p.page_size ? 100 : 0, pages = p.page_size ? batch * max_pages : 0;
    const int slots = p.page_size ? pages * p.page_size : cu_k.back();     // for keys, used or not
    std::vector<int32_t> table = std::vector<int32_t>(pages, 2147480000);  // a wild read, where nobody looks
    Tensor<E> q{cu_q.back(), p.heads, p.dim}, k{slots, p.kv_heads, p.dim}, v{slots, p.kv_heads, p.dim_v},
        dout{cu_q.back(), p.heads, p.dim_v};
    std::vector<Lse<E>> dlse = std::vector<Lse<E>>(p.heads * cu_q.back());
    std::vector<float> slopes;
    std::vector<double> sinks;

    explicit Inputs(const Problem& problem) : p(problem) {
        std::mt19937 random(1);
        const auto next = [&] { return double(random()) / 0x1p31 * 2 - 2; };
        const auto fill = [&](Tensor<E>& x, int64_t token) {
            for (int64_t i = 0; i < x.heads * x.dim; ++i) x.at(token, i / x.dim, i % x.dim) = E(next());
        };
        for (int s = 0, page = pages; s < batch; ++s)
            for (int j = 0; page > 0 && j * p.page_size < p.len_k[s]; ++j) table[s * max_pages + j] = --page;
        for (int i = 0; i < cu_q.back(); ++i) fill(q, i), fill(dout, i);
        for (int s = 0; s < batch; ++s)
            for (int j = 0; j < p.len_k[s]; ++j) fill(k, slot(s, j)), fill(v, slot(s, j));
        for (auto& x : dlse) x = Lse<E>(next());
        for (int h = 0; h < p.heads; ++h) {
            if (p.slopes) slopes.push_back(float(std::exp2(-h - 2)));
            if (p.sinks) sinks.push_back(double(E(next())));
        }
    }
    /// Where key j of sequence s lies.
    int64_t slot(int s, int j) const {
        if (!p.page_size) return cu_k[s] + j;
        return int64_t{table[s * max_pages + j / p.page_size]} * p.page_size + j % p.page_size;
    }
};

enum Part { kOut, kLse, kDq, kDk, kDv, kDsinks, kParts };
const char* const part_names[] = {"out", "lse", "dq", "dk", "dv", "dsinks"};
template <class A>
using Results = std::array<std::vector<A>, kParts>;

/// Attention and its gradients, a row at a time: A is what sums are made in, `round` what becomes of them.
template <class A, class E, class Round>
Results<A> attend(const Inputs<E>& in, const Round& round) {
    const Problem& p = in.p;
    const int total = in.cu_q.back(), group = p.heads / p.kv_heads;
    const A scale = 1 / std::sqrt(A(p.dim)), none = -std::numeric_limits<A>::infinity();
    const auto dot = [](const E* a, const auto* b, int n) {
        A sum = 0;
        for (int d = 0; d < n; ++d) sum += A(double(a[d])) * A(double(b[d]));
        return sum;
    };
    const auto add = [](A* to, A factor, const E* x, int n) {
        for (int d = 0; d < n; ++d) to[d] += factor * A(double(x[d]));
    };
    Results<A> r;
    r[kOut].resize(total * p.heads * p.dim_v), r[kLse].assign(p.heads * total, none);
    r[kDq].resize(total * p.heads * p.dim), r[kDsinks].resize(in.sinks.size());
    r[kDk].resize(in.slots * p.kv_heads * p.dim), r[kDv].resize(in.slots * p.kv_heads * p.dim_v);
    std::vector<A> score, slope_of_cap;
    for (int s = 0; s < in.batch; ++s)
        for (int row = 0; row < p.len_q[s] * p.heads; ++row) {
            const int i = row / p.heads, h = row % p.heads;
            const int64_t position = p.position(s, i), len_k = p.len_k[s];
            const int64_t token = in.cu_q[s] + i, kv = h / group;
            const int begin = p.left < 0 ? 0 : int(std::clamp<int64_t>(position - p.left, 0, len_k));
            const int end =
                p.right < 0 ? int(len_k) : int(std::clamp<int64_t>(position + p.right + 1, 0, len_k));
            const A sink = p.sinks ? round(A(in.sinks[h])) : none;
            A largest = sink, sum = 0;
            score.clear(), slope_of_cap.clear();
            for (int j = begin; j < end; ++j) {
                A x = round(round(dot(in.q.row(token, h), in.k.row(in.slot(s, j), kv), p.dim)) * scale),
                  bent = 0;
                if (p.softcap > 0) {
                    bent = round(std::tanh(round(x / A(p.softcap))));
                    x = round(bent * A(p.softcap));
                }
                if (p.slopes) x = round(x - round(A(in.slopes[h]) * A(std::abs(position - j))));
                score.push_back(x), slope_of_cap.push_back(1 - bent * bent);
                largest = std::max(largest, x);
            }
            if (largest == none) continue;  // sees nothing: out and gradients stay 0
            for (const A x : score) sum += std::exp(x - largest);
            const A lse = r[kLse][h * total + token] =
                round(largest + std::log(sum + std::exp(sink - largest)));
            A *out = &r[kOut][(token * p.heads + h) * p.dim_v], *dq = &r[kDq][(token * p.heads + h) * p.dim];
            for (int j = begin; j < end; ++j)
                add(out, round(std::exp(score[j - begin] - lse)), in.v.row(in.slot(s, j), kv), p.dim_v);
            const E* dout = in.dout.row(token, h);
            const A delta = dot(dout, out, p.dim_v) - A(in.dlse[h * total + token]);
            for (int j = begin; j < end; ++j) {
                const int64_t at = in.slot(s, j) * p.kv_heads + kv;
                const E *k = in.k.row(in.slot(s, j), kv), *v = in.v.row(in.slot(s, j), kv);
                const A e = round(std::exp(score[j - begin] - lse));
                const A ds =
                    round(e * (round(dot(dout, v, p.dim_v)) - delta)) * slope_of_cap[j - begin] * scale;
                add(&r[kDv][at * p.dim_v], e, dout, p.dim_v);
                add(&r[kDk][at * p.dim], ds, in.q.row(token, h), p.dim);
                add(dq, ds, k, p.dim);
            }
            if (p.sinks) r[kDsinks][h] -= std::exp(sink - lse) * delta;
        }
    for (const Part part : {kOut, kDq, kDk, kDv, kDsinks})
        for (A& x : r[part]) x = round(x);
    return r;
}

template <class E>
constexpr DType kDType = std::is_same_v<E, float>      ? DType::kFloat32
                         : std::is_same_v<E, BFloat16> ? DType::kBFloat16
                         : std::is_same_v<E, Float16>  ? DType::kFloat16
                                                       : DType::kFloat64;

/// Runs the kernels on so many threads; backward only where keys are not paged.
template <class E>
Results<double> run(Inputs<E>& in, int thread_count) {
    const Problem& p = in.p;
    const int total = in.cu_q.back();
    const auto tiles = plan::varlen_tiles(in.cu_q, in.cu_k, 64, 48, {p.left, p.right}, p.q_offset);
    Tensor<E> out(total, p.heads, p.dim_v), dq(total, p.heads, p.dim), dk(in.slots, p.kv_heads, p.dim),
        dv(in.slots, p.kv_heads, p.dim_v);
    std::vector<Lse<E>> lse(p.heads * total, Lse<E>(NAN)), delta = lse;
    std::vector<double> dsinks(in.sinks.size(), NAN);
    const auto data = [](auto& x) { return x.empty() ? nullptr : x.data(); };

    const int64_t page = int64_t{p.page_size};
    const VarlenParams params{.dtype = kDType<E>,
                              .q = in.q.packed(),
                              .k = in.k.packed(),
                              .v = in.v.packed(),
                              .out = out.packed(),
                              .lse = lse.data(),
                              .total_q = total,
                              .heads = p.heads,
                              .kv_heads = p.kv_heads,
                              .bundles = p.kv_heads,
                              .dim = p.dim,
                              .dim_v = p.dim_v,
                              .scale = 1 / std::sqrt(double(p.dim)),
                              .softcap = p.softcap,
                              .left = p.left,
                              .right = p.right,
                              .alibi_slopes = data(in.slopes),
                              .alibi_batch_stride = 0,
                              .sinks = data(in.sinks),
                              .cu_seqlens_q = in.cu_q.data(),
                              .cu_seqlens_k = in.cu_k.data(),
                              .seqused_k = page ? p.len_k.data() : nullptr,
                              .tiles = tiles.query.data(),
                              .block_table = data(in.table),
                              .max_pages = in.max_pages,
                              .page_size = page,
                              .k_page_stride = page * in.k.packed().token_stride,
                              .v_page_stride = page * in.v.packed().token_stride,
                              .q_offset = data(p.q_offset)};
    const cpu::VarlenSizes sizes{in.batch,
                                 total,
                                 in.cu_k.back(),
                                 in.pages,
                                 tiles.query.data(),
                                 tiles.key.data(),
                                 int64_t(tiles.query.size() / 3),
                                 int64_t(tiles.key.size() / 3)};
    const cpu::Threads threads{thread_count, [&](const std::function<void()>& body) {
                                   std::vector<std::thread> others;
                                   for (int i = 1; i < thread_count; ++i) others.emplace_back(body);
                                   body();
                                   for (std::thread& t : others) t.join();
                               }};
    cpu::check_varlen(params, sizes);
    cpu::varlen_forward(params, sizes, threads);
    const Results<double> r{out.values(), {lse.begin(), lse.end()}};
    if (page) return r;
    VarlenBackwardParams backward{params,      in.dout.packed(), in.dlse.data(), delta.data(),
                                  dq.packed(), dk.packed(),      dv.packed()};
    backward.forward.tiles = tiles.key.data();
    cpu::varlen_backward(backward, sizes, dsinks.data(), threads);
    return {r[kOut], r[kLse], dq.values(), dk.values(), dv.values(), dsinks};
}

template <class E>
void test(const char* type, double eps) {
    using A = std::conditional_t<std::is_same_v<E, double>, double, float>;
    for (const Problem& p : problems) {
        Inputs<E> in(p);
        const auto actual = run(in, 1), on_two = run(in, 2), on_five = run(in, 5);
        const auto oracle = attend<long double>(in, std::identity{});
        const auto witness = attend<A>(in, [](A x) { return A(double(E(double(x)))); });
        for (int part = 0; part < kParts; ++part) {
            const std::string what = std::string(p.name) + ": " + part_names[part] + " in " + type;
            // One number per head: the witness may meet the oracle by luck.
            const double factor = part == kDsinks ? 16 : 2;
            CHECK(within_budget(what, eps, factor, actual[part], oracle[part], witness[part]));
            CHECK(same_bits(actual[part], on_two[part]) && same_bits(actual[part], on_five[part]));
        }
    }
}

}  // namespace

int main() {
    const char *isa = std::getenv("GAPLESS_ISA"), *found = cpu::kernels().isa;
    std::printf("kernels: %s\n", found);
    if (isa && std::strcmp(isa, found) != 0) return 77;
    test<float>("float32", 0x1p-23);
    test<double>("float64", 0x1p-52);
    test<BFloat16>("bfloat16", 0x1p-7);
    test<Float16>("float16", 0x1p-10);
    return result();
}
