// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/expert_ids.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string>
#include <type_traits>

#include "csrc/cpu/scratch.h"
#include "csrc/cpu/wait.h"
#include "csrc/cpu/work.h"

// Groups are unrolled: stores to neighbours that follow each other are one.
#define GAPLESS_UNROLL _Pragma("GCC unroll 8")

namespace gapless::cpu {
namespace {

constexpr int64_t kPairsPerPart = 1 << 14;  // fewer are done before another thread has fetched its share
constexpr int64_t kChunk = 256;             // pairs that are looked at one by one after one without an expert
constexpr int64_t kGroup = 8;

/// Tokens cut into parts, one after another. Each is sorted on its own and prefix sums put them together, so
/// the result does not tell how many there were. Adding up `counters` for each must not take longer than the
/// sorting.
struct Parts {
    int64_t count, tokens;
    Parts(const ExpertIds& in, int64_t counters, const Threads& threads) : tokens(in.valid) {
        const int64_t pairs = in.valid * in.top_k;
        count = std::max<int64_t>(
            1, std::min({threads.count, pairs / kPairsPerPart, pairs / (counters + 1), in.valid}));
    }
    int64_t begin(int64_t part) const { return tokens * part / count; }
};

/// Counters of a part. Those of the first part are results, and the others' are added to them.
struct Counters {
    int32_t *experts, *logical;
    bool none = false;      ///< some pair has no expert
    int64_t wrong = -1;     ///< the first pair with a number out of range
    int64_t pairs = 0;      ///< that counts_before has counted
    int64_t previous = -1;  ///< the part that the same thread has looked at before
};

/// Calls f with a pointer to the numbers as they are typed.
template <class F>
auto typed(const Ids& ids, const F& f) {
    return ids.wide ? f(static_cast<const int64_t*>(ids.data)) : f(static_cast<const int32_t*>(ids.data));
}

/// One comparison for both ends.
bool within(int64_t id, int64_t limit) { return uint64_t(id) < uint64_t(limit); }
bool fine(int64_t id, int64_t limit) { return uint64_t(id) + 1 <= uint64_t(limit); }  // -1 too

template <int64_t kCount, class Id>
bool all_within(const Id* ids, int64_t limit) {
    GAPLESS_UNROLL for (int64_t i = 0; i < kCount; ++i) if (!within(ids[i], limit)) return false;
    return true;
}

/// The pairs of [begin, end), at most kChunk, that have an expert. No branch depends on the ids.
template <class Id>
int64_t with_expert(const Id* ids, int64_t begin, int64_t end, int64_t* pairs) {
    int64_t count = 0;
    for (int64_t p = begin; p < end; ++p) pairs[count] = p, count += 1 + (int64_t{ids[p]} >> 63);
    return count;
}

/// Counts the pairs [begin, end) of each expert; `rank` of a pair becomes the number of those before it.
template <bool kRank, class Id>
void count_pairs(const Id* __restrict ids, int64_t begin, int64_t end, int64_t experts,
                 int32_t* __restrict counts, int32_t* __restrict rank, Counters& mine) {
    for (int64_t p = begin; p < end;) {
        for (; p + kGroup <= end && all_within<kGroup>(ids + p, experts); p += kGroup) {
            int32_t before[kGroup];
            GAPLESS_UNROLL for (int64_t i = 0; i < kGroup; ++i) before[i] = counts[ids[p + i]]++;
            GAPLESS_UNROLL for (int64_t i = 0; kRank && i < kGroup; ++i) rank[p + i] = before[i];
        }
        if (p == end) return;
        // Some of these have none, and more may: jumps that nobody foresees would take longer.
        const int64_t stop = std::min(end, p + kChunk);
        for (int64_t i = p; i < stop; ++i)
            if (!fine(ids[i], experts)) {
                mine.wrong = i;
                return;
            }
        int64_t pairs[kChunk];
        const int64_t some = with_expert(ids, p, stop, pairs);
        mine.none |= some < stop - p;
        for (int64_t i = 0; i < some; ++i) {
            const int32_t before = counts[ids[pairs[i]]]++;
            if constexpr (kRank) rank[pairs[i]] = before;
        }
        p = stop;
    }
}

/// Ids after the map, of tokens from `t` on whose numbers are all in range; the first other one. kTopK is
/// top_k, or 0: a loop of known length is faster.
template <int64_t kTopK, class Id, class Adapter>
int64_t map_tokens(const Id* __restrict ids, const Adapter* __restrict adapter_ids,
                   const int32_t* __restrict base, const ExpertIds& in, const Rerouting& r, int64_t t,
                   int64_t end) {
    Id* __restrict out = static_cast<Id*>(r.ids);
    const int64_t top_k = kTopK ? kTopK : in.top_k, experts = r.experts;
    for (int64_t p = t * top_k; t < end; ++t) {
        const int64_t adapter = adapter_ids[t];
        if (!fine(adapter, r.adapters)) [[unlikely]]
            return t;
        const int32_t* __restrict row = adapter < 0 ? base : r.map + adapter * experts;
        GAPLESS_UNROLL
        for (const int64_t stop = p + top_k; p < stop; ++p) {
            const int64_t id = ids[p];
            if (!within(id, experts)) [[unlikely]]
                return t;
            const int32_t slot = row[id];
            if (slot < 0) [[unlikely]]
                return t;
            out[p] = Id(slot);
        }
    }
    return t;
}

/// The same of the tokens [t, end), some of which have choices without an expert.
template <class Id, class Adapter>
void map_choices(const Id* __restrict ids, const Adapter* __restrict adapter_ids,
                 const int32_t* __restrict base, const ExpertIds& in, const Rerouting& r, int64_t t,
                 int64_t end, Counters& mine) {
    Id* __restrict out = static_cast<Id*>(r.ids);
    for (int64_t p = t * in.top_k; t < end; ++t) {
        const int64_t adapter = adapter_ids[t];
        const bool known = fine(adapter, r.adapters);
        const int32_t* __restrict row = adapter < 0 || !known ? base : r.map + adapter * r.experts;
        for (const int64_t stop = p + in.top_k; p < stop; ++p) {
            const int64_t id = ids[p], none = id >> 63;
            if (!known || !fine(id, r.experts)) [[unlikely]] {
                mine.wrong = p;
                return;
            }
            const int32_t slot = row[id & ~none];
            out[p] = Id(slot | (slot >> 31) | none);  // negative is -1
        }
    }
}

template <int64_t kTopK, class Id, class Adapter>
void map_ids(const Id* ids, const Adapter* adapter_ids, const int32_t* base, const ExpertIds& in,
             const Rerouting& r, int64_t t, int64_t end, Counters& mine) {
    while (mine.wrong < 0) {
        t = map_tokens<kTopK>(ids, adapter_ids, base, in, r, t, end);
        if (t == end) return;
        const int64_t stop = std::min(end, t + kChunk / kGroup);
        map_choices(ids, adapter_ids, base, in, r, t, stop, mine);
        t = stop;
    }
}

/// From ranks to rows. `first` [experts]: where the pairs of this part begin, of each expert.
template <class Id>
void place_pairs(const Id* __restrict ids, int64_t begin, int64_t end, const int32_t* __restrict first,
                 bool none, int32_t* __restrict inverse, int32_t* __restrict sorted_ids) {
    int64_t p = begin;
    for (; !none && p + kGroup <= end; p += kGroup) {
        int32_t rows[kGroup];
        GAPLESS_UNROLL for (int64_t i = 0; i < kGroup; ++i) rows[i] = inverse[p + i] + first[ids[p + i]];
        GAPLESS_UNROLL for (int64_t i = 0; i < kGroup; ++i) inverse[p + i] = rows[i];
        GAPLESS_UNROLL for (int64_t i = 0; i < kGroup; ++i) sorted_ids[rows[i]] = int32_t(p + i);
    }
    for (int64_t chunk = p; chunk < end; chunk += kChunk) {
        const int64_t stop = std::min(end, chunk + kChunk);
        int64_t pairs[kChunk];
        const int64_t some = with_expert(ids, chunk, stop, pairs);
        for (int64_t i = chunk; i < stop; ++i) inverse[i] |= int32_t(int64_t{ids[i]} >> 63);
        for (int64_t i = 0; i < some; ++i) {
            const int32_t row = inverse[pairs[i]] += first[ids[pairs[i]]];
            sorted_ids[row] = int32_t(pairs[i]);
        }
    }
}

/// A group of the map that leads to the base model's experts: most do.
bool all_own(const int32_t* row, int32_t first) {
    int32_t other = 0;
    GAPLESS_UNROLL for (int32_t i = 0; i < kGroup; ++i) other |= row[i] ^ (first + i);
    return other == 0;
}

/// The counts before the map, of the experts [begin, end), from those after it: an expert's own slot and
/// those of the adapters that have tuned it. Gives their sum, or -1 if the map is not like that. A slot that
/// stands twice in the map counts twice, so if all sums together are the pairs there are, no such slot has
/// any.
int64_t counts_before(const Rerouting& r, const Alignment& a, int64_t begin, int64_t end) {
    std::copy(a.counts + begin, a.counts + end, r.counts + begin);
    for (int64_t i = 0; i < r.adapters; ++i) {
        const int32_t* row = r.map + i * r.experts;
        for (int64_t j = begin; j < end;) {
            if (j + kGroup <= end && all_own(row + j, int32_t(j))) {
                j += kGroup;
                continue;
            }
            for (const int64_t stop = std::min(end, j + kGroup); j < stop; ++j) {
                const int64_t slot = row[j];
                if (slot != j && (slot < r.experts || slot >= a.experts)) return -1;
                r.counts[j] += slot == j ? 0 : a.counts[slot];
            }
        }
    }
    return std::accumulate(r.counts + begin, r.counts + end, int64_t{0});
}

/// Where each expert's group begins; groups are whole blocks.
void sum_offsets(const Alignment& a) {
    const uint32_t size = uint32_t(a.block_size), rest = size - 1;
    const auto sum_groups = [&](const auto& rows) {
        uint32_t sum = 0;
        for (int64_t e = 0; e < a.experts; ++e)
            a.offsets[e] = int32_t(sum), sum += rows(uint32_t(a.counts[e]));
        a.offsets[a.experts] = int32_t(sum);
    };
    if ((size & rest) == 0)
        sum_groups([&](uint32_t count) { return (count + rest) & ~rest; });
    else
        sum_groups([&](uint32_t count) { return count ? (count - 1) / size * size + size : 0; });
}

/// Experts of the blocks, and fillers of the rows without a pair, of the experts [begin, end).
void fill_groups(const Alignment& a, int32_t filler, int64_t begin, int64_t end) {
    const uint32_t size = uint32_t(a.block_size);
    int32_t* blocks = a.expert_ids + uint32_t(a.offsets[begin]) / size;
    for (int64_t e = begin; e < end; ++e) {
        const uint32_t rows = uint32_t(a.offsets[e + 1] - a.offsets[e]), count = uint32_t(a.counts[e]);
        if (rows == 0) continue;
        blocks = std::fill_n(blocks, size == 1 ? rows : rows / size, int32_t(e));
        std::fill_n(a.sorted_ids + a.offsets[e] + count, rows - count, filler);
    }
}

void fill_tail(const Alignment& a, int32_t filler) {
    const int64_t used = a.offsets[a.experts];
    std::fill(a.sorted_ids + used, a.sorted_ids + a.blocks * a.block_size, filler);
    std::fill(a.expert_ids + used / a.block_size, a.expert_ids + a.blocks, -1);
}

[[noreturn]] void refuse(const std::string& where, int64_t value, int64_t limit, const char* of) {
    throw std::runtime_error(where + " is " + std::to_string(value) + ": it has to be -1 or from 0 to " +
                             std::to_string(limit - 1) + ", the " + of);
}

/// Throws what is wrong with a pair.
[[noreturn]] void explain(const ExpertIds& in, const Rerouting* r, const Alignment* a, int64_t pair) {
    const auto number = [](const Ids& ids, int64_t i) {
        return typed(ids, [&](const auto* x) { return int64_t{x[i]}; });
    };
    const int64_t t = pair / in.top_k, k = pair % in.top_k, id = number(in.ids, pair);
    const auto at = [](const char* name, int64_t i, int64_t j) {
        return std::string(name) + "[" + std::to_string(i) + ", " + std::to_string(j) + "]";
    };
    if (!r) refuse(at("ids", t, k), id, a->experts, "experts");
    const int64_t adapter = number(r->adapter_ids, t);
    if (!fine(adapter, r->adapters))
        refuse("adapter_ids[" + std::to_string(t) + "]", adapter, r->adapters, "adapters");
    if (!fine(id, r->experts)) refuse(at("topk_ids", t, k), id, r->experts, "experts of the map");
    if (adapter < 0) refuse(at("topk_ids", t, k), id, a->experts, "experts");
    refuse(at("expert_map", adapter, id), r->map[adapter * r->experts + id], a->experts, "experts");
}

/// Everything that a call asks for; null is what it does not.
struct Run {
    const ExpertIds& in;
    const Rerouting* r;
    const Alignment* a;
    /// Counts before the map cost as much as those after it, unless they follow from these.
    bool follow = r && a && r->experts <= a->experts && 2 * r->adapters * r->experts <= in.valid * in.top_k;
    int64_t experts = a ? a->experts : 0, logical = r && a && !follow ? r->experts : 0;
    Counters* counters = nullptr;
    int32_t* base = nullptr;  ///< the base model's row of the map

    /// Counts pairs that are in range before the map.
    template <class Id>
    void count_before(const Id* ids, int64_t begin, int64_t end, int32_t* counts) const {
        Counters unused;
        count_pairs<false>(ids, begin, end, r->experts, counts, nullptr, unused);
    }

    /// Maps and counts one part.
    void look(const Parts& parts, int64_t part) {
        const int64_t begin = parts.begin(part), end = parts.begin(part + 1), k = in.top_k;
        Counters mine = counters[part];
        if (part > 0) std::fill_n(mine.experts, experts + logical, 0);
        typed(in.ids, [&](const auto* ids) {
            if (!r)
                return count_pairs<true>(ids, begin * k, end * k, experts, mine.experts, a->inverse, mine);
            typed(r->adapter_ids, [&](const auto* adapter_ids) {
                const auto map = [&](auto top_k) {
                    map_ids<top_k()>(ids, adapter_ids, base, in, *r, begin, end, mine);
                };
                switch (k) {
                    case 1:
                        return map(std::integral_constant<int64_t, 1>());
                    case 2:
                        return map(std::integral_constant<int64_t, 2>());
                    case 4:
                        return map(std::integral_constant<int64_t, 4>());
                    case 6:
                        return map(std::integral_constant<int64_t, 6>());
                    case 8:
                        return map(std::integral_constant<int64_t, 8>());
                    default:
                        return map(std::integral_constant<int64_t, 0>());
                }
            });
            if (!a || mine.wrong >= 0) return;
            count_pairs<true>(static_cast<decltype(ids)>(r->ids), begin * k, end * k, experts, mine.experts,
                              a->inverse, mine);
            if (!follow) count_before(ids, begin * k, end * k, mine.logical);
        });
        counters[part] = mine;
    }

    /// Between the two: where each part's pairs of each expert go.
    void add_up(const Parts& parts) const {
        for (int64_t i = 1; i < parts.count; ++i) {
            int32_t* __restrict mine = counters[i].experts, * __restrict sum = a->counts;
            for (int64_t e = 0; e < experts; ++e) {
                const int32_t count = mine[e];
                mine[e] = sum[e], sum[e] += count;
            }
            for (int64_t e = 0; e < logical; ++e) r->counts[e] += counters[i].logical[e];
        }
        sum_offsets(*a);
    }

    /// Puts one part's pairs into their rows, and fills some of the groups.
    void place(const Parts& parts, int64_t part) const {
        const auto share = [&](int64_t count, int64_t i) { return count * i / parts.count; };
        const int32_t filler = int32_t(in.tokens * in.top_k), *first = a->offsets;
        if (part > 0) {
            int32_t* mine = counters[part].experts;
            for (int64_t e = 0; e < experts; ++e) mine[e] += a->offsets[e];
            first = mine;
        }
        typed(r ? Ids{r->ids, in.ids.wide} : in.ids, [&](const auto* ids) {
            place_pairs(ids, parts.begin(part) * in.top_k, parts.begin(part + 1) * in.top_k, first,
                        counters[part].none, a->inverse, a->sorted_ids);
        });
        fill_groups(*a, filler, share(experts, part), share(experts, part + 1));
        if (follow)
            counters[part].pairs =
                counts_before(*r, *a, share(r->experts, part), share(r->experts, part + 1));
        if (part + 1 == parts.count) fill_tail(*a, filler);
    }

    /// The first part that has a number out of range.
    const Counters* wrong(const Parts& parts) const {
        const auto found =
            std::find_if(counters, counters + parts.count, [](const Counters& c) { return c.wrong >= 0; });
        return found == counters + parts.count ? nullptr : found;
    }

    void all(const Threads& threads) {
        const int64_t used = in.valid * in.top_k, unused = in.tokens * in.top_k - used;
        const Parts parts(in, experts + logical, threads);
        int32_t* more = nullptr;
        carve_scratch([&](Carver& memory) {
            counters = memory.take<Counters>(parts.count);
            more = memory.take<int32_t>((parts.count - 1) * (experts + logical));
            base = memory.take<int32_t>(r ? r->experts : 0);
        });
        for (int64_t e = 0; r && e < r->experts; ++e) base[e] = int32_t(e);
        counters[0] = {a ? a->counts : nullptr, logical ? r->counts : nullptr};
        if (a) std::fill_n(a->counts, experts, 0);
        if (logical) std::fill_n(r->counts, logical, 0);
        for (int64_t i = 1; i < parts.count; ++i, more += experts + logical)
            counters[i] = {more, more + experts};

        // Each thread places what it has looked at, once all have been looked at: each part is at some
        // thread.
        std::atomic<int64_t> next{0}, looked{0};
        std::atomic<bool> ready{false};
        const auto work = [&] {
            int64_t mine = -1;
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts.count; mine = i) {
                look(parts, i);
                counters[i].previous = mine;
                if (looked.fetch_add(1, std::memory_order_acq_rel) + 1 == parts.count) {
                    if (a && !wrong(parts)) add_up(parts);
                    ready.store(true, std::memory_order_release);
                }
            }
            if (mine < 0 || !a) return;
            wait_until([&] { return ready.load(std::memory_order_acquire); });
            if (!wrong(parts))
                for (; mine >= 0; mine = counters[mine].previous) place(parts, mine);
        };
        if (parts.count == 1)
            work();
        else
            threads.run(work);
        if (const Counters* found = wrong(parts)) explain(in, r, a, found->wrong);
        if (r)
            typed({r->ids, in.ids.wide}, [&](const auto* ids) {
                std::fill_n(
                    const_cast<std::remove_const_t<std::remove_pointer_t<decltype(ids)>>*>(ids) + used,
                    unused, -1);
            });
        if (!a) return;
        std::fill_n(a->inverse + used, unused, -1);
        if (follow) check_counts(parts, used);
    }

    /// Counts once more if the counts after the map do not tell those before it.
    void check_counts(const Parts& parts, int64_t used) const {
        int64_t pairs = std::accumulate(a->counts, a->counts + experts, int64_t{0});
        for (int64_t i = 0; i < parts.count; ++i) {
            if (counters[i].pairs < 0) pairs = -1;
            if (pairs < 0) break;
            pairs -= counters[i].pairs;
        }
        if (pairs == 0) return;
        std::fill_n(r->counts, r->experts, 0);
        typed(in.ids, [&](const auto* ids) { count_before(ids, 0, used, r->counts); });
    }
};

}  // namespace

void reroute(const ExpertIds& in, const Rerouting& r, const Threads& threads) {
    Run{in, &r, nullptr}.all(threads);
}

void align(const ExpertIds& in, const Alignment& a, const Threads& threads) {
    Run{in, nullptr, &a}.all(threads);
}

void reroute_align(const ExpertIds& in, const Rerouting& r, const Alignment& a, const Threads& threads) {
    Run{in, &r, &a}.all(threads);
}

int64_t max_blocks(int64_t pairs, int64_t experts, int64_t block_size) {
    return std::min(pairs, experts) + std::max<int64_t>(0, pairs - experts) / block_size;
}

}  // namespace gapless::cpu
