// SPDX-License-Identifier: Apache-2.0
// Every schema, and the Python module whose import registers them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "csrc/cpu/kernels.h"

namespace {

std::string cpu_isa() { return gapless::cpu::kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY(gapless, m) {
    // plan: cu_seqlens_q, cu_seqlens_k, query_tiles, key_tiles, maybe q_offset. score: scale, softcap.
    // window: left, right.
    m.def(
        "varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor[] plan, Tensor? seqused_k, Tensor? "
        "block_table, "
        "Tensor? alibi_slopes, Tensor? sinks, float[] score, int[] window) -> (Tensor out, Tensor lse)");
    m.def(
        "varlen_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
        "lse, "
        "Tensor[] plan, Tensor? alibi_slopes, Tensor? sinks, float[] score, int[] window) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
    // layout: BlockLayout.tensors, order, and for the backward pass the transposed lists. blocks: block_q,
    // block_k, pattern heads; for the mass block_q, block_k, blocks of queries, most blocks of keys of a
    // sequence.
    m.def(
        "block_sparse_fwd(Tensor q, Tensor k, Tensor v, Tensor[] layout, int[] blocks, float[] score, "
        "int[] window) -> (Tensor out, Tensor lse)");
    m.def(
        "block_sparse_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor[] layout, int[] blocks, float[] score, int[] window) -> (Tensor dq, Tensor dk, Tensor dv)");
    m.def(
        "block_mass(Tensor q, Tensor k, Tensor lse, Tensor[] plan, int[] blocks, float[] score, int[] "
        "window) "
        "-> Tensor mass");
    m.def(
        "attention_mass_fwd(Tensor q, Tensor k, Tensor v, Tensor[] plan, int[] blocks, float[] score, "
        "int[] window) -> (Tensor out, Tensor lse, Tensor mass)");
    // Expert ids: -1 is none. num_valid, int32 [1], counts the rows that are there.
    m.def("reroute(Tensor topk_ids, Tensor adapter_ids, Tensor expert_map, Tensor? num_valid) -> Tensor");
    m.def(
        "expert_align(Tensor ids, int num_experts, int block_size, Tensor? num_valid) "
        "-> (Tensor sorted_ids, Tensor expert_ids, Tensor offsets, Tensor counts, Tensor inverse)");
    m.def(
        "expert_reroute_align(Tensor topk_ids, Tensor adapter_ids, Tensor expert_map, int num_experts, "
        "int block_size, Tensor? num_valid) -> (Tensor ids, Tensor logical_counts, Tensor sorted_ids, "
        "Tensor expert_ids, Tensor offsets, Tensor counts, Tensor inverse)");
    // Rows of pairs: sorted_ids, inverse as expert_align gives them.
    m.def("expert_gather(Tensor x, Tensor? weights, Tensor sorted_ids, int top_k) -> Tensor");
    m.def("expert_combine(Tensor rows, Tensor? weights, Tensor inverse) -> Tensor");
    m.def("expert_dot(Tensor rows, Tensor x, Tensor inverse) -> Tensor");
    // offs: int32 [experts], where the rows of each end.
    m.def("expert_grouped_mm(Tensor a, Tensor b, Tensor offs) -> Tensor");
    m.def("expert_grouped_outer(Tensor a, Tensor b, Tensor offs) -> Tensor");
    // dispatch: what expert_align gives. shape: block_size, interleaved. limits: alpha, limit of swiglu_oai.
    // wanted: first, count: the experts whose weights want a gradient.
    m.def(
        "fused_experts_fwd(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor? b_gate_up, Tensor? b_down, "
        "Tensor topk_weights, Tensor? identity_weights, Tensor[] dispatch, str activation, int[] shape, "
        "float[] limits, bool save) -> (Tensor out, Tensor saved)");
    m.def(
        "fused_experts_bwd(Tensor dout, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor? b_down, Tensor "
        "topk_weights, Tensor saved, Tensor[] dispatch, str activation, int[] shape, float[] limits, "
        "int[] wanted) -> (Tensor dx, Tensor dtopk_weights, Tensor dw_gate_up, Tensor dw_down, "
        "Tensor db_gate_up, Tensor db_down)");
    // Logits of classes [first, first + columns). sums, [4, tokens]: maximum, sum of exp(logit - maximum),
    // the target's logit, sum of all logits (if total). factors, [4, tokens]: LSE, and what the softmax, the
    // target and every class are multiplied by. A target below 0 leaves its row out.
    m.def(
        "cross_entropy_sums(Tensor logits, Tensor? bias, Tensor targets, Tensor sums, int first, float "
        "softcap, bool total) -> Tensor");
    m.def(
        "cross_entropy_gradient(Tensor logits, Tensor? bias, Tensor targets, Tensor factors, int first, "
        "float softcap, Tensor(a!) out, Tensor(b!)? sideways) -> ()");
    m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gapless, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
