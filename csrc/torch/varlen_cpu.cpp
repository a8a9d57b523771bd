// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "csrc/torch/attention_call.h"

namespace gapless {
namespace {

struct Call : AttentionCall {
    cpu::VarlenSizes sizes{};
    std::vector<double> sinks;

    Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::vector<Tensor>& plan,
         const std::optional<Tensor>& seqused_k, const std::optional<Tensor>& block_table,
         const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks_in,
         const std::vector<double>& score, const std::vector<int64_t>& window)
        : AttentionCall(q_in, k_in, v_in, block_table.has_value(), entry(plan, "plan", 0),
                        entry(plan, "plan", 1), score, window) {
        STD_TORCH_CHECK(plan.size() == 4 || plan.size() == 5, "plan has ", plan.size(),
                        " tensors: it has to have 4, or 5 with q_offset");
        VarlenParams& p = params;
        const int64_t heads = p.heads;
        sizes.batch = batch, sizes.total_q = q.size(0), sizes.total_k = block_table ? 0 : k.size(0);
        sizes.query_tiles = keep(checked(plan[2], "query_tiles", ScalarType::Int, {-1, 3}));
        sizes.key_tiles = keep(checked(plan[3], "key_tiles", ScalarType::Int, {-1, 3}));
        sizes.query_tile_count = plan[2].size(0), sizes.key_tile_count = plan[3].size(0);
        if (plan.size() == 5) p.q_offset = keep(checked(plan[4], "q_offset", ScalarType::Int, {batch}));
        if (seqused_k) p.seqused_k = keep(checked(*seqused_k, "seqused_k", ScalarType::Int, {batch}));
        if (block_table) {
            STD_TORCH_CHECK(seqused_k.has_value(), "block_table needs seqused_k");
            p.block_table = keep(checked(*block_table, "block_table", ScalarType::Int, {batch, -1}));
            p.max_pages = block_table->size(1);
            p.page_size = k.size(1);
            STD_TORCH_CHECK(p.page_size > 0 && p.page_size <= INT32_MAX, "pages hold ", p.page_size,
                            " keys: they have to hold from 1 to 2^31 - 1");
            p.k_page_stride = k.stride(0), p.v_page_stride = v.stride(0);
            sizes.pages = k.size(0);
        }
        if (alibi_slopes) {
            const bool per_batch = alibi_slopes->dim() == 2;
            const Tensor slopes =
                per_batch ? checked(*alibi_slopes, "alibi_slopes", ScalarType::Float, {batch, heads})
                          : checked(*alibi_slopes, "alibi_slopes", ScalarType::Float, {heads});
            kept.push_back(slopes);
            p.alibi_slopes = static_cast<const float*>(slopes.const_data_ptr());
            p.alibi_batch_stride = per_batch ? heads : 0;
        }
        if (sinks_in) {
            check_cpu(*sinks_in, "sinks", 1);
            STD_TORCH_CHECK(sinks_in->size(0) == heads, "sinks has ", sinks_in->size(0),
                            " entries: it has to have ", heads);
            dtype_of(*sinks_in, "sinks");
            const Tensor wide = torch::stable::contiguous(torch::stable::to(*sinks_in, ScalarType::Double));
            const double* values = static_cast<const double*>(wide.const_data_ptr());
            sinks.assign(values, values + heads);
            p.sinks = sinks.data();
        }
        cpu::check_varlen(p, sizes);
    }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::vector<Tensor> plan,
                                   std::optional<Tensor> seqused_k, std::optional<Tensor> block_table,
                                   std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                                   std::vector<double> score, std::vector<int64_t> window) {
    Call call(q, k, v, plan, seqused_k, block_table, alibi_slopes, sinks, score, window);
    VarlenParams& p = call.params;
    Tensor out = fresh(q, {p.total_q, p.heads, p.dim_v}, q.scalar_type());
    Tensor lse = fresh(q, {p.heads, p.total_q}, lse_type(p.dtype));
    p.out = packed(out);
    p.lse = lse.mutable_data_ptr();
    p.tiles = call.sizes.query_tiles;
    cpu::varlen_forward(p, call.sizes, torch_threads());
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, std::optional<Tensor> dlse, Tensor q,
                                                    Tensor k, Tensor v, Tensor out, Tensor lse,
                                                    std::vector<Tensor> plan,
                                                    std::optional<Tensor> alibi_slopes,
                                                    std::optional<Tensor> sinks, std::vector<double> score,
                                                    std::vector<int64_t> window) {
    Call call(q, k, v, plan, std::nullopt, std::nullopt, alibi_slopes, sinks, score, window);
    const VarlenParams& p = call.params;
    AttentionGradients g(call, dout, dlse, out, lse);
    g.params.forward.tiles = call.sizes.key_tiles;
    Tensor dsinks = fresh(q, {sinks ? p.heads : 0}, ScalarType::Double);
    cpu::varlen_backward(g.params, call.sizes, static_cast<double*>(dsinks.mutable_data_ptr()),
                         torch_threads());
    return {g.dq, g.dk, g.dv, torch::stable::to(dsinks, sinks ? sinks->scalar_type() : q.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gapless, CPU, m) {
    m.impl("varlen_attention_fwd", TORCH_BOX(&forward));
    m.impl("varlen_attention_bwd", TORCH_BOX(&backward));
}

}  // namespace gapless
