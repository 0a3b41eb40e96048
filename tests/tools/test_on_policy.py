"""The study of rounds: who writes when, what carries loss, and what is measured."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import SEQ_LENGTH, MakeConfig

from tools.studies import on_policy
from tools.studies.on_policy import Arm, Study, Texts, World
from tools.studies.online_teacher import all_logits

PROMPT, STEPS, ROWS = 6, 4, 6


@pytest.fixture
def study(
    make_config: MakeConfig,
    teacher_folder: Path,
    student_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Study:
    tokens = np.random.default_rng(0).integers(1, 400, (24, SEQ_LENGTH), np.int32)
    texts = Texts(tokens, np.repeat(np.arange(3), 8))
    monkeypatch.setattr(Texts, "of", lambda *_: texts)
    return Study.model_validate(
        {
            "cache": make_config().cache,
            "teacher": str(teacher_folder),
            "student": str(student_folder),
            "prompt_tokens": PROMPT,
            "samples": 1,
            "train": {
                "strategy": "uniform",
                "max_steps": STEPS,
                "per_device_train_batch_size": ROWS,
                "learning_rate": 0.01,
                "warmup_steps": 0,
                "gamma": 0,
                "cross_entropy_weight": 0,
            },
            "arms": {
                "given": {"rounds": 0, "target": {"top_k": 8}, "train": {"gamma": 1}},
                "rounds": {"rounds": 2, "train": {"policy_gradient_weight": 1}},
            },
            "control": "given",
            "seeds": [0],
            "output": str(tmp_path / "lines.jsonl"),
        }
    )


def test_loss_is_behind_the_beginning_up_to_the_first_end(study: Study) -> None:
    world = World(study)
    tokens = np.full((2, SEQ_LENGTH), 7, np.int32)
    tokens[0, [2, PROMPT + 3, PROMPT + 5]] = world.end
    batch = world.batch(Texts(tokens, np.array([0, 2])))
    row = batch.label_positions // SEQ_LENGTH
    assert (batch.label_positions[row == 0] + 1).tolist() == [*range(PROMPT, PROMPT + 4)]
    assert (batch.label_positions[row == 1] + 1 - SEQ_LENGTH).tolist() == [*range(PROMPT, SEQ_LENGTH)]
    assert batch.text_tokens == PROMPT + 4 + SEQ_LENGTH


def test_the_newest_student_writes_a_whole_round(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its log-probabilities are those of the moment, rounded as in a cache."""
    world, arm = World(study), study.arms["rounds"]
    config = study.config(arm, 0)
    student = on_policy.make_student(world, config)
    asked, continued = list[int](), World.continued

    def counting(world: World, student: on_policy.Student, texts: Texts) -> Texts:
        asked.append(len(texts.domain))
        written = continued(world, student, texts)
        np.testing.assert_array_equal(written.tokens[:, :PROMPT], texts.tokens[:, :PROMPT])
        return written

    monkeypatch.setattr(World, "continued", counting)
    is_current = []
    for batch in on_policy.batches(world, config, arm, student):
        with torch.no_grad():
            now = on_policy.of_labels(all_logits(student, batch), batch)
            student.head.weight.mul_(1.1)  # a step
        assert batch.writer_logprob is not None
        is_current.append(bool((now - batch.writer_logprob).abs().max() < 1 / 256))
    assert asked == [ROWS * STEPS // 2] * 2
    assert is_current == [True, False, True, False]
    given = list(on_policy.batches(world, config, Arm(rounds=0), student))
    assert len(asked) == 2
    assert [batch.tokens[:, :PROMPT].tolist() for batch in given[:1]] == [
        batch.tokens[:, :PROMPT].tolist()
        for batch in list(on_policy.batches(world, config, arm, student))[:1]
    ]


def test_a_student_that_is_its_teacher_has_no_divergence(study: Study) -> None:
    world = World(study)
    found = on_policy.measure(world, world.teacher, 2)
    assert found["own"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["given"]["mean"] == pytest.approx(0, abs=1e-6)


def test_every_run_is_a_line_and_is_run_once(study: Study) -> None:
    lines = on_policy.run(study)
    assert [line["name"] for line in lines] == ["given", "rounds"]
    assert all(line["own"]["mean"] > 0 and line["given"]["mean"] > 0 for line in lines)
    before = Path(study.output).read_text()
    assert on_policy.run(study) == lines
    assert Path(study.output).read_text() == before
    on_policy.show(study, lines)
