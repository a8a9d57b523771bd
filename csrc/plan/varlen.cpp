// SPDX-License-Identifier: Apache-2.0
#include "csrc/plan/varlen.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>

namespace gapless::plan {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

template <class T>
void check(std::span<const T> cu, std::string_view name, int64_t total) {
    const auto entry = [&](size_t i) {
        return std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(cu[i]);
    };
    if (cu.empty()) throw std::invalid_argument(std::string(name) + " is empty: it has to be [batch + 1]");
    if (cu[0] != 0) throw std::invalid_argument(entry(0) + ": it has to be 0");
    for (size_t i = 1; i < cu.size(); ++i) {
        if (cu[i] < cu[i - 1]) {
            throw std::invalid_argument(entry(i) + ", after " + std::to_string(cu[i - 1]) +
                                        ": it has to be at least the entry before it");
        }
        if (cu[i] > kMaxInt32) {
            throw std::invalid_argument(entry(i) + ": it has to fit int32, at most " +
                                        std::to_string(kMaxInt32));
        }
    }
    if (total >= 0 && cu.back() != total) {
        throw std::invalid_argument(entry(cu.size() - 1) + ", the last: it has to be " +
                                    std::to_string(total) + ", the number of tokens");
    }
}

/// Sum of clamp(t, 0, limit) over t < x, modulo 2^64: only differences are used, and those are exact.
uint64_t clamped_sum(int64_t x, int64_t limit) {
    if (x <= 0) return 0;
    const auto rising = static_cast<uint64_t>(std::min(x, limit + 1));
    const auto flat = static_cast<uint64_t>(std::max<int64_t>(x - limit - 1, 0));
    return rising * (rising - 1) / 2 + flat * static_cast<uint64_t>(limit);
}

/// Indices in descending order of cost, ties in ascending order of index: a radix sort over the bytes in use.
std::vector<uint32_t> costliest_first(std::span<const uint64_t> costs) {
    std::vector<uint32_t> order(costs.size()), next(costs.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
    if (costs.empty()) return order;
    const uint64_t highest = *std::max_element(costs.begin(), costs.end());
    for (int shift = 0; shift < 64 && (highest >> shift) != 0; shift += 8) {
        const auto digit = [&](uint32_t i) { return 255 - ((costs[i] >> shift) & 255); };
        std::array<size_t, 257> start{};
        for (const uint32_t i : order) ++start[digit(i) + 1];
        for (size_t d = 1; d < start.size(); ++d) start[d] += start[d - 1];
        for (const uint32_t i : order) next[start[digit(i)]++] = i;
        order.swap(next);
    }
    return order;
}

struct Tile {
    int32_t sequence, begin, end;
};

/// Rows for a table of tiles, unused ones filled with -1.
std::vector<int32_t> rows(int64_t batch, int64_t tokens, int64_t block) {
    return std::vector<int32_t>(static_cast<size_t>(3 * (batch + tokens / block)), -1);
}

}  // namespace

void check_cu_seqlens(std::span<const int64_t> cu, std::string_view name, int64_t total) {
    check(cu, name, total);
}
void check_cu_seqlens(std::span<const int32_t> cu, std::string_view name, int64_t total) {
    check(cu, name, total);
}

uint64_t visible_cells(int64_t begin, int64_t end, int64_t len_q, int64_t len_k, Window window) {
    return visible_cells(begin + len_k - len_q, end - begin, len_k, window);
}

uint64_t visible_cells(int64_t first, int64_t count, int64_t len_k, Window window) {
    // A query at position p sees keys [clamp(p - left), clamp(p + right + 1)), clamped to [0, len_k].
    const auto sum = [&](int64_t x) { return clamped_sum(x + count, len_k) - clamped_sum(x, len_k); };
    const uint64_t ends = window.right < 0 ? static_cast<uint64_t>(count) * static_cast<uint64_t>(len_k)
                                           : sum(first + std::min(window.right, kMaxInt32) + 1);
    const uint64_t begins = window.left < 0 ? 0 : sum(first - std::min(window.left, kMaxInt32));
    return ends - begins;
}

VarlenTiles varlen_tiles(std::span<const int32_t> cu_q, std::span<const int32_t> cu_k, int64_t block_q,
                         int64_t block_k, Window window, std::span<const int32_t> q_offset) {
    check(cu_q, "cu_seqlens_q", -1);
    check(cu_k, "cu_seqlens_k", -1);
    if (cu_q.size() != cu_k.size()) {
        throw std::invalid_argument("cu_seqlens_k has " + std::to_string(cu_k.size()) +
                                    " entries, cu_seqlens_q has " + std::to_string(cu_q.size()) +
                                    ": they have to have the same number");
    }
    for (const auto& [name, block] : {std::pair{"block_q", block_q}, {"block_k", block_k}}) {
        if (block < 1) {
            throw std::invalid_argument(std::string(name) + " is " + std::to_string(block) +
                                        ": it has to be at least 1");
        }
    }
    if (window.left < -1 || window.right < -1) {
        throw std::invalid_argument("window is (" + std::to_string(window.left) + ", " +
                                    std::to_string(window.right) + "): each has to be -1 or at least 0");
    }
    const auto batch = static_cast<int64_t>(cu_q.size()) - 1;
    if (!q_offset.empty() && q_offset.size() != static_cast<size_t>(batch)) {
        throw std::invalid_argument("q_offset has " + std::to_string(q_offset.size()) +
                                    " entries: it has to have one for each of " + std::to_string(batch) +
                                    " sequences");
    }
    VarlenTiles tiles{rows(batch, cu_q.back(), block_q), rows(batch, cu_k.back(), block_k)};

    std::vector<Tile> queries;
    queries.reserve(tiles.query.size() / 3);
    std::vector<uint64_t> tile_cost, sequence_cost(static_cast<size_t>(batch));
    tile_cost.reserve(queries.capacity());
    for (int32_t s = 0; s < batch; ++s) {
        const int64_t len_q = cu_q[s + 1] - cu_q[s], len_k = cu_k[s + 1] - cu_k[s];
        const int64_t first = q_offset.empty() ? len_k - len_q : q_offset[s];
        for (int64_t begin = 0; begin < len_q; begin += block_q) {
            const int64_t end = std::min(begin + block_q, len_q);
            queries.push_back({s, static_cast<int32_t>(begin), static_cast<int32_t>(end)});
            tile_cost.push_back(visible_cells(first + begin, end - begin, len_k, window));
            sequence_cost[s] += tile_cost.back();
        }
    }

    auto out = tiles.query.begin();
    for (const uint32_t i : costliest_first(tile_cost)) {
        const auto [s, begin, end] = queries[i];
        for (const int32_t x : {s, begin, end}) *out++ = x;
    }

    out = tiles.key.begin();
    for (const uint32_t s : costliest_first(sequence_cost)) {
        const int64_t len_q = cu_q[s + 1] - cu_q[s], len_k = cu_k[s + 1] - cu_k[s];
        if (len_k == 0 && len_q > 0) {
            for (const int32_t x : {static_cast<int32_t>(s), 0, 0}) *out++ = x;
        }
        for (int64_t begin = 0; begin < len_k; begin += block_k) {
            const int64_t end = std::min(begin + block_k, len_k);
            for (const int64_t x : {int64_t{s}, begin, end}) *out++ = static_cast<int32_t>(x);
        }
    }
    return tiles;
}

}  // namespace gapless::plan
