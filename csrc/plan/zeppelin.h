// SPDX-License-Identifier: Apache-2.0
// Which ranks compute which sequences in which micro-step: nodes first, then ranks inside a node (Zeppelin).
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace gapless::plan {

/// Ranks and how long things take on them. Seconds are of all layers, forward and backward.
struct ZoneRanks {
    std::span<const int64_t> capacity;  // tokens that each rank may hold in a step
    std::span<const double> speed;      // of each rank
    int64_t ranks_per_node = 1;
    double token = 0;  // seconds of linear modules for a token, if they are balanced together with attention
    double near = 0;   // seconds in which a token's keys and values pass a link inside a node
    double far = 0;    // and between nodes
    double outer = 0;  // the same where all ranks of a node send at once
    double hop = 0;    // of latency, for each hop of a ring
    double overhead = 0;       // of each micro-batch
    bool whole_nodes = false;  // rings over several nodes take all ranks of each, and are of two levels
};

/// What to aim at.
struct ZoneGoal {
    double piece =
        std::numeric_limits<double>::infinity();  // sequences are shared until shares are that small
    double level =
        std::numeric_limits<double>::infinity();  // whatever would end later waits for another step
    double fullness = 0;     // > 0: a rank without room counts as if it had so many seconds of load
    int64_t most_steps = 0;  // what finds no place in them is left over; 0: as many as it takes
};

/// Sequence i is in step[i] (-1: left over) on ranks[offsets[i] .. offsets[i + 1]], ascending.
struct ZonePlan {
    std::vector<int64_t> step, offsets, ranks;
    std::vector<double> end;  // seconds until each rank is done
};

/// Most ranks over which a ring's transfers hide behind attention; at least 1.
/// `attention` and `transfer`: seconds of a whole sequence on one rank, and to hand on its keys and values
/// once.
int64_t hidden_ranks(double attention, double transfer, double hop, int64_t most);

/// Fills step after step with the sequences in the order in which they are listed (longest first). A sequence
/// is shared by as many ranks as bring its share to `piece` seconds while its transfers stay hidden: ranks of
/// a node, and of several nodes only if more are needed; by more if its tokens have no room otherwise. It
/// goes where the load of all steps so far is least. Ranks that rings of a step connect begin and end that
/// step together.
ZonePlan zone_plan(std::span<const int64_t> lengths, std::span<const double> attention,
                   const ZoneRanks& ranks, const ZoneGoal& goal);

}  // namespace gapless::plan
