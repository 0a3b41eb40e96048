"""A token's whole way: text, teacher, cache, reader, loss, student, with an independent model at its end."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.builds import finish, write_config
from helpers.commands import Done, Run, control_characters, ddk_cache
from helpers.models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ddk_cache as library
from ddk_build.capture.scoring import labelled, requests
from ddk_build.config import TeacherConfig
from ddk_build.teacher.engines import load_teacher
from ddk_cache.format.layout import Target
from ddk_train.config import TrainConfig
from ddk_train.data.batches import make_batch
from ddk_train.student.student import Student

SEQ_LENGTH = 48
WORDS = ("add", "print", "range", "fox", "jumps", "lazy", "dog", "teacher", "granted", "template", "struct")


def write_texts(folder: Path) -> dict[str, Path]:
    """Two domains: one of several documents a row, one with documents that are longer than a row."""
    chance = np.random.default_rng(4)
    found = {}
    for name, most in (("short", 7), ("long", 50)):
        texts = [" ".join(chance.choice(WORDS, chance.integers(1, most))) for _ in range(60)]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention heads of 32, the least that vLLM's CPU build takes; logits of half the usual size.

    With all of them, this teacher in bfloat16 is 0.007 nats from itself in float32, in transformers too.
    """
    folder: Path = make_model(tmp_path_factory.mktemp("teacher"), seed=1, hidden=128)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] /= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """Return the cache of a build in float32 by the reference engine."""
    folder = tmp_path_factory.mktemp("exact")
    config = write_config(
        folder / "build.yaml", teacher, write_texts(folder), seq_length=SEQ_LENGTH, target={"top_k": 64}
    )
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    return folder / "cache"


@pytest.fixture(scope="module")
def vllm_build(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> tuple[Path, Done]:
    """Return the cache of an ordinary build in bfloat16 by vLLM, and the command's result."""
    folder = tmp_path_factory.mktemp("vllm")
    config = write_config(
        folder / "build.yaml", teacher, write_texts(folder), seq_length=SEQ_LENGTH, target={"top_k": 64}
    )
    engine = {
        "model": str(teacher),
        "engine": "vllm",
        "engine_args": {"enforce_eager": True, "num_gpu_blocks_override": 64},
    }
    done = ddk_cache("build", config, "--set", f"teacher={json.dumps(engine)}", VLLM_CPU_KVCACHE_SPACE="1")
    return folder / "cache", done


def distance(teacher: Path, rows: library.Rows) -> float:
    """KL of the rows' targets from the teacher as a student, by training's own path, in nats."""
    config = TrainConfig(cache="x", student=str(teacher), output_dir="x", bf16=False)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    student = Student(model, config)
    with torch.no_grad():
        return float(student(make_batch({0: rows}, student.vocab_size), gamma=1.0).kl)


def all_rows(cache: Path, domain: str) -> library.Rows:
    split = library.open_cache(str(cache))[domain].train
    return split.read(range(len(split)))


def test_a_build_by_vllm_prints_nothing_but_our_lines(vllm_build: tuple[Path, Done]) -> None:
    cache, done = vllm_build
    assert done.code == 0, done.err
    # The last is vLLM's own, on a CPU without bfloat16 instructions.
    ours = r"calibration: .* rows in .*|tokenising: .* tokens.*|teacher: .*|vLLM: Failed to create oneDNN .*"
    assert [line for line in done.err.splitlines() if not re.fullmatch(ours, line)] == []
    assert control_characters(done.err + done.out) == []
    names = ["long", "short", str(cache), "next"]
    assert sorted(line.partition(":")[0] for line in done.out.splitlines()) == sorted(names)


@pytest.mark.parametrize("domain", ["short", "long"])
def test_the_teacher_as_student_is_where_it_should_go(
    vllm_build: tuple[Path, Done], exact: Path, teacher: Path, domain: str
) -> None:
    """Through vLLM in bfloat16, codec and cache; then without the engine's noise; then shifted by one."""
    assert 0 < distance(teacher, all_rows(vllm_build[0], domain)) <= 5e-3
    rows = all_rows(exact, domain)
    assert abs(distance(teacher, rows)) <= 2e-4
    arrays = rows.arrays()
    rolled = {name: np.roll(arrays[name], 1, axis=1) for name in ("ids", "logprobs")}
    shifted = library.Rows.from_arrays(arrays | rolled)
    assert distance(teacher, shifted) > 0.5


def test_exact_targets_leave_no_distance(exact: Path, teacher: Path) -> None:
    rows = all_rows(exact, "short")
    target = Target(top_k=64)
    config = TeacherConfig(model=str(teacher), engine="transformers", dtype="float32")
    asked = requests(rows.arrays())
    answers = load_teacher(config, target, SEQ_LENGTH).score(asked.documents)
    plain = library.Rows(rows.tokens, rows.segments, rows.loss_mask, targets=labelled(answers, asked))
    assert abs(distance(teacher, plain)) <= 1e-5


def documents(rows: library.Rows) -> list[tuple[int, int, int]]:
    """(row, first position, end) of every segment."""
    found = []
    for row, segments in enumerate(rows.segments):
        for number in range(1, int(segments.max()) + 1):
            at = np.flatnonzero(segments == number)
            assert (np.diff(at) == 1).all()
            found.append((row, int(at[0]), int(at[-1]) + 1))
    return found


def answer(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of the token after ``tokens``, [V]."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0, -1]
    return logits.double().log_softmax(-1).numpy()


def test_position_t_holds_what_the_teacher_says_after_the_document_up_to_t(
    exact: Path, teacher: Path
) -> None:
    """By one forward pass for each prefix; a shift by one, or sight of the document before, shows."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    split = library.open_cache(str(exact))["short"].train
    rows = split.read([3, 0, len(split) - 1])
    assert rows.ids is not None
    assert rows.logprobs is not None
    assert rows.tail_logprob is not None
    assert rows.label_logprob is not None
    errors, shifts, leaks = [], [], []
    for row, first, end in documents(rows):
        said = [answer(model, rows.tokens[row, first : t + 1]) for t in range(first, end)]
        for t in range(first, end - 1):
            ids, logprobs = rows.ids[row, t], rows.logprobs[row, t]
            here = said[t - first]
            assert set(ids.tolist()) == set(np.argsort(-here)[:64].tolist())
            errors.append(np.abs(logprobs - here[ids]).max())
            rest = np.delete(here, ids)
            errors.append(abs(rows.tail_logprob[row, t] - np.logaddexp.reduce(rest)))
            label = rows.tokens[row, t + 1]
            assert rows.label_logprob[row, t] == pytest.approx(here[label], abs=1e-4)
            shifts.append(np.abs(logprobs - said[t - first + 1][ids]).max())
        if first and end - first > 1:
            whole = answer(model, rows.tokens[row, : first + 1])
            leaks.append(np.abs(rows.logprobs[row, first] - whole[rows.ids[row, first]]).max())
    assert max(errors) <= 0.02  # half a step of the codec's grid, 0.0385, and a 64th
    assert min(shifts) > 0.1
    assert len(leaks) > 2
    assert min(leaks) > 0.1


@pytest.mark.parametrize("domain", ["short", "long"])
def test_the_end_of_a_document_has_no_label(exact: Path, domain: str) -> None:
    rows = all_rows(exact, domain)
    expected = np.zeros(rows.segments.shape, bool)
    for row, first, end in documents(rows):
        expected[row, first : end - 1] = True
    np.testing.assert_array_equal(rows.loss_mask, expected)
    assert rows.ids is not None
    assert rows.logprobs is not None
    assert rows.tail_logprob is not None
    assert (rows.ids[~expected] == -1).all()
    assert (rows.logprobs[~expected] == -np.inf).all()
    assert (rows.tail_logprob[~expected] == -np.inf).all()
    assert rows.label_logprob is not None
    assert (rows.label_logprob[~expected] == 0).all()
    assert (rows.ids[expected] >= 0).all()


METRICS = {
    "step", "loss", "cross_entropy", "kl", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
    "data_wait_fraction",
}  # fmt: skip
DISCREPANCY = {
    "interval",
    "step",
    "factor",
    "student_ppl",
    "teacher_ppl",
    "rows",
    "labels",
    "epochs",
    "standard_error",
    "student_bits_per_byte",
    "teacher_bits_per_byte",
}
TARGETS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 8, "top_p": 0.9},
    "sampled": {"kind": "sampled", "samples": 12},
}


def write_chats(path: Path) -> Path:
    """Conversations; what the user says is told from what the assistant says by its letters."""
    chance = np.random.default_rng(5)
    lines = []
    for _ in range(24):
        turns = [
            {"role": role, "content": " ".join(chance.choice(words, chance.integers(2, 9)))}
            for role, words in [("user", ["wwww", "zz"]), ("assistant", ["fox", "lazy", "dog"])] * 2
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("kind", TARGETS)
def test_a_student_is_trained_where_no_teacher_is_left(
    tmp_path: Path, student_folder: Path, teacher_folder: Path, run: Run, kind: str
) -> None:
    """Text and chat, with both kinds of target; the student loads as any Hugging Face model."""
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    chats = {"path": "json", "data_files": str(write_chats(tmp_path / "chats.jsonl"))}
    build = write_config(
        tmp_path / "build.yaml",
        teacher,
        {},
        target=TARGETS[kind],
        domains={
            "text": {"path": str(write_texts(tmp_path)["short"])},
            "chat": chats | {"messages_column": "messages"},
        },
    )
    assert finish(build) == 0, build.with_suffix(".log").read_text()
    shutil.rmtree(teacher)
    cache, folder = tmp_path / "cache", tmp_path / "run"

    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    rows = all_rows(cache, "chat")
    labels = rows.tokens[:, 1:][rows.loss_mask[:, :-1]]
    said = str(tokenizer.decode(labels))
    assert set(re.findall("[a-z]+", said)) - {"im", "end"} <= {"fox", "lazy", "dog"}
    assert said.count("<|im_end|>") > 10

    train = tmp_path / "train.yaml"
    settings = {
        "cache": str(cache),
        "student": str(student_folder),
        "output_dir": str(folder),
        "distill_interval": 4,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "bf16": False,
        "logging_steps": 2,
        "save_steps": 6,
    }
    train.write_text(yaml.safe_dump(settings))
    done = run("train", train)
    assert done.code == 0, done.err
    assert run("report", folder).out == f"{folder / 'report.html'}\n"

    assert yaml.safe_load((folder / "config.yaml").read_text()) == yaml.safe_load(
        (folder / "config.yaml").read_text()
    ) | yaml.safe_load(train.read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [2, 4, 6, 8, 10, 12]
    by_domain = {f"{name}/{domain}" for name in ("cross_entropy", "kl") for domain in ("text", "chat")}
    assert all(METRICS <= set(line) <= METRICS | by_domain for line in metrics)
    assert all(all(map(math.isfinite, line.values())) for line in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    intervals = [json.loads(line) for line in (folder / "discrepancy.jsonl").read_text().splitlines()]
    assert [line["step"] for line in intervals] == [0, 4, 8, 12]
    for line in intervals:
        assert set(line) == DISCREPANCY
        assert all(set(line[name]) == {"text", "chat"} for name in DISCREPANCY - {"interval", "step"})
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}

    student = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    before = AutoModelForCausalLM.from_pretrained(student_folder)
    inputs = torch.from_numpy(rows.tokens[:1].astype(np.int64))
    with torch.no_grad():
        assert (student(inputs).logits - before(inputs).logits).abs().max() > 0.1
