// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <optional>

#include "csrc/cpu/cross_entropy.h"
#include "csrc/torch/tensors.h"

namespace gapless {
namespace {

/// The struct for the kernels, and the tensors that its pointers lean on.
struct CrossEntropyCall {
    CrossEntropyParams params{};
    Tensor logits, targets;
    std::optional<Tensor> bias;

    CrossEntropyCall(const Tensor& logits_in, const std::optional<Tensor>& bias_in, const Tensor& targets_in,
                     int64_t first, double softcap)
        : logits(logits_in), targets(targets_in), bias(bias_in) {
        check_cpu(logits, "logits", 2);
        logits = unit_stride(logits);
        CrossEntropyParams& p = params;
        p.dtype = dtype_of(logits, "logits");
        p.rows = logits.size(0), p.columns = logits.size(1), p.first = first, p.softcap = softcap;
        p.logits = {const_cast<void*>(logits.const_data_ptr()), logits.stride(0)};
        targets = checked(targets, "targets", ScalarType::Long, {p.rows});
        p.targets = static_cast<const int64_t*>(targets.const_data_ptr());
        if (!bias) return;
        bias = checked(*bias, "bias", logits.scalar_type(), {p.columns});
        p.bias = bias->const_data_ptr();
    }
    CrossEntropyCall(const CrossEntropyCall&) = delete;

    /// [4, rows], wide.
    Tensor wide_rows(const Tensor& t, const char* name) const {
        return checked(t, name, lse_type(params.dtype), {4, params.rows});
    }
};

Tensor forward(Tensor logits, std::optional<Tensor> bias, Tensor targets, Tensor before_in, int64_t first,
               double softcap, bool total) {
    CrossEntropyCall call(logits, bias, targets, first, softcap);
    const Tensor before = call.wide_rows(before_in, "sums");
    Tensor after = fresh(call.logits, {4, call.params.rows}, lse_type(call.params.dtype));
    call.params.before = before.const_data_ptr(), call.params.after = after.mutable_data_ptr();
    call.params.total = total;
    cpu::cross_entropy_forward(call.params, torch_threads());
    return after;
}

/// Somewhere to write [rows, columns] of the logits' dtype to, whose last stride is 1.
RowMatrix matrix_for(const Tensor& t, const char* name, const Tensor& logits, int64_t rows, int64_t columns) {
    check_cpu(t, name, 2);
    STD_TORCH_CHECK(t.scalar_type() == logits.scalar_type(), name, " and logits have to be of one dtype");
    STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, name, " is [", t.size(0), ", ", t.size(1),
                    "]: it has to be [", rows, ", ", columns, "]");
    STD_TORCH_CHECK((columns <= 1 || t.stride(1) == 1) && (rows <= 1 || t.stride(0) >= columns), name,
                    " has to have rows one after another");
    return {t.mutable_data_ptr(), t.stride(0)};
}

void backward(Tensor logits, std::optional<Tensor> bias, Tensor targets, Tensor factors_in, int64_t first,
              double softcap, Tensor out, std::optional<Tensor> sideways) {
    CrossEntropyCall call(logits, bias, targets, first, softcap);
    CrossEntropyParams& p = call.params;
    const Tensor factors = call.wide_rows(factors_in, "factors");
    p.factors = factors.const_data_ptr();
    p.out = matrix_for(out, "out", call.logits, p.rows, p.columns);
    if (sideways) {
        const RowMatrix side = matrix_for(*sideways, "sideways", call.logits, p.columns, p.rows);
        p.sideways = side.data, p.sideways_row = side.row;
    }
    cpu::cross_entropy_backward(p, torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gapless, CPU, m) {
    m.impl("cross_entropy_sums", TORCH_BOX(&forward));
    m.impl("cross_entropy_gradient", TORCH_BOX(&backward));
}

}  // namespace gapless
