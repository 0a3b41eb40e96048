"""What the tests of the commands share: the command line in this process, and an object store."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.builds import finish, write_config, write_corpus
from helpers.commands import Done, Run
from helpers.stores import ObjectStore

from ddk_cache.cli.main import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function from a command's arguments to its result, in this process."""
    # The command asks for it in the environment, which is read where transformers is imported: here, before.
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["ddk-cache", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int | None)
        return Done(end.value.code or 0, out, err)

    return run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """Return the configuration of a build that is done, beside its cache."""
    folder = tmp_path_factory.mktemp("built")
    config = write_config(folder / "build.yaml", teacher_folder, write_corpus(folder))
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    return config


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    """Return an empty bucket; its credentials and address are in the environment."""
    before = dict(os.environ)
    store = ObjectStore()
    yield store
    store.go_away()
    os.environ.clear()
    os.environ.update(before)
