// SPDX-License-Identifier: Apache-2.0
// The keys that a block of rows meets, a tile at a time: all those of a range, or the listed blocks of it.
#pragma once

#include "csrc/cpu/visibility.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

/// Up to kKeys keys, whose scores are in flight at once. Each run begins at a multiple of kAlign in the
/// scores and among the packed keys.
template <int64_t kKeys, int64_t kAlign>
struct KeyTile {
    static constexpr int kMostRuns = kKeys / 16;
    KeyRun runs[kMostRuns];
    int count = 0;

    int64_t keys() const {
        int64_t sum = 0;
        for (int i = 0; i < count; ++i) sum += runs[i].end - runs[i].begin;
        return sum;
    }
};

/// The blocks of a row that lie in a range of keys, in whole or in part.
struct ListedBlocks {
    const int32_t *next = nullptr, *end = nullptr;                  // seen in whole
    const int32_t *partial_next = nullptr, *partial_end = nullptr;  // seen in part
    const int32_t* pattern = nullptr;                               // of partial_next

    ListedBlocks() = default;
    ListedBlocks(const BlockLists& lists, int64_t row, int64_t begin, int64_t end_key) {
        const auto between = [&](const int32_t* ids, const int32_t* offsets, const int32_t** from,
                                 const int32_t** to) {
            *from = first_from(ids + offsets[row], ids + offsets[row + 1], begin / lists.block_k);
            *to = first_from(*from, ids + offsets[row + 1], round_up(end_key, lists.block_k) / lists.block_k);
        };
        between(lists.ids, lists.offsets, &next, &end);
        between(lists.partial, lists.partial_offsets, &partial_next, &partial_end);
        pattern = lists.partial_patterns + (partial_next - lists.partial);
    }
    bool any() const { return next < end || partial_next < partial_end; }
    /// The lowest one left.
    int32_t take() {
        if (partial_next == partial_end || (next < end && *next < *partial_next)) return *next++;
        ++pattern;
        return *partial_next++;
    }

    /// The first entry of an ascending list that is not below `id`.
    static const int32_t* first_from(const int32_t* begin, const int32_t* end, int64_t id) {
        while (begin < end) {
            const int32_t* middle = begin + (end - begin) / 2;
            if (*middle < id)
                begin = middle + 1;
            else
                end = middle;
        }
        return begin;
    }
};

class KeyWalk {
  public:
    /// Keys [begin, end), packed at their own number; no run crosses a multiple of `cut`.
    KeyWalk(int64_t begin, int64_t end, int64_t cut)
        : begin_(begin), end_(end), cut_(cut), run_{begin, end, 0, begin, nullptr} {}

    /// Those of the blocks that a row of the lists has, each packed at a multiple of `align`.
    KeyWalk(const BlockLists& lists, int64_t row, int64_t align, int64_t begin, int64_t end)
        : begin_(begin),
          end_(end),
          cut_(INT64_MAX),
          lists_(&lists),
          pitch_(round_up(lists.block_k, align)),
          blocks_(lists, row, begin, most(begin, end)) {}

    /// False if there are none left.
    template <int64_t kKeys, int64_t kAlign>
    bool next(KeyTile<kKeys, kAlign>& tile) {
        tile.count = 0;
        for (int64_t at = 0; tile.count < tile.kMostRuns && at < kKeys; at = round_up(at, kAlign)) {
            if (run_.begin >= run_.end && !refill()) break;
            KeyRun& run = tile.runs[tile.count++];
            run = run_;
            run.at = at;
            run.end = least(run.end, least(run.begin + kKeys - at, (run.begin / cut_ + 1) * cut_));
            at += run.end - run.begin;
            run_ = run_.from(run.end, lists_ ? lists_->words : 0);
        }
        return tile.count > 0;
    }

  private:
    int64_t begin_, end_, cut_;
    const BlockLists* lists_ = nullptr;
    int64_t pitch_ = 0;
    ListedBlocks blocks_{};
    KeyRun run_{};  // what is left of the last one

    bool refill() {
        if (!lists_) return false;
        const int64_t size = lists_->block_k;
        int64_t first, count = 1;
        const uint32_t* bits = nullptr;
        if (blocks_.next < blocks_.end) {
            first = *blocks_.next++;
            // Neighbours are one run, if they are neighbours among the packed keys.
            while (pitch_ == size && blocks_.next < blocks_.end && *blocks_.next == first + count)
                ++blocks_.next, ++count;
        } else if (blocks_.partial_next < blocks_.partial_end) {
            first = *blocks_.partial_next++;
            bits = lists_->patterns + *blocks_.pattern++ * size * lists_->words;
        } else {
            return false;
        }
        run_ = {first * size, least((first + count) * size, end_), 0, first * pitch_, bits};
        if (run_.begin < begin_) run_ = run_.from(begin_, lists_->words);
        return true;
    }
};

}  // namespace
}  // namespace gapless::cpu::GAPLESS_ISA
