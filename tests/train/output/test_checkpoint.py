"""A run that is killed and resumed equals an uninterrupted one, bit for bit; and what is refused."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.processes import train_until
from helpers.training import ROWS, make_cache, plain_perplexity, read_lines, stored_tensors, untimed_lines
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ddk_cache
from ddk_cache.errors import ConfigError
from ddk_cache.format import layout
from ddk_train.errors import TrainingError
from ddk_train.loop.schedule import learning_rate
from ddk_train.loop.setup import prepare
from ddk_train.output.checkpoint import checkpoints, load, trained
from ddk_train.output.sums import file_digest, write_sums
from ddk_train.report.run_files import read_run
from ddk_train.student.distributed import Ranks
from ddk_train.student.identity import student_content
from ddk_train.train import train


def assert_same_run(run: Path, other: Path, last: int) -> None:
    """Compare metrics, draws, weights, optimizer and random states, to the last bit."""
    assert untimed_lines(run, "metrics") == untimed_lines(other, "metrics")
    assert untimed_lines(run, "discrepancy") == untimed_lines(other, "discrepancy")
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}
    one, two = (
        load_file(folder / "model.safetensors") | stored_tensors(folder, last) for folder in (run, other)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("strategy", "bf16", "behind", "moments"),
    [
        ("ddk", False, False, ["step:2", "step:7", "step:10", "save:1", "save:2"]),
        ("ddk", True, False, ["step:7", "rotate:1", "rotate:2"]),
        ("auto", True, True, ["step:7", "step:10", "rotate:1"]),
    ],
)
def test_killed_runs_resume_exactly(
    make_config: Any, tmp_path: Path, strategy: str, bf16: bool, behind: bool, moments: list[str]
) -> None:
    # Dropout makes the random state count; accumulation and a save amid a line of metrics, the rest.
    student = tmp_path / "student"
    config = make_config(
        strategy=strategy,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        distill_interval=3,
        save_total_limit=1,
        bf16=bf16,
        save_behind=behind,
    )
    add_dropout(Path(config.student), student)
    config = config.model_copy(update={"student": str(student), "output_dir": str(tmp_path / "whole")})
    train(config)

    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for moment in moments:
        folder = tmp_path / moment.replace(":", "-")
        assert train_until(str(path), folder, moment) == -signal.SIGKILL
        assert not (folder / "model.safetensors").exists()
        train(config.model_copy(update={"output_dir": str(folder)}), resume=True)
        assert_same_run(folder, tmp_path / "whole", last=10)


def test_eight_bit_states_resume_exactly(make_config: Any, tmp_path: Path) -> None:
    config = make_config(optimizer="adamw_8bit")
    run, whole = Path(config.output_dir), tmp_path / "whole"
    train(config)
    states = stored_tensors(run, 10)
    assert any(
        tensor.dtype == torch.uint8 for name, tensor in states.items() if name.startswith("optimizer/")
    )
    shutil.copytree(run, whole)
    shutil.rmtree(run / "checkpoint-10")
    (run / "model.safetensors").unlink()
    train(config, resume=True)
    assert_same_run(run, whole, last=10)

    plain = make_config(output_dir=str(tmp_path / "plain"))
    train(plain)
    ends = [read_lines(folder, "metrics")[-1]["loss"] for folder in (run, tmp_path / "plain")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_eight_bits_without_their_package(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ConfigError, match=r"^optimizer: adamw_8bit needs the package bitsandbytes: pip install bitsandbytes$"
    ):
        train(make_config(optimizer="adamw_8bit"))


def add_dropout(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | {"attention_dropout": 0.2}))


def test_resuming_a_finished_run_changes_nothing(make_config: Any, tmp_path: Path) -> None:
    config = make_config()
    train(config)
    train(make_config(output_dir=str(tmp_path / "other")))
    (tmp_path / "run" / "model.safetensors").unlink()
    train(config, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "other", last=10)


def test_the_facts_are_those_of_the_run_that_goes_on(
    make_config: Any, student_folder: Path, tmp_path: Path
) -> None:
    run = train(make_config())
    for path in checkpoints(run):  # as if it was killed before the first one
        shutil.rmtree(path)
    other = make_config(cache=str(make_cache(tmp_path / "other", student_folder, domains={"poems": 30})))
    train(other, resume=True)
    written = json.loads((run / "run.json").read_text())
    assert (written["train_rows"], written["student_step"]) == ({"poems": 30}, 10)
    shutil.rmtree(run / "checkpoint-10")
    old = {"began": "2026-01-01T00:00:00Z", "machine": "another", "processes": 2, "versions": {}}
    (run / "run.json").write_text(json.dumps(written | old))
    train(other, resume=True)
    resumed = json.loads((run / "run.json").read_text())
    assert resumed | {"ended": None} == written | {"began": old["began"], "ended": None}


def test_a_checkpoint_of_a_cpu_fits_a_gpu(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no random state of one. Here is no GPU: tensors stay where they are."""
    config = make_config(max_steps=5)
    path = train(config) / "checkpoint-5"
    setup = prepare(config, Ranks(0, 1, torch.device("cpu")), resume=False)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    load(path, setup.student, setup.optimizer, Ranks(0, 1, torch.device("cuda:0")))
    stored = stored_tensors(path.parent, 5)
    for name, weight in trained(setup.student):
        assert torch.equal(weight, stored[f"weight/{name}"])


def test_files_are_as_long_as_a_checkpoint_says(make_config: Any, tmp_path: Path) -> None:
    """Also where nothing was written between the resume, which cut them, and the next checkpoint."""
    train(make_config())
    run = tmp_path / "run"
    before = untimed_lines(run, "metrics")
    shutil.rmtree(run / "checkpoint-10")
    rarely = make_config(logging_steps=100, save_steps=1, save_total_limit=9)
    train(rarely, resume=True)
    for step in (7, 8, 9, 10):
        shutil.rmtree(run / f"checkpoint-{step}")
    train(make_config(), resume=True)
    lines = untimed_lines(run, "metrics")
    assert [line["step"] for line in lines] == [3, 9, 10]  # the resumed run did not log step 6
    assert (lines[0], lines[-1]) == (before[0], before[-1])


def test_a_finished_run_can_be_extended(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new interval begins, no row is skipped or repeated, and a killed extension resumes exactly."""
    caplog.set_level("INFO", "ddk_train")
    keys: dict[str, Any] = {"strategy": "uniform", "share_of": "rows", "save_steps": 2}
    train(make_config(**keys))
    finished = {name: untimed_lines(tmp_path / "run", name) for name in ("metrics", "discrepancy")}
    longer = make_config(**keys | {"max_steps": 15})
    train(longer, resume=True)
    assert "max_steps was 10 and is 15: from here on the learning rate and all schedules are " in caplog.text
    run = tmp_path / "run"
    metrics, discrepancy = (untimed_lines(run, name) for name in ("metrics", "discrepancy"))
    assert metrics[: len(finished["metrics"])] == finished["metrics"]
    assert [line["step"] for line in metrics] == [3, 6, 9, 10, 12, 15]
    assert metrics[-2]["learning_rate"] == learning_rate(12, longer)
    assert discrepancy[:3] == finished["discrepancy"][:3]
    assert [(line["interval"], line["step"]) for line in discrepancy[3:]] == [(3, 10), (4, 14), (5, 15)]
    assert discrepancy[3]["student_ppl"] == finished["discrepancy"][3]["student_ppl"]
    assert sum(sum(line["rows"].values()) for line in discrepancy) == 15 * 4
    assert discrepancy[-1]["epochs"]["law"] == sum(line["rows"]["law"] for line in discrepancy) / ROWS["law"]
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 15
    whole = shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(run / "checkpoint-15")
    train(longer, resume=True)
    assert_same_run(run, whole, last=15)


def test_old_checkpoints_go(make_config: Any, tmp_path: Path) -> None:
    train(make_config(save_steps=2, save_total_limit=3))
    kept = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]


def test_a_folder_with_a_run_is_not_overwritten(make_config: Any) -> None:
    config = make_config(max_steps=1)
    train(config)
    with pytest.raises(ConfigError, match=r"output_dir: .* already has a run: add --resume"):
        train(config)


def test_another_configuration_is_refused_with_all_differences(make_config: Any) -> None:
    train(make_config(max_steps=2))
    changed = make_config(max_steps=1, lora={"r": 4}, gradient_accumulation_steps=2, logging_steps=1)
    with pytest.raises(ConfigError) as caught:
        train(changed, resume=True)
    assert (
        "belongs to another run: max_steps was 2 and is 1; lora was None and is absent; "
        "rows in a step was 4 and is 8; lora.r was absent and is 4; lora.alpha was absent and is 32; "
        "lora.dropout was absent and is 0.0; lora.target_modules was absent and is 'all-linear'; "
        "lora.merge was absent and is False; lora.quantize was absent and is None"
    ) in str(caught.value)


@pytest.mark.parametrize("kind", ["frozen weights of adapters", "rope_theta of all weights"])
def test_another_student_in_the_same_folder_is_refused(
    make_config: Any, student_folder: Path, tmp_path: Path, kind: str
) -> None:
    """A checkpoint does not hold frozen weights, nor the model's settings."""
    student = shutil.copytree(student_folder, tmp_path / "student")
    adapters = {"r": 4} if kind.startswith("frozen") else None
    config = make_config(max_steps=2, save_steps=1, student=str(student), lora=adapters)
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    if adapters:
        weights = load_file(student / "model.safetensors")
        save_file({name: 2 * weight for name, weight in weights.items()}, student / "model.safetensors")
    else:
        settings = json.loads((student / "config.json").read_text())
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
        (student / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"another run: files of the student was 'sha256:[0-9a-f]{64}' and"):
        train(config, resume=True)


def test_a_student_of_a_hub_is_known_by_its_commit(
    make_config: Any, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--a--student"
    shutil.copytree(student_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert student_content(make_config(student="a/student")) == f"commit:{commit}"
    assert student_content(make_config(student="a/missing")) is None


def test_a_cache_is_known_by_what_it_holds(
    make_config: Any,
    cache_folder: Path,
    student_folder: Path,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    train(make_config(max_steps=2))

    def problem(cache: Path) -> str:
        with pytest.raises(ConfigError, match="belongs to another run") as caught:
            train(make_config(max_steps=2, cache=str(cache)), resume=True)
        return str(caught.value)

    target = make_cache(tmp_path / "target", teacher_folder, layout.Target(top_k=4))
    assert "; ".join(["cache.target.top_k was 8 and is 4", "codebook of code was"]) in problem(target)
    # The same settings and other answers.
    teacher = make_cache(tmp_path / "teacher", student_folder)
    for key in ("teacher_cross_entropy", "codebook"):
        assert all(f"{key} of {name} was" in problem(teacher) for name in ROWS)
    order = make_cache(tmp_path / "order", teacher_folder, domains=dict(reversed(ROWS.items())))
    names = list(ROWS)
    assert f"domains was {names} and is {names[::-1]}" in problem(order)

    moved = shutil.copytree(cache_folder, tmp_path / "moved")
    train(make_config(max_steps=2, cache=str(moved)), resume=True)


def test_the_same_rows_in_a_step_may_be_split_otherwise(make_config: Any, tmp_path: Path) -> None:
    train(make_config())
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoint-10")
    whole = untimed_lines(run, "metrics")
    train(make_config(per_device_train_batch_size=2, gradient_accumulation_steps=2), resume=True)
    assert [line["tokens"] for line in untimed_lines(run, "metrics")] == [line["tokens"] for line in whole]
    for line, expected in zip(untimed_lines(run, "metrics"), whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_checkpoint_written_in_the_background_is_that_of_its_step(make_config: Any, tmp_path: Path) -> None:
    config = make_config(save_steps=1, save_total_limit=20)
    train(config)
    behind = config.model_copy(update={"output_dir": str(tmp_path / "behind"), "save_behind": True})
    train(behind)
    for step in range(1, 11):
        one, two = (stored_tensors(tmp_path / name, step) for name in ("run", "behind"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    train(config.model_copy(update={"save_behind": True}), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "behind", last=10)


@pytest.mark.parametrize("behind", [False, True])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    def full(*args: Any, **kwargs: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
    with pytest.raises(TrainingError, match=r"checkpoint-5: cannot be written: .*No space left on device"):
        train(make_config(save_behind=behind))


def test_the_best_student_is_kept_and_found_again(
    make_config: Any, cache_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate that spoils the student in the end; a killed run keeps the same one."""
    caplog.set_level("INFO", "ddk_train")
    keys = {"learning_rate": 0.5, "min_learning_rate": 0.5, "warmup_steps": 8, "sample_tokens": 0}
    saved = {"save_steps": 2, "save_total_limit": 9}
    config = make_config(keep_best=True, max_steps=12, distill_interval=2, **saved, **keys)
    run = train(config)
    lines = read_lines(run, "discrepancy")
    losses = [sum(np.log(list(line["student_ppl"].values()))) for line in lines]
    best = 1 + int(np.argmin(losses[1:]))
    assert losses[best] + 0.1 < losses[-1], "the last student is not the best"
    step = lines[best]["step"]
    assert f"the student is that of step {step}, the best on held-out text" in caplog.text
    assert [path.name for path in run.glob("best-*")] == [f"best-{step}"]
    student, cache = AutoModelForCausalLM.from_pretrained(run), ddk_cache.open_cache(str(cache_folder))
    for name in ROWS:
        perplexity = plain_perplexity(student, cache[name].validation)
        assert perplexity == pytest.approx(lines[best]["student_ppl"][name], rel=1e-3)
    assert read_run(run).kept.step == step
    assert f"{lines[best]['student_ppl']['law']:.2f}" in (run / "README.md").read_text()

    whole = shutil.copytree(run, tmp_path / "whole")
    for path in checkpoints(run)[1:]:  # back to step 2, with and without what is known from later steps
        shutil.rmtree(path)
    left = shutil.copytree(run / f"best-{step}", run / "best-1")  # killed while it removed one
    (left / "state.json").write_text("{}")
    tensors = next(left.glob("*.safetensors")).name
    write_sums(left, {name: file_digest(left / name) for name in (tensors, "state.json")})
    train(config, resume=True)
    assert_same_run(run, whole, last=12)
    assert [path.name for path in run.glob("best-*")] == [f"best-{step}"]
    for path in [*checkpoints(run)[1:], *run.glob("best-*")]:
        shutil.rmtree(path)
    train(config, resume=True)
    assert_same_run(run, whole, last=12)

    (run / f"best-{step}" / "state.json").write_text("{}")
    shutil.rmtree(run / "checkpoint-12")
    train(config, resume=True)
    assert f"damaged: best-{step}: state.json: is damaged: not what was written; removed" in caplog.text
    assert [path.name for path in run.glob("best-*")] == ["best-12"]  # the only one measured since then
    assert read_run(run).kept.step == 12
    assert f"{lines[-1]['student_ppl']['law']:.2f}" in (run / "README.md").read_text()
