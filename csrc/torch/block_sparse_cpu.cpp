// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "csrc/cpu/block_sparse.h"
#include "csrc/cpu/work.h"
#include "csrc/torch/attention_call.h"

namespace gapless {
namespace {

void check_count(size_t have, const char* name, size_t wanted) {
    STD_TORCH_CHECK(have >= wanted, name, " has ", have, " entries: it has to have ", wanted);
}

/// Sizes of blocks: a power of two, as many as the kernels' tiles are made for.
void check_block(const char* name, int64_t size) {
    STD_TORCH_CHECK(size == 16 || size == 32 || size == 64 || size == 128 || size == 256, name, " is ", size,
                    ": it has to be 16, 32, 64, 128 or 256");
}

/// One call over block lists. layout: cu_seqlens_q, cu_seqlens_k, offsets, ids, partial_offsets, partial_ids,
/// partial_patterns, patterns, then what other devices need. blocks: block_q, block_k, pattern heads.
struct SparseCall : AttentionCall {
    BlockLists lists{};
    std::vector<int64_t> first_row;

    SparseCall(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::vector<Tensor>& layout,
               const std::vector<int64_t>& blocks, const std::vector<double>& score,
               const std::vector<int64_t>& window)
        : AttentionCall(q_in, k_in, v_in, false, entry(layout, "layout", 0), entry(layout, "layout", 1),
                        score, window) {
        check_count(layout.size(), "layout", 8), check_count(blocks.size(), "blocks", 3);
        check_block("block_q", blocks[0]), check_block("block_k", blocks[1]);
        VarlenParams& p = params;
        const int64_t heads = blocks[2];
        STD_TORCH_CHECK(
            heads > 0 && p.heads % heads == 0 && (p.kv_heads % heads == 0 || heads % p.kv_heads == 0),
            "the layout has ", heads, " heads, q has ", p.heads, ", k has ", p.kv_heads,
            ": it has to have 1, as many as k or q, or a number between that divides them");
        STD_TORCH_CHECK(p.left == -1, "window[0] is ", p.left, ": it has to be -1");
        p.bundles = std::max(p.kv_heads, int32_t(heads));
        cpu::check_lengths(p.cu_seqlens_q, "cu_seqlens_q", batch, p.total_q);
        cpu::check_lengths(p.cu_seqlens_k, "cu_seqlens_k", batch, k.size(0));
        const cpu::BlockCounts rows(p.cu_seqlens_q, batch, blocks[0]);
        first_row = rows.first;
        BlockLists& l = lists;
        l.block_q = blocks[0], l.block_k = blocks[1], l.heads = heads, l.rows_per_head = rows.total;
        l.first_row = first_row.data();
        l.words = (l.block_q + 31) / 32;
        const int64_t entries = heads * rows.total + 1;
        l.offsets = keep(checked(layout[2], "offsets", ScalarType::Int, {entries}));
        l.ids = keep(checked(layout[3], "ids", ScalarType::Int, {-1}));
        l.partial_offsets = keep(checked(layout[4], "partial_offsets", ScalarType::Int, {entries}));
        l.partial = keep(checked(layout[5], "partial_ids", ScalarType::Int, {-1}));
        l.partial_patterns =
            keep(checked(layout[6], "partial_patterns", ScalarType::Int, {layout[5].size(0)}));
        l.patterns = reinterpret_cast<const uint32_t*>(
            keep(checked(layout[7], "patterns", ScalarType::Int, {-1, l.block_k, l.words})));
        p.blocks = &lists;
        cpu::check_block_lists(
            p, {batch, p.total_q, k.size(0), layout[3].size(0), layout[5].size(0), layout[7].size(0)});
    }
    SparseCall(const SparseCall&) = delete;
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::vector<Tensor> layout,
                                   std::vector<int64_t> blocks, std::vector<double> score,
                                   std::vector<int64_t> window) {
    SparseCall call(q, k, v, layout, blocks, score, window);
    VarlenParams& p = call.params;
    Tensor out = fresh(q, {p.total_q, p.heads, p.dim_v}, q.scalar_type());
    Tensor lse = fresh(q, {p.heads, p.total_q}, lse_type(p.dtype));
    p.out = packed(out);
    p.lse = lse.mutable_data_ptr();
    cpu::block_sparse_forward(p, call.batch, torch_threads());
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                                            Tensor v, Tensor out, Tensor lse, std::vector<Tensor> layout,
                                            std::vector<int64_t> blocks, std::vector<double> score,
                                            std::vector<int64_t> window) {
    SparseCall call(q, k, v, layout, blocks, score, window);
    AttentionGradients g(call, dout, dlse, out, lse);
    cpu::block_sparse_backward(g.params, call.batch, torch_threads());
    return {g.dq, g.dk, g.dv};
}

/// A call over dense blocks, and where their mass goes. plan: of VarlenPlan. blocks: block_q, block_k, and
/// how many of the former there are, of the latter at most.
struct MassCall : AttentionCall {
    BlockMass mass{};
    std::vector<int64_t> first_row;
    Tensor result;

    MassCall(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::vector<Tensor>& plan,
             const std::vector<int64_t>& blocks, const std::vector<double>& score,
             const std::vector<int64_t>& window)
        : AttentionCall(q_in, k_in, v_in, false, entry(plan, "plan", 0), entry(plan, "plan", 1), score,
                        window) {
        check_count(blocks.size(), "blocks", 4);
        check_block("block_q", blocks[0]), check_block("block_k", blocks[1]);
        VarlenParams& p = params;
        cpu::check_lengths(p.cu_seqlens_q, "cu_seqlens_q", batch, p.total_q);
        cpu::check_lengths(p.cu_seqlens_k, "cu_seqlens_k", batch, k.size(0));
        const cpu::BlockCounts rows(p.cu_seqlens_q, batch, blocks[0]), keys(p.cu_seqlens_k, batch, blocks[1]);
        STD_TORCH_CHECK(blocks[2] == rows.total, "blocks[2] is ", blocks[2],
                        ": it has to be the number of blocks of queries, ", rows.total);
        STD_TORCH_CHECK(blocks[3] >= keys.most, "blocks[3] is ", blocks[3],
                        ": it has to be at least the most blocks of keys of a sequence, ", keys.most);
        result = torch::stable::new_zeros(q, {p.heads, blocks[2], blocks[3]}, lse_type(p.dtype));
        first_row = rows.first;
        mass = {result.mutable_data_ptr(), blocks[0], blocks[1], blocks[2], blocks[3], first_row.data()};
        p.mass = &mass;
        p.bundles = p.heads;
    }
    MassCall(const MassCall&) = delete;
};

Tensor block_mass(Tensor q, Tensor k, Tensor lse, std::vector<Tensor> plan, std::vector<int64_t> blocks,
                  std::vector<double> score, std::vector<int64_t> window) {
    MassCall call(q, k, k, plan, blocks, score, window);
    VarlenParams& p = call.params;
    lse = checked(lse, "lse", lse_type(p.dtype), {p.heads, p.total_q});
    p.lse = const_cast<void*>(lse.const_data_ptr());
    p.dim_v = 0;  // values are not read
    cpu::block_mass(p, call.batch, false, torch_threads());
    return call.result;
}

std::tuple<Tensor, Tensor, Tensor> forward_with_mass(Tensor q, Tensor k, Tensor v, std::vector<Tensor> plan,
                                                     std::vector<int64_t> blocks, std::vector<double> score,
                                                     std::vector<int64_t> window) {
    MassCall call(q, k, v, plan, blocks, score, window);
    VarlenParams& p = call.params;
    Tensor out = fresh(q, {p.total_q, p.heads, p.dim_v}, q.scalar_type());
    Tensor lse = fresh(q, {p.heads, p.total_q}, lse_type(p.dtype));
    p.out = packed(out);
    p.lse = lse.mutable_data_ptr();
    cpu::block_mass(p, call.batch, true, torch_threads());
    return {out, lse, call.result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gapless, CPU, m) {
    m.impl("block_sparse_fwd", TORCH_BOX(&forward));
    m.impl("block_sparse_bwd", TORCH_BOX(&backward));
    m.impl("block_mass", TORCH_BOX(&block_mass));
    m.impl("attention_mass_fwd", TORCH_BOX(&forward_with_mass));
}

}  // namespace gapless
