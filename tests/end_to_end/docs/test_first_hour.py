"""Start files, recipes, schemas and the doctor: what somebody needs before the first build."""

import json
from pathlib import Path

import pytest
import yaml
from helpers.commands import Run, ddk_cache

from ddk_build.config import BuildConfig
from ddk_build.generate.config import GenerateConfig
from ddk_cache.cli.main import commands
from ddk_cache.cli.recipes import read_recipes
from ddk_cache.util.configuration import load
from ddk_train.config import TrainConfig
from tools.docs import cli as cli_docs
from tools.docs import configuration as configuration_docs


def test_init_writes_a_pair_that_fits_together(tmp_path: Path, run: Run) -> None:
    done = run("init", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [str(tmp_path / "build.yaml"), str(tmp_path / "train.yaml")]
    build = load(tmp_path / "build.yaml", [], BuildConfig)
    train = load(tmp_path / "train.yaml", [], TrainConfig)
    assert (train.cache, train.temperature) == (build.cache, build.target.temperature)
    assert (tmp_path / "build.yaml").read_text().count("#") > 10


def test_init_makes_a_folder(tmp_path: Path, run: Run) -> None:
    assert run("init", tmp_path / "new" / "one").code == 0
    assert len(list((tmp_path / "new" / "one").iterdir())) == 2
    (tmp_path / "file").touch()
    assert run("init", tmp_path / "file").code == 2


def test_init_overwrites_nothing(tmp_path: Path, run: Run) -> None:
    (tmp_path / "train.yaml").write_text("mine: 1\n")
    done = run("init", tmp_path)
    assert done.code == 2
    assert done.mistake == f"{tmp_path}/train.yaml: exists already; move it, or name another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]


def test_every_recipe_is_listed_and_can_be_taken(tmp_path: Path, run: Run) -> None:
    listed = [line.partition(" ")[0] for line in run("recipes").out.splitlines()]
    assert listed == list(read_recipes())
    assert "start" in listed
    for name in listed:
        (tmp_path / name).mkdir()
        assert run("init", "--from", name, tmp_path / name).code == 0
    assert len(list((tmp_path / "on-policy").iterdir())) == 3
    taken = yaml.safe_load((tmp_path / "lora-24gb" / "build.yaml").read_text())
    assert taken["cache"] == yaml.safe_load((tmp_path / "general" / "build.yaml").read_text())["cache"]


def test_a_recipe_that_does_not_exist(tmp_path: Path, run: Run) -> None:
    done = run("init", "--from", "../general", tmp_path)
    assert done.code == 2
    assert done.mistake.startswith("--from ../general: unknown recipe; choose one of chat, code, ")


@pytest.mark.parametrize(
    ("name", "model"), [("build", BuildConfig), ("generate", GenerateConfig), ("train", TrainConfig)]
)
def test_schema_is_the_configurations_own(run: Run, name: str, model: type[BuildConfig]) -> None:
    found = json.loads(run("schema", name).out)
    assert set(found["properties"]) == set(model.model_fields)


def test_schema_of_nothing(run: Run) -> None:
    assert run("schema", "trian").code == 2


def test_the_reference_is_current() -> None:
    """Make it again with ``python -m tools.docs.configuration``."""
    assert configuration_docs.PAGE.read_text(encoding="utf-8") == configuration_docs.page()


def test_the_list_of_commands_is_current() -> None:
    """Make it again with ``python -m tools.docs.cli``."""
    assert cli_docs.PAGE.read_text(encoding="utf-8") == cli_docs.page()


def test_the_list_of_commands_has_every_option() -> None:
    page = cli_docs.page()
    assert set(commands.commands) < set(cli_docs.all_commands())
    for name, command in cli_docs.all_commands().items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        options = [names for parameter in command.params for names in parameter.opts if names[0] == "-"]
        assert all(f"`{option}" in section or f"{option}`" in section for option in options), name


def test_every_key_is_described_in_the_reference() -> None:
    without = [line for line in configuration_docs.page().splitlines() if line.endswith("required)")]
    assert [line.split("`")[1] for line in without] == ["teacher"]


def test_a_default_is_of_the_keys_own_type() -> None:
    nulls = [line for line in configuration_docs.page().splitlines() if "; `null`)" in line]
    assert len(nulls) > 10
    assert all(" or null; `null`)" in line for line in nulls)


def test_doctor_says_what_a_bug_report_needs(tmp_path: Path, run: Run) -> None:
    done = run("doctor", tmp_path / "nothing")
    assert (done.code, done.err) == (0, "")
    found = {line[:14].strip(): line[15:] for line in done.out.splitlines()}
    assert {"python", "cpu", "disk", "ddk-cache", "zarr", "torch", "vllm", "cache"} <= set(found)
    assert any(name.startswith("gpu") for name in found)


def test_doctor_shows_no_secret(run: Run) -> None:
    done = run("doctor", "ftp://me:geheim@host/cache?token=geheim")
    assert done.code == 0
    assert "geheim" not in done.out + done.err
    assert "host" in done.out


def test_the_shell_completes_commands() -> None:
    shell = {"_DDK_CACHE_COMPLETE": "bash_complete", "COMP_WORDS": "ddk-cache re", "COMP_CWORD": "1"}
    assert ddk_cache(**shell).out.splitlines() == ["plain,recipes", "plain,report"]
