"""The configuration of ``ddk-cache build``: the teacher, the texts, and what is kept of them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from ddk_cache.configuration import Config
from ddk_cache.layout import DomainName, Target

NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class TeacherConfig(Config):
    """The model whose answers are kept."""

    model: NonEmpty = Field(description="folder or hub id of the teacher")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    engine: Literal["vllm", "transformers"] = Field("vllm", description="transformers: the slow reference")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="of weights and activations"
    )
    engine_args: dict[str, Any] = Field({}, description="handed on to vllm.LLM or from_pretrained")
    trust_remote_code: bool = Field(False, description="run the code that the model's repository brings")


class DomainConfig(Config):
    """Where one domain's documents come from, and how many tokens are taken.

    ``path``, ``name``, ``data_files``, ``data_dir``, ``split``, ``revision`` and ``streaming`` go to
    ``datasets.load_dataset``; ``path`` may also be a single file.
    """

    path: NonEmpty = Field(description="hub id, folder, file, or builder: json, parquet, csv, text")
    name: str | None = Field(None, description="the dataset's configuration, such as a dump or a language")
    data_files: str | list[str] | dict[str, str | list[str]] | None = Field(
        None, description="files or globs"
    )
    data_dir: str | None = Field(None, description="folder inside the dataset")
    split: NonEmpty = Field("train", description="the dataset's split; slices such as train[:10%] work")
    revision: str | None = Field(None, description="branch, tag or commit of the dataset on the hub")
    streaming: bool = Field(False, description="read while downloading, without a local copy")
    sample_by: Literal["document", "paragraph", "line"] = Field(
        "document", description="text files: a document is the whole file, what blank lines part, or a line"
    )
    text_column: NonEmpty = Field("text", description="column that holds a document's text")
    messages_column: NonEmpty | None = Field(
        None,
        description="instead of text_column: column of chat messages; only the assistant's tokens carry loss",
    )
    max_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens taken, validation included; null takes every document"
    )

    @model_validator(mode="after")
    def _one_column(self) -> Self:
        if self.messages_column is not None and "text_column" in self.model_fields_set:
            raise ValueError("give text_column or messages_column, not both")
        return self


class BuildConfig(Config):
    """Everything that decides what a cache holds."""

    teacher: TeacherConfig
    cache: NonEmpty = Field(description="folder, or URL: file:// s3:// gs:// az://")
    seq_length: Annotated[int, Field(ge=2, le=1_048_576)] = Field(description="tokens a row")
    target: Target = Field(Target(), description="what is kept of the teacher's distribution")
    validation_rows: Annotated[int, Field(ge=1)] = Field(500, description="rows held out of each domain")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of the validation choice and the draws"
    )
    shard_tokens: Annotated[int, Field(ge=1)] = Field(
        262_144, description="tokens a shard: the unit of work, of writing and of recovery"
    )
    domains: dict[DomainName, DomainConfig] = Field(
        min_length=1, description="name: source; a name has letters, digits, '_' and '-', at most 64"
    )

    @property
    def rows_per_shard(self) -> int:
        """Rows in a shard: as many as fit into ``shard_tokens``, at least one."""
        return max(1, self.shard_tokens // self.seq_length)
