"""The validation choice: nothing lost, nothing twice, nothing in both splits."""

import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from helpers.documents import Chunk, all_chunks, count_rows, make_documents, segments, split_documents
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddk_build.data.documents import ColumnarDocuments, Document, IngestStatistics
from ddk_build.data.packing.document_index import DocumentIndex
from ddk_build.data.packing.holdout import (
    HELD_OUT,
    MOST_HELD_OUT,
    RESERVE,
    TRIM_AT,
    Candidates,
    SplitSettings,
    Splitter,
)
from ddk_build.data.packing.packer import Arrays, to_arrays

lengths_of_documents = st.lists(st.integers(2, 60), min_size=2, max_size=60)


def split(
    documents: Iterable[Document],
    seq_length: int,
    validation_rows: int,
    statistics: IngestStatistics | None = None,
    *,
    index: DocumentIndex | None = None,
    others: Iterable[DocumentIndex] = (),
    chosen: frozenset[int] | None = None,
    bounded: bool = False,
) -> dict[str, list[Arrays]]:
    splits: dict[str, list[Arrays]] = defaultdict(list)
    how = SplitSettings(seq_length, validation_rows, bounded, chosen=chosen)
    rows = split_documents(list(documents), how, statistics or IngestStatistics(), index, others)
    for name, row in rows:
        splits[name].append(to_arrays([row], seq_length))
    return splits


@settings(deadline=None)
@given(lengths_of_documents, st.integers(2, 24), st.integers(1, 6))
@example([3, 9, 9, 21], 11, 3)  # of three validation rows train has two, so a document is left over
def test_the_splits_share_no_document_and_lose_none(
    lengths: list[int], seq_length: int, validation_rows: int
) -> None:
    documents = make_documents(lengths)
    statistics, index = IngestStatistics(), DocumentIndex()
    splits = split(documents, seq_length, validation_rows, statistics, index=index)
    train, validation = segments(splits["train"]), segments(splits["validation"])
    owner = {tokens: index for index, one in enumerate(documents) for tokens in one.tokens.tolist()}
    in_train = {owner[chunk[0]] for chunk in train}
    in_validation = {owner[chunk[0]] for chunk in validation}
    assert not in_train & in_validation
    left_over = set(range(len(documents))) - in_train - in_validation
    assert sum(lengths[index] for index in left_over) <= statistics.left_over
    assert sum(map(len, train)) + sum(map(len, validation)) + statistics.left_over == sum(lengths)
    assert 1 <= count_rows(splits["validation"]) <= min(validation_rows, count_rows(splits["train"]))
    assert index.held_out == {documents[index].digest for index in in_validation | left_over}


@pytest.mark.parametrize("longest", [5, 16, 100])
def test_with_enough_data_there_are_exactly_the_rows_asked_for(longest: int) -> None:
    documents = make_documents(np.random.default_rng(1).integers(2, longest + 1, 3000).tolist())
    statistics = IngestStatistics()
    splits = split(documents, 16, 20, statistics)
    assert count_rows(splits["validation"]) == 20
    assert statistics.left_over < 20 * longest


@pytest.mark.parametrize(
    ("documents", "length", "expected"), [(66, 16, 3), (660, 8, 16), (5, 8, 1), (60, 50, 9)]
)
def test_by_default_at_most_a_twentieth_is_held_out(documents: int, length: int, expected: int) -> None:
    some = make_documents([length] * documents)
    splits = split(some, 16, 500, bounded=True)
    validation = count_rows(splits["validation"])
    assert validation == expected == max(1, sum(map(len, some)) // 16 // 20)
    owners = {chunk[0] // length for chunk in segments(splits["validation"])}
    assert len(owners) >= min(2, validation)


def test_the_bound_holds_after_growth() -> None:
    documents = make_documents([16] * 400)
    index = DocumentIndex()
    before = split(documents[:100], 16, 500, index=index, bounded=True)
    after = split(documents[100:], 16, 500 - count_rows(before["validation"]), index=index, bounded=True)
    assert [count_rows(splits["validation"]) for splits in (before, after)] == [5, 15]


def test_the_validation_split_has_the_smallest_digests() -> None:
    documents = make_documents([8] * 500)
    splits = split(documents, 16, 10)
    smallest = sorted(documents, key=lambda document: document.digest)[:20]
    assert sorted(segments(splits["validation"])) == sorted(all_chunks(smallest, 16))


def test_the_choice_does_not_hang_on_the_order_of_the_documents() -> None:
    documents = make_documents(np.random.default_rng(2).integers(2, 30, 400).tolist())
    forwards, backwards = (split(some, 16, 10) for some in (documents, documents[::-1]))
    for one, other in zip(forwards["validation"], backwards["validation"], strict=True):
        assert np.array_equal(one["tokens"], other["tokens"])


def test_the_same_documents_give_the_same_rows() -> None:
    lengths = np.random.default_rng(3).integers(2, 50, 300).tolist()
    one, other = (split(make_documents(lengths), 16, 5) for _ in range(2))
    for name in ("train", "validation"):
        for rows, again in zip(one[name], other[name], strict=True):
            for array in ("tokens", "segments", "loss_mask"):
                assert np.array_equal(rows[array], again[array])


def test_copies_of_a_document_stay_on_one_side() -> None:
    documents = make_documents([6] * 200)
    copied = [document for document in documents for _ in range(3)]
    statistics = IngestStatistics(rows=600, documents=600, tokens=3600)
    splits = split(copied, 16, 5, statistics)
    train, validation = Counter(segments(splits["train"])), Counter(segments(splits["validation"]))
    assert not train.keys() & validation.keys()
    assert set(validation.values()) == {1}
    assert set(train.values()) == {3}
    assert statistics.skipped == {HELD_OUT: 2 * len(validation)}
    assert statistics.documents == 3 * len(train) + len(validation)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_document_that_comes_a_thousand_times_goes_to_train(swapped: bool) -> None:
    often, once = make_documents([4, 4])[:: -1 if swapped else 1]
    splits = split([once, *[often] * 1_000], 8, 2)
    assert Counter(segments(splits["train"])) == {tuple(often.tokens.tolist()): 1_000}
    assert segments(splits["validation"]) == [tuple(once.tokens.tolist())]


def test_more_documents_later_leave_what_is_there() -> None:
    documents = make_documents(np.random.default_rng(4).integers(2, 30, 600).tolist())
    early, late = documents[:400], documents[400:]
    statistics, index = IngestStatistics(), DocumentIndex()
    before = split(early, 16, 10, statistics, index=index)
    held_out, left_over = set(index.held_out), statistics.left_over
    [copy, *_] = [document for document in early if document.digest in held_out]
    after = split([*late, copy], 16, 0, statistics, index=index)
    assert list(after) == ["train"]
    assert (index.held_out, statistics.left_over) == (held_out, left_over)
    assert statistics.skipped == {HELD_OUT: 1}
    assert sorted(segments(after["train"])) == sorted(all_chunks(late, 16))
    assert not set(segments(after["train"])) & set(segments(before["validation"]))


def test_a_validation_split_that_began_small_grows() -> None:
    documents = make_documents([8] * 600)
    index = DocumentIndex()
    before = split(documents[:10], 16, 20, index=index)
    rows = count_rows(before["validation"])
    assert rows == 3
    later = [*documents[:10], *documents[10:]]  # with copies of all that is there
    after = split(later, 16, 20 - rows, index=index)
    assert count_rows(after["validation"]) == 17
    assert not set(segments(before["train"])) & set(segments(after["validation"]))
    assert not set(segments(before["validation"])) & set(segments(after["train"] + after["validation"]))


@pytest.mark.parametrize("swapped", [False, True])
def test_what_one_domain_holds_out_no_other_trains_on(swapped: bool) -> None:
    documents = make_documents([8] * 1000)
    domains = [documents[:700], documents[680:720]][:: -1 if swapped else 1]
    indexes: list[DocumentIndex] = []
    train: list[set[Chunk]] = []
    validation: list[set[Chunk]] = []
    for some in domains:
        index = DocumentIndex()
        splits = split(some, 16, 8, index=index, others=indexes)
        indexes.append(index)
        train.append(set(segments(splits["train"])))
        validation.append(set(segments(splits["validation"])))
    assert all(validation)
    assert not (train[0] | train[1]) & (validation[0] | validation[1])


def test_domains_of_the_same_documents_hold_out_the_same() -> None:
    documents = make_documents([8] * 100)
    index = DocumentIndex()
    one = split(documents, 16, 8, index=index)
    other = split(documents[::-1], 16, 8, others=[index])
    assert segments(one["validation"]) == segments(other["validation"])


def test_read_again_with_the_same_choice_the_same_rows_come_out() -> None:
    """The choice is repeated, not made again: other domains may hold out more documents by then."""
    documents = make_documents(np.random.default_rng(6).integers(2, 60, 300).tolist())
    index = DocumentIndex()
    before = split(documents, 16, 12, index=index)
    elsewhere = DocumentIndex()
    elsewhere.add_train(document.digest for document in documents[::2])
    again = split(documents, 16, 12, others=[elsewhere], chosen=frozenset(index.held_out))
    for name in ("train", "validation"):
        assert [rows["tokens"].tolist() for rows in before[name]] == [
            rows["tokens"].tolist() for rows in again[name]
        ]


def test_the_validation_rows_are_of_many_documents() -> None:
    splits = split(make_documents([60] * 100), 10, 12)
    assert len({chunk[0] // 60 for chunk in segments(splits["validation"])}) == 12
    # Of four documents two are held out; they fill what two chunks could not.
    assert count_rows(split(make_documents([60] * 4), 10, 12)["validation"]) == 12


def test_what_may_be_held_out_keeps_nothing_else_of_its_part() -> None:
    """Documents come as views of all that was tokenised with them."""
    splitter = Splitter(SplitSettings(8, 2), IngestStatistics(), DocumentIndex())
    parts = []
    for number in range(20):
        some = make_documents([8] * 10, number)
        columns = ColumnarDocuments.of([replace(one, digest=20 * one.digest + number) for one in some])
        for document in columns.to_documents():
            assert all(len(row) == 1 for row in splitter.add([document]))
        parts.append(weakref.ref(columns.tokens))
    del columns, document
    assert [part() for part in parts] == [None] * 20
    assert Counter(split for split, _ in splitter.finish())["validation"] == 2


def test_an_index_comes_back_as_it_was() -> None:
    index = DocumentIndex([3, 1 << 63])
    index.add_train((7, 1 << 62, (1 << 64) - 1))
    splits = DocumentIndex.from_bytes(index.to_bytes())
    assert splits is not None
    assert splits.held_out == {3, 1 << 63}
    assert all(map(splits.may_train, (7, 1 << 62, (1 << 64) - 1)))
    assert not splits.may_train(8)
    assert DocumentIndex.from_bytes(index.to_bytes()[:-1]) is None
    assert DocumentIndex.from_bytes(b"anything") is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_document_longer_than_half_of_the_domain_goes_to_train(order: tuple[int, ...]) -> None:
    documents = make_documents([500, 20, 20])
    for digests in itertools.permutations(range(3)):
        some = [replace(documents[index], digest=digests[index]) for index in order]
        splits = split(some, 16, 10)
        assert 500 in {max(chunk) for chunk in segments(splits["train"])}
        assert count_rows(splits["validation"]) in (2, 3)  # one of the short documents, or both


def test_validation_never_has_more_rows_than_train() -> None:
    """Five documents of six tokens need five rows of ten; three of ten tokens need three."""
    some = [
        replace(document, digest=index) for index, document in enumerate(make_documents([6] * 5 + [10] * 3))
    ]
    statistics = IngestStatistics()
    splits = split(some, 10, 20, statistics)
    assert segments(splits["validation"]) == all_chunks(some[:3], 10)
    assert count_rows(splits["train"]) == 3
    assert statistics.left_over == 12


class Counted(Document):
    """A document that carries_loss how often it is asked for its length."""

    __slots__ = ()
    asked = 0

    def __len__(self) -> int:
        Counted.asked += 1
        return super().__len__()


def test_holding_out_takes_time_linear_in_the_documents() -> None:
    """Of short documents the validation rows take a hundred thousand."""
    asked = []
    for rows in (8, 32):
        documents = make_documents([4] * (rows * 320))
        counted = [Counted(one.tokens, one.carries_loss, one.digest) for one in documents]
        Counted.asked = 0
        split(counted, 64, rows)
        asked.append(Counted.asked)
    assert asked[1] < 6 * asked[0]


# Domains of documents from one pool of 40 texts: (which text, how long); the same text is a copy.
a_domain = st.lists(st.integers(0, 39), min_size=2, max_size=80)
POOL = [
    replace(document, digest=(7919 * index) % 101)
    for index, document in enumerate(make_documents(np.random.default_rng(8).integers(2, 40, 40).tolist()))
]


@settings(deadline=None)
@given(st.lists(a_domain, min_size=1, max_size=3), st.integers(2, 20), st.integers(1, 6))
def test_no_document_or_copy_is_on_both_sides_of_any_two_domains(
    domains: list[list[int]], seq_length: int, validation_rows: int
) -> None:
    indexes: list[DocumentIndex] = []
    tokens: dict[str, set[int]] = {"train": set(), "validation": set()}
    for chosen in domains:
        index = DocumentIndex()
        documents = [POOL[number] for number in chosen]
        splits = split(documents, seq_length, validation_rows, index=index, others=indexes)
        indexes.append(index)
        for name, batches in splits.items():
            tokens[name].update(token for chunk in segments(batches) for token in chunk)
        held_out = sum(len(document) for document in documents if document.digest in index.held_out)
        assert held_out <= MOST_HELD_OUT * sum(map(len, documents))
    assert not tokens["train"] & tokens["validation"]


@settings(deadline=None)
@given(st.data(), a_domain, st.integers(2, 20), st.integers(1, 6))
def test_the_choice_depends_on_the_documents_and_not_on_their_order(
    data: st.DataObject, chosen: list[int], seq_length: int, validation_rows: int
) -> None:
    shuffled = data.draw(st.permutations(chosen))
    one, other = (
        split([POOL[number] for number in order], seq_length, validation_rows) for order in (chosen, shuffled)
    )
    # No more rows than train has, and these depend on the order.
    least = min(count_rows(splits["validation"]) for splits in (one, other))
    assert segments(one["validation"][:least]) == segments(other["validation"][:least])


@settings(deadline=None)
@given(a_domain, a_domain, st.integers(2, 20), st.integers(1, 6))
def test_a_domain_that_grows_keeps_its_splits(
    early: list[int], late: list[int], seq_length: int, validation_rows: int
) -> None:
    index = DocumentIndex()
    before = split([POOL[number] for number in early], seq_length, validation_rows, index=index)
    rows = validation_rows - count_rows(before["validation"])
    after = split([POOL[number] for number in late], seq_length, rows, index=index)
    train = {token for splits in (before, after) for chunk in segments(splits["train"]) for token in chunk}
    held_out = {
        token for splits in (before, after) for chunk in segments(splits["validation"]) for token in chunk
    }
    assert not train & held_out
    assert count_rows(after["validation"]) <= rows


@settings(deadline=None)
@given(a_domain, st.integers(0, 80), st.integers(2, 20), st.integers(1, 6))
def test_a_splitter_resumes_from_its_state(
    chosen: list[int], cut: int, seq_length: int, validation_rows: int
) -> None:
    documents = [POOL[number] for number in chosen]
    how, statistics, index = SplitSettings(seq_length, validation_rows), IngestStatistics(), DocumentIndex()
    rows = [
        [chunk.tokens.tolist() for chunk in row] for _, row in split_documents(documents, how, statistics)
    ]
    resumed_statistics = IngestStatistics()
    first = Splitter(how, resumed_statistics, index)
    splits = first.add(documents[:cut])
    second = Splitter(how, resumed_statistics, index)
    second.restore({group: dict(arrays) for group, arrays in first.state().items()})
    splits += second.add(documents[cut:])
    splits += [row for _, row in second.finish()]
    assert [[chunk.tokens.tolist() for chunk in row] for row in splits] == rows
    assert resumed_statistics == statistics


def test_memory_is_bounded_by_the_validation_rows() -> None:
    how = SplitSettings(16, 4)
    candidates = Candidates(how)
    for document in make_documents([8] * 5000):
        if document.digest <= candidates.threshold:
            candidates.offer(document)
        assert 8 * len(candidates.by_digest) <= TRIM_AT * RESERVE * how.capacity
    assert 8 * len(candidates.by_digest) >= RESERVE * how.capacity


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(2, 40)), min_size=2, max_size=60), st.integers(1, 6)
)
def test_the_documents_of_a_group_are_in_one_split(some: list[tuple[int, int]], validation_rows: int) -> None:
    """Copies in a group, of the first documents here, count as copies do."""
    documents = [
        replace(document, digest=1 + group, variant=variant)
        for variant, (document, (group, _)) in enumerate(
            zip(make_documents([length for _, length in some]), some, strict=True)
        )
    ]
    group = {token: document.digest for document in documents for token in document.tokens.tolist()}
    statistics = IngestStatistics()
    splits = split([*documents, documents[0]], 16, validation_rows, statistics)
    train, validation = segments(splits["train"]), segments(splits["validation"])
    in_train, in_validation = ({group[chunk[0]] for chunk in chunks} for chunks in (train, validation))
    assert not in_train & in_validation
    assert in_train | in_validation == set(group.values()) or len(set(group.values())) == 1
    tokens = sum(map(len, train)) + sum(map(len, validation)) + statistics.left_over
    copied = 0 if documents[0].digest in in_validation else len(documents[0])
    assert tokens == sum(map(len, documents)) + copied
