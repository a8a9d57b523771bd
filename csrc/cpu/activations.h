// SPDX-License-Identifier: Apache-2.0
// What stands between the two products of an expert, and its derivatives.
#pragma once

#include "csrc/common/expert_params.h"
#include "csrc/cpu/simd.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// Polynomial in x, highest power first.
template <class V, class... Rest>
GAPLESS_INLINE V horner(V x, float highest, Rest... rest) {
    V p = V{} + highest;
    ((p = p * x + rest), ...);
    return p;
}

/// Error function: an odd polynomial up to 0.95, then 1 - e^p(x); both are fits to 1e-7.
GAPLESS_INLINE Vec<float> verf(Vec<float> x) {
    Vec<float> a = x < 0.0f ? -x : x;
    a = a > 4.0f ? splat(4.0f) : a;
    const Vec<float> t = a * a;
    Vec<float> small = horner(t, 7.882497448e-5f, -8.018855006e-4f, 5.189312156e-3f, -2.685432881e-2f,
                              1.128359735e-1f, -3.761262596e-1f, 1.128379107f) *
                       a;
    const Vec<float> p = horner(a, 1.918765e-4f, -3.003128339e-3f, 2.206603810e-2f, -1.035954729e-1f,
                                -6.375680566e-1f, -1.127444744f, -2.520201961e-4f);
    const Vec<float> y = a < 0.95f ? small : 1.0f - vexp(p);
    return x < 0.0f ? -y : y;
}
GAPLESS_INLINE Vec<double> verf(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
    return x;
}

/// s = 1 / (1 + e^-x), without overflow, and s (1 - s), which keeps its precision where s is near 1.
template <class T>
struct Sigmoid {
    Vec<T> value, slope;
    GAPLESS_INLINE explicit Sigmoid(Vec<T> x) {
        const Vec<T> e = vexp(x < T(0) ? x : -x), below = x < T(0) ? e : splat(T(1));
        value = below / (e + T(1));
        slope = value * (x < T(0) ? splat(T(1)) : e) / (e + T(1));
    }
};

/// An activation's output, and what a gradient of it is multiplied by for each input.
template <class T>
struct Activated {
    Vec<T> value, by_gate, by_up;
};

/// The type carries the choice, so that loops are compiled once for each.
template <Activation kKind, class T>
struct Act {
    T alpha, limit;

    /// x * f(x) of a gated one needs f and x * f'.
    template <bool kGradient>
    GAPLESS_INLINE Activated<T> run(Vec<T> gate, Vec<T> up) const {
        const Vec<T> zero{}, one = splat(T(1));
        if constexpr (kKind == Activation::kRelu2) {
            const Vec<T> x = gate < zero ? zero : gate;
            return {x * x, x + x, zero};
        } else if constexpr (kKind == Activation::kSwiGlu) {
            const Sigmoid<T> s(gate);
            const Vec<T> silu = gate * s.value;
            return {silu * up, (s.value + gate * s.slope) * up, silu};
        } else if constexpr (kKind == Activation::kSwiGluOai) {
            const Vec<T> top = splat(limit), bottom = splat(-limit);
            const Vec<T> g = gate > top ? top : gate;
            const Vec<T> u = (up > top ? top : up < bottom ? bottom : up) + one;
            const Sigmoid<T> s(g * alpha);
            const Vec<T> glu = g * s.value, slope = (s.value + g * alpha * s.slope) * u;
            return {u * glu, gate > top ? zero : slope, up > top ? zero : up < bottom ? zero : glu};
        } else if constexpr (kKind == Activation::kGeGlu) {
            const Vec<T> cdf = T(0.5) * (one + verf(gate * T(0.70710678118654752)));
            Vec<T> pdf{};
            if constexpr (kGradient) {
                const Vec<T> power = gate * gate * T(-0.5);
                pdf = vexp(power < T(-100) ? splat(T(-100)) : power) * T(0.39894228040143268);
            }
            return {gate * cdf * up, (cdf + gate * pdf) * up, gate * cdf};
        } else {
            constexpr T a = T(0.79788456080286536), b = T(0.044715);
            const Vec<T> square = gate * gate;
            const Sigmoid<T> s(T(2) * a * gate * (one + b * square));  // (1 + tanh(x)) / 2 of half of that
            const Vec<T> gelu = gate * s.value;
            const Vec<T> slope = s.value + T(2) * gate * s.slope * a * (one + T(3) * b * square);
            return {gelu * up, slope * up, gelu};
        }
    }
};

/// Calls f(Act<kind, T>).
template <class T, class F>
GAPLESS_INLINE void by_activation(const ExpertParams& p, const F& f) {
    const T alpha = T(p.alpha), limit = T(p.limit);
    switch (p.activation) {
        case Activation::kSwiGlu:
            return f(Act<Activation::kSwiGlu, T>{alpha, limit});
        case Activation::kGeGlu:
            return f(Act<Activation::kGeGlu, T>{alpha, limit});
        case Activation::kGeGluTanh:
            return f(Act<Activation::kGeGluTanh, T>{alpha, limit});
        case Activation::kSwiGluOai:
            return f(Act<Activation::kSwiGluOai, T>{alpha, limit});
        case Activation::kRelu2:
            return f(Act<Activation::kRelu2, T>{alpha, limit});
    }
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
