// SPDX-License-Identifier: Apache-2.0
// gapless._planner: numpy in, numpy out, no torch. The only file with pybind11.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "csrc/plan/varlen.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

/// A numpy array that owns the vector's memory.
Array<int32_t> release(std::vector<int32_t>&& values) {
    auto owned = std::make_unique<std::vector<int32_t>>(std::move(values));
    py::capsule owner(owned.get(), [](void* p) { delete static_cast<std::vector<int32_t>*>(p); });
    const std::vector<int32_t>* vector = owned.release();
    return Array<int32_t>(static_cast<py::ssize_t>(vector->size()), vector->data(), owner);
}

void check_cu_seqlens(const Array<int64_t>& cu_seqlens, const std::string& name, int64_t total) {
    const auto entries = view(cu_seqlens);
    const py::gil_scoped_release unlocked;
    gapless::plan::check_cu_seqlens(entries, name, total);
}

std::pair<Array<int32_t>, Array<int32_t>> varlen_tiles(const Array<int32_t>& cu_seqlens_q,
                                                       const Array<int32_t>& cu_seqlens_k, int64_t block_q,
                                                       int64_t block_k, int64_t left, int64_t right) {
    const auto queries = view(cu_seqlens_q), keys = view(cu_seqlens_k);
    gapless::plan::VarlenTiles tiles;
    {
        const py::gil_scoped_release unlocked;
        tiles = gapless::plan::varlen_tiles(queries, keys, block_q, block_k, {left, right});
    }
    return {release(std::move(tiles.query)), release(std::move(tiles.key))};
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
    m.doc() = "Plans: which tiles exist, in which order. Arrays are taken as they are, never converted.";
    m.def("check_cu_seqlens", &check_cu_seqlens, py::arg("cu_seqlens").noconvert(), py::arg("name"),
          py::arg("total"));
    m.def("varlen_tiles", &varlen_tiles, py::arg("cu_seqlens_q").noconvert(),
          py::arg("cu_seqlens_k").noconvert(), py::arg("block_q"), py::arg("block_k"), py::arg("left"),
          py::arg("right"));
}
