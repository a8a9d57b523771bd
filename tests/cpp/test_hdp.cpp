// SPDX-License-Identifier: Apache-2.0
// Balanced hybrid data parallelism, with neither Python nor torch.
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "csrc/plan/hdp.h"

using namespace gapless::plan;

namespace {

// Attention costs the square of a length, everything else nothing; nothing is offloaded.
struct Problem {
    std::vector<int64_t> lengths, capacity, stages;
    std::vector<double> attention, linear, resident, throughput;
    HdpRanks ranks;

    Problem(std::vector<int64_t> sizes, std::vector<int64_t> capacities)
        : lengths(std::move(sizes)), capacity(std::move(capacities)) {
        for (const int64_t n : lengths) attention.push_back(static_cast<double>(n * n));
        linear.assign(lengths.size(), 0);
        resident.assign(lengths.size(), 1);
        throughput.assign(capacity.size(), 1);
        stages.assign(capacity.size(), 1);
        ranks.ranks_per_node = 4;
    }

    HdpPlan plan(HdpTargets targets) {
        ranks.capacity = capacity;
        ranks.throughput = throughput;
        ranks.stages = stages;
        return hdp_plan({lengths, attention, linear, resident}, ranks, targets);
    }
};

std::vector<int64_t> ring(const HdpPlan& plan, size_t sequence) {
    const size_t p = static_cast<size_t>(plan.pack_of[sequence]);
    return {plan.ring_ranks.begin() + plan.rank_offsets[p],
            plan.ring_ranks.begin() + plan.rank_offsets[p + 1]};
}

void sizes_follow_the_target() {
    // 100^2 seconds on 8 ranks: 1250 each.
    Problem problem({100, 20, 20, 20, 20}, std::vector<int64_t>(10, 1000));
    const HdpPlan plan = problem.plan({1250, 1250});
    CHECK(ring(plan, 0).size() == 8);
    CHECK(ring(plan, 1).size() == 1);
    CHECK(plan.finish == 1250);
    CHECK(plan.makespan == plan.finish);
}

void capacity_is_kept() {
    Problem problem({100, 30, 30}, std::vector<int64_t>(4, 40));
    const HdpPlan plan = problem.plan({1e9, 1e9});
    CHECK(ring(plan, 0).size() >= 3);
    CHECK(plan.pack_of[1] != plan.pack_of[2]);  // 60 tokens are too many for one micro-batch
}

void small_ranks_are_left_out() {
    Problem problem({90}, {10, 50, 10, 50, 10});
    const HdpPlan plan = problem.plan({1e9, 1e9});
    CHECK((ring(plan, 0) == std::vector<int64_t>{1, 3}));
}

void steps_of_a_rank_differ() {
    Problem problem({100, 100, 100, 7, 7, 7}, std::vector<int64_t>(3, 50));
    const HdpPlan plan = problem.plan({1, 1});  // nothing can meet it
    std::vector<std::vector<bool>> taken(3, std::vector<bool>(plan.steps.size(), false));
    for (size_t p = 0; p < plan.steps.size(); ++p)
        for (int64_t k = plan.rank_offsets[p]; k < plan.rank_offsets[p + 1]; ++k) {
            auto step = taken[plan.ring_ranks[k]][plan.steps[p]];
            CHECK(!step);
            step = true;
        }
}

void pipelines_drain() {
    Problem problem({10, 10}, {100});
    problem.stages = {4};
    problem.ranks.overhead = 0;
    const HdpPlan plan = problem.plan({1e9, 150});  // two micro-batches of 100 seconds
    CHECK(plan.finish == 200);
    CHECK(plan.makespan == 200 + 3 * 100);
}

void whole_nodes_spare_the_network() {
    // 120^2 seconds of attention; handing all tokens on once takes none in a node, 3600 seconds between
    // nodes.
    const auto plan = [](bool two_level, int64_t ranks) {
        Problem problem({120}, std::vector<int64_t>(ranks, 15));
        problem.ranks.network_token = 30;
        problem.ranks.two_level = two_level;
        return problem.plan({1300, 1300});
    };
    // Twelve ranks bring attention to 1200 seconds. Eleven hops between nodes take 3300; of two levels, two
    // take 600.
    const HdpPlan two = plan(true, 12);
    CHECK(ring(two, 0).size() == 12 && two.finish == 1200);
    CHECK(plan(false, 12).finish > 3000);
    CHECK(plan(true, 11).finish == 1800);  // the third node is not whole: two nodes of four
    CHECK(ring(plan(true, 11), 0).size() == 8);
}

void edges() {
    CHECK(Problem({}, {5}).plan({1, 1}).steps.empty());
    const HdpPlan empty = Problem({0, 0}, {5, 5}).plan({1, 1});
    CHECK(empty.steps.size() == 1 && empty.ring_ranks == std::vector<int64_t>{0});
    std::string message;
    try {
        Problem({3, 11}, {5, 5}).plan({1, 1});
    } catch (const std::invalid_argument& e) {
        message = e.what();
    }
    CHECK(message == "lengths[1] is 11: no ring of these ranks holds it");
    const double infinity = std::numeric_limits<double>::infinity();
    CHECK(Problem({3, 4, 5}, {9, 9}).plan({infinity, infinity}).finish == 25);
}

}  // namespace

int main() {
    sizes_follow_the_target();
    capacity_is_kept();
    small_ranks_are_left_out();
    steps_of_a_rank_differ();
    pipelines_drain();
    whole_nodes_spare_the_network();
    edges();
    return result();
}
