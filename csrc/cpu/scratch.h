// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace gapless::cpu {

/// This thread's work memory, at least `bytes` of it, aligned to a cache line and kept between calls. The
/// next call on the same thread may move it. Throws std::bad_alloc.
void* scratch(size_t bytes);

/// Hands out pieces of one block of scratch memory; the first round, over null, only adds up the sizes.
class Carver {
  public:
    // Always inlined: kernels built for one ISA include this, and their copies must not stand in for
    // another's.
    __attribute__((always_inline)) explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    __attribute__((always_inline)) T* take(int64_t count) {
        char* piece = base_ + used_;
        used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(piece);
    }
    __attribute__((always_inline)) size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

/// Lets carve(Carver&) take its pieces of this thread's scratch memory.
template <class Carve>
__attribute__((always_inline)) inline void carve_scratch(const Carve& carve) {
    Carver sizes(nullptr);
    carve(sizes);
    Carver memory(scratch(sizes.used()));
    carve(memory);
}

}  // namespace gapless::cpu
