// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "csrc/cpu/recycle.h"
#include "csrc/cpu/varlen.h"
#include "csrc/torch/tensors.h"

namespace gapless {
namespace {

constexpr int64_t kMaxDim = 256;

/// Arguments of one call: the struct for the kernels and the tensors that its pointers lean on.
struct Call {
    VarlenParams params{};
    cpu::VarlenSizes sizes{};
    Tensor q, k, v;
    std::vector<Tensor> kept;
    std::vector<double> sinks;

    const int32_t* keep(const Tensor& t) {
        kept.push_back(t);
        return static_cast<const int32_t*>(t.const_data_ptr());
    }

    Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::vector<Tensor>& plan,
         const std::optional<Tensor>& seqused_k, const std::optional<Tensor>& block_table,
         const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks_in,
         const std::vector<double>& score, const std::vector<int64_t>& window)
        : q(q_in), k(k_in), v(v_in) {
        const int64_t key_dims = block_table ? 4 : 3;
        check_cpu(q, "q", 3);
        check_cpu(k, "k", key_dims);
        check_cpu(v, "v", key_dims);
        VarlenParams& p = params;
        p.dtype = dtype_of(q, "q");
        STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                        "q, k and v have to be of one dtype");
        for (int64_t i = 0; i + 1 < key_dims; ++i)
            STD_TORCH_CHECK(k.size(i) == v.size(i), "k and v differ in dimension ", i, ": ", k.size(i),
                            " and ", v.size(i));
        const int64_t heads = q.size(1), kv_heads = k.size(key_dims - 2), dim = q.size(2),
                      dim_v = v.size(key_dims - 1);
        STD_TORCH_CHECK(k.size(key_dims - 1) == dim, "k has head dim ", k.size(key_dims - 1), ", q has ",
                        dim);
        STD_TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads <= INT32_MAX, "q has ",
                        heads, " heads, k has ", kv_heads);
        STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDim && dim_v >= 1 && dim_v <= kMaxDim, "head dims are ", dim,
                        " and ", dim_v, ": they have to be from 1 to ", kMaxDim);
        STD_TORCH_CHECK(plan.size() == 4, "plan has ", plan.size(), " tensors: it has to have 4");
        STD_TORCH_CHECK(score.size() == 2, "score has ", score.size(),
                        " entries: it has to be scale, softcap");
        STD_TORCH_CHECK(window.size() == 2 && window[0] >= -1 && window[1] >= -1 && window[0] <= INT32_MAX &&
                            window[1] <= INT32_MAX,
                        "window has to be left, right, each -1 or at least 0");
        STD_TORCH_CHECK(q.size(0) <= INT32_MAX && (block_table || k.size(0) <= INT32_MAX),
                        "more than 2^31 - 1 tokens");
        q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
        p.q = packed(q), p.k = packed(k), p.v = packed(v);
        p.total_q = q.size(0);
        p.heads = int32_t(heads), p.kv_heads = int32_t(kv_heads), p.dim = int32_t(dim),
        p.dim_v = int32_t(dim_v);
        p.scale = score[0], p.softcap = score[1];
        p.left = int32_t(window[0]), p.right = int32_t(window[1]);

        check_cpu(plan[0], "cu_seqlens_q", 1);
        const int64_t batch = plan[0].size(0) - 1;
        STD_TORCH_CHECK(batch >= 0, "cu_seqlens_q is empty: it has to have batch + 1 entries");
        p.cu_seqlens_q = keep(checked(plan[0], "cu_seqlens_q", ScalarType::Int, {batch + 1}));
        p.cu_seqlens_k = keep(checked(plan[1], "cu_seqlens_k", ScalarType::Int, {batch + 1}));
        sizes.batch = batch, sizes.total_q = q.size(0), sizes.total_k = block_table ? 0 : k.size(0);
        sizes.query_tiles = keep(checked(plan[2], "query_tiles", ScalarType::Int, {-1, 3}));
        sizes.key_tiles = keep(checked(plan[3], "key_tiles", ScalarType::Int, {-1, 3}));
        sizes.query_tile_count = plan[2].size(0), sizes.key_tile_count = plan[3].size(0);
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

Tensor fresh(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
    const std::vector<int64_t> sizes(shape);
    std::vector<int64_t> strides(sizes.size());
    int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2, numel = 1;
    bool overflow = false;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = numel;
        overflow |= __builtin_mul_overflow(numel, sizes[i], &numel);
    }
    overflow |= __builtin_mul_overflow(bytes, numel, &bytes);
    // torch's own allocator says what is wrong with a size that no memory could hold.
    if (overflow || bytes < int64_t(cpu::kRecycled)) return torch::stable::new_empty(like, sizes, type);
    return torch::stable::from_blob(cpu::take(size_t(bytes)), sizes, strides, like.device(), type,
                                    cpu::give_back);
}

cpu::Threads torch_threads() {
    const int64_t count = torch::stable::get_num_threads();
    return {count, [count](const std::function<void()>& body) {
                torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { body(); });
            }};
}

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
    VarlenParams& p = call.params;
    for (const auto& [t, name] : {std::pair<const Tensor&, const char*>{dout, "dout"}, {out, "out"}}) {
        check_cpu(t, name, 3);
        STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " is not of q's dtype");
        STD_TORCH_CHECK(t.size(0) == p.total_q && t.size(1) == p.heads && t.size(2) == p.dim_v, name,
                        " has to be [tokens, heads, dim_v]");
    }
    dout = unit_stride(dout), out = unit_stride(out);
    lse = checked(lse, "lse", lse_type(p.dtype), {p.heads, p.total_q});
    if (dlse) dlse = checked(*dlse, "dlse", lse_type(p.dtype), {p.heads, p.total_q});
    Tensor delta = fresh(q, {p.heads, p.total_q}, lse_type(p.dtype));
    Tensor dq = fresh(q, {p.total_q, p.heads, p.dim}, q.scalar_type());
    Tensor dk = fresh(q, {k.size(0), p.kv_heads, p.dim}, q.scalar_type());
    Tensor dv = fresh(q, {k.size(0), p.kv_heads, p.dim_v}, q.scalar_type());
    Tensor dsinks = fresh(q, {sinks ? p.heads : 0}, ScalarType::Double);
    p.out = packed(out);
    p.lse = const_cast<void*>(lse.const_data_ptr());
    p.tiles = call.sizes.key_tiles;
    const VarlenBackwardParams b{p,
                                 packed(dout),
                                 dlse ? dlse->const_data_ptr() : nullptr,
                                 delta.mutable_data_ptr(),
                                 packed(dq),
                                 packed(dk),
                                 packed(dv)};
    cpu::varlen_backward(b, call.sizes, static_cast<double*>(dsinks.mutable_data_ptr()), torch_threads());
    return {dq, dk, dv, torch::stable::to(dsinks, sinks ? sinks->scalar_type() : q.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gapless, CPU, m) {
    m.impl("varlen_attention_fwd", TORCH_BOX(&forward));
    m.impl("varlen_attention_bwd", TORCH_BOX(&backward));
}

}  // namespace gapless
