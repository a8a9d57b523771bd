// SPDX-License-Identifier: Apache-2.0
// What the kernels of one ISA are made of, compiled for that ISA: vector functions, conversions, the split of
// a strip.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "check.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/visibility.h"
#include "floats.h"

using namespace gapless::cpu::GAPLESS_ISA;

namespace {

constexpr int kWidth = kLanes<float>;

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

/// Largest error of f between two sizes, in units of the last place of the exact result.
template <class F, class G>
double worst_ulp(const F& f, const G& exact, float from, float to, bool negative) {
    constexpr uint32_t kStep = 7919;  // a prime: every pattern of low bits comes up
    double worst = 0;
    for (uint32_t at = bits_of(from); at <= bits_of(to); at += kWidth * kStep) {
        float x[kWidth], y[kWidth];
        for (int i = 0; i < kWidth; ++i) x[i] = float_of((at + i * kStep) | (negative ? 0x80000000 : 0));
        store(y, f(load(x)));
        for (int i = 0; i < kWidth && std::fabs(x[i]) <= to; ++i) {
            const long double right = exact(static_cast<long double>(x[i]));
            const int exponent = std::max(std::ilogb(right), -126);
            worst = std::max(worst, double(std::fabs(std::ldexp(y[i] - right, 23 - exponent))));
        }
    }
    return worst;
}

template <class F>
float first_lane(const F& f, float x) {
    float y[kWidth];
    store(y, f(splat(x)));
    return y[0];
}

void test_functions() {
    const auto exp = [](auto x) { return vexp(x); };
    const auto quick_exp = [](auto x) { return vexp<4>(x); };
    const auto tanh = [](auto x) { return vtanh(x); };
    const auto log = [](auto x) { return vlog(x); };
    const auto exact_exp = [](long double x) { return std::exp(x); };
    const auto exact_tanh = [](long double x) { return std::tanh(x); };
    const auto exact_log = [](long double x) { return std::log(x); };
#if defined(__FMA__)
    const double exp_ulp = 1;
#else
    const double exp_ulp = 2;
#endif
    const double quick_ulp = 64;
    for (const bool negative : {false, true}) {
        CHECK(worst_ulp(exp, exact_exp, 1e-9f, 87, negative) < exp_ulp);
        CHECK(worst_ulp(quick_exp, exact_exp, 1e-9f, 87, negative) < quick_ulp);
        CHECK(worst_ulp(tanh, exact_tanh, 1e-30f, 1e30f, negative) < 4);
    }
    CHECK(worst_ulp(log, exact_log, 1.2e-38f, 3.4e38f, false) < 3);
    const float infinity = INFINITY;
    CHECK(first_lane(exp, 0) == 1 && first_lane(exp, -infinity) == 0 && first_lane(exp, -87.5f) == 0);
    CHECK(first_lane(quick_exp, -infinity) == 0 && first_lane(quick_exp, 0) == 1);
    CHECK(first_lane(tanh, infinity) == 1 && first_lane(tanh, -infinity) == -1 && first_lane(tanh, 0) == 0);
    CHECK(first_lane(log, 1) == 0);
    CHECK(std::isnan(first_lane(exp, NAN)) && std::isnan(first_lane(tanh, NAN)) &&
          std::isnan(first_lane(log, NAN)));
}

template <class T>
void test_transpose() {
    constexpr int n = kLanes<T>;
    Vec<T> x[n];
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) x[i][j] = T(i * n + j);
    transpose<T>(x);
    bool right = true;
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) right &= x[i][j] == T(j * n + i);
    CHECK(right);
}

/// Every value of a 16-bit type there; and back, from all of them, the midpoints between them and their
/// neighbours.
template <class E, class Wanted>
void test_conversions() {
    int wrong = 0;
    const auto differ = [](double a, double b) { return std::isnan(a) ? !std::isnan(b) : a != b; };
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        Wanted here, next;
        here.bits = uint16_t(bits), next.bits = uint16_t(bits + 1);
        E same[kWidth];
        for (E& x : same) x.bits = here.bits;
        float wide[kWidth];
        store(wide, load_wide(same));
        wrong += differ(double(here), wide[0]) + differ(double(here), widen(same[0]));

        const float middle = float((double(here) + double(next)) / 2);
        for (const float x : {float(double(here)), middle, std::nextafter(middle, INFINITY),
                              std::nextafter(middle, -INFINITY)}) {
            E one, many[kWidth];
            narrow(x, &one);
            store_narrow(many, splat(x));
            const Wanted wanted{double(x)};
            const auto off = [&](E y) {
                Wanted got;
                got.bits = y.bits;
                return std::isnan(x) ? !std::isnan(double(got)) : got.bits != wanted.bits;
            };
            wrong += off(one) + off(many[0]) + off(many[kWidth - 1]);
        }
    }
    CHECK(wrong == 0);
}

/// The pieces of a range of keys hold every cell that is seen just once, and others only where they say so.
void check_split(const RowMap& map, int64_t row, int64_t rows, int64_t from, int64_t to) {
    constexpr int kVecs = 3;
    using View = StripView<float, kVecs>;
    const View view(map, row, rows);
    Segment segments[View::kMaxSegments];
    const int count = view.split({from, to, 0, 0, nullptr}, 0, segments);
    bool right = count <= View::kMaxSegments;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t key = from; key < to; ++key) {
            const bool seen = key >= map.begin(row + r) && key < map.end(row + r);
            int times = 0;
            for (int i = 0; i < count; ++i) {
                const Segment& s = segments[i];
                if (key < s.begin || key >= s.end || r / kWidth < s.vec_begin || r / kWidth >= s.vec_end)
                    continue;
                ++times;
                right &= seen || s.partial;
            }
            right &= seen ? times == 1 : times <= 1;
        }
    CHECK(right);
}

void test_split() {
    for (const int64_t group : {1, 3})
        for (const int64_t len_k : {1, 40, 150})
            for (const int32_t left : {-1, 0, 5, 60})
                for (const int32_t right : {-1, 0, 20})
                    for (const int64_t first :
                         {len_k - 50, int64_t{-70}, int64_t{-20}, int64_t{7}, int64_t{170}}) {
                        const RowMap map{group, first, len_k, left, right};
                        for (int64_t row = 0; row < 50 * group; row += 3 * kWidth)
                            for (int64_t key = 0; key < len_k; key += 64)
                                check_split(map, row, least(3 * kWidth, 50 * group - row), key,
                                            least(len_k, key + 64));
                    }
}

}  // namespace

#define GAPLESS_TEXT_OF(x) #x
#define GAPLESS_TEXT(x) GAPLESS_TEXT_OF(x)

int main() {
    if (std::strcmp(gapless::cpu::kernels().isa, GAPLESS_TEXT(GAPLESS_ISA)) != 0) return 77;
    test_functions();
    test_transpose<float>();
    test_transpose<double>();
    test_conversions<bf16, BFloat16>();
    test_conversions<f16, Float16>();
    test_split();
    return result();
}
