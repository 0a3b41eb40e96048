"""``ddk-cache verify RUN``: compare the files of a run with the digests of what was written."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from ddk_cache.errors import ConfigError
from ddk_cache.util.configuration import load
from ddk_cache.util.packages import require
from ddk_train.config import TrainConfig
from ddk_train.output.folder import is_run
from ddk_train.output.sums import SUMS, damage


def verify(path: str) -> Iterator[str] | None:
    """Return the problems of a training run as lines that begin with the file, or None for another folder.

    Checks the finished student with the run's logs and settings, or the logs of an unfinished run up to its
    newest checkpoint; and every checkpoint. Reads every byte of them.
    """
    folder = Path(path)
    return _problems(folder) if folder.is_dir() and is_run(folder) else None


def _problems(folder: Path) -> Iterator[str]:
    require("train", "torch", "safetensors")
    from ddk_train.output.checkpoint import checkpoints  # imports torch
    from ddk_train.output.facts import FACTS, Facts
    from ddk_train.output.resume import DamagedCheckpoint, State, read_state
    from ddk_train.output.tracking import damaged_logs

    for path in folder.glob("best-*"):
        yield from (f"{path.name}/{problem}" for problem in damage(path))
    newest: State | None = None
    for checkpoint in checkpoints(folder):
        try:
            newest = read_state(checkpoint)
        except DamagedCheckpoint as error:
            yield f"{checkpoint.name}/{error}"
    try:
        load(folder / "config.yaml", [], TrainConfig)
    except ConfigError as error:
        yield str(error).removeprefix(f"{folder}/")
    if (folder / SUMS).exists():
        yield from damage(folder)
        return
    if newest is not None:
        yield from damaged_logs(folder, newest.files)
    try:
        facts = Facts.model_validate_json((folder / FACTS).read_bytes())
    except (OSError, ValidationError):
        yield f"{FACTS}: is missing or damaged"
        return
    if facts.ended:
        yield f"{SUMS}: is missing, although the run has ended"
