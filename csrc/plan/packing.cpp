// SPDX-License-Identifier: Apache-2.0
#include "csrc/plan/packing.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace gapless::plan {
namespace {

constexpr int64_t kNone = -1;
constexpr int kBisections = 30;
constexpr int64_t kNeighbours = 8;

/// Items from the costliest down; ties by size, then by number.
std::vector<int64_t> descending(std::span<const double> costs, std::span<const int64_t> sizes) {
    std::vector<int64_t> order(costs.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        if (costs[a] != costs[b]) return costs[a] > costs[b];
        if (!sizes.empty() && sizes[a] != sizes[b]) return sizes[a] > sizes[b];
        return a < b;
    });
    return order;
}

/// Bins ordered by load, each with room: the first that has enough room is found in O(log bins). A forest of
/// treaps.
class BinsByLoad {
  public:
    BinsByLoad(int64_t bins, size_t trees) : nodes_(static_cast<size_t>(bins)), roots_(trees, kNone) {
        for (int64_t b = 0; b < bins; ++b) nodes_[b].priority = scramble(static_cast<uint64_t>(b));
    }

    void insert(size_t tree, int64_t bin, double load, int64_t room) {
        Node& node = nodes_[bin];
        node.load = load;
        node.room = node.most_room = room;
        node.left = node.right = kNone;
        roots_[tree] = insert_below(roots_[tree], bin);
    }

    /// The least loaded bin of a tree with at least `room`; -1 if there is none.
    int64_t find(size_t tree, int64_t room) const {
        int64_t bin = roots_[tree];
        if (most_room(bin) < room) return kNone;
        while (true) {
            if (const Node& node = nodes_[bin]; most_room(node.left) >= room) {
                bin = node.left;
            } else if (node.room >= room) {
                return bin;
            } else {
                bin = node.right;
            }
        }
    }

    void erase(size_t tree, int64_t bin) { roots_[tree] = erase_below(roots_[tree], bin); }

  private:
    struct Node {
        double load = 0;
        int64_t room = 0, most_room = 0, left = kNone, right = kNone;
        uint64_t priority = 0;
    };

    static uint64_t scramble(uint64_t x) {  // splitmix64
        x += 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }

    bool before(int64_t a, int64_t b) const {
        return std::pair(nodes_[a].load, a) < std::pair(nodes_[b].load, b);
    }

    int64_t most_room(int64_t bin) const { return bin == kNone ? kNone : nodes_[bin].most_room; }

    void update(int64_t bin) {
        Node& node = nodes_[bin];
        node.most_room = std::max({node.room, most_room(node.left), most_room(node.right)});
    }

    /// The trees of what is before `bin` and of what is not.
    std::pair<int64_t, int64_t> split(int64_t tree, int64_t bin) {
        if (tree == kNone) return {kNone, kNone};
        if (before(tree, bin)) {
            const auto [low, high] = split(nodes_[tree].right, bin);
            nodes_[tree].right = low;
            update(tree);
            return {tree, high};
        }
        const auto [low, high] = split(nodes_[tree].left, bin);
        nodes_[tree].left = high;
        update(tree);
        return {low, tree};
    }

    int64_t merge(int64_t low, int64_t high) {
        if (low == kNone || high == kNone) return low == kNone ? high : low;
        if (nodes_[low].priority > nodes_[high].priority) {
            nodes_[low].right = merge(nodes_[low].right, high);
            update(low);
            return low;
        }
        nodes_[high].left = merge(low, nodes_[high].left);
        update(high);
        return high;
    }

    int64_t insert_below(int64_t tree, int64_t bin) {
        if (tree == kNone || nodes_[bin].priority > nodes_[tree].priority) {
            std::tie(nodes_[bin].left, nodes_[bin].right) = split(tree, bin);
            update(bin);
            return bin;
        }
        int64_t& side = before(tree, bin) ? nodes_[tree].right : nodes_[tree].left;
        side = insert_below(side, bin);
        update(tree);
        return tree;
    }

    int64_t erase_below(int64_t tree, int64_t bin) {
        if (tree == bin) return merge(nodes_[bin].left, nodes_[bin].right);
        int64_t& side = before(tree, bin) ? nodes_[tree].right : nodes_[tree].left;
        side = erase_below(side, bin);
        update(tree);
        return tree;
    }

    std::vector<Node> nodes_;
    std::vector<int64_t> roots_;
};

/// What a bin may still take, as LPT and multifit fill it.
struct Fill {
    explicit Fill(const PackingProblem& p)
        : problem(p),
          load(p.speeds.size(), 0.0),
          left(p.speeds.size(), p.capacity),
          items(p.speeds.size(), 0) {}

    /// Most tokens of one more item; -1 for none.
    int64_t room(int64_t bin) const {
        return items[bin] < problem.most_items ? std::min(left[bin], problem.longest[bin]) : kNone;
    }

    void add(int64_t bin, int64_t item) {
        load[bin] += problem.costs[item];
        left[bin] -= problem.sizes[item];
        ++items[bin];
    }

    const PackingProblem& problem;
    std::vector<double> load;
    std::vector<int64_t> left, items;
};

/// Bins of a fixed order with room in time and in tokens: the first with enough of both. A segment tree of
/// maxima.
class FirstFit {
  public:
    explicit FirstFit(size_t bins) {
        while (leaves_ < bins) leaves_ *= 2;
        time_.assign(2 * leaves_, -1.0);
        room_.assign(2 * leaves_, kNone);
    }

    void set(size_t place, double time, int64_t room) {
        size_t node = leaves_ + place;
        time_[node] = time;
        room_[node] = room;
        while (node /= 2) {
            time_[node] = std::max(time_[2 * node], time_[2 * node + 1]);
            room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
        }
    }

    /// Its place, or -1.
    int64_t find(double time, int64_t room) const { return find_below(1, time, room); }

  private:
    // The two maxima of a node may be of different bins, so that the way down may have to turn back.
    int64_t find_below(size_t node, double time, int64_t room) const {
        if (time_[node] < time || room_[node] < room) return kNone;
        if (node >= leaves_) return static_cast<int64_t>(node - leaves_);
        const int64_t place = find_below(2 * node, time, room);
        return place == kNone ? find_below(2 * node + 1, time, room) : place;
    }

    size_t leaves_ = 1;
    std::vector<double> time_;
    std::vector<int64_t> room_;
};

double longest_time(const PackingProblem& problem, const Assignment& assignment) {
    std::vector<double> load(problem.speeds.size(), 0.0);
    for (size_t i = 0; i < assignment.size(); ++i) load[assignment[i]] += problem.costs[i];
    double longest = 0;
    for (size_t b = 0; b < load.size(); ++b) longest = std::max(longest, load[b] / problem.speeds[b]);
    return longest;
}

/// What no assignment of at least one item goes below: all bins busy all the time, and the costliest item in
/// the fastest.
double least_time(const PackingProblem& problem) {
    const auto& [costs, sizes, speeds, longest, capacity, most_items] = problem;
    return std::max(
        std::accumulate(costs.begin(), costs.end(), 0.0) / std::accumulate(speeds.begin(), speeds.end(), 0.0),
        *std::max_element(costs.begin(), costs.end()) / *std::max_element(speeds.begin(), speeds.end()));
}

bool complete(const Assignment& assignment) {
    return std::find(assignment.begin(), assignment.end(), kNone) == assignment.end();
}

Assignment first_fit(const PackingProblem& problem, std::span<const int64_t> items,
                     std::span<const int64_t> bins, double seconds) {
    Fill fill(problem);
    FirstFit first(bins.size());
    const auto set = [&](size_t place) {
        const int64_t bin = bins[place];
        // A rounding error must not keep out what makes exactly `seconds`.
        first.set(place, seconds * problem.speeds[bin] * (1 + 1e-12) - fill.load[bin], fill.room(bin));
    };
    for (size_t place = 0; place < bins.size(); ++place) set(place);
    Assignment assignment(items.size(), kNone);
    for (const int64_t item : items) {
        const int64_t place = first.find(problem.costs[item], problem.sizes[item]);
        if (place == kNone) break;
        assignment[item] = bins[place];
        fill.add(bins[place], item);
        set(static_cast<size_t>(place));
    }
    return assignment;
}

/// The sets of a state of differencing from the largest sum down; their items are chains through `next`.
struct Subset {
    double sum;
    int64_t head, tail;
};
using State = std::vector<Subset>;

bool allowed(const PackingProblem& problem, const Assignment& assignment) {
    const auto bins = static_cast<int64_t>(problem.speeds.size());
    std::vector<int64_t> left(problem.speeds.size(), problem.capacity), items(problem.speeds.size(), 0);
    for (size_t i = 0; i < assignment.size(); ++i) {
        const int64_t bin = assignment[i];
        if (bin < 0 || bin >= bins || problem.sizes[i] > problem.longest[bin]) return false;
        if (problem.sizes[i] > left[bin] || ++items[bin] > problem.most_items) return false;
        left[bin] -= problem.sizes[i];
    }
    return true;
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check_costs(std::span<const double> costs) {
    for (size_t i = 0; i < costs.size(); ++i) {
        if (!(costs[i] >= 0 && std::isfinite(costs[i]))) {
            refuse("costs[" + std::to_string(i) + "] is " + std::to_string(costs[i]) +
                   ": it has to be finite and at least 0");
        }
    }
}

void check_sizes(std::span<const int64_t> sizes) {
    for (size_t i = 0; i < sizes.size(); ++i) {
        if (sizes[i] < 0) {
            refuse("sizes[" + std::to_string(i) + "] is " + std::to_string(sizes[i]) +
                   ": it has to be at least 0");
        }
    }
}

}  // namespace

void check(const PackingProblem& problem) {
    check_costs(problem.costs);
    check_sizes(problem.sizes);
    if (problem.sizes.size() != problem.costs.size()) {
        refuse("sizes has " + std::to_string(problem.sizes.size()) +
               " entries: it has to have one for each of " + std::to_string(problem.costs.size()) + " items");
    }
    if (problem.speeds.empty()) refuse("speeds is empty: there has to be a bin");
    if (problem.longest.size() != problem.speeds.size()) {
        refuse("longest has " + std::to_string(problem.longest.size()) +
               " entries: it has to have one for each of " + std::to_string(problem.speeds.size()) + " bins");
    }
    for (size_t b = 0; b < problem.speeds.size(); ++b) {
        if (!(problem.speeds[b] > 0 && std::isfinite(problem.speeds[b]))) {
            refuse("speeds[" + std::to_string(b) + "] is " + std::to_string(problem.speeds[b]) +
                   ": it has to be finite and above 0");
        }
    }
}

Assignment best_fit_decreasing(std::span<const int64_t> sizes, int64_t capacity) {
    check_sizes(sizes);
    std::vector<int64_t> order(sizes.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
    Assignment assignment(sizes.size(), kNone);
    std::set<std::pair<int64_t, int64_t>> bins;  // (room, bin)
    int64_t count = 0;
    for (const int64_t item : order) {
        const auto best = bins.lower_bound({sizes[item], 0});
        if (best != bins.end()) {
            auto node = bins.extract(best);
            node.value().first -= sizes[item];
            assignment[item] = node.value().second;
            bins.insert(std::move(node));
            continue;
        }
        if (sizes[item] > capacity) {
            refuse("sizes[" + std::to_string(item) + "] is " + std::to_string(sizes[item]) +
                   ": a bin holds " + std::to_string(capacity));
        }
        bins.emplace(capacity - sizes[item], count);
        assignment[item] = count++;
    }
    return assignment;
}

Assignment longest_first(const PackingProblem& problem) {
    check(problem);
    // Bins of one speed share a tree: inside it the least loaded is the first to finish.
    const auto bins = static_cast<int64_t>(problem.speeds.size());
    std::vector<double> speeds(problem.speeds.begin(), problem.speeds.end());
    std::sort(speeds.begin(), speeds.end(), std::greater<>());
    speeds.erase(std::unique(speeds.begin(), speeds.end()), speeds.end());
    BinsByLoad by_load(bins, speeds.size());
    std::vector<size_t> tree_of(static_cast<size_t>(bins));
    Fill fill(problem);
    const auto insert = [&](int64_t bin) {
        by_load.insert(tree_of[bin], bin, fill.load[bin], fill.room(bin));
    };
    for (int64_t b = 0; b < bins; ++b) {
        const auto speed =
            std::lower_bound(speeds.begin(), speeds.end(), problem.speeds[b], std::greater<>());
        tree_of[b] = static_cast<size_t>(speed - speeds.begin());
        insert(b);
    }
    Assignment assignment(problem.costs.size(), kNone);
    for (const int64_t item : descending(problem.costs, problem.sizes)) {
        int64_t best = kNone;
        double soonest = 0;
        for (size_t tree = 0; tree < speeds.size(); ++tree) {
            const int64_t bin = by_load.find(tree, problem.sizes[item]);
            if (bin == kNone) continue;
            const double end = (fill.load[bin] + problem.costs[item]) / speeds[tree];
            if (best != kNone && end >= soonest) continue;
            best = bin;
            soonest = end;
        }
        if (best == kNone) continue;
        assignment[item] = best;
        by_load.erase(tree_of[best], best);
        fill.add(best, item);
        insert(best);
    }
    return assignment;
}

Assignment karmarkar_karp(std::span<const double> costs, int64_t bins, bool equal_size) {
    check_costs(costs);
    if (bins < 1) refuse("bins is " + std::to_string(bins) + ": it has to be at least 1");
    const auto n = static_cast<int64_t>(costs.size());
    const std::vector<int64_t> order = descending(costs, {});
    std::vector<int64_t> next(costs.size(), kNone);
    // A state holds only its sets that have items: almost all have few until the very end.
    std::vector<State> states;
    const int64_t group = equal_size ? bins : 1;
    for (int64_t begin = 0; begin < n; begin += group) {
        State& state = states.emplace_back();
        for (int64_t i = begin; i < std::min(begin + group, n); ++i) {
            state.push_back({costs[order[i]], order[i], order[i]});
        }
    }
    // Largest spread first; among equal ones the largest set, then the earliest state.
    using Key = std::tuple<double, double, int64_t>;
    std::priority_queue<Key> heap;
    const auto push = [&](int64_t s) {
        const State& state = states[s];
        const double least = static_cast<int64_t>(state.size()) < bins ? 0.0 : state.back().sum;
        heap.emplace(state.front().sum - least, state.front().sum, -s);
    };
    const auto larger = [](const Subset& a, const Subset& b) { return a.sum > b.sum; };
    for (int64_t s = 0; s < static_cast<int64_t>(states.size()); ++s) push(s);
    while (heap.size() > 1) {
        const int64_t a = -std::get<2>(heap.top());
        heap.pop();
        const int64_t b = -std::get<2>(heap.top());
        heap.pop();
        State& into = states[a];
        State& from = states[b];
        // Place i of one meets place bins - 1 - i of the other; empty sets are at the end of both.
        const auto joined = static_cast<int64_t>(into.size() + from.size()) - bins;
        for (int64_t i = 0; i < std::max<int64_t>(joined, 0); ++i) {
            Subset& large = into[into.size() - 1 - static_cast<size_t>(i)];
            const Subset& small = from[static_cast<size_t>(bins) - into.size() + static_cast<size_t>(i)];
            large.sum += small.sum;
            next[large.tail] = small.head;
            large.tail = small.tail;
        }
        const auto met = std::max<int64_t>(joined, 0);
        const int64_t unchanged = static_cast<int64_t>(into.size()) - met;
        into.insert(into.end(), from.begin(), from.end() - met);
        from = State();
        std::stable_sort(into.begin() + unchanged, into.end(), larger);
        std::inplace_merge(into.begin(), into.begin() + unchanged, into.end(), larger);
        push(a);
    }
    Assignment assignment(costs.size(), kNone);
    if (heap.empty()) return assignment;
    const State& last = states[-std::get<2>(heap.top())];
    for (size_t b = 0; b < last.size(); ++b) {
        for (int64_t item = last[b].head; item != kNone; item = next[item]) {
            assignment[item] = static_cast<int64_t>(b);
        }
    }
    return assignment;
}

Assignment multifit(const PackingProblem& problem, double seconds) {
    check(problem);
    if (problem.costs.empty()) return {};
    const std::vector<int64_t> items = descending(problem.costs, problem.sizes);
    // Slow bins first, so that what only fast ones can take finds them free.
    std::vector<int64_t> bins(problem.speeds.size());
    std::iota(bins.begin(), bins.end(), 0);
    std::stable_sort(bins.begin(), bins.end(), [&](int64_t a, int64_t b) {
        return std::pair(problem.speeds[a], problem.longest[a]) <
               std::pair(problem.speeds[b], problem.longest[b]);
    });
    double low = least_time(problem);
    Assignment best = first_fit(problem, items, bins, seconds);
    if (!complete(best)) return Assignment(items.size(), kNone);
    for (int i = 0; i < kBisections && seconds - low > 1e-9 * seconds; ++i) {
        const double middle = low + (seconds - low) / 2;
        Assignment trial = first_fit(problem, items, bins, middle);
        if (complete(trial)) {
            best = std::move(trial);
            seconds = std::min(middle, longest_time(problem, best));
        } else {
            low = middle;
        }
    }
    return best;
}

namespace {

/// The state of refine(): items of each bin from the costliest down, and what each bin has.
class Refinement {
  public:
    Refinement(const PackingProblem& problem, Assignment& assignment, int64_t effort)
        : problem_(problem),
          assignment_(assignment),
          effort_(effort),
          fill_(problem),
          members_(problem.speeds.size()) {
        for (const int64_t item : descending(problem.costs, problem.sizes)) {
            members_[assignment[item]].push_back(item);
            fill_.add(assignment[item], item);
        }
        for (size_t b = 0; b < members_.size(); ++b) order_.emplace(time(static_cast<int64_t>(b)), b);
    }

    void run() {
        while (order_.size() > 1 && effort_ > 0 && improve()) {
        }
    }

  private:
    struct Exchange {
        int64_t give = kNone, take = kNone;  // take is -1 for a move
        double time = 0;
    };

    double time(int64_t bin) const { return fill_.load[bin] / problem_.speeds[bin]; }
    double cost(int64_t item) const { return item == kNone ? 0.0 : problem_.costs[item]; }
    int64_t size(int64_t item) const { return item == kNone ? 0 : problem_.sizes[item]; }

    /// One exchange between the last bin to finish and another, the first to finish that has one.
    bool improve() {
        const int64_t from = std::prev(order_.end())->second;
        for (const auto& [end, to] : order_) {
            if (to == from || effort_ <= 0) break;
            const Exchange found = best_exchange(from, to);
            if (found.give != kNone) {
                apply(from, to, found);
                return true;
            }
        }
        return false;
    }

    Exchange best_exchange(int64_t from, int64_t to) {
        const double longest = time(from);
        // A gain below rounding would go on for ever.
        Exchange best{kNone, kNone, longest * (1 - 1e-12)};
        const double speed_from = problem_.speeds[from], speed_to = problem_.speeds[to];
        const double wanted = (longest - time(to)) / (1 / speed_from + 1 / speed_to);
        int64_t last = kNone;
        for (const int64_t item : members_[from]) {
            if (last != kNone && cost(item) == cost(last) && size(item) == size(last)) continue;
            last = item;
            if (cost(item) <= 0) break;
            --effort_;
            consider(from, to, item, kNone, best);
            const auto& others = members_[to];
            // The one that leaves the two bins as even as can be is beside this place; if limits forbid it,
            // larger ones move less.
            const auto place =
                std::lower_bound(others.begin(), others.end(), cost(item) - wanted,
                                 [&](int64_t other, double value) { return cost(other) > value; });
            if (place != others.end()) consider(from, to, item, *place, best);
            const auto larger = place - others.begin();
            for (int64_t k = 1; k <= std::min<int64_t>(larger, kNeighbours); ++k) {
                if (consider(from, to, item, *(place - k), best)) break;
            }
        }
        return best;
    }

    /// Whether limits allow it; `best` becomes it if it is better.
    bool consider(int64_t from, int64_t to, int64_t give, int64_t take, Exchange& best) const {
        const double moved = cost(give) - cost(take);
        if (moved <= 0) return false;
        const double end = std::max((fill_.load[from] - moved) / problem_.speeds[from],
                                    (fill_.load[to] + moved) / problem_.speeds[to]);
        const int64_t tokens = size(give) - size(take);
        if (size(give) > problem_.longest[to] || tokens > fill_.left[to]) return false;
        if (take == kNone ? fill_.items[to] >= problem_.most_items
                          : size(take) > problem_.longest[from] || -tokens > fill_.left[from]) {
            return false;
        }
        if (end < best.time) best = {give, take, end};
        return true;
    }

    void apply(int64_t from, int64_t to, const Exchange& exchange) {
        order_.erase({time(from), from});
        order_.erase({time(to), to});
        shift(exchange.give, from, to);
        if (exchange.take != kNone) shift(exchange.take, to, from);
        // Sums from the items, as differences would gather rounding errors.
        for (const int64_t bin : {from, to}) {
            fill_.load[bin] = 0;
            for (const int64_t item : members_[bin]) fill_.load[bin] += problem_.costs[item];
            order_.emplace(time(bin), bin);
        }
    }

    void shift(int64_t item, int64_t from, int64_t to) {
        const auto place = [&](std::vector<int64_t>& items) {
            return std::lower_bound(items.begin(), items.end(), item, [&](int64_t a, int64_t b) {
                return std::tuple(-problem_.costs[a], -problem_.sizes[a], a) <
                       std::tuple(-problem_.costs[b], -problem_.sizes[b], b);
            });
        };
        members_[from].erase(place(members_[from]));
        members_[to].insert(place(members_[to]), item);
        assignment_[item] = to;
        fill_.left[from] += problem_.sizes[item];
        fill_.left[to] -= problem_.sizes[item];
        --fill_.items[from];
        ++fill_.items[to];
    }

    const PackingProblem& problem_;
    Assignment& assignment_;
    int64_t effort_;
    Fill fill_;
    std::vector<std::vector<int64_t>> members_;
    std::set<std::pair<double, int64_t>> order_;
};

}  // namespace

void refine(const PackingProblem& problem, Assignment& assignment, int64_t effort) {
    check(problem);
    if (assignment.size() != problem.costs.size()) {
        refuse("assignment has " + std::to_string(assignment.size()) +
               " entries: it has to have one for each of " + std::to_string(problem.costs.size()) + " items");
    }
    const auto bins = static_cast<int64_t>(problem.speeds.size());
    for (size_t i = 0; i < assignment.size(); ++i) {
        if (assignment[i] < 0 || assignment[i] >= bins) {
            refuse("assignment[" + std::to_string(i) + "] is " + std::to_string(assignment[i]) +
                   ": bins are 0 to " + std::to_string(bins - 1));
        }
    }
    Refinement(problem, assignment, effort).run();
}

Assignment pack(const PackingProblem& problem, int64_t effort) {
    check(problem);
    if (problem.costs.empty()) return {};
    const double least = least_time(problem) * (1 + 1e-12);
    Assignment best(problem.costs.size(), kNone);
    double seconds = std::numeric_limits<double>::infinity();
    const auto consider = [&](Assignment&& start) {
        if (!allowed(problem, start)) return;
        refine(problem, start, effort);
        const double end = longest_time(problem, start);
        if (end >= seconds) return;
        best = std::move(start);
        seconds = end;
    };
    consider(longest_first(problem));
    if (seconds <= least) return best;
    if (std::all_of(problem.speeds.begin(), problem.speeds.end(),
                    [&](double s) { return s == problem.speeds[0]; })) {
        consider(karmarkar_karp(problem.costs, static_cast<int64_t>(problem.speeds.size()), false));
        if (seconds <= least) return best;
    }
    // Twice the time of any packing is enough for first-fit, if there is no limit but time; one slow bin is,
    // too.
    const double slow = std::accumulate(problem.costs.begin(), problem.costs.end(), 0.0) /
                        *std::min_element(problem.speeds.begin(), problem.speeds.end());
    consider(multifit(problem, std::min(2 * seconds, slow)));
    if (*std::max_element(problem.sizes.begin(), problem.sizes.end()) <= problem.capacity) {
        consider(best_fit_decreasing(problem.sizes, problem.capacity));
    }
    return best;
}

}  // namespace gapless::plan
