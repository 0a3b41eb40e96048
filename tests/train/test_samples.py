"""What the student writes is drawn from its own distribution, and stands in the run's folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train.conftest import MakeConfig
from train.makers import read_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_cache import open_cache
from ddk_train.probe import examine
from ddk_train.samples import beginnings
from ddk_train.student import Student
from ddk_train.train import train
from tools.docs.students import ARCHITECTURES, CONFIG, SEQ_LENGTH, VOCABULARY
from tools.docs.students import make_model as make_architecture


@torch.no_grad()
def plainly_continued(model: Any, tokens: torch.Tensor, uniforms: np.ndarray) -> list[int]:
    """One document's tokens by transformers' own logits: where the summed mass passes each number."""
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
        found = student.continued(tokens, torch.from_numpy(uniforms))
    assert found.tolist() == [plainly_continued(model, *one) for one in zip(tokens, uniforms, strict=True)]
    assert found.max() < VOCABULARY


def test_a_run_leaves_samples_from_before_and_after(make_config: MakeConfig, student_folder: Path) -> None:
    config = make_config(sample_tokens=5)
    train(config)
    folder = Path(config.output_dir)
    lines = read_lines(folder, "samples")
    cache, tokenizer = open_cache(config.cache), AutoTokenizer.from_pretrained(student_folder)
    assert [(line["step"], line["domain"]) for line in lines] == [
        (step, domain) for step in (0, config.max_steps) for domain in cache.domains
    ]
    held_out = beginnings(cache, 5)
    uniforms = np.random.default_rng(config.seed).random((len(held_out), 5)).astype(np.float32)
    before, after = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for source in (student_folder, folder)
    )
    for number, line in enumerate(lines):
        at = number % len(held_out)
        assert line["prompt"] == tokenizer.decode(held_out[at].prompt)
        assert line["text"] == tokenizer.decode(held_out[at].text)
        model = before if line["step"] == 0 else after
        prompt = torch.from_numpy(held_out[at].prompt).long()
        assert line["sample"] == tokenizer.decode(plainly_continued(model, prompt, uniforms[at]))


def test_no_samples_are_made_if_none_are_wanted(make_config: MakeConfig) -> None:
    config = make_config(sample_tokens=0, max_steps=1, warmup_steps=0)
    train(config)
    assert (Path(config.output_dir) / "samples.jsonl").read_text() == ""


def test_beginnings_are_held_out_documents(cache_folder: Path) -> None:
    cache = open_cache(str(cache_folder))
    found = beginnings(cache, 4)
    assert len({len(one.prompt) for one in found}) == 1
    for name, one in zip(cache.domains, found, strict=True):
        rows = cache[name].validation.read(np.arange(len(cache[name].validation)))
        whole = np.concatenate(one)
        firsts = [
            tokens[segments == segments[0]]
            for tokens, segments in zip(rows.tokens, rows.segments, strict=True)
        ]
        assert any(np.array_equal(first[: len(whole)], whole) for first in firsts)
