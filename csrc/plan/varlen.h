// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace gapless::plan {

/// Keys that a query sees beside its own position, both inclusive; -1 is no limit, (-1, 0) is causal.
/// Query i of a sequence sits at key position i + len_k - len_q, or where an offset says.
struct Window {
    int64_t left = -1;
    int64_t right = -1;
};

/// Flat rows (sequence, begin, end), [capacity * 3], in the order in which they should run; -1 in unused
/// rows.
struct VarlenTiles {
    std::vector<int32_t> query;
    std::vector<int32_t> key;
};

/// Throws std::invalid_argument, naming `name`, the index and the value, unless the entries start at 0, never
/// decrease, fit int32 and end at `total` (where that is known: >= 0).
void check_cu_seqlens(std::span<const int64_t> cu_seqlens, std::string_view name, int64_t total);
void check_cu_seqlens(std::span<const int32_t> cu_seqlens, std::string_view name, int64_t total);

/// Number of (query, key) pairs that the queries [begin, end) of a sequence see. Takes constant time.
uint64_t visible_cells(int64_t begin, int64_t end, int64_t len_q, int64_t len_k, Window window);

/// The same of `count` queries, the first of which sits at key position `first`, any sum of two int32.
uint64_t visible_cells(int64_t first, int64_t count, int64_t len_k, Window window);

/// Tiles of a packed batch, capacity batch + tokens / block each. Query tiles come costliest first; key tiles
/// by sequence, costliest sequence first, ascending inside one. Ties keep their order. A sequence that has
/// queries but no keys gets one empty key tile. q_offset: key position of each sequence's first query, or
/// empty. Throws std::invalid_argument on bad arguments.
VarlenTiles varlen_tiles(std::span<const int32_t> cu_seqlens_q, std::span<const int32_t> cu_seqlens_k,
                         int64_t block_q, int64_t block_k, Window window,
                         std::span<const int32_t> q_offset = {});

}  // namespace gapless::plan
