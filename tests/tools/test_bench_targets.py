"""The benchmark of targets: its gradients by hand, and a run on a tiny teacher."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.models import make_model

from ddk_build.teacher.targets import sparse_target
from ddk_cache.format.layout import Target
from tools import real_data
from tools.bench import targets as bench_targets
from tools.bench.shared import real_logits
from tools.bench.targets import Entries, Text, angle, angles, full, sparse

VOCAB, WIDTH, POSITIONS = 60, 8, 512


@pytest.fixture
def text() -> Text:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (POSITIONS,))
    places = torch.arange(POSITIONS)
    return Text([], places, places, labels, torch.randn(POSITIONS, WIDTH), torch.randn(VOCAB, WIDTH))


@pytest.fixture
def logits(text: Text) -> torch.Tensor:
    """Return the student's logits with noise."""
    return text.hidden @ text.head.T + torch.randn(POSITIONS, VOCAB)


def test_the_full_gradient_is_that_of_the_whole_vocabulary_as_entries(
    text: Text, logits: torch.Tensor
) -> None:
    ids = torch.arange(VOCAB).expand(POSITIONS, -1)
    everything = Entries(ids, logits.log_softmax(-1), torch.full((POSITIONS,), -torch.inf))
    found, exact = sparse(text, everything).minus(sparse(text, None)), full(text, logits)
    difference = (text.hidden @ text.head.T).softmax(-1) - logits.softmax(-1)
    torch.testing.assert_close(exact.hidden, difference @ text.head / POSITIONS, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(exact.head, difference.T @ text.hidden / POSITIONS, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.hidden, exact.hidden, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(found.head, exact.head, atol=1e-6, rtol=1e-4)
    assert (
        max(value for value in angles(found, exact).values() if value) < 1e-3
    )  # degrees; rounding makes 2e-4


def test_angle() -> None:
    one, other = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [-3.0, 0.0]])
    assert angle(one, other) == pytest.approx((45 + 90) / 2)


def test_draws_are_shares_of_distinct_tokens(logits: torch.Tensor) -> None:
    ids, shares = bench_targets.draw(logits.softmax(-1), 200)
    torch.testing.assert_close(shares.exp().sum(-1), torch.ones(POSITIONS))
    assert torch.equal(ids < 0, shares == -torch.inf)
    assert all(len(row[row >= 0].unique()) == (row >= 0).sum() for row in ids)
    mean = torch.zeros(POSITIONS, VOCAB + 1).scatter_(1, ids % (VOCAB + 1), shares.exp())[:, :VOCAB].mean(0)
    # At one position a share of 200 draws is off by up to 1/200; over all of them 7e-4 is left.
    torch.testing.assert_close(mean, logits.softmax(-1).mean(0), atol=2e-3, rtol=0)


def test_targets_to_compare_with_sum_to_one(text: Text, logits: torch.Tensor) -> None:
    before = logits.clone()
    for entries in bench_targets.not_stored(text, logits).values():
        total = entries.logprobs.exp().sum(-1) + entries.tail_logprob.exp()
        torch.testing.assert_close(total, torch.ones(POSITIONS))
    assert torch.equal(logits, before)


def test_noise_averages_out_and_bias_stays(text: Text, logits: torch.Tensor) -> None:
    exact, cross_entropy = full(text, logits), sparse(text, None)

    def ratio(target: Target) -> float:
        offsets = torch.rand(POSITIONS, dtype=torch.float64)
        entries = Entries(*sparse_target(logits, text.labels, target, offsets)[:3])
        found = angles(sparse(text, entries, "drop").minus(cross_entropy), exact)
        assert found["batch"] is not None
        assert found["token"] is not None
        return found["batch"] / found["token"]

    assert ratio(Target(kind="sampled", samples=8)) < 1 < ratio(Target(top_k=8))


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[real_logits.Arrays]:
    """Yield what ``load`` returns, for a tiny teacher on random tokens in short rows."""
    folder = make_model(tmp_path_factory.mktemp("teacher"), seed=1, layers=21, hidden=32)
    with pytest.MonkeyPatch.context() as patch:
        for module in (real_logits, bench_targets):
            patch.setattr(module, "SEQ_LENGTH", 128)
        for module in (real_logits, bench_targets):
            patch.setattr(module, "teacher_folder", lambda: folder)
        rows = (real_logits.CALIBRATION + real_logits.MEASURED) * len(real_data.DOMAINS)
        tokens = np.random.default_rng(0).integers(0, 400, (rows, 128), np.int32)
        mask = np.ones_like(tokens, np.bool_)
        mask[:, -1] = False
        given = {"tokens": tokens, "segments": np.ones_like(tokens, np.uint16), "loss_mask": mask}
        yield given | real_logits._capture(given)


def run(tool: Any, captured: real_logits.Arrays, output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tool, "load", lambda: captured)
    done = CliRunner().invoke(tool.main, ["--tokens", "256", "--output", str(output)])
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text())


def test_targets_on_a_tiny_teacher(
    tmp_path: Path, captured: real_logits.Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(bench_targets, captured, tmp_path / "new" / "targets.json", monkeypatch)["targets"]
    assert len(found) == 15
    for name, figures in found.items():
        assert 0 < figures["head"] < 90, name
        assert ("bytes" in figures) == ("independent" not in name and name != "top 100"), name
    assert found["top 64, tail: bucket"]["token"] < found["top 12, tail: bucket"]["token"]
    assert found["top 12, tail: bucket"]["bytes"] < found["top 64, tail: bucket"]["bytes"]
    assert found["50 systematic draws"]["token"] < found["50 independent draws"]["token"]
