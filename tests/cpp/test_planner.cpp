// SPDX-License-Identifier: Apache-2.0
// The planner core, with neither Python nor torch.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "csrc/plan/varlen.h"

using gapless::plan::check_cu_seqlens;
using gapless::plan::varlen_tiles;
using gapless::plan::visible_cells;
using gapless::plan::Window;
using Rows = std::vector<int32_t>;

namespace {

std::string message(std::vector<int64_t> cu, int64_t total) {
    try {
        check_cu_seqlens(std::span<const int64_t>(cu), "cu", total);
    } catch (const std::invalid_argument& e) {
        return e.what();
    }
    return "";
}

template <class F>
bool throws(F&& f) {
    try {
        f();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void test_messages() {
    CHECK(message({0}, 0).empty());
    CHECK(message({0, 4, 4, 9}, 9).empty());
    CHECK(message({0, 4}, -1).empty());
    CHECK(message({}, -1) == "cu is empty: it has to be [batch + 1]");
    CHECK(message({2, 4}, 4) == "cu[0] is 2: it has to be 0");
    CHECK(message({0, 5, 3}, 3) == "cu[2] is 3, after 5: it has to be at least the entry before it");
    CHECK(message({0, 5}, 6) == "cu[1] is 5, the last: it has to be 6, the number of tokens");
    CHECK(message({0, int64_t{1} << 31}, -1) ==
          "cu[1] is 2147483648: it has to fit int32, at most 2147483647");
}

void test_visible_cells_against_counting() {
    for (int64_t len_q : {0, 1, 5, 9}) {
        for (int64_t len_k : {0, 1, 4, 12}) {
            for (int64_t left : {-1, 0, 1, 3, 40}) {
                for (int64_t right : {-1, 0, 2, 40}) {
                    for (int64_t begin = 0; begin < len_q; begin += 4) {
                        const int64_t end = std::min<int64_t>(begin + 4, len_q);
                        uint64_t count = 0;
                        for (int64_t i = begin; i < end; ++i) {
                            for (int64_t j = 0; j < len_k; ++j) {
                                const int64_t offset = j - (i + len_k - len_q);
                                count += (left < 0 || offset >= -left) && (right < 0 || offset <= right);
                            }
                        }
                        CHECK(visible_cells(begin, end, len_q, len_k, {left, right}) == count);
                    }
                }
            }
        }
    }
}

void test_visible_cells_from_a_position() {
    for (int64_t first : {-20, -3, 0, 2, 6, 13, 30})
        for (int64_t count : {0, 1, 5})
            for (int64_t len_k : {0, 1, 7})
                for (int64_t left : {-1, 0, 3, 40})
                    for (int64_t right : {-1, 0, 2, 40}) {
                        uint64_t seen = 0;
                        for (int64_t p = first; p < first + count; ++p)
                            for (int64_t j = 0; j < len_k; ++j)
                                seen += (left < 0 || j >= p - left) && (right < 0 || j <= p + right);
                        CHECK(visible_cells(first, count, len_k, {left, right}) == seen);
                    }
    constexpr int64_t most = std::numeric_limits<int32_t>::max(), least = std::numeric_limits<int32_t>::min();
    constexpr uint64_t n = most;
    CHECK(visible_cells(most, most, most, {-1, 0}) == n * n);
    CHECK(visible_cells(most, most, most, {0, 0}) == 0);
    CHECK(visible_cells(least, most, most, {-1, 0}) == 0);
    CHECK(visible_cells(least, most, most, {-1, most}) == n * (n - 1) / 2);
}

void test_visible_cells_of_huge_sequences() {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    constexpr uint64_t n = most;
    CHECK(visible_cells(0, most, most, most, {-1, -1}) == n * n);
    CHECK(visible_cells(0, most, most, most, {-1, 0}) == n * (n + 1) / 2);
    CHECK(visible_cells(0, most, most, most, {0, 0}) == n);
    const int64_t beyond = std::numeric_limits<int64_t>::max();
    CHECK(visible_cells(0, most, most, most, {beyond, beyond}) == n * n);
}

void test_tiles() {
    const Rows cu_q{0, 3, 3, 8, 10}, cu_k{0, 3, 5, 5, 7};
    const auto [query, key] = varlen_tiles(cu_q, cu_k, 2, 2, {-1, 0});
    // Costs: sequence 0 has 3 and 3 cells, sequence 2 none in any tile, sequence 3 has 3.
    CHECK((query ==
           Rows{0, 0, 2, 0, 2, 3, 3, 0, 2, 2, 0, 2, 2, 2, 4, 2, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1}));
    // Sequence 1 has keys but no queries, sequence 2 queries but no keys.
    CHECK((key == Rows{0, 0, 2, 0, 2, 3, 3, 0, 2, 1, 0, 2, 2, 0, 0, -1, -1, -1, -1, -1, -1}));
}

void test_tiles_of_moved_queries() {
    const Rows cu_q{0, 3, 3, 8, 10}, cu_k{0, 3, 5, 5, 7}, first{-2, 0, 9, 100};
    const auto [query, key] = varlen_tiles(cu_q, cu_k, 2, 2, {-1, 0}, first);
    // Costs: sequence 0 has 0 and 1 cells, sequence 2 none in any tile, sequence 3 has 4.
    CHECK((query ==
           Rows{3, 0, 2, 0, 2, 3, 0, 0, 2, 2, 0, 2, 2, 2, 4, 2, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1}));
    CHECK((key == Rows{3, 0, 2, 0, 0, 2, 0, 2, 3, 1, 0, 2, 2, 0, 0, -1, -1, -1, -1, -1, -1}));
    const Rows three{0, 0, 0};
    CHECK(throws([&] { varlen_tiles(cu_q, cu_k, 2, 2, {}, three); }));
}

void test_edges() {
    const Rows none{0}, three_empty{0, 0, 0, 0};
    CHECK(varlen_tiles(none, none, 8, 8, {}).query.empty());
    CHECK((varlen_tiles(three_empty, three_empty, 8, 8, {}).key == Rows(9, -1)));
    const Rows cu{0, 4}, other{0, 2, 4}, bad{0, 4, 3};
    CHECK(throws([&] { varlen_tiles(cu, other, 8, 8, {}); }));
    CHECK(throws([&] { varlen_tiles(bad, other, 8, 8, {}); }));
    CHECK(throws([&] { varlen_tiles(other, bad, 8, 8, {}); }));
    CHECK(throws([&] { varlen_tiles(cu, cu, 0, 8, {}); }));
    CHECK(throws([&] { varlen_tiles(cu, cu, 8, -1, {}); }));
    CHECK(throws([&] { varlen_tiles(cu, cu, 8, 8, {-2, 0}); }));
}

}  // namespace

int main() {
    test_messages();
    test_visible_cells_against_counting();
    test_visible_cells_from_a_position();
    test_visible_cells_of_huge_sequences();
    test_tiles();
    test_tiles_of_moved_queries();
    test_edges();
    return result();
}
