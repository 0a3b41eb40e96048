"""A small cache with a real (tiny, random) teacher's answers, written through the library."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_cache.cache.split import Split
from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.format import codec, layout
from ddk_cache.format.codebook import fit_codebook
from ddk_cache.format.vocabulary import Vocabulary
from ddk_train.config import TrainConfig
from helpers.caches import make_manifest

SEQ_LENGTH, VOCABULARY = 24, 400
TOP_8 = layout.Target(top_k=8)
ROWS = {"code": 20, "prose": 12, "law": 8}  # training rows
VALIDATION_ROWS = 5

Arrays = dict[str, np.ndarray]
MakeConfig = Callable[..., TrainConfig]  # the fixture make_config


def make_rows(n: int, seed: int) -> Arrays:
    """Rows of two or three documents of random length, most of them with some padding at the end."""
    random = np.random.default_rng(seed)
    tokens, segments = np.zeros((n, SEQ_LENGTH), np.int32), np.zeros((n, SEQ_LENGTH), np.uint16)
    for row in range(n):
        bounds = np.sort(random.choice(np.arange(3, SEQ_LENGTH), 3, replace=False))
        for segment, (start, end) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True), start=1):
            # A domain's documents count upwards in its steps: something to learn.
            first = random.integers(0, VOCABULARY)
            tokens[row, start:end] = (first + np.arange(end - start) * (seed % 7 + 1)) % VOCABULARY
            segments[row, start:end] = segment
    mask = np.zeros((n, SEQ_LENGTH), bool)
    mask[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    return {"tokens": tokens, "segments": segments, "loss_mask": mask}


def read_lines(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics or discrepancy."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def stored_tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Return a checkpoint's tensors; the parts of several processes are concatenated."""
    tensors: dict[str, Tensor] = {}
    for path in sorted((run / f"checkpoint-{step}").glob("*.safetensors")):
        for name, part in load_file(path).items():
            tensors[name] = torch.cat([tensors[name], part]) if name in tensors else part
    assert tensors
    return tensors


def untimed_lines(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines without what differs from run to run."""
    timed = {"tokens_per_second", "data_wait_fraction"}
    return [{key: value for key, value in line.items() if key not in timed} for line in read_lines(run, name)]


@torch.no_grad()
def plain_losses(model: Any, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return transformers' loss, summed over the labels of each row, and the number of labels."""
    loss, labels = np.zeros(len(split)), np.zeros(len(split))
    for row in range(len(split)):
        rows = split.read([row])
        for segment in set(rows.segments[0].tolist()) - {0}:
            tokens = torch.from_numpy(rows.tokens[0][rows.segments[0] == segment]).long()[None]
            if tokens.numel() > 1:
                loss[row] += model(tokens, labels=tokens).loss.item() * (tokens.numel() - 1)
                labels[row] += tokens.numel() - 1
    return loss, labels


def plain_perplexity(model: Any, split: Split) -> float:
    """Return exp of transformers' mean loss over the labels."""
    loss, labels = plain_losses(model, split)
    return float(np.exp(loss.sum() / labels.sum()))


@torch.no_grad()
def plain_agreement(teacher: Any, student: Any, split: Split) -> float:
    """Return the share of labels for which both models have the same likeliest token."""
    same, labels = 0, 0
    for row in range(len(split)):
        rows = split.read([row])
        for segment in set(rows.segments[0].tolist()) - {0}:
            tokens = torch.from_numpy(rows.tokens[0][rows.segments[0] == segment]).long()[None]
            expected, actual = (model(tokens).logits[0, :-1].argmax(-1) for model in (teacher, student))
            same, labels = same + int((expected == actual).sum()), labels + len(actual)
    return same / labels


def entries(every: Tensor, target: layout.Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and logprobs [P, E] and tail_logprob [P] of a target from all log-probabilities [P, V]."""
    if target.kind != "sampled":
        best = every.topk(target.width)
        return best.indices, best.values, every.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    draws = torch.multinomial(every.exp(), target.samples, replacement=True)
    counts = torch.zeros_like(every).scatter_add(-1, draws, torch.ones(draws.shape))
    best = (counts / target.samples).log().topk(target.samples)
    ids = best.indices.masked_fill(best.values == -torch.inf, -1)
    return ids, best.values, torch.full(ids.shape[:1], -torch.inf)


@torch.no_grad()
def answer(model: Any, rows: Arrays, target: layout.Target) -> Arrays:
    """Return a teacher's answers, one document at a time."""
    shape, width = rows["tokens"].shape, target.width
    ids, logprobs = np.full((*shape, width), -1, np.int32), np.full((*shape, width), -np.inf, np.float32)
    tail, label = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.float32)
    for row, segments in enumerate(rows["segments"]):
        for segment in set(segments.tolist()) - {0}:
            inside = np.flatnonzero(segments == segment)
            tokens = torch.from_numpy(rows["tokens"][row, inside]).long()
            logits = model(tokens[None]).logits[0].float()[:-1]
            every = (logits / target.temperature).log_softmax(-1)
            ids[row, inside[:-1]], logprobs[row, inside[:-1]], tail[row, inside[:-1]] = entries(every, target)
            label[row, inside[:-1]] = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    return {"ids": ids, "logprobs": logprobs, "tail_logprob": tail, "label_logprob": label}


def write_split(writer: Writer, model: Any, name: str, split: layout.SplitName, rows: Arrays) -> None:
    target = writer.manifest.target
    answers = answer(model, rows, target)
    stored = {"label_logprob": answers["label_logprob"]}
    if writer.manifest.has_targets(split):
        if writer.codebook() is None:
            kept = rows["loss_mask"]
            fitted = fit_codebook(answers["ids"][kept], answers["logprobs"][kept], target, VOCABULARY)
            writer.set_codebook(fitted)
        codebook = writer.codebook()
        assert codebook is not None
        mask = rows["loss_mask"]
        stored |= codec.encode(codec.Targets.from_arrays(answers, mask), mask, codebook, target)
    writer.write_answers(name, split, 0, writer.encode_rows(split, stored))


def make_cache(
    folder: Path,
    teacher: Path,
    target: layout.Target = TOP_8,
    *,
    validation_targets: bool = False,
    domains: Mapping[str, int] = ROWS,
) -> Path:
    """Write a cache of the teacher's answers over made-up text, one shard a split."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    vocabulary = Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)
    manifest = make_manifest(
        *domains,
        tokenizer_hash=vocabulary.fingerprint(),
        vocab_size=VOCABULARY,
        target=target,
        seq_length=SEQ_LENGTH,
        shard_rows=32,
        validation_rows=VALIDATION_ROWS,
        validation_targets=validation_targets,
    )
    with open_writer(str(folder), manifest, vocabulary) as writer:
        for index, (name, count) in enumerate(domains.items()):
            splits: dict[layout.SplitName, Arrays] = {
                "train": make_rows(count, index + 10),
                "validation": make_rows(VALIDATION_ROWS, index + 80),
            }
            state: dict[str, Any] = {
                "limits": [None],
                "exhausted": True,
                "source_rows": 1,
                "source_tokens": 1,
                "documents": 1,
                "skipped": {},
                "left_over": 0,
            }
            for split, arrays in splits.items():
                writer.write_tokens(name, split, 0, arrays)
                state[split] = {
                    "rows": len(arrays["tokens"]),
                    "tokens": int((arrays["segments"] > 0).sum()),
                    "labels": int(arrays["loss_mask"].sum()),
                }
            writer.set_state(name, layout.DomainState.model_validate(state))
            for split, arrays in splits.items():
                write_split(writer, model, name, split, arrays)
            writer.finalize_domain(name)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """Make a finished cache of three domains."""
    return make_cache(tmp_path_factory.mktemp("caches") / "cache", teacher_folder)


@pytest.fixture
def make_config(tmp_path: Path, cache_folder: Path, student_folder: Path) -> MakeConfig:
    """Return a function from the keys that matter to a test to the configuration of a short float32 run."""

    def make(**changes: Any) -> TrainConfig:
        keys: dict[str, Any] = {
            "cache": str(cache_folder),
            "student": str(student_folder),
            "output_dir": str(tmp_path / "run"),
            "distill_interval": 4,
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "min_learning_rate": 3e-4,
            "warmup_steps": 2,
            "bf16": False,
            "logging_steps": 3,
            "save_steps": 5,
            "report_to": "none",
        }
        return TrainConfig.model_validate(keys | changes)

    return make
