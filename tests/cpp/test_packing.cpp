// SPDX-License-Identifier: Apache-2.0
// Packing: bounds that theory gives, limits, and known examples.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "csrc/plan/packing.h"

using namespace gapless::plan;

namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

/// A problem with its arrays.
struct Items {
    std::vector<double> costs;
    std::vector<int64_t> sizes;
    std::vector<double> speeds;
    std::vector<int64_t> longest;
    int64_t capacity = kNoLimit, most_items = kNoLimit;

    Items(std::vector<double> c, size_t bins)
        : costs(std::move(c)), speeds(bins, 1.0), longest(bins, kNoLimit) {
        for (const double cost : costs) sizes.push_back(static_cast<int64_t>(cost));
    }

    PackingProblem problem() const { return {costs, sizes, speeds, longest, capacity, most_items}; }

    // Inlined, gcc 12 warns of freeing memory that was never allocated.
    [[gnu::noinline]] std::vector<double> loads(const Assignment& assignment) const {
        std::vector<double> sums(speeds.size(), 0.0);
        for (size_t i = 0; i < assignment.size(); ++i) {
            if (assignment[i] >= 0) sums[assignment[i]] += costs[i];
        }
        return sums;
    }

    double longest_time(const Assignment& assignment) const {
        const std::vector<double> sums = loads(assignment);
        double most = 0;
        for (size_t b = 0; b < sums.size(); ++b) most = std::max(most, sums[b] / speeds[b]);
        return most;
    }

    /// Every item in a bin, and every limit kept.
    [[gnu::noinline]] bool allowed(const Assignment& assignment) const {
        std::vector<int64_t> tokens(speeds.size(), 0), items(speeds.size(), 0);
        for (size_t i = 0; i < assignment.size(); ++i) {
            const int64_t b = assignment[i];
            if (b < 0 || b >= static_cast<int64_t>(speeds.size()) || sizes[i] > longest[b]) return false;
            tokens[b] += sizes[i];
            ++items[b];
        }
        return *std::max_element(tokens.begin(), tokens.end()) <= capacity &&
               *std::max_element(items.begin(), items.end()) <= most_items;
    }

    /// The best that any assignment reaches, by trying all.
    double optimum() const {
        std::vector<int64_t> choice(costs.size(), 0);
        double best = std::numeric_limits<double>::infinity();
        while (true) {
            if (allowed(choice)) best = std::min(best, longest_time(choice));
            size_t i = 0;
            while (i < choice.size() && ++choice[i] == static_cast<int64_t>(speeds.size())) choice[i++] = 0;
            if (i == choice.size()) return best;
        }
    }
};

template <class F>
std::string message(F&& f) {
    try {
        f();
    } catch (const std::invalid_argument& e) {
        return e.what();
    }
    return "";
}

void test_known_examples() {
    const Items items({8, 7, 6, 5, 4, 2, 2, 2}, 2);
    CHECK(items.longest_time(longest_first(items.problem())) == 19);
    CHECK(items.longest_time(karmarkar_karp(items.costs, 2, false)) == 18);
    Assignment refined = longest_first(items.problem());
    refine(items.problem(), refined, 1000);
    CHECK(items.longest_time(refined) == 18);
    // The textbook case of differencing: 8 7 6 5 4 leaves a difference of 2, where the best is 0.
    const Items textbook({8, 7, 6, 5, 4}, 2);
    CHECK(textbook.longest_time(karmarkar_karp(textbook.costs, 2, false)) == 16);
    // First-fit under 10 needs three bins for what best-fit decreasing gets into two.
    const std::vector<int64_t> sizes{4, 5, 6, 5};
    const Assignment bins = best_fit_decreasing(sizes, 10);
    CHECK(*std::max_element(bins.begin(), bins.end()) == 1);
    CHECK(bins[0] == bins[2] && bins[1] == bins[3]);
}

void test_bounds_against_the_optimum() {
    std::mt19937_64 random(1);
    for (int round = 0; round < 300; ++round) {
        const size_t bins = 2 + random() % 2, n = 1 + random() % 8;
        std::vector<double> costs(n);
        for (double& cost : costs) cost = static_cast<double>(random() % 30);
        const Items items(costs, bins);
        const double best = items.optimum(), m = static_cast<double>(bins);
        const Assignment lpt = longest_first(items.problem());
        CHECK(items.allowed(lpt));
        CHECK(items.longest_time(lpt) <= best * (4.0 / 3 - 1 / (3 * m)) + 1e-9);
        const double upper = 2 * std::max(items.longest_time(lpt), 1e-30);
        const Assignment fit = multifit(items.problem(), upper);
        CHECK(items.allowed(fit));
        CHECK(items.longest_time(fit) <= best * 13 / 11 + 1e-6);
        const Assignment differences = karmarkar_karp(items.costs, static_cast<int64_t>(bins), false);
        CHECK(items.allowed(differences));
        CHECK(items.longest_time(differences) >= best);
        const Assignment packed = pack(items.problem(), 1000);
        CHECK(items.allowed(packed));
        for (const Assignment& start : {lpt, fit, differences}) {
            CHECK(items.longest_time(packed) <= items.longest_time(start));
            Assignment better = start;
            refine(items.problem(), better, 1000);
            CHECK(items.allowed(better));
            CHECK(items.longest_time(better) <= items.longest_time(start));
            CHECK(items.longest_time(better) >= best);
        }
    }
}

void test_limits() {
    std::mt19937_64 random(2);
    for (int round = 0; round < 300; ++round) {
        const size_t bins = 1 + random() % 5, n = random() % 40;
        std::vector<double> costs(n);
        for (double& cost : costs) cost = static_cast<double>(random() % 50);
        Items items(costs, bins);
        for (size_t b = 0; b < bins; ++b) {
            items.speeds[b] = 1.0 + static_cast<double>(random() % 3);
            items.longest[b] = static_cast<int64_t>(30 + random() % 30);
        }
        items.capacity = static_cast<int64_t>(50 + random() % 400);
        items.most_items = static_cast<int64_t>(1 + random() % 20);
        Assignment lpt = longest_first(items.problem());
        // What it leaves out fits into no bin as they are in the end.
        std::vector<int64_t> tokens(bins, 0), count(bins, 0);
        for (size_t i = 0; i < n; ++i) {
            if (lpt[i] < 0) continue;
            tokens[lpt[i]] += items.sizes[i];
            ++count[lpt[i]];
        }
        bool all = true;
        for (size_t i = 0; i < n; ++i) {
            if (lpt[i] >= 0) {
                CHECK(items.sizes[i] <= items.longest[lpt[i]]);
                continue;
            }
            all = false;
            for (size_t b = 0; b < bins; ++b) {
                CHECK(items.sizes[i] > items.longest[b] || count[b] == items.most_items ||
                      tokens[b] + items.sizes[i] > items.capacity);
            }
        }
        for (size_t b = 0; b < bins; ++b) CHECK(tokens[b] <= items.capacity && count[b] <= items.most_items);
        if (all && n > 0) {
            const double before = items.longest_time(lpt);
            refine(items.problem(), lpt, 10000);
            CHECK(items.allowed(lpt));
            CHECK(items.longest_time(lpt) <= before);
        }
        const Assignment fit = multifit(items.problem(), 1e6);
        const bool none = std::find(fit.begin(), fit.end(), -1) != fit.end();
        CHECK(none ? std::count(fit.begin(), fit.end(), -1) == static_cast<int64_t>(n)
                   : n == 0 || items.allowed(fit));
        const Assignment packed = pack(items.problem(), 10000);
        CHECK(packed.size() == n && ((all || !none) <= items.allowed(packed)));
        const Assignment equal = karmarkar_karp(items.costs, static_cast<int64_t>(bins), true);
        std::fill(count.begin(), count.end(), 0);
        for (const int64_t b : equal) ++count[b];
        CHECK(*std::max_element(count.begin(), count.end()) <=
              *std::min_element(count.begin(), count.end()) + 1);
    }
}

void test_best_fit_opens_a_bin_only_where_none_has_room() {
    std::mt19937_64 random(3);
    for (int round = 0; round < 100; ++round) {
        std::vector<int64_t> sizes(random() % 60);
        for (int64_t& size : sizes) size = static_cast<int64_t>(random() % 41);
        const Assignment bins = best_fit_decreasing(sizes, 40);
        std::vector<int64_t> tokens(sizes.size() + 1, 0);
        for (size_t i = 0; i < sizes.size(); ++i) tokens[bins[i]] += sizes[i];
        const int64_t used = sizes.empty() ? 0 : *std::max_element(bins.begin(), bins.end()) + 1;
        for (int64_t b = 0; b < used; ++b) CHECK(tokens[b] <= 40);
        // Two half-empty bins would have been one.
        CHECK(std::count_if(tokens.begin(), tokens.begin() + used, [](int64_t t) { return 2 * t < 40; }) <=
              1);
    }
}

void test_edges() {
    const Items none({}, 3);
    CHECK(longest_first(none.problem()).empty() && multifit(none.problem(), 1).empty());
    CHECK(pack(none.problem(), 1).empty());
    CHECK(karmarkar_karp(none.costs, 3, false).empty() && best_fit_decreasing({}, 1).empty());
    const Items zeros({0, 0, 0}, 2);
    for (const bool equal_size : {false, true}) {
        CHECK(zeros.allowed(karmarkar_karp(zeros.costs, 2, equal_size)));
    }
    CHECK(zeros.allowed(longest_first(zeros.problem())));
    const Items few({5, 3}, 7);
    CHECK(few.longest_time(longest_first(few.problem())) == 5);
    CHECK(few.longest_time(karmarkar_karp(few.costs, 7, false)) == 5);
    const Items one({5, 3}, 1);
    CHECK(one.longest_time(multifit(one.problem(), 100)) == 8);
    CHECK(one.longest_time(karmarkar_karp(one.costs, 1, false)) == 8);
}

void test_messages() {
    CHECK(message([] { best_fit_decreasing(std::vector<int64_t>{3, 9}, 8); }) ==
          "sizes[1] is 9: a bin holds 8");
    CHECK(message([] { best_fit_decreasing(std::vector<int64_t>{-1}, 8); }) ==
          "sizes[0] is -1: it has to be at least 0");
    CHECK(message([] { karmarkar_karp(std::vector<double>{1}, 0, false); }) ==
          "bins is 0: it has to be at least 1");
    Items items({1, 2}, 2);
    items.costs[1] = std::nan("");
    CHECK(message([&] { longest_first(items.problem()); }).starts_with("costs[1] is nan"));
    items.costs[1] = 2;
    items.speeds[0] = 0;
    CHECK(message([&] { multifit(items.problem(), 1); }).starts_with("speeds[0] is 0"));
    items.speeds[0] = 1;
    Assignment outside{0, 2};
    CHECK(message([&] { refine(items.problem(), outside, 1); }) == "assignment[1] is 2: bins are 0 to 1");
}

}  // namespace

int main() {
    test_known_examples();
    test_bounds_against_the_optimum();
    test_limits();
    test_best_fit_opens_a_bin_only_where_none_has_room();
    test_edges();
    test_messages();
    return result();
}
