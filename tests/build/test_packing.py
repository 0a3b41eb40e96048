"""Packing and the validation choice: nothing lost, nothing twice, nothing in both splits."""

import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_build.documents import Document, Intake, from_columns, to_columns
from ddk_build.holdout import HELD_OUT, Splitter, Splitting, split_rows
from ddk_build.ledger import Ledger, Others
from ddk_build.packing import MOST_SEGMENTS, Packer, RowBatch, batch, pack
from ddk_build.pieces import UNANSWERED, pieces

Piece = tuple[int, ...]


def make_documents(lengths: Sequence[int], seed: int = 0) -> list[Document]:
    """Documents of the given lengths, every token of all of them another number, from 1 on."""
    random = np.random.default_rng(seed)
    digests = random.permutation(max(len(lengths), 1)) * 1000
    starts = np.cumsum([1, *lengths])
    return [
        Document(np.arange(start, start + length, dtype=np.int32), random.random(length) < 0.7, int(digest))
        for start, length, digest in zip(starts, lengths, digests, strict=False)
    ]


def split(
    documents: Iterable[Document],
    seq_length: int,
    validation_rows: int,
    intake: Intake | None = None,
    **how: Any,
) -> dict[str, list[RowBatch]]:
    found: dict[str, list[RowBatch]] = defaultdict(list)
    splitting = Splitting(seq_length, validation_rows, **how)
    for name, row in split_rows(documents, splitting, Intake() if intake is None else intake):
        found[name].append(batch([row], seq_length))
    return found


def segments(batches: Iterable[RowBatch]) -> list[Piece]:
    """The tokens of every segment, row by row."""
    return [
        tuple(tokens[numbers == number].tolist())
        for rows in batches
        for tokens, numbers in zip(rows.tokens, rows.segments, strict=True)
        for number in range(1, int(numbers.max()) + 1)
    ]


def count_rows(batches: Iterable[RowBatch]) -> int:
    return sum(len(rows.tokens) for rows in batches)


def all_pieces(documents: Iterable[Document], seq_length: int) -> list[Piece]:
    return [
        tuple(document.tokens[start : start + seq_length].tolist())
        for document in documents
        for start in range(0, len(document), seq_length)
    ]


lengths_of_documents = st.lists(st.integers(2, 60), min_size=2, max_size=60)


@given(lengths_of_documents, st.integers(2, 24), st.integers(1, 5))
def test_packing_keeps_every_token_once_and_in_order(
    lengths: list[int], seq_length: int, open_rows: int
) -> None:
    documents = make_documents(lengths)
    rows = batch(pack(documents, Packer(seq_length, open_rows)), seq_length)
    assert sorted(segments([rows])) == sorted(all_pieces(documents, seq_length))
    for tokens, numbers in zip(rows.tokens, rows.segments, strict=True):
        used = int((numbers > 0).sum())
        assert used > 0
        assert (np.diff(numbers[:used].astype(int)) >= 0).all()
        assert not numbers[used:].any()
        assert not tokens[used:].any()


@given(lengths_of_documents, st.integers(2, 24))
def test_a_position_has_a_label_where_the_next_token_is_of_its_segment_and_counts(
    lengths: list[int], seq_length: int
) -> None:
    documents = make_documents(lengths)
    counts = np.concatenate([[False], *(document.counts for document in documents)])  # by token
    rows = batch(pack(documents, Packer(seq_length)), seq_length)
    for tokens, numbers, mask in zip(rows.tokens, rows.segments, rows.loss_mask, strict=True):
        for t in range(seq_length):
            same = t + 1 < seq_length and numbers[t] > 0 and numbers[t] == numbers[t + 1]
            assert mask[t] == (same and counts[tokens[t + 1]])


@settings(deadline=None)
@given(lengths_of_documents, st.integers(2, 24), st.integers(1, 6))
def test_the_splits_share_no_document_and_lose_none(
    lengths: list[int], seq_length: int, validation_rows: int
) -> None:
    documents = make_documents(lengths)
    intake, ledger = Intake(), Ledger()
    found = split(documents, seq_length, validation_rows, intake, ledger=ledger)
    train, validation = segments(found["train"]), segments(found["validation"])
    owner = {tokens: index for index, one in enumerate(documents) for tokens in one.tokens.tolist()}
    in_train = {owner[piece[0]] for piece in train}
    in_validation = {owner[piece[0]] for piece in validation}
    assert not in_train & in_validation
    assert in_train | in_validation == set(range(len(documents)))
    assert sum(map(len, train)) + sum(map(len, validation)) + intake.left_over == sum(lengths)
    assert 1 <= count_rows(found["validation"]) <= min(validation_rows, count_rows(found["train"]))
    assert ledger.held_out == {documents[index].digest for index in in_validation}


@pytest.mark.parametrize("longest", [5, 16, 100])
def test_with_enough_data_there_are_exactly_the_rows_asked_for(longest: int) -> None:
    documents = make_documents(np.random.default_rng(1).integers(2, longest + 1, 3000).tolist())
    intake = Intake()
    found = split(documents, 16, 20, intake)
    assert count_rows(found["validation"]) == 20
    assert intake.left_over < 20 * longest


def test_the_validation_split_has_the_smallest_digests() -> None:
    documents = make_documents([8] * 500)
    found = split(documents, 16, 10)
    smallest = sorted(documents, key=lambda document: document.digest)[:20]
    assert sorted(segments(found["validation"])) == sorted(all_pieces(smallest, 16))


def test_the_choice_does_not_hang_on_the_order_of_the_documents() -> None:
    documents = make_documents(np.random.default_rng(2).integers(2, 30, 400).tolist())
    forwards, backwards = (split(some, 16, 10) for some in (documents, documents[::-1]))
    for one, other in zip(forwards["validation"], backwards["validation"], strict=True):
        assert np.array_equal(one.tokens, other.tokens)


def test_the_same_documents_give_the_same_rows() -> None:
    lengths = np.random.default_rng(3).integers(2, 50, 300).tolist()
    one, other = (split(make_documents(lengths), 16, 5) for _ in range(2))
    for name in ("train", "validation"):
        for rows, again in zip(one[name], other[name], strict=True):
            for array in ("tokens", "segments", "loss_mask"):
                assert np.array_equal(getattr(rows, array), getattr(again, array))


def test_copies_of_a_document_stay_on_one_side() -> None:
    documents = make_documents([6] * 200)
    copied = [document for document in documents for _ in range(3)]
    intake = Intake(rows=600, documents=600, tokens=3600)
    found = split(copied, 16, 5, intake)
    train, validation = Counter(segments(found["train"])), Counter(segments(found["validation"]))
    assert not train.keys() & validation.keys()
    assert set(validation.values()) == {1}
    assert set(train.values()) == {3}
    assert intake.skipped == {HELD_OUT: 2 * len(validation)}
    assert intake.documents == 3 * len(train) + len(validation)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_document_that_comes_a_thousand_times_goes_to_train(swapped: bool) -> None:
    often, once = make_documents([4, 4])[:: -1 if swapped else 1]
    found = split([once, *[often] * 1_000], 8, 2)
    assert Counter(segments(found["train"])) == {tuple(often.tokens.tolist()): 1_000}
    assert segments(found["validation"]) == [tuple(once.tokens.tolist())]


def test_more_documents_later_leave_what_is_there() -> None:
    documents = make_documents(np.random.default_rng(4).integers(2, 30, 600).tolist())
    early, late = documents[:400], documents[400:]
    intake, ledger = Intake(), Ledger()
    before = split(early, 16, 10, intake, ledger=ledger)
    held_out, left_over = set(ledger.held_out), intake.left_over
    [copy, *_] = [document for document in early if document.digest in held_out]
    after = split([*late, copy], 16, 0, intake, ledger=ledger, others=Others([ledger]))
    assert list(after) == ["train"]
    assert (ledger.held_out, intake.left_over) == (held_out, left_over)
    assert intake.skipped == {HELD_OUT: 1}
    assert sorted(segments(after["train"])) == sorted(all_pieces(late, 16))
    assert not set(segments(after["train"])) & set(segments(before["validation"]))


def test_a_validation_split_that_began_small_grows() -> None:
    documents = make_documents([8] * 600)
    ledger = Ledger()
    before = split(documents[:10], 16, 20, ledger=ledger)
    rows = count_rows(before["validation"])
    assert rows == 3
    later = [*documents[:10], *documents[10:]]  # with copies of all that is there
    after = split(later, 16, 20 - rows, ledger=ledger, others=Others([ledger]))
    assert count_rows(after["validation"]) == 17
    assert not set(segments(before["train"])) & set(segments(after["validation"]))
    assert not set(segments(before["validation"])) & set(segments(after["train"] + after["validation"]))


@pytest.mark.parametrize("swapped", [False, True])
def test_what_one_domain_holds_out_no_other_trains_on(swapped: bool) -> None:
    documents = make_documents([8] * 1000)
    domains = [documents[:700], documents[680:720]][:: -1 if swapped else 1]
    ledgers: list[Ledger] = []
    train: list[set[Piece]] = []
    validation: list[set[Piece]] = []
    for some in domains:
        ledger = Ledger()
        found = split(some, 16, 8, ledger=ledger, others=Others(ledgers))
        ledgers.append(ledger)
        train.append(set(segments(found["train"])))
        validation.append(set(segments(found["validation"])))
    assert all(validation)
    assert not (train[0] | train[1]) & (validation[0] | validation[1])


def test_domains_of_the_same_documents_hold_out_the_same() -> None:
    documents = make_documents([8] * 100)
    ledger = Ledger()
    one = split(documents, 16, 8, ledger=ledger)
    other = split(documents[::-1], 16, 8, others=Others([ledger]))
    assert segments(one["validation"]) == segments(other["validation"])


def test_read_again_with_the_same_choice_the_same_rows_come_out() -> None:
    """Other domains may hold out more by then, of what this one has not; so the choice is not made anew."""
    documents = make_documents(np.random.default_rng(6).integers(2, 60, 300).tolist())
    ledger = Ledger()
    before = split(documents, 16, 12, ledger=ledger, others=Others([]))
    elsewhere = Ledger()
    elsewhere.add_train(document.digest for document in documents[::2])
    again = split(documents, 16, 12, others=Others([elsewhere]), chosen=ledger.held_out)
    for name in ("train", "validation"):
        assert [rows.tokens.tolist() for rows in before[name]] == [
            rows.tokens.tolist() for rows in again[name]
        ]


def test_the_validation_rows_are_of_many_documents() -> None:
    found = split(make_documents([60] * 100), 10, 12)
    assert len({piece[0] // 60 for piece in segments(found["validation"])}) == 12
    # Of four documents two are held out; they fill what two pieces could not.
    assert count_rows(split(make_documents([60] * 4), 10, 12)["validation"]) == 12


def test_what_may_be_held_out_keeps_nothing_else_of_its_part() -> None:
    """Documents come as views of all that was tokenised with them."""
    splitter = Splitter(Splitting(8, 2), Intake())
    parts = []
    for number in range(20):
        some = make_documents([8] * 10, number)
        columns = to_columns([replace(one, digest=20 * one.digest + number) for one in some])
        for document in from_columns(columns):
            assert all(len(row) == 1 for row in splitter.add([document]))
        parts.append(weakref.ref(columns["tokens"]))
    del columns, document
    assert [part() for part in parts] == [None] * 20
    assert Counter(split for split, _ in splitter.finish())["validation"] == 2


def test_a_ledger_comes_back_as_it_was() -> None:
    ledger = Ledger([3, 1 << 63])
    ledger.add_train((7, 1 << 62, (1 << 64) - 1))
    found = Ledger.unpack(ledger.pack())
    assert found is not None
    assert found.held_out == {3, 1 << 63}
    others = Others([found])
    assert all(map(others.may_train, (7, 1 << 62, (1 << 64) - 1)))
    assert not others.may_train(8)
    assert Ledger.unpack(ledger.pack()[:-1]) is None
    assert Ledger.unpack(b"anything") is None


@given(st.integers(2, 200), st.integers(2, 30), st.integers(0, 15), st.integers(0, 1))
def test_a_long_text_is_cut_with_context_in_front(
    length: int, seq_length: int, overlap: int, head: int
) -> None:
    """Every token is there, in order, and a label once at most; what is repeated carries no loss."""
    overlap = min(overlap, seq_length // 2)
    head = min(head, seq_length // 2 - overlap)
    document = Document(np.arange(length, dtype=np.int32), np.ones(length, np.bool_), 0, max(head, 0))
    found = pieces(document, seq_length, overlap)
    assert all(len(piece) <= seq_length for piece in found)
    new = np.concatenate([piece.tokens[piece.context :] for piece in found])
    assert new.tolist() == list(range(length))
    for before, piece in itertools.pairwise(found):
        start = int(piece.tokens[piece.context])
        assert piece.tokens[:head].tolist() == list(range(head))
        assert piece.tokens[head : piece.context].tolist() == list(range(max(start - overlap, head), start))
        assert not piece.counts[: piece.context].any()
        # Behind a BOS token alone nobody can know what comes.
        assert piece.counts[piece.context :].all() == (not head or piece.context > head)
        assert int(before.tokens[-1]) == start - 1


def test_a_conversation_is_cut_in_front_of_its_questions() -> None:
    """System message of 2 tokens; exchanges of 6, 6, 20 and 4, each a question of 2 and its answer."""
    counts, questions = [False] * 2, []
    for size in (6, 6, 20, 4):
        questions.append(len(counts))
        counts += [False] * 2 + [True] * (size - 2)
    document = Document(
        np.arange(38, dtype=np.int32), np.array(counts), 0, head=2, questions=np.array(questions[1:])
    )
    left_out: Counter[str] = Counter()
    found = pieces(document, 14, left_out=left_out)
    assert [piece.tokens.tolist() for piece in found] == [
        list(range(14)),
        [0, 1, *range(14, 26)],
        [0, 1, *range(34, 38)],
    ]
    assert [piece.counts.tolist() for piece in found] == [
        counts[:14],
        [False, False, *counts[14:26]],
        [False, False, *counts[34:]],
    ]
    assert left_out == {UNANSWERED: 8}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_document_longer_than_half_of_the_domain_goes_to_train(order: tuple[int, ...]) -> None:
    documents = make_documents([500, 20, 20])
    for digests in itertools.permutations(range(3)):
        some = [replace(documents[index], digest=digests[index]) for index in order]
        found = split(some, 16, 10)
        assert 500 in {max(piece) for piece in segments(found["train"])}
        assert count_rows(found["validation"]) in (2, 3)  # one of the short documents, or both


def test_validation_never_has_more_rows_than_train() -> None:
    """Five documents of six tokens need five rows of ten; three of ten tokens need three."""
    some = [
        replace(document, digest=index) for index, document in enumerate(make_documents([6] * 5 + [10] * 3))
    ]
    intake = Intake()
    found = split(some, 10, 20, intake)
    assert segments(found["validation"]) == all_pieces(some[:3], 10)
    assert count_rows(found["train"]) == 3
    assert intake.left_over == 12


@pytest.mark.parametrize("seq_length", [128, 1024])
def test_rows_are_nearly_full(seq_length: int) -> None:
    random = np.random.default_rng(5)
    lengths = np.clip(random.lognormal(5.5, 1.2, 4000), 2, 20_000).astype(int).tolist()
    rows = batch(pack(make_documents(lengths), Packer(seq_length)), seq_length)
    assert (rows.segments > 0).mean() > 0.97


def test_a_row_holds_no_more_segments_than_uint16_counts() -> None:
    one = Document(np.array([1], np.int32), np.array([True]), 0)
    rows = pack([one] * (MOST_SEGMENTS + 1), Packer(100_000))
    assert list(map(len, rows)) == [MOST_SEGMENTS, 1]
    assert batch(rows[:1], 100_000).segments.max() == MOST_SEGMENTS


class Counted(Document):
    """A document that counts how often it is asked for its length."""

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
        counted = [Counted(one.tokens, one.counts, one.digest) for one in documents]
        Counted.asked = 0
        split(counted, 64, rows)
        asked.append(Counted.asked)
    assert asked[1] < 6 * asked[0]
