"""generate.json: the description of a folder of completions, for resuming and for reading it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from ddk_build.config import BuildConfig, DomainConfig
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.layout import Digest, DomainName, TeacherInfo
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.util.configuration import Config, first_problem

NOTE = "generate.json"  # beside the domains' folders
MOST_NOTE_BYTES = 1 << 20
VOCABULARY = "vocabulary"  # beside it: the writer's tokenizer, compressed
COLUMNS = {"tokens_column": "tokens", "loss_mask_column": "loss_mask", "logprobs_column": "logprobs"}
"""A build's keys for the columns of the parquet files."""


class WrittenDomain(Config):
    """The prompts of a domain, and what came of them."""

    source: dict[str, Any] = Field(description="the configuration's keys")
    prompts: NonNegativeInt = Field(description="prompts taken")
    prompt_ids: Digest = Field(description="sha256 of the prompts' ids, in order")
    skipped: dict[str, NonNegativeInt] = Field(description="rows without a prompt, by reason")
    completions: NonNegativeInt | None = Field(description="rows in the files; null until all are written")


class Written(Config):
    """The content of generate.json."""

    format: Literal["ddk-generate"] = "ddk-generate"
    version: Literal[1] = 1
    writer: TeacherInfo = Field(description="the model that wrote the completions")
    tokenizer_hash: Digest
    seed: NonNegativeInt
    sampling: dict[str, Any]
    drop_truncated: bool
    shard_tokens: int
    versions: dict[str, str] = Field(description="of the packages, when the folder was begun")
    domains: dict[DomainName, WrittenDomain]
    writer_teachers: tuple[str, ...] | None = Field(
        None, description="the teachers that the writer was distilled from; null: unknown"
    )

    @classmethod
    def read(cls, folder: Path) -> "Written | None":
        """Return the note of a folder of completions; None if it has none.

        Raises ConfigError if the note is damaged or of another version.
        """
        path = folder / NOTE
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file:
                return cls.model_validate_json(file.read(MOST_NOTE_BYTES), strict=True)
        except ValidationError as error:
            raise ConfigError(
                f"{path}: is not a note of ddk-cache generate: {first_problem(error, cls)}"
            ) from error


def teachers_of(model: str) -> tuple[str, ...] | None:
    """Return the teachers of a student that ``ddk-cache train`` left in a folder; None for others."""
    try:
        with (Path(model) / "run.json").open("rb") as file:
            return _Student.model_validate_json(file.read(MOST_NOTE_BYTES)).teachers
    except (OSError, ValidationError):
        return None


class _Student(BaseModel):
    """What counts here of a run.json."""

    teachers: tuple[str, ...]


def with_columns(config: BuildConfig) -> BuildConfig:
    """Return the configuration with the columns of each domain whose path is a folder of completions.

    Raises ConfigError if the folder is not finished, or holds several domains.
    """
    domains = {}
    for name, domain in config.domains.items():
        columns: dict[str, str] = {}
        if written_by(name, domain) is not None:
            columns = {"group_column": domain.group_column or "prompt_id"}
            if domain.columns[0] == "text" and "text_column" not in domain.model_fields_set:
                columns |= COLUMNS
        domains[name] = domain.model_copy(update=columns)
    return config.model_copy(update={"domains": domains})


def written_by(name: str, domain: DomainConfig) -> Written | None:
    """Return the note of the folder of completions that a domain's path leads to; None for other paths.

    Raises ConfigError where the folder is not finished, or holds several domains.
    """
    folder, key = Path(domain.path), f"domains.{name}.path"
    if (folder / NOTE).is_file():
        first = next(iter(sorted(path.name for path in folder.iterdir() if path.is_dir())), "NAME")
        raise ConfigError(
            f"{key}: {folder} holds a folder for each domain; give one, such as {folder / first}"
        )
    note = Written.read(folder.parent) if folder.is_dir() else None
    if note is None or folder.name not in note.domains:
        return None
    completions = note.domains[folder.name].completions
    if not completions:
        state = (
            "holds no completions" if completions == 0 else "is not finished; run ddk-cache generate again"
        )
        raise ConfigError(f"{key}: {folder} {state}")
    return note


def writers(config: BuildConfig, expected: Vocabulary) -> dict[str, dict[str, Any]]:
    """Return who wrote the text of each domain that is a folder of completions, as JSON values.

    Raises ConfigError where the writer's tokenizer gives a token another id than ``expected``, the teacher's.
    """
    by_domain = {}
    for name, domain in config.domains.items():
        note = written_by(name, domain)
        if note is None:
            continue
        if domain.tokens_column is not None and note.tokenizer_hash != expected.fingerprint():
            _check_ids(name, Path(domain.path).parent, expected)
        by_domain[name] = note.writer.model_dump(mode="json") | {"sampling": note.sampling, "seed": note.seed}
        if note.writer_teachers is not None:
            by_domain[name]["teachers"] = list(note.writer_teachers)
    return by_domain


def _check_ids(name: str, folder: Path, expected: Vocabulary) -> None:
    """Raise ConfigError unless all of the writer's tokens mean the same to the teacher; roles may differ."""
    try:
        conflicts = Vocabulary.decompress((folder / VOCABULARY).read_bytes()).conflicts(expected)
    except (OSError, CacheError):
        conflicts = ["its vocabulary cannot be read"]
    if conflicts:
        raise ConfigError(
            f"domains.{name}.path: its writer's tokenizer is not the teacher's: {'; '.join(conflicts)}; let "
            "a model of the teacher's family write, or give text_column: text"
        )
