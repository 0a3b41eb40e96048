"""Hooks of the site that mkdocs.yml names: the repository's address, and the notebook as a page."""

import json
import subprocess
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def on_config(config: MkDocsConfig) -> None:
    """Take the repository's address from pyproject.toml, else from git. Without it there are no links."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    command = ["git", "-C", str(ROOT), "config", "remote.origin.url"]
    remote = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if url := project.get("urls", {}).get("Repository") or browsable(remote):
        config.repo_url, config.repo_name, config.edit_uri = url, url.rpartition("/")[2], "edit/main/docs/"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the notebook as a page, beside the file itself."""
    files.append(File.generated(config, "tutorial.md", content=as_markdown(NOTEBOOK)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to the notebook lead to its page; that page keeps its link to the file."""
    is_notebook = page.file.src_uri == "tutorial.md"
    return markdown if is_notebook else markdown.replace("(tutorial.ipynb)", "(tutorial.md)")


def as_markdown(notebook: Path) -> str:
    """Return a notebook's cells as Markdown, code in fences."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    texts = ((cell["cell_type"], "".join(cell["source"])) for cell in cells)
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts)


def browsable(remote: str) -> str:
    """Return the address for a browser of a git remote; "" where it has none, as for a folder."""
    host, _, path = remote.removeprefix("git@").partition(":")
    url = f"https://{host}/{path}" if remote.startswith("git@") else remote
    return url.removesuffix(".git") if url.startswith("https://") else ""
