// SPDX-License-Identifier: Apache-2.0
// What a varlen attention kernel is told. Plain data: no torch, no ownership.
#pragma once

#include <cstdint>

namespace gapless {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

/// A [tokens, heads, dim] tensor whose last stride is 1; strides count elements.
struct Packed {
    void* data;
    int64_t token_stride;
    int64_t head_stride;
};

struct VarlenParams {
    DType dtype;  ///< of q, k, v, out and their gradients
    Packed q, k, v, out;
    void* lse;  ///< [heads, total_q]; float, or double for kFloat64

    int64_t total_q;
    int32_t heads, kv_heads;
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
};

/// Keys of one query tile and some heads that one work item covers; several items of one tile are merged by
/// their LSE.
struct ForwardItem {
    int32_t tile;
    int32_t kv_head, kv_heads;  ///< the first, and how many
    int32_t key_begin, key_end;
    void* partial;  ///< null: the item writes the result itself; else [rows][dim_v + 2] of (out, max, sum)
    int64_t partial_stride;  ///< numbers from one kv head's to the next one's
};

/// The parts of one query tile and kv head, [parts][rows][dim_v + 2], that ForwardItems left.
struct MergeItem {
    int32_t tile;
    int32_t kv_head;
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

/// One key tile of one kv head. The tiles of a sequence and head add to the same dq, one after another in
/// their order.
struct BackwardItem {
    int32_t kv_head;
    int32_t first_tile, tiles, tile;  ///< the sequence's tiles, and which of them this item is
    void* dq;       ///< sum of dq over the tiles, in the kernel's own layout; null if there is one tile
    int32_t* turn;  ///< per block of rows: tiles that have added theirs
};

}  // namespace gapless
