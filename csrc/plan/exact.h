// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace gapless::plan {

/// Packs of an optimal schedule, in an order in which each starts as soon as its ranks are free.
struct ExactSchedule {
    double makespan;              ///< of `packs`
    bool proven;                  ///< no schedule is shorter; else the search gave up
    std::vector<uint32_t> sets;   ///< bit i: the pack has sequence i
    std::vector<uint32_t> ranks;  ///< bit r: rank r is in its ring
};

/// The shortest schedule of up to 16 sequences on up to 4 equal ranks, where a pack of the set S on a ring of
/// N ranks takes `seconds[(N - 1) << sequences | S]`, infinite where it may not be run. Gives up where a set
/// of finished sequences would have more than `most_states` different loads of the ranks; the result is then
/// the best that a beam of that width found.
ExactSchedule exact_schedule(std::span<const double> seconds, int sequences, int ranks, int64_t most_states);

}  // namespace gapless::plan
