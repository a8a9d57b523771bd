// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/varlen.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/work.h"

namespace gapless::cpu {
namespace {

// A tile of few rows over many keys is cut along its keys, so that one long sequence still feeds every
// thread. The limits are part of the result's bits and so depend on nothing but the tile.
constexpr int64_t kSplitRows = 64, kSplitKeys = 1024;

void check_tiles(const int32_t* tiles, const char* name, int64_t count, int64_t batch, const int32_t* cu) {
    for (int64_t i = 0; i < count; ++i) {
        const int32_t s = tiles[3 * i], begin = tiles[3 * i + 1], end = tiles[3 * i + 2];
        if (s == -1) continue;
        check(s >= 0 && s < batch, name, 3 * i, s, "-1 or below the batch size, " + std::to_string(batch));
        const int64_t length =
            int64_t{cu[s + 1]} - cu[s];  // with pages, nobody has checked the keys' lengths
        // An empty tile amid others would let the ones after it wait for its turn, which never comes.
        check(begin >= 0 && (begin < end || (begin == 0 && end == 0)), name, 3 * i + 1, begin,
              "from 0 to below the tile's end");
        check(end <= length, name, 3 * i + 2, end,
              "at most the sequence's length, " + std::to_string(length));
    }
}

int64_t key_length(const VarlenParams& p, int64_t s) {
    return p.seqused_k ? p.seqused_k[s] : p.cu_seqlens_k[s + 1] - p.cu_seqlens_k[s];
}

/// Keys that some row of a query tile sees.
std::pair<int64_t, int64_t> tile_keys(const VarlenParams& p, const int32_t* tile) {
    const int64_t keys = key_length(p, tile[0]);
    const int64_t first =
        p.first_position(tile[0], p.cu_seqlens_q[tile[0] + 1] - p.cu_seqlens_q[tile[0]], keys);
    const int64_t begin = p.left < 0 ? 0 : std::clamp<int64_t>(tile[1] + first - p.left, 0, keys);
    const int64_t end = p.right < 0 ? keys : std::clamp<int64_t>(tile[2] + first + p.right, begin, keys);
    return {begin, end};
}

/// How many kv heads of one tile a thread takes at once. They lie beside each other in memory, so as many as
/// leave every thread enough items to even out.
int64_t heads_together(int64_t tiles, int64_t kv_heads, const Threads& threads) {
    return std::clamp<int64_t>(tiles * kv_heads / (kItemsPerThread * threads.count), 1, kv_heads);
}

}  // namespace

void check_varlen(const VarlenParams& p, const VarlenSizes& n) {
    check_lengths(p.cu_seqlens_q, "cu_seqlens_q", n.batch, n.total_q);
    if (!p.block_table) check_lengths(p.cu_seqlens_k, "cu_seqlens_k", n.batch, n.total_k);
    if (p.seqused_k)
        for (int64_t i = 0; i < n.batch; ++i) {
            const int64_t room =
                p.block_table ? p.max_pages * p.page_size : p.cu_seqlens_k[i + 1] - p.cu_seqlens_k[i];
            check(p.seqused_k[i] >= 0 && p.seqused_k[i] <= room, "seqused_k", i, p.seqused_k[i],
                  "from 0 to the sequence's room, " + std::to_string(room));
        }
    if (p.block_table)
        for (int64_t i = 0; i < n.batch; ++i)
            for (int64_t j = 0; j * p.page_size < p.seqused_k[i]; ++j) {
                const int32_t page = p.block_table[i * p.max_pages + j];
                check(page >= 0 && page < n.pages, "block_table", i * p.max_pages + j, page,
                      "below the number of pages, " + std::to_string(n.pages));
            }
    check_tiles(n.query_tiles, "query_tiles", n.query_tile_count, n.batch, p.cu_seqlens_q);
    check_tiles(n.key_tiles, "key_tiles", n.key_tile_count, n.batch, p.cu_seqlens_k);
}

void varlen_forward(const VarlenParams& p, const VarlenSizes& sizes, const Threads& all_threads) {
    struct Part {
        int32_t tile, begin, end;
        int64_t partial;  // offset in rows for bundle 0, or -1
    };
    struct Merge {
        int32_t tile;
        int64_t partial, parts;
    };
    std::vector<Part> parts;
    std::vector<Merge> merges;
    parts.reserve(sizes.query_tile_count);
    const int64_t group = p.heads / p.bundles;
    int64_t partial_rows = 0, cells = 0;
    for (int64_t t = 0; t < sizes.query_tile_count; ++t) {
        const int32_t* tile = p.tiles + 3 * t;
        if (tile[0] < 0 || tile[1] == tile[2]) continue;
        const auto [begin, end] = tile_keys(p, tile);
        const int64_t rows = (tile[2] - tile[1]) * group, count = (end - begin + kSplitKeys - 1) / kSplitKeys;
        cells += rows * (end - begin);
        if (rows > kSplitRows || count < 2) {
            parts.push_back({int32_t(t), 0, int32_t(end), -1});
            continue;
        }
        merges.push_back({int32_t(t), partial_rows, count});
        for (int64_t i = 0; i < count; ++i) {
            // The first part begins at key 0, which marks it as the one that counts the sink.
            const int64_t from = i == 0 ? 0 : begin + i * kSplitKeys,
                          to = std::min(end, begin + (i + 1) * kSplitKeys);
            parts.push_back({int32_t(t), int32_t(from), int32_t(to), partial_rows});
            partial_rows += rows;
        }
    }
    const int64_t row_bytes = (p.dim_v + 2) * wide_size_of(p.dtype);
    const std::unique_ptr<char[]> partials(partial_rows ? new char[partial_rows * p.bundles * row_bytes]
                                                        : nullptr);
    const auto address = [&](int64_t row, int64_t bundle) {
        return partials.get() + (bundle * partial_rows + row) * row_bytes;
    };
    const Kernels& k = kernels();
    const Threads threads = enough_threads(cells * p.bundles * (p.dim + p.dim_v), all_threads);
    const int64_t together = heads_together(int64_t(parts.size()), p.bundles, threads),
                  groups = (p.bundles + together - 1) / together;
    in_order(int64_t(parts.size()) * groups, threads, [&](int64_t i) {
        const Part& part = parts[i / groups];
        const int64_t head = i % groups * together, heads = std::min(together, p.bundles - head);
        k.varlen_forward(p, {part.tile, int32_t(head), int32_t(heads), part.begin, part.end,
                             part.partial < 0 ? nullptr : address(part.partial, int32_t(head)),
                             partial_rows * (p.dim_v + 2)});
    });
    in_order(int64_t(merges.size()) * p.bundles, threads, [&](int64_t i) {
        const Merge& merge = merges[i / p.bundles];
        const int32_t head = int32_t(i % p.bundles);
        k.varlen_merge(p, {merge.tile, head, address(merge.partial, head), merge.parts});
    });
}

void varlen_backward(const VarlenBackwardParams& b, const VarlenSizes& sizes, double* dsinks,
                     const Threads& threads) {
    const VarlenParams& p = b.forward;
    const Kernels& k = kernels();
    constexpr int64_t kDeltaTokens = 256;
    in_order((p.total_q + kDeltaTokens - 1) / kDeltaTokens, threads, [&](int64_t i) {
        k.varlen_delta(b, i * kDeltaTokens, std::min(p.total_q, (i + 1) * kDeltaTokens));
    });

    // A unit is one sequence and kv head: its tiles hand dq on to each other. They are claimed in order, so a
    // tile never waits for one that nobody has begun, and only as many units as threads hold memory at a
    // time.
    struct Unit {
        int32_t first_tile, tiles;
        BackwardSpace space;
        std::mutex mutex;
        std::vector<char> dq;
        std::vector<int32_t> turns;
        int32_t left;
    };
    /// What a thread takes at once: a tile of one unit, or the only tiles of several.
    struct Claim {
        int64_t unit, units;
        int32_t tile;
    };
    std::vector<std::pair<int32_t, int32_t>> runs;
    for (int64_t t = 0; t < sizes.key_tile_count; ++t) {
        const int32_t* tile = p.tiles + 3 * t;
        if (tile[0] < 0) continue;
        if (!runs.empty() && runs.back().first + runs.back().second == t && tile[-3] == tile[0])
            ++runs.back().second;
        else
            runs.emplace_back(int32_t(t), 1);
    }
    std::vector<Unit> units(runs.size() * p.kv_heads);
    std::vector<Claim> claims;
    const int64_t together = heads_together(int64_t(runs.size()), p.kv_heads, threads);
    for (int64_t u = 0; u < int64_t(units.size()); ++u) {
        const auto [first, tiles] = runs[u / p.kv_heads];
        const int32_t sequence = p.tiles[3 * first];
        units[u].first_tile = first, units[u].tiles = units[u].left = tiles;
        units[u].space = k.backward_space(p, p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence]);
        const int64_t head = u % p.kv_heads;
        if (tiles == 1 && head % together == 0)
            claims.push_back({u, std::min(together, p.kv_heads - head), 0});
        for (int32_t i = 0; tiles > 1 && i < tiles; ++i) claims.push_back({u, 1, i});
    }
    const auto item = [&](int64_t u, int32_t tile) -> BackwardItem {
        Unit& unit = units[u];
        return {int32_t(u % p.kv_heads),
                unit.first_tile,
                unit.tiles,
                tile,
                unit.dq.empty() ? nullptr : unit.dq.data(),
                unit.turns.data()};
    };
    in_order(int64_t(claims.size()), threads, [&](int64_t i) {
        const Claim& claim = claims[i];
        Unit& unit = units[claim.unit];
        if (unit.tiles == 1) {
            for (int64_t u = claim.unit; u < claim.unit + claim.units; ++u) {
                const bool last = u + 1 == claim.unit + claim.units;
                const BackwardItem next = item(last ? u : u + 1, 0);
                k.varlen_backward(b, item(u, 0), last ? nullptr : &next);
            }
            return;
        }
        {
            const std::lock_guard lock(unit.mutex);
            if (unit.turns.empty()) {
                unit.dq.resize(unit.space.dq);
                unit.turns.resize(unit.space.blocks);
            }
        }
        k.varlen_backward(b, item(claim.unit, claim.tile), nullptr);
        const std::lock_guard lock(unit.mutex);
        if (--unit.left == 0) std::vector<char>().swap(unit.dq);
    });

    if (!p.sinks) return;
    const auto at = [&](const void* x, int64_t i) {
        return p.dtype == DType::kFloat64 ? static_cast<const double*>(x)[i]
                                          : double(static_cast<const float*>(x)[i]);
    };
    in_order(p.heads, threads, [&](int64_t head) {
        double sum = 0;
        for (int64_t i = head * p.total_q; i < (head + 1) * p.total_q; ++i)
            sum -= std::exp(p.sinks[head] - at(p.lse, i)) * at(b.delta, i);
        dsinks[head] = sum;
    });
}

}  // namespace gapless::cpu
