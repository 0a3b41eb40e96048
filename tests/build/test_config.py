"""The build configuration: every wrong value is one line that names the file and the key."""

from pathlib import Path

import numpy as np
import pytest

from ddk_build.config import BuildConfig
from ddk_build.data.documents import Document
from ddk_build.data.packing.chunks import chunk_document
from ddk_cache.errors import ConfigError
from ddk_cache.util.configuration import load

MINIMAL = """
teacher: {model: some/teacher}
cache: runs/cache
seq_length: 16
domains: {code: {path: json, data_files: code.jsonl}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "build.yaml"
    path.write_text(MINIMAL)
    return path


def test_the_defaults(path: Path) -> None:
    config = load(path, [], BuildConfig)
    assert config.teacher.engine == "vllm"
    assert config.teacher.dtype == "bfloat16"
    assert not config.teacher.trust_remote_code
    assert config.most_validation_rows == 500
    assert config.target.top_k == 64
    domain = config.domains["code"]
    assert (domain.text_column, domain.messages_column, domain.split) == ("text", None, "train")
    assert domain.max_tokens is None


def test_the_rows_of_a_shard(path: Path) -> None:
    assert load(path, [], BuildConfig).rows_per_shard == 1_048_576 // 16
    assert load(path, ["seq_length=1000000"], BuildConfig).rows_per_shard == 1


def test_underscores_in_numbers(path: Path) -> None:
    config = load(path, ["domains.code.max_tokens=100_000_000"], BuildConfig)
    assert config.domains["code"].max_tokens == 100_000_000


def test_a_key_that_comes_twice(path: Path) -> None:
    path.write_text("domains:\n  code: {path: a}\n  prose: {path: b}\n  code: {path: c}\n")
    with pytest.raises(ConfigError, match=r"is not valid YAML: 'code' is given twice in line 4"):
        load(path, [], BuildConfig)
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"--set target=.*: the value is not valid YAML: 'top_k' is given"):
        load(path, ["target={top_k: 8, top_k: 9}"], BuildConfig)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("teacher.engine=tgi", "teacher.engine: Input should be 'vllm' or 'transformers' (got 'tgi')"),
        ("teacher.dtype=int8", "teacher.dtype: Input should be 'bfloat16', 'float16' or 'float32'"),
        (
            "teacher.engine_args.hf_overrides.head_dtype=float32",
            "teacher: engine_args.hf_overrides.head_dtype: use the key head_dtype beside engine_args instead",
        ),
        (
            "teacher.engine_args.hf_overrides=rope",
            "teacher: engine_args.hf_overrides: must be a map",
        ),
        ("teacher.modle=x", "teacher.modle: unknown key; did you mean 'model'?"),
        ("teacher={}", "teacher.model: is required"),
        ("seq_length=1", "seq_length: Input should be greater than or equal to 2 (got 1)"),
        ("seq_length=long", "seq_length: Input should be a valid integer"),
        ("domains.code.max_tokens=10M", "domains.code.max_tokens: Input should be a valid integer, unable"),
        ("validation_rows=yes", "validation_rows: must be a number"),
        ("target.top_p=on", "target.top_p: must be a number"),
        ("validation_rows=0", "validation_rows: Input should be greater than 0 (got 0)"),
        ("seed=-1", "seed: Input should be greater than or equal to 0 (got -1)"),
        ("target.kind=all", "target.kind: Input should be 'topk', 'sampled' or 'label' (got 'all')"),
        ("domains={}", "domains: "),
        ("domains.code.max_tokens=1", "domains.code.max_tokens: Input should be greater than or equal to 2"),
        ("domains.code.path=''", "domains.code.path: String should have at least 1 character"),
        ("domains.code.sample_by=word", "domains.code.sample_by: Input should be 'document', 'paragraph' or"),
        ("max_tokens=9", "max_tokens: unknown key; did you mean 'domains.NAME.max_tokens'?"),
        ("top_k=9", "top_k: unknown key; did you mean 'target.top_k'?"),
        ("domains.code.seed=9", "domains.code.seed: unknown key; did you mean 'seed'?"),
        ("domains.code.text=t", "domains.code.text: unknown key"),
        (f"domains.{'x' * 65}.path=json", f"domains.{'x' * 65}"),
        ("domains.a/b.path=json", "domains.a/b"),
        ("domains={'../up': {path: json}}", "domains.../up"),
        ("domains={two words: {path: json}}", "domains.two words"),
        ("domains={'': {path: json}}", "domains."),
    ],
)
def test_a_wrong_value_is_one_line(path: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path, [override], BuildConfig)
    assert str(caught.value).startswith(f"{path}: {line}")
    assert "\n" not in str(caught.value)


def test_text_or_messages_and_not_both(path: Path) -> None:
    chat = load(path, ["domains.code.messages_column=messages"], BuildConfig)
    assert chat.domains["code"].messages_column == "messages"
    assert load(path, ["domains.code.text_column=text", "domains.code.messages_column=m"], BuildConfig)
    both = ["domains.code.text_column=body", "domains.code.messages_column=messages"]
    with pytest.raises(ConfigError, match=r"domains\.code: give text_column or messages_column, not both"):
        load(path, both, BuildConfig)


@pytest.mark.parametrize("target", [{"kind": kind} for kind in ("topk", "sampled", "label")])
def test_a_whole_configuration_may_be_written_out(path: Path, target: dict[str, str]) -> None:
    """As a dry run prints it: defaults that another key makes idle are no mistake."""
    config = load(path, ["domains.code.messages_column=messages", f"target={target}"], BuildConfig)
    path.write_text(config.to_yaml())
    assert load(path, [], BuildConfig) == config


def test_nothing_changes_after_validation(path: Path) -> None:
    config = load(path, [], BuildConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seq_length = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("target={kind: sampled, top_k: 8}", "target.top_k: does nothing with kind: sampled; leave it out"),
        ("target={kind: topk, samples: 8}", "target.samples: does nothing with kind: topk"),
        ("target={kind: label, temperature: 2}", "target.temperature: does nothing with kind: label"),
        ("shard_tokens=1099511627776", "shard_tokens: Input should be less than or equal to 268435456"),
        ("shard_tokens=268435456", "shard_tokens: must be at most 16777216, which is 1048576 rows a shard"),
        ("domains.code.data_files=https://u:SECRET@h/x", "domains.code.data_files: https://h/x: contains"),
    ],
)
def test_what_does_nothing_or_is_too_large(path: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path, [override], BuildConfig)
    assert str(caught.value).startswith(f"{path}: {line}")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "key", "fits"),
    [
        ("teacher=../tinyT", "teacher", "model: ../tinyT"),
        ("domains.code=a.jsonl", "domains.code", "path: a.jsonl"),
    ],
)
def test_a_text_in_place_of_keys_says_which_key_it_is(path: Path, change: str, key: str, fits: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(path, [change], BuildConfig)
    text = change.partition("=")[2]
    assert str(error.value) == f"{path}: {key}: must hold keys and values, such as '{fits}' (got '{text}')"


@pytest.mark.parametrize(("seq_length", "most"), [(2, 0), (3, 1), (64, 32)])
def test_a_chunk_has_room_for_a_new_token(path: Path, seq_length: int, most: int) -> None:
    keys = [f"seq_length={seq_length}", f"overlap={most}"]
    assert load(path, keys, BuildConfig).context == most
    document = Document(np.arange(9, dtype=np.int32), np.ones(9, np.bool_), 0, prefix_length=1)
    chunks = chunk_document(document, seq_length, most)
    assert sum(len(chunk) - chunk.context_length for chunk in chunks) == 9
    with pytest.raises(ConfigError, match=rf"overlap: must be at most {most}: half of seq_length"):
        load(path, [keys[0], f"overlap={most + 1}"], BuildConfig)
