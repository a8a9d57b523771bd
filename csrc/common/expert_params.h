// SPDX-License-Identifier: Apache-2.0
// What kernels on experts read and write: raw pointers, strides counted in elements.
#pragma once

#include "csrc/common/varlen_params.h"

namespace gapless {

/// One matrix per expert, outputs x terms: y[output] = sum over terms of w[output][term] * x[term].
struct ExpertMatrices {
    void* data;
    int64_t expert, output, term;  // strides
    int64_t outputs, terms;

    __attribute__((always_inline)) ExpertMatrices transposed() const {
        return {data, expert, term, output, terms, outputs};
    }
};

/// Rows of a matrix, side by side in memory.
struct RowMatrix {
    void* data;
    int64_t row;  // stride
};

enum class Activation { kSwiGlu, kGeGlu, kGeGluTanh, kSwiGluOai, kRelu2 };

/// Two inputs for each output?
inline constexpr bool gated(Activation a) { return a != Activation::kRelu2; }

/// Rows [begin, end) of an expert's rows, and part of the products' outputs.
struct ExpertItem {
    int32_t expert;
    int64_t begin, end;
    int64_t from, to;                  // outputs
    const ExpertItem* next = nullptr;  // what this thread runs after it, if that is known
};

/// Two-layer experts. Row r of the dispatch is pair[r], and of x pair[r] / top_k.
struct ExpertParams {
    DType dtype;
    Activation activation;
    bool interleaved;   // gate and up rows take turns
    bool weights_wide;  // topk_weights are float (double for double), not of dtype
    double alpha, limit;
    int64_t hidden, inter, top_k;
    const int32_t* pair;
    RowMatrix x;
    const void* topk_weights;  // [tokens * top_k]
    ExpertMatrices gate_up, down;
    const void *gate_up_bias, *down_bias;  // null: none
    int64_t gate_up_bias_row, down_bias_row;
    void* saved;     // [rows][gate_up outputs], of dtype; forward: null if not wanted
    void* out_rows;  // [rows][hidden], float (double)

    // Backward.
    RowMatrix dout;
    int64_t rows;
    void* dtopk_weights;   // [partials()][rows], float (double): they add up to the gradients of the rows'
                           // weights
    void* dpre;            // [rows][gate_up outputs], of dtype
    void* activated_rows;  // [rows][inter], of dtype, times the row's weight

    /// One for 64 activations each, one for the bias.
    __attribute__((always_inline)) int64_t partials() const { return (inter + 63) / 64 + 1; }
    __attribute__((always_inline)) int parts() const { return gated(activation) && !interleaved ? 2 : 1; }
    __attribute__((always_inline)) int64_t pre_width() const { return gated(activation) ? 2 * inter : inter; }
};

/// out[r] = w[expert of r] * x[r] for the rows of an item.
struct GroupedParams {
    DType dtype;
    RowMatrix x, out;
    ExpertMatrices w;
};

/// out[expert][p][q] = sum over its rows of a[row][p] * b[row][q], for p in [from, to).
struct OuterParams {
    DType dtype;
    RowMatrix a, b;
    const int32_t* a_pair;  // row r of a (b) is row pair[r] / top_k of memory; null: r itself
    const int32_t* b_pair;
    int64_t top_k;
    int64_t q;
    void* out;
    int64_t out_expert, out_row;  // strides
};

/// Rows gathered and summed; see the schemas.
struct PairRowsParams {
    DType dtype;
    bool rows_wide;     // rows are float (double for double), not of dtype
    bool weights_wide;  // so are weights
    int64_t top_k, width, pairs;
    RowMatrix tokens, rows;  // [tokens][width], [rows][width]
    const void* weights;     // [pairs] or null
    const int32_t* index;    // pair of each row, or row of each pair
    const void* identity;    // [tokens], times `self`, joins the sum; null: none
    RowMatrix self;
    void* dots;  // [pairs]
};

}  // namespace gapless
