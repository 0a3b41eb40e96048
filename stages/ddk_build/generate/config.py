"""The configuration of ``ddk-cache generate``: the model, the prompts and how it samples."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ddk_build.config import ModelConfig, NonEmpty, SourceConfig, TeacherConfig
from ddk_cache.format.layout import MOST_DOMAINS, DomainName
from ddk_cache.storage.addresses import LocalFolder
from ddk_cache.util.configuration import CommandConfig, Config

WRITTEN_COLUMNS = ("tokens", "loss_mask", "logprobs", "prompt_id", "sample", "finish_reason", "text")


class Sampling(Config):
    """How the model chooses its tokens, and when it stops."""

    temperature: Annotated[float, Field(ge=0, le=2)] = Field(  # vLLM's bound
        1.0, description="softmax(logits / this); 0: always the likeliest token"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="sample from this nucleus")
    top_k: Annotated[int, Field(ge=0)] = Field(
        0, description="sample from the likeliest top_k tokens; 0: from all"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="sample from tokens with this share of the best one's probability; 0: from all"
    )
    max_tokens: PositiveInt = Field(1024, description="most tokens of a completion")
    stop: list[NonEmpty] = Field([], description="texts after which a completion ends")
    samples: PositiveInt = Field(1, description="completions of each prompt")

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("samples: must be 1 with temperature 0, which writes the same every time")
        return self


class PromptConfig(SourceConfig):
    """Where a domain's prompts come from, and how many to take."""

    messages_column: NonEmpty | None = Field(
        None,
        description="column of chat messages, in OpenAI's or ShareGPT's form; the model answers the last one "
        "that is not the assistant's",
    )
    prompt_column: NonEmpty | None = Field(
        None, description="instead of messages_column: column of texts, or of lists of messages"
    )
    prompt_format: Literal["chat", "plain"] | None = Field(
        None,
        description="prompt_column with texts. chat: a user's message in the chat template; plain: the text "
        "is continued; null: chat if the model's tokenizer has a template",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="options of the model's chat template, such as enable_thinking: false"
    )
    allow_dropped: tuple[Literal["tools", "tool_calls", "reasoning_content"], ...] = Field(
        (),
        description="fields of a conversation that the chat template may leave out; rows that lose another "
        "are skipped",
    )
    keep_columns: list[NonEmpty] = Field(
        [], description="columns to copy into each completion's row, such as a reference answer to score by"
    )
    max_prompts: PositiveInt | None = Field(None, description="prompts to take; null: all")

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if (self.messages_column is None) == (self.prompt_column is None):
            raise ValueError("give messages_column or prompt_column")
        if self.prompt_format is not None and self.prompt_column is None:
            raise ValueError("prompt_format needs prompt_column")
        for column in self.keep_columns:
            if column in WRITTEN_COLUMNS or self.keep_columns.count(column) > 1:
                raise ValueError(f"keep_columns: there would be two columns {column!r}")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that a row must have, that of the prompt first."""
        return [self.messages_column or str(self.prompt_column), *self.keep_columns]


class GenerateConfig(ModelConfig, CommandConfig):
    """Everything that decides the completions."""

    output: LocalFolder = Field(description="folder of the completions: a folder of parquet files a domain")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="each completion's own seed is made of it, the prompt and the sample's number"
    )
    sampling: Sampling = Field(Sampling(), description="how the model chooses its tokens")
    drop_truncated: bool = Field(False, description="leave out the completions that max_tokens cut")
    shard_tokens: Annotated[int, Field(ge=1, le=1 << 28)] = Field(
        1_048_576, description="most tokens written into a file: the unit of writing and of recovery"
    )
    domains: dict[DomainName, PromptConfig] = Field(
        min_length=1,
        max_length=MOST_DOMAINS,
        description="name: prompts; a name has letters, digits, '_' and '-', at most 64",
    )

    @property
    def writer(self) -> TeacherConfig:
        """The model, as a build describes a teacher."""
        return TeacherConfig(**{key: getattr(self, key) for key in ModelConfig.model_fields})

    @property
    def shard_prompts(self) -> int:
        """Prompts in a shard: as many as fit into ``shard_tokens``, at least one."""
        return max(1, self.shard_tokens // (self.sampling.samples * self.sampling.max_tokens))
