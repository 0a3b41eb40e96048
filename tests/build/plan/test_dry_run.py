"""A dry run fails where the build would."""

from pathlib import Path

import pytest
from helpers.builds import write_config
from helpers.documents import write_rows

from ddk_build.config import BuildConfig
from ddk_build.plan.dry_run import dry_run
from ddk_cache.errors import ConfigError
from ddk_cache.util.configuration import load


def test_copies_of_one_text_are_one_document(tmp_path: Path, teacher_folder: Path) -> None:
    rows = [{"text": "the quick fox"}] * 3
    source = Path(write_rows(tmp_path / "text.jsonl", rows))
    config = load(write_config(tmp_path / "build.yaml", teacher_folder, {"code": source}), [], BuildConfig)
    message = r"^domains\.code: needs two different documents.*all 3 documents have the same text"
    with pytest.raises(ConfigError, match=message):
        dry_run(config, is_here=True)
    write_rows(source, [*rows, {"text": "the lazy dog"}])
    assert "# code: can be read" in dry_run(config, is_here=True)
