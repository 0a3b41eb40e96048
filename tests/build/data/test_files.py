"""Data as people have it: each kind is read, or one line says what to do."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.documents import read_documents, write_rows
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from ddk_build.data.documents import IngestStatistics
from ddk_build.data.packing.chunks import TOO_LONG, UNANSWERED, chunk_document
from ddk_build.data.reasons import NO_LOSS, NOT_TOKENS
from ddk_cache.errors import ConfigError

pytestmark = pytest.mark.usefixtures("datasets_cache")

TEXTS = ["The quick brown fox", "jumps over\tthe lazy dog", "while the teacher watches"]
PLAIN = {"prompt_column": "q", "completion_column": "a", "prompt_format": "plain"}
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every path relative to the test's folder."""
    monkeypatch.chdir(tmp_path)


def many(write: Callable[[Path, str], object], suffix: str) -> Callable[[Path], None]:
    """Each text as a file of its own."""

    def written(folder: Path) -> None:
        for number, text in enumerate(TEXTS):
            (folder / str(number)).mkdir()
            write(folder / str(number) / f"some{suffix}", text)

    return written


def saved(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    both = {"train": datasets.Dataset.from_dict({"text": TEXTS})}
    datasets.DatasetDict(both).save_to_disk(str(folder / "dict"))


READ: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "gz": (lambda at: (at / "a.jsonl.gz").write_bytes(gzip.compress(LINES)), {"path": "a.jsonl.gz"}),
    "xz": (lambda at: (at / "a.jsonl.xz").write_bytes(lzma.compress(LINES)), {"path": "a.jsonl.xz"}),
    "zst": (
        lambda at: (at / "a.jsonl.zst").write_bytes(zstandard.compress(LINES)),
        {"path": "a.jsonl.zst"},
    ),
    "bz2": (lambda at: (at / "a.jsonl.bz2").write_bytes(bz2.compress(LINES)), {"path": "*.bz2"}),
    "tsv": (
        lambda at: (at / "a.tsv").write_text("n\ttext\n" + "".join(f'1\t"{text}"\n' for text in TEXTS)),
        {"path": "a.tsv"},
    ),
    "tsv by builder": (
        lambda at: (at / "a.tsv").write_text("n\ttext\n" + "".join(f'1\t"{text}"\n' for text in TEXTS)),
        {"path": "csv", "data_files": "a.tsv"},
    ),
    "saved": (saved, {"path": "saved"}),
    "saved splits": (saved, {"path": "dict"}),
    "markdown by glob": (many(lambda at, text: at.write_text(text), ".md"), {"path": "**/*.md"}),
    "no suffix by glob": (many(lambda at, text: at.write_text(text), ""), {"path": "*/some"}),
    "json by glob": (
        many(lambda at, text: at.write_text(json.dumps({"text": text})), ".json"),
        {"path": "*/*.json"},
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", READ)
def test_data_as_people_have_it(
    kind: str, streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write, source = READ[kind]
    write(tmp_path)
    documents = read_documents(tokenizer, streaming=streaming, **source)
    assert [tokenizer.decode(document.tokens) for document in documents] == [f"{text}<eos>" for text in TEXTS]


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "folder of text": (
        {"f/a.md": "a", "f/sub/b.js": "b", "f/c.js": "c", "f/d.txt": "d"},
        {"path": "f"},
        r"path: the folder 'f' holds 2 \.js, 1 .*; choose with a glob, such as 'f/\*\*/\*\.js'",
    ),
    "several kinds": ({"a.md": "a", "b.csv": "b"}, {"path": "*.*"}, r"several kinds \(1 \.md, 1 \.csv\)"),
    "folder of two kinds": (
        {"f/a.jsonl": '{"text": "a"}', "f/b.jsonl": '{"text": "b"}', "f/c.csv": "text"},
        {"path": "f"},
        r"path: the folder 'f' holds 2 \.jsonl, 1 \.csv; choose with a glob, such as 'f/\*\*/\*\.jsonl'",
    ),
    "text in a folder": (
        {"f/a.md": "a", "f/b.md": "b"},
        {"path": "f", "data_files": "*.md"},
        r"cannot read 'f': .*; text that is not \.txt by a glob, such as 'f/\*\*/\*\.md'",
    ),
    "folder of documents": (
        {"f/a.pdf": "%PDF"},
        {"path": "f"},
        r"path: 'f' matches \.pdf; save their text as",
    ),
    "an archive": ({"a.zip": "PK"}, {"path": "a.zip"}, r"path: 'a\.zip' matches archives \(\.zip\); unpack"),
    "documents": (
        {"a.docx": "PK", "b.pdf": "%PDF"},
        {"path": "*.*"},
        r"path: '\*\.\*' matches \.docx, \.pdf; save their text as text files",
    ),
    "no messages": (
        {"a.jsonl": '{"text": "a"}\n' * 2},
        {"path": "a.jsonl", "messages_column": "text"},
        "2 not a list of messages with roles, first row 0.; messages_column is for lists of",
    ),
    "nobody answers": (
        {"a.jsonl": '{"messages": [{"from": "Human", "value": "a"}, {"from": "AI", "value": "b"}]}\n'},
        {"path": "a.jsonl", "messages_column": "messages"},
        "1 no token that carries loss, first row 0.; only messages of the role assistant",
    ),
    "content in parts": (
        {
            "a.jsonl": json.dumps(
                {
                    "messages": [
                        {"role": who, "content": [{"type": "text", "text": "a"}]}
                        for who in ("user", "assistant")
                    ]
                }
            )
            + "\n"
        },
        {"path": "a.jsonl", "messages_column": "messages"},
        "1 content in parts, which the chat template does not support, first row 0.; content must be a text",
    ),
    "nothing by the mask": (
        {"a.jsonl": '{"ids": [5, 6, 7], "mask": [0, 0, 0]}\n'},
        {"path": "a.jsonl", "tokens_column": "ids", "loss_mask_column": "mask"},
        "1 no token that carries loss, first row 0.; .* carry loss, and tokens that loss_mask_column names",
    ),
    "few tokens": (
        {"a.jsonl": '{"text": "quick brown fox"}\n{"text": "lazy dog"}\n'},
        {"path": "a.jsonl", "max_tokens": 2},
        r"has 1 \(1 row\); raise max_tokens",
    ),
    "text for tokens": (
        {"a.jsonl": '{"text": "a"}\n' * 2},
        {"path": "a.jsonl", "tokens_column": "text"},
        "tokens_column is for lists of whole numbers",
    ),
    "a URL": ({}, {"path": "s3://a/b.jsonl"}, r"path: 's3://a/b\.jsonl' is a URL; give it as data_files"),
    "a format alone": (
        {"a.jsonl": "{}"},
        {"path": "json"},
        r"data_files: is missing; path json is only the format",
    ),
    "no such file by its name": ({}, {"path": "a.jsonl"}, r"path: there is no file or folder 'a\.jsonl'"),
    "no such file": ({}, {"path": "./a.jsonl"}, r"path: there is no file or folder './a.jsonl'"),
    "a list": (
        {"a.jsonl": '{"text": ["a", "b"]}\n' * 2},
        {"path": "a.jsonl"},
        "2 not a string.*; text_column is for strings",
    ),
    "no completions": (
        {"a.jsonl": '{"prompt": "a", "answer": "b"}\n'},
        {"path": "a.jsonl", "prompt_column": "prompt", "completion_column": "completion"},
        "there is no column 'completion'; there are: ",
    ),
    "conversations taken for text": (
        {"a.jsonl": '{"conversations": []}\n'},
        {"path": "a.jsonl"},
        "no column 'text'; there are: conversations; other keys: text_column, messages_column ",
    ),
    "semicolons": (
        {"a.csv": "n;text\n1;a\n1;a, b, c\n"},
        {"path": "a.csv"},
        r"Expected 1 fields in line 3, saw 3; save it with commas between the columns",
    ),
    "semicolons and no comma": (
        {"a.csv": "n;text\n1;a\n"},
        {"path": "a.csv"},
        r"no column 'text'; there are: n;text; save it with commas between the columns \(\.tsv: tabs\)",
    ),
    "commas without quotes": (
        {"a.csv": "text\na, b\nc, d\n"},
        {"path": "a.csv"},
        r"Length of header or names does not match length of data\..*; save it with commas .* and quotes",
    ),
    "no such folder": ({}, {"path": "no/such"}, "cannot read 'no/such': it is not here, and as a hub id: "),
    "another vocabulary": (
        {"a.jsonl": '{"ids": [1, 2, 400]}\n'},
        {"path": "a.jsonl", "tokens_column": "ids"},
        r"code.tokens_column: token 400 is outside the 400 tokens of the teacher's tokenizer",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_says_what_to_do(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    written, source, line = REFUSED[kind]
    for name, content in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=line) as caught:
        read_documents(tokenizer, **source)
    assert "\n" not in str(caught.value)


BROKEN = LINES * 9000 + b'{"text": "the\n'
ENCODED: dict[str, tuple[str, bytes, str]] = {
    "a broken line": ("a.jsonl", BROKEN, r"line 27001 of .*/a\.jsonl is not JSON .*: correct or remove it"),
    "compressed": ("a.jsonl.gz", gzip.compress(BROKEN), r"line 27001 of /.*/a\.jsonl\.gz is not JSON "),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), r"line 1 of .* is not UTF-8: save the file as"),
    "Latin-1": (
        "a.jsonl",
        '{"text": "\xe9"}\n'.encode("latin-1"),
        "1 not valid UTF-8, first row 0.; save the files as",
    ),
    "Latin-1 text": (
        "a.txt",
        "\xe9".encode("latin-1"),
        "1 not valid UTF-8, first row 0.; save the files as",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ENCODED)
def test_a_damaged_file_is_named_with_its_line(
    kind: str, streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    name, content, line = ENCODED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=line) as caught:
        read_documents(tokenizer, path=name, streaming=streaming)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_page_that_differs_from_its_checksum(
    streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [f"the {number:06}" for number in range(5000)]
    table = pa.table({"text": texts, "id": list(range(5000))})
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    assert len(read_documents(tokenizer, path="a.parquet", streaming=streaming)) == 5000
    content = (tmp_path / "a.parquet").read_bytes()
    begin = content.index(b"the 002500") + 4
    (tmp_path / "a.parquet").write_bytes(content[:begin] + b"9" + content[begin + 1 :])
    with pytest.raises(ConfigError, match=r"domains.code: cannot read 'a.parquet': .*CRC checksum"):
        read_documents(tokenizer, path="a.parquet", streaming=streaming)


def test_datasets_says_nothing_itself_where_it_is_imported_first(tmp_path: Path) -> None:
    """Its logger has a handler only then; this process has imported it long ago."""
    (tmp_path / "a.jsonl").write_bytes(b"{")
    program = (
        "from ddk_build import config\n"
        "from ddk_build.data import sources\n"
        "try: list(sources.read('some', config.DomainConfig(path='a.jsonl'), 0))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("domains.some: cannot read 'a.jsonl': line 1 of ")
    assert done.stderr == ""


def test_what_a_datasets_card_names_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n"
    )
    (tmp_path / "f" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "f" / "b.csv").write_text("text\nother\n")
    assert len(read_documents(tokenizer, path="f")) == len(TEXTS)


def test_a_split_that_was_not_saved(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match=r"split: there is no 'test'; there are: train"):
        read_documents(tokenizer, path="dict", split="test")


def test_keys_that_do_nothing_with_a_saved_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saved(tmp_path)
    for split in ("test", "train[:50%]"):
        with pytest.raises(
            ConfigError, match=r"split: the folder holds one dataset, without splits; leave it"
        ):
            read_documents(tokenizer, path="saved", split=split)
    with pytest.raises(ConfigError, match=r"data_files: does nothing with a folder by save_to_disk"):
        read_documents(tokenizer, path="saved", data_files="*.jsonl")


def test_sharegpt_and_pairs_are_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked, said, more = TEXTS
    chats = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
        for one, other in ((asked, said), (said, more))
    ]
    share = [
        {"conversations": [{"from": "human", "value": one}, {"from": "gpt", "value": other}]}
        for one, other in ((asked, said), (said, more))
    ]
    pairs = [{"q": row["messages"][:1], "a": row["messages"][1:]} for row in chats]
    documents = [
        read_documents(tokenizer, path=write_rows(tmp_path / name, rows), **columns)
        for name, rows, columns in (
            ("chats.jsonl", chats, {"messages_column": "messages"}),
            ("share.jsonl", share, {"messages_column": "conversations"}),
            ("pairs.jsonl", pairs, {"prompt_column": "q", "completion_column": "a"}),
        )
    ]
    for others in documents[1:]:
        for one, other in zip(documents[0], others, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.carries_loss.tolist() == other.carries_loss.tolist()
            assert one.digest == other.digest


def test_of_a_pair_of_texts_the_completion_carries_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"q": f"{text} ", "a": f"the end {number}"} for number, text in enumerate(TEXTS)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    documents = read_documents(tokenizer, path=path, **PLAIN)
    for row, document in zip(rows, documents, strict=True):
        assert tokenizer.decode(document.tokens) == row["q"] + row["a"] + "<eos>"
        assert str(tokenizer.decode(document.tokens[document.carries_loss])).strip() == row["a"] + "<eos>"
    # A pair is one exchange: of one that is longer than a row nothing goes on without its prompt.
    assert len(chunk_document(documents[0], len(documents[0]) - 1)) == 1


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused(tmp_path: Path, column: str) -> None:
    slow = ByT5Tokenizer()
    slow.chat_template = "{{ messages }}"
    path = write_rows(tmp_path / "some.jsonl", [{"q": "a", "a": "b", "m": []}])
    columns = {
        "messages": {"messages_column": "m"},
        "prompt": {"prompt_column": "q", "completion_column": "a"},
    }
    with pytest.raises(
        ConfigError, match=rf"^domains\.code\.{column}_column: .* has no fast version, which the loss mask"
    ):
        read_documents(slow, path=path, **columns[column])


def test_what_a_tokenizer_puts_behind_a_pair_by_itself_carries_no_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As [SEP] of those without an end-of-sequence token: it stands nowhere in the text."""
    ends = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token=None)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    rows = [{"q": f"{text} ", "a": "the end"} for text in TEXTS]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    for document in read_documents(ends, path=path, **PLAIN):
        assert document.tokens[-1] == 2
        assert str(tokenizer.decode(document.tokens[document.carries_loss])).strip() == "the end"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_blank_in_front_of_a_completion_is_the_prompts(
    trim_offsets: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Where a tokenizer trims places, of a blank only its end is left: where the completion begins."""
    trims = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    trims.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    rows = [{"q": f"{text}: ", "a": " the  end"} for text in TEXTS]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    for document in read_documents(trims, path=path, **PLAIN):
        assert tokenizer.decode(document.tokens[document.carries_loss]) == " the  end<eos>"


def test_a_token_of_64_bits_costs_its_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [[5, 6, 7], [8, 9, 2**64 - 1], [5, 7]]
    pq.write_table(pa.table({"ids": pa.array(rows, pa.list_(pa.uint64()))}), tmp_path / "tokens.parquet")
    statistics = IngestStatistics()
    path = str(tmp_path / "tokens.parquet")
    assert len(read_documents(tokenizer, statistics, path=path, tokens_column="ids")) == 2
    assert statistics.skipped == {NOT_TOKENS: 1}


def test_tokens_are_taken_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"ids": [5, 6, 7, 8, 9, 0, 0], "mask": [0, 0, 1, 0, 1, 0, 0], "seg": [1, 1, 1, 2, 2, 0, 0]},
        {"ids": [5, 6, 7], "mask": [1, 0, 0], "seg": [1, 1, 1]},
        {"ids": [5, 6, 7], "mask": [1, 1], "seg": [1, 1, 1]},
    ]
    path = write_rows(tmp_path / "tokens.jsonl", rows)
    statistics = IngestStatistics()
    columns = {"tokens_column": "ids", "loss_mask_column": "mask", "segments_column": "seg"}
    documents = read_documents(tokenizer, statistics, path=path, **columns)
    assert [document.tokens.tolist() for document in documents] == [[5, 6, 7], [8, 9]]
    assert [document.carries_loss.tolist() for document in documents] == [[False, False, True], [False, True]]
    assert (statistics.rows, statistics.documents, statistics.tokens) == (3, 2, 5)
    assert statistics.skipped == {NO_LOSS: 1, NOT_TOKENS: 1}
    # By position: a document ends where the numbers do not go on.
    rows = [{"ids": [5, 6, 7, 8, 9], "at": [0, 1, 2, 0, 1]}, {"ids": [5, 7], "at": [4, 5]}]
    path = write_rows(tmp_path / "positions.jsonl", rows)
    documents = read_documents(tokenizer, path=path, tokens_column="ids", positions_column="at")
    assert [document.tokens.tolist() for document in documents] == [[5, 6, 7], [8, 9], [5, 7]]
    assert all(document.carries_loss.all() for document in documents)


@pytest.mark.parametrize("what", ["cut", "truncate", "drop"])
def test_long_conversations(what: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """No answer carries loss without its question; the system's message stands in front of each piece."""
    system = {"role": "system", "content": "be the fox"}
    turns = [
        {
            "role": "assistant" if number % 2 else "user",
            "content": f"{'say' if number % 2 else 'ask'} {number}",
        }
        for number in range(12)
    ]
    rows = [{"messages": [system, *turns]}, *({"messages": turns[:2]}, {"messages": turns[2:4]})]
    statistics = IngestStatistics()
    path = write_rows(tmp_path / "chat.jsonl", rows)
    given = {"path": path, "messages_column": "messages", "long_conversations": what}
    documents = read_documents(tokenizer, statistics, seq_length=100, **given)
    assert statistics.skipped == ({TOO_LONG: 1} if what == "drop" else {})
    assert len(documents) == (2 if what == "drop" else 3)
    if what == "drop":
        return
    chunks = chunk_document(documents[0], 100, skipped=statistics.skipped)
    parts = [str(tokenizer.decode(chunk.tokens)) for chunk in chunks]
    begin = tokenizer.decode(documents[0].tokens[: documents[0].prefix_length])
    assert "be the fox" in begin
    assert all(part.startswith(f"{begin}<|im_start|>user") for part in parts)
    for part in parts:
        for number in range(1, 12, 2):
            assert f"say {number}<" not in part or f"ask {number - 1}<" in part
    assert (len(parts) > 1, statistics.skipped[UNANSWERED] > 0) == (what == "cut", what == "truncate")
