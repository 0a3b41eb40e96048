"""docs/tutorial.ipynb is run from its first cell to its last, with tiny models under the names of SmolLM2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.docs import hooks

CELLS: list[dict[str, Any]] = json.loads(hooks.NOTEBOOK.read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
RUN = """
import json, sys
cells = {"__name__": "__main__"}
for source in json.load(sys.stdin):
    exec(source, cells)
"""


def test_every_cell_runs(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    for name, folder in {"360M": teacher_folder, "135M": student_folder}.items():
        shutil.copytree(folder, tmp_path / "HuggingFaceTB" / f"SmolLM2-{name}-Instruct")
    cells = json.dumps(["".join(cell["source"]) for cell in CODE])
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=cells, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" p = ") == 5
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("step")] == [
        ["step", str(step)] for step in (0, 4, 8, 12)
    ]
    assert (tmp_path / "runs" / "tutorial-student" / "model.safetensors").exists()


def test_the_file_has_no_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert hooks.NOTEBOOK.stat().st_size < 20_000


def test_the_page_has_all_cells() -> None:
    page = hooks.as_markdown(hooks.NOTEBOOK)
    assert page.startswith("# Tutorial")
    assert page.count("```python\n") == len(CODE)
    assert all("".join(cell["source"]) in page for cell in CELLS)


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("git@github.com:someone/ddk-cache.git", "https://github.com/someone/ddk-cache"),
        ("https://github.com/someone/ddk-cache", "https://github.com/someone/ddk-cache"),
        ("/srv/ddk-cache", ""),
        ("", ""),
    ],
)
def test_the_site_links_to_a_repository_that_a_browser_can_open(remote: str, address: str) -> None:
    assert hooks.browsable(remote) == address


def test_links_to_the_notebook_lead_to_its_page() -> None:
    """But for the page's own, which leads to the file."""
    text = "[tutorial](tutorial.ipynb)"
    for page, expected in {"index.md": "[tutorial](tutorial.md)", "tutorial.md": text}.items():
        file = File(page, "docs", "site", use_directory_urls=True)
        config = MkDocsConfig()
        assert hooks.on_page_markdown(text, Page(None, file, config), config, Files([file])) == expected
