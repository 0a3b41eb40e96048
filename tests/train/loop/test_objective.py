"""Weights by step and by domain, what they do to a run, and what is refused."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.training import ROWS, make_cache, plain_agreement, read_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import ddk_cache
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.layout import Target
from ddk_train.config import TrainConfig
from ddk_train.loop.objective import Weights, check_objective, reads_targets, step_weights
from ddk_train.train import train

DOMAINS = ("code", "prose")
RECIPES = Path(ddk_cache.__file__).parent / "recipes"


def configuration(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate({"cache": "c", "student": "s", "output_dir": "o", **keys})


def test_weights_are_the_common_ones_where_a_domain_has_none_of_its_own() -> None:
    config = configuration(gamma=0.2, domains={"prose": {"gamma": 1.0, "cross_entropy_weight": 0}})
    assert step_weights(config, DOMAINS, 1) == Weights([1.0, 0.0], [0.2, 1.0], [0.0, 0.0])
    assert step_weights(configuration(cross_entropy_weight=0.5), DOMAINS, 1) == Weights(
        [0.5] * 2, [0.2] * 2, [0.0] * 2
    )


def test_gamma_follows_its_schedule() -> None:
    gamma = {"start": 0.7, "end": 0.3, "steps": 5}
    config = configuration(gamma=gamma, max_steps=100, domains={"code": {"gamma": 0}})
    seen = [step_weights(config, DOMAINS, step).gamma for step in (1, 2, 5, 100)]
    np.testing.assert_allclose(seen, [[0, 0.7], [0, 0.6], [0, 0.3], [0, 0.3]])


def test_the_factor_of_t_squared_is_there_when_asked_for() -> None:
    for squared, factor in ((False, 1), (True, 4)):
        config = configuration(gamma=0.5, temperature=2.0, temperature_squared=squared)
        assert step_weights(config, DOMAINS, 1).gamma == [0.5 * factor] * 2


def test_targets_are_read_where_gamma_is_ever_above_0() -> None:
    rising = configuration(gamma={"start": 0, "end": 1}, domains={"prose": {"gamma": 0}})
    assert reads_targets(rising, DOMAINS) == [True, False]
    assert reads_targets(configuration(gamma=0), DOMAINS) == [False, False]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"domains": {"cod": {"gamma": 0}}},
            "domains.cod: no such domain in the cache; its domains are code",
        ),
        (
            {"domains": {"law": {"gamma": 0, "cross_entropy_weight": 0}}},
            "domains.law: gamma, cross_entropy_weight and policy_gradient_weight are all 0",
        ),
        ({"temperature": 2.0}, "temperature: is 2.0, but the cache's targets were made at 1.0"),
    ],
)
def test_what_does_not_go_with_the_cache_is_refused(make_config: Any, keys: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        train(make_config(**keys))


def test_a_divergence_that_does_not_go_with_the_target_is_refused(cache_folder: Path) -> None:
    cache = ddk_cache.open_cache(str(cache_folder))
    target = Target(kind="sampled", samples=12)
    cache.manifest = cache.manifest.model_copy(update={"target": target})
    with pytest.raises(ConfigError, match="needs target kind topk"):
        check_objective(configuration(divergence="reverse"), cache)
    check_objective(configuration(gamma=0), cache)


def test_a_domain_without_gamma_is_trained_and_its_targets_are_never_read(
    make_config: Any, cache_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache_folder, copy)
    for array in ("entries", "rankings", "tail", "gaps", "codes"):
        shutil.rmtree(copy / "code" / "train" / array)
    with pytest.raises(CacheError):
        train(make_config(cache=str(copy), output_dir=str(tmp_path / "all")))
    plain = make_config(cache=str(copy), gamma=0, max_steps=3, output_dir=str(tmp_path / "none"))
    train(plain)
    (line,) = read_lines(Path(plain.output_dir), "metrics")
    assert line["kl"] == 0
    assert line["loss"] == pytest.approx(line["cross_entropy"])
    config = make_config(cache=str(copy), gamma=0.5, domains={"code": {"gamma": 0}})
    train(config)
    for line in read_lines(Path(config.output_dir), "metrics"):
        assert "kl/code" not in line
        parts = [line[name] for name in ("kl/prose", "kl/law") if name in line]
        assert min(parts) <= line["kl"] <= max(parts)
        parts = [line[f"cross_entropy/{name}"] for name in ROWS if f"cross_entropy/{name}" in line]
        assert min(parts) < line["cross_entropy"] < max(parts)


def test_the_loss_is_what_the_weights_make_of_its_parts(make_config: Any) -> None:
    """Of one step, a single domain: pure distillation, its gamma on the way from 2 to 1."""
    config = make_config(
        strategy="static",
        weights={"code": 1, "prose": 0, "law": 0},
        gamma={"start": 2, "end": 1, "shape": "cosine", "steps": 3},
        cross_entropy_weight=0,
        divergence="jensen_shannon",
        beta=0.1,
        max_steps=3,
        logging_steps=1,
    )
    train(config)
    lines = read_lines(Path(config.output_dir), "metrics")
    for line, gamma in zip(lines, (2, 1.5, 1), strict=True):
        assert line["loss"] == pytest.approx(gamma * line["kl"])
        assert line["kl/code"] == pytest.approx(line["kl"])
        assert line["cross_entropy/code"] == pytest.approx(line["cross_entropy"])
        assert "kl/law" not in line


def test_the_recipe_for_recovery_brings_a_damaged_student_back_by_the_teacher_alone(
    make_config: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "pruned")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "pruned")
    recipe = yaml.safe_load((RECIPES / "recovery" / "train.yaml").read_text("utf-8"))
    objective = {key: recipe[key] for key in ("strategy", "cross_entropy_weight", "gamma")}
    train(make_config(student=str(tmp_path / "pruned"), logging_steps=1, max_steps=40, **objective))
    lines = read_lines(tmp_path / "run", "metrics")
    assert all(line["loss"] == pytest.approx(line["kl"], rel=1e-5) for line in lines)
    assert np.mean([line["kl"] for line in lines[-8:]]) < 0.5 * np.mean([line["kl"] for line in lines[:2]])


def test_a_teacher_of_one_domain_is_learnt_by_any_divergence(make_config: Any, tmp_path: Path) -> None:
    for divergence in ("reverse", "jensen_shannon"):
        config = make_config(
            output_dir=str(tmp_path / divergence),
            divergence=divergence,
            gamma=1.0,
            cross_entropy_weight=0,
            max_steps=16,
            logging_steps=8,
        )
        train(config)
        first, last = read_lines(Path(config.output_dir), "metrics")
        assert last["kl"] < first["kl"]


def test_a_cache_with_validation_targets_tells_how_far_the_teacher_is_on_held_out_rows(
    make_config: Any, teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    """KL, top-1 agreement and bits per byte by domain and interval.

    The teacher itself, in float32 as here, has only the codec's KL, and agrees everywhere.
    """
    cache = str(make_cache(tmp_path / "cache", teacher_folder, validation_targets=True))
    lines = {}
    for name, student in (("student", student_folder), ("teacher", teacher_folder)):
        config = make_config(
            cache=cache, student=str(student), output_dir=str(tmp_path / name), gamma=1.0, max_steps=8
        )
        train(config)
        lines[name] = read_lines(Path(config.output_dir), "discrepancy")
    assert all(set(line["validation_kl"]) == set(ROWS) for line in lines["student"])
    for domain in ROWS:
        values = [line["validation_kl"][domain] for line in lines["student"]]
        assert values[-1] < values[0]
        # Levels of the grid are a few hundredths of a nat apart, which makes a KL of about its square.
        assert lines["teacher"][0]["validation_kl"][domain] < 2e-3
        assert lines["teacher"][0]["validation_agreement"][domain] == 1
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (teacher_folder, student_folder)
    ]
    opened = ddk_cache.open_cache(cache)
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    for domain in ROWS:
        rows = opened[domain].validation.read(range(len(opened[domain].validation)))
        labels = rows.tokens[:, 1:][rows.loss_mask[:, :-1]].tolist()
        # A letter of a byte-level token is a byte of text, whether or not that is whole characters.
        text = [label for label in labels if label not in tokenizer.added_tokens_decoder]
        size = sum(map(len, tokenizer.convert_ids_to_tokens(text)))
        for line, who in itertools.product(lines["student"], ("student", "teacher")):
            bits = math.log2(line[f"{who}_ppl"][domain]) * len(labels) / size
            assert line[f"{who}_bits_per_byte"][domain] == pytest.approx(bits, rel=1e-9)
        expected = plain_agreement(*models, opened[domain].validation)
        assert lines["student"][0]["validation_agreement"][domain] == pytest.approx(expected, abs=1e-9)
        assert 0 <= expected < 1


def test_the_held_out_kl_is_the_same_measure_whatever_a_run_minimises(
    make_config: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    """A report lays runs with other objectives over each other; the teacher's own KL is the codec's."""
    target = Target(top_k=8, temperature=2.0)
    cache = str(make_cache(tmp_path / "cache", teacher_folder, target, validation_targets=True))
    measured, at_2 = [], {"temperature": 2.0}
    objectives: list[dict[str, Any]] = [
        at_2 | {"divergence": "reverse"},
        at_2 | {"tail": "label"},
        {"gamma": 0},
    ]
    for number, objective in enumerate(objectives):
        run = str(tmp_path / str(number))
        train(make_config(cache=cache, student=str(teacher_folder), output_dir=run, max_steps=1, **objective))
        measured.append(read_lines(Path(run), "discrepancy")[0]["validation_kl"])
    assert measured == measured[:1] * 3
    assert max(measured[0].values()) < 2e-3
