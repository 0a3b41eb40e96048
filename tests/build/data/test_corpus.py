"""Datasets into documents: every format, every odd row, chat masks, max_tokens and going on behind it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.documents import read_documents, write_rows
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ddk_build.config import DomainConfig, TeacherConfig
from ddk_build.data import sources
from ddk_build.data.documents import Document, IngestStatistics
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache.errors import ConfigError

pytestmark = pytest.mark.usefixtures("datasets_cache")

TEXTS = ["The quick brown fox", "jumps over the lazy dog", "while the teacher watches"]


def texts(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[str]:
    return [str(tokenizer.decode(document.tokens)) for document in documents]


def write_json(folder: Path) -> Path:
    return Path(write_rows(folder / "some.jsonl", [{"text": text} for text in TEXTS]))


def write_array(folder: Path) -> Path:
    path = folder / "some.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    return path


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3]}), folder / "some.parquet")
    return folder / "some.parquet"


def write_csv(folder: Path) -> Path:
    with open(folder / "some.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in TEXTS)])
    return folder / "some.csv"


def write_lines(folder: Path) -> Path:
    (folder / "some.txt").write_text("\n".join(TEXTS))
    return folder / "some.txt"


FORMATS = {
    "json": write_json,
    "array": write_array,
    "parquet": write_parquet,
    "csv": write_csv,
    "text": write_lines,
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_by_builder_folder_and_file(
    name: str, streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = FORMATS[name](folder)
    builder = "json" if name == "array" else name
    for source in (
        {"path": builder, "data_files": str(path)},
        {"path": str(folder)},
        {"path": str(path)},
        {"path": str(folder), "data_files": path.name},
    ):
        statistics = IngestStatistics()
        documents = read_documents(tokenizer, statistics, streaming=streaming, sample_by="line", **source)
        assert texts(tokenizer, documents) == [f"{text}<eos>" for text in TEXTS]
        assert all(document.carries_loss.all() for document in documents)
        assert (statistics.rows, statistics.documents, statistics.exhausted) == (3, 3, True)
        assert statistics.tokens == sum(map(len, documents))


def test_a_text_file_is_one_document_unless_told_otherwise(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.py").write_text("for index in range(10):\n    print(index)\n\nreturn a\n")
    (tmp_path / "b.py").write_text("def add(a, b):\n")
    files = {"path": "text", "data_files": str(tmp_path / "*.py")}
    whole = [f"{(tmp_path / name).read_text()}<eos>" for name in ("a.py", "b.py")]
    assert texts(tokenizer, read_documents(tokenizer, **files)) == whole
    assert len(read_documents(tokenizer, **files, sample_by="paragraph")) == 3
    statistics = IngestStatistics()
    assert len(read_documents(tokenizer, statistics, **files, sample_by="line")) == 4
    assert statistics.skipped == {"empty": 1}
    alone = write_rows(tmp_path / "alone.txt", [b"only one"])
    with pytest.raises(ConfigError, match=r"has 1 \(1 row\); with sample_by: paragraph, or line"):
        read_documents(tokenizer, path=str(alone))


@pytest.mark.parametrize("streaming", [False, True])
def test_odd_rows_are_counted_by_reason(
    streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        *({"text": odd} for odd in ("", " \n ", None, 5, ["a"], {"a": 1}, 1.5, True)),
        {"other": "no text"},
        *({"text": text} for text in TEXTS),
    ]
    statistics = IngestStatistics()
    path = write_rows(tmp_path / "odd.jsonl", rows)
    documents = read_documents(tokenizer, statistics, path=path, streaming=streaming)
    assert texts(tokenizer, documents) == [f"{text}<eos>" for text in TEXTS]
    assert statistics.skipped == {"empty": 2, "null": 2, "not a string": 5}
    assert statistics.rows == len(rows) == statistics.documents + statistics.skipped.total()


def test_a_document_of_one_token_has_no_label(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_rows(tmp_path / "short.jsonl", [{"text": text} for text in ("a", "<eos>", *TEXTS)])
    statistics = IngestStatistics()
    documents = read_documents(tokenizer, statistics, path=path)
    assert texts(tokenizer, documents)[:2] == ["a<eos>", f"{TEXTS[0]}<eos>"]
    assert statistics.skipped == {"one token": 1}


def test_the_end_of_sequence_comes_once_and_only_where_there_is_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "eos.jsonl", [{"text": "the dog<eos>"}, {"text": "the fox"}, {"text": "a"}])
    assert texts(tokenizer, read_documents(tokenizer, path=path))[:2] == ["the dog<eos>", "the fox<eos>"]
    without = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    without.eos_token = None
    statistics = IngestStatistics()
    assert texts(without, read_documents(without, statistics, path=path)) == ["the dog<eos>", "the fox"]
    assert statistics.skipped == {"one token": 1}


def test_a_text_gets_the_tokenizer_s_special_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    begins = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    documents = read_documents(begins, path=str(write_json(tmp_path)))
    assert texts(tokenizer, documents) == [f"<|im_start|>{text}<eos>" for text in TEXTS]
    chat = [{"messages": [{"role": "assistant", "content": text}]} for text in TEXTS]
    said = read_documents(begins, path=write_rows(tmp_path / "chat.jsonl", chat), messages_column="messages")
    assert texts(tokenizer, said) == [f"<|im_start|>assistant\n{text}<|im_end|>" for text in TEXTS]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt", "parquet"])
def test_bytes_that_are_not_utf8_cost_their_own_row(
    suffix: str, streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / f"latin.{suffix}"
    lines = [b"The quick fox", b"caf\xe9 noir", b"the lazy dog"]
    if suffix == "jsonl":
        path.write_bytes(b"".join(b'{"text": "' + line + b'"}\n' for line in lines))
    elif suffix == "parquet":
        binary = pa.array(lines, pa.binary())
        pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())}), path)
    else:
        path.write_bytes(b"\n".join([b"text"] * (suffix == "csv") + lines) + b"\n")
    statistics = IngestStatistics()
    documents = read_documents(tokenizer, statistics, path=str(path), sample_by="line", streaming=streaming)
    assert texts(tokenizer, documents) == ["The quick fox<eos>", "the lazy dog<eos>"]
    assert statistics.skipped == {"not valid UTF-8": 1}


def test_a_replacement_character_in_valid_json_is_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "valid.jsonl", [{"text": "the \ufffd dog"}, {"text": "the fox"}])
    assert texts(tokenizer, read_documents(tokenizer, path=path))[0] == "the \ufffd dog<eos>"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "domains.code: cannot read '{path}': it holds no rows"),
        (
            [{"text": ""}, {"text": None}],
            "domains.code: needs two different documents.*2 rows; 1 empty, first row 0; 1 null, first row 1",
        ),
        (
            [{"text": "a b"}, {"text": "a b"}],
            "domains.code: needs two different documents.* has 1 .*; all 2 documents have the same text",
        ),
        ([{"content": "a", "id": 1}], "domains.code: there is no column 'text'; there are: content, id"),
        (
            [{"text": "a"}, b'{"text": "a'],
            "domains.code: cannot read .*: line 2 of .*broken.jsonl is not JSON",
        ),
        ([{"text": "a"}, b'{"text": "\\ud800"}'], "domains.code: cannot read .*surrogate.*row 1"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    rows: list[Any],
    line: str,
    streaming: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write_rows(tmp_path / "broken.jsonl", rows)
    with pytest.raises(ConfigError, match=line.format(path=path)) as caught:
        read_documents(tokenizer, path=path, streaming=streaming)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "text\n"])
def test_a_csv_without_rows_is_said_to_have_none(
    text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "empty.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"domains\.code: cannot read '.*': it holds no rows$"):
        read_documents(tokenizer, path=str(tmp_path / "empty.csv"))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ({"path": "./nowhere"}, "path: there is no file or folder './nowhere'"),
        ({"path": "some/dataset"}, "cannot read 'some/dataset': it is not here, and as a hub id: Couldn't"),
        ({"path": "json", "data_files": "none.jsonl"}, "data_files: there is no file 'none.jsonl'"),
        ({"path": "json", "data_files": ["*.none"]}, r"data_files: no file matches '\*.none'"),
        ({"path": "none/*.jsonl"}, r"path: no file matches 'none/\*.jsonl'"),
        ({"split": "test"}, 'cannot read .*: Unknown split "test".*train'),
    ],
)
def test_a_source_that_is_not_there_is_one_line(
    source: dict[str, str], line: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ConfigError, match=f"domains.code: {line}"):
        read_documents(tokenizer, **{"path": str(write_json(tmp_path))} | source)


@pytest.mark.parametrize("streaming", [False, True])
def test_max_tokens_is_exact_and_can_be_raised(
    streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"text": f"{text} {index}" if index % 3 else ""} for index in range(700) for text in TEXTS]
    source = {"path": write_rows(tmp_path / "many.jsonl", rows), "streaming": streaming}
    whole = read_documents(tokenizer, **source)
    assert len(whole) > 2 * 256  # more than one batch
    statistics = IngestStatistics()
    documents = read_documents(tokenizer, statistics, **source, max_tokens=1001)
    assert sum(map(len, documents)) == statistics.tokens == 1001
    assert not statistics.exhausted
    cut = len(documents) - 1
    assert len(documents[cut]) < len(whole[cut])
    more = read_documents(tokenizer, statistics, **source, max_tokens=3002)
    assert statistics.tokens == 3002
    last = read_documents(tokenizer, statistics, **source)
    assert statistics.exhausted
    assert statistics.rows == len(rows) == statistics.documents + statistics.skipped.total()
    again = [*documents, *more, *last]
    assert len(again) == len(whole)
    for one, other in zip(again, whole, strict=True):
        assert np.array_equal(one.tokens, other.tokens[: len(one)])
        assert one.digest == other.digest


def test_the_digest_is_of_content_and_seed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_rows(tmp_path / "copies.jsonl", [{"text": text} for text in [*TEXTS, TEXTS[0]]])
    one, other = read_documents(tokenizer, path=path), read_documents(tokenizer, path=path, seed=1)
    assert one[0].digest == one[3].digest
    assert len({document.digest for document in [*one, *other]}) == 6
    assert all(0 <= document.digest < 1 << 64 for document in one)


def test_a_missing_teacher_is_one_line(tmp_path: Path) -> None:
    for model, problem in (
        (str(tmp_path / "none"), ": there is no such folder"),
        ("some/teacher", ": its tokenizer does not load: there is no folder some/teacher here, and"),
    ):
        with pytest.raises(ConfigError, match=f"teacher.model: {model}{problem}"):
            load_tokenizer(TeacherConfig(model=model))


def test_the_vocabulary_has_the_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    entries = vocabulary(tokenizer)
    assert entries.ids["<eos>"] == 0
    assert entries.special_tokens["eos_token"] == "<eos>"


def test_short_rows_are_read_together_and_long_ones_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part is what a process gets at a time: 256 rows of ten tokens cost more on their way than there."""
    monkeypatch.setattr(sources, "BATCH_ROWS", 4)
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    texts = ["short"] * 100 + ["long" * 400] * 5 + ["short"] * 3
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    domain = DomainConfig(path=str(tmp_path / "text.jsonl"))
    parts = list(sources.read("text", domain, skip=2))
    lengths = [len(part.table) for part in parts]
    assert [part.first for part in parts] == [2 + sum(lengths[:number]) for number in range(len(parts))]
    assert [row["text"] for part in parts for row in part.rows(domain) if row] == texts[2:]
    assert max(lengths) > 32
    assert all(part.table.nbytes < 1000 for part in parts if len(part.table) > 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_is_read_on_from_any_row(tmp_path: Path, streaming: bool) -> None:
    domain = DomainConfig(path=str(write_json(tmp_path)), streaming=streaming)
    for skip in range(4):
        parts = list(sources.read("text", domain, skip))
        assert sum(len(part.table) for part in parts) == 3 - skip
    if not streaming:
        with pytest.raises(ConfigError, match="text: 4 rows of it were read, and it has 3 now"):
            list(sources.read("text", domain, skip=4))
