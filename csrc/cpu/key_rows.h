// SPDX-License-Identifier: Apache-2.0
// Where the keys and values of one sequence lie, packed or in pages.
#pragma once

#include "csrc/cpu/panels.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

template <class E>
class KeyRows {
  public:
    KeyRows(const VarlenParams& p, int64_t sequence)
        : sequence(sequence),
          length(p.seqused_k ? p.seqused_k[sequence]
                             : p.cu_seqlens_k[sequence + 1] - p.cu_seqlens_k[sequence]),
          p_(p),
          first_(p.cu_seqlens_k[sequence]),
          pages_(p.block_table ? p.block_table + sequence * p.max_pages : nullptr) {}

    const E* key(int64_t kv_head, int64_t at) const { return row(p_.k, p_.k_page_stride, kv_head, at); }
    const E* value(int64_t kv_head, int64_t at) const { return row(p_.v, p_.v_page_stride, kv_head, at); }

    const int64_t sequence, length;

  private:
    const VarlenParams& p_;
    const int64_t first_;
    const int32_t* const pages_;

    const E* row(const Packed& x, int64_t page_stride, int64_t kv_head, int64_t at) const {
        const E* base = static_cast<const E*>(x.data) + kv_head * x.head_stride;
        if (!pages_) return base + (first_ + at) * x.token_stride;
        return base + pages_[at / p_.page_size] * page_stride + at % p_.page_size * x.token_stride;
    }
};

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
