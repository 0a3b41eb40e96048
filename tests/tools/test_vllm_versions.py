"""The table of vLLM versions: which runners each line names, and where it goes in the page."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tools import vllm_versions

RUNNERS = {"0": "vllm.v1.worker.cpu_model_runner.CPUModelRunner", "1": vllm_versions.NEWER[-1]}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the runner of each VLLM_USE_V2_MODEL_RUNNER that the engines report, without any engine."""
    runners = dict(RUNNERS)

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        version = Path(env["PYTHONPATH"].split(":")[0]).name
        switch = env["VLLM_USE_V2_MODEL_RUNNER"]
        facts = {"version": version, "runner": runners[switch], "cells": ["8e-07 nats", "7e-07 nats"]}
        return SimpleNamespace(stdout=f"noise\n{json.dumps(facts)}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return runners


def make(tmp_path: Path) -> Any:
    page = tmp_path / "vllm.md"
    page.write_text(
        "before\n<!-- made by a tool -->\n\nold\n\n<!-- end of the table -->\nafter\n", encoding="utf-8"
    )
    for version in ("0.31.0", "0.32.0"):
        (tmp_path / version).mkdir(exist_ok=True)
    arguments = [str(page), str(tmp_path / "0.32.0"), str(tmp_path / "0.31.0")]
    return CliRunner().invoke(vllm_versions.main, arguments), page


def test_versions_and_runners_of_equal_results_share_a_line(
    tmp_path: Path, installed: dict[str, str]
) -> None:
    result, page = make(tmp_path)
    assert result.exception is None
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| 0")]
    assert lines == ["| 0.31.0 V1, 0.31.0 V2, 0.32.0 V1, 0.32.0 V2 | 8e-07 nats | 7e-07 nats |"]
    assert page.read_text("utf-8").endswith("\n<!-- end of the table -->\nafter\n")


def test_a_version_that_ran_its_other_runner_is_an_error(tmp_path: Path, installed: dict[str, str]) -> None:
    """As one that ignores the setting would: its line would be about the wrong runner."""
    installed["1"] = RUNNERS["0"]
    result, _ = make(tmp_path)
    assert isinstance(result.exception, AssertionError)
