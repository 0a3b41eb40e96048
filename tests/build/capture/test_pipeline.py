"""The teacher reads every document once, besides calibration."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.builds import objects, write_config, write_corpus

from ddk_build import build
from ddk_build.build import build_cache
from ddk_build.capture import pipeline
from ddk_build.capture.check import checked_teacher
from ddk_build.capture.scoring import requests
from ddk_build.config import BuildConfig
from ddk_build.teacher.engines import Answers
from ddk_cache import open_cache
from ddk_cache.cache.verify import verify
from ddk_cache.util.configuration import load

TARGETS = [{"top_k": 8}, {"kind": "sampled", "samples": 6}]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often a teacher has read each document."""
    documents: Counter[bytes] = Counter()

    def listening(*arguments: Any) -> Any:
        teacher = checked_teacher(*arguments)
        submit = teacher.submit

        def counting(asked: Sequence[np.ndarray], *rest: Any, **options: Any) -> list[Callable[[], Answers]]:
            documents.update(document.tobytes() for document in asked)
            return submit(asked, *rest, **options)

        teacher.submit = counting  # type: ignore[method-assign, assignment]
        return teacher

    monkeypatch.setattr(build, "checked_teacher", listening)
    return documents


def make_config(folder: Path, teacher: Path, target: dict[str, Any]) -> BuildConfig:
    path = write_config(folder / "build.yaml", teacher, write_corpus(folder), target=target)
    return load(path, [], BuildConfig)


@pytest.mark.parametrize("batch_tokens", [64, 3 * 64, 1 << 18])
@pytest.mark.parametrize("target", TARGETS, ids=["topk", "sampled"])
def test_batches_of_a_shard_make_the_same_shard(
    tmp_path: Path,
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Counter[bytes],
    target: dict[str, Any],
    batch_tokens: int,
) -> None:
    """Each document is asked once, calibration aside, and the bytes are those of whole shards."""
    config = make_config(tmp_path, teacher_folder, target)
    build_cache(config)
    cache = tmp_path / "cache"
    built = objects(cache)
    once = Counter(
        document.tobytes()
        for domain in open_cache(str(cache)).values()
        for split in (domain.train, domain.validation)
        for document in requests(vars(split.read(range(len(split)), targets=False))).documents
    )
    assert not once - read
    for folder in [*cache.glob("*/train/codes/c"), *cache.glob("*/*/commits/c")]:
        shutil.rmtree(folder)
    read.clear()
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", batch_tokens)
    build_cache(config)
    assert read == once
    assert objects(cache) == built


@pytest.mark.parametrize("target", TARGETS, ids=["topk", "sampled"])
def test_answers_without_a_commit_record_are_asked_for_again(
    tmp_path: Path, teacher_folder: Path, read: Counter[bytes], target: dict[str, Any]
) -> None:
    """A build killed between the two leaves them; they are not trusted."""
    build_cache(make_config(tmp_path, teacher_folder, target))
    cache = tmp_path / "cache"
    built = objects(cache)
    shutil.rmtree(cache / "code" / "train" / "commits" / "c")
    read.clear()
    build_cache(make_config(tmp_path, teacher_folder, target))
    assert objects(cache) == built
    assert read


def test_labels_alone_need_no_codebook(tmp_path: Path, teacher_folder: Path) -> None:
    """They are the labels of a topk cache of the same texts."""
    folders = [tmp_path / "topk", tmp_path / "label"]
    targets: list[dict[str, Any]] = [{"top_k": 8}, {"kind": "label"}]
    for folder, target in zip(folders, targets, strict=True):
        folder.mkdir()
        build_cache(make_config(folder, teacher_folder, target))
    full, labels = (open_cache(str(folder / "cache"))["code"].train for folder in folders)
    rows = labels.read(range(len(labels)))
    assert rows.ids is None
    assert rows.label_logprob is not None
    expected = full.read(range(len(full))).label_logprob
    assert expected is not None
    np.testing.assert_allclose(rows.label_logprob, expected, atol=1e-5)
    assert not (tmp_path / "label" / "cache" / "ddk.codebook").exists()
    assert not list(verify(str(tmp_path / "label" / "cache")))


def test_held_out_rows_keep_targets_where_asked(tmp_path: Path, teacher_folder: Path) -> None:
    config = make_config(tmp_path, teacher_folder, {"top_k": 8})
    build_cache(config.model_copy(update={"validation_targets": True}))
    split = open_cache(str(tmp_path / "cache"))["code"].validation
    rows = split.read(range(len(split)))
    assert rows.ids is not None
    assert rows.logprobs is not None
    assert rows.tail_logprob is not None
    mass = np.exp(rows.logprobs).sum(-1) + np.exp(rows.tail_logprob)
    np.testing.assert_allclose(mass[rows.loss_mask], 1, atol=1e-3)
    assert not list(verify(str(tmp_path / "cache")))
