// SPDX-License-Identifier: Apache-2.0
// 16-bit floats, written from their definition and not for speed: what the kernels' conversions are held
// against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

/// A sign, 15 - kFraction bits of exponent, kFraction bits of fraction.
template <int kFraction>
struct Small {
    static constexpr int kBias = (1 << (14 - kFraction)) - 1, kTop = 2 * kBias + 1;
    uint16_t bits;

    Small() = default;
    /// Rounds to nearest, ties to even.
    explicit Small(double x) {
        const double size = std::fabs(x);
        int wanted = (kTop << kFraction) + (std::isnan(x) ? 1 << (kFraction - 1) : 0);
        if (std::isfinite(x)) {
            const int exponent = std::max(size == 0 ? 1 - kBias : std::ilogb(size), 1 - kBias);
            const double steps = std::nearbyint(std::ldexp(size, kFraction - exponent));
            // A normal number's leading bit adds the one that its exponent lacks here.
            wanted = std::min(wanted, ((exponent + kBias - 1) << kFraction) + int(steps));
        }
        bits = uint16_t(wanted | (std::signbit(x) ? 0x8000 : 0));
    }
    explicit operator double() const {
        const int exponent = bits >> kFraction & kTop, fraction = bits & ((1 << kFraction) - 1);
        const double size = exponent == kTop ? (fraction ? NAN : INFINITY)
                            : exponent == 0
                                ? std::ldexp(fraction, 1 - kBias - kFraction)
                                : std::ldexp(fraction + (1 << kFraction), exponent - kBias - kFraction);
        return bits & 0x8000 ? -size : size;
    }
};
using BFloat16 = Small<7>;
using Float16 = Small<10>;
