"""A teacher that reads more than the student: exact at each position, and the student's rows as they were."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import ddk_cache
from helpers.documents import write_rows
from helpers.models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_build.data.documents import Document
from ddk_build.data.packing.teacher_prefix import decode, encode
from ddk_cache import Cache, open_cache
from ddk_cache.cache.verify import verify
from ddk_cache.errors import ConfigError

pytestmark = pytest.mark.usefixtures("datasets_cache")

S, BOS = 48, 1
HINTS = ["", "The answer is 42. ", "The answer is 42. ", "def add(a, b):", None]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the least that vLLM's CPU attention takes; its tokenizer has a BOS token."""
    folder = make_model(tmp_path_factory.mktemp("teacher"), seed=1, hidden=128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.save_pretrained(folder)
    return folder


def write_documents(path: Path, *, bos: bool) -> str:
    """Write 30 documents, some longer than a row; the tokens of each tell which it is."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(30):
        tokens = random.integers(10 + 12 * index, 22 + 12 * index, random.integers(4, 90)).tolist()
        rows.append({"ids": [BOS, *tokens] if bos else tokens, "hint": HINTS[index % len(HINTS)]})
    return write_rows(path, rows)


def config(tmp_path: Path, teacher: Path, name: str, **keys: Any) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "engine": "transformers", "dtype": "float32"},
            "cache": str(tmp_path / name),
            "seq_length": S,
            "target": {"top_k": 6},
            "validation_rows": 4,
            "shard_tokens": 5 * S,
            "domains": {"own": {"path": str(tmp_path / "own.jsonl"), "tokens_column": "ids"} | keys},
        }
    )


def splits(cache: Cache) -> list[Any]:
    return [split.read(range(len(split))) for split in (cache["own"].train, cache["own"].validation)]


@pytest.mark.parametrize("bos", [True, False])
def test_the_teacher_alone_reads_the_prefix(tmp_path: Path, teacher: Path, bos: bool) -> None:
    """Several documents share a row, and a document's chunks its prefix; BOS stays in front, once."""
    write_documents(tmp_path / "own.jsonl", bos=bos)
    cache = build_cache(config(tmp_path, teacher, "cache", teacher_prefix_column="hint"))
    plain = build_cache(config(tmp_path, teacher, "plain"))
    assert not [*verify(str(tmp_path / "cache"))]
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    changed = 0
    for rows, without in zip(splits(cache), splits(plain), strict=True):
        for name in ("tokens", "segments", "loss_mask"):
            np.testing.assert_array_equal(getattr(rows, name), getattr(without, name))
        for row in range(len(rows)):
            for segment in range(1, int(rows.segments[row].max()) + 1):
                here = rows.segments[row] == segment
                tokens = rows.tokens[row][here]
                hint = HINTS[(int(tokens[-1]) - 10) // 12 % len(HINTS)] or ""
                prefix = tokenizer(hint, add_special_tokens=False).input_ids
                context = [BOS, *prefix, *tokens[1:]] if bos else [*prefix, *tokens]
                with torch.no_grad():
                    logits = model(torch.tensor([context])).logits[0].log_softmax(-1)
                expected = logits[len(prefix) : -1].numpy()
                mask = rows.loss_mask[row][here][:-1]
                labels = rows.label_logprob[row][here][:-1]
                oracle = expected[np.arange(len(tokens) - 1), tokens[1:]]
                np.testing.assert_allclose(labels[mask], oracle[mask], atol=2e-5)
                if rows.ids is not None:  # the codec rounds, so the two best may change places
                    best = expected[mask].argmax(-1)
                    assert (rows.ids[row][here][:-1][mask] == best[:, None]).any(axis=1).all()
                changed += bool(hint) and not np.allclose(
                    labels[mask], without.label_logprob[row][here][:-1][mask], atol=1e-2
                )
    assert changed > 12


def test_vllm_reads_it_too(tmp_path: Path, teacher: Path) -> None:
    write_documents(tmp_path / "own.jsonl", bos=True)
    cache = build_cache(config(tmp_path, teacher, "cache", teacher_prefix_column="hint"))
    keys = config(tmp_path, teacher, "vllm", teacher_prefix_column="hint").model_dump(exclude_unset=True)
    path = tmp_path / "build.json"  # which YAML includes
    keys["teacher"] |= {
        "engine": "vllm",
        "engine_args": {"enforce_eager": True, "num_gpu_blocks_override": 64},
    }
    path.write_text(json.dumps(keys))
    done = ddk_cache("build", path, VLLM_CPU_KVCACHE_SPACE="1")
    assert done.code == 0, done.err[-300:]
    for rows, others in zip(splits(cache), splits(open_cache(tmp_path / "vllm")), strict=True):
        np.testing.assert_array_equal(rows.tokens, others.tokens)
        np.testing.assert_allclose(rows.label_logprob, others.label_logprob, atol=1e-3)


def test_what_the_teacher_cannot_read(tmp_path: Path, teacher: Path) -> None:
    path = tmp_path / "own.jsonl"
    write_documents(path, bos=False)
    lines = path.read_text().splitlines()
    long, wrong = (json.dumps({"ids": [5, 6, 7, 8], "hint": hint}) for hint in ("fox " * S, ["no"]))
    hints = [json.dumps(json.loads(line) | {"hint": str(json.loads(line)["hint"])}) for line in lines]
    path.write_text("\n".join([*hints, long]) + "\n")
    cache = build_cache(config(tmp_path, teacher, "cache", teacher_prefix_column="hint"), tokens_only=True)
    assert cache["own"].state.skipped == {"a teacher prefix that is longer than a row": 1}
    path.write_text(wrong + "\n" + json.dumps({"ids": [1, 2, 3], "hint": ["x"]}) + "\n")
    with pytest.raises(ConfigError, match="2 a teacher prefix that is not a string"):
        build_cache(config(tmp_path, teacher, "other", teacher_prefix_column="hint"), tokens_only=True)
    long_rows = config(tmp_path, teacher, "more", teacher_prefix_column="hint")
    with pytest.raises(
        ConfigError, match="seq_length, twice for teacher_prefix_column: 600 is more than the 512"
    ):
        build_cache(long_rows.model_copy(update={"seq_length": 300}))


def test_another_column_is_another_cache(tmp_path: Path, teacher: Path) -> None:
    write_documents(tmp_path / "own.jsonl", bos=False)
    build_cache(config(tmp_path, teacher, "cache"), tokens_only=True)
    with pytest.raises(ConfigError, match=r"domains\.own\.teacher_prefix_column: None -> 'hint'"):
        build_cache(config(tmp_path, teacher, "cache", teacher_prefix_column="hint"), tokens_only=True)


def test_a_prefix_that_is_repeated_is_stored_once() -> None:
    prefixes = [[0, 5, 6], [0, 5, 6], [0], [1, 5, 6], [1, 5, 6]]
    row = [
        Document(np.zeros(2, np.int32), np.ones(2, np.bool_), 0, teacher_prefix=np.array(prefix, np.int32))
        for prefix in prefixes
    ]
    numbers = encode(row)
    assert numbers.tolist() == [3, 0, 5, 6, 0, 1, 0, 3, 1, 5, 6, 0]
    padded = np.append(numbers, [0, 0]).astype(np.uint32)
    assert [prefix.tolist() for prefix in decode(padded, 5)] == prefixes
