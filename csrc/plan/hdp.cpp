// SPDX-License-Identifier: Apache-2.0
#include "csrc/plan/hdp.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace gapless::plan {
namespace {

using Index = int64_t;
constexpr double infinity = std::numeric_limits<double>::infinity();
// Sequences of one rank that take more of the target than this are placed like rings, while ranks are still
// empty.
constexpr double small = 0.5;
constexpr size_t most_thresholds = 16;

// Ranks that are at least so fast and hold at least so much. A ring is as slow as its slowest rank and its
// equal shards are as large as its smallest rank allows, so rings are planned pool by pool.
struct Pool {
    int64_t capacity;
    double throughput;
    int64_t stages;
    std::vector<Index> order;               // by (load, rank)
    std::vector<std::vector<Index>> nodes;  // the same for each node
    std::vector<Index> whole;               // nodes with all their ranks, by (load of the last rank, node)
};

struct Candidate {
    double waste = infinity;   // rank-seconds that nothing useful is done in
    double finish = infinity;  // seconds
    std::span<const Index> units;
    const Pool* nodes_of = nullptr;  // whose nodes the units are; null: ranks

    std::vector<Index> ranks() const {
        if (!nodes_of) return {units.begin(), units.end()};
        std::vector<Index> all;
        for (const Index node : units)
            all.insert(all.end(), nodes_of->nodes[node].begin(), nodes_of->nodes[node].end());
        return all;
    }

    // Of equal waste the fuller ranks, so that others stay free for what is longer than the rest of these.
    bool better_than(double other_waste, double other_finish) const {
        return waste < other_waste || (waste == other_waste && finish >= other_finish);
    }
};

class Planner {
  public:
    Planner(const HdpSequences& sequences, const HdpRanks& ranks, const HdpTargets& targets)
        : sequences_(sequences),
          ranks_(ranks),
          targets_(targets),
          count_(static_cast<Index>(ranks.capacity.size())),
          load_(ranks.capacity.size(), 0.0),
          longest_(ranks.capacity.size(), 0.0),
          step_(ranks.capacity.size(), 0),
          open_(ranks.capacity.size()),
          changed_(ranks.capacity.size(), false) {
        const size_t n = sequences.lengths.size();
        if (sequences.attention.size() != n || sequences.linear.size() != n || sequences.resident.size() != n)
            throw std::invalid_argument("attention, linear and resident have to have one entry a sequence");
        if (ranks.capacity.empty() || ranks.throughput.size() != ranks.capacity.size() ||
            ranks.stages.size() != ranks.capacity.size())
            throw std::invalid_argument(
                "capacity, throughput and stages have to have one entry a rank, of at least one");
        if (ranks.ranks_per_node < 1) throw std::invalid_argument("ranks_per_node has to be at least 1");
        plan_.pack_of.assign(n, 0);
        plan_.rank_offsets.push_back(0);
        make_pools();
    }

    HdpPlan run() && {
        std::vector<Index> order(sequences_.lengths.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](Index a, Index b) { return sequences_.lengths[a] > sequences_.lengths[b]; });
        std::vector<Index> singles;
        for (const Index i : order) {
            if (sequences_.lengths[i] == 0) break;
            if (is_single(i))
                singles.push_back(i);
            else
                place_ring(i);
        }
        fill(singles);
        if (plan_.steps.empty() && !order.empty()) open_pack(0);  // for sequences without tokens
        plan_.finish = latest(false);
        plan_.makespan = latest(true);
        return std::move(plan_);
    }

  private:
    // Thresholds of capacity and throughput; of very many different ones only some, evenly.
    void make_pools() {
        const auto distinct = [](auto values) {
            std::sort(values.begin(), values.end());
            values.erase(std::unique(values.begin(), values.end()), values.end());
            const size_t n = values.size();
            if (n <= most_thresholds) return values;
            auto some = values;
            some.clear();
            for (size_t k = 0; k < most_thresholds; ++k)
                some.push_back(values[k * (n - 1) / (most_thresholds - 1)]);
            return some;
        };
        std::vector<int64_t> capacities(ranks_.capacity.begin(), ranks_.capacity.end());
        std::sort(capacities.begin(), capacities.end(), std::greater<>());
        int64_t most = 0, roomiest = 0;  // the threshold whose ranks together hold most
        for (size_t k = 0; k < capacities.size(); ++k)
            if (capacities[k] * static_cast<int64_t>(k + 1) > most) {
                roomiest = capacities[k];
                most = roomiest * static_cast<int64_t>(k + 1);
            }
        capacities = distinct(std::move(capacities));
        if (std::find(capacities.begin(), capacities.end(), roomiest) == capacities.end())
            capacities.push_back(roomiest);
        const auto throughputs =
            distinct(std::vector<double>(ranks_.throughput.begin(), ranks_.throughput.end()));
        std::set<std::vector<Index>> seen;
        for (const int64_t capacity : capacities) {
            for (const double throughput : throughputs) {
                std::vector<Index> members;
                for (Index r = 0; r < count_; ++r)
                    if (ranks_.capacity[r] >= capacity && ranks_.throughput[r] >= throughput)
                        members.push_back(r);
                if (members.empty() || !seen.insert(members).second) continue;
                pools_.push_back(pool_of(std::move(members)));
            }
        }
    }

    Pool pool_of(std::vector<Index> members) const {
        Pool pool{
            std::numeric_limits<int64_t>::max(), infinity, std::numeric_limits<int64_t>::max(), {}, {}, {}};
        for (const Index r : members) {
            pool.capacity = std::min(pool.capacity, ranks_.capacity[r]);
            pool.throughput = std::min(pool.throughput, ranks_.throughput[r]);
            pool.stages = std::min(pool.stages, ranks_.stages[r]);
            const size_t node = static_cast<size_t>(r / ranks_.ranks_per_node);
            if (pool.nodes.size() <= node) pool.nodes.resize(node + 1);
            pool.nodes[node].push_back(r);
        }
        pool.order = std::move(members);
        if (ranks_.two_level && ranks_.ranks_per_node > 1)
            for (size_t node = 0; node < pool.nodes.size(); ++node)
                if (static_cast<Index>(pool.nodes[node].size()) == ranks_.ranks_per_node)
                    pool.whole.push_back(static_cast<Index>(node));
        return pool;
    }

    bool before(Index a, Index b) const { return load_[a] != load_[b] ? load_[a] < load_[b] : a < b; }

    // Seconds of a whole sequence on one rank.
    double alone(Index i) const { return sequences_.attention[i] + sequences_.linear[i]; }

    // Seconds of sequence i on each of `size` ranks of a pool; keys go around `width` of them, and on to the
    // next.
    double seconds(Index i, Index size, const Pool& pool, bool across, Index width) const {
        const double n = static_cast<double>(size), w = static_cast<double>(width);
        const double share = static_cast<double>(sequences_.lengths[i]) / n;
        const double near = share * ranks_.node_token + ranks_.hop,
                     far = share * ranks_.network_token + ranks_.hop;
        const double inner = across && width == size ? far : near;
        const double outer = share * ranks_.network_token * static_cast<double>(ranks_.sharing) + ranks_.hop;
        const double ring =
            std::max(n / w * (w - 1) * inner, (n / w - 1) * outer) / static_cast<double>(pool.stages);
        return std::max(sequences_.attention[i] / n / pool.throughput, ring) +
               (sequences_.linear[i] / n + ranks_.overhead) / pool.throughput;
    }

    // Fewest ranks of a pool that hold sequence i with as much offloaded as may be.
    Index fewest(Index i, const Pool& pool) const {
        // One part in 1e9 for the rounding of the quotient, far below a token.
        const auto tokens =
            static_cast<int64_t>(static_cast<double>(pool.capacity) / sequences_.resident[i] * (1 + 1e-9));
        return (sequences_.lengths[i] + tokens - 1) / tokens;
    }

    // Most ranks that may share sequence i: each holds two chunks of it, none of them empty.
    Index widest(Index i, Index least) const { return std::max(least, sequences_.lengths[i] / 2); }

    // Fewest ranks that take `budget` seconds at most if the ring hides behind attention; 0: none.
    Index fewest_within(Index i, const Pool& pool, double budget) const {
        const double room = budget * pool.throughput - ranks_.overhead;
        if (room <= 0) return 0;
        const double size = std::ceil(alone(i) / room * (1 - 1e-12));
        return size <= static_cast<double>(count_) ? std::max<Index>(1, static_cast<Index>(size)) : 0;
    }

    bool is_single(Index i) const {
        for (const Pool& pool : pools_)
            if (sequences_.lengths[i] <= pool.capacity &&
                seconds(i, 1, pool, false, 1) <= std::min(targets_.longest, targets_.finish * small))
                return true;
        return false;
    }

    double waste(Index i, Index size, const Pool& pool, double seconds) const {
        return static_cast<double>(size) * seconds - alone(i) / pool.throughput;
    }

    void place_ring(Index i) {
        Candidate best;
        for (const Pool& pool : pools_) {
            const Index least = fewest(i, pool);
            if (least > static_cast<Index>(pool.order.size())) continue;
            within_node(i, pool, least, best);
            if (!best.units.empty()) continue;
            across_nodes(i, pool, least, false, best);
            if (pool.whole.size() > 1) across_nodes(i, pool, least, true, best);
        }
        if (best.units.empty()) earliest(i, best);
        if (best.units.empty())
            throw std::invalid_argument("lengths[" + std::to_string(i) + "] is " +
                                        std::to_string(sequences_.lengths[i]) +
                                        ": no ring of these ranks holds it");
        put(i, best.ranks());
    }

    // Rings of the least-loaded ranks of one node.
    void within_node(Index i, const Pool& pool, Index least, Candidate& best) const {
        if (least > ranks_.ranks_per_node) return;
        std::vector<double> times(static_cast<size_t>(ranks_.ranks_per_node) + 1, infinity);
        const Index most = std::min(ranks_.ranks_per_node, widest(i, least));
        for (Index n = least; n <= most; ++n) times[n] = seconds(i, n, pool, false, n);
        double even = -1;  // load of the last node whose ranks are all equal: another such node is no better
        for (const auto& node : pool.nodes) {
            if (node.empty()) continue;
            if (static_cast<Index>(node.size()) == ranks_.ranks_per_node &&
                load_[node.front()] == load_[node.back()]) {
                if (load_[node.front()] == even) continue;
                even = load_[node.front()];
            }
            double before = 0;
            for (Index n = 1; n <= static_cast<Index>(node.size()); ++n) {
                const double start = load_[node[n - 1]];
                const double idle = static_cast<double>(n - 1) * start - before;
                before += start;
                if (n < least || times[n] > targets_.longest || start + times[n] > targets_.finish) continue;
                const double lost = waste(i, n, pool, times[n]) + idle;
                if (best.better_than(lost, start + times[n])) continue;
                best = {lost, start + times[n], {node.data(), size_t(n)}};
            }
        }
    }

    // Seconds until all ranks of a unit are free: of a node of the pool, or of a rank.
    double level(const Pool& pool, bool whole, Index unit) const {
        return load_[whole ? pool.nodes[unit].back() : unit];
    }

    // Rings of ranks, or of whole nodes, that are free at about the same time, wherever they are.
    void across_nodes(Index i, const Pool& pool, Index least, bool whole, Candidate& best) const {
        const auto& order = whole ? pool.whole : pool.order;
        const Index units = static_cast<Index>(order.size()), each = whole ? ranks_.ranks_per_node : 1;
        const Index most = widest(i, least) / each;
        const auto free_at = [&](Index unit) { return level(pool, whole, unit); };
        for (Index begin = 0; begin < units;) {
            const double first = free_at(order[begin]);
            double start = first;
            for (int tries = 0; tries < 4; ++tries) {
                const double budget = std::min(targets_.longest, targets_.finish - start);
                const Index enough = fewest_within(i, pool, budget);
                if (enough == 0) break;
                const Index count = (std::max(enough, least) + each - 1) / each;
                if (count > most || begin + count > units) break;
                const double last = free_at(order[begin + count - 1]);
                if (last > start) {  // later ranks leave less time, which takes more of them
                    start = last;
                    continue;
                }
                const Index n = count * each;
                const double time = seconds(i, n, pool, count > 1, whole ? each : n);
                if (time > targets_.longest || start + time > targets_.finish) break;
                const Candidate found{
                    0, start + time, {order.data() + begin, size_t(count)}, whole ? &pool : nullptr};
                double idle = 0;
                if (whole || start > first)
                    for (const Index r : found.ranks()) idle += start - load_[r];
                const double lost = waste(i, n, pool, time) + idle;
                if (!best.better_than(lost, found.finish)) {
                    best = found;
                    best.waste = lost;
                }
                break;
            }
            begin = std::upper_bound(order.begin() + begin, order.end(), first,
                                     [&](double value, Index unit) { return value < free_at(unit); }) -
                    order.begin();
        }
    }

    // The ring that ends first, of sizes that double from the fewest ranks that hold it.
    void earliest(Index i, Candidate& best) const {
        for (const Pool& pool : pools_) {
            const Index size = static_cast<Index>(pool.order.size());
            const Index least = fewest(i, pool);
            if (least > size) continue;
            const Index most = std::min(size, widest(i, least));
            const Index wanted = std::clamp(fewest_within(i, pool, targets_.longest), least, most);
            for (Index n = least;; n = std::min(2 * n, most)) {
                consider(i, pool, n, best);
                if (n == most) break;
            }
            consider(i, pool, wanted, best);
        }
    }

    void consider(Index i, const Pool& pool, Index n, Candidate& best) const {
        const Index each = ranks_.ranks_per_node;
        if (n <= each) {
            const double time = seconds(i, n, pool, false, n);
            for (const auto& node : pool.nodes) {
                if (static_cast<Index>(node.size()) < n) continue;
                const double finish = load_[node[n - 1]] + time;
                if (finish < best.finish) best = {0, finish, {node.data(), size_t(n)}};
            }
        }
        const double finish = load_[pool.order[n - 1]] + seconds(i, n, pool, n > 1, n);
        if (finish < best.finish) best = {0, finish, {pool.order.data(), size_t(n)}};
        const Index count = (n + each - 1) / each;
        if (count < 2 || count > static_cast<Index>(pool.whole.size()) || count * each > widest(i, n)) return;
        const double even =
            level(pool, true, pool.whole[count - 1]) + seconds(i, count * each, pool, true, each);
        if (even < best.finish) best = {0, even, {pool.whole.data(), size_t(count)}, &pool};
    }

    // Ranks of a ring, ascending, that keys go around before they go on to the next node (Schedule.widths).
    Index width(const std::vector<Index>& ring) const {
        const Index size = static_cast<Index>(ring.size());
        if (!ranks_.two_level) return size;
        const auto node = [&](Index place) { return ring[place] / ranks_.ranks_per_node; };
        Index each = 1;
        while (each < size && node(each) == node(0)) ++each;
        if (size % each) return size;
        for (Index place = each; place < size; ++place)
            if ((node(place) == node(place - 1)) != (place % each != 0)) return size;
        return each;
    }

    void put(Index i, std::vector<Index>&& ring) {
        std::sort(ring.begin(), ring.end());
        double start = 0;
        Index step = 0;
        Pool slowest{0, infinity, std::numeric_limits<int64_t>::max(), {}, {}, {}};
        for (const Index r : ring) {
            slowest.throughput = std::min(slowest.throughput, ranks_.throughput[r]);
            slowest.stages = std::min(slowest.stages, ranks_.stages[r]);
            start = std::max(start, load_[r]);
            step = std::max(step, step_[r]);
        }
        const bool across = ring.front() / ranks_.ranks_per_node != ring.back() / ranks_.ranks_per_node;
        const double time = seconds(i, static_cast<Index>(ring.size()), slowest, across, width(ring));
        for (const Index r : ring) {
            load_[r] = start + time;
            longest_[r] = std::max(longest_[r], time);
            step_[r] = step + 1;
            open_[r].clear();  // what a ring waits for stays as it is
        }
        if (const Index r = ring.front(); ring.size() == 1 && sequences_.lengths[i] <= ranks_.capacity[r])
            open_[r].push_back(
                {static_cast<Index>(plan_.steps.size()), ranks_.capacity[r] - sequences_.lengths[i], time});
        plan_.pack_of[i] = static_cast<int64_t>(plan_.steps.size());
        plan_.steps.push_back(step);
        plan_.ring_ranks.insert(plan_.ring_ranks.end(), ring.begin(), ring.end());
        plan_.rank_offsets.push_back(static_cast<int64_t>(plan_.ring_ranks.size()));
        reorder(ring);
    }

    // Only the ranks of the last ring have changed, all to the same load.
    void reorder(const std::vector<Index>& changed) {
        std::vector<Index> nodes;
        for (const Index r : changed) {
            changed_[r] = true;
            const Index node = r / ranks_.ranks_per_node;
            if (nodes.empty() || nodes.back() != node) nodes.push_back(node);
        }
        for (Pool& pool : pools_) {
            const auto less = [this](Index a, Index b) { return before(a, b); };
            resort(pool.order, [this](Index r) { return changed_[r]; }, less);
            for (const Index node : nodes)
                if (node < static_cast<Index>(pool.nodes.size()))
                    std::sort(pool.nodes[node].begin(), pool.nodes[node].end(), less);
            resort(
                pool.whole, [&](Index node) { return std::binary_search(nodes.begin(), nodes.end(), node); },
                [&](Index a, Index b) {
                    const double first = level(pool, true, a), second = level(pool, true, b);
                    return first != second ? first < second : a < b;
                });
        }
        for (const Index r : changed) changed_[r] = false;
    }

    // Sorts what is in order but for the changed entries.
    template <typename Changed, typename Less>
    void resort(std::vector<Index>& order, const Changed& changed, const Less& less) {
        kept_.clear();
        moved_.clear();
        for (const Index unit : order) (changed(unit) ? moved_ : kept_).push_back(unit);
        std::sort(moved_.begin(), moved_.end(), less);
        std::merge(kept_.begin(), kept_.end(), moved_.begin(), moved_.end(), order.begin(), less);
    }

    // Seconds until the last rank is done.
    double latest(bool pipelines) const {
        double end = 0;
        for (Index r = 0; r < count_; ++r)
            end = std::max(
                end, load_[r] + (pipelines ? static_cast<double>(ranks_.stages[r] - 1) * longest_[r] : 0.0));
        return end;
    }

    // Evenly if that is within the target; filling rank by rank meets tight targets more often.
    void fill(const std::vector<Index>& singles) {
        const auto before = std::tuple(plan_, load_, longest_, step_, open_);
        place_singles(singles, false);
        const double even = latest(false);
        if (even <= targets_.finish) return;
        auto first = std::tuple(std::move(plan_), std::move(load_), std::move(longest_), std::move(step_),
                                std::move(open_));
        std::tie(plan_, load_, longest_, step_, open_) = before;
        place_singles(singles, true);
        if (latest(false) > even) std::tie(plan_, load_, longest_, step_, open_) = std::move(first);
    }

    // A pack of one rank that takes more sequences.
    struct Open {
        Index pack;
        int64_t room;
        double seconds;
    };

    // Ranks that hold as much and are as fast as each other, by (load, rank).
    struct Class {
        int64_t capacity;
        double throughput;
        std::set<std::pair<double, Index>> ranks;
    };

    std::vector<Class> classes() const {
        std::map<std::pair<int64_t, double>, std::vector<std::pair<double, Index>>> members;
        for (Index r = 0; r < count_; ++r)
            members[{ranks_.capacity[r], ranks_.throughput[r]}].push_back({load_[r], r});
        std::vector<Class> out;
        for (auto& [kind, ranks] : members) {
            std::sort(ranks.begin(), ranks.end());
            out.push_back({kind.first, kind.second, {ranks.begin(), ranks.end()}});
        }
        return out;
    }

    // Longest first: to the fullest rank that stays within the target, or else to the one that is done first;
    // into the fullest of its packs that takes the sequence.
    void place_singles(const std::vector<Index>& singles, bool fullest) {
        std::vector<Class> kinds = classes();
        for (const Index i : singles) {
            const int64_t length = sequences_.lengths[i];
            Class* to = nullptr;
            std::set<std::pair<double, Index>>::iterator place;
            double best = infinity;
            for (Class& kind : kinds) {
                if (kind.capacity < length) continue;
                const double time = alone(i) / kind.throughput, overhead = ranks_.overhead / kind.throughput;
                auto rank = kind.ranks.begin();
                double rating = rank->first + time;
                const auto above = kind.ranks.upper_bound({targets_.finish - time - overhead, count_});
                if (fullest && above != kind.ranks.begin()) {
                    rank = std::prev(above);
                    rating = -rank->first;
                }
                if (rating >= best) continue;
                best = rating;
                to = &kind;
                place = rank;
            }
            const Index r = place->second;
            const double time = alone(i) / to->throughput;
            to->ranks.erase(place);
            Open* pack = nullptr;
            for (Open& o : open_[r])
                if (o.room >= length && o.seconds + time <= targets_.longest &&
                    (!pack || o.room < pack->room))
                    pack = &o;
            if (!pack) {
                const double overhead = ranks_.overhead / to->throughput;
                open_[r].push_back({open_pack(r), ranks_.capacity[r], overhead});
                pack = &open_[r].back();
                load_[r] += overhead;
            }
            pack->room -= length;
            pack->seconds += time;
            plan_.pack_of[i] = pack->pack;
            load_[r] += time;
            longest_[r] = std::max(longest_[r], pack->seconds);
            to->ranks.insert({load_[r], r});
        }
    }

    Index open_pack(Index rank) {
        plan_.steps.push_back(step_[rank]++);
        plan_.ring_ranks.push_back(rank);
        plan_.rank_offsets.push_back(static_cast<int64_t>(plan_.ring_ranks.size()));
        return static_cast<Index>(plan_.steps.size()) - 1;
    }

    const HdpSequences& sequences_;
    const HdpRanks& ranks_;
    const HdpTargets& targets_;
    const Index count_;
    std::vector<double> load_, longest_;
    std::vector<Index> step_;
    std::vector<std::vector<Open>> open_;
    std::vector<Index> kept_, moved_;  // of reorder
    std::vector<char> changed_;
    std::vector<Pool> pools_;
    HdpPlan plan_;
};

}  // namespace

HdpPlan hdp_plan(const HdpSequences& sequences, const HdpRanks& ranks, const HdpTargets& targets) {
    return Planner(sequences, ranks, targets).run();
}

}  // namespace gapless::plan
