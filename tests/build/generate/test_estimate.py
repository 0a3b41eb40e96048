"""An estimate of what generate writes, against what it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.documents import write_rows
from helpers.writing import Echo, use

from ddk_build import cli
from ddk_build.generate import program
from ddk_build.generate.config import GenerateConfig

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def config(tmp_path: Path, teacher_folder: Path) -> Path:
    prompts = [{"start": f"print {number}"} for number in range(60)]
    domain = {"path": write_rows(tmp_path / "starts.jsonl", prompts), "prompt_column": "start"}
    path = tmp_path / "generate.yaml"
    keys = {
        "model": str(teacher_folder),
        "output": str(tmp_path / "written"),
        "sampling": {"max_tokens": 8, "samples": 2},
        "domains": {"echo": domain | {"prompt_format": "plain"}, "chat": domain},
    }
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


def estimated(config: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli.estimate, [str(config), "--json", *options], catch_exceptions=False)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_without_a_probe_completions_are_as_long_as_they_may_be(config: Path) -> None:
    result = estimated(config)
    assert [*result["domains"]] == ["echo", "chat"]
    for domain in result["domains"].values():
        assert (domain["prompts"], domain["completions"], domain["tokens"]) == (60, 120, 960)
    assert result["total"]["tokens"] == 1920
    assert result["hours"] is None
    assert not (config.parent / "written").exists()
    text = CliRunner().invoke(cli.estimate, [str(config)]).stdout
    assert "at most" in text
    assert "--probe measures their length" in text


def test_a_probe_measures_the_length(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use(monkeypatch, Echo())
    result = estimated(config, "--probe")
    assert len(engine.asked) == 2 * 32
    assert not (config.parent / "written").exists()
    program.generate(GenerateConfig.from_yaml(config))
    for domain in result["domains"].values():
        assert domain["tokens"] == 120 * 3
    assert result["hours"] > 0
