"""The configuration of ``ddk-cache build``: the teacher, the domains and the target."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, model_validator

from ddk_cache.format.layout import MOST_DOMAINS, MOST_SHARD_ROWS, DomainName, Target
from ddk_cache.storage.addresses import Address, Revision
from ddk_cache.util.configuration import CommandConfig, Config

NonEmpty = Annotated[str, StringConstraints(min_length=1)]

VALIDATION_ROWS = 500  # of a domain, by default
DroppableField = Literal["tools", "tool_calls", "reasoning_content", "content"]
DROPPABLE: tuple[DroppableField, ...] = get_args(DroppableField)
TARGET_OPTIONS = {
    "topk": {"top_k", "top_p", "temperature"},
    "sampled": {"samples", "temperature"},
    "label": set[str](),
}


class ModelConfig(Config):
    """A model on this machine or on the hub, and how an engine loads it."""

    model: Address = Field(description="folder or hub id of the model")
    revision: Revision | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="of weights and activations"
    )
    head_dtype: Literal["auto", "float32", "model"] = Field(
        "auto",
        description="of the logits. float32: the output head multiplies in float32, by the same weights; "
        "model: in dtype; auto: float32 on a CPU without bfloat16 arithmetic, where it is faster, else model",
    )
    engine_args: dict[str, Any] = Field({}, description="passed to vllm.LLM or from_pretrained")
    trust_remote_code: bool = Field(False, description="run code from the model's repository")

    @model_validator(mode="after")
    def _check_engine_args(self) -> Self:
        for key in ("model", "revision", "dtype", "trust_remote_code"):
            if key in self.engine_args:
                raise ValueError(f"engine_args.{key}: use the key {key} beside engine_args instead")
        if not isinstance(self.hf_overrides, dict):
            raise ValueError("engine_args.hf_overrides: must be a map")
        if "head_dtype" in self.hf_overrides:
            raise ValueError(
                "engine_args.hf_overrides.head_dtype: use the key head_dtype beside engine_args instead"
            )
        return self

    @property
    def hf_overrides(self) -> dict[str, Any]:
        """Of ``engine_args``: what replaces values of the model's config.json."""
        return self.engine_args.get("hf_overrides") or {}


class TeacherConfig(ModelConfig):
    """The model whose distributions the cache stores."""

    engine: Literal["vllm", "transformers"] = Field("vllm", description="transformers: the slow reference")
    check: Literal["auto", "always", "never"] = Field(
        "auto",
        description="before the build, compare the engine with transformers in float32 on a few documents; "
        "auto: if the model is small enough",
    )


class SourceConfig(Config):
    """Where rows come from.

    ``path``, ``name``, ``data_files``, ``data_dir``, ``split``, ``revision`` and ``streaming`` go to
    ``datasets.load_dataset``; ``path`` may also be a single file.
    """

    path: Address = Field(
        description="hub id, folder, file, glob of files, or builder: json, parquet, csv, text"
    )
    name: str | None = Field(None, description="the dataset's configuration, such as a dump or a language")
    data_files: Address | list[Address] | dict[str, Address | list[Address]] | None = Field(
        None, description="files or globs"
    )
    data_dir: Address | None = Field(None, description="folder inside the dataset")
    split: NonEmpty = Field("train", description="the dataset's split; slices such as train[:10%] work")
    revision: Revision | None = Field(None, description="branch, tag or commit of the dataset on the hub")
    streaming: bool = Field(False, description="read while downloading, without a local copy")
    sample_by: Literal["document", "paragraph", "line"] = Field(
        "document",
        description="text files: a document is the whole file, a paragraph between blank lines, or a line",
    )

    @property
    def columns(self) -> list[str]:
        """The columns that a row must have."""
        raise NotImplementedError


class DomainConfig(SourceConfig):
    """Where a domain's documents come from, and how many tokens to take."""

    text_column: NonEmpty = Field("text", description="column of texts, a document each")
    messages_column: NonEmpty | None = Field(
        None,
        description="instead of text_column: column of chat messages, in OpenAI's or ShareGPT's form; only "
        "the assistant's tokens carry loss",
    )
    prompt_column: NonEmpty | None = Field(
        None, description="instead of text_column, with completion_column: column of prompts"
    )
    completion_column: NonEmpty | None = Field(
        None,
        description="column of completions, which alone carry loss; texts or lists of messages",
    )
    prompt_format: Literal["chat", "plain"] | None = Field(
        None,
        description="prompts and completions that are texts. chat: turns of user and assistant in the chat "
        "template; plain: joined, with a line break where neither has white space; null: chat if the "
        "teacher's tokenizer has a template",
    )
    allow_dropped: tuple[DroppableField, ...] = Field(
        (),
        description="fields of a conversation that the chat template may leave out; rows that lose another "
        "are skipped. content: an empty answer, whose end alone carries loss",
    )
    tokens_column: NonEmpty | None = Field(
        None, description="instead of text_column: column of token ids, used unchanged"
    )
    loss_mask_column: NonEmpty | None = Field(
        None, description="with tokens_column: whether each token carries loss; null: all do"
    )
    logprobs_column: NonEmpty | None = Field(
        None,
        description="with tokens_column: log-probabilities, in nats, by the text's writer, one for each "
        "token that carries loss; the cache keeps them",
    )
    segments_column: NonEmpty | None = Field(
        None, description="with tokens_column: each token's document in the row, from 1; 0 is padding"
    )
    positions_column: NonEmpty | None = Field(
        None, description="with tokens_column: each token's position in its document (position_ids)"
    )
    group_column: NonEmpty | None = Field(
        None,
        description="column of values, such as a prompt's id or a repository: rows with the same value are "
        "all trained on or all held out",
    )
    teacher_prefix_column: NonEmpty | None = Field(
        None,
        description="column of texts that the teacher alone reads in front of a row's documents, such as a "
        "reference answer; null or empty: nothing",
    )
    score_column: NonEmpty | None = Field(
        None, description="with min_score: column of numbers, such as a reward or a test's result"
    )
    min_score: float | None = Field(None, description="skip rows whose score is lower, or null")
    long_conversations: Literal["cut", "truncate", "drop"] = Field(
        "cut",
        description="conversations longer than a row. cut: begin chunks at a user's message, so that no "
        "answer carries loss without its question; truncate: keep what fits into a row; drop: skip them",
    )
    max_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens to take, validation included; null: all documents"
    )
    teacher: TeacherConfig | None = Field(
        None,
        description="this domain's teacher: any key of teacher; other keys are inherited; engine_args "
        "replaces the whole map",
    )

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        kinds = [key for key in ("messages_column", "prompt_column", "tokens_column") if getattr(self, key)]
        if self.text_column != type(self).model_fields["text_column"].default:
            kinds.insert(0, "text_column")
        if len(kinds) > 1:
            raise ValueError(f"give {kinds[0]} or {kinds[1]}, not both")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("prompt_column and completion_column go together")
        if (self.score_column is None) != (self.min_score is None):
            raise ValueError("score_column and min_score go together")
        if self.prompt_format is not None and self.prompt_column is None:
            raise ValueError("prompt_format needs prompt_column")
        for key in ("loss_mask_column", "logprobs_column", "segments_column", "positions_column"):
            if getattr(self, key) and self.tokens_column is None:
                raise ValueError(f"{key} needs tokens_column")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that a row must have."""
        chat = [self.messages_column, self.prompt_column, self.completion_column]
        tokens = [self.tokens_column, self.loss_mask_column, self.logprobs_column]
        tokens += [self.segments_column, self.positions_column]
        content = [column for column in chat + tokens if column is not None] or [self.text_column]
        others = [self.group_column, self.teacher_prefix_column, self.score_column]
        return content + [column for column in others if column is not None]


class BuildConfig(CommandConfig):
    """Everything that decides the content of a cache."""

    teacher: TeacherConfig
    cache: Address = Field(description="folder, or URL: file:// s3:// gs:// az://")
    seq_length: Annotated[int, Field(ge=2, le=1_048_576)] = Field(description="tokens a row")
    target: Target = Field(Target(), description="what to store of the teacher's distribution")
    overlap: NonNegativeInt | None = Field(
        None,
        description="tokens of context repeated in front of a chunk of a long document, without loss; null: "
        "64, at most an eighth of seq_length",
    )
    validation_rows: PositiveInt | None = Field(
        None,
        description="rows to hold out of each domain; a number may take up to half of a small domain; null: "
        f"{VALIDATION_ROWS}, but at most 5% of the domain's rows",
    )
    validation_targets: bool = Field(
        False,
        description="store the held-out rows' targets too, to measure the KL to the teacher on them",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of the hold-out and of sampled targets"
    )
    shard_tokens: Annotated[int, Field(ge=1, le=1 << 28)] = Field(
        1_048_576, description="tokens a shard: the unit of work, of writing and of recovery"
    )
    domains: dict[DomainName, DomainConfig] = Field(
        min_length=1,
        max_length=MOST_DOMAINS,
        description="name: source; a name has letters, digits, '_' and '-', at most 64",
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Let each domain's teacher inherit from the top level."""
        match data:
            case {"teacher": dict() as common, "domains": dict() as domains}:
                merged = {
                    name: domain | {"teacher": common | domain["teacher"]}
                    if isinstance(domain, dict) and isinstance(domain.get("teacher"), dict)
                    else domain
                    for name, domain in domains.items()
                }
                return data | {"domains": merged}
        return data

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        if all(domain.teacher not in (None, self.teacher) for domain in self.domains.values()):
            raise ValueError("teacher: no domain uses it; move the first domain's teacher here")
        return self

    def teacher_of(self, domain: str) -> TeacherConfig:
        """Return a domain's teacher."""
        return self.domains[domain].teacher or self.teacher

    @property
    def teachers(self) -> list[TeacherConfig]:
        """The distinct teachers, the common one first."""
        teachers = [self.teacher, *map(self.teacher_of, self.domains)]
        return [teacher for index, teacher in enumerate(teachers) if teacher not in teachers[:index]]

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        most = min(self.seq_length // 2, self.seq_length - 2)
        if self.context > most:
            raise ValueError(
                f"overlap: must be at most {most}: half of seq_length, and room for a BOS and a new token"
            )
        return self

    @property
    def context(self) -> int:
        """Tokens of context in front of a chunk: ``overlap``, or its default (docs/data.md)."""
        return min(64, self.seq_length // 8) if self.overlap is None else self.overlap

    @property
    def teacher_length(self) -> int:
        """Most tokens that a teacher reads at once: a row, or twice as many with a prefix."""
        has_prefix = any(domain.teacher_prefix_column for domain in self.domains.values())
        return self.seq_length * (2 if has_prefix else 1)

    @property
    def length_key(self) -> str:
        """What decides ``teacher_length``, for messages."""
        is_longer = self.teacher_length > self.seq_length
        return "seq_length, twice for teacher_prefix_column" if is_longer else "seq_length"

    @property
    def most_validation_rows(self) -> int:
        """Rows to hold out of a large domain."""
        return self.validation_rows or VALIDATION_ROWS

    @property
    def rows_per_shard(self) -> int:
        """Rows in a shard: as many as fit into ``shard_tokens``, at least one."""
        return max(1, self.shard_tokens // self.seq_length)

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.rows_per_shard > MOST_SHARD_ROWS:
            most = MOST_SHARD_ROWS * self.seq_length
            raise ValueError(f"shard_tokens: must be at most {most}, which is {MOST_SHARD_ROWS} rows a shard")
        useless = Target.model_fields.keys() - {"kind"} - TARGET_OPTIONS[self.target.kind]
        for option in sorted(useless):
            # The default is allowed: a configuration that is printed has every key.
            if getattr(self.target, option) != Target.model_fields[option].default:
                raise ValueError(f"target.{option}: does nothing with kind: {self.target.kind}; leave it out")
        return self
