// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace gapless::cpu {

/// Memory for a large result, on huge pages where the system has them; give_back() frees it. Freed blocks are
/// kept, up to GAPLESS_KEEP_MIB MiB of them (default 512; 0 keeps none), for the next results of about their
/// size: on short sequences, the kernel's clearing of fresh pages costs more than attention does. Both may be
/// called from any thread. Throws std::bad_alloc.
void* take(size_t bytes);
void give_back(void* data) noexcept;

/// Results from this size on are worth it; the system's allocator recycles smaller ones by itself.
constexpr size_t kRecycled = size_t{1} << 21;

}  // namespace gapless::cpu
