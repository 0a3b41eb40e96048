"""docs/architecture.md shows the imports that there are, and no others."""

import re
from functools import cache
from pathlib import Path

import grimp
import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text("utf-8")
PACKAGES = ("ddk_cache", "ddk_build", "ddk_train")
SHARED = {"errors", "config"}  # every module of their package may import them
START = "__main__"  # two lines that call the command
DIAGRAMS = dict(zip(PACKAGES, re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL), strict=True))


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, include_external_packages=True)


@cache
def imports() -> set[tuple[str, str]]:
    """Return the imports between sub-packages (or modules beside them), such as "ddk_cache.cli"."""
    modules = [module for module in graph().modules if module.partition(".")[0] in PACKAGES]
    arrows = {
        (box(module), box(imported))
        for module in modules
        for imported in graph().find_modules_directly_imported_by(module)
        if imported.partition(".")[0] in PACKAGES
    }
    return {(box_a, box_b) for box_a, box_b in arrows if box_a != box_b}


def box(module: str) -> str:
    """Return a module's sub-package; the package itself for its public names."""
    return ".".join(module.split(".")[:2])


def table(title: str) -> dict[str, list[str]]:
    """Return the table below a heading: the first column's name -> the names in the second."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: re.findall(r"`([^`]+)`", cell) for name, cell in rows}


def arrows(diagram: str) -> list[tuple[str, str]]:
    return re.findall(r"^ +(\w+) --> (\w+)$", diagram, re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_picture_has_the_arrows_of_its_package(package: str) -> None:
    inside = {
        (a.partition(".")[2], b.partition(".")[2])
        for a, b in imports()
        if a.startswith(f"{package}.") and b.startswith(f"{package}.") and not a.endswith(START)
    }
    drawn = arrows(DIAGRAMS[package])
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == {(a, b) for a, b in inside if b not in SHARED}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_picture_has_all_boxes(package: str) -> None:
    drawn = set(re.findall(r"^ +(\w+)|--> (\w+)", DIAGRAMS[package], re.MULTILINE))
    names = {name for pair in drawn for name in pair if name} - {"flowchart"}
    boxes = {child.partition(".")[2] for child in graph().find_children(package)}
    assert names == boxes - SHARED - {START}


def test_the_table_has_what_the_stages_import_of_the_cache() -> None:
    expected: dict[str, list[str]] = {}
    for stage, imported in sorted(imports()):
        name = imported.partition(".")[2] or "(names)"
        if imported.startswith("ddk_cache") and not stage.startswith("ddk_cache") and name not in SHARED:
            expected.setdefault(stage, []).append(name)
    written = table("What the stages import of `ddk_cache`")
    assert written == {stage: sorted(names) for stage, names in expected.items()}


def test_libraries_are_imported_only_where_the_table_says() -> None:
    libraries = table("Which libraries")
    assert {"vllm", "ray", "torch"} <= set(libraries)
    for library, allowed in libraries.items():
        importers = graph().find_modules_that_directly_import(library)
        assert importers
        for module in importers:
            assert any(f"{module}.".startswith(f"{name}.") for name in allowed), f"{module}: {library}"
