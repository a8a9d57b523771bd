// SPDX-License-Identifier: Apache-2.0
// What the drivers of all operators do: refuse wrong numbers by name, and hand out items to threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "csrc/cpu/varlen.h"

namespace gapless::cpu {

// Waking a thread takes longer than so little work.
constexpr int64_t kFewProducts = 1 << 16;
constexpr int64_t kItemsPerThread = 16;

inline void check(bool fine, const char* what, int64_t at, int64_t value, const std::string& wanted) {
    if (!fine)
        throw std::runtime_error(std::string(what) + "[" + std::to_string(at) + "] is " +
                                 std::to_string(value) + ": it has to be " + wanted);
}

/// `cu` [batch + 1] starts at 0, never decreases and ends at `total`.
inline void check_lengths(const int32_t* cu, const char* name, int64_t batch, int64_t total) {
    check(cu[0] == 0, name, 0, cu[0], "0");
    for (int64_t i = 1; i <= batch; ++i)
        check(cu[i] >= cu[i - 1], name, i, cu[i], "at least " + std::to_string(cu[i - 1]));
    check(cu[batch] == total, name, batch, cu[batch], "the number of tokens, " + std::to_string(total));
}

/// Runs body(0), ..., body(count - 1), each once, handed out in this order to whichever thread is free.
/// A body(i, next) is told what its thread runs after i, or -1, and so each thread takes one item early.
template <class Body>
void in_order(int64_t count, const Threads& threads, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    const auto work = [&] {
        if constexpr (std::is_invocable_v<Body, int64_t, int64_t>)
            for (int64_t i = take(), after; i < count; i = after) {
                after = take();
                body(i, after < count ? after : -1);
            }
        else
            for (int64_t i; (i = take()) < count;) body(i);
    };
    if (count <= 1)
        work();
    else
        threads.run(work);
}

/// Some of the threads: one, if that is faster.
inline Threads enough_threads(int64_t products, const Threads& all) {
    return products < kFewProducts ? Threads{1, [](const auto& f) { f(); }} : all;
}

}  // namespace gapless::cpu
