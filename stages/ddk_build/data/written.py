"""generate.json: what a folder of completions says about itself, for whoever resumes or reads it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import Digest, DomainName, TeacherInfo
from ddk_cache.util.configuration import Config, first_problem

NOTE = "generate.json"  # beside the domains' folders
MOST_NOTE_BYTES = 1 << 20
COLUMNS = {"tokens_column": "tokens", "loss_mask_column": "loss_mask", "logprobs_column": "logprobs"}
"""A build's keys for the columns of the parquet files."""


class WrittenDomain(Config):
    """The prompts of one domain, and what became of them."""

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

    @classmethod
    def read(cls, folder: Path) -> "Written | None":
        """Return the note of a folder of completions; None if it has none.

        Raises
        ------
        ConfigError
            The note is damaged or of another version.
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
