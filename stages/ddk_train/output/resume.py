"""Find the checkpoint to resume from: the newest intact one, if it belongs to the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ddk_cache import Cache
from ddk_cache.cache.codebooks import codebook_digest
from ddk_cache.errors import ConfigError
from ddk_cache.util.configuration import first_problem, flat
from ddk_train.config import TrainConfig
from ddk_train.errors import TrainingError
from ddk_train.output.checkpoint import Progress, checkpoints, step_of
from ddk_train.output.sums import damage
from ddk_train.output.tracking import LogState
from ddk_train.student.distributed import Ranks
from ddk_train.student.identity import student_content

LAYOUT = 5  # of the contents of a checkpoint

# Keys that may change on resume, because they do not change the results. A cache is recognised by its
# contents. Dividing the rows of a step differently changes last bits only.
FREE_KEYS = {
    "cache", "output_dir", "logging_steps", "save_steps", "save_total_limit", "save_behind", "report_to",
    "num_reader_threads", "timeout_minutes", "trust_remote_code", "fsdp", "sample_tokens", "run_name",
    "project", "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip


class State(BaseModel):
    """The contents of state.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    progress: Progress
    fingerprint: dict[str, Any]
    files: dict[str, LogState]


class Start(NamedTuple):
    """The checkpoint to resume from, and its state."""

    path: Path
    state: State

    @property
    def extends(self) -> bool:
        """Whether the checkpoint is the last one of a finished run, whose ``max_steps`` is raised."""
        return bool(self.state.fingerprint["max_steps"] == self.state.progress.step)


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be used; the message gives the reason."""


def fingerprint(config: TrainConfig, cache: Cache, ranks: Ranks) -> dict[str, Any]:
    """Return the values that must not change when a run resumes, by dotted key."""
    values = {
        "layout of the checkpoint": LAYOUT,
        **flat(config.model_dump(mode="json", exclude=FREE_KEYS)),
        "files of the student": student_content(config),
        "rows in a step": ranks.rows_in_a_step(config),
        "domains": list(cache.domains),  # their order decides the draws
        **flat(cache.manifest.model_dump(mode="json", exclude={"teachers", "domains"}), "cache."),
    }
    for name in cache.domains:
        train, state = cache[name].train, cache[name].state
        values |= flat(cache.manifest.teacher_of(name).settings, f"teacher of {name}.")
        values |= flat(cache.manifest.domain(name).source, f"source of {name}.")
        values[f"training rows of {name}"] = len(train)
        values[f"validation rows of {name}"] = len(cache[name].validation)
        values[f"teacher_cross_entropy of {name}"] = state.teacher_cross_entropy
        values[f"codebook of {name}"] = train.codebook and codebook_digest(train.codebook)
        values[f"build of {name}"] = cache.manifest.domain(name).build_id
    return values


def find_checkpoint(folder: Path, expected: dict[str, Any], log: Callable[[str], None]) -> Start | None:
    """Return the newest intact checkpoint, or None if the run has none yet; reads every byte of it.

    Raises ConfigError, with all differences, if it belongs to another run, and TrainingError if all
    checkpoints are damaged.
    """
    problems = []
    for path in reversed(checkpoints(folder)):
        try:
            start = Start(path, _read_matching_state(path, expected))
        except DamagedCheckpoint as error:
            problems.append(f"{path.name}: {error}")
            continue
        if problems:
            log(f"damaged: {'; '.join(problems)}; resuming from {path}")
        return start
    if problems:
        raise TrainingError(
            f"--resume: {folder} has no whole checkpoint: {'; '.join(problems)}; train again elsewhere"
        )
    return None


def read_state(path: Path) -> State:
    """Return the state of a checkpoint, whose every byte is checked; raises DamagedCheckpoint."""
    for problem in damage(path):
        raise DamagedCheckpoint(problem)
    raw = (path / "state.json").read_bytes()
    try:
        state = State.model_validate_json(raw)
    except ValidationError as error:
        raise DamagedCheckpoint(f"state.json: {first_problem(error, State)}") from error
    if state.progress.step != step_of(path):
        raise DamagedCheckpoint(f"state.json: is of step {state.progress.step}")
    return state


def _read_matching_state(path: Path, expected: dict[str, Any]) -> State:
    """Return a checkpoint's state; raise DamagedCheckpoint, or ConfigError for another run's."""
    state = read_state(path)
    stored = state.fingerprint
    keys = {**stored, **expected}
    if stored.get("max_steps") == state.progress.step < expected["max_steps"]:  # a finished run, extended
        del keys["max_steps"]
    differences = [
        f"{key} was {_shown(stored, key)} and is {_shown(expected, key)}"
        for key in keys
        if _shown(stored, key) != _shown(expected, key)
    ]
    if differences:
        hint = "; max_steps can be raised when a run has ended" if "max_steps was" in str(differences) else ""
        raise ConfigError(f"--resume: {path} belongs to another run: {'; '.join(differences)}{hint}")
    progress, sampler = state.progress, state.progress.sampler
    fits = (
        len(progress.factor) == len(sampler.drawn) == len(expected["domains"])
        and progress.start < progress.step <= expected["max_steps"]
        and progress.interval == sampler.interval
        and sum(sampler.drawn) == progress.start * expected["rows in a step"]
    )
    if not fits:
        raise DamagedCheckpoint("state.json: its counts do not fit together")
    return state


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
