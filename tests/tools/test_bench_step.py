"""The benchmark of steps: its sides train on the same loss, and take the steps that were asked for."""

import json
import shutil
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from pathlib import Path
from threading import Thread

import pytest

from tools.bench import step

ROWS, STEPS = 40, 10  # all training rows in each step; a line of metrics


def test_trainer_and_ours_train_on_the_same_loss(
    tmp_path: Path, cache_folder: Path, student_folder: Path
) -> None:
    """On packed rows: with other labels, or documents that see each other, the losses would differ."""
    shutil.copytree(cache_folder, tmp_path / "cache")
    shutil.copytree(student_folder, tmp_path / "student")
    case, calls = step.Case(tmp_path, ROWS, False, STEPS), list[str]()
    loss = step.trainer(case, lambda: calls.append("Trainer"))
    step.ours(case, lambda: calls.append("ours"), gamma=0.0)
    line = json.loads((tmp_path / "run-0.0" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert calls == ["Trainer"] * STEPS + ["ours"] * STEPS
    assert line["step"] == STEPS
    assert loss == pytest.approx(line["cross_entropy"], abs=1e-4)


def test_a_side_is_held_until_it_is_asked_for_steps() -> None:
    pipe, end = Pipe()
    turn, done = step.Turn(end), list[int]()

    def loop() -> None:
        for index in range(7):
            turn()
            done.append(index)

    thread = Thread(target=loop, daemon=True)
    thread.start()
    for steps in (3, 4):
        pipe.recv()
        assert len(done) == (0 if steps == 3 else 3)
        pipe.send(steps)
    thread.join(10)
    assert done == [*range(7)]


def loop(case: step.Case, turn: Callable[[], None]) -> None:
    """Train as a side does, which ends after its last step."""
    for _ in range(case.steps):
        turn()


@pytest.mark.filterwarnings("ignore:.*multi-threaded")  # Python 3.12 warns of fork
def test_every_turn_of_every_side_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SIDES", {step.TRAINER: loop, step.OURS: loop})
    monkeypatch.setattr(step, "get_context", lambda _: get_context("fork"))  # with these sides
    turns = step.measure(step.Case(tmp_path, 1, False), rounds=2, steps=3)
    assert [len(side) for side in turns.values()] == [2, 2]


def test_ratios_are_those_of_the_same_turn() -> None:
    """A machine that is slower in one turn is so for both."""
    sides = {
        step.TRAINER: [step.Measured(2.0, 1.0, 10), step.Measured(8.0, 4.0, 10), step.Measured(2.0, 1.0, 20)],
        step.OURS: [step.Measured(1.0, 0.5, 5), step.Measured(4.0, 2.0, 10), step.Measured(1.0, 0.5, 5)],
    }
    ours = step.summary(sides, steps=2)[step.OURS]
    assert (ours["time_ratio"], ours["cpu_time_ratio"], ours["memory_ratio"]) == (0.5, 0.5, 0.5)
    assert ours["seconds"] == 0.5
