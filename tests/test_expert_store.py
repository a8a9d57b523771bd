# SPDX-License-Identifier: Apache-2.0
"""The expert store: memory for what is there, errors for holes, adapters that come and go under others' feet."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapless import _memory
from gapless.experts.backing import CudaBacking, MmapBacking, PaddedBacking, open_backing
from gapless.experts.esft import ExpertAdapter
from gapless.experts.store import ExpertStore
from gapless.experts.store_stats import resident_bytes
from gapless.experts.virtual_tensor import VirtualTensor
from gapless.ops.experts import TunedExperts, fused_experts, grouped_mm

EXPERTS, INTER, HIDDEN = 6, 24, 40
SHAPES = {"gate_up": (2 * INTER, HIDDEN), "down": (HIDDEN, INTER)}
CPU = torch.device("cpu")
BACKINGS = ["mmap", "padded", "cuda"] if _memory.mmap_page() else ["padded"]
needs_mmap = pytest.mark.skipif(not _memory.mmap_page(), reason="needs Linux")


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """A CUDA driver over this process's memory; its calls are written down."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("driver") / "libfakecuda.so"
    source = Path(__file__).parent / "cpp/fake_cuda.cpp"
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", "-o", library, source], check=True)
    played = ctypes.CDLL(str(library))
    played.fake_cuda_log.restype = ctypes.c_char_p
    for name in ("pages", "memories", "reserved"):
        getattr(played, f"fake_cuda_{name}").restype = ctypes.c_size_t
    played.path = str(library)
    return played


@pytest.fixture(params=BACKINGS)
def backing(request):
    """Each backing in turn, the driver's with a driver that is played."""
    if request.param == "cuda":
        return CudaBacking(library=request.getfixturevalue("fake_cuda").path, on_cpu=True)
    return open_backing(request.param, CPU)


def make_store(
    backing="auto", *, layers=2, adapters=3, most=3, dtype=torch.float32, shapes=SHAPES, **options
):
    """A store with a base, and copies of the base's weights: layer -> name -> tensor."""
    store = ExpertStore(
        EXPERTS, layers, shapes, dtype,
        adapters=adapters, max_experts_per_adapter=most, backing=backing, **options,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    base = {}
    for layer in store.layers:
        base[layer] = {
            name: torch.randn(EXPERTS, *shape, generator=draw).to(dtype) for name, shape in shapes.items()
        }
        store.adopt(layer, **{name: torch.nn.Parameter(t.clone()) for name, t in base[layer].items()})
    return store, base


def make_adapter(experts, seed=1, dtype=torch.float32, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    rows = {
        layer: {
            name: torch.randn(len(ids), *shape, generator=draw).to(dtype) for name, shape in shapes.items()
        }
        for layer, ids in experts.items()
    }
    return ExpertAdapter.from_tensors(experts, rows)


def assert_serves(store, base, name, adapter):
    """Every base expert of every layer leads to the adapter's weights, or to the base's."""
    slot = store.slot(name)
    for layer in store.layers:
        lead = store.expert_map(layer).slots[slot].tolist()
        ids = adapter.experts.get(layer, ())
        for which, tensor in zip(store.shapes, store.weights(layer), strict=True):
            for expert, row in enumerate(lead):
                tuned = adapter.row(layer, which, ids.index(expert)) if expert in ids else None
                wanted = base[layer][which][expert] if tuned is None else tuned
                assert torch.equal(tensor[row], wanted)
                assert torch.equal(tensor.unsafe_tensor()[row], wanted)


# Virtual tensors.


def test_only_mapped_rows_are_given(backing):
    tensor = VirtualTensor((9, 5, 7), torch.float32, CPU, backing, name="weights")
    tensor.resize(0, 3)
    tensor.resize(5, 2)
    tensor[:3].copy_(torch.arange(105.0).view(3, 5, 7))
    tensor[5:7].fill_(2)
    assert tensor.ranges == [(0, 3), (5, 7)]
    assert torch.equal(tensor[1], torch.arange(35.0, 70).view(5, 7))
    assert tensor[-4].eq(2).all() and tensor[1, 2, 3] == 52 and tensor[0:2, 1].shape == (2, 7)
    assert tensor[2:2].shape == (0, 5, 7) and tensor[np.int64(2)].shape == (5, 7)
    for wrong, row in ((3, 3), (slice(2, 6), 3), (slice(None), 3), (-1, 8), (7, 7), (slice(5, 9), 7)):
        with pytest.raises(IndexError, match=rf"row {row} of weights is not mapped.*0 to 2, 5 to 6"):
            tensor[wrong]
    for wrong in (9, -10):
        with pytest.raises(IndexError, match="9 rows"):
            tensor[wrong]
    for wrong in (slice(0, 3, 2), torch.tensor([0, 1]), [0], None, "0", 1.0):
        with pytest.raises(IndexError, match="weights"):
            tensor[wrong]
    tensor.resize(3, 2)
    assert torch.equal(tensor[:7][5:], tensor[5:7])  # ranges that touch


def test_holes_are_not_touched_by_accident(backing):
    tensor = VirtualTensor((9, 5), torch.float32, CPU, backing, name="weights")
    tensor.resize(0, 2)
    assert len(tensor) == 9 and tensor.shape == (9, 5) and tensor.ndim == 2 and tensor.size(1) == 5
    assert tensor.numel() == 45 and tensor.element_size() == 4
    assert repr(tensor) == "VirtualTensor(weights, [9, 5], torch.float32, cpu: 0 to 1)"
    reads = [
        list, np.asarray, copy.copy, copy.deepcopy, torch.clone, torch.stack, torch.as_tensor, torch.isnan,
        lambda t: t.cpu(), lambda t: t.clone(), lambda t: t.to("cpu"), lambda t: t.tolist(), lambda t: 3.0 in t,
        lambda t: torch.save(t, io.BytesIO()), lambda t: torch.from_dlpack(t), lambda t: t + 1,
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(TypeError):
            read(tensor)


@needs_mmap
def test_views_are_their_own_storage():
    """What copies a view's storage, as saving and deepcopy do, must not run into a hole."""
    tensor = VirtualTensor((9, 2048), torch.float32, CPU, MmapBacking())
    tensor.resize(3, 2)
    view = tensor[3:5]
    assert view.untyped_storage().nbytes() == view.nbytes and view.storage_offset() == 0
    view.fill_(4)
    file = io.BytesIO()
    torch.save(copy.deepcopy(view), file)
    file.seek(0)
    assert torch.equal(torch.load(file), view)


def test_views_keep_their_memory(backing):
    tensor = VirtualTensor((8, 32768), torch.float32, CPU, backing)
    tensor.resize(2, 2)
    tensor[2:4].fill_(3)
    view = tensor[3]
    before = tensor.mapped_bytes
    tensor.resize(2, 0)
    assert view.eq(3).all()
    assert tensor.mapped_bytes >= view.nbytes
    with pytest.raises(IndexError, match="none so far"):
        tensor[3]
    del view
    assert tensor.mapped_bytes == (0 if backing.name != "padded" else before)
    tensor.resize(0, 1)
    view = tensor[0].fill_(7)
    del tensor
    gc.collect()
    assert view.eq(7).all()


def test_resize_keeps_rows_and_refuses_overlap(backing):
    tensor = VirtualTensor((8, 3), torch.int32, CPU, backing)
    tensor.resize(2, 2)
    tensor[2:4].copy_(torch.arange(6).view(2, 3))
    tensor.resize(2, 4)
    assert torch.equal(tensor[2:4], torch.arange(6, dtype=torch.int32).view(2, 3))
    tensor.resize(2, 1)
    assert torch.equal(tensor[2], torch.arange(3, dtype=torch.int32))
    for first, count in ((1, 2), (7, 2), (-1, 1), (2, 7)):
        with pytest.raises(IndexError):
            tensor.resize(first, count)
    assert tensor.ranges == [(2, 3)]


def test_ids_are_checked_against_holes():
    tensor = VirtualTensor((9, 3), torch.float32, CPU, open_backing("auto", CPU), name="weights")
    tensor.resize(0, 4)
    tensor.resize(6, 1)
    tensor.check_ids(torch.tensor([[0, 3], [-1, 6]]))
    tensor.check_ids(torch.empty(0, 2, dtype=torch.int32))
    for wrong in (4, 7, 9, -2, 2**31 - 1):
        with pytest.raises(IndexError, match=rf"ids\[1, 0\] is {wrong}: .*0 to 3, 6 to 6"):
            tensor.check_ids(torch.tensor([[0, 3], [wrong, 6]], dtype=torch.int32))


def test_rows_made_in_inference_mode_can_be_trained():
    tensor = VirtualTensor((4, 3), torch.float32, CPU, open_backing("auto", CPU))
    with torch.inference_mode():
        tensor.resize(0, 1)
        row, whole = tensor[0:1], tensor.unsafe_tensor()
    assert not row.is_inference() and not whole.is_inference()


@needs_mmap
def test_elements_beyond_int32():
    """2^33 elements of which 16 rows have memory: offsets do not fit 32 bits, in bytes nor in elements."""
    row = 1 << 18
    tensor = VirtualTensor((1 << 15, row), torch.float32, CPU, MmapBacking())
    assert tensor.numel() == 1 << 33
    for first in (0, 1 << 13, (1 << 15) - 4):
        tensor.resize(first, 4)
        tensor.rows(first, 4).copy_(torch.full((4, 1), float(first)).expand(4, row))
    whole = tensor.unsafe_tensor()
    assert whole.stride(0) * (whole.shape[0] - 1) > 2**31
    for first in (0, 1 << 13, (1 << 15) - 4):
        assert whole[first + 3].eq(first).all() and tensor[first + 3, -1] == first
    picked = whole[torch.tensor([0, 1 << 13, (1 << 15) - 1]), -2:]
    assert picked[:, 1].tolist() == [0, 1 << 13, (1 << 15) - 4]
    begin, end = tensor.address_range
    assert resident_bytes([(begin, end)]) == tensor.mapped_bytes == 12 * row * 4


@needs_mmap
def test_layer_beyond_int32():
    """The fused layer on the last slot of a store, more than 2^31 elements behind the first."""
    shapes = {"gate_up": (2 * 512, 1024), "down": (1024, 512)}
    store = ExpertStore(2, 1, shapes, torch.bfloat16, adapters=5000, max_experts_per_adapter=1)
    draw = torch.Generator().manual_seed(0)
    plain = [torch.randn(3, *shape, generator=draw).bfloat16() for shape in shapes.values()]
    store.adopt(0, **{name: t[:2].clone() for name, t in zip(shapes, plain, strict=True)})
    store._slots._free.reverse()  # the last slot first
    last = store.load(
        "last",
        ExpertAdapter.from_tensors({0: [1]}, {0: {n: t[2:] for n, t in zip(shapes, plain, strict=True)}}),
    )
    assert last == 4999 and store.expert_map(0).slots[last].tolist() == [0, 5001]
    assert all(5001 * t.stride(0) > 2**31 for t in (w.unsafe_tensor() for w in store.weights(0)))
    x = torch.randn(3, 1024, generator=draw).bfloat16()
    weights, ids = torch.rand(3, 2, generator=draw), torch.tensor([[0, 1], [1, 0], [1, 1]])
    adapter_ids = torch.tensor([last, -1, last])
    out = fused_experts(
        x, *store.weights(0), weights, ids, adapter_ids=adapter_ids, expert_map=store.expert_map(0)
    )
    moved = torch.tensor([[0, 2], [1, 0], [2, 2]])
    assert torch.equal(out, fused_experts(x, *plain, weights, moved))


# The base model's weights.


@needs_mmap
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_base_is_moved_not_copied(rows):
    """Pages of the parameter become pages of the store: the same values, and no byte is there twice."""
    weight = torch.nn.Parameter(torch.randn(rows, 33, 100))
    wanted = weight.detach().clone()
    tensor = VirtualTensor((rows + 9, 33, 100), torch.float32, CPU, MmapBacking(), like=weight)
    assert tensor.adopt(weight)
    assert torch.equal(tensor[:rows], wanted)
    if rows == 200:  # 2.6 MB, more than what lies beside it on its first and last page
        assert not torch.equal(weight, wanted)  # they are gone from there
    begin, end = tensor.address_range
    assert resident_bytes([(begin, end)]) == tensor.mapped_bytes <= wanted.nbytes + 2 * _memory.mmap_page()


@needs_mmap
@pytest.mark.parametrize("share", [lambda t: t.detach(), lambda t: t[1:], lambda t: t.data.numpy()])
def test_memory_that_others_see_is_copied(share):
    weight = torch.nn.Parameter(torch.randn(200, 33, 100))
    other = share(weight)
    wanted = weight.detach().clone()
    tensor = VirtualTensor((209, 33, 100), torch.float32, CPU, MmapBacking(), like=weight)
    assert not tensor.adopt(weight)
    assert torch.equal(tensor[:200], wanted) and torch.equal(weight, wanted)
    del other


def test_adopted_parameters_are_rows_of_the_store(backing):
    store = ExpertStore(
        EXPERTS, [3], SHAPES, torch.bfloat16, adapters=1, max_experts_per_adapter=2, backing=backing
    )
    gate_up = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTER).bfloat16().transpose(1, 2))
    down = torch.nn.Parameter(torch.randn(EXPERTS, *SHAPES["down"]).bfloat16())
    wanted = gate_up.detach().clone(), down.detach().clone()
    store.adopt(3, down=down, gate_up=gate_up)
    for parameter, tensor, before in zip((gate_up, down), store.weights(3), wanted, strict=True):
        assert torch.equal(parameter, before) and parameter.requires_grad
        with torch.no_grad():
            parameter[2].fill_(5)
        assert tensor[2].eq(5).all() and torch.equal(tensor[3], before[3])
    del store, tensor
    gc.collect()
    assert torch.equal(down[3], wanted[1][3])  # the parameter keeps its memory


def test_wrong_bases():
    store = ExpertStore(EXPERTS, 2, SHAPES, torch.float32, adapters=1, max_experts_per_adapter=1)
    good = {name: torch.zeros(EXPERTS, *shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="layer is 2: it has to be one of 0, 1"):
        store.adopt(2, **good)
    with pytest.raises(ValueError, match="they have to be gate_up, down"):
        store.adopt(0, gate_up=good["gate_up"])
    with pytest.raises(ValueError, match=r"down has shape \[6, 40, 23\]: it has to be \[6, 40, 24\]"):
        store.adopt(0, gate_up=good["gate_up"], down=good["down"][..., 1:])
    with pytest.raises(ValueError, match=r"down is torch.float64: it has to be torch.float32"):
        store.adopt(0, gate_up=good["gate_up"], down=good["down"].double())
    with pytest.raises(ValueError, match="down is on meta: it has to be on cpu"):
        store.adopt(0, gate_up=good["gate_up"], down=good["down"].to("meta"))
    with pytest.raises(ValueError, match="layer 0 has no base weights yet"):
        store.weights(0)
    store.adopt(0, **good)
    with pytest.raises(ValueError, match="layer 0 has its base weights already"):
        store.adopt(0, **good)
    with pytest.raises(ValueError, match="layer 1 has no base weights yet: adopt all"):
        store.load("a", make_adapter({0: [1]}))


def test_base_from_rows():
    store = ExpertStore(EXPERTS, [1], SHAPES, torch.float32, adapters=1, max_experts_per_adapter=1)
    base = make_adapter({1: range(EXPERTS)}, seed=3)
    with pytest.raises(ValueError, match="base has 5 experts in layer 1: it has to have 6"):
        store.adopt_rows(make_adapter({1: range(5)}))
    store.adopt_rows(base)
    assert all(torch.equal(store.weight(1, n)[2], base.row(1, n, 2)) for n in SHAPES)


# Adapters.


def test_adapters_come_and_go(backing):
    store, base = make_store(backing)
    adapters = {
        "a": make_adapter({0: [4, 1], 1: [0]}, 1),
        "b": make_adapter({1: [5, 3, 2]}, 2),
        "c": make_adapter({0: [0]}, 3),
    }
    for name, adapter in adapters.items():
        assert store.load(name, adapter) == len(store.names) - 1
    for name, adapter in adapters.items():
        assert_serves(store, base, name, adapter)
    full = store.stats().mapped_bytes
    assert store.expert_map(0).slots[0].tolist() == [0, EXPERTS, 2, 3, EXPERTS + 1, 5]
    store.evict("b")
    assert store.names == ["a", "c"] and store.stats().mapped_bytes <= full
    assert store.expert_map(1).slots[1].tolist() == list(range(EXPERTS))
    for name in ("a", "c"):
        assert_serves(store, base, name, adapters[name])
    again = make_adapter({0: [2, 3, 4], 1: [1]}, 4)
    assert store.load("d", again) == 1
    assert_serves(store, base, "d", again)
    assert_serves(store, base, "a", adapters["a"])
    for name in store.names:
        store.evict(name)
    for layer, tensors in base.items():
        for name, tensor in tensors.items():
            assert store.weight(layer, name).ranges == [(0, EXPERTS)]
            assert torch.equal(store.weight(layer, name)[:EXPERTS], tensor)


def test_least_recently_used_goes_first_and_pinned_never():
    store, base = make_store()
    given = {name: make_adapter({0: [i % EXPERTS]}, i) for i, name in enumerate("abcdefg")}
    for name in "abc":
        store.load(name, given[name])
    store.slot("a")
    assert store.load("d", given["d"]) == 1 and store.names == ["c", "a", "d"]
    with store.pin("c", "a") as slots:
        assert slots == [2, 0]
        assert store.load("e", given["e"]) == 1
        store.pin("e")
        with pytest.raises(
            RuntimeError, match=r"no slot for adapter 'f': of 3, pinned are .*a.*unpin or evict"
        ):
            store.load("f", given["f"])
        with pytest.raises(RuntimeError, match="'c' is pinned 1 times"):
            store.evict("c")
        for name in "ace":
            assert_serves(store, base, name, given[name])
        assert "f" not in store.names
    store.load("f", given["f"])
    assert sorted(store.names) == ["a", "e", "f"]  # c was the least recently used one
    store.unpin("e")
    with pytest.raises(RuntimeError, match="'e' is not pinned"):
        store.unpin("e")
    with pytest.raises(KeyError, match="'c' is not loaded: loaded are"):
        store.pin("a", "c")
    store.evict("a")  # the pin of it was not kept
    with pytest.raises(KeyError, match="'a' is not loaded"):
        store.evict("a")
    assert store.load("e", given["e"]) == store.slot("e")


def test_load_waits_for_a_slot():
    store, base = make_store(adapters=1)
    store.load("a", make_adapter({0: [1]}))
    pin = store.pin("a")
    threading.Timer(0.05, store.unpin, ["a"]).start()
    adapter = make_adapter({1: [2]})
    assert store.load("b", adapter, timeout=10) == pin.slots[0]
    assert_serves(store, base, "b", adapter)


def test_swap_in_place_keeps_pages(fake_cuda):
    """An adapter that takes another's slot takes its pages too, once the device is done with them."""
    store, base = make_store(CudaBacking(library=fake_cuda.path, on_cpu=True), adapters=1, layers=1)
    store.load("a", make_adapter({0: [0, 1]}))
    fake_cuda.fake_cuda_clear()
    adapter = make_adapter({0: [2, 5]}, 2)
    store.load("b", adapter)
    assert fake_cuda.fake_cuda_log().decode() == "cuCtxSynchronize"
    assert_serves(store, base, "b", adapter)


def test_device_is_done_before_pages_go(fake_cuda):
    shapes = {"gate_up": (256, 512), "down": (512, 128)}  # pages of the played driver are 64 KiB
    store, _ = make_store(CudaBacking(library=fake_cuda.path, on_cpu=True), layers=1, shapes=shapes)
    store.load("a", make_adapter({0: [0, 1]}, shapes=shapes))
    pages = fake_cuda.fake_cuda_pages()
    fake_cuda.fake_cuda_clear()
    store.evict("a")
    calls = fake_cuda.fake_cuda_log().decode().split()
    assert calls == ["cuCtxSynchronize", "cuMemUnmap"] * 2
    assert fake_cuda.fake_cuda_pages() == fake_cuda.fake_cuda_memories() == pages - 2 * 12


def test_device_without_memory(fake_cuda):
    """What fails leaves nothing behind, and nobody else notices."""
    shapes = {"gate_up": (256, 512), "down": (512, 128)}
    store, base = make_store(CudaBacking(library=fake_cuda.path, on_cpu=True), shapes=shapes)
    first = make_adapter({0: [1], 1: [2]}, shapes=shapes)
    store.load("a", first)
    pages = fake_cuda.fake_cuda_pages()
    for after in (0, 9, 30):
        fake_cuda.fake_cuda_fail(b"cuMemCreate", after)
        with pytest.raises(RuntimeError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
            store.load("b", make_adapter({0: [0, 1], 1: [3]}, shapes=shapes))
        assert fake_cuda.fake_cuda_pages() == pages and store.names == ["a"]
        assert (store.expert_map(0).slots[1:] == torch.arange(EXPERTS)).all()
    assert_serves(store, base, "a", first)
    second = make_adapter({0: [0, 1], 1: [3]}, 2, shapes=shapes)
    store.load("b", second)
    assert_serves(store, base, "b", second)
    reserved = fake_cuda.fake_cuda_reserved()
    del store
    gc.collect()
    assert fake_cuda.fake_cuda_pages() == 0 and fake_cuda.fake_cuda_reserved() == reserved - 4


def test_no_driver():
    with pytest.raises(RuntimeError, match=r"no CUDA driver: .*no-such-driver.so"):
        CudaBacking(library="no-such-driver.so")
    with pytest.raises(RuntimeError, match="the CUDA driver has no cuInit"):
        CudaBacking(library=_memory.__file__)


def test_wrong_adapters():
    store, _ = make_store()
    good = make_adapter({0: [1]})
    cases = [
        (make_adapter({2: [1]}), "adapter has layer 2: layers of the store are 0, 1"),
        (make_adapter({0: [6]}), "the id 6 in layer 0: it has to be from 0 to 5"),
        (make_adapter({0: [0, 1, 2, 3]}), "4 experts in layer 0: it has to be at most 3"),
        (make_adapter({0: [1]}, dtype=torch.bfloat16), "gate_up of expert 1 in layer 0 is torch.bfloat16"),
        (make_adapter({0: [1]}, shapes={"gate_up": (48, 40)}), "gate_up in layer 0: it has to have gate_up, down"),
        (make_adapter({0: [1]}, shapes=SHAPES | {"down": (40, 23)}), r"shape \[40, 23\]: it has to be \[40, 24\]"),
        (make_adapter({0: [1]}, shapes=SHAPES | {"down": (39, 24)}), "has 39 rows: it has to have 40"),
        (ExpertAdapter({0: (2, 1)}, good.rows), "has the ids 2, 1 in layer 0: they have to ascend"),
        (ExpertAdapter({0: (1, 1)}, good.rows), "they have to ascend"),
        (ExpertAdapter({0: (1, 2)}, good.rows), "has 1 rows of gate_up in layer 0: it has 2 experts"),
    ]  # fmt: skip
    before = store.stats().mapped_bytes
    for adapter, message in cases:
        with pytest.raises(ValueError, match=message):
            store.load("a", adapter)
    assert store.names == [] and store.stats().mapped_bytes == before
    store.load("a", good)


def test_wrong_stores():
    options = {"adapters": 1, "max_experts_per_adapter": 1}
    for change, message in (
        ({"adapters": 0}, "adapters is 0: it has to be an int, at least 1"),
        ({"max_experts_per_adapter": 7}, "max_experts_per_adapter is 7: it has to be at most 6"),
        ({"backing": "disk"}, "backing is 'disk': it has to be one of 'auto', 'mmap', 'cuda', 'padded'"),
        ({"backing": "cuda"}, "backing is 'cuda' and device is cpu: it has to be a CUDA device"),
        ({"backing": "mmap", "device": "meta"}, "backing is 'mmap' and device is meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertStore(EXPERTS, 1, SHAPES, torch.float32, **(options | change))
    with pytest.raises(ValueError, match=r"layers is \[1, 1\]"):
        ExpertStore(EXPERTS, [1, 1], SHAPES, torch.float32, **options)
    with pytest.raises(ValueError, match="shapes is"):
        ExpertStore(EXPERTS, 1, {"gate_up": (0, 4)}, torch.float32, **options)


def test_slots_begin_where_pages_do():
    """Page arithmetic of DeepSeek-V2-Lite's experts on pages of 2 MiB: 5.5 and 2.75 of them, so slots of 4 k."""

    class Pages(PaddedBacking):
        page = 2 << 20

    shapes = {"gate_up": (2 * 1408, 2048), "down": (2048, 1408)}
    for most, share, rows in (
        (5, None, 8),
        (8, None, 8),
        (9, None, 12),
        (9, True, 9),
        (1, None, 1),
        (1, False, 4),
    ):
        store = ExpertStore(
            64, 1, shapes, torch.bfloat16,
            adapters=2, max_experts_per_adapter=most, backing=Pages(CPU), share_pages=share,
        )  # fmt: skip
        assert store.slot_rows == rows == store.expert_map(0).max_experts_per_adapter


@needs_mmap
@pytest.mark.parametrize("share", [False, True])
def test_neighbours_on_one_page(share):
    """Experts of 1.5 KB: with shared pages an adapter's last page is the next one's first, and outlives either."""
    shapes = {"gate_up": (24, 16), "down": (16, 12)}
    store, base = make_store(shapes=shapes, share_pages=share, layers=1, adapters=4, most=3)
    assert store.slot_rows == (3 if share else 16)
    given = {name: make_adapter({0: [0, 2, 5]}, i, shapes=shapes) for i, name in enumerate("abcd")}
    for name, adapter in given.items():
        store.load(name, adapter)
    for gone, *_ in ("b", "d", "a"):
        store.evict(gone)
        for name in store.names:
            assert_serves(store, base, name, given[name])
    store.evict("c")
    pages = sum(-(-(EXPERTS * 4 * a * b) // 4096) + 1 for a, b in shapes.values())
    assert store.stats().mapped_bytes <= pages * 4096


@given(st.data())
def test_any_order_of_loads_and_evictions(data):
    """Whatever comes and goes, what is there is right, and memory is what is there."""
    shapes = {"gate_up": (24, 16), "down": (16, 12)}
    share = data.draw(st.booleans())
    store, base = make_store(shapes=shapes, share_pages=share, layers=2)
    given_adapters, pinned = {}, set()
    ids = st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=3)
    for seed in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["load", "load", "evict", "pin", "unpin"]))
        names = store.names
        if action == "load" and (len(names) < 3 or set(names) - pinned):
            given_adapters[str(seed)] = make_adapter(
                {0: data.draw(ids), 1: data.draw(ids)}, seed, shapes=shapes
            )
            store.load(str(seed), given_adapters[str(seed)])
        elif names:
            name = data.draw(st.sampled_from(names))
            if action == "evict" and name not in pinned:
                store.evict(name)
            elif action == "pin" and name not in pinned:
                pinned.add(name)
                store.pin(name)
            elif action == "unpin" and name in pinned:
                pinned.remove(name)
                store.unpin(name)
        assert pinned <= set(store.names)
        for name in store.names:
            assert_serves(store, base, name, given_adapters[name])
        for layer in store.layers:
            slots = {store.slot(n): len(given_adapters[n].experts.get(layer, ())) for n in store.names}
            firsts = ((EXPERTS + s * store.slot_rows, n) for s, n in slots.items() if n)
            wanted = [(0, EXPERTS), *((f, f + n) for f, n in sorted(firsts))]
            assert all(tensor.ranges == wanted for tensor in store.weights(layer))


def test_threads_load_and_evict_while_one_computes():
    """A reader of a pinned adapter sees the same bits all the time; the others always see their own."""
    store, base = make_store(adapters=3)
    served = make_adapter({0: [1, 4], 1: [0]}, 99)
    slot = store.load("served", served)
    store.pin("served")
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    whole = store.weight(0, "gate_up").unsafe_tensor()
    all_rows = torch.tensor([len(x)], dtype=torch.int32)

    def products():  # torch's own may differ from one call to the next
        rows = store.expert_map(0).slots[slot].tolist()
        return torch.stack([grouped_mm(x, whole[row].T[None], all_rows) for row in rows])

    wanted = products()
    stop, problems = threading.Event(), []

    def guarded(work):
        def run():
            try:
                work()
            except BaseException as problem:
                problems.append(problem)
                stop.set()

        return run  # fmt: skip

    def read():
        while not stop.is_set():
            assert torch.equal(products(), wanted)

    def move(seed):
        draw = random.Random(seed)
        adapters = {
            f"{n}": make_adapter({0: [n % EXPERTS], 1: [n % 5, 5]}, n) for n in range(4)
        }  # the same names in all threads
        while not stop.is_set():
            name = draw.choice(list(adapters))
            try:
                store.load(name, adapters[name], timeout=10)
                with store.pin(name):
                    assert_serves(store, base, name, adapters[name])
                if draw.random() < 0.5:
                    store.evict(name)
            except KeyError:
                pass  # another thread took it out first
            except RuntimeError as held:
                assert "pinned" in str(held)

    threads = [threading.Thread(target=guarded(w)) for w in (read, lambda: move(1), lambda: move(2))]
    for thread in threads:
        thread.start()
    time.sleep(0.6)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not problems, problems
    store.unpin("served")
    assert_serves(store, base, "served", served)


def test_two_threads_want_one_adapter():
    store, base = make_store()
    adapter = make_adapter({0: [1, 2, 3], 1: [4]})
    slots = []
    threads = [threading.Thread(target=lambda: slots.append(store.load("a", adapter))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slots == [0] * 6 and store.names == ["a"]
    assert_serves(store, base, "a", adapter)


# Training.


def test_created_adapter_is_trained_in_place():
    store, base = make_store(layers=[2, 5])
    store.create("new", {5: [4, 1], 2: []})
    parameters = store.parameters("new")
    assert [p.shape for p in parameters] == [(2, *SHAPES["gate_up"]), (2, *SHAPES["down"])]
    gate_up, down = parameters
    assert torch.equal(gate_up, base[5]["gate_up"][[1, 4]]) and torch.equal(down, base[5]["down"][[1, 4]])
    assert all(p.is_leaf and p.requires_grad for p in parameters)
    assert store.parameters("new")[0] is gate_up
    (gate_up.sum() + 3 * down.sum()).backward()
    torch.optim.SGD(parameters, lr=0.5).step()
    exported = store.export("new")
    assert exported.experts == {5: (1, 4)}
    assert_serves(store, base, "new", exported)
    assert torch.equal(exported.row(5, "down", 0), base[5]["down"][1] - 1.5)
    for i in range(3):  # a trained adapter goes only when it is told to
        store.load(f"other {i}", make_adapter({2: [0]}, i))
    assert "new" in store.names
    with pytest.raises(ValueError, match="experts has the id 6 in layer 5"):
        store.create("wrong", {5: [6]})
    store.evict("new")
    with torch.no_grad():
        gate_up.add_(1)  # a leaf outlives its adapter


def test_tuned_experts_are_rows_of_the_weights():
    store, _ = make_store()
    store.load("a", make_adapter({0: [1]}))
    store.load("b", make_adapter({0: [1, 5]}))
    tuned = store.tuned("b", 0)
    assert isinstance(tuned, TunedExperts)
    assert tuned.first == EXPERTS + store.slot_rows and tuned.b_down is None
    whole = store.weight(0, "gate_up").unsafe_tensor()
    assert tuned.w_gate_up.data_ptr() == whole[tuned.first].data_ptr()
    assert store.tuned("b", 1).w_down.shape == (0, *SHAPES["down"])


# Figures.


def test_stats_of_the_paper():
    """F_mem and S_i (ExpertWeave, section 4.1) of a case small enough to count by hand."""
    store, _ = make_store(adapters=2, most=3)
    store.load("a", make_adapter({0: [0, 1, 2], 1: [4]}))
    store.load("b", make_adapter({1: [4, 5]}))
    stats = store.stats()
    assert stats.adapters == ("a", "b")
    assert stats.fragmentation == 2 * (6 + 2 * 3) / (2 * 6 + 4 + 2)
    assert stats.sparsity == {"a": 2 / 6, "b": 2 / 4}
    expert = 4 * 3 * INTER * HIDDEN
    assert stats.used_bytes == (2 * 6 + 6) * expert
    assert stats.padded_bytes == 2 * (6 + 2 * 3) * expert
    assert stats.address_bytes == 2 * store.num_slots * expert
    assert stats.mapped_bytes >= stats.used_bytes


@needs_mmap
def test_resident_memory_is_what_is_used():
    """An ESFT-like layout, counted by the system: base and tuned experts and next to nothing else.

    In a process of its own, so that no other test's memory is in the way: the ranges of the store, and all there is.
    """
    code = """
import torch
from gapless.experts.esft import ExpertAdapter
from gapless.experts.store import ExpertStore

def anonymous():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("RssAnon"))

M, H, I, layers = 16, 256, 192, range(1, 4)
shapes = {"gate_up": (2 * I, H), "down": (H, I)}
tuned = [{l: list(range((3 * a + l) % 4 + 2)) for l in layers} for a in range(5)]
rows = {n: torch.ones(6, *s) for n, s in shapes.items()}
given = [
    ExpertAdapter.from_tensors(t, {l: {n: r[: len(t[l])] for n, r in rows.items()} for l in t}) for t in tuned
]
def make():
    store = ExpertStore(M, layers, shapes, torch.float32, adapters=8, max_experts_per_adapter=6)
    for layer in layers:
        store.adopt(layer, **{n: torch.nn.Parameter(torch.ones(M, *s)) for n, s in shapes.items()})
    for i, adapter in enumerate(given):
        store.load(str(i), adapter)
    return store
make()
before = anonymous()
store = make()
grown = anonymous() - before
stats = store.stats()
assert stats.resident_bytes == stats.mapped_bytes
print(stats.resident_bytes / stats.used_bytes, grown / stats.used_bytes, stats.padded_bytes / stats.used_bytes)
for name in store.names:
    store.evict(name)
stats = store.stats()
print(stats.resident_bytes / stats.used_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full, whole_process, padded, empty = map(float, done.stdout.split())
    assert 1 <= full <= 1.005 and 1 <= empty <= 1.005
    assert whole_process <= 1.03
    assert padded > 1.3
