"""Distillation from a teacher in the loop, and that only the target tells it from training on a cache."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import MakeConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from ddk_build.capture.scoring import sampling_offsets
from ddk_cache import open_cache
from ddk_cache.errors import ConfigError
from ddk_train.data.batches import reader
from ddk_train.train import train
from tools.studies import online_kd
from tools.studies.online_teacher import (
    Choice,
    Teacher,
    all_logits,
    entries,
    entropy,
    least_sure,
    load_frozen,
)

TOP_8 = {"top_k": 8}


@pytest.fixture
def teacher(make_config: MakeConfig, teacher_folder: Path) -> Teacher:
    config = make_config()
    cache = open_cache(config.cache)
    return Teacher(load_frozen(str(teacher_folder), config, cache), cache, 1 << 20)


def test_targets_in_the_loop_are_those_of_the_cache(teacher: Teacher) -> None:
    domain, row = np.array([2, 0, 1, 0]), np.array([1, 3, 0, 7])
    batch, logits = teacher.read(domain, row)
    again, remembered = teacher.read(domain, row)
    torch.testing.assert_close(remembered, logits, rtol=0, atol=0)
    torch.testing.assert_close(again.label_positions, batch.label_positions)
    read = reader(teacher.cache, targets=[True] * 3, vocab_size=400)(domain, row)
    assert read.ids is not None
    assert read.logprobs is not None
    made = entries(Choice(target=TOP_8), logits, batch.labels, torch.empty(0), torch.Generator())
    torch.testing.assert_close(batch.labels, read.labels)
    ours, theirs = (
        torch.full(logits.shape, -30.0).scatter(1, ids.long(), logprobs)
        for ids, logprobs in (made[:2], (read.ids, read.logprobs))
    )
    # The codec's grid: logprobs in the cache are rounded, and those that fall together change places.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1)
    torch.testing.assert_close(made[2], read.tail_logprob, rtol=0, atol=0.1)
    at = teacher.cached_offsets(domain, row, batch)
    seed, length = teacher.cache.manifest.seed, teacher.cache.seq_length
    expected = sampling_offsets(seed, teacher.cache.domains[1], "train", [0], length)[0]
    mask = teacher.cache[teacher.cache.domains[1]].train.read([0]).loss_mask[0]
    torch.testing.assert_close(at[batch.domain == 1], torch.from_numpy(expected[mask]))


@pytest.mark.parametrize(
    ("gamma", "part"),
    [
        (0.0, 1e-5),  # rows, order, schedule and optimizer are the same, so the weights are
        (0.7, 0.05),  # the codec rounds the cache's entries
    ],
)
def test_training_on_the_caches_targets_gives_the_same_student(
    teacher: Teacher, make_config: MakeConfig, tmp_path: Path, gamma: float, part: float
) -> None:
    config = make_config(strategy="uniform", gamma=gamma)
    in_the_loop = online_kd.distill(config, Choice(target=TOP_8), teacher)
    train(config)
    cached = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    wrong = online_kd.distill(config.model_copy(update={"seed": 1}), Choice(target=TOP_8), teacher)

    def apart(model: torch.nn.Module) -> float:
        ours, theirs = model.state_dict(), cached.state_dict()
        return math.sqrt(sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs))

    assert apart(in_the_loop.inner) <= part * apart(wrong.inner)  # another seed's rows show the scale


def test_the_full_distribution_is_trained_on_and_measured(teacher: Teacher, make_config: MakeConfig) -> None:
    config = make_config(gamma=1.0, cross_entropy_weight=0.0, strategy="uniform", max_steps=4)
    student = online_kd.distill(config, Choice(), teacher)
    found = online_kd.measure(student, online_kd.held_out(teacher, 4))
    name = teacher.cache.domains[1]
    part = {1: teacher.cache[name].validation.read(np.arange(5), targets=False)}
    batch = online_kd.make_batch(part, 400)
    with torch.no_grad():
        ours, theirs = (all_logits(model, batch).log_softmax(-1) for model in (student, teacher.model))
    kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert found["kl"][name] == pytest.approx(float(kl), rel=1e-5)
    labels = torch.nn.functional.nll_loss(ours, batch.labels)
    assert found["cross_entropy"][name] == pytest.approx(float(labels), rel=1e-5)


def expected_mass(choice: Choice, logits: Tensor, samples: int) -> Tensor:
    """Return the mean over many draws of what is kept, [M, V]."""
    mean, random = torch.zeros_like(logits), torch.Generator().manual_seed(0)
    for draw in range(samples):
        at = torch.full((len(logits),), (draw + 0.5) / samples, dtype=torch.float64)
        ids, logprobs, tail = entries(choice, logits, torch.zeros(len(logits), dtype=torch.int64), at, random)
        assert (tail == -torch.inf).all()
        torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(ids)))
        kept = torch.where(ids < 0, 0, logprobs.exp())
        mean += torch.zeros_like(mean).scatter_add_(1, ids.clamp(min=0).long(), kept) / samples
    return mean


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({}, 1e-3),
        ({"draws": "threshold"}, 1e-3),
        ({"head": 3}, 1e-3),
        ({"draws": "fresh"}, 0.03),  # 12 systematic draws, 400 times: a standard deviation of 0.002
        ({"draws": "independent"}, 0.03),  # 0.007
    ],
)
def test_every_kind_of_draws_is_right_on_average(keys: dict[str, object], error: float) -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(1)) * 2
    choice = Choice.model_validate({"target": {"kind": "sampled", "samples": 12}, **keys})
    mean = expected_mass(choice, logits, 400)
    torch.testing.assert_close(mean, logits.softmax(-1), rtol=0, atol=error)


def test_the_least_sure_positions_stay(teacher: Teacher) -> None:
    batch, logits = teacher.read(np.array([0, 1]), np.array([0, 1]))
    made = entries(Choice(), logits, batch.labels, torch.empty(0), torch.Generator())
    whole = online_kd.dataclasses.replace(batch, ids=made[0], logprobs=made[1], tail_logprob=made[2])
    unsure = entropy(logits)
    kept = least_sure(whole, unsure, 0.2)
    count = round(0.2 * len(batch.labels))
    assert len(kept.labels) == count
    assert set(kept.label_positions.tolist()) == set(
        batch.label_positions[unsure.argsort(descending=True)[:count]].tolist()
    )
    assert all((kept.label_positions.diff() > 0).tolist())


def test_a_study_goes_on_where_it_was(
    make_config: MakeConfig, teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    config = make_config(max_steps=2, strategy="uniform")
    study = online_kd.Study(
        teacher=str(teacher_folder),
        train=config.model_dump(exclude={"output_dir", "weights"}) | {"student": str(student_folder)},
        choices={"full": Choice(), "top 8": Choice(target=TOP_8)},
        control="full",
        seeds=[0, 1],
        output=str(tmp_path / "lines.jsonl"),
    )
    first = online_kd.run(study)
    output = Path(study.output)
    lines = output.read_text().splitlines()
    output.write_text("\n".join(lines[:3]) + "\n")
    assert [line["kl"] for line in online_kd.run(study)] == [line["kl"] for line in first]
    assert len(output.read_text().splitlines()) == 4
    mean, error = online_kd.differences(first, "full", "full", "kl")
    assert (mean, error) == (0, 0)
    assert online_kd.differences(first, "top 8", "full", "kl")[1] > 0


def test_a_mistake_in_a_study_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train: gama"):
        online_kd.Study(
            teacher="t",
            train={"cache": "c", "student": "s", "gama": 1},
            choices={"full": Choice()},
            control="full",
            seeds=[0],
            output="o",
        ).config(Choice(), 0)


def test_the_studies_of_caching_can_be_run() -> None:
    study = online_kd.load("tools/studies/configs/caching.yaml", [], online_kd.Study)
    positions = online_kd.load("tools/studies/configs/positions.yaml", [], online_kd.Study)
    assert positions.config(positions.choices[positions.control], 0) == study.config(Choice(), 0)
    for choice in study.choices.values():
        assert study.config(choice, 1).student.endswith("student-1")
    assert list(study.narrowed(["24 draws"]).choices) == [study.control, "24 draws"]
    with pytest.raises(ConfigError, match="no choice 'twelve'"):
        study.narrowed(["twelve"])


def test_whose_doubt_chooses(teacher: Teacher, make_config: MakeConfig) -> None:
    batch, logits = teacher.read(np.array([0]), np.array([0]))
    student = online_kd.distill(make_config(strategy="uniform", max_steps=1), Choice(), teacher)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own = entropy(all_logits(student, batch))
    found = {
        unsure: online_kd.doubt(Choice(unsure=unsure), student, batch, logits, random)
        for unsure in ("student", "teacher", "nobody")
    }
    torch.testing.assert_close(found["student"], own)
    torch.testing.assert_close(found["teacher"], entropy(logits))
    assert found["nobody"].shape == own.shape
    config = make_config(strategy="uniform", gamma=1.0, cross_entropy_weight=0.0, max_steps=2)
    whole, part = (online_kd.distill(config, Choice(positions=of), teacher) for of in (1.0, 0.2))
    assert any(
        not torch.equal(one, other) for one, other in zip(whole.parameters(), part.parameters(), strict=True)
    )
