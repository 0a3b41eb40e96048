"""Domains into a cache: hold-out over all of them, growth, and what an earlier build has left behind."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.builds import objects
from helpers.documents import write_rows
from transformers import PreTrainedTokenizerBase

from ddk_build.config import BuildConfig, DomainConfig
from ddk_build.data import sources
from ddk_build.data.documents import TokenisedPart
from ddk_build.manifest import describe
from ddk_build.teacher.tokenizer import vocabulary
from ddk_build.tokenize import ingest
from ddk_build.tokenize import workers as tokenisers
from ddk_build.tokenize.ingest import Ingest, tokenise
from ddk_build.tokenize.workers import Tokenisers, processes
from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import SPLITS, shards
from tools.torture.subject import comparable

pytestmark = pytest.mark.usefixtures("datasets_cache")

Arrays = dict[tuple[str, str], np.ndarray]  # tokens by domain and split


def write_texts(path: Path, texts: list[str]) -> dict[str, Any]:
    return {"path": write_rows(path, [{"text": text} for text in texts])}


def write_messages(path: Path, count: int) -> dict[str, Any]:
    rows = (
        [{"role": "user", "content": text(number)}, {"role": "assistant", "content": text(number + 1)}] * 5
        for number in range(0, 2 * count, 2)
    )
    return {"path": write_rows(path, [{"messages": row} for row in rows]), "messages_column": "messages"}


def text(number: int) -> str:
    return f"{number} the fox jumps over {number * 7} lazy dogs"


def configure(tmp_path: Path, teacher: Path, domains: dict[str, Any], **changed: Any) -> BuildConfig:
    given = {
        "teacher": {"model": str(teacher), "engine": "transformers"},
        "cache": str(tmp_path / "cache"),
        "seq_length": 32,
        "shard_tokens": 128,
        "validation_rows": 6,
        "domains": domains,
    }
    return BuildConfig.model_validate(given | changed)


@contextmanager
def written(config: BuildConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Writer]:
    with open_writer(config.cache, describe(config, tokenizer), vocabulary(tokenizer)) as writer:
        with Tokenisers(config, tokenizer, processes) as workers:
            tokenise(writer, config, workers)
        yield writer


def read(config: BuildConfig, tokenizer: PreTrainedTokenizerBase) -> Arrays:
    arrays: Arrays = {}
    with written(config, tokenizer) as writer:
        for name in config.domains:
            for split in SPLITS:
                rows = writer.split_state(name, split).rows
                parts = [
                    writer.read_tokens(name, split, number)
                    for number in range(shards(rows, writer.manifest.shard_rows))
                ]
                arrays[name, split] = np.concatenate([part["tokens"] for part in parts])
                assert len(arrays[name, split]) == rows
    return arrays


def documents(rows: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    said = "".join(str(tokenizer.decode(row)) for row in rows)
    return {" ".join(part.split()) for part in said.split("<eos>")} - {""}


@pytest.mark.parametrize("order", [["small", "large"], ["large", "small"]])
def test_no_document_is_held_out_here_and_trained_on_there(
    order: list[str], tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Copies differ in white space alone. A domain that is added later asks the others too."""
    source = {
        "large": write_texts(tmp_path / "large.jsonl", [text(number) for number in range(120)]),
        "small": write_texts(tmp_path / "small.jsonl", [f" {text(number)}\n" for number in range(100, 130)]),
    }
    for count in (1, 2):
        config = configure(tmp_path, teacher_folder, {name: source[name] for name in order[:count]})
        arrays = read(config, tokenizer)
    train = [documents(arrays[name, "train"], tokenizer) for name in order]
    validation = [documents(arrays[name, "validation"], tokenizer) for name in order]
    assert all(validation)
    assert not (train[0] | train[1]) & (validation[0] | validation[1])
    # Damaged and read again, though the other domain has come since: the same.
    for path in (tmp_path / "cache" / order[0]).glob("train/token*/c/*/0"):  # with their commit records
        path.unlink()
    again = read(config, tokenizer)
    for key, tokens in arrays.items():
        assert np.array_equal(tokens, again[key])


def test_a_domain_without_a_document_of_its_own_says_what_to_do(
    tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    large = write_texts(tmp_path / "large.jsonl", [text(number) for number in range(120)])
    config = configure(tmp_path, teacher_folder, {"large": large})
    held_out = documents(read(config, tokenizer)["large", "validation"], tokenizer)
    part = [text(number) for number in range(120) if text(number) not in held_out][:10]
    small = write_texts(tmp_path / "small.jsonl", part)
    with pytest.raises(
        ConfigError, match=r"^domains\.small: no document is left for validation: .*\(large\)"
    ):
        read(configure(tmp_path, teacher_folder, {"large": large, "small": small}), tokenizer)


def test_a_domain_of_which_nothing_carries_loss_is_no_other_domains_copy(
    tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its questions are longer than a row."""
    large = write_texts(tmp_path / "large.jsonl", [text(number) for number in range(120)])
    talk = write_messages(tmp_path / "talk.jsonl", 20)
    config = configure(tmp_path, teacher_folder, {"large": large, "talk": talk}, seq_length=16)
    with pytest.raises(ConfigError, match=r"^domains\.talk: no token of the validation split carries loss; "):
        read(config, tokenizer)


def test_the_validation_split_grows_with_a_domain_that_began_small(
    tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write_texts(tmp_path / "code.jsonl", [text(number) for number in range(300)])
    before: Arrays = {}
    for limit, validation in ((100, 2), (2000, 6), (3000, 6)):
        config = configure(tmp_path, teacher_folder, {"code": source | {"max_tokens": limit}})
        arrays = read(config, tokenizer)
        assert len(arrays["code", "validation"]) == validation
        for key, tokens in before.items():
            assert np.array_equal(arrays[key][: len(tokens)], tokens)
        before = arrays
    train, held_out = (documents(arrays["code", split], tokenizer) for split in ("train", "validation"))
    assert not train & held_out
    # A domain with much text of its own trains on nearly all of it, however small it began.
    assert len(train) > 7 * len(held_out)


def test_what_a_killed_build_has_left_binds_nobody(
    tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Killed while tokenising much; then a little is built; then much again."""
    source = write_texts(tmp_path / "code.jsonl", [text(number) for number in range(300)])
    much = configure(tmp_path, teacher_folder, {"code": source})
    little = configure(tmp_path, teacher_folder, {"code": source | {"max_tokens": 400}})
    read(much, tokenizer)
    (tmp_path / "cache" / "code" / "zarr.json").unlink()  # the kill came before the state was written
    first = read(little, tokenizer)
    arrays = read(much, tokenizer)
    for key, tokens in first.items():
        assert np.array_equal(arrays[key][: len(tokens)], tokens)
    assert len(arrays["code", "train"]) > 2 * len(first["code", "train"])


def test_a_split_of_too_many_shards_is_refused(
    tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader would refuse them; 2^20 shards of the default size are 10^12 tokens."""
    monkeypatch.setattr("ddk_build.tokenize.token_shards.MOST_SHARDS", 2)
    code = write_texts(tmp_path / "code.jsonl", [text(number) for number in range(60)])
    config = configure(tmp_path, teacher_folder, {"code": code}, shard_tokens=32)
    with (
        pytest.raises(ConfigError, match="code: makes more than 2 shards: raise shard_tokens"),
        written(config, tokenizer),
    ):
        pass


def test_other_processes_make_the_same_bytes(
    tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BATCH_ROWS", 16)
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    source = {
        "code": write_texts(tmp_path / "code.jsonl", [text(number) for number in range(150)]),
        "talk": write_messages(tmp_path / "talk.jsonl", 60),
    }
    caches = []
    for seconds in (1e9, 0.0):
        monkeypatch.setattr(tokenisers, "SECONDS_ALONE", seconds)
        folder = tmp_path / str(seconds)
        folder.mkdir()
        read(configure(folder, teacher_folder, source), tokenizer)
        caches.append(comparable(objects(folder / "cache")))
    assert caches[0] == caches[1]


class Killed(Exception):
    pass


def raise_killed() -> None:
    raise Killed


@pytest.mark.parametrize("when", ["before its state", "after it"])
def test_a_domain_whose_tokens_were_lost_as_it_grew_comes_out_the_same(
    tmp_path: Path,
    teacher_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """Its validation rows, of which there were too few, and its documents in their order."""
    source = write_texts(tmp_path / "code.jsonl", [text(number) for number in range(300)])
    caches = []
    for loses in (False, True):
        folder = tmp_path / str(loses)
        folder.mkdir()
        little, much = (
            configure(folder, teacher_folder, {"code": source | {"max_tokens": limit}})
            for limit in (400, 2000)
        )
        read(little, tokenizer)
        with monkeypatch.context() as patched:
            if loses and when == "before its state":
                patched.setattr(Ingest, "_record", lambda *_: raise_killed())
            with suppress(Killed):
                read(much, tokenizer)
        if loses:
            shutil.rmtree(folder / "cache" / "code" / "validation" / "token_commits" / "c" / "0")
            read(much, tokenizer)
        caches.append(comparable(objects(folder / "cache")))
    assert caches[0] == caches[1]


@pytest.mark.parametrize("grows", [False, True])
def test_an_interrupted_reading_goes_on_where_it_was_kept(
    tmp_path: Path,
    teacher_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    grows: bool,
) -> None:
    monkeypatch.setattr(sources, "BATCH_ROWS", 16)
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    monkeypatch.setattr(ingest, "CHECKPOINT_SECONDS", 0)
    texts = [text(number) for number in range(300)]
    source = {
        "small": write_texts(tmp_path / "small.jsonl", texts[:40]),
        "code": write_texts(tmp_path / "code.jsonl", texts[20:] + texts[40:60]),
        "talk": write_messages(tmp_path / "talk.jsonl", 40),
    }
    caches, skips = [], []
    original = Tokenisers.parts

    def parts(self: Tokenisers, name: str, domain: DomainConfig, skip: int) -> Iterator[TokenisedPart]:
        """Killed behind every third part, and behind the last."""
        skips.append(skip)
        count = 0
        for count, arrays in enumerate(original(self, name, domain, skip), start=1):
            yield arrays
            if count == 3:
                raise Killed
        if count:
            raise Killed

    for kills in (False, True):
        folder = tmp_path / str(kills)
        folder.mkdir()
        limits = [500, None] if grows else [None]
        for limit in limits:
            now = {name: given | {"max_tokens": limit} for name, given in source.items()}
            config = configure(folder, teacher_folder, now)
            with monkeypatch.context() as patched:
                if kills:
                    patched.setattr(Tokenisers, "parts", parts)
                for _ in range(40):
                    with suppress(Killed):
                        read(config, tokenizer)
                        break
                else:
                    raise AssertionError("no reading came to its end")
        caches.append(comparable(objects(folder / "cache")))
    assert caches[0] == caches[1]
    assert not [key for key in caches[1] if key.endswith("ddk.ingest-checkpoint")]
    assert max(skips) > 200
