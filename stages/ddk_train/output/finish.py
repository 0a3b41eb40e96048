"""Put the trained student into the run's folder, so that a crash leaves the old files or the new ones."""

from pathlib import Path
from typing import Any

from ddk_cache.util import durable
from ddk_train.config import TrainConfig
from ddk_train.errors import writing
from ddk_train.output.card import student_card
from ddk_train.output.facts import FACTS, set_end
from ddk_train.output.sums import file_digest, write_sums
from ddk_train.output.tracking import FILES

STAGED = "partial-student"  # the folder in the run's into which the student is written


def finish(folder: Path, tokenizer: Any, config: TrainConfig, student_step: int) -> None:
    """Move the saved student, its tokenizer and its card into the run's folder; write SHA256SUMS last.

    A link in the place of a file is replaced, not followed. A run without SHA256SUMS is not finished.
    """
    staged = folder / STAGED
    with writing(folder):
        tokenizer.save_pretrained(staged)
        (staged / "README.md").write_text(student_card(folder, config, student_step), encoding="utf-8")
        paths = sorted(staged.iterdir())
        for path in paths:
            durable.sync(path)
        for path in paths:
            path.replace(folder / path.name)
        staged.rmdir()
        set_end(folder, student_step)
        names = [*(path.name for path in paths), "config.yaml", FACTS, *FILES]
        for name in FILES:
            durable.sync(folder / name)
        write_sums(folder, {name: file_digest(folder / name) for name in names})
