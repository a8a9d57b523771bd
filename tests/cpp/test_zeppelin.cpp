// SPDX-License-Identifier: Apache-2.0
// Zones and rings: limits, coverage, levels, and what each refuses.
#include <algorithm>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "csrc/plan/zeppelin.h"

using namespace gapless::plan;

namespace {

struct Cluster {
    std::vector<int64_t> capacity;
    std::vector<double> speed;
    ZoneRanks ranks;

    Cluster(size_t count, int64_t room, int64_t per_node) : capacity(count, room), speed(count, 1.0) {
        ranks = {capacity, speed, per_node, 1e-7, 1e-8, 1e-6, 1e-9, 0};
    }
};

std::vector<double> squares(const std::vector<int64_t>& lengths) {
    std::vector<double> seconds;
    for (const int64_t n : lengths) seconds.push_back(static_cast<double>(n) * static_cast<double>(n) * 1e-9);
    return seconds;
}

/// Every sequence once, rings ascending, no rank above its capacity in any step.
void check_plan(const ZonePlan& plan, const std::vector<int64_t>& lengths, const Cluster& cluster) {
    CHECK(plan.step.size() == lengths.size());
    CHECK(plan.offsets.size() == lengths.size() + 1);
    const int64_t steps = lengths.empty() ? 0 : *std::max_element(plan.step.begin(), plan.step.end()) + 1;
    std::vector<int64_t> held(static_cast<size_t>(steps) * cluster.capacity.size());
    bool ascending = true, fits = true;
    for (size_t i = 0; i < lengths.size(); ++i) {
        const int64_t begin = plan.offsets[i], end = plan.offsets[i + 1], count = end - begin;
        CHECK((count > 0) == (plan.step[i] >= 0));
        for (int64_t k = begin; k < end; ++k) {
            ascending &= k == begin || plan.ranks[k - 1] < plan.ranks[k];
            held[plan.step[i] * cluster.capacity.size() + plan.ranks[k]] += (lengths[i] + count - 1) / count;
        }
    }
    for (size_t i = 0; i < held.size(); ++i) fits &= held[i] <= cluster.capacity[i % cluster.capacity.size()];
    CHECK(ascending);
    CHECK(fits);
}

void test_hidden_ranks() {
    for (const double attention : {0.0, 1.0, 7.5, 1e6})
        for (const double transfer : {0.0, 0.25, 1.0, 3.0})
            for (const double hop : {0.0, 0.01}) {
                int64_t most = 1;
                for (int64_t n = 2; n <= 50; ++n) {
                    const auto ranks = static_cast<double>(n);
                    if ((ranks - 1) * (transfer / ranks + hop) <= attention / ranks) most = n;
                }
                CHECK(hidden_ranks(attention, transfer, hop, 50) == most);
            }
    CHECK(hidden_ranks(1, 1, 0, 1) == 1);
}

void test_plans() {
    std::mt19937 random(1);
    for (int round = 0; round < 60; ++round) {
        const size_t count = 1 + random() % 20;
        Cluster cluster(count, 200 + random() % 800, 1 + random() % 5);
        std::vector<int64_t> lengths;
        for (int i = random() % 80; i > 0; --i)
            lengths.push_back(1 +
                              random() % (i % 7 ? 300 : cluster.capacity[0] * static_cast<int64_t>(count)));
        std::sort(lengths.rbegin(), lengths.rend());
        for (const double piece : {1e-5, 1e-3, 1e9})
            for (const double level : {1e-5, 1e-3, 1e9})
                for (const double fullness : {0.0, 1e-3}) {
                    const auto plan =
                        zone_plan(lengths, squares(lengths), cluster.ranks, {piece, level, fullness, 0});
                    check_plan(plan, lengths, cluster);
                    CHECK(std::find(plan.step.begin(), plan.step.end(), -1) == plan.step.end());
                }
    }
}

void test_a_long_sequence_is_shared_and_the_rest_is_left_over() {
    Cluster cluster(6, 100, 3);
    const std::vector<int64_t> lengths{590, 50};
    const auto one = zone_plan(lengths, squares(lengths), cluster.ranks, {1e9, 1e9, 0, 1});
    CHECK(one.offsets[1] == 6 && one.step[0] == 0 && one.step[1] == -1);
    const auto all = zone_plan(lengths, squares(lengths), cluster.ranks, {});
    CHECK(all.step[1] == 1);
    check_plan(all, lengths, cluster);
    const std::vector<int64_t> giant{601};
    CHECK(zone_plan(giant, squares(giant), cluster.ranks, {}).step[0] == -1);
    CHECK(zone_plan({}, {}, cluster.ranks, {}).end.size() == 6);
}

void test_what_is_refused() {
    Cluster cluster(2, 100, 2);
    const std::vector<double> seconds{1.0};
    const auto refuses = [](auto&& call) {
        try {
            call();
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    const std::vector<int64_t> one{5}, none{0}, two{5, 5};
    CHECK(refuses([&] { zone_plan(two, seconds, cluster.ranks, {}); }));
    CHECK(refuses([&] { zone_plan(none, seconds, cluster.ranks, {}); }));
    CHECK(refuses([&] { zone_plan(one, seconds, ZoneRanks{}, {}); }));
    cluster.capacity[1] = 0;
    CHECK(refuses([&] { zone_plan(one, seconds, cluster.ranks, {}); }));
}

}  // namespace

int main() {
    test_hidden_ranks();
    test_plans();
    test_a_long_sequence_is_shared_and_the_rest_is_left_over();
    test_what_is_refused();
    return result();
}
