// SPDX-License-Identifier: Apache-2.0
#include "csrc/plan/zeppelin.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>

namespace gapless::plan {

namespace {

using Ring = std::vector<int64_t>;

constexpr double kNever = std::numeric_limits<double>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Finds the rank of least load among those with room: a tournament over loads that skips branches without
/// room.
class LeastLoaded {
  public:
    explicit LeastLoaded(int64_t ranks) {
        while (leaves_ < static_cast<size_t>(ranks)) leaves_ *= 2;
        load_.assign(2 * leaves_, kNever);
        room_.assign(2 * leaves_, -1);
    }

    void set(int64_t rank, double load, int64_t room) {
        size_t i = static_cast<size_t>(rank) + leaves_;
        load_[i] = load;
        room_[i] = room;
        for (i /= 2; i; i /= 2) {
            load_[i] = std::min(load_[2 * i], load_[2 * i + 1]);
            room_[i] = std::max(room_[2 * i], room_[2 * i + 1]);
        }
    }

    /// The first of the least loaded ranks with room for `tokens`, or -1.
    int64_t find(int64_t tokens) const {
        int64_t best = -1;
        double least = kNever;
        search(1, tokens, least, best);
        return best;
    }

  private:
    void search(size_t i, int64_t tokens, double& least, int64_t& best) const {
        if (room_[i] < tokens || load_[i] >= least) return;
        if (i >= leaves_) {
            least = load_[i];
            best = static_cast<int64_t>(i - leaves_);
            return;
        }
        const size_t first = load_[2 * i] <= load_[2 * i + 1] ? 2 * i : 2 * i + 1;
        search(first, tokens, least, best);
        search(first ^ 1, tokens, least, best);
    }

    size_t leaves_ = 1;
    std::vector<double> load_;
    std::vector<int64_t> room_;
};

/// Ranks that rings of a step connect.
class Ties {
  public:
    explicit Ties(int64_t ranks) : parent_(ranks) { reset(); }
    void reset() { std::iota(parent_.begin(), parent_.end(), 0); }
    int64_t root(int64_t r) {
        while (parent_[r] != r) r = parent_[r] = parent_[parent_[r]];
        return r;
    }
    void join(const Ring& ring) {
        for (const int64_t r : ring) parent_[root(r)] = root(ring.front());
    }

  private:
    std::vector<int64_t> parent_;
};

/// What is known of the ranks of a node.
struct Node {
    int64_t begin = 0, end = 0;
    double least = 0, most = 0, latest = 0;  // keys, and the latest end
    std::vector<int64_t> rooms = {};         // of its ranks, the emptiest first
    std::vector<double> loads = {};          // the least first
};

/// Where the ranks of a ring are.
enum class Spread { node, nodes, any };

class Filler {
  public:
    Filler(const ZoneRanks& ranks, const ZoneGoal& goal)
        : r_(ranks),
          goal_(goal),
          level_(goal.level),
          count_(static_cast<int64_t>(ranks.capacity.size())),
          node_size_(std::min(ranks.ranks_per_node, count_)),
          most_room_(*std::max_element(ranks.capacity.begin(), ranks.capacity.end())),
          begin_(count_),
          busy_(count_),
          held_(count_),
          tree_(count_),
          ties_(count_) {
        for (int64_t first = 0; first < count_; first += ranks.ranks_per_node)
            nodes_.push_back({first, std::min(first + ranks.ranks_per_node, count_)});
        for (size_t n = 0; n < nodes_.size(); ++n) by_least_.insert({nodes_[n].least, n});
        open_step();
    }

    /// Puts a sequence into the present step; false if it has no place there.
    bool place(int64_t length, double attention, Ring& ring) {
        const int64_t needed = std::max<int64_t>(1, ceil_div(length, most_room_));
        if (needed > count_) return false;
        const double tokens = static_cast<double>(length), work = attention + tokens * r_.token;
        const int64_t inside = hidden_ranks(attention, tokens * r_.near, r_.hop, node_size_);
        const double hop =
            r_.whole_nodes ? std::max(r_.near, r_.outer / static_cast<double>(node_size_)) : r_.far;
        const int64_t across = hidden_ranks(attention, tokens * hop, r_.hop, count_);
        const double wanted = std::ceil(work / goal_.piece);
        int64_t want = wanted < static_cast<double>(count_) ? static_cast<int64_t>(wanted) : count_;
        if (want > inside) want = std::max(inside, std::min(want, across));
        want = std::max(std::max<int64_t>(want, 1), needed);
        // More ranks than transfers hide behind would wait for them: only if there is no other way, or to
        // make nodes whole.
        if (!few(want, forced_ ? node_size_ : std::max(inside, needed), length, attention, ring) &&
            !many(want, forced_ ? count_ : std::max(across, needed), length, attention, ring) &&
            !(forced_ && any(length, ring)))
            return false;
        add(ring, length, attention);
        return true;
    }

    /// Waits for all rings and begins the next step.
    void close_step() {
        std::vector<double> first(count_, 0), longest(count_, 0);
        for (int64_t r = 0; r < count_; ++r) {
            const int64_t root = ties_.root(r);
            first[root] = std::max(first[root], begin_[r]);
            longest[root] = std::max(longest[root], busy_[r]);
        }
        for (int64_t r = 0; r < count_; ++r) begin_[r] = first[ties_.root(r)] + longest[ties_.root(r)];
        forced_ = false;
        open_step();
    }

    /// For a sequence that finds no place in an empty step: first without the level, then on whatever ranks
    /// have room. False if there is nothing left to give up.
    bool relax() {
        if (forced_) return false;
        forced_ = level_ == kNever;
        level_ = kNever;
        return true;
    }

    std::vector<double> ends() const { return begin_; }

  private:
    void open_step() {
        ties_.reset();
        most_rooms_.assign(static_cast<size_t>(node_size_) + 1, std::numeric_limits<int64_t>::max());
        std::fill(busy_.begin(), busy_.end(), 0);
        std::fill(held_.begin(), held_.end(), 0);
        for (int64_t r = 0; r < count_; ++r) tree_.set(r, key(r), room(r));
        for (size_t n = 0; n < nodes_.size(); ++n) see(n);
    }

    int64_t room(int64_t r) const { return r_.capacity[r] - held_[r]; }
    double load(int64_t r) const { return begin_[r] + busy_[r]; }
    double key(int64_t r) const {
        if (goal_.fullness == 0) return load(r);
        const double full = static_cast<double>(held_[r]) / static_cast<double>(r_.capacity[r]);
        return begin_[r] + std::max(busy_[r], goal_.fullness * full);
    }

    void see(size_t n) {
        Node& node = nodes_[n];
        const double before = node.least;
        node.least = kNever;
        node.most = node.latest = 0;
        node.rooms.clear();
        node.loads.clear();
        for (int64_t r = node.begin; r < node.end; ++r) {
            node.least = std::min(node.least, key(r));
            node.most = std::max(node.most, key(r));
            node.latest = std::max(node.latest, load(r));
            node.rooms.push_back(room(r));
            node.loads.push_back(load(r));
        }
        std::sort(node.rooms.begin(), node.rooms.end(), std::greater<>());
        std::sort(node.loads.begin(), node.loads.end());
        if (node.least == before) return;
        by_least_.erase({before, n});
        by_least_.insert({node.least, n});
    }

    /// Seconds of a sequence on each of `count` ranks: of one node, of any, or all ranks of some nodes.
    double seconds(int64_t length, double attention, int64_t count, Spread spread, double speed = 1) const {
        const double n = static_cast<double>(count), tokens = static_cast<double>(length) / n;
        const double w = spread == Spread::nodes ? static_cast<double>(node_size_) : n;
        const double inner = tokens * (spread == Spread::any ? r_.far : r_.near) + r_.hop;
        const double transfer = std::max(n / w * (w - 1) * inner, (n / w - 1) * (tokens * r_.outer + r_.hop));
        return std::max(attention / n / speed, transfer) + tokens * r_.token / speed;
    }

    /// `count` ranks of one node; up to `most` where shares of that size have no room, or end too late.
    bool few(int64_t count, int64_t most, int64_t length, double attention, Ring& ring) {
        if (count == 1) {
            const int64_t r = tree_.find(length);
            if (r >= 0 && load(r) + seconds(length, attention, 1, Spread::node, r_.speed[r]) <= level_) {
                ring.assign(1, r);
                return true;
            }
            count = 2;
        }
        for (; count <= std::min(most, node_size_); ++count) {
            const int64_t share = ceil_div(length, count);
            const double latest = level_ - seconds(length, attention, count, Spread::node);
            double least = kNever;
            const Node* best = nullptr;
            if (share > most_rooms_[count]) continue;
            int64_t roomiest = 0;
            bool seen_all = true;
            for (const auto& [first, n] : by_least_) {
                // Its last rank is no earlier than its first.
                if (first >= least || (goal_.fullness == 0 && first > latest)) {
                    seen_all = false;
                    break;
                }
                const Node& node = nodes_[n];
                if (static_cast<int64_t>(node.rooms.size()) < count) continue;
                roomiest = std::max(roomiest, node.rooms[count - 1]);
                // Where keys are loads, so many ranks are needed by then; else the last one's load may be
                // any.
                if (node.rooms[count - 1] < share || node.loads[goal_.fullness == 0 ? count - 1 : 0] > latest)
                    continue;
                pick(node, count, share);
                if (key(picked_.back()) >= least || load(picked_.back()) > latest) continue;
                least = key(picked_.back());
                best = &node;
            }
            if (!best) {
                if (seen_all) most_rooms_[count] = roomiest;  // rooms only shrink until the step ends
                continue;
            }
            pick(*best, count, share);
            ring = picked_;
            std::sort(ring.begin(), ring.end());
            return true;
        }
        return false;
    }

    /// The `count` least loaded ranks of a node with room for `share` tokens, of which there are so many;
    /// least first.
    void pick(const Node& node, int64_t count, int64_t share) {
        picked_.clear();
        for (int64_t r = node.begin; r < node.end; ++r)
            if (room(r) >= share) picked_.push_back(r);
        std::sort(picked_.begin(), picked_.end(),
                  [&](int64_t a, int64_t b) { return key(a) != key(b) ? key(a) < key(b) : a < b; });
        picked_.resize(count);
    }

    /// `count` ranks of several nodes, those whose busiest rank has least to do; up to `most` as in `few`.
    bool many(int64_t count, int64_t most, int64_t length, double attention, Ring& ring) {
        count = std::max(count, std::min(node_size_ + 1, count_));
        if (r_.whole_nodes) count = whole(count), most = whole(most);
        while (count <= most) {
            const int64_t share = ceil_div(length, count);
            const bool even = r_.whole_nodes && count % node_size_ == 0;
            const double latest =
                level_ - seconds(length, attention, count, even ? Spread::nodes : Spread::any);
            order_.clear();
            int64_t found = 0;
            for (size_t n = 0; n < nodes_.size(); ++n) {
                const Node& node = nodes_[n];
                if (node.rooms.back() < share || node.latest > latest) continue;
                if (even && node.end - node.begin < node_size_) continue;
                order_.emplace_back(node.most, n);
                found += node.end - node.begin;
            }
            if (found >= count) {
                std::sort(order_.begin(), order_.end());
                ring.clear();
                for (size_t i = 0; static_cast<int64_t>(ring.size()) < count; ++i) {
                    const Node& node = nodes_[order_[i].second];
                    for (int64_t r = node.begin; r < node.end && static_cast<int64_t>(ring.size()) < count;
                         ++r)
                        ring.push_back(r);
                }
                std::sort(ring.begin(), ring.end());
                return true;
            }
            if (count == most) break;
            count = std::min(most, count + std::max<int64_t>(1, count / 4));
            if (r_.whole_nodes) count = whole(count);
        }
        return false;
    }

    /// So many ranks, and as many more as make nodes whole; all ranks if there are not so many whole nodes.
    int64_t whole(int64_t count) const {
        const int64_t up = ceil_div(count, node_size_) * node_size_;
        return up <= count_ ? up : count_;
    }

    Spread spread(const Ring& ring) const {
        const auto node = [&](size_t i) { return ring[i] / r_.ranks_per_node; };
        if (node(0) == node(ring.size() - 1)) return Spread::node;
        const auto size = static_cast<size_t>(node_size_);
        if (!r_.whole_nodes || ring.size() % size) return Spread::any;
        for (size_t i = 0; i < ring.size(); i += size)
            if (node(i) != node(i + size - 1)) return Spread::any;
        return Spread::nodes;
    }

    /// As few ranks as have room, wherever they are.
    bool any(int64_t length, Ring& ring) {
        Ring all(count_);
        std::iota(all.begin(), all.end(), 0);
        std::stable_sort(all.begin(), all.end(), [&](int64_t a, int64_t b) { return room(a) > room(b); });
        for (int64_t count = 1; count <= count_; ++count) {
            if (room(all[count - 1]) < ceil_div(length, count)) continue;
            ring.assign(all.begin(), all.begin() + count);
            std::sort(ring.begin(), ring.end());
            return true;
        }
        return false;
    }

    void add(const Ring& ring, int64_t length, double attention) {
        const auto count = static_cast<int64_t>(ring.size());
        const Spread across = spread(ring);
        if (count > 1) {
            ties_.join(ring);
            // They begin together.
            double first = 0;
            for (const int64_t r : ring) first = std::max(first, begin_[r]);
            for (const int64_t r : ring) begin_[r] = first;
        }
        for (size_t i = 0; i < ring.size(); ++i) {
            const int64_t r = ring[i], n = r / r_.ranks_per_node;
            if (held_[r] == 0) busy_[r] += r_.overhead / r_.speed[r];
            busy_[r] += seconds(length, attention, count, across, r_.speed[r]);
            held_[r] += ceil_div(length, count);
            tree_.set(r, key(r), room(r));
            if (i + 1 == ring.size() || ring[i + 1] / r_.ranks_per_node != n) see(static_cast<size_t>(n));
        }
    }

    const ZoneRanks& r_;
    const ZoneGoal& goal_;
    double level_;
    bool forced_ = false;
    const int64_t count_, node_size_, most_room_;
    std::vector<double> begin_, busy_;  // of each rank in the present step
    std::vector<int64_t> held_;
    LeastLoaded tree_;
    Ties ties_;
    std::vector<Node> nodes_;
    std::set<std::pair<double, size_t>> by_least_;  // nodes by their least key
    std::vector<int64_t> most_rooms_;  // in this step, of the emptiest node's so-many-th rank; an upper bound
    Ring picked_;
    std::vector<std::pair<double, size_t>> order_;
};

void check(std::span<const int64_t> lengths, std::span<const double> attention, const ZoneRanks& ranks) {
    if (ranks.capacity.empty() || ranks.capacity.size() != ranks.speed.size())
        throw std::invalid_argument(
            "capacity and speed have to have one entry for each rank, and there has to be one");
    if (attention.size() != lengths.size())
        throw std::invalid_argument("attention has to have one entry for each sequence");
    if (ranks.ranks_per_node < 1) throw std::invalid_argument("ranks_per_node has to be at least 1");
    if (*std::min_element(ranks.capacity.begin(), ranks.capacity.end()) < 1)
        throw std::invalid_argument("capacity has to be at least 1 for each rank");
    if (!lengths.empty() && *std::min_element(lengths.begin(), lengths.end()) < 1)
        throw std::invalid_argument("lengths have to be at least 1");
}

}  // namespace

int64_t hidden_ranks(double attention, double transfer, double hop, int64_t most) {
    // (n - 1) hops of transfer / n each, against attention / n of computing.
    int64_t low = 1, high = std::max<int64_t>(most, 1);
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        const auto n = static_cast<double>(middle);
        if ((n - 1) * (transfer / n + hop) <= attention / n)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

ZonePlan zone_plan(std::span<const int64_t> lengths, std::span<const double> attention,
                   const ZoneRanks& ranks, const ZoneGoal& goal) {
    check(lengths, attention, ranks);
    Filler filler(ranks, goal);
    ZonePlan plan;
    plan.step.assign(lengths.size(), -1);
    std::vector<Ring> rings(lengths.size());
    std::vector<size_t> left(lengths.size()), later;
    std::iota(left.begin(), left.end(), size_t{0});
    for (int64_t step = 0; !left.empty() && (goal.most_steps == 0 || step < goal.most_steps);) {
        later.clear();
        for (const size_t i : left) {
            if (filler.place(lengths[i], attention[i], rings[i]))
                plan.step[i] = step;
            else
                later.push_back(i);
        }
        if (later.size() < left.size()) {
            filler.close_step();
            ++step;
        } else if (!filler.relax()) {
            break;  // not even an empty step has room
        }
        std::swap(left, later);
    }
    plan.offsets.push_back(0);
    for (const Ring& ring : rings) {
        plan.ranks.insert(plan.ranks.end(), ring.begin(), ring.end());
        plan.offsets.push_back(static_cast<int64_t>(plan.ranks.size()));
    }
    plan.end = filler.ends();
    return plan;
}

}  // namespace gapless::plan
