"""Sampling offsets; and a shard that is answered again gets the same draws."""

from pathlib import Path

import numpy as np
import pytest
from helpers.builds import finish, objects, write_config, write_corpus

from ddk_build.capture.scoring import Arrays, labelled, requests, sampling_offsets
from ddk_build.config import TeacherConfig
from ddk_build.teacher.engines import Teacher, load_teacher
from ddk_cache.cache.rows import Rows
from ddk_cache.format.layout import Target

S = 32


def make_rows(count: int) -> Arrays:
    """Rows of two documents each; every position but a document's last one has a label."""
    tokens = np.random.default_rng(4).integers(0, 400, (count, S), np.int32)
    segments = np.repeat([[1, 2]], S // 2, axis=1).repeat(count, axis=0).astype(np.uint16)
    mask = np.ones((count, S), np.bool_)
    mask[:, [S // 2 - 1, S - 1]] = False
    return {"tokens": tokens, "segments": segments, "loss_mask": mask}


def answer(teacher: Teacher, rows: Arrays, target: Target, offsets: np.ndarray) -> Arrays:
    """Return the answers by name, [n, S] and [n, S, E]."""
    asked = requests(rows, offsets)
    answers = labelled(teacher.score(asked.documents, asked.sampling_offsets), asked)
    label_logprob = np.zeros(asked.loss_mask.shape, np.float32)
    label_logprob[asked.loss_mask] = answers.label_logprob
    return Rows(**rows, label_logprob=label_logprob, targets=answers).arrays()


def test_offsets_depend_on_all_that_names_a_position() -> None:
    base = sampling_offsets(0, "code", "train", [3, 7], 1000)
    assert base.shape == (2, 1000)
    assert ((base >= 0) & (base < 1)).all()
    others = [
        sampling_offsets(1, "code", "train", [3, 7], 1000),
        sampling_offsets(0, "text", "train", [3, 7], 1000),
        sampling_offsets(0, "code", "validation", [3, 7], 1000),
        sampling_offsets(0, "code", "train", [4, 8], 1000),
    ]
    everything = np.stack([base, *others])
    assert len(np.unique(everything)) == everything.size
    assert abs(everything.mean() - 0.5) < 5 / np.sqrt(12 * everything.size)
    # No two rows or positions go together.
    correlations = np.corrcoef(everything.reshape(-1, 1000)) - np.eye(10)
    assert np.abs(correlations).max() < 5 / np.sqrt(1000)


def test_an_offset_depends_on_nothing_else() -> None:
    """Neither on the row's shard nor on the length of rows."""
    whole = sampling_offsets(5, "code", "train", range(9), 64)
    assert np.array_equal(sampling_offsets(5, "code", "train", [8, 2], 64), whole[[8, 2]])
    assert np.array_equal(sampling_offsets(5, "code", "train", range(9), 16), whole[:, :16])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_scored_again_has_the_same_draws(teacher_folder: Path, temperature: float) -> None:
    target = Target(kind="sampled", samples=6, temperature=temperature)
    config = TeacherConfig(model=str(teacher_folder), engine="transformers", dtype="float32")
    teacher = load_teacher(config, target, S)
    rows = make_rows(5)
    whole = answer(teacher, rows, target, sampling_offsets(0, "code", "train", range(5), S))
    again = {name: array[[4, 1]] for name, array in rows.items()}
    part = answer(teacher, again, target, sampling_offsets(0, "code", "train", [4, 1], S))
    for name in part:
        assert np.array_equal(part[name], whole[name][[4, 1]]), name
    other = answer(teacher, again, target, sampling_offsets(1, "code", "train", [4, 1], S))
    assert not np.array_equal(other["ids"], part["ids"])
    assert np.array_equal(other["label_logprob"], part["label_logprob"])


def test_a_shard_built_again_has_the_same_draws(tmp_path: Path, teacher_folder: Path) -> None:
    target = {"kind": "sampled", "samples": 6}
    corpus = {"code": write_corpus(tmp_path)["code"]}
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus, target=target)
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    cache = tmp_path / "cache"
    built = objects(cache)
    lost = cache / "code" / "train" / "codes" / "c" / "1" / "0"
    assert lost.exists()
    lost.unlink()
    (cache / "code" / "train" / "commits" / "c" / "1" / "0").unlink()
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    assert objects(cache) == built
