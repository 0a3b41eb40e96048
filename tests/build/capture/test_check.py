"""An engine that differs from the model ends the build before it starts."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_build.capture import check, samples
from ddk_build.capture.check import checked_teacher, reference
from ddk_build.capture.scoring import requests
from ddk_build.config import TeacherConfig
from ddk_build.teacher.engines import Answers, Teacher, load_teacher
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import Target

DOCUMENTS = [np.random.default_rng(seed).integers(0, 400, 60, np.int32) for seed in range(3)]


def config(folder: Path, **changes: Any) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {"model": str(folder), "engine": "transformers", "dtype": "float32", "check": "always"} | changes
    )


@pytest.fixture
def off_by(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return an engine whose labels are off by the list's values in nats."""
    by = [0.0]

    def load(*arguments: Any) -> Teacher:
        teacher = load_teacher(*arguments)
        score = teacher.score

        def wrong(*asked: Any, **options: Any) -> Answers:
            answers = score(*asked, **options)
            return replace(answers, label_logprob=answers.label_logprob + np.float32(by[0]))

        teacher.score = wrong  # type: ignore[method-assign]
        return teacher

    monkeypatch.setattr(check, "load_teacher", load)
    return by


def test_one_line_has_the_difference(
    teacher_folder: Path, off_by: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    checked_teacher(config(teacher_folder), Target(), 64, DOCUMENTS)
    assert " nats a label from transformers in float32" in caplog.text
    off_by[0] = 5e-4
    checked_teacher(config(teacher_folder), Target(), 64, DOCUMENTS)
    assert "is 0.0005 nats a label from" in caplog.text


def test_more_than_rounding_ends_the_build(teacher_folder: Path, off_by: list[float]) -> None:
    """2.3 nats were Phi-3's long factors in short documents."""
    off_by[0] = -2.3
    with pytest.raises(ConfigError, match=r"^teacher\.check: transformers in float32 is 2\.3 nats") as caught:
        checked_teacher(config(teacher_folder), Target(), 64, DOCUMENTS)
    assert "\n" not in str(caught.value)
    checked_teacher(config(teacher_folder, check="never"), Target(), 64, DOCUMENTS)


def test_auto_skips_large_models_and_the_reference_engine(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reference(config(teacher_folder, check="auto"), DOCUMENTS) is None
    small = config(teacher_folder, check="auto", engine="vllm")
    assert reference(small, DOCUMENTS) is not None
    assert reference(config(teacher_folder, check="never", engine="vllm"), DOCUMENTS) is None
    plain = config(teacher_folder, check="auto", engine="vllm", engine_args={"hf_overrides": None})
    assert reference(plain, DOCUMENTS) is not None
    monkeypatch.setattr(check, "MOST_WORK", 1000)
    assert reference(small, DOCUMENTS) is None


def test_one_document_is_read_far_beyond_its_beginning() -> None:
    """An attention window of 512 or 1024 tokens changes nothing in the first 256."""
    segments = np.repeat(np.array([[1, 2, 3, 4], [1, 1, 1, 1], [1, 1, 1, 2]], np.uint16), 1024, axis=1)
    rows = {
        "tokens": np.arange(segments.size, dtype=np.int32).reshape(segments.shape),
        "segments": segments,
        "loss_mask": np.ones(segments.shape, np.bool_) & (np.roll(segments, -1, 1) == segments),
    }

    documents = samples.excerpts(requests(rows).documents)
    assert [len(document) for document in documents] == [2048, 256, 256, 256]
    assert [int(document[0]) for document in documents] == [4096, 0, 1024, 2048]


def test_a_teacher_no_better_than_chance_gets_a_line(
    teacher_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A random one, on random tokens."""
    with caplog.at_level(logging.WARNING):
        checked_teacher(config(teacher_folder, check="never"), Target(), 64, DOCUMENTS)
    assert "no better than chance" in caplog.text


def test_soft_caps_reach_the_reference_engine(tmp_path: Path) -> None:
    """Against transformers' eager attention by hand: with sdpa it was 0.27 nats off."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = Gemma2Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attn_logit_softcapping=0.5,
        initializer_range=0.5,
        sliding_window=64,
    )
    Gemma2ForCausalLM(shape).save_pretrained(tmp_path)
    eager = Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    tokens = torch.from_numpy(DOCUMENTS[0].astype(np.int64))
    with torch.no_grad():
        logprobs = eager(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, tokens[1:, None])[:, 0].numpy()
    answers = load_teacher(config(tmp_path), Target(), 64).score([DOCUMENTS[0]], labels_only=True)
    np.testing.assert_allclose(answers.label_logprob, expected, atol=1e-4)
