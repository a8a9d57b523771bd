// SPDX-License-Identifier: Apache-2.0
// Balanced hybrid data parallelism: rings of any size on a time-line of ranks, against a target for the last
// rank.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace gapless::plan {

/// The sequences of a batch; seconds are of forward and backward, all layers, on one rank of throughput 1.
struct HdpSequences {
    std::span<const int64_t> lengths;
    std::span<const double> attention;  ///< seconds of attention
    std::span<const double> linear;     ///< seconds of everything else
    std::span<const double> resident;   ///< least share of the activations that stays on the device
};

/// Ranks, numbered node by node, and what they share with each other.
struct HdpRanks {
    std::span<const int64_t> capacity;   ///< tokens whose activations a rank holds
    std::span<const double> throughput;  ///< of a rank with all its pipeline stages busy
    std::span<const int64_t> stages;     ///< pipeline stages of a rank
    int64_t ranks_per_node = 1;
    double overhead = 0;       ///< seconds of a micro-batch whatever is in it
    double node_token = 0;     ///< seconds in which one token is handed on inside a node, there and back
    double network_token = 0;  ///< the same between nodes
    int64_t sharing = 1;       ///< ranks of a node that send over one network card
    double hop = 0;            ///< seconds of the messages of one hop
    bool two_level =
        false;  ///< rings even over nodes: around each node, and from every rank to the next node
};

/// What a plan aims at, in seconds.
struct HdpTargets {
    double finish = 0;   ///< of the last rank, without the filling and draining of its pipeline
    double longest = 0;  ///< of one micro-batch
};

struct HdpPlan {
    std::vector<int64_t> pack_of;       ///< the pack of each sequence
    std::vector<int64_t> rank_offsets;  ///< where the ring of each pack begins in ring_ranks, and the end
    std::vector<int64_t> ring_ranks;
    std::vector<int64_t> steps;  ///< the micro-step of each pack
    double finish = 0;           ///< seconds until the last rank is done, with pipelines kept full
    double makespan = 0;         ///< seconds until the last rank is done, the filling of pipelines included
};

/// Longest first, each sequence gets the ring that wastes least of what the targets allow: no fewer ranks
/// than hold it, as many as keep it within the target, inside a node where links are slow, whole nodes where
/// that is faster, on ranks that are free at about the same time. Sequences of one rank fill the rest in
/// packs. Where nothing is within the targets, the ring that ends first. Takes the same decisions for equal
/// lengths in any order. Throws std::invalid_argument on sizes that do not match and on a sequence that no
/// ring holds.
HdpPlan hdp_plan(const HdpSequences& sequences, const HdpRanks& ranks, const HdpTargets& targets);

}  // namespace gapless::plan
