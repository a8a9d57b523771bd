# SPDX-License-Identifier: Apache-2.0
"""Generated and loaded lengths: published facts, exact batches, and messages that name the bad line."""

import numpy as np
import pytest

from gapless.schedule import traces
from gapless.schedule.traces import K, LogLinear, M

# (length x, share of samples from x on, share of tokens from x on), as published; None: not published.
BYTED = [(4 * K, 0.2, None), (128 * K, 0.01, 0.443), (256 * K, None, 0.37), (2 * M, 0.0005, 0.121)]
GITHUB = [(128 * K, None, 0.162), (256 * K, None, 0.098)]


@pytest.mark.parametrize(("distribution", "facts"), [(traces.byted, BYTED), (traces.github, GITHUB)])
def test_published_facts_hold_on_a_large_sample(distribution, facts):
    count = 2_000_000
    drawn = distribution().draw(np.random.default_rng(1), count)
    for x, samples, tokens in facts:
        long = drawn[drawn >= x]
        if samples is not None:  # four standard deviations
            assert abs(len(long) / count - samples) < 4 * np.sqrt(samples / count)
        if tokens is not None:
            assert abs(long.sum() / drawn.sum() - tokens) < 0.01
    assert drawn.mean() == pytest.approx(distribution().mean, rel=0.02)


@pytest.mark.parametrize(("distribution", "facts"), [(traces.byted, BYTED), (traces.github, GITHUB)])
def test_published_facts_hold_exactly_on_quantiles(distribution, facts):
    count = 1_000_000
    lengths = distribution().quantile((np.arange(count) + 0.5) / count)
    for x, samples, tokens in facts:
        long = lengths[lengths >= x]
        assert samples is None or len(long) / count == pytest.approx(samples, rel=0.002)
        assert tokens is None or long.sum() / lengths.sum() == pytest.approx(tokens, rel=0.002)


@pytest.mark.parametrize("name", traces.NAMES)
@pytest.mark.parametrize("context", [256 * K, 2 * M])
def test_a_batch_has_exactly_its_tokens_and_keeps_to_the_context(name, context):
    lengths = traces.sample(name, tokens=4 * M, context=context, seed=3)
    assert lengths.dtype == np.int64 and lengths.sum() == 4 * M
    assert lengths.min() >= 1 and lengths.max() <= context
    assert np.array_equal(lengths, traces.sample(name, tokens=4 * M, context=context, seed=3))
    assert not np.array_equal(lengths[:9], traces.sample(name, tokens=4 * M, context=context, seed=4)[:9])
    # The batch is only longer with more tokens; its beginning is the same.
    longer = traces.sample(name, tokens=8 * M, context=context, seed=3)
    assert np.array_equal(lengths[:-1], longer[: len(lengths) - 1])


def test_byted_at_two_million_has_sequences_of_the_whole_context():
    lengths = np.concatenate([traces.sample("byted", context=2 * M, seed=s) for s in range(8)])
    assert lengths.max() == 2 * M
    cut = np.concatenate([traces.sample("byted", context=256 * K, seed=s) for s in range(8)])
    assert (cut == 256 * K).sum() > (lengths == 2 * M).sum()


def test_small_batches():
    assert len(traces.sample("github", tokens=0)) == 0
    assert traces.sample("github", tokens=1).tolist() == [1]
    assert traces.sample("megatron", tokens=5000, context=1).tolist() == [1] * 5000


def test_megatron_mix_is_kept_in_its_range():
    lengths = traces.sample("megatron", tokens=64 * M)
    assert lengths[:-1].min() == 128 and lengths.max() == 8192
    # The mean of a lognormal of mean 1024 and sigma 1.5 that is kept in 128 .. 8192.
    assert lengths.mean() == pytest.approx(903, rel=0.03)


def test_code_lengths_are_those_of_files():
    lengths = traces.code_lengths()
    assert len(lengths) > 300 and lengths.min() >= 1
    assert np.isin(traces.sample("code", tokens=M)[:-1], lengths).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "gitlab"}, r"name is 'gitlab': it has to be one of byted, github"),
        ({"tokens": -1}, r"tokens is -1: it has to be at least 0"),
        ({"context": 0}, r"context is 0: it has to be at least 1, or None"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        traces.sample(**{"name": "byted", **change})


def test_facts_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"leave a share of -0\.\d+ of the samples between 10 and 100"):
        LogLinear.fit([1, 10, 100], samples={10: -0.1}, tokens={})


def test_load_text(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("5\n\n 0 \n2097152\n")
    assert traces.load(path).tolist() == [5, 0, 2097152]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\ntwelve\n", r"line 3: 'twelve' is not a whole number of tokens"),
        ("1\n2.5\n", r"line 2: '2\.5' is not a whole"),
        ("1_000\n", r"line 1: '1_000' is not a whole"),
        ("5\n-7\n", r"line 2: -7: a sequence has 0 tokens or more"),
        ("1" * 30, r"line 1: 1+ tokens are more than a sequence can have"),
        ("\n \n", r"holds no lengths"),
        ("", r"holds no lengths"),
    ],
)
def test_load_names_the_line_that_is_no_length(tmp_path, text, message):
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        traces.load(path)


def test_load_refuses_bytes(tmp_path):
    path = tmp_path / "lengths.bin"
    path.write_bytes(b"12\n\xff\n")
    with pytest.raises(ValueError, match="is no text: byte 3 is 0xff"):
        traces.load(path)


def test_load_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "lengths.parquet"

    def write(**columns):
        pq.write_table(pa.table(columns), path)
        return path

    assert traces.load(write(tokens=[3, 0, 9], text=["a", "b", "c"])).tolist() == [3, 0, 9]
    assert traces.load(write(input_ids=[[1, 2], [], [7]])).tolist() == [2, 0, 1]
    both = write(a=[1, 2], b=[3, 4], text=["x", "y"])
    assert traces.load(both, "b").tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"2 columns hold numbers or lists: name one of \['a', 'b'\]"):
        traces.load(both)
    with pytest.raises(ValueError, match=r"no column 'c': it has \['a', 'b', 'text'\]"):
        traces.load(both, "c")
    with pytest.raises(ValueError, match=r"column 'text' is of string: it has to hold lengths"):
        traces.load(both, "text")
    with pytest.raises(ValueError, match=r"row 1 of column 'a' is null"):
        traces.load(write(a=[1, None]))
    with pytest.raises(ValueError, match=r"lengths of .*\[1\] is -4"):
        traces.load(write(a=[1, -4]))
    with pytest.raises(ValueError, match="holds no lengths"):
        traces.load(write(a=pa.array([], pa.int64())))
