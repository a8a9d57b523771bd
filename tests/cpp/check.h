// SPDX-License-Identifier: Apache-2.0
// The whole test framework: CHECK counts, result() tells. Unlike assert it also works in release builds.
#pragma once

#include <cstdio>

inline int checks = 0, failures = 0;

#define CHECK(condition)                                                              \
    do {                                                                              \
        ++checks;                                                                     \
        if (!(condition)) {                                                           \
            ++failures;                                                               \
            std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
        }                                                                             \
    } while (false)

inline int result() {
    std::printf("%d passed, %d failed\n", checks - failures, failures);
    return failures == 0 && checks > 0 ? 0 : 1;
}
