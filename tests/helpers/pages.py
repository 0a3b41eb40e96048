"""The pages of README and docs, and what they give to run."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import click

from ddk_cache.cli.main import commands

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
NAMES = "|".join(commands.list_commands(click.Context(commands)))
SHELL = ("", "sh", "bash")

# A command, behind the start of a line, a blank or a backtick.
LINE = re.compile(
    rf"(?:^|(?<=[ `]))(?:ddk-cache +(?:{NAMES})\b|python -m tools\.[\w.]+|torchrun |docker |ray )[^#`]*"
)
# Code within a sentence that only names a command.
MENTION = re.compile(r"ddk-cache [a-z]+|ddk-cache schema (?:build|train)|ray start|torchrun --nnodes 2")


def blocks(kind: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield a page's name and a code block in one of these languages; an indented block has none."""
    for page in PAGES:
        text = page.read_text("utf-8")
        yield from ((page.name, body) for language, body in FENCED.findall(text) if language in kind)
        if "" in kind:
            yield from ((page.name, dedent(body)) for body in INDENTED.findall(FENCED.sub("", text)))


class Step(NamedTuple):
    """Something to run: a line of the shell, or a block of Python."""

    python: bool
    text: str


def steps(page: Path) -> Iterator[Step]:
    """Yield what a page gives to run, in its order, once each; commands within sentences too."""
    text = page.read_text("utf-8")
    found: list[tuple[int, Step]] = []
    for match in FENCED.finditer(text):
        language, body = match.groups()
        if language == "python":
            found.append((match.start(), Step(True, body)))
        elif language in SHELL and "#SBATCH" not in body:
            found += [(match.start(), Step(False, line)) for line in shell(body)]
    rest = FENCED.sub(lambda match: " " * len(match.group()), text)
    for match in INDENTED.finditer(rest):
        found += [(match.start(), Step(False, line)) for line in shell(dedent(match.group()))]
    rest = INDENTED.sub(lambda match: " " * len(match.group()), rest)
    for match in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", rest):
        if not MENTION.fullmatch(match.group(1)):
            found += [(match.start(), Step(False, line)) for line in shell(match.group(1))]
    yield from dict.fromkeys(step for _, step in sorted(found, key=lambda one: one[0]))


def shell(body: str) -> list[str]:
    lines = body.replace("\\\n", " ").splitlines()
    return [" ".join(match.group().split()) for line in lines if (match := LINE.search(line))]
