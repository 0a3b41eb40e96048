"""Stage one as a library: its names, what it returns, and that it prints nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.builds import write_config, write_corpus

from ddk_build import BuildConfig, build_cache
from ddk_cache.errors import ConfigError


def test_a_build_returns_the_cache_and_prints_nothing(
    tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "build.yaml", teacher_folder, write_corpus(tmp_path))
    config = BuildConfig.from_yaml(path, [f"cache={tmp_path / 'other'}", "seed=3"])
    tokens = build_cache(config, tokens_only=True)
    assert not tokens.complete
    assert len(tokens["code"].train) == 0
    lines: list[str] = []
    cache = build_cache(config, report=lines.append)
    assert cache.complete
    assert cache.domains == ("code", "tail")
    assert [line.partition(":")[0] for line in lines] == ["code", "tail"]
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="seq_length"):
        BuildConfig.from_yaml(path, ["seq_length=nothing"])


def test_importing_the_names_does_nothing_else() -> None:
    code = """
import signal, sys
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
import ddk_build
assert "build_cache" in ddk_build.__all__
assert not {"torch", "transformers", "datasets", "vllm"} & sys.modules.keys()
from ddk_build import BuildConfig
assert not {"torch", "transformers", "datasets", "vllm"} & sys.modules.keys()
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
