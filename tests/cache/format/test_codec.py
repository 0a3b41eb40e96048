"""What goes in comes out: counts exactly, log-probabilities within 0.02 nat, all of them summing to 1."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ddk_cache.cache.rows import Rows
from ddk_cache.format import codec
from ddk_cache.format.codebook import Codebook, fit_codebook
from ddk_cache.format.layout import Target

Entries = dict[int, float]  # id to log-probability
SEQ_LENGTH = 4
NOTHING: Entries = {}


def make_arrays(
    positions: list[Entries], tails: list[float], width: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Rows of SEQ_LENGTH positions each: ids, logprobs [n, S, E] and tail_logprob [n, S]."""
    ids = np.full((len(positions), width), -1, np.int32)
    logprobs = np.full((len(positions), width), -np.inf, np.float32)
    for position, entries in enumerate(positions):
        ids[position, : len(entries)] = list(entries)
        logprobs[position, : len(entries)] = list(entries.values())
    shape = (-1, SEQ_LENGTH, width)
    return ids.reshape(shape), logprobs.reshape(shape), np.array(tails, np.float32).reshape(-1, SEQ_LENGTH)


def encode(
    arrays: tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]],
    codebook: Codebook,
    target: Target,
) -> codec.Arrays:
    """Encode every position, those without an entry included."""
    ids, logprobs, tails = arrays
    width = ids.shape[2]
    targets = codec.Targets(ids.reshape(-1, width), logprobs.reshape(-1, width), tails.ravel())
    return codec.encode(targets, np.ones(arrays[2].shape, np.bool_), codebook, target)


@cache
def empty_codebook(vocab_size: int, target: Target) -> Codebook:
    shape = (0, target.width)
    return fit_codebook(np.empty(shape, np.int32), np.empty(shape, np.float32), target, vocab_size)


def round_trip(
    arrays: tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]],
    codebook: Codebook,
    target: Target,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Encode, check the integers against ``row_arrays``, decode, check what holds of any answer."""
    stored = encode(arrays, codebook, target)
    expected = codec.row_arrays(target, SEQ_LENGTH)
    n = len(arrays[0])
    assert {name: (values.dtype, values.shape) for name, values in stored.items()} == {
        name: (np.dtype(array.dtype), (n, array.width)) for name, array in expected.items()
    }
    decoded = codec.decode(stored, codebook, target)
    assert len(decoded) == np.count_nonzero(stored["entries"])
    shape = stored["entries"].shape
    tokens, segments = np.zeros(shape, np.int32), np.ones(shape, np.uint16)
    rows = Rows(tokens, segments, stored["entries"] > 0, targets=decoded)
    ids, logprobs, tail = rows.ids, rows.logprobs, rows.tail_logprob
    assert ids is not None
    assert logprobs is not None
    assert tail is not None
    assert [array.dtype.name for array in (ids, logprobs, tail)] == ["int32", "float32", "float32"]
    assert ids.shape == logprobs.shape == arrays[0].shape
    assert tail.shape == arrays[2].shape
    assert ((ids >= 0) == np.isfinite(logprobs)).all()
    assert (np.diff(np.where(ids >= 0, logprobs, -1e9), axis=-1) <= 0).all(), "best first, absent ones last"
    mass = np.exp(logprobs.astype(np.float64)).sum(-1) + np.exp(tail.astype(np.float64))
    present = (ids >= 0).any(axis=-1)
    np.testing.assert_allclose(mass[present], 1, atol=1e-5)
    assert not mass[~present].any()
    return ids, logprobs, tail


def by_id(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> list[Entries]:
    """Return each position's entries, without their order."""
    flat = zip(ids.reshape(-1, ids.shape[-1]), logprobs.reshape(-1, ids.shape[-1]), strict=True)
    return [{int(i): float(p) for i, p in zip(*position, strict=True) if i >= 0} for position in flat]


def assert_close(given: Entries, decoded: Entries) -> None:
    """Check that the grid moves an entry by less than 0.02 nat: half a step and a 64th."""
    assert given.keys() == decoded.keys()
    for index, logprob in given.items():
        assert decoded[index] == pytest.approx(logprob, abs=0.02)


@st.composite
def positions(draw: st.DrawFn, vocab_size: int, width: int) -> tuple[Entries, float]:
    """Entries and tail that sum to 1: ties, far outliers, both ends of the vocabulary, or no entry at all.

    Of the best entries of 1,000,000 the first has a millionth of the tail or more: 13.8 nats at most.
    """
    edges = st.sampled_from([0, vocab_size - 1])
    ids = draw(st.lists(edges | st.integers(0, vocab_size - 1), max_size=min(width, vocab_size), unique=True))
    if not ids:
        return NOTHING, -np.inf
    logits = st.integers(-80, 0).map(lambda eighths: eighths / 8) | st.floats(-200, 0)
    values = draw(st.lists(logits, min_size=len(ids), max_size=len(ids)))
    tail = draw(st.none() | st.floats(-200, 13.8).map(lambda above: max(values) + above))
    total = np.logaddexp.reduce([*values, -np.inf if tail is None else tail])
    entries = {index: float(value - total) for index, value in zip(ids, values, strict=True)}
    return entries, -np.inf if tail is None else float(tail - total)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_log_probabilities_come_back(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([1, 2, 50, 3_000, 1_000_000]))
    target = Target(top_k=data.draw(st.sampled_from([1, 2, 7])))
    drawn = [data.draw(positions(vocab_size, target.width)) for _ in range(SEQ_LENGTH)]
    arrays = make_arrays([entries for entries, _ in drawn], [tail for _, tail in drawn], target.width)
    ids, logprobs, tails = round_trip(arrays, empty_codebook(vocab_size, target), target)
    for (entries, tail), decoded, decoded_tail in zip(
        drawn, by_id(ids, logprobs), tails.ravel(), strict=True
    ):
        assert_close(entries, decoded)
        # The tail lies on the same grid.
        assert decoded_tail == tail if tail == -np.inf else decoded_tail == pytest.approx(tail, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_counts_come_back_exactly(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([24, 3_000, 1_000_000]))
    target = Target(kind="sampled", samples=data.draw(st.sampled_from([1, 2, 24])))
    drawn: list[Entries] = []
    for _ in range(SEQ_LENGTH):
        draws = data.draw(
            st.lists(st.integers(0, vocab_size - 1), min_size=target.samples, max_size=target.samples)
            | st.integers(0, vocab_size - 1).map(lambda index: [index] * target.samples)
            | st.just([])
        )
        drawn.append({index: np.log(draws.count(index) / target.samples) for index in set(draws)})
    arrays = make_arrays(drawn, [-np.inf] * SEQ_LENGTH, target.width)
    ids, logprobs, tails = round_trip(arrays, empty_codebook(vocab_size, target), target)
    for entries, decoded in zip(drawn, by_id(ids, logprobs), strict=True):
        assert decoded == pytest.approx(entries, abs=1e-6)
    assert np.isneginf(tails).all()


def test_mass_that_rounds_above_one() -> None:
    entries = {7: np.log(0.6) + 1e-4, 3: np.log(0.4) + 1e-4}
    target = Target(top_k=2)
    arrays = make_arrays([entries] * SEQ_LENGTH, [-np.inf] * SEQ_LENGTH, 2)
    ids, logprobs, _ = round_trip(arrays, empty_codebook(10, target), target)
    assert_close(entries, by_id(ids, logprobs)[0])


def make_teacher(n: int, width: int, seed: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Answers [n, width] of a vocabulary of 4,000 in four quarters: a position's candidates are of one."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2.5, (n, 1_000))
    logits -= np.arange(1_000) / 150
    logprobs = np.sort(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), axis=1)[:, ::-1]
    ids = np.argsort(-logits, axis=1) * 4 + random.integers(4, size=(n, 1))
    return ids[:, :width].astype(np.int32), logprobs[:, :width].astype(np.float32)


def test_errors_are_small_and_without_drift() -> None:
    target = Target(top_k=64)
    ids, logprobs = make_teacher(4_000, 64, seed=0)
    tail = np.log1p(-np.exp(logprobs.astype(np.float64)).sum(axis=1))
    shape = (-1, SEQ_LENGTH)
    codebook = fit_codebook(ids[:400], logprobs[:400], target, 4_000)
    assert codebook.step == pytest.approx(0.0385)
    arrays = (ids.reshape(*shape, 64), logprobs.reshape(*shape, 64), tail.astype(np.float32).reshape(shape))
    decoded_ids, decoded, decoded_tail = round_trip(arrays, codebook, target)
    # Ties may have changed places; compare by id.
    orders = [np.argsort(entries, axis=-1) for entries in (arrays[0], decoded_ids)]
    original, stored = (
        np.take_along_axis(values, order, axis=-1)
        for values, order in zip((arrays[1], decoded), orders, strict=True)
    )
    error = (stored - original).astype(np.float64)
    assert np.abs(error).max() <= 0.02  # half a step and a 64th
    assert np.abs(error).mean() <= 0.01  # a quarter of a step
    lost = (np.exp(original) * -error).sum(-1) + np.exp(arrays[2]) * (arrays[2] - decoded_tail)
    assert lost.mean() <= 1e-4
    by_rank = np.take_along_axis(error, np.argsort(-original, axis=-1), axis=-1).mean(axis=(0, 1))
    assert np.abs(by_rank).max() < 1e-3


def test_a_ranking_for_each_kind_of_position() -> None:
    target = Target(top_k=16)
    codebook = fit_codebook(*make_teacher(2_000, 16, seed=1), target, 4_000)
    assert codebook.rankings.shape == (8, 2_048)
    ids, logprobs = make_teacher(400, 16, seed=2)
    shape = (100, SEQ_LENGTH)
    arrays = ids.reshape(*shape, 16), logprobs.reshape(*shape, 16), np.zeros(shape, np.float32)
    stored = encode(arrays, codebook, target)
    # A position's candidates are its quarter's 1,000 ids, which fill the first places of its ranking.
    assert np.percentile(stored["codes"], 90) < 1_000
    quarters = [np.unique(ids[stored["rankings"].ravel() == ranking, 0] % 4) for ranking in range(8)]
    assert all(len(values) <= 1 for values in quarters)


def test_a_head_in_bfloat16_gets_the_grid_that_fits_it() -> None:
    logprobs = np.sort(np.round(make_teacher(500, 64, seed=3)[1] * 8) / 8)[:, ::-1].astype(np.float32)
    ids = make_teacher(500, 64, seed=3)[0]
    assert fit_codebook(ids, logprobs, Target(), 4_000).step == 1 / 32


def test_fit_is_deterministic_and_its_tables_come_back() -> None:
    tables = [
        fit_codebook(*make_teacher(1_000, 16, seed=4), Target(top_k=16), 4_000).arrays() for _ in range(2)
    ]
    again = Codebook.from_arrays(tables[0]).arrays()
    assert tables[0].keys() == again.keys()
    for name, table in tables[0].items():
        np.testing.assert_array_equal(table, tables[1][name])
        np.testing.assert_array_equal(table, again[name])
        assert table.dtype == again[name].dtype


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("step", np.array([0], np.float32)),
        ("step", np.array([np.nan], np.float32)),
        ("step", np.array([0.03, 0.03], np.float32)),
        ("common", np.array([0, 1, 2, 2], np.int32)),
        ("common", np.array([0, 1, 2, 4], np.int32)),
        ("common", np.array([0, 1, 2, 3], np.float32)),
        ("common", np.zeros((2, 2), np.int32)),
        ("common", np.zeros(0, np.int32)),
        ("rankings", np.array([[0, 0]], np.int32)),
        ("rankings", np.array([[0, 4]], np.int32)),
        ("rankings", np.array([[0, -1]], np.int32)),
        ("rankings", np.zeros((0, 2), np.int32)),
        ("rankings", np.array([0, 1], np.int32)),
        ("rankings", None),
    ],
)
def test_tables_that_make_no_sense(name: str, table: NDArray[np.generic] | None) -> None:
    tables = dict(empty_codebook(4, Target()).arrays())
    Codebook.from_arrays(tables)
    if table is None:
        del tables[name]
    else:
        tables[name] = table
    with pytest.raises(ValueError, match=r"\w"):
        Codebook.from_arrays(tables)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_integers_are_refused_or_harmless(data: st.DataObject) -> None:
    target = data.draw(st.sampled_from([Target(top_k=3), Target(kind="sampled", samples=3)]))
    codebook = empty_codebook(50, target)
    good = make_arrays([{4: np.log(2 / 3), 9: np.log(1 / 3)}] * SEQ_LENGTH, [-np.inf] * SEQ_LENGTH, 3)
    stored = encode(good, codebook, target)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(stored)))
        index = data.draw(st.integers(0, stored[name].shape[1] - 1))
        most = int(np.iinfo(stored[name].dtype).max)
        stored[name][0, index] = data.draw(st.integers(0, 60) | st.integers(0, most) | st.just(most))
    try:
        targets = codec.decode(stored, codebook, target)
    except ValueError:
        return
    assert targets.ids.min(initial=-1) >= -1
    assert targets.ids.max(initial=-1) < 50
    assert not np.isnan(targets.logprobs).any()
    assert not np.isnan(targets.tail_logprob).any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("entries", 4, "4 entries"), ("rankings", 1, "out of range"), ("codes", 2**32 - 1, "out of range")],
)
def test_what_is_refused(name: str, value: int, message: str) -> None:
    target = Target(top_k=3)
    codebook = empty_codebook(50, target)
    stored = encode(make_arrays([{4: 0.0}] * SEQ_LENGTH, [-np.inf] * SEQ_LENGTH, 3), codebook, target)
    stored[name][0, 0] = value
    with pytest.raises(ValueError, match=message):
        codec.decode(stored, codebook, target)


def test_rankings_hold_no_more_ids_than_are_clustered() -> None:
    """The tables for coding have a row for each: a stranger's could take a gigabyte."""
    ids = np.arange(40_000, dtype=np.int32)
    with pytest.raises(ValueError, match="at most 32,768 ids in all"):
        Codebook(1 / 32, ids, ids.reshape(20, 2_000))
    Codebook(1 / 32, ids, ids[: 1 << 15].reshape(16, 2_048))
