// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/recycle.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gapless::cpu {
namespace {

constexpr std::align_val_t kHugePage{size_t{1} << 21};

size_t limit_from_environment() {
    constexpr size_t kDefault = 512;
    const char* text = std::getenv("GAPLESS_KEEP_MIB");
    if (!text || !*text) return kDefault << 20;
    char* end;
    const unsigned long long mib = std::strtoull(text, &end, 10);
    return (*end || *text == '-' || mib > SIZE_MAX >> 20 ? kDefault : size_t(mib)) << 20;
}

class Pool {
  public:
    void* take(size_t bytes) {
        bytes = (bytes + size_t(kHugePage) - 1) & ~(size_t(kHugePage) - 1);
        const std::lock_guard lock(mutex_);
        auto best = kept_.end();
        for (auto i = kept_.begin(); i != kept_.end(); ++i)
            if (i->bytes >= bytes && i->bytes <= bytes + bytes / 4 &&
                (best == kept_.end() || i->bytes <= best->bytes))
                best = i;
        if (best == kept_.end()) {
            void* data = ::operator new(bytes, kHugePage);
#if defined(__linux__)
            madvise(data, bytes, MADV_HUGEPAGE);
#endif
            in_use_[data] = bytes;
            return data;
        }
        const Block block = *best;
        kept_.erase(best);
        kept_bytes_ -= block.bytes;
        in_use_[block.data] = block.bytes;
        return block.data;
    }

    void give_back(void* data) {
        const std::lock_guard lock(mutex_);
        const auto found = in_use_.find(data);
        kept_.push_back({data, found->second});
        kept_bytes_ += found->second;
        in_use_.erase(found);
        while (kept_bytes_ > limit_) {  // the oldest go first
            kept_bytes_ -= kept_.front().bytes;
            ::operator delete(kept_.front().data, kHugePage);
            kept_.erase(kept_.begin());
        }
    }

  private:
    struct Block {
        void* data;
        size_t bytes;
    };
    const size_t limit_ = limit_from_environment();
    std::mutex mutex_;
    std::vector<Block> kept_;  // the oldest first
    size_t kept_bytes_ = 0;
    std::unordered_map<void*, size_t> in_use_;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
    static Pool* const all = new Pool;
    return *all;
}

}  // namespace

void* take(size_t bytes) { return pool().take(bytes); }
void give_back(void* data) noexcept { pool().give_back(data); }

}  // namespace gapless::cpu
