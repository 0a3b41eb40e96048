"""The teacher: documents in, a sparse target for each position out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, Self, cast

import numpy as np

from ddk_build.config import TeacherConfig
from ddk_build.model import model_config
from ddk_build.weights import check_weights
from ddk_cache.errors import ConfigError
from ddk_cache.layout import Target

# Mean difference in nats a label that is still rounding: between two ways through one engine (the head in
# another batch), or from float32 (measured: bfloat16 0.033, float32 6e-6; Apertus's 1.4e-3 is no rounding).
NOISE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True)
class Answers:
    """What the teacher said at N positions, documents one after another (len(document) - 1 each)."""

    ids: np.ndarray  # int32 [N, E], -1 absent, best first
    logprobs: np.ndarray  # float32 [N, E], nats, of softmax(logits / T); -inf absent
    tail_logprob: np.ndarray  # float32 [N], nats: log of the mass outside the entries; -inf none
    label_logprob: np.ndarray  # float32 [N], nats: log p(next token) at temperature 1

    def __post_init__(self) -> None:
        if np.isnan(self.label_logprob).any():
            raise ConfigError(
                "teacher.dtype: the teacher's logits are not numbers (overflow?); try bfloat16 or float32"
            )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One after another."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Teacher(Protocol):
    """Answers documents. Each is read by itself: a position attends to its own document only."""

    engine: str
    engine_version: str
    vocab_size: int

    def score(
        self,
        documents: Sequence[np.ndarray],
        offsets: Sequence[np.ndarray] | None = None,
        *,
        labels_only: bool = False,
    ) -> Answers:
        """Answer every position that has a next token.

        Parameters
        ----------
        documents: int32 tokens, 2 to max_length each.
        offsets: for a sampled target, float64 [len(document) - 1] in [0, 1) for each document: where the
            draws of each position begin.
        labels_only: leave the entries out (E = 0, tail_logprob -inf).

        Raises
        ------
        ConfigError
            Out of memory, also with a single document at a time, or logits that are not numbers: names
            the settings to change.
        """
        ...

    def close(self) -> None:
        """Give the engine's memory back, for the next teacher's."""
        ...


Load = Callable[[TeacherConfig, Target, int], Teacher]
ENGINES = {"vllm": "ddk_build.teacher_vllm", "transformers": "ddk_build.teacher_transformers"}
ARGUMENTS = ENGINES | {"vllm": "ddk_build.vllm_arguments"}
"""Where ``engine_args`` are checked."""


def load_teacher(config: TeacherConfig, target: Target, max_length: int) -> Teacher:
    """Start the engine that ``config`` names, for documents of up to ``max_length`` tokens.

    Raises
    ------
    ConfigError
        The engine is not installed, or cannot start with this model and these arguments.
    """
    check_engine(config)
    load = cast(Load, import_module(ENGINES[config.engine]).load)
    return load(config, target, max_length)


def check_teacher(config: TeacherConfig, max_length: int, *, is_here: bool = True) -> None:
    """All that can be known of a teacher before it is started, and before anything is spent.

    ``is_here``: it will be started in this process, not on other machines, so its engine must be installed.

    Raises
    ------
    ConfigError
        The engine is not installed or has no such argument; the model cannot be found, is too short for
        ``max_length`` tokens, or its weight files are not whole.
    """
    check_length(config, max_length)
    if is_here:
        check_engine(config)
        import_module(ARGUMENTS[config.engine]).check_arguments(config, max_length)
    check_weights(config)


def check_engine(config: TeacherConfig) -> None:
    """Raise ConfigError where the engine is not installed."""
    if find_spec(config.engine) is None:
        raise ConfigError(
            "teacher.engine: vllm is not installed; pip install 'ddk-cache[build]' (without a GPU: "
            "'ddk-cache[build-cpu]'), or set teacher.engine: transformers"
        )


def check_length(config: TeacherConfig, max_length: int) -> None:
    """Raise ConfigError where the model has fewer positions than a row; scaled rotary ones may have more."""
    text = model_config(config)
    limit = getattr(text, "max_position_embeddings", None)
    scaled = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if limit is not None and max_length > limit and not scaled:
        raise ConfigError(f"seq_length: {max_length} is more than the {limit} positions of {config.model}")
