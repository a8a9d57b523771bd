# SPDX-License-Identifier: Apache-2.0
"""The planner of packed batches: properties of its tiles, its messages, and the cache of plans."""

import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gapless
from gapless import _planner
from gapless.plan.varlen import PlanCache, mask_window
from gapless.reference.varlen import visible

lengths = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=12)
blocks = st.integers(1, 40)
windows = st.tuples(st.integers(-1, 50), st.integers(-1, 50))


def cu(sizes, dtype=np.int32):
    return np.concatenate([[0], np.cumsum(np.asarray(list(sizes), dtype=np.int64))]).astype(dtype)


def plan(pairs, block_q, block_k, window):
    cu_q, cu_k = cu(q for q, _ in pairs), cu(k for _, k in pairs)
    return [t.reshape(-1, 3) for t in _planner.varlen_tiles(cu_q, cu_k, block_q, block_k, *window)]


def used(tiles):
    """The rows in use, all of which stand before the unused ones."""
    count = int((tiles[:, 0] >= 0).sum())
    assert (tiles[:count] >= 0).all() and (tiles[count:] == -1).all()
    return tiles[:count].tolist()


def cells(pair, begin, end, window):
    return int(visible(*pair, window, torch.device("cpu"))[begin:end].sum())


@given(lengths, blocks, blocks, windows)
def test_every_query_and_every_key_is_in_exactly_one_tile(pairs, block_q, block_k, window):
    query, key = plan(pairs, block_q, block_k, window)
    for side, tiles, block in ((0, query, block_q), (1, key, block_k)):
        assert tiles.shape[0] == len(pairs) + sum(p[side] for p in pairs) // block
        seen = [np.zeros(p[side], int) for p in pairs]
        for sequence, begin, end in used(tiles):
            assert begin % block == 0 and end - begin <= block
            seen[sequence][begin:end] += 1
        assert all((s == 1).all() for s in seen)


@given(lengths, blocks, blocks, windows)
def test_query_tiles_come_costliest_first_and_ties_keep_their_order(pairs, block_q, block_k, window):
    query, _ = plan(pairs, block_q, block_k, window)
    order = [(-cells(pairs[s], begin, end, window), s, begin) for s, begin, end in used(query)]
    assert order == sorted(order)


@given(lengths, blocks, blocks, windows)
def test_key_tiles_come_by_sequence_costliest_first_and_ascend_inside_one(pairs, block_q, block_k, window):
    _, key = plan(pairs, block_q, block_k, window)
    order = [(-cells(pairs[s], 0, pairs[s][0], window), s, begin) for s, begin, end in used(key)]
    assert order == sorted(order)


@given(lengths, blocks, blocks)
def test_only_a_sequence_with_queries_and_no_keys_has_an_empty_key_tile(pairs, block_q, block_k):
    _, key = plan(pairs, block_q, block_k, (-1, 0))
    empty = sorted(row for row in used(key) if row[1] == row[2])
    assert empty == [[s, 0, 0] for s, (q, k) in enumerate(pairs) if q > 0 and k == 0]


@given(lengths, blocks, blocks, windows, st.randoms())
def test_the_order_of_sequences_does_not_change_their_tiles(pairs, block_q, block_k, window, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    before = plan(pairs, block_q, block_k, window)
    after = plan([pairs[i] for i in order], block_q, block_k, window)
    for a, b in zip(before, after, strict=True):
        assert sorted(used(a)) == sorted([order[s], begin, end] for s, begin, end in used(b))


def test_planner_takes_arrays_as_they_are():
    with pytest.raises(TypeError, match="int32"):
        _planner.varlen_tiles(cu([3], np.int64), cu([3]), 8, 8, -1, -1)
    query, _ = _planner.varlen_tiles(cu([3]), cu([3]), 8, 8, -1, -1)
    assert query.dtype == np.int32 and query.flags.writeable and query.base is not None


@pytest.mark.parametrize(
    ("entries", "total", "message"),
    [
        ([1, 4], 4, "cu_seqlens_q[0] is 1: it has to be 0"),
        ([0, 5, 3], None, "cu_seqlens_q[2] is 3, after 5: it has to be at least the entry before it"),
        ([0, -1], None, "cu_seqlens_q[1] is -1, after 0: it has to be at least the entry before it"),
        ([0, 4], 6, "cu_seqlens_q[1] is 4, the last: it has to be 6, the number of tokens"),
        ([0, 2**31], None, "cu_seqlens_q[1] is 2147483648: it has to fit int32, at most 2147483647"),
    ],
)
def test_bad_entries_are_named(entries, total, message):
    with pytest.raises(ValueError) as error:
        gapless.VarlenPlan.make(torch.tensor(entries), total_q=total)
    assert str(error.value) == message


def test_bad_tensors_are_named():
    make = gapless.VarlenPlan.make
    with pytest.raises(TypeError, match=r"cu_seqlens_q is torch.float32: it has to be int32 or int64"):
        make(torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match=r"cu_seqlens_q has shape \[1, 2\]: it has to be \[batch \+ 1\]"):
        make(torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"cu_seqlens_q has shape \[0\]"):
        make(torch.tensor([], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens_k has 3 entries, cu_seqlens_q has 2"):
        make(torch.tensor([0, 3]), torch.tensor([0, 3, 4]))
    with pytest.raises(ValueError, match=r"cu_seqlens_k\[1\] is 3, the last: it has to be 4"):
        make(torch.tensor([0, 3]), torch.tensor([0, 3]), total_k=4)
    with pytest.raises(ValueError, match=r"block_q is -1: it has to be at least 1"):
        make(torch.tensor([0, 3]), block_q=-1)
    with pytest.raises(ValueError, match=r"window is \(-2, 0\)"):
        make(torch.tensor([0, 3]), window=(-2, 0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan_owns_its_lengths(dtype):
    cu_seqlens = torch.tensor([0, 3, 7], dtype=dtype)
    made = gapless.VarlenPlan.make(cu_seqlens)
    cu_seqlens.zero_()
    assert made.cu_seqlens_q.tolist() == [0, 3, 7] and made.cu_seqlens_q.dtype == torch.int32
    assert made.batch == 2 and [t.shape[-1] for t in made.tensors] == [3, 3, 3, 3]


def test_causal_folds_into_the_window():
    assert mask_window(False, (4, 5)) == (4, 5)
    assert mask_window(True, (4, 5)) == (4, 0)
    assert mask_window(True, (-1, -1)) == (-1, 0)


class TestCache:
    how = {"window": (-1, 0), "total_q": 7, "total_k": 7}

    def test_same_tensor_same_plan(self):
        cache, cu_seqlens = PlanCache(), torch.tensor([0, 3, 7])
        assert cache.get(cu_seqlens, None, **self.how) is cache.get(cu_seqlens, None, **self.how)

    def test_mask_is_part_of_the_key(self):
        cache, cu_seqlens = PlanCache(), torch.tensor([0, 3, 7])
        other = {**self.how, "window": (-1, -1)}
        assert cache.get(cu_seqlens, None, **self.how) is not cache.get(cu_seqlens, None, **other)

    def test_change_in_place_makes_a_new_plan(self):
        cache, cu_seqlens = PlanCache(), torch.tensor([0, 3, 7])
        cache.get(cu_seqlens, None, **self.how)
        cu_seqlens[1] = 4
        assert cache.get(cu_seqlens, None, **self.how).cu_seqlens_q.tolist() == [0, 4, 7]
        assert len(cache._plans) == 1

    def test_new_tensor_at_an_old_address_makes_a_new_plan(self):
        cache = PlanCache()
        for middle in range(7):
            cu_seqlens = torch.tensor([0, middle, 7])
            assert cache.get(cu_seqlens, None, **self.how).cu_seqlens_q[1] == middle
            del cu_seqlens
            gc.collect()

    def test_inference_tensors_are_planned_anew(self):
        cache = PlanCache()
        with torch.inference_mode():
            cu_seqlens = torch.tensor([0, 3, 7])
            cache.get(cu_seqlens, None, **self.how)
            cu_seqlens[1] = 5
            assert cache.get(cu_seqlens, None, **self.how).cu_seqlens_q.tolist() == [0, 5, 7]

    def test_errors_are_not_kept(self):
        cache, cu_seqlens = PlanCache(), torch.tensor([0, 9, 7])
        for _ in range(2):
            with pytest.raises(ValueError, match="after 9"):
                cache.get(cu_seqlens, None, **self.how)

    def test_oldest_goes_first(self):
        cache, batches = PlanCache(capacity=2), [torch.tensor([0, i, 7]) for i in range(3)]
        first, second = (cache.get(b, None, **self.how) for b in batches[:2])
        assert cache.get(batches[0], None, **self.how) is first
        cache.get(batches[2], None, **self.how)
        assert cache.get(batches[0], None, **self.how) is first
        assert cache.get(batches[1], None, **self.how) is not second

    def test_threads_share_it(self):
        cache, batches = PlanCache(capacity=3), [torch.tensor([0, i, 7]) for i in range(6)]
        wrong = []

        def work():
            for i in range(300):
                middle = i % len(batches)
                if cache.get(batches[middle], None, **self.how).cu_seqlens_q[1] != middle:
                    wrong.append(i)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
