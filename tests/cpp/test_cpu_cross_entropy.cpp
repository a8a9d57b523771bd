// SPDX-License-Identifier: Apache-2.0
// The cross-entropy kernels with neither Python nor torch, against the formula written out, by the project's
// error budget: any width, in one chunk and in several, with pages that nobody may touch around every tensor.
// CTest runs this once for each ISA; it returns 77, a skip, where there is no such one.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "budget.h"
#include "check.h"
#include "csrc/cpu/cross_entropy.h"
#include "csrc/cpu/kernels.h"
#include "floats.h"
#include "guarded.h"

using namespace gapless;

namespace {

template <class E>
using Wide = std::conditional_t<std::is_same_v<E, double>, double, float>;

cpu::Threads threads_of(int count) {
    return {count, [count](const std::function<void()>& body) {
                std::vector<std::thread> others;
                for (int i = 1; i < count; ++i) others.emplace_back(body);
                body();
                for (std::thread& t : others) t.join();
            }};
}

struct Problem {
    int64_t rows, columns;
    bool bias = false;
    double softcap = 0;
};

/// Logits, and everything that a gradient is made of.
template <class E>
struct Inputs {
    Problem p;
    std::vector<E> logits, bias;
    std::vector<int64_t> targets;
    std::vector<Wide<E>> factors;  // softmax, target, every class; the LSE is what forward gives

    explicit Inputs(const Problem& p) : p(p) {
        std::mt19937 random(7);
        std::normal_distribution<double> normal(0, 3);
        for (int64_t i = 0; i < p.rows * p.columns; ++i) logits.push_back(E(normal(random)));
        for (int64_t i = 0; p.bias && i < p.columns; ++i) bias.push_back(E(normal(random)));
        for (int64_t r = 0; r < p.rows; ++r)
            targets.push_back(r % 7 == 3 ? -1 : int64_t(random() % uint64_t(p.columns)));
        for (int64_t i = 0; i < 3 * p.rows; ++i) factors.push_back(Wide<E>(0.1 * normal(random)));
    }
};

/// Maximum, sum, target and total become LSE, target and total; then the gradient.
template <class A>
struct Results {
    std::vector<A> lse, target, total, gradient;
};

template <class A, class E>
Results<A> compute(const Inputs<E>& in, const std::function<A(A)>& round) {
    const Problem& p = in.p;
    Results<A> out;
    out.lse.assign(p.rows, 0), out.target.assign(p.rows, 0), out.total.assign(p.rows, 0);
    out.gradient.assign(p.rows * p.columns, 0);
    std::vector<A> x(p.columns), slope(p.columns);
    for (int64_t r = 0; r < p.rows; ++r) {
        if (in.targets[r] < 0) continue;
        A highest = -INFINITY, sum = 0;
        for (int64_t i = 0; i < p.columns; ++i) {
            x[i] = A(double(in.logits[r * p.columns + i])) + (p.bias ? A(double(in.bias[i])) : A(0));
            slope[i] = 1;
            if (p.softcap > 0) {
                const A t = std::tanh(x[i] / A(p.softcap));
                x[i] = t * A(p.softcap), slope[i] = 1 - t * t;
            }
            highest = std::max(highest, x[i]), out.total[r] += x[i];
        }
        for (int64_t i = 0; i < p.columns; ++i) sum += std::exp(x[i] - highest);
        out.lse[r] = highest + std::log(sum), out.target[r] = x[in.targets[r]];
        const A softmax = in.factors[r], hot = in.factors[p.rows + r], every = in.factors[2 * p.rows + r];
        for (int64_t i = 0; i < p.columns; ++i)
            out.gradient[r * p.columns + i] =
                round((std::exp(x[i] - out.lse[r]) * softmax + every + (i == in.targets[r] ? hot : A(0))) *
                      slope[i]);
    }
    return out;
}

/// What the kernels make, a chunk of `step` columns at a time.
template <class E>
Results<double> run(const Inputs<E>& in, int64_t step, int threads, Edge edge, bool sideways, bool in_place) {
    using T = Wide<E>;
    const Problem& p = in.p;
    const Guarded<int64_t> targets(in.targets, edge);
    Guarded<T> sums(4 * p.rows, edge), factors(4 * p.rows, edge);
    for (int64_t r = 0; r < p.rows; ++r)
        sums[r] = -INFINITY, sums[p.rows + r] = sums[2 * p.rows + r] = sums[3 * p.rows + r] = 0;
    Results<double> out;
    out.gradient.resize(p.rows * p.columns);
    const auto by_chunk = [&](const auto& body) {
        for (int64_t first = 0; first < p.columns; first += step) {
            const int64_t n = std::min(step, p.columns - first);
            Guarded<E> chunk(p.rows * n, edge);
            for (int64_t r = 0; r < p.rows; ++r)
                std::copy_n(&in.logits[r * p.columns + first], n, &chunk[r * n]);
            const std::vector<E> part(in.bias.begin() + (p.bias ? first : 0),
                                      in.bias.begin() + (p.bias ? first + n : 0));
            const Guarded<E> bias(part, edge);
            CrossEntropyParams c{};
            c.dtype = std::is_same_v<E, double>     ? DType::kFloat64
                      : std::is_same_v<E, float>    ? DType::kFloat32
                      : std::is_same_v<E, BFloat16> ? DType::kBFloat16
                                                    : DType::kFloat16;
            c.rows = p.rows, c.columns = n, c.first = first;
            c.logits = {chunk.data(), n}, c.bias = p.bias ? bias.data() : nullptr, c.softcap = p.softcap;
            c.targets = targets.data();
            body(c, chunk, n, first);
        }
    };
    by_chunk([&](CrossEntropyParams& c, Guarded<E>& chunk, int64_t, int64_t) {
        chunk.freeze();
        c.before = c.after = sums.data(), c.total = true;
        cpu::cross_entropy_forward(c, threads_of(threads));
    });
    for (int64_t r = 0; r < p.rows; ++r) {
        const bool used = in.targets[r] >= 0;
        out.lse.push_back(used ? double(sums[r]) + std::log(double(sums[p.rows + r])) : 0);
        out.target.push_back(sums[2 * p.rows + r]), out.total.push_back(sums[3 * p.rows + r]);
        factors[r] = T(out.lse[r]);
        for (int k = 0; k < 3; ++k) factors[(k + 1) * p.rows + r] = in.factors[k * p.rows + r];
    }
    factors.freeze();
    by_chunk([&](CrossEntropyParams& c, Guarded<E>& chunk, int64_t n, int64_t first) {
        Guarded<E> apart(in_place ? 0 : p.rows * n, edge), side(sideways ? p.rows * n : 0, edge);
        E* const to = in_place ? chunk.data() : apart.data();
        c.factors = factors.data(), c.out = {to, n};
        if (sideways) c.sideways = side.data(), c.sideways_row = p.rows;
        cpu::cross_entropy_backward(c, threads_of(threads));
        bool same = true;
        for (int64_t r = 0; r < p.rows; ++r)
            for (int64_t i = 0; i < n; ++i) {
                const E value = to[r * n + i];
                out.gradient[r * p.columns + first + i] = double(value);
                same &= !sideways || !std::memcmp(&value, &side[i * p.rows + r], sizeof(E));
            }
        CHECK(same);
    });
    return out;
}

template <class E>
void test_type(const Problem& p, const std::string& type, double eps) {
    using T = Wide<E>;
    const Inputs<E> in(p);
    const auto oracle = compute<long double, E>(in, [](long double x) { return x; });
    const auto witness = compute<T, E>(in, [](T x) { return T(double(E(double(x)))); });
    const double wide_eps = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;
    const std::string what =
        type + " " + std::to_string(p.rows) + " x " + std::to_string(p.columns) + (p.bias ? ", bias" : "");
    const auto whole = run(in, p.columns, 1, Edge::kEnd, true, false);
    for (const int64_t step : {p.columns, int64_t{64}, int64_t{33}}) {
        if (step > p.columns) continue;
        const auto got = run(in, step, 2, Edge::kBegin, step != 33, step == 33);
        // In the wide types few numbers may be right by luck in the witness.
        CHECK(within_budget(what + " LSE", wide_eps, 8, got.lse, oracle.lse, witness.lse));
        CHECK(within_budget(what + " target", wide_eps, 8, got.target, oracle.target, witness.target));
        CHECK(within_budget(what + " total", wide_eps, 8, got.total, oracle.total, witness.total));
        CHECK(within_budget(what + " gradient", eps, sizeof(E) == 2 ? 2 : 8, got.gradient, oracle.gradient,
                            witness.gradient));
        if (step == p.columns)
            CHECK(same_bits(got.lse, whole.lse) && same_bits(got.gradient, whole.gradient));
    }
}

/// Rows of which some or all logits are not finite.
void test_not_finite() {
    const int64_t columns = 40;
    Inputs<float> in({.rows = 4, .columns = columns});
    in.targets = {1, 1, 1, 1};
    for (int64_t i = 0; i < columns; ++i) in.logits[i] = -INFINITY;
    in.logits[columns + 9] = NAN, in.logits[2 * columns + 30] = INFINITY;
    in.logits[3 * columns + 39] = -INFINITY;
    for (const int64_t step : {columns, int64_t{16}}) {
        const auto got = run(in, step, 1, Edge::kEnd, true, false);
        CHECK(got.lse[0] == -INFINITY && std::isnan(got.lse[1]) && std::isnan(got.lse[2]));
        CHECK(std::isfinite(got.lse[3]) && got.gradient[4 * columns - 1] == double(in.factors[2 * 4 + 3]));
    }
}

}  // namespace

int main() {
    const char* wanted = std::getenv("GAPLESS_ISA");
    if (wanted && std::strcmp(wanted, cpu::kernels().isa) != 0) return 77;
    for (const auto& [rows, columns] :
         {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {40, 33}, {33, 300}, {70, 1100}})
        for (const bool bias : {false, true}) {
            const Problem p{rows, columns, bias, bias ? 4.0 : 0.0};
            test_type<float>(p, "float", 0x1p-23);
            test_type<double>(p, "double", 0x1p-52);
            test_type<BFloat16>(p, "bfloat16", 0x1p-7);
            test_type<Float16>(p, "float16", 0x1p-10);
        }
    test_not_finite();
    return result();
}
