// SPDX-License-Identifier: Apache-2.0
// What a varlen attention kernel is told. Plain data: no torch, no ownership.
#pragma once

#include <cstdint>

namespace gapless {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

/// Bytes of a value, and of the type that sums over such values are kept in. Always inlined: kernels of one
/// ISA must not stand in for another's.
__attribute__((always_inline)) inline int64_t size_of(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
__attribute__((always_inline)) inline int64_t wide_size_of(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : 4;
}

/// A [tokens, heads, dim] tensor whose last stride is 1; strides count elements.
struct Packed {
    void* data;
    int64_t token_stride;
    int64_t head_stride;
};

/// Which blocks of keys each block of queries sees. Blocks are counted from the first of their sequence; a
/// row is a pattern head and a block of queries of the batch: row = pattern head * rows_per_head + block.
struct BlockLists {
    int64_t block_q, block_k;  ///< tokens
    int64_t heads;             ///< patterns: query head h has number h / (query heads / heads)
    int64_t rows_per_head;
    const int64_t* first_row;                  ///< [batch], a sequence's first row of pattern head 0
    const int32_t *offsets, *ids;              ///< blocks seen in whole, ascending in a row
    const int32_t *partial_offsets, *partial;  ///< blocks seen in part, ascending in a row
    const int32_t* partial_patterns;           ///< which pattern each of those has
    const uint32_t*
        patterns;   ///< [patterns, block_k, words]: bit i % 32 of word i / 32: query i sees the key
    int64_t words;  ///< ceil(block_q / 32)

    /// The row of a query of a sequence, for bundle `bundle` of `bundles`. Always inlined: kernels of one ISA
    /// must not stand in for another's.
    __attribute__((always_inline)) int64_t row(int64_t bundle, int64_t bundles, int64_t sequence,
                                               int64_t query) const {
        return bundle * heads / bundles * rows_per_head + first_row[sequence] + query / block_q;
    }
};

/// Where the softmax weights of every block of queries and block of keys are added up.
struct BlockMass {
    void* data;  ///< [heads, q_blocks, k_blocks], in lse's type
    int64_t block_q, block_k, q_blocks, k_blocks;
    const int64_t* first_row;  ///< [batch], a sequence's first block of queries
};

struct VarlenParams {
    DType dtype;  ///< of q, k, v, out and their gradients
    Packed q, k, v, out;
    void* lse;  ///< [heads, total_q]; float, or double for kFloat64

    int64_t total_q;
    int32_t heads, kv_heads;
    int32_t bundles;  ///< groups of query heads whose rows lie beside each other: the kv heads, or more
    int32_t dim, dim_v;

    double scale;
    double softcap;             ///< 0: none
    int32_t left, right;        ///< keys seen beside the query's position; -1: no limit
    const float* alibi_slopes;  ///< [heads] or [batch, heads], or null
    int64_t alibi_batch_stride;
    const double* sinks;  ///< [heads], or null

    const int32_t* cu_seqlens_q;  ///< [batch + 1]
    const int32_t* cu_seqlens_k;  ///< [batch + 1]
    const int32_t* seqused_k;     ///< [batch], or null
    const int32_t* tiles;         ///< rows (sequence, begin, end): query tiles forward, key tiles backward

    const int32_t*
        block_table;  ///< [batch, max_pages], or null; then k and v are [pages, page_size, kv_heads, dim]
    int64_t max_pages;
    int64_t page_size;
    int64_t k_page_stride, v_page_stride;

    const BlockLists* blocks = nullptr;  ///< or null: every key is seen that the window lets through
    const BlockMass* mass = nullptr;     ///< or null; if not, each bundle is one head
    const int32_t* q_offset = nullptr;   ///< [batch], or null: see first_position

    /// Key position of a sequence's first query, which may lie before or behind all keys. Always inlined:
    /// kernels of one ISA must not stand in for another's.
    __attribute__((always_inline)) int64_t first_position(int64_t sequence, int64_t len_q,
                                                          int64_t len_k) const {
        return q_offset ? q_offset[sequence] : len_k - len_q;
    }
};

/// Keys and values of one sequence and kv head in the layout that the kernels' products read. Whoever first
/// meets a piece of kPackedPiece keys packs it.
struct PackedKeys {
    void *keys, *values;
    int32_t* pieces;  ///< 0: to be packed; 1: somebody is at it; 2: there
};
constexpr int64_t kPackedPiece = 64;

/// Keys of one query tile and some bundles that one work item covers; several items of one tile are merged by
/// their LSE.
struct ForwardItem {
    int32_t tile;
    int32_t bundle, bundles;  ///< the first, and how many
    int32_t key_begin, key_end;
    void* partial;  ///< null: the item writes the result itself; else [rows][dim_v + 2] of (out, max, sum)
    int64_t partial_stride;  ///< numbers from one bundle's to the next one's
    PackedKeys packed{};     ///< of all keys, or nulls: the item packs what it meets
    int32_t chunk = 0;       ///< keys that all listed blocks of the item meet before the next so many; 0: all
};

/// The parts of one query tile and bundle, [parts][rows][dim_v + 2], that ForwardItems left.
struct MergeItem {
    int32_t tile;
    int32_t bundle;
    const void* partials;
    int64_t parts;
};

struct VarlenBackwardParams {
    VarlenParams forward;  ///< tiles are key tiles
    Packed dout;
    const void* dlse;  ///< [heads, total_q] in lse's type, or null
    void* delta;       ///< [heads, total_q] in lse's type: rowsum(dout * out) - dlse
    Packed dq, dk, dv;
};

/// Keys in a tile of the backward pass over block lists: a multiple of every size of block.
constexpr int64_t kListedKeys = 1024;

/// One key tile of one kv head. The tiles of a sequence and head add to the same dq, one after another in
/// their order.
struct BackwardItem {
    int32_t kv_head;
    int32_t first_tile, tiles, tile;  ///< the sequence's tiles, and which of them this item is
    void* dq;       ///< sum of dq over the tiles, in the kernel's own layout; null if there is one tile
    int32_t* turn;  ///< per block of rows: tiles that have added theirs
};

}  // namespace gapless
