// SPDX-License-Identifier: Apache-2.0
// Keys and values of a whole sequence in the products' layout, once for all the blocks of queries that will
// read some of them.
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/key_rows.h"
#include "csrc/cpu/products.h"

namespace gapless::cpu::GAPLESS_ISA {

PackedSize packed_size(const VarlenParams& p, int64_t keys) {
    PackedSize size{};
    by_products(p.dtype, [&]<class E, class Products>() {
        const int64_t block = p.blocks ? p.blocks->block_k : 1, pitch = round_up(block, Products::kKeyAlign),
                      rows = p.blocks ? (keys + block - 1) / block * pitch : keys;
        size = {Products::key_bytes(p, rows), Products::value_bytes(p, rows)};
    });
    return size;
}

void pack_keys(const VarlenParams& p, const PackItem& item) {
    by_products(p.dtype, [&]<class E, class Products>() {
        constexpr int64_t kMost = 64;
        const KeyRows<E> keys(p, item.sequence);
        const int64_t block = p.blocks ? p.blocks->block_k : kMost,
                      pitch = round_up(block, Products::kKeyAlign);
        const int64_t most = pitch == block ? kMost : block;
        const E *key_rows[kMost], *value_rows[kMost];
        for (int64_t from = item.begin; from < item.end; from += most) {
            const int64_t count = least(most, item.end - from);
            for (int64_t i = 0; i < count; ++i)
                key_rows[i] = keys.key(item.kv_head, from + i),
                value_rows[i] = keys.value(item.kv_head, from + i);
            Products::pack_keys(p, key_rows, value_rows, count, item.to, from / block * pitch + from % block);
        }
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
