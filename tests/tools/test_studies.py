"""The studies: their small world, whose held-out text is unknown to its teacher, and what they tabulate."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from helpers.builds import write_corpus

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_cache import open_cache
from ddk_cache.util.configuration import load
from ddk_train.config import TrainConfig
from ddk_train.report.run_files import RunLog, read_run
from tools import real_data
from tools.studies import cost, on_policy, online_kd, other_tokenizer, study, tables, world
from tools.studies.results import Results

STUDIES = Path(__file__).parents[2] / "tools" / "studies" / "configs"
TRAINING = {"max_steps": 6, "distill_interval": 6, "per_device_train_batch_size": 4, "warmup_steps": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> world.World:
    """Return a complete world of two domains and 20 kB of text."""
    folder = tmp_path_factory.mktemp("world")
    texts = {
        name: file.read_text("utf-8").splitlines()
        for name, file in write_corpus(folder, characters=1500).items()
    }
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    described = world.World.model_validate(
        {
            "folder": str(folder / "world"),
            "characters": dict.fromkeys(texts, 10_000),
            "vocab_size": 300,
            "seq_length": 64,
            "validation_rows": 6,
            "teacher": shape,
            "student": shape,
            "teacher_training": {"strategy": "proportional", "learning_rate": 0.02, **TRAINING},
            "student_training": {"strategy": "uniform", **TRAINING, "max_steps": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_data, "DOMAINS", {name: lambda t=t: iter(t) for name, t in texts.items()})
        world.make(described)
    return described


def test_teacher_has_learnt_and_is_made_once(small: world.World) -> None:
    run = read_run(small.root / "teacher")
    first, last = run.intervals[0], run.intervals[-1]
    for name in small.characters:
        assert last.student_ppl[name] < first.student_ppl[name] / 1.2
    weights = small.root / "teacher" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert world.make(small) == small.root / "teacher"
    assert weights.stat().st_mtime_ns == before


def test_students_differ_by_seed_alone(small: world.World) -> None:
    one, other = (world.make_student(small, seed) for seed in (0, 1))
    assert one != other
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] != weights[1]
    assert len(weights[0]) == len(weights[1])


def test_a_cache_of_the_world_holds_out_what_the_teacher_has_not_seen(
    small: world.World, tmp_path: Path
) -> None:
    config = world.build_config(small, tmp_path / "cache", {"kind": "topk", "top_k": 8})
    build_cache(config)
    labels, cache = open_cache(str(small.root / "labels")), open_cache(str(tmp_path / "cache"))
    for name in cache.domains:
        for split in ("train", "validation"):
            rows = [getattr(one[name], split) for one in (labels, cache)]
            found = [split.read(range(len(split)), targets=False).tokens for split in rows]
            np.testing.assert_array_equal(*found)
        assert cache[name].validation.read([0]).ids is not None  # KL to the teacher can be measured
        measured = read_run(small.root / "teacher").intervals[-1].student_ppl[name]
        # Both are float32 means over the same labels, one by whole documents, one by packed rows.
        assert math.exp(cache[name].teacher_cross_entropy) == pytest.approx(measured, rel=1e-4)


def test_a_finished_teacher_needs_a_finished_student(small: world.World, tmp_path: Path) -> None:
    teacher = small.root / "teacher"
    shutil.copytree(small.root / "text", tmp_path / "world" / "text")
    finished = small.model_copy(update={"folder": str(tmp_path / "world"), "teacher": str(teacher)})
    assert world.make(finished) == teacher
    assert world.build_config(finished, tmp_path / "cache", {"kind": "label"}).teacher.model == str(teacher)
    with pytest.raises(click.ClickException, match="student: must be given"):
        world.make_student(finished, 0)


def test_a_derived_document() -> None:
    text = "  one two\n\nthree four  "
    rule = world.Derived(of="docs", prompt_words=2)
    assert world.derive(text, rule) == {"prompt": "  one two", "completion": "\n\nthree four  "}
    words = "a b c d e f g h i j " * 10
    noise = world.derive(words, world.Derived(of="docs", shuffled=1))["text"]
    assert noise != words
    assert sorted(noise) == sorted(words)
    assert world.derive(words, world.Derived(of="docs")) == {"text": words}


def test_study_runs_what_is_missing_and_compares_seed_by_seed(
    small: world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # bench_results/
    (tmp_path / "world.yaml").write_text(yaml.safe_dump(small.model_dump()))
    described = {
        "folder": "runs",
        "world": "world.yaml",
        "caches": {"top8": {"kind": "topk", "top_k": 8}},
        "seeds": 2,
        "control": "even",
        "train": {**TRAINING, "max_steps": 2, "distill_interval": 1, "bf16": False, "report_to": "none"},
        "variants": {
            "even": {"strategy": "uniform"},
            "by size": {"strategy": "proportional", "gamma": 0},
            "by gap": {"strategy": "gap"},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(described, sort_keys=False))

    def run() -> list[str]:
        """Return the output folders of the runs that were trained."""
        trained: list[str] = []

        def train(config: TrainConfig, *, resume: bool) -> None:
            if config.output_dir.startswith("runs/"):  # else a first student's
                trained.append(config.output_dir)
            original(config, resume=resume)

        with pytest.MonkeyPatch.context() as patch:
            original = world.train
            patch.setattr(world, "train", train)
            done = CliRunner().invoke(study.main, ["tiny.yaml"], catch_exceptions=False)
        assert done.exit_code == 0
        assert done.stdout.endswith((tmp_path / "runs" / "results.md").read_text() + "\n")
        return trained

    variants = ("even", "by-size", "by-gap")
    assert run() == [f"runs/{variant}-{seed}" for seed in range(2) for variant in variants]
    before = (tmp_path / "bench_results" / "tiny.json").read_text()
    facts = tmp_path / "runs" / "by-size-1" / "run.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "ended": None}))  # killed before the end
    assert run() == ["runs/by-size-1"]
    found = json.loads((tmp_path / "bench_results" / "tiny.json").read_text())
    assert found["variants"]["by size"]["values"] == json.loads(before)["variants"]["by size"]["values"]

    last = {
        name: [read_run(tmp_path / "runs" / f"{name}-{seed}").intervals[-1] for seed in range(2)]
        for name in ("even", "by-size")
    }
    worst = {name: np.array([max(line.ratio.values()) for line in lines]) for name, lines in last.items()}
    difference = worst["by-size"] - worst["even"]
    assert found["variants"]["by size"]["differences"]["worst ratio"] == {
        "mean": pytest.approx(difference.mean()),
        "standard_error": pytest.approx(difference.std(ddof=1) / math.sqrt(2)),
    }
    kl = [np.mean(list((line.validation_kl or {}).values())) for line in last["by-size"]]
    assert found["variants"]["by size"]["values"]["mean KL"]["mean"] == pytest.approx(np.mean(kl))
    assert (tmp_path / "runs" / "report.html").is_file()
    differences, shares = (
        (tmp_path / "runs" / f"{name}.svg").read_text() for name in ("differences", "shares")
    )
    assert (differences.count(">by size<"), differences.count(">even<")) == (1, 0)
    assert (shares.count(">by gap<"), shares.count(">by size<")) == (1, 0)  # only what follows the student


def test_variants_are_compared_by_what_all_have_measured() -> None:
    """Here the control's cache has no targets for held-out rows, and so no KL."""

    def run(kl: float | None) -> RunLog:
        last = SimpleNamespace(
            step=1,
            ratio={"code": 1.5},
            validation_kl=kl and {"code": kl},
            student_ppl={"code": 3.0},
            teacher_ppl={"code": 2.0},
            rows={"code": 4},
            factor={"code": 1.0},
        )
        log = SimpleNamespace(intervals=[last], domains=["code"], tokens=9, training_seconds=1.0, facts=None)
        return cast(RunLog, log)

    found = tables.figures({"labels": {0: run(None)}, "top 8": {0: run(0.1)}}, "labels")
    assert found["variants"]["top 8"]["values"]["mean KL"]["mean"] == 0.1
    assert found["variants"]["top 8"]["differences"]["mean ratio"]["mean"] == 0
    assert "mean KL" not in found["variants"]["top 8"]["differences"]
    assert "| top 8 | +0.000 | +0.000 |" in tables.markdown(found, "labels")


def test_a_line_of_results_that_a_kill_cut_is_run_again(tmp_path: Path) -> None:
    path, lines = tmp_path / "results.jsonl", [{"kl": 1}, {"kl": 2}]
    for line in lines:
        Results(str(path)).get({"seed": line["kl"]}, line.copy)
    whole = path.read_text()
    path.write_text(whole[:-5])
    results = Results(str(path))
    trained = [results.get({"seed": seed}, lambda: {"kl": 2})["kl"] for seed in (1, 2)]
    assert trained == [1, 2]
    assert path.read_text() == whole


def test_the_second_of_two_processes_leaves_what_the_first_has_made(tmp_path: Path) -> None:
    folder, first, second = (tmp_path / name for name in ("text", "first", "second"))
    for scratch in (first, second):
        scratch.mkdir()
        (scratch / "code.jsonl").write_text(scratch.name)
        world.settle(scratch, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert (folder / "code.jsonl").read_text() == "first"
    with pytest.raises(FileNotFoundError):
        world.settle(tmp_path / "missing", tmp_path / "model")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_of_this_repository_are_valid(path: Path) -> None:
    if path.name.endswith(".world.yaml"):
        described = world.read_world(path)
        for training in (described.teacher_training, described.student_training):
            TrainConfig.model_validate({"cache": "c", "student": "s", "output_dir": "o", **training})
        return
    if "prompt_tokens" in yaml.safe_load(path.read_text("utf-8")):
        rounds = load(path, [], on_policy.Study)
        assert all(rounds.config(arm, 0).max_steps >= arm.rounds for arm in rounds.arms.values())
        return
    if "arms" in yaml.safe_load(path.read_text("utf-8")):
        arms = load(path, [], other_tokenizer.Study)
        assert arms.config(Path("cache"), Path("student"), 0).max_steps == max(arms.lengths)
        return
    if "choices" in yaml.safe_load(path.read_text("utf-8")):
        online = load(path, [], online_kd.Study)
        assert all(
            online.config(choice, 0).gamma
            for name, choice in online.choices.items()
            if name != "labels alone"
        )
        return
    plan = study.Plan(load(path, [], study.Study), path)
    assert all(isinstance(config, BuildConfig) for config in plan.builds())
    runs = list(plan.runs("student-{seed}"))
    assert len({config.output_dir for _, config in runs}) == len(runs)
    assert len(runs) == plan.study.seeds * len(plan.study.variants)


def test_students_of_another_tokenizer(
    small: world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every student begins and ends where it should, and a finished run is not repeated."""
    (tmp_path / "world.yaml").write_text(yaml.safe_dump(small.model_dump()))
    start = {"gamma": 1.0}
    described = {
        "world": "world.yaml",
        "vocab_size": 280,
        "train": {"per_device_train_batch_size": 4, "learning_rate": 0.01, "strategy": "uniform"},
        "lengths": [2, 5],
        "seeds": [0],
        "arms": {
            "own": {"start": "own"},
            "ALM": {"start": "own", **start},
            "mean": {"start": "mean", **start, "frozen": 9},
            "omp": {"start": "omp", **start},
            "teacher": {"start": "teacher", **start},
        },
        "control": "own",
        "output": str(tmp_path / "results.jsonl"),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))

    def run() -> str:
        done = CliRunner().invoke(
            other_tokenizer.main, [str(tmp_path / "study.yaml")], catch_exceptions=False
        )
        assert done.exit_code == 0
        return done.stdout

    first = run()
    assert first.count("seed 0") == 5
    assert first.endswith(run())
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    bits = [{length: np.mean(list(by.values())) for length, by in line["bits"].items()} for line in lines]
    assert bits[0]["0"] == bits[1]["0"]  # own and ALM begin as the same student
    assert all(line["5"] < line["0"] for line in bits)
    assert f"| own | {bits[0]['0']:.3f} | {bits[0]['2']:.3f} | {bits[0]['5']:.3f} |" in first
    assert f"| omp | {bits[3]['0'] - bits[0]['0']:+.3f} |" in first


def test_cost_of_a_teacher_in_the_loop_and_of_a_cache(
    small: world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "STEPS", 2)
    world.make_student(small, 0)
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump(small.model_dump()))
    done = CliRunner().invoke(cost.main, [str(path), "--output", str(tmp_path / "cost.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["online"] > 0
    assert found["no teacher"] > 0
    assert found["student weights"] == found["teacher weights"] == 300 * 16 + 16 * 16 * 7 + 3 * 16


def test_break_even_follows_from_the_cost_of_a_token() -> None:
    found = {"tokenise": 1e-6, "capture": 4e-6, "no teacher": 2e-6, "cache": 3e-6, "online": 7e-6}
    text = cost.markdown({**found, "student weights": 10, "teacher weights": 90})
    assert "| 1 | 1.14 | 1.00 | 1.00 |" in text  # (5 + 3) / 7
    assert "| 10 | 0.50 | 0.33 | 0.34 |" in text  # (5 + 30) / 70; (180 + 600) / 2,400
    assert "Break-even: 1.25 passes" in text  # 5 / (7 - 3)
