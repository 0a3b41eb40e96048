"""A student's continuations: drawn from its own distribution, and written to the run's folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers.training import MakeConfig, read_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_cache import open_cache
from ddk_train.loop.generations import held_out_document
from ddk_train.student.probe import examine
from ddk_train.student.student import Student
from ddk_train.train import train
from tools.docs.students import ARCHITECTURES, CONFIG, SEQ_LENGTH, VOCABULARY
from tools.docs.students import make_model as make_architecture


@torch.no_grad()
def plainly_continued(model: Any, tokens: torch.Tensor, uniforms: np.ndarray) -> list[int]:
    """Return a document's next tokens by transformers' logits: where the summed mass passes each number."""
    added = []
    for uniform in uniforms:
        mass = model(tokens[None], use_cache=False).logits[0, -1].double().softmax(-1).cumsum(-1).numpy()
        added.append(int(np.searchsorted(mass, uniform * mass[-1], side="right")))
        tokens = torch.cat([tokens, torch.tensor(added[-1:])])
    return added


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "mamba", "phi"])
def test_tokens_are_drawn_from_the_students_distribution(name: str) -> None:
    """Caps, scales, biases and state included."""
    model = make_architecture(*ARCHITECTURES[name])
    student = Student(model, CONFIG, examine(model, CONFIG, SEQ_LENGTH)).eval()
    tokens = torch.arange(20).view(2, 10) + 3
    uniforms = np.random.default_rng(0).random((2, 6)).astype(np.float32)
    with torch.no_grad():
        continuations = student.continued(tokens, torch.from_numpy(uniforms))
    expected = [plainly_continued(model, *row) for row in zip(tokens, uniforms, strict=True)]
    assert continuations.tolist() == expected
    assert continuations.max() < VOCABULARY


def test_a_run_writes_samples_before_and_after_training(
    make_config: MakeConfig, student_folder: Path
) -> None:
    config = make_config(sample_tokens=5)
    train(config)
    folder = Path(config.output_dir)
    lines = read_lines(folder, "samples")
    cache, tokenizer = open_cache(config.cache), AutoTokenizer.from_pretrained(student_folder)
    assert [(line["step"], line["domain"]) for line in lines] == [
        (step, domain) for step in (0, config.max_steps) for domain in cache.domains
    ]
    documents = [held_out_document(cache[name].validation, 5) for name in cache.domains]
    uniforms = np.random.default_rng(config.seed).random((len(documents), 5)).astype(np.float32)
    before, after = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for source in (student_folder, folder)
    )
    for line, document, row in zip(lines, [*documents, *documents], [*uniforms, *uniforms], strict=True):
        assert line["prompt"] == tokenizer.decode(document.prompt)
        assert line["text"] == tokenizer.decode(document.text)
        model = before if line["step"] == 0 else after
        prompt = torch.from_numpy(document.prompt).long()
        assert line["sample"] == tokenizer.decode(plainly_continued(model, prompt, row))


def test_sample_tokens_0_makes_no_samples(make_config: MakeConfig) -> None:
    config = make_config(sample_tokens=0, max_steps=1, warmup_steps=0)
    train(config)
    assert (Path(config.output_dir) / "samples.jsonl").read_text() == ""


def test_prompts_are_from_held_out_documents(cache_folder: Path) -> None:
    cache = open_cache(str(cache_folder))
    for name in cache.domains:
        document = held_out_document(cache[name].validation, 4)
        rows = cache[name].validation.read(np.arange(len(cache[name].validation)))
        tokens = np.concatenate(document)
        first_documents = [
            row[segments == segments[0]] for row, segments in zip(rows.tokens, rows.segments, strict=True)
        ]
        assert any(np.array_equal(first[: len(tokens)], tokens) for first in first_documents)


def test_the_prompt_of_a_conversation_ends_with_the_question() -> None:
    """Where the loss begins, up to 512 tokens; the longest answer is taken."""

    def split(*masks: list[int]) -> Any:
        mask = np.array(masks, bool)
        rows = SimpleNamespace(
            tokens=np.arange(mask.size, dtype=np.int32).reshape(mask.shape),
            segments=np.ones(mask.shape, np.uint16),
            loss_mask=mask,
        )
        return MagicMock(read=lambda *args, **keys: rows, __len__=lambda self: len(masks))

    question, answer = [0] * 9, [1] * 5 + [0]
    document = held_out_document(split([*question, *answer], [*question, 0, *answer[1:]]), 3)
    assert document.prompt.tolist() == list(range(10))  # the label of position 9 is the answer's first token
    assert document.text.tolist() == [10, 11, 12]
    text = held_out_document(split([1] * 40), 3)
    assert text.prompt.tolist() == list(range(32))
    endless = held_out_document(split([0] * 600 + [1] * 2), 3)
    assert len(endless.prompt) == 32
