"""The acceptance run for GPUs, without one: its parts exist, fit, run and are judged."""

import inspect
import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from vllm import envs
from vllm.engine.arg_utils import EngineArgs

from tools import gpu_acceptance as tool


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(tool.main, [*arguments])


def test_a_dry_run_names_every_part_and_the_time() -> None:
    result = invoke("--dry-run")
    assert result.exit_code == 0
    for name in tool.PARTS:
        assert name in result.output
    assert invoke("--dry-run", "engine-v2", "--device", "cpu").exit_code == 2


def test_parts_are_left_out_until_the_rest_fits() -> None:
    groups = tool.groups_of([*tool.PARTS], 370)
    assert sum(max(tool.PARTS[name].seconds for name in group) for group in groups) <= 370
    assert groups[:2] == [["kernels"], [name for name in tool.PARTS if tool.PARTS[name].shares]]
    assert tool.groups_of(["capture-7b", "kernels"], 60) == [["kernels"]]


@pytest.mark.parametrize("name", tool.PARTS)
def test_a_part_is_there_and_takes_its_arguments(name: str) -> None:
    run, _, environment, *_ = tool.PARTS[name]
    assert environment.keys() <= envs.environment_variables.keys()  # vLLM ignores others
    if isinstance(run, partial):
        assert run.keywords.keys() <= {"head_dtype", *EngineArgs.__dataclass_fields__}
    if callable(run):
        inspect.signature(run).bind("cpu", Path())
        return
    module, *arguments = run
    command: click.Command = import_module(module).main
    command.make_context(module, [*arguments, "--output", "figures.json"])  # parses, and runs nothing


def test_a_part_runs_as_a_process_and_is_written_down(tmp_path: Path) -> None:
    result = invoke("kernels", "--device", "cpu", "--output", str(tmp_path / "figures.json"))
    assert result.exit_code == 0, result.output
    part = json.loads((tmp_path / "figures.json").read_text("utf-8"))["parts"]["kernels"]
    assert part["result"] == "passed"
    assert part["facts"]["ids"]


def test_a_part_that_fails_or_takes_too_long_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits.py").write_text("import time; time.sleep(600)")
    (tmp_path / "wrong.py").write_text("import sys; open(sys.argv[-1], 'w').write('{\"passed\": false}')")
    modules = {"PYTHONPATH": str(tmp_path)}
    parts = {
        "fails": tool.Part(["tools.no_such_tool"], 60),
        "waits": tool.Part(["waits"], 1, modules),
        "wrong": tool.Part(["wrong"], 60, modules),
        "does not fit": tool.Part(["tools.no_such_tool"], 10_000),
    }
    monkeypatch.setattr(tool, "PARTS", parts)
    monkeypatch.setattr(tool.main.params[0], "type", click.Choice([*parts]))
    output = tmp_path / "figures.json"
    result = invoke("--device", "cpu", "--seconds", "300", "--output", str(output))
    assert result.exit_code == 1, result.output
    found = {name: part["result"] for name, part in json.loads(output.read_text("utf-8"))["parts"].items()}
    assert found == {
        "fails": "failed with exit code 1",
        "waits": "took too long",
        "wrong": "FAILED",
        "does not fit": "did not fit",
    }
    assert "no_such_tool" in (tmp_path / "figures" / "fails.log").read_text("utf-8")
