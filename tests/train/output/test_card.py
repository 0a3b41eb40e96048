"""The card and the name of a run, and what its adapters are for."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import yaml
from helpers.training import ROWS, MakeConfig, read_lines

from ddk_train.output.tracking import TRACKERS
from ddk_train.report.run_files import read_run
from ddk_train.train import train


@pytest.mark.parametrize("adapters", [False, True])
def test_a_student_has_a_card(
    make_config: MakeConfig,
    student_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    adapters: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(
        student=os.path.relpath(student_folder),
        lora={"r": 2} if adapters else None,
        max_steps=2,
        run_name="first <b>try",
    )
    folder = train(config)
    _, head, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "ddk-cache"],
    }
    assert card.startswith("# first btry\n")
    assert f"`{student_folder.name}`, distilled from `" in card
    assert ", top 8) in 2 steps" in card or "(top 8) in 2 steps" in card
    first, *_, last = read_lines(folder, "discrepancy")
    for name in ROWS:
        perplexities = (first["student_ppl"], last["student_ppl"], first["teacher_ppl"])
        assert " | ".join(f"{values[name]:.2f}" for values in perplexities) in card
    code = card.partition("```python\n")[2].partition("\n```")[0]
    names: dict[str, Any] = {}
    exec(code, names)  # it loads the student
    assert type(names["model"]).__name__ == ("PeftModelForCausalLM" if adapters else "LlamaForCausalLM")
    assert read_run(folder).name == "first <b>try"


def test_adapters_name_their_base_from_any_folder(
    make_config: MakeConfig, student_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(student_folder.parent)
    folder = train(make_config(student=student_folder.name + "/", lora={"r": 2}, max_steps=1, warmup_steps=0))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(student_folder.resolve())
    monkeypatch.chdir(tmp_path)
    peft.AutoPeftModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_get_the_names(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    given: dict[str, Any] = {}
    fake = SimpleNamespace(init=lambda **keys: given.update(keys), Error=RuntimeError)
    monkeypatch.setitem(sys.modules, tracker, fake)
    monkeypatch.setenv(f"{tracker.upper()}_PROJECT", "of the environment")
    with pytest.raises(AttributeError):  # the fake's run is None
        TRACKERS[tracker](make_config(), "id", 0).track({}, 0)
    assert given["project"] == "of the environment"
    assert given["name"].startswith("run")
    with pytest.raises(AttributeError):
        TRACKERS[tracker](make_config(run_name="first", project="ours"), "id", 0).track({}, 0)
    assert given["project"] == "ours"
    assert given["name"].startswith("first")
