// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as the ISA this file is compiled for. Included by kernel files only, which are compiled
// once per ISA: everything has internal linkage, so that no ISA's code can stand in for another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "csrc/common/varlen_params.h"

#define GAPLESS_INLINE inline __attribute__((always_inline))

namespace gapless::cpu::GAPLESS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr T kInfinity = T(__builtin_inf());

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
struct VecOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
    using type = int32_t;
};
template <>
struct IntOf<double> {
    using type = int64_t;
};
/// Integer vector with as many lanes as Vec<T>.
template <class T>
using IVec = Vec<typename IntOf<T>::type>;

template <class T>
GAPLESS_INLINE Vec<T> load(const T* p) {
    Vec<T> x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
template <class T>
GAPLESS_INLINE void store(T* p, Vec<T> x) {
    std::memcpy(p, &x, sizeof(x));
}
template <class T>
GAPLESS_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};  // x - 0 is x for every x, which lets the compiler drop it; 0 + x is not
}

/// Whether a comparison holds in any lane.
template <class T>
GAPLESS_INLINE bool any(IVec<T> x) {
    for (int i = 1; i < kLanes<T>; ++i) x[0] |= x[i];
    return x[0] != 0;
}

/// The larger; b where either is NaN.
template <class T>
GAPLESS_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
    return a > b ? a : b;
}

/// (2^f - 1) / f for f in [-0.5, 0.5], to a few 1e-9.
template <class V>
GAPLESS_INLINE V expm1_fraction(V f) {
    V p = V{} + 1.540351223e-4f;
    p = p * f + 1.339073526e-3f;
    p = p * f + 9.618237615e-3f;
    p = p * f + 5.550357327e-2f;
    p = p * f + 2.402264923e-1f;
    return p * f + 6.931471825e-1f;
}

/// 2^f for f in [-0.5, 0.5]: minimax fits of relative error 3e-9 (degree 6) or 3e-6 (degree 4).
template <int kDegree, class V>
GAPLESS_INLINE V exp2_fraction(V f) {
    if constexpr (kDegree == 6) {
        return expm1_fraction(f) * f + 1.0f;
    } else {
        V p = V{} + 9.582847857e-3f;
        p = p * f + 5.590643263e-2f;
        p = p * f + 2.402409877e-1f;
        p = p * f + 6.931241920e-1f;
        return p * f + 1.0f;
    }
}

constexpr float kLog2eFloat = 1.442695022f,
                kLog2eRest = 1.925963e-8f;  // their sum is log2(e) to twice float's precision

/// e^x for x <= 88; exact 0 below -87, NaN for NaN.
template <int kDegree = 6>
GAPLESS_INLINE Vec<float> vexp(Vec<float> x) {
    const Vec<float> shifted =
        x * kLog2eFloat + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    const Vec<float> whole = shifted - 12582912.0f;
#if defined(__FMA__) || defined(__aarch64__)
    Vec<float> f = x * kLog2eFloat - whole;
    if constexpr (kDegree > 4) f += x * kLog2eRest;
#else
    // A product that is rounded before the subtraction would lose what is wanted: ln 2 in two parts, the
    // first so short that its product is exact.
    const Vec<float> f = ((x - whole * 0.693359375f) - whole * -2.12194440e-4f) * kLog2eFloat;
#endif
    const Vec<float> p = exp2_fraction<kDegree>(f);
#if defined(__AVX512F__)
    // Lanes below the normal range are kept out of scalef: a subnormal result costs a microcode assist.
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)whole);
#else
    const Vec<float> y = (Vec<float>)((Vec<uint32_t>)p + ((Vec<uint32_t>)shifted << 23));
    return x < -87.0f ? Vec<float>{} : y;
#endif
}
template <int kDegree = 6>
GAPLESS_INLINE Vec<double> vexp(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}

/// tanh through expm1, so that small arguments keep their relative precision.
GAPLESS_INLINE Vec<float> vtanh(Vec<float> x) {
    Vec<float> y = x * (2 * kLog2eFloat);  // tanh x = (2^y - 1) / (2^y + 1)
    y = y > 40.0f ? splat(40.0f) : y;
    y = y < -40.0f ? splat(-40.0f) : y;
    const Vec<float> shifted = y + 12582912.0f;
    const Vec<float> f = y - (shifted - 12582912.0f);
    const Vec<float> p = expm1_fraction(f);
    const Vec<float> whole = (Vec<float>)((Vec<uint32_t>)splat(1.0f) + ((Vec<uint32_t>)shifted << 23));
    const Vec<float> expm1 = whole * (p * f) + (whole - 1.0f);
    return expm1 / (expm1 + 2.0f);
}
GAPLESS_INLINE Vec<double> vtanh(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
}

/// Natural logarithm of normal x > 0, through atanh((m - 1) / (m + 1)) on the mantissa m in [0.7, 1.4]; NaN
/// for NaN.
GAPLESS_INLINE Vec<float> vlog(Vec<float> x) {
    const Vec<int32_t> bits = (Vec<int32_t>)x, exponent = (bits - 0x3f3504f3) >> 23;
    const Vec<float> m = (Vec<float>)(bits - (exponent << 23));
    const Vec<float> t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
    const Vec<float> series = (((t2 * (1 / 9.0f) + 1 / 7.0f) * t2 + 1 / 5.0f) * t2 + 1 / 3.0f) * t2 + 1.0f;
    const Vec<float> y = __builtin_convertvector(exponent, Vec<float>) * 0.693147181f + 2.0f * t * series;
    return x == x ? y : x;
}
GAPLESS_INLINE Vec<double> vlog(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
    return x;
}

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

GAPLESS_INLINE float widen(bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
GAPLESS_INLINE float widen(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    uint32_t bits;
    float y;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else {
        // 2^112 moves the exponent's bias from 15 to 127 and makes normal numbers of subnormal ones.
        bits = rest << 13;
        std::memcpy(&y, &bits, 4);
        y *= 0x1p112f;
        std::memcpy(&bits, &y, 4);
        bits |= sign;
    }
    std::memcpy(&y, &bits, 4);
    return y;
}

/// Round to nearest, ties to even.
GAPLESS_INLINE void narrow(float x, bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        out->bits = uint16_t(bits >> 16 | 0x40);
        return;
    }
    out->bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
GAPLESS_INLINE void narrow(float x, f16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        out->bits = sign | 0x7e00;
    } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
        out->bits = sign | 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal: let the adder round at 2^-24
        float y;
        std::memcpy(&y, &bits, 4);
        y += 0.5f;
        std::memcpy(&bits, &y, 4);
        out->bits = uint16_t(sign | (bits - 0x3f000000));
    } else {
        out->bits = uint16_t(sign | (bits + 0xc8000fff + (bits >> 13 & 1)) >> 13);
    }
}
GAPLESS_INLINE void narrow(float x, float* out) { *out = x; }
GAPLESS_INLINE void narrow(double x, double* out) { *out = x; }

GAPLESS_INLINE Vec<float> load_wide(const float* p) { return load(p); }
GAPLESS_INLINE Vec<double> load_wide(const double* p) { return load(p); }
GAPLESS_INLINE Vec<float> load_wide(const bf16* p) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    Vec<float> x;
    for (int i = 0; i < kLanes<float>; ++i) x[i] = widen(p[i]);
    return x;
#endif
}
GAPLESS_INLINE Vec<float> load_wide(const f16* p) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec<float> x;
    for (int i = 0; i < kLanes<float>; ++i) x[i] = widen(p[i]);
    return x;
#endif
}

GAPLESS_INLINE void store_narrow(float* p, Vec<float> x) { store(p, x); }
GAPLESS_INLINE void store_narrow(double* p, Vec<double> x) { store(p, x); }
GAPLESS_INLINE void store_narrow(bf16* p, Vec<float> x) {
    const Vec<uint32_t> bits = (Vec<uint32_t>)x;
    Vec<uint32_t> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    rounded = x != x ? (bits >> 16 | 0x40) : rounded;
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    const Half half = __builtin_convertvector(rounded, Half);
    std::memcpy(p, &half, sizeof(half));
}
GAPLESS_INLINE void store_narrow(f16* p, Vec<float> x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p,
                        _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes<float>; ++i) narrow(x[i], p + i);
#endif
}

constexpr int kLaneBytes = 16;  // what x86 interleaves without crossing lanes, and a whole vector elsewhere

/// Interleaves the lower (kHigh = 0) or upper halves of every 16 bytes of a and b.
template <int kHigh, class T>
GAPLESS_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
    constexpr int n = kLanes<T>, q = kLaneBytes / sizeof(T);
    IVec<T> pick;
    for (int i = 0; i < n; ++i) pick[i] = i / q * q + kHigh * q / 2 + i % q / 2 + i % 2 * n;
    return __builtin_shuffle(a, b, pick);
}

/// Lanes of 16 bytes kFirst, kFirst + kStep, ... of a, then of b: as many of each as fill a half.
template <int kFirst, int kStep, class T>
GAPLESS_INLINE Vec<T> gather_lanes(Vec<T> a, Vec<T> b) {
    constexpr int n = kLanes<T>, q = kLaneBytes / sizeof(T);
    IVec<T> pick;
    for (int i = 0; i < n; ++i) pick[i] = (kFirst + i % (n / 2) / q * kStep) * q + i % q + i / (n / 2) * n;
    return __builtin_shuffle(a, b, pick);
}

/// Transposes the squares of 16-byte lanes that vectors x[0], x[stride], ... hold.
template <int kStride, class T>
GAPLESS_INLINE void transpose_in_lanes(Vec<T>* x) {
    if constexpr (sizeof(T) == 8) {
        const Vec<T> a = x[0], b = x[kStride];
        x[0] = interleave<0, T>(a, b), x[kStride] = interleave<1, T>(a, b);
    } else {
        const Vec<T> a = interleave<0, T>(x[0], x[2 * kStride]), b = interleave<1, T>(x[0], x[2 * kStride]),
                     c = interleave<0, T>(x[kStride], x[3 * kStride]),
                     d = interleave<1, T>(x[kStride], x[3 * kStride]);
        x[0] = interleave<0, T>(a, c), x[kStride] = interleave<1, T>(a, c);
        x[2 * kStride] = interleave<0, T>(b, d), x[3 * kStride] = interleave<1, T>(b, d);
    }
}

/// Transposes the square of whole lanes that vectors x[0], x[stride], ... hold.
template <int kStride, class T>
GAPLESS_INLINE void transpose_lanes(Vec<T>* x) {
    constexpr int n = kVectorBytes / kLaneBytes;
    if constexpr (n == 2) {
        const Vec<T> a = x[0], b = x[kStride];
        x[0] = gather_lanes<0, 1, T>(a, b), x[kStride] = gather_lanes<1, 1, T>(a, b);
    } else if constexpr (n == 4) {
        const Vec<T> a = gather_lanes<0, 1, T>(x[0], x[kStride]), b = gather_lanes<2, 1, T>(x[0], x[kStride]),
                     c = gather_lanes<0, 1, T>(x[2 * kStride], x[3 * kStride]),
                     d = gather_lanes<2, 1, T>(x[2 * kStride], x[3 * kStride]);
        x[0] = gather_lanes<0, 2, T>(a, c), x[kStride] = gather_lanes<1, 2, T>(a, c);
        x[2 * kStride] = gather_lanes<0, 2, T>(b, d), x[3 * kStride] = gather_lanes<1, 2, T>(b, d);
    }
}

/// In-place transpose of kLanes x kLanes values: inside 16-byte lanes first, then of the lanes themselves.
template <class T>
GAPLESS_INLINE void transpose(Vec<T> (&x)[kLanes<T>]) {
    constexpr int q = kLaneBytes / sizeof(T), lanes = kLanes<T> / q;
#pragma GCC unroll 8
    for (int i = 0; i < lanes; ++i) transpose_in_lanes<1, T>(x + i * q);
#pragma GCC unroll 8
    for (int i = 0; i < q; ++i) transpose_lanes<q, T>(x + i);
}

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
