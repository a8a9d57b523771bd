// SPDX-License-Identifier: Apache-2.0
// gapless._planner: numpy in, numpy out, no torch. The only file with pybind11.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/plan/exact.h"
#include "csrc/plan/hdp.h"
#include "csrc/plan/packing.h"
#include "csrc/plan/varlen.h"
#include "csrc/plan/zeppelin.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

/// A numpy array that owns the vector's memory.
template <class T>
Array<T> release(std::vector<T>&& values) {
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    py::capsule owner(owned.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
    const std::vector<T>* vector = owned.release();
    return Array<T>(static_cast<py::ssize_t>(vector->size()), vector->data(), owner);
}

void check_cu_seqlens(const Array<int64_t>& cu_seqlens, const std::string& name, int64_t total) {
    const auto entries = view(cu_seqlens);
    const py::gil_scoped_release unlocked;
    gapless::plan::check_cu_seqlens(entries, name, total);
}

std::pair<Array<int32_t>, Array<int32_t>> varlen_tiles(const Array<int32_t>& cu_seqlens_q,
                                                       const Array<int32_t>& cu_seqlens_k, int64_t block_q,
                                                       int64_t block_k, int64_t left, int64_t right,
                                                       const std::optional<Array<int32_t>>& q_offset) {
    const auto queries = view(cu_seqlens_q), keys = view(cu_seqlens_k);
    const auto offsets = q_offset ? view(*q_offset) : std::span<const int32_t>{};
    gapless::plan::VarlenTiles tiles;
    {
        const py::gil_scoped_release unlocked;
        tiles = gapless::plan::varlen_tiles(queries, keys, block_q, block_k, {left, right}, offsets);
    }
    return {release(std::move(tiles.query)), release(std::move(tiles.key))};
}

Array<int64_t> best_fit_decreasing(const Array<int64_t>& sizes, int64_t capacity) {
    const auto items = view(sizes);
    std::vector<int64_t> assignment;
    {
        const py::gil_scoped_release unlocked;
        assignment = gapless::plan::best_fit_decreasing(items, capacity);
    }
    return release(std::move(assignment));
}

Array<int64_t> karmarkar_karp(const Array<double>& costs, int64_t bins, bool equal_size) {
    const auto items = view(costs);
    std::vector<int64_t> assignment;
    {
        const py::gil_scoped_release unlocked;
        assignment = gapless::plan::karmarkar_karp(items, bins, equal_size);
    }
    return release(std::move(assignment));
}

gapless::plan::PackingProblem packing_problem(const Array<double>& costs, const Array<int64_t>& sizes,
                                              const Array<double>& speeds, const Array<int64_t>& longest,
                                              int64_t capacity, int64_t most_items) {
    return {view(costs), view(sizes), view(speeds), view(longest), capacity, most_items};
}

Array<int64_t> longest_first(const Array<double>& costs, const Array<int64_t>& sizes,
                             const Array<double>& speeds, const Array<int64_t>& longest, int64_t capacity,
                             int64_t most_items) {
    const auto problem = packing_problem(costs, sizes, speeds, longest, capacity, most_items);
    std::vector<int64_t> assignment;
    {
        const py::gil_scoped_release unlocked;
        assignment = gapless::plan::longest_first(problem);
    }
    return release(std::move(assignment));
}

Array<int64_t> pack(const Array<double>& costs, const Array<int64_t>& sizes, const Array<double>& speeds,
                    const Array<int64_t>& longest, int64_t capacity, int64_t most_items, int64_t effort) {
    const auto problem = packing_problem(costs, sizes, speeds, longest, capacity, most_items);
    std::vector<int64_t> assignment;
    {
        const py::gil_scoped_release unlocked;
        assignment = gapless::plan::pack(problem, effort);
    }
    return release(std::move(assignment));
}

Array<int64_t> refine_packing(const Array<double>& costs, const Array<int64_t>& sizes,
                              const Array<double>& speeds, const Array<int64_t>& longest, int64_t capacity,
                              int64_t most_items, const Array<int64_t>& assignment, int64_t effort) {
    const auto problem = packing_problem(costs, sizes, speeds, longest, capacity, most_items);
    const auto given = view(assignment);
    std::vector<int64_t> refined(given.begin(), given.end());
    {
        const py::gil_scoped_release unlocked;
        gapless::plan::refine(problem, refined, effort);
    }
    return release(std::move(refined));
}

std::tuple<double, bool, Array<uint32_t>, Array<uint32_t>> exact_schedule(const Array<double>& seconds,
                                                                          int sequences, int ranks,
                                                                          int64_t most_states) {
    const auto table = view(seconds);
    gapless::plan::ExactSchedule found;
    {
        const py::gil_scoped_release unlocked;
        found = gapless::plan::exact_schedule(table, sequences, ranks, most_states);
    }
    return {found.makespan, found.proven, release(std::move(found.sets)), release(std::move(found.ranks))};
}

py::tuple hdp_plan(const Array<int64_t>& lengths, const Array<double>& attention, const Array<double>& linear,
                   const Array<double>& resident, const Array<int64_t>& capacity,
                   const Array<double>& throughput, const Array<int64_t>& stages, int64_t ranks_per_node,
                   double overhead, double node_token, double network_token, int64_t sharing, double hop,
                   bool two_level, double finish, double longest) {
    const gapless::plan::HdpSequences sequences{view(lengths), view(attention), view(linear), view(resident)};
    const gapless::plan::HdpRanks ranks{
        view(capacity), view(throughput), view(stages), ranks_per_node, overhead, node_token,
        network_token,  sharing,          hop,          two_level};
    gapless::plan::HdpPlan plan;
    {
        const py::gil_scoped_release unlocked;
        plan = gapless::plan::hdp_plan(sequences, ranks, {finish, longest});
    }
    return py::make_tuple(release(std::move(plan.pack_of)), release(std::move(plan.rank_offsets)),
                          release(std::move(plan.ring_ranks)), release(std::move(plan.steps)), plan.finish,
                          plan.makespan);
}

py::tuple zone_plan(const Array<int64_t>& lengths, const Array<double>& attention,
                    const Array<int64_t>& capacity, const Array<double>& speed, int64_t ranks_per_node,
                    double token, double near, double far, double outer, double hop, double overhead,
                    bool whole_nodes, double piece, double level, double fullness, int64_t most_steps) {
    const auto tokens = view(lengths);
    const auto seconds = view(attention);
    const gapless::plan::ZoneRanks ranks{view(capacity), view(speed), ranks_per_node, token,      near, far,
                                         outer,          hop,         overhead,       whole_nodes};
    gapless::plan::ZonePlan plan;
    {
        const py::gil_scoped_release unlocked;
        plan = gapless::plan::zone_plan(tokens, seconds, ranks, {piece, level, fullness, most_steps});
    }
    return py::make_tuple(release(std::move(plan.step)), release(std::move(plan.offsets)),
                          release(std::move(plan.ranks)), release(std::move(plan.end)));
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
    m.doc() = "Plans: which tiles exist, in which order. Arrays are taken as they are, never converted.";
    m.def("check_cu_seqlens", &check_cu_seqlens, py::arg("cu_seqlens").noconvert(), py::arg("name"),
          py::arg("total"));
    m.def("varlen_tiles", &varlen_tiles, py::arg("cu_seqlens_q").noconvert(),
          py::arg("cu_seqlens_k").noconvert(), py::arg("block_q"), py::arg("block_k"), py::arg("left"),
          py::arg("right"), py::arg("q_offset").noconvert() = py::none());
    m.def("best_fit_decreasing", &best_fit_decreasing, py::arg("sizes").noconvert(), py::arg("capacity"));
    m.def("karmarkar_karp", &karmarkar_karp, py::arg("costs").noconvert(), py::arg("bins"),
          py::arg("equal_size"));
    m.def("longest_first", &longest_first, py::arg("costs").noconvert(), py::arg("sizes").noconvert(),
          py::arg("speeds").noconvert(), py::arg("longest").noconvert(), py::arg("capacity"),
          py::arg("most_items"));
    m.def("pack", &pack, py::arg("costs").noconvert(), py::arg("sizes").noconvert(),
          py::arg("speeds").noconvert(), py::arg("longest").noconvert(), py::arg("capacity"),
          py::arg("most_items"), py::arg("effort"));
    m.def("refine_packing", &refine_packing, py::arg("costs").noconvert(), py::arg("sizes").noconvert(),
          py::arg("speeds").noconvert(), py::arg("longest").noconvert(), py::arg("capacity"),
          py::arg("most_items"), py::arg("assignment").noconvert(), py::arg("effort"));
    m.def("exact_schedule", &exact_schedule, py::arg("seconds").noconvert(), py::arg("sequences"),
          py::arg("ranks"), py::arg("most_states"));
    m.def("hdp_plan", &hdp_plan, py::arg("lengths").noconvert(), py::arg("attention").noconvert(),
          py::arg("linear").noconvert(), py::arg("resident").noconvert(), py::arg("capacity").noconvert(),
          py::arg("throughput").noconvert(), py::arg("stages").noconvert(), py::kw_only(),
          py::arg("ranks_per_node"), py::arg("overhead"), py::arg("node_token"), py::arg("network_token"),
          py::arg("sharing"), py::arg("hop"), py::arg("two_level"), py::arg("finish"), py::arg("longest"));
    m.def("zone_plan", &zone_plan, py::arg("lengths").noconvert(), py::arg("attention").noconvert(),
          py::arg("capacity").noconvert(), py::arg("speed").noconvert(), py::kw_only(),
          py::arg("ranks_per_node"), py::arg("token"), py::arg("near"), py::arg("far"), py::arg("outer"),
          py::arg("hop"), py::arg("overhead"), py::arg("whole_nodes"), py::arg("piece"), py::arg("level"),
          py::arg("fullness"), py::arg("most_steps"));
    m.def("hidden_ranks", &gapless::plan::hidden_ranks, py::arg("attention"), py::arg("transfer"),
          py::arg("hop"), py::arg("most"));
}
