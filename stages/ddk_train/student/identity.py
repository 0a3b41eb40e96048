"""What identifies a student: a run resumes only with the student that it began with."""

from pathlib import Path

from ddk_cache.util.model_folder import model_digest
from ddk_train.config import TrainConfig


def student_content(config: TrainConfig) -> str | None:
    """Return "sha256:<digest>" of a folder's files, "commit:<sha>" of a hub id, or None if it is unknown.

    A model's settings decide the results of every kind of training, and its frozen weights those of adapters.
    """
    folder = Path(config.student)
    if folder.is_dir():
        return f"sha256:{model_digest(folder, code=config.trust_remote_code)}"
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(config.student, "config.json")  # <hub's cache>/snapshots/<commit>/config.json
    except (OSError, ValueError):  # loading the student explains it
        return None
    return path and f"commit:{Path(path).parent.name}"
