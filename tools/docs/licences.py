"""Write docs/licences.md from installed packages' metadata: ``python -m tools.docs.licences``."""

import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, metadata

import click
from packaging.requirements import Requirement

from tools.docs.checkout import ROOT, project

PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences

For those who pass it on. This project is under the Apache License 2.0. The list is made from the packages'
own metadata by `python -m tools.docs.licences`, on Linux with a CPU build of torch; on a GPU torch brings
NVIDIA's CUDA libraries too, under their own terms.

Models and texts have licences as well: a cache holds its texts and the teacher's answers to them, and some
models' licences restrict what their output may be used for.
"""
SHORT = 60  # characters; some packages have the whole text for a name


def licence(name: str) -> str:
    """Return the short name of a package's licence, from its metadata."""
    try:
        fields = metadata(name)
    except PackageNotFoundError:
        return "not installed here"
    if expression := fields.get_all("License-Expression"):
        return expression[0]
    kinds = [line for line in fields.get_all("Classifier") or () if line.startswith("License ::")]
    if kinds:
        return ", ".join(line.rpartition(" :: ")[2] for line in kinds)
    [text] = fields.get_all("License") or [""]
    first = text.strip().partition("\n")[0]
    return first if 0 < len(first) <= SHORT else "see the package"


def closure(lines: list[str]) -> set[str]:
    """Return all packages that these requirements install, by normalised name."""
    names: set[str] = set()
    pending = direct(lines)
    while pending:
        requirement = pending.pop()
        names.add(normal(requirement))
        with suppress(PackageNotFoundError):
            for inner in map(Requirement, distribution(requirement.name).requires or ()):
                extras = ({"extra": extra} for extra in ("", *requirement.extras))
                is_needed = inner.marker is None or any(map(inner.marker.evaluate, extras))
                if is_needed and normal(inner) not in names:
                    pending.append(inner)
    return names


def direct(lines: list[str]) -> list[Requirement]:
    """Return the requirements without this project's own extras."""
    return [line for line in map(Requirement, lines) if normal(line) != "ddk-cache"]


def normal(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def table(names: set[str]) -> str:
    lines = [f"| {name} | {licence(name)} |" for name in sorted(names)]
    return "\n".join(["| package | licence |", "|---|---|", *lines])


def page() -> str:
    """Return the whole page."""
    keys = project()
    base = closure(keys["dependencies"])
    parts = [HEAD, "## The base install, with all that it brings\n", table(base), ""]
    for extra, lines in keys["optional-dependencies"].items():
        if own := set(map(normal, direct(lines))) - base:
            parts += [f"## `ddk-cache[{extra}]`, directly\n", table(own), ""]
    return "\n".join(parts)


@click.command(help=__doc__)
def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
