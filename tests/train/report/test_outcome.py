"""The end of a run in the terminal: a table, a verdict, and what to do next; and a bar meanwhile."""

import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.training import MakeConfig, read_lines

from ddk_cache.util.progress import Update, shown_by
from ddk_train.cli import train as command
from ddk_train.config import TrainConfig
from ddk_train.report.outcome import verdict
from ddk_train.report.run_files import Interval, RunLog
from ddk_train.train import train


def run_log(*student: dict[str, float], **changes: Any) -> RunLog:
    """Return a finished run with these perplexities, of a teacher with 10 everywhere."""
    lines = [
        Interval(
            interval=index,
            step=10 * index,
            factor=dict.fromkeys(perplexities, 1 / len(perplexities)),
            student_ppl=perplexities,
            teacher_ppl=dict.fromkeys(perplexities, 10.0),
            rows=dict.fromkeys(perplexities, int(index + 1 < len(student))),
            **changes,
        )
        for index, perplexities in enumerate(student)
    ]
    config = TrainConfig(cache="c", student="s", output_dir="run")
    return RunLog(Path("run"), config, [], lines, [], None, {})


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (run_log(), "No measurement after the first step yet."),
        (
            run_log({"a": 12.0}),
            "No step was needed: every ratio was at or below stop_ratio at the start.",
        ),
        (
            run_log({"a": 40.0, "b": 20.0}, {"a": 20.0, "b": 15.0}),
            "The student closed 46% of the gap to its teacher, mean of 2 domains; a is furthest behind, at "
            "2.00 times the teacher's perplexity.",
        ),
        (
            run_log({"a": 20.0}, {"a": 40.0}),
            "The student is further from its teacher than before: try a lower learning_rate; a is furthest "
            "behind, at 4.00 times the teacher's perplexity.",
        ),
        (
            run_log({"a": 9.0, "b": 20.0}, {"a": 9.0, "b": 11.0}),
            "Student / teacher perplexity went from 1.45 to 1.00, mean of 2 domains; b is furthest behind, "
            "at 1.10 times the teacher's perplexity.",
        ),
        (
            run_log({"a": 20.0}, {"a": 10.0}, epochs={"a": 31.4}),
            "The student closed 100% of the gap to its teacher; no domain is behind the teacher. "
            "Read more than 20 times: a (31).",
        ),
    ],
)
def test_the_verdict(run: RunLog, text: str) -> None:
    assert verdict(run) == text


def test_the_command_ends_with_a_table_and_the_next_commands(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    done = CliRunner().invoke(command, [str(path)], catch_exceptions=False)
    run = tmp_path / "run"
    first, *_, last = read_lines(run, "discrepancy")
    title, header, *rows = done.stdout.splitlines()
    assert title == "perplexity on held-out text:"
    assert header.split() == [
        "domain",
        "before",
        "after",
        "teacher",
        "ratio",
        *["gap", "closed", "bits", "per", "byte"],
    ]
    for row, name in zip(rows, first["factor"], strict=False):
        shown = [first["student_ppl"][name], last["student_ppl"][name], first["teacher_ppl"][name]]
        assert row.split()[:4] == [name, *(f"{value:,.2f}" for value in shown)]
        before, after = (line["student_bits_per_byte"][name] for line in (first, last))
        assert row.endswith(f"{before:.3f} -> {after:.3f}")
    assert rows[3].endswith("no domain is behind the teacher.")
    assert rows[4:] == [f"next: ddk-cache report {run}", f"next: vllm serve {run}"]
    assert "train:" not in done.stderr  # the bar is for terminals


def test_progress_is_that_of_the_steps(make_config: MakeConfig) -> None:
    updates: list[Update] = []
    with shown_by(updates.append):
        train(make_config(save_steps=3))
    assert (updates[-1].name, updates[-1].unit, updates[-1].state) == ("train", "steps", "finished")
    assert [update.done for update in updates if update.state == "running"] == list(range(11))
    assert {update.total for update in updates} == {10}


def test_lines_stay_whole_beside_a_bar(make_config: MakeConfig, tmp_path: Path) -> None:
    """In a terminal, lines of the log appear above the bar."""
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    program = "from ddk_cache.cli.main import main; main()"
    screen = in_terminal("env", "COLUMNS=160", sys.executable, "-c", program, "train", str(path))
    assert "step 10/10  loss " in screen
    assert "train " in screen
    assert "100%" in screen


def in_terminal(*arguments: str) -> str:
    """Run a program in a terminal and return what it writes there."""
    written: list[bytes] = []

    def read(descriptor: int) -> bytes:
        written.append(os.read(descriptor, 1 << 16))
        return written[-1]

    pty.spawn(arguments, read)
    return b"".join(written).decode()
