// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/scratch.h"

#include <new>

namespace gapless::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    ~Block() { release(); }
    void release() {
        ::operator delete(data, kAlignment);
        data = nullptr;
        bytes = 0;
    }
};

}  // namespace

void* scratch(size_t bytes) {
    thread_local Block block;
    if (block.bytes < bytes) {
        block.release();
        block.data = ::operator new(bytes, kAlignment);
        block.bytes = bytes;
    }
    return block.data;
}

}  // namespace gapless::cpu
