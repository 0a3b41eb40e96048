"""The configuration of ``ddk-cache train``: the student, the mixture, and how it is optimised.

Tokenizer, row length and target are not here: they come from the cache.
"""

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
    model_validator,
)

from ddk_cache.addresses import Address
from ddk_cache.configuration import Config

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Divergence = Literal["forward", "reverse", "jensen_shannon"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]


def _trackers(value: object) -> object:
    """``none``, one name or a list of names, as a list."""
    names = [value] if isinstance(value, str) else value
    return [name for name in names if name != "none"] if isinstance(names, list | tuple) else names


def _no_repeats(names: list[Tracker]) -> list[Tracker]:
    if len(set(names)) < len(names):
        raise ValueError("names the same tracker twice")
    return names


class LoraConfig(Config):
    """Low-rank adapters (peft) instead of training every weight."""

    r: PositiveInt = Field(16, description="rank of the adapters")
    alpha: PositiveInt = Field(32, description="the adapters are scaled by alpha / r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="on the adapters' input")
    target_modules: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] = Field(
        "all-linear", description="names of the layers that get an adapter, or all-linear"
    )
    merge: bool = Field(False, description="write a full model at the end, not the adapters alone")


class Schedule(Config):
    """A weight that changes over the run."""

    start: NonNegativeFloat = Field(description="in the first step")
    end: NonNegativeFloat = Field(description="from the step number `steps` on")
    shape: Literal["linear", "cosine"] = Field("linear", description="cosine: slow at both ends")
    steps: PositiveInt | None = Field(None, description="optimizer steps from start to end; null: max_steps")


def _tag(value: object) -> str:
    return "[schedule]" if isinstance(value, dict | Schedule) else "[number]"


# Told apart by what is written, so that a mistake is told of that alone; tags in brackets are no keys.
Weight = Annotated[
    Annotated[NonNegativeFloat, Tag("[number]")] | Annotated[Schedule, Tag("[schedule]")], Discriminator(_tag)
]


class DomainObjective(Config):
    """What of one domain differs from the others."""

    gamma: Weight | None = Field(None, description="this domain's, instead of the common one")
    cross_entropy_weight: NonNegativeFloat | None = Field(
        None, description="this domain's, instead of the common one"
    )
    max_epochs: PositiveFloat | None = Field(None, description="this domain's, instead of the common one")


class TrainConfig(Config):
    """Everything that decides what a run does."""

    cache: Address = Field(description="folder, or URL: file:// s3:// gs:// az://")
    student: Address = Field(description="folder or hub id of the model to train (safetensors)")
    output_dir: Address = Field(description="folder for metrics, checkpoints and the finished student")
    strategy: Literal["ddk", "gap", "uniform", "proportional", "static"] = Field(
        "ddk",
        description="ddk: by the discrepancy factor; gap: by the gap in cross-entropy; uniform: every domain "
        "alike; proportional: by size; static: by weights",
    )
    weights: dict[str, NonNegativeFloat] | None = Field(
        None, description="static: relative weight of every domain"
    )
    share_of: Literal["labels", "rows"] = Field(
        "labels",
        description="what the factor shares out. labels: tokens that carry loss, so that a domain with few "
        "of them a row gets more rows; rows: the paper's, the same for packed text. proportional is by rows",
    )
    max_epochs: PositiveFloat | None = Field(
        None,
        description="passes over a domain's training rows at most; then the others are drawn more often, and "
        "the run ends when all are used up. null: a domain that runs out starts over, as in the paper",
    )
    smoothing: Annotated[float, Field(ge=0, le=1)] | None = Field(
        0.5, description="alpha of equation 2; null takes the factor straight from equation 1"
    )
    gap_temperature: PositiveFloat = Field(
        1.0, description="gap: the factor is softmax(gap / gap_temperature); small follows the largest gap"
    )
    distill_interval: PositiveInt = Field(
        1000, description="K: optimizer steps between two measurements of the student"
    )
    gamma: Weight = Field(
        0.2,
        description="weight of the KL term, a number or {start, end, shape: linear | cosine, steps}; 0 is "
        "plain continued pretraining and reads no targets",
    )
    cross_entropy_weight: NonNegativeFloat = Field(
        1.0, description="weight of the cross-entropy with the labels; 0 is pure distillation"
    )
    domains: dict[str, DomainObjective] = Field(
        {}, description="gamma, cross_entropy_weight, max_epochs of single domains, by name"
    )
    divergence: Divergence = Field(
        "forward",
        description="of the KL term. forward: KL(teacher ‖ student); reverse: KL(student ‖ teacher); "
        "jensen_shannon: between both, by beta",
    )
    beta: Annotated[float, Field(ge=0.001, le=0.999)] = Field(
        0.5,
        description="jensen_shannon: the teacher's weight; towards 0 like forward, towards 1 like reverse",
    )
    temperature_squared: bool = Field(
        False,
        description="multiply gamma by temperature squared (Hinton et al. 2015; the DDK paper does not)",
    )
    temperature: PositiveFloat = Field(
        1.0, description="of both softmaxes in the KL term; must equal the cache's"
    )
    tail: Literal["bucket", "label", "drop"] = Field(
        "bucket",
        description="mass outside the stored entries. bucket: one more outcome; label: given to the true "
        "label; drop: left out, the rest renormalised",
    )
    max_steps: PositiveInt = Field(30_000, description="optimizer steps")
    stop_ratio: PositiveFloat | None = Field(
        None, description="stop once every domain's student/teacher perplexity ratio is at or below it"
    )
    per_device_train_batch_size: PositiveInt = Field(
        8, description="rows a process takes through the student at a time"
    )
    gradient_accumulation_steps: PositiveInt = Field(1, description="such batches in an optimizer step")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: bitsandbytes', with states of one byte (2 instead of 8 a weight)"
    )
    learning_rate: PositiveFloat = Field(3.0e-5, description="at the end of the warm-up")
    min_learning_rate: NonNegativeFloat = Field(3.0e-6, description="at max_steps, where the cosine ends")
    warmup_steps: NonNegativeInt = Field(1000, description="steps of linear warm-up from 0")
    weight_decay: NonNegativeFloat = Field(0.1, description="on matrices only")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to it")
    bf16: bool = Field(
        True, description="bfloat16 activations over float32 weights; the student is saved in bfloat16"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    attn_implementation: Attention = Field(
        "auto",
        description="auto: sdpa where the architecture has it and it is right, else eager; "
        "flash_attention_2 needs CUDA, bf16 and the package flash-attn",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        0.0, description="every dropout of the student; null leaves what its configuration says"
    )
    fsdp: bool = Field(False, description="several processes: shard the student over them (FSDP2)")
    lora: LoraConfig | None = Field(None, description="train adapters instead of the whole student")
    trust_remote_code: bool = Field(False, description="run the code that the student's repository brings")
    allow_incomplete: bool = Field(False, description="train on what an unfinished cache holds")
    num_reader_threads: PositiveInt = Field(
        2, description="threads that read and decode rows ahead of the step"
    )
    timeout_minutes: PositiveFloat = Field(
        30.0, description="several processes: how long one waits for the others before it gives up"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of the draws, dropout and adapters")
    logging_steps: PositiveInt = Field(10, description="steps a line of metrics covers")
    save_steps: PositiveInt = Field(1000, description="steps between two checkpoints")
    save_total_limit: PositiveInt = Field(2, description="newest checkpoints kept")
    sample_tokens: NonNegativeInt = Field(
        32,
        description="tokens that the student adds to a held-out beginning of each domain before and after "
        "training, for the report; 0: none",
    )
    save_behind: bool = Field(
        False, description="write checkpoints beside training, from a copy in the machine's memory"
    )
    report_to: Annotated[list[Tracker], BeforeValidator(_trackers), AfterValidator(_no_repeats)] = Field(
        ["tensorboard"], description="none, or any of tensorboard, wandb, trackio"
    )

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's targets are in the loss, of one domain at least."""
        return any(
            gamma not in (0, None) for gamma in (self.gamma, *(d.gamma for d in self.domains.values()))
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.strategy == "static") != (self.weights is not None):
            raise ValueError("weights: must be given with strategy static, and with no other")
        if self.weights is not None and not sum(self.weights.values()) > 0:
            raise ValueError("weights: must not all be 0")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate: must not be above learning_rate")
        if self.attn_implementation == "flash_attention_2" and not self.bf16:
            raise ValueError("attn_implementation: flash_attention_2 needs bf16: true")
        if self.divergence != "forward" and self.tail != "bucket":
            raise ValueError(
                f"divergence: {self.divergence} needs tail: bucket; without it the teacher has no mass where "
                "the student has some"
            )
        for key, needed, is_there in (
            ("beta", "divergence: jensen_shannon", self.divergence == "jensen_shannon"),
            ("smoothing", "strategy: ddk", self.strategy == "ddk"),
            ("gap_temperature", "strategy: gap", self.strategy == "gap"),
        ):
            # At its default it may stand there, as in the config.yaml of a run.
            if not is_there and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: does nothing without {needed}; leave it out")
        if self.fsdp and self.optimizer == "adamw_8bit":
            raise ValueError("optimizer: adamw_8bit does not work with fsdp: true; take adamw")
        return self
