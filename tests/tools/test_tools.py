"""The tools that make the demo's input, and what it says of its outcome."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from helpers.models import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import demo, real_data
from tools.prune_student import main, parse_layers, prune


def test_pruned_student_is_the_teacher_without_those_layers(tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "teacher", seed=3, layers=4, hidden=32)
    prune(teacher, tmp_path / "student", {1, 2})
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    kept = {"model.layers.0.": "model.layers.0.", "model.layers.1.": "model.layers.3."}
    for name, weights in after.items():
        origin = next((name.replace(new, old) for new, old in kept.items() if name.startswith(new)), name)
        torch.testing.assert_close(weights, before[origin], rtol=0, atol=0)
    assert len(after) == len(before) - 2 * sum(name.startswith("model.layers.1.") for name in before)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == (
        AutoTokenizer.from_pretrained(teacher).get_vocab()
    )


def test_layers_of_the_command_line() -> None:
    assert parse_layers("3,12-14") == {3, 12, 13, 14}


@pytest.mark.parametrize("layers", ["a-b", "0-3", "9"])
def test_wrong_layers_are_refused(tmp_path: Path, layers: str) -> None:
    teacher = make_model(tmp_path / "teacher", layers=4, hidden=32)
    result = CliRunner().invoke(main, [str(teacher), str(tmp_path / "student"), "--drop", layers])
    assert result.exit_code == 2
    assert not (tmp_path / "student").exists()


def test_text_is_real_mixed_and_the_same_each_time() -> None:
    texts = list(real_data.texts("docs"))
    assert texts == list(real_data.texts("docs"))
    assert len(texts) > 50
    assert len(set(texts)) == len(texts)
    assert all(real_data.SMALLEST <= len(text) <= real_data.LARGEST for text in texts)


def test_copies_and_short_texts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (" ".join(f"{word}{number}" for number in range(300)) for word in ("apple", "pear"))
    near = one + " and a little more"
    monkeypatch.setitem(real_data.DOMAINS, "docs", lambda: iter([one, other, near, one, "short"]))
    found = list(real_data.texts("docs"))
    assert len(found) == 2
    assert other in found


def test_near_copies_of_other_domains_and_licence_heads_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = " ".join(f"apple{number}" for number in range(300))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "a.h").write_text(
        f"// Copyright\n/* all rights\n   reserved */\n#pragma once\n{body}"
    )
    monkeypatch.setattr(real_data, "_package", lambda *_: tmp_path)
    monkeypatch.setitem(real_data.DOMAINS, "docs", lambda: iter([f"{body} and more"]))
    seen: set[int] = set()
    assert list(real_data.texts("cpp", seen)) == [f"#pragma once\n{body}"]
    assert list(real_data.texts("docs", seen)) == []
    assert len(list(real_data.texts("docs"))) == 1


def test_domains_are_written_up_to_the_tokens_asked_for(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [" ".join(f"{word}{number}" for number in range(300)) for word in ("apple", "pear", "plum")]
    monkeypatch.setattr(real_data, "DOMAINS", {"fruit": lambda: iter(documents)})
    monkeypatch.setattr(real_data, "teacher_folder", lambda root: teacher_folder)
    for tokens, expected in ((1, 1), (10**6, 3)):
        file = real_data.write_domains(tmp_path, tokens)["fruit"]
        lines = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]
        assert len(lines) == expected
        assert set(lines) <= set(documents)


def interval(student_ppl: dict[str, float], rows: int) -> dict[str, Any]:
    same = dict.fromkeys(student_ppl, 0.5)
    return {
        "factor": same,
        "student_ppl": student_ppl,
        "teacher_ppl": dict.fromkeys(student_ppl, 4.0),
        "standard_error": dict.fromkeys(student_ppl, 0.1),
        "rows": dict.fromkeys(student_ppl, rows),
    }


def test_demo_names_the_domains_that_became_no_better() -> None:
    lines = [interval({"a": 9.0, "b": 9.0}, 7), interval({"a": 8.0, "b": 9.0}, 0)]
    table, worse = demo.outcome(lines)
    assert worse == ["b"]
    row = table.splitlines()[2].split()
    assert row == ["a", "4.00", "9.00", "±", "0.90", "8.00", "±", "0.80", "0.500", "0.500", "7"]


ROOT = Path(__file__).parents[2]
TOOLS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "tools").rglob("*.py"))
    if "__main__" in path.read_text("utf-8")
]
EXAMPLE = "tools.hf_trainer"  # an example to read, kept as short as possible


@pytest.mark.parametrize("name", sorted({*TOOLS} - {EXAMPLE}))
def test_a_tool_says_what_it_is_for(name: str) -> None:
    main = import_module(name).main
    assert isinstance(main, click.Command)
    said = CliRunner().invoke(main, ["--help"])
    assert said.exit_code == 0
    assert said.output.startswith("Usage: ")
