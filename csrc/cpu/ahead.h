// SPDX-License-Identifier: Apache-2.0
// Cache lines that will be needed soon, asked for one by one from inside the matrix multiplications, which
// leave memory idle. Rows of one head lie too far apart for the hardware to foresee them, and all at once
// they would stall the loads that are needed now.
#pragma once

#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

class Ahead {
  public:
    static constexpr int64_t kMostAtOnce = 256;

    void carve(Carver& c, int64_t lines) {
        room_ = lines;
        lines_ = c.take<const char*>(lines + kMostAtOnce);
    }
    /// Lines that a row of so many bytes can touch.
    static int64_t lines_of(int64_t bytes) { return bytes / kLine + 2; }

    void clear() { next_ = end_ = pace_ = 0; }
    /// So many steps are left for the lines on the list: one is touched every 2^pace steps, as too many at
    /// once would hold up other loads.
    void spread(int64_t steps) {
        for (pace_ = 0; pace_ < kMostPace && (end_ - next_) << (pace_ + 1) <= steps;) ++pace_;
    }
    /// What the list has no room for is left to the loads themselves.
    void add(const void* row, int64_t bytes) {
        const char* first = static_cast<const char*>(row) - reinterpret_cast<uintptr_t>(row) % kLine;
        int64_t lines = (static_cast<const char*>(row) + bytes - first + kLine - 1) / kLine;
        if (lines > room_ - end_) lines = room_ - end_;
        for (int64_t i = 0; i < lines; ++i) lines_[end_ + i] = first + i * kLine;
        end_ += lines;
    }
    /// The next lines for so many steps (the last one again, if fewer are left), or null if none are.
    GAPLESS_INLINE const char* const* take(int64_t steps) {
        if (next_ == end_) return nullptr;
        const int64_t count = (steps + (int64_t{1} << pace_) - 1) >> pace_;
        const char* const* taken = lines_ + next_;
        for (int64_t i = end_; i < next_ + count; ++i) lines_[i] = lines_[end_ - 1];
        next_ = next_ + count < end_ ? next_ + count : end_;
        return taken;
    }
    GAPLESS_INLINE void touch_at(const char* const* taken, int64_t step) const {
        if ((step & ((int64_t{1} << pace_) - 1)) == 0) touch(taken[step >> pace_]);
    }
    /// Those of so many steps at once.
    GAPLESS_INLINE void touch_next(int64_t steps) {
        if (const char* const* taken = take(steps))
            for (int64_t i = 0; i < steps; i += int64_t{1} << pace_) touch(taken[i >> pace_]);
    }
    /// All of them at once.
    void rush() {
        for (; next_ < end_; ++next_) touch(lines_[next_]);
    }
    static GAPLESS_INLINE void touch(const char* line) { __builtin_prefetch(line, 0, 2); }

  private:
    static constexpr int64_t kLine = 64;
    static constexpr int kMostPace = 2;
    const char** lines_;
    int64_t next_ = 0, end_ = 0, room_ = 0;
    int pace_ = 0;
};

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
