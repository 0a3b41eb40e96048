"""docs/quickstart.md is run from its first command to its last, with tiny models and short rows."""

import shlex
from pathlib import Path

import pytest
from helpers.commands import Run
from helpers.pages import steps

PAGE = Path(__file__).parents[3] / "docs" / "quickstart.md"
# What the files that ``init`` writes say, and what a few seconds on a CPU take instead.
SMALL = {
    "build.yaml": {
        "engine: vllm": "engine: transformers",
        "dtype: bfloat16": "dtype: float32",
        "seq_length: 1024": "seq_length: 128",
        "validation_rows: 50": "validation_rows: 4",
        "max_tokens: 10_000_000": "max_tokens: 6_000",
    },
    "train.yaml": {
        "distill_interval: 50": "distill_interval: 2",
        "max_steps: 1_000": "max_steps: 3",
        "per_device_train_batch_size: 8": "per_device_train_batch_size: 2",
        "bf16: true": "bf16: false",
    },
}
NAMES = {"doctor", "init", "build", "estimate", "info", "verify", "train", "report"}
NOT_RUN = {"ddk-cache init --from NAME": "the files are there; test_first_hour.py takes every recipe"}


def test_every_command_of_the_quickstart_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, teacher_folder: Path, student_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    models = {"Qwen/Qwen2.5-1.5B": str(teacher_folder), "Qwen/Qwen2.5-0.5B": str(student_folder)}
    done = []
    for python, text in steps(PAGE):
        if python:
            exec(text, {})
            continue
        done.append(text)
        if text in NOT_RUN:
            continue
        words = shlex.split(text)[1:]
        said = run(*words)
        assert said.code == 0, f"{text}\n{said.err}"
        if words[0] == "init":
            for name, changes in SMALL.items():
                shrink(tmp_path / name, changes | models)
    assert set(NOT_RUN) < set(done)
    assert "ddk-cache train train.yaml --resume" in done
    assert {text.split()[1] for text in done} == NAMES
    assert (tmp_path / "runs" / "start-0.5b" / "report.html").exists()


def shrink(path: Path, changes: dict[str, str]) -> None:
    text = path.read_text("utf-8")
    for before, after in changes.items():
        assert before in text or before.startswith("Qwen"), f"{path.name}: {before}"
        text = text.replace(before, after)
    path.write_text(text, "utf-8")
