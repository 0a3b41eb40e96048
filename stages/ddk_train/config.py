"""The configuration of ``ddk-cache train``. Tokenizer, row length and target come from the cache."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
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

from ddk_cache.storage.addresses import Address, LocalFolder
from ddk_cache.util.configuration import CommandConfig, Config

AUTO_EPOCHS = 8  # passes over a domain, after which the KL of a small one rises (docs/results.md)
MANY_EPOCHS = 20  # passes over a domain, after which a student learns it by heart
MOST_STEPS = 10**12  # their rows are counted in 64 bits

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Divergence = Literal["forward", "reverse", "jensen_shannon"]
Tail = Literal["bucket", "label", "drop"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]


def _trackers(value: object) -> object:
    """Return ``none``, one name or a list of names as a list."""
    names = [value] if isinstance(value, str) else value
    return [name for name in names if name != "none"] if isinstance(names, list | tuple) else names


class LoraConfig(Config):
    """Low-rank adapters (peft) instead of training every weight."""

    r: PositiveInt = Field(16, description="rank of the adapters")
    alpha: PositiveInt = Field(32, description="adapters are scaled by alpha / r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout on the adapters' input")
    target_modules: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] = Field(
        "all-linear", description="names of the layers that get adapters, or all-linear"
    )
    merge: bool = Field(False, description="save a full model at the end instead of the adapters")
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4: keep the student's frozen weights in 4 bits (QLoRA, by bitsandbytes)"
    )

    @model_validator(mode="after")
    def _check_quantize(self) -> Self:
        if self.quantize and self.merge:
            raise ValueError("merge: does not work with quantize; merge the adapters after training")
        return self


class Schedule(Config):
    """A weight that changes over the run."""

    start: NonNegativeFloat = Field(description="value in the first step")
    end: NonNegativeFloat = Field(description="value from step `steps` on")
    shape: Literal["linear", "cosine"] = Field("linear", description="cosine changes slowly at both ends")
    steps: PositiveInt | None = Field(None, description="optimizer steps from start to end; null: max_steps")


def _tag(value: object) -> str:
    return "[schedule]" if isinstance(value, dict | Schedule) else "[number]"


# Tags report a mistake for the written kind only; error messages leave out tags in brackets.
Weight = Annotated[
    Annotated[NonNegativeFloat, Tag("[number]")] | Annotated[Schedule, Tag("[schedule]")], Discriminator(_tag)
]


Caches = Annotated[
    Annotated[Address, Tag("[address]")] | Annotated[list[Address], Field(min_length=1), Tag("[list]")],
    Discriminator(lambda value: "[list]" if isinstance(value, list) else "[address]"),
]


class DomainObjective(Config):
    """The keys of one domain that differ from those of the run."""

    gamma: Weight | None = Field(None, description="this domain's value, instead of the run's")
    cross_entropy_weight: NonNegativeFloat | None = Field(
        None, description="this domain's value, instead of the run's"
    )
    policy_gradient_weight: NonNegativeFloat | None = Field(
        None, description="this domain's value, instead of the run's"
    )
    max_epochs: PositiveFloat | None = Field(None, description="this domain's value, instead of the run's")


class TrainConfig(CommandConfig):
    """The configuration of a training run."""

    cache: Caches = Field(
        description="folder or URL (file:// s3:// gs:// az:// hf://), or a list of several: the student is "
        "trained on the domains of all"
    )
    student: Address = Field(description="folder or hub id of the model to train (safetensors)")
    output_dir: LocalFolder = Field(description="folder for metrics, checkpoints and the trained student")
    strategy: Literal["ddk", "auto", "gap", "uniform", "proportional", "static"] = Field(
        "ddk",
        description="how domains share the rows. ddk: by the paper's discrepancy factor; auto: by the same "
        "factor within 8 epochs of each domain (docs/method.md); gap: by the gap in cross-entropy; uniform: "
        "equally; proportional: by size; static: by weights",
    )
    weights: dict[str, NonNegativeFloat] | None = Field(
        None, description="static: relative weight of each domain"
    )
    share_of: Literal["labels", "rows"] = Field(
        "labels",
        description="the unit of a share. labels: tokens with loss, so a domain with few of them in a row "
        "gets more rows; rows: as in the paper, the same for packed text. proportional is always by rows",
    )
    max_epochs: PositiveFloat | None = Field(
        None,
        description="largest number of passes over a domain's training rows, spread over the run: a domain "
        "is never drawn faster than lasts to the end, the others take the rest, and the run ends when all "
        "are used up. null: a domain that runs out starts over, as in the paper",
    )
    smoothing: Annotated[float, Field(ge=0, le=1)] | None = Field(
        0.5, description="ddk, auto: alpha of equation 2; null takes the factor from equation 1 alone"
    )
    gap_temperature: PositiveFloat = Field(
        1.0,
        description="gap: the factor is softmax(gap / gap_temperature); small values favour the largest gap",
    )
    distill_interval: PositiveInt = Field(
        1000, description="K: optimizer steps between two measurements of the student"
    )
    gamma: Weight = Field(
        0.2,
        description="weight of the KL term: a number or {start, end, shape: linear | cosine, steps}; 0 is "
        "plain continued pretraining and reads no targets",
    )
    cross_entropy_weight: NonNegativeFloat = Field(
        1.0, description="weight of the cross-entropy with the labels; 0 is pure distillation"
    )
    policy_gradient_weight: NonNegativeFloat = Field(
        0.0,
        description="weight of the policy gradient towards the teacher, on text that the student wrote "
        "(ddk-cache generate): reverse KL by samples; needs the labels' log-probabilities alone",
    )
    advantage_clip: PositiveFloat = Field(
        20.0,
        description="policy gradient: most nats by which log p of the teacher counts as above or below that "
        "of the student",
    )
    importance_clip: Annotated[float, Field(ge=1)] = Field(
        5.0,
        description="policy gradient: a token whose probability has changed since it was written by more "
        "than this factor, up or down, is left out",
    )
    domains: dict[str, DomainObjective] = Field(
        {}, description="weights of the loss and max_epochs of single domains, by name"
    )
    divergence: Divergence = Field(
        "forward",
        description="divergence of the KL term. forward: KL(teacher ‖ student); reverse: KL(student ‖ "
        "teacher); jensen_shannon: between both, by beta",
    )
    beta: Annotated[float, Field(ge=0.001, le=0.999)] = Field(
        0.5,
        description="jensen_shannon: weight of the teacher; near 0 like forward, near 1 like reverse",
    )
    temperature_squared: bool = Field(
        False,
        description="multiply gamma by temperature squared (Hinton et al. 2015; the DDK paper does not)",
    )
    temperature: PositiveFloat = Field(
        1.0, description="softmax temperature of teacher and student in the KL term; must equal the cache's"
    )
    tail: Tail = Field(
        "bucket",
        description="the teacher's mass outside the stored entries. bucket: one more outcome; label: added "
        "to the true label; drop: left out, the entries renormalised",
    )
    max_steps: Annotated[PositiveInt, Field(le=MOST_STEPS)] = Field(30_000, description="optimizer steps")
    stop_ratio: PositiveFloat | None = Field(
        None, description="stop once every domain's student/teacher perplexity ratio is at or below it"
    )
    per_device_train_batch_size: PositiveInt = Field(8, description="rows in a batch of one process")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="batches of one process in an optimizer step"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw_8bit: from bitsandbytes, 2 bytes of optimizer state per weight instead of 8",
    )
    learning_rate: PositiveFloat = Field(3.0e-5, description="learning rate at the end of the warm-up")
    min_learning_rate: NonNegativeFloat = Field(
        3.0e-6, description="learning rate at max_steps, where the cosine ends"
    )
    warmup_steps: Annotated[NonNegativeInt, Field(le=MOST_STEPS)] = Field(
        1000, description="steps of linear warm-up from 0"
    )
    weight_decay: NonNegativeFloat = Field(0.1, description="applied to matrices only")
    max_grad_norm: PositiveFloat = Field(1.0, description="norm to which gradients are clipped")
    bf16: bool = Field(
        True, description="bfloat16 activations with float32 weights; the student is saved in bfloat16"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    attn_implementation: Attention = Field(
        "auto",
        description="auto: sdpa where the architecture supports it correctly, else eager; "
        "flash_attention_2 needs CUDA, bf16 and the package flash-attn",
    )
    torch_compile: bool = Field(
        False,
        description="compile the student by torch.compile: a minute or more at the start, then faster steps; "
        "for rows packed in one shape, and not with fsdp",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        0.0, description="value of every dropout in the student; null keeps those of its configuration"
    )
    freeze: Literal["body"] | None = Field(
        None, description="body: train the embeddings and the head alone, as after `ddk-cache transplant`"
    )
    fsdp: bool = Field(False, description="with several processes: shard the student over them (FSDP2)")
    lora: LoraConfig | None = Field(None, description="train adapters instead of the full student")
    trust_remote_code: bool = Field(False, description="run Python code from the student's repository")
    allow_incomplete: bool = Field(False, description="train on the finished rows of an unfinished cache")
    num_reader_threads: PositiveInt = Field(
        2, description="threads that read and decode rows ahead of the step"
    )
    timeout_minutes: PositiveFloat = Field(
        30.0, description="with several processes: how long one waits for the others before it fails"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of draws, dropout and adapters")
    logging_steps: PositiveInt = Field(10, description="steps between two lines of metrics")
    save_steps: PositiveInt = Field(1000, description="steps between two checkpoints")
    save_total_limit: PositiveInt = Field(2, description="number of newest checkpoints that are kept")
    keep_best: bool = Field(
        False,
        description="save the student of the measurement with the lowest held-out cross-entropy, mean of the "
        "domains, instead of the last one",
    )
    sample_tokens: NonNegativeInt = Field(
        32,
        description="length of the text that the student generates from a held-out prompt of each domain "
        "before and after training, for the report; 0: none",
    )
    save_behind: bool = Field(
        False, description="write checkpoints in the background, from a copy in the machine's memory"
    )
    run_name: NonEmpty | None = Field(
        None, description="name of the run for trackers, report and card; null: the name of output_dir"
    )
    project: NonEmpty | None = Field(
        None,
        description="project of wandb and trackio; null: WANDB_PROJECT or TRACKIO_PROJECT, or else ddk-cache",
    )
    report_to: Annotated[list[Tracker], BeforeValidator(_trackers)] = Field(
        ["tensorboard"], description="none, or any of tensorboard, wandb, trackio"
    )

    @property
    def caches(self) -> list[str]:
        """The folders or URLs of all caches."""
        return [self.cache] if isinstance(self.cache, str) else self.cache

    @property
    def by_ddk(self) -> bool:
        """Whether the shares of domains are the paper's factor."""
        return self.strategy in ("ddk", "auto")

    def most_epochs(self, domain: str, passes: float) -> float:
        """Return the most passes over a domain in a run of so many passes over the whole cache; may be inf.

        Where ``max_epochs`` is not set, ``auto`` takes ``AUTO_EPOCHS``, or twice the run's passes if that is
        more: alone this never ends a run.
        """
        default = max(AUTO_EPOCHS, 2 * passes) if self.strategy == "auto" else math.inf
        limit: float = self.of_domain(domain, "max_epochs") or default
        return limit

    def of_domain(self, name: str, key: str) -> Any:
        """Return the domain's value of a key of ``DomainObjective``, or else the run's."""
        value = getattr(self.domains.get(name), key, None)
        return getattr(self, key) if value is None else value

    @property
    def uses_policy(self) -> bool:
        """Whether the loss of at least one domain has a policy gradient."""
        by_domain = (part.policy_gradient_weight for part in self.domains.values())
        return self.policy_gradient_weight > 0 or any(by_domain)

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
                f"divergence: {self.divergence} needs tail: bucket; without it the divergence is not finite"
            )
        if self.torch_compile and self.fsdp:
            raise ValueError("torch_compile: does not work with fsdp: true; leave one of them out")
        if self.freeze is not None and self.lora is not None:
            raise ValueError("freeze: trains the embeddings, and lora trains adapters; leave one of them out")
        if self.fsdp and self.lora is not None and self.lora.quantize:
            raise ValueError("lora.quantize: does not work with fsdp: true; leave one of them out")
        if self.fsdp and self.optimizer == "adamw_8bit":
            raise ValueError("optimizer: adamw_8bit does not work with fsdp: true; use adamw")
        return self

    @model_validator(mode="after")
    def _every_key_is_used(self) -> Self:
        for key, needed, is_used in (
            ("beta", "divergence: jensen_shannon", self.divergence == "jensen_shannon"),
            ("smoothing", "strategy: ddk or auto", self.by_ddk),
            ("advantage_clip", "policy_gradient_weight", self.uses_policy),
            ("importance_clip", "policy_gradient_weight", self.uses_policy),
            ("gap_temperature", "strategy: gap", self.strategy == "gap"),
        ):
            # The default is allowed: the config.yaml of a run has every key.
            if not is_used and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: does nothing without {needed}; leave it out")
        return self
