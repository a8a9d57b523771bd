// SPDX-License-Identifier: Apache-2.0
#include "csrc/plan/exact.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace gapless::plan {
namespace {

constexpr int kMaxRanks = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// When each rank is free, ascending (ranks are equal, so only that matters), and how it came to that.
struct State {
    std::array<double, kMaxRanks> free;
    int32_t parent;   ///< among the states of the set without `pack`
    uint32_t pack;    ///< the sequences of the last pack
    uint32_t places;  ///< bit i: the last pack ran on the ranks that were the i-th to be free
};

/// Insertion sort: of four at most.
template <class T>
void ascend(std::array<T, kMaxRanks>& values, int count) {
    for (int i = 1; i < count; ++i) {
        for (int k = i; k > 0 && values[k] < values[k - 1]; --k) std::swap(values[k], values[k - 1]);
    }
}

class Search {
  public:
    Search(std::span<const double> seconds, int sequences, int ranks)
        : seconds_(seconds), sequences_(sequences), ranks_(ranks), all_((1u << sequences) - 1) {
        least_area();
    }

    /// Finishes sets of sequences in ascending order, since a set only grows. At most `width` states of each
    /// are kept, those of the least bound; returns whether none was dropped.
    bool run(int64_t width, double below) {
        states_.assign(size_t{all_} + 1, {});
        states_[0].push_back({{}, -1, 0, 0});
        below_ = below;
        bool whole = true;
        for (uint32_t done = 0; done < all_; ++done) {
            auto& states = states_[done];
            whole &= keep(done, states, width);
            const uint32_t left = all_ & ~done;
            for (uint32_t pack = left; pack; pack = (pack - 1) & left) {
                for (uint32_t places = 1; places < (1u << ranks_); ++places) extend(done, pack, places);
            }
        }
        return whole;
    }

    /// The end of the best state of all sequences, or infinity.
    double best() const {
        double least = kInfinity;
        for (const State& s : states_[all_]) least = std::min(least, s.free[ranks_ - 1]);
        return least;
    }

    /// The packs of that state, their ranks by number.
    void trace(ExactSchedule* out) const {
        std::vector<const State*> path;
        uint32_t done = all_;
        const auto& last = states_[all_];
        const State* state = &*std::min_element(
            last.begin(), last.end(),
            [&](const State& a, const State& b) { return a.free[ranks_ - 1] < b.free[ranks_ - 1]; });
        for (; state->parent >= 0; state = &states_[done][size_t(state->parent)]) {
            path.push_back(state);
            done &= ~state->pack;
        }
        std::array<std::pair<double, uint32_t>, kMaxRanks> free{};  // of each rank, ascending
        for (int r = 0; r < ranks_; ++r) free[r].second = uint32_t(r);
        for (auto it = path.rbegin(); it != path.rend(); ++it) {
            const State& step = **it;
            double start = 0;
            uint32_t members = 0;
            for (int i = 0; i < ranks_; ++i) {
                if (step.places >> i & 1) start = free[i].first, members |= 1u << free[i].second;
            }
            const double end = start + seconds(std::popcount(step.places), step.pack);
            for (int i = 0; i < ranks_; ++i) {
                if (step.places >> i & 1) free[i].first = end;
            }
            ascend(free, ranks_);
            out->sets.push_back(step.pack), out->ranks.push_back(members);
        }
    }

  private:
    double seconds(int ring, uint32_t pack) const { return seconds_[size_t(ring - 1) << sequences_ | pack]; }

    /// The fewest seconds, added up over ranks, in which each set can be computed.
    void least_area() {
        area_.assign(size_t{all_} + 1, kInfinity);
        area_[0] = 0;
        for (uint32_t set = 1; set <= all_; ++set) {
            const uint32_t low = set & -set, rest = set ^ low;
            for (uint32_t more = rest;; more = (more - 1) & rest) {
                for (int ring = 1; ring <= ranks_; ++ring) {
                    const double area = ring * seconds(ring, low | more) + area_[rest & ~more];
                    area_[set] = std::min(area_[set], area);
                }
                if (!more) break;
            }
        }
    }

    double bound(uint32_t done, const State& s) const {
        double sum = area_[all_ & ~done];
        for (int r = 0; r < ranks_; ++r) sum += s.free[r];
        return std::max(s.free[ranks_ - 1], sum / ranks_);
    }

    void extend(uint32_t done, uint32_t pack, uint32_t places) {
        const double takes = seconds(std::popcount(places), pack);
        if (takes == kInfinity) return;
        const int last = 31 - std::countl_zero(places);
        auto& grown = states_[done | pack];
        const auto& states = states_[done];
        for (size_t i = 0; i < states.size(); ++i) {
            State next{states[i].free, int32_t(i), pack, places};
            const double end = next.free[last] + takes;
            for (int r = 0; r < ranks_; ++r) {
                if (places >> r & 1) next.free[r] = end;
            }
            ascend(next.free, ranks_);
            if (bound(done | pack, next) < below_) grown.push_back(next);
        }
    }

    /// Drops states that are no better than another, and the worst beyond `width`; whether it dropped none of
    /// those.
    bool keep(uint32_t done, std::vector<State>& states, int64_t width) const {
        // Sums in another order differ in the last bits: such loads are the same.
        const auto near = [](double a, double b) { return std::abs(a - b) <= 1e-12 * std::max(a, b); };
        std::sort(states.begin(), states.end(),
                  [](const State& a, const State& b) { return a.free < b.free; });
        size_t kept = 0;
        for (const State& s : states) {
            bool worse = false;
            // Whoever is no later on any rank comes before in this order, mostly shortly before.
            for (size_t k = kept; k-- > 0 && kept - k <= 64 && !worse;) {
                worse = true;
                for (int r = 0; r < ranks_; ++r) {
                    const double a = states[k].free[r], b = s.free[r];
                    worse &= a <= b || near(a, b);
                }
            }
            if (!worse) states[kept++] = s;
        }
        states.resize(kept);
        if (int64_t(kept) <= width) return true;
        std::nth_element(states.begin(), states.begin() + width, states.end(),
                         [&](const State& a, const State& b) {
                             const double first = bound(done, a), second = bound(done, b);
                             return first != second ? first < second : a.free < b.free;
                         });
        states.resize(size_t(width));
        return false;
    }

    std::span<const double> seconds_;
    int sequences_, ranks_;
    uint32_t all_;
    double below_ = kInfinity;  ///< a schedule of this length is known
    std::vector<double> area_;
    std::vector<std::vector<State>> states_;
};

}  // namespace

ExactSchedule exact_schedule(std::span<const double> seconds, int sequences, int ranks, int64_t most_states) {
    if (ranks < 1 || ranks > kMaxRanks) {
        throw std::invalid_argument("ranks is " + std::to_string(ranks) + ": it has to be between 1 and 4");
    }
    if (sequences < 1 || sequences > 16) {
        throw std::invalid_argument("there are " + std::to_string(sequences) +
                                    " sequences: the exact search takes 1 to 16");
    }
    if (seconds.size() != size_t(ranks) << sequences) {
        throw std::invalid_argument(
            "seconds has " + std::to_string(seconds.size()) +
            " entries: it has to have one for each size of ring and set of sequences");
    }
    if (most_states < 1) {
        throw std::invalid_argument("most_states is " + std::to_string(most_states) +
                                    ": it has to be at least 1");
    }
    Search search(seconds, sequences, ranks);
    ExactSchedule out{kInfinity, false, {}, {}};
    // A narrow beam gives a schedule that the search only has to beat.
    for (const int64_t width : {std::min<int64_t>(most_states, 32), most_states}) {
        const bool whole = search.run(width, out.makespan);
        if (search.best() < out.makespan) {
            out.makespan = search.best(), out.sets.clear(), out.ranks.clear();
            search.trace(&out);
        }
        out.proven = whole;
        if (whole) break;
    }
    return out;
}

}  // namespace gapless::plan
