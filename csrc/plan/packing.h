// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace gapless::plan {

/// What can be put where. Item i costs costs[i] and has sizes[i] tokens; bin b takes `speeds[b]` cost a
/// second.
struct PackingProblem {
    std::span<const double> costs;     ///< at least 0, finite
    std::span<const int64_t> sizes;    ///< at least 0
    std::span<const double> speeds;    ///< one for each bin, above 0
    std::span<const int64_t> longest;  ///< one for each bin: most tokens of any one of its items
    int64_t capacity = std::numeric_limits<int64_t>::max();    ///< most tokens of all items of a bin
    int64_t most_items = std::numeric_limits<int64_t>::max();  ///< most items of a bin
};

/// Throws std::invalid_argument, naming the array, unless items and bins have all they need, in range.
void check(const PackingProblem& problem);

/// A bin for each item, -1 for those that fit into none. Items are taken in descending order of cost, then
/// size, then number, so that the result depends on the order of the input only in which of equal items goes
/// where.
using Assignment = std::vector<int64_t>;

/// Best-fit decreasing: into the fullest bin that has room, else a new one. Bins count from 0. O(n log n).
/// Throws std::invalid_argument if an item is larger than the capacity.
Assignment best_fit_decreasing(std::span<const int64_t> sizes, int64_t capacity);

/// LPT: each item to the bin that would finish it first, of those that have room. O(n log bins) for equal
/// speeds.
Assignment longest_first(const PackingProblem& problem);

/// Largest differencing (Karmarkar and Karp, 1982) over `bins` equal bins. `equal_size`: numbers of items
/// differ by one at most.
Assignment karmarkar_karp(std::span<const double> costs, int64_t bins, bool equal_size);

/// First-fit decreasing under the smallest time that a bisection finds to do (Coffman, Garey and Johnson,
/// 1978), from `seconds` down; -1 everywhere if it never does.
Assignment multifit(const PackingProblem& problem, double seconds);

/// Moves items and swaps pairs between the bin that takes longest and others while that lowers the longest
/// time, for at most `effort` looks at an item and a bin. Never makes an assignment worse, and keeps to every
/// limit that it keeps to.
/// Throws std::invalid_argument unless every item is in a bin.
void refine(const PackingProblem& problem, Assignment& assignment, int64_t effort);

/// The best that comes of refining what each of the above gives within the limits; -1 everywhere if none
/// does.
Assignment pack(const PackingProblem& problem, int64_t effort);

}  // namespace gapless::plan
