"""The student as a draft model, and tasks of lm-evaluation-harness, by tools/evaluate.py."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.models import make_model
from helpers.training import make_cache

from ddk_cache.errors import ConfigError
from tools import evaluate as evaluate_tool


def test_acceptance_is_the_mass_that_two_distributions_share() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.3, 0.6]])
    torch.testing.assert_close(evaluate_tool.acceptance(p.log(), q.log()), torch.tensor([0.6]))
    torch.testing.assert_close(evaluate_tool.acceptance(p.log() + 3, p.log()), torch.tensor([1.0]))
    padded = torch.tensor([[0.4, 0.3, 0.2, 0.1]])  # a wider vocabulary on one side
    torch.testing.assert_close(evaluate_tool.acceptance(padded.log(), q.log()), torch.tensor([0.6]))
    torch.testing.assert_close(evaluate_tool.acceptance(q.log(), padded.log()), torch.tensor([0.6]))


def test_acceptance_is_how_often_speculative_sampling_keeps_a_draft() -> None:
    random = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 30, generator=random) * 2
    p, q = teacher.softmax(-1)[0], student.softmax(-1)[0]
    drafts = torch.multinomial(q, 40_000, replacement=True, generator=random)
    kept = torch.rand(40_000, generator=random) < p[drafts] / q[drafts]
    expected = evaluate_tool.acceptance(teacher, student).item()
    assert float(kept.float().mean()) == pytest.approx(expected, abs=0.01)  # 4 standard errors of 40,000


def test_acceptance_by_domain_of_a_cache(teacher_folder: Path, student_folder: Path, tmp_path: Path) -> None:
    cache_folder = make_cache(tmp_path / "cache", teacher_folder)
    output = tmp_path / "figures" / "acceptance.json"
    arguments = [
        "--output",
        output,
        "acceptance",
        cache_folder,
        teacher_folder,
        student_folder,
        teacher_folder,
    ]
    result = CliRunner().invoke(evaluate_tool.main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    student, itself = json.loads(output.read_text()).values()
    assert list(student) == ["code", "prose", "law"]
    for name in student:
        assert itself[name]["acceptance"] == pytest.approx(1)
        assert 0 < student[name]["acceptance"] < 0.9
        assert 0 < student[name]["stderr"] < 0.1
        assert student[name]["labels"] == itself[name]["labels"] > 50


HARNESS = """
import json, sys
from pathlib import Path

given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if given["--tasks"] == "differences":
    raise SystemExit("no task is named differences")
metrics = {"acc,none": 0.25, "acc_stderr,none": 0.125, "alias": given["--model_args"], "sample_len": 4}
folder = Path(given["--output_path"], "model")
folder.mkdir()
(folder / "results_2026.json").write_text(json.dumps({"results": {given["--tasks"]: metrics}}))
print(sys.argv[1], given["--model"], given["--limit"])
"""


def test_what_the_harness_writes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stand-in with the command line and the file of results that lm-eval 0.4.13 has."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text(HARNESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = evaluate_tool.run_tasks(["a/teacher", "a/student"], "sums", ["--limit", "4"])
    figures = {"acc,none": 0.25, "acc_stderr,none": 0.125, "sample_len": 4}
    assert found == {"a/teacher": {"sums": figures}, "a/student": {"sums": figures}}
    evaluate_tool.show(found)
    said = capfd.readouterr()
    assert said.err.splitlines() == ["run hf 4"] * 2
    assert "0.2500 ± 0.1250" in said.out
    with pytest.raises(ConfigError, match="a/teacher: no task is named differences"):
        evaluate_tool.run_tasks(["a/teacher"], "differences", ["--limit", "4"])


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    """By the harness itself."""
    if not find_spec("lm_eval"):
        pytest.skip("lm-eval is not installed")
    documents = tmp_path / "documents.jsonl"
    documents.write_text(
        "".join(
            json.dumps({"question": f"{n} and 1:", "choices": [f" {n}", f" {n + 1}"], "answer": 1}) + "\n"
            for n in range(6)
        )
    )
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {documents}}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    model = str(make_model(tmp_path / "student"))
    more = ["--include_path", str(tmp_path), "--limit", "4", "--device", "cpu"]
    found = evaluate_tool.run_tasks([model], "sums", more)
    assert found[model]["sums"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    evaluate_tool.show(found)
