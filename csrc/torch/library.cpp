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
    // plan: cu_seqlens_q, cu_seqlens_k, query_tiles, key_tiles. score: scale, softcap. window: left, right.
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
    m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gapless, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
