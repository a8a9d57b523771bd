// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace gapless::cpu {

/// Asks for huge pages behind memory that was just allocated and is about to be written: on a fresh output, a
/// page fault per 4 KiB costs more than the writes.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace gapless::cpu
