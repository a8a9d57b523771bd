// SPDX-License-Identifier: Apache-2.0
// Softmax weights added up by blocks of keys, for the rows of one item: AdaSpa's second pass
// (arXiv:2502.21079, Eq. 13), which needs no pass of its own where the first one keeps these sums.
#pragma once

#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/visibility.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

template <class T>
class BlockSums {
  public:
    void carve(Carver& c, const BlockMass& mass, int64_t keys, int64_t rows) {
        rows_ = rows, size_ = mass.block_k, blocks_ = (keys + size_ - 1) / size_;
        sums_ = c.take<T>(blocks_ * rows), tops_ = c.take<T>(blocks_ * rows);
    }
    void clear() {
        for (int64_t i = 0; i < blocks_ * rows_; ++i) sums_[i] = 0, tops_[i] = -kInfinity<T>;
    }
    /// Adds exponentials of one block's keys from which `top` was taken, which never decreases.
    GAPLESS_INLINE void add(int64_t key, int64_t row, Vec<T> exponentials, Vec<T> top) {
        T* sum = sums_ + key / size_ * rows_ + row;
        T* old = tops_ + key / size_ * rows_ + row;
        // A row that has seen nothing yet has no top.
        const IVec<T> nothing = exponentials == Vec<T>{};
        store(sum, nothing ? load(sum) : load(sum) * vexp(load(old) - top) + exponentials);
        store(old, nothing ? load(old) : top);
    }
    /// Rows [at, at + rows) of the item, the first of which is query `query` of its sequence: their sums,
    /// brought to `top` and times `factor`, into the mass of `head`.
    void write(const BlockMass& mass, int64_t sequence, int64_t head, int64_t query, int64_t rows, int64_t at,
               const T* top, const T* factor) const {
        constexpr int w = kLanes<T>;
        for (int64_t i = 0; i < rows; i += w) {
            T* to = static_cast<T*>(mass.data) +
                    (head * mass.q_blocks + mass.first_row[sequence] + (query + i) / mass.block_q) *
                        mass.k_blocks;
            const Vec<T> base = load(top + at + i), scale = load(factor + i);
            for (int64_t block = 0; block < blocks_; ++block) {
                const int64_t cell = block * rows_ + at + i;
                const Vec<T> x = load(sums_ + cell);
                const Vec<T> share = x == Vec<T>{} ? Vec<T>{} : x * vexp(load(tops_ + cell) - base) * scale;
                T total = 0;
                for (int64_t l = 0; l < least(w, rows - i); ++l) total += share[l];
                to[block] += total;
            }
        }
    }

  private:
    int64_t rows_, size_, blocks_;
    T *sums_, *tops_;  // [blocks][rows]
};

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
