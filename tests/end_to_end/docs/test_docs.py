"""What README and docs tell people to type is what the program takes; their links lead somewhere."""

import ast
import pkgutil
import re
import shlex
import subprocess
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from helpers.pages import FENCED, NAMES, PAGES, ROOT, SHELL, blocks

from ddk_build.config import BuildConfig
from ddk_build.generate.config import GenerateConfig
from ddk_cache.cli.main import commands
from ddk_cache.cli.rounds import RoundsConfig
from ddk_train.config import TrainConfig
from tools.docs import licences
from tools.docs.checkout import project

OURS = re.compile(rf"ddk-cache +((?:{NAMES})\b.*)")
TOOL = re.compile(r"python -m (tools\.[\w.]*\w)(.*)")


def lines(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """Return what matches ``pattern`` in shell blocks and in code within sentences, with its page."""
    found = [
        (name, match.group(0))
        for name, body in blocks(SHELL)
        for line in body.replace("\\\n", " ").splitlines()
        if (match := pattern.search(line.partition(" #")[0]))
    ]
    for page in PAGES:
        inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCED.sub("", page.read_text("utf-8")))
        found += [(page.name, match.group(0)) for code in inline if (match := pattern.search(code))]
    return found


COMMANDS = lines(OURS)
TOOLS = lines(TOOL)


def test_there_is_something_to_test() -> None:
    assert len(COMMANDS) > 20
    assert len(TOOLS) > 10
    assert {command.split()[1] for _, command in COMMANDS} >= {"build", "estimate", "export", "init", "train"}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_taken(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options and their values, where it names as many arguments as the command has."""
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(OURS.search(line).group(1).split("|")[0])  # type: ignore[union-attr]
    command = commands.get_command(click.Context(commands), name)
    assert command is not None
    options = [option for parameter in command.params for option in parameter.opts]
    for word in words:
        if word.startswith("--"):
            assert word in (*options, "--help", "--debug"), f"{page}: {line}"
        elif word.endswith(".yaml"):
            Path(word).touch()
        elif word.startswith("runs/") or word == "LOGITS":
            Path(word).mkdir(parents=True)
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    words = [word for word in words if word not in ("--help", "--debug", "$resume")]
    given = [word for word in words if not word.startswith("-")]
    if len(given) >= sum(argument.required for argument in arguments) and "[" not in line:
        command.make_context(name, words).close()


@pytest.mark.parametrize(("page", "line"), TOOLS)
def test_a_tool_is_there_and_has_its_options(page: str, line: str) -> None:
    module, rest = TOOL.search(line).groups()  # type: ignore[union-attr]
    path = ROOT / module.replace(".", "/")
    text = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8")
    for option in re.findall(r"--[a-z][\w-]*", rest):
        assert f'"{option}' in text, f"{page}: {line}"
    for study in re.findall(r"tools/studies/\S+\.yaml", rest):
        assert (ROOT / study).exists(), f"{page}: {line}"


def test_yaml_has_keys_that_there_are() -> None:
    whole = 0
    for page, body in blocks(("yaml",)):
        if page == "export.md":  # other trainers' configurations
            continue
        keys: dict[str, Any] = yaml.safe_load(body)
        if {"model", "output"} <= set(keys):
            GenerateConfig.model_validate(keys)
            continue
        if "rounds" in keys:
            RoundsConfig.model_validate(keys)
            continue
        model = BuildConfig if "domains" in keys and "teacher" in keys else TrainConfig
        if {"cache", "output_dir", "student"} <= set(keys) or {"cache", "domains", "teacher"} <= set(keys):
            model.model_validate(keys)
            whole += 1
        else:
            assert set(keys) <= {*BuildConfig.model_fields, *TrainConfig.model_fields}, f"{page}: {body}"
    assert whole >= 2


def test_python_names_what_there_is() -> None:
    count = 0
    for page, body in blocks(("python", "")):
        if not re.match(r"\s*(import|from) ", body):
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), f"{page}: {body}"
        count += 1
    assert count >= 4


def test_names_of_the_packages_are_there() -> None:
    """In code within sentences, and what the reference is made of."""
    names = {
        match
        for page in PAGES
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCED.sub("", page.read_text("utf-8")))
        for match in re.findall(r"(?<![\w/.\"'-])ddk_(?:cache|build|train)(?:\.[a-z]\w*|\.[A-Z]\w*)+", code)
    }
    reference = (ROOT / "docs" / "api.md").read_text("utf-8")
    for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", reference, re.MULTILINE):
        members = re.search(r"members: \[(.*)\]", options)
        names |= {name, *(f"{name}.{member}" for member in members[1].split(", "))} if members else {name}
    assert len(names) > 20
    for name in sorted(names):
        assert pkgutil.resolve_name(name) is not None


def test_make_targets_are_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    named = {target for page in PAGES for target in re.findall(r"`make (\w+)`", page.read_text("utf-8"))}
    assert named <= set(targets)
    assert {"demo", "test"} <= {line.split()[1] for _, line in lines(re.compile(r"make \w+"))}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_messages_in_troubleshooting_are_the_programs() -> None:
    """Each part of a quoted message between the places for names stands in the code."""
    texts = [
        node.value
        for folder in ("ddk_cache", "stages")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^- `([^`]+)`: ", page, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for part in filter(None, map(str.strip, message.split("…"))):
            assert any(part in text for text in texts), message


def test_licences_of_all_that_pyproject_names_are_listed() -> None:
    """Make it again with ``python -m tools.docs.licences``."""
    keys = project()
    lines = [*keys["dependencies"], *chain(*keys["optional-dependencies"].values())]
    page = (ROOT / "docs" / "licences.md").read_text("utf-8")
    for requirement in licences.direct(lines):
        assert f"| {licences.normal(requirement)} | " in page, requirement


def test_shell_blocks_are_shell() -> None:
    for page, body in blocks(("sh", "bash")):
        done = subprocess.run(["bash", "-n"], input=body, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), f"{page}: {body}"
