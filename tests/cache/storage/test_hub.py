"""Caches on the Hugging Face hub, and what is uploaded; the network is never asked."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from ddk_cache import CacheError, ConfigError, open_cache
from ddk_cache.cache.compatibility import check_cache
from ddk_cache.cache.verify import verify
from ddk_cache.cli.commands import push
from ddk_cache.errors import CacheNotFoundError
from ddk_cache.storage.hub import snapshot
from ddk_cache.storage.lock import LockedStorage

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the hub's folder on this machine, with the cache as the data set team/cache."""
    repository = tmp_path / "datasets--team--cache"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for index, path in enumerate(path for path in cache_folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / f"{index:040x}"
        blob.write_bytes(path.read_bytes())
        link = repository / "snapshots" / REVISION / path.relative_to(cache_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("form", ["hf://team/cache", "hf://datasets/team/cache", "hf://team/cache@main"])
def test_a_cache_on_the_hub_opens(hub_cache: Path, cache_folder: Path, form: str) -> None:
    opened, original = open_cache(form), open_cache(cache_folder)
    assert opened.domains == original.domains
    for name in original:
        assert (opened[name].train.read([0]).tokens == original[name].train.read([0]).tokens).all()


def test_a_cache_on_the_hub_is_not_written(hub_cache: Path) -> None:
    with pytest.raises(ConfigError, match="can only be read; build into a folder, then ddk-cache push"):
        LockedStorage("hf://team/cache", "token")
    with pytest.raises(ConfigError, match="can only be read"):  # a dry run
        check_cache("hf://team/cache", open_cache("hf://team/cache").manifest)


def test_damage_on_the_hub_is_found_in_every_domain(hub_cache: Path) -> None:
    for domain in ("code", "prose"):
        path = snapshot("hf://team/cache") / domain / "train/codes/c/0/0"
        path.resolve().write_bytes(path.read_bytes()[:-1])
    problems = [str(problem) for problem in verify("hf://team/cache")]
    assert len(problems) == 4
    for domain, problem in zip(("code", "prose"), problems[1::2], strict=True):
        assert re.match(f"{domain}: is not marked .*hf://team/cache: can only be read", problem)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("hf://team", CacheNotFoundError, "write hf://OWNER/NAME"),
        ("hf://team/../..", CacheNotFoundError, "write hf://OWNER/NAME"),
        ("hf://team/other", CacheError, "hf://team/other: cannot be downloaded: "),
    ],
)
def test_what_cannot_be_opened(hub_cache: Path, url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_cache(url)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what would have been uploaded: the arguments, and the files."""
    seen: list[dict[str, Any]] = []

    class Api:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, name: str, **arguments: Any) -> str:
            seen.append(arguments)
            return f"https://hub/{name}"

        def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str], **arguments: Any) -> None:
            names = (str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file())
            kept = {name for name in names if not any(fnmatch(name, pattern) for pattern in ignore_patterns)}
            seen[-1] |= arguments | {"files": kept}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return seen


def upload(folder: Path, *options: str) -> str:
    return CliRunner().invoke(push, [str(folder), "team/new", *options], catch_exceptions=False).output


def test_a_cache_is_uploaded_without_what_is_of_this_machine(
    uploads: list[dict[str, Any]], cache_folder: Path
) -> None:
    everything = {str(path.relative_to(cache_folder)) for path in cache_folder.rglob("*") if path.is_file()}
    for name in ("ddk.lock", ".hidden", "code/state#0123456789ab"):
        (cache_folder / name).write_text("")
    assert upload(cache_folder) == "https://hub/team/new\n"
    [arguments] = uploads
    assert (arguments["repo_type"], arguments["private"], arguments["repo_id"]) == (
        "dataset",
        True,
        "team/new",
    )
    assert arguments["files"] == everything


def test_a_student_is_uploaded_without_checkpoints_and_logs(
    uploads: list[dict[str, Any]], tmp_path: Path
) -> None:
    student = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    for name in (
        *student,
        "metrics.jsonl",
        "config.yaml",
        "run.json",
        "SHA256SUMS",
        "checkpoint-5/model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    upload(tmp_path, "--public")
    [arguments] = uploads
    assert (arguments["repo_type"], arguments["private"]) == ("model", False)
    assert arguments["files"] == student


def test_a_link_to_a_file_elsewhere_is_not_uploaded(
    uploads: list[dict[str, Any]], cache_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("of this machine")
    (cache_folder / "copy.md").symlink_to(cache_folder / "README.md")
    (cache_folder / "README.md").write_text("")
    (cache_folder / ".left-out").symlink_to(tmp_path / "secret")
    upload(cache_folder)
    assert "copy.md" in uploads.pop()["files"]
    (cache_folder / "code" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"code/notes\.txt: is a link that leads out of the folder"):
        upload(cache_folder)
    assert not uploads


def test_other_folders_are_refused(uploads: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither a cache nor the student of a finished run"):
        upload(tmp_path)
    assert not uploads
