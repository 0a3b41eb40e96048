"""What a teacher answers, and the engines that run it, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddk_build.config import TeacherConfig
from ddk_build.teacher.model import model_config
from ddk_build.teacher.weights import check_weights
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.codec import Targets
from ddk_cache.format.layout import Target

# The largest mean difference, in nats a label, that rounding explains: between two paths through one engine,
# or to transformers in float32 (measured: bfloat16 0.033, float32 6e-6; a wrong Apertus 1.4e-3).
NOISE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


class EngineDiedError(CacheError):
    """An engine whose parts run in other processes has failed; another engine may do its work."""


@dataclass(frozen=True)
class Answers(Targets):
    """A teacher's answers at N token positions, one document after another (len(document) - 1 each)."""

    label_logprob: NDArray[np.float32]
    """[N]; nats, log p(next token) at temperature 1."""

    def __post_init__(self) -> None:
        if np.isnan(self.label_logprob).any():
            raise ConfigError(
                "teacher.dtype: the teacher's logits are not numbers (overflow?); try bfloat16 or float32"
            )

    @classmethod
    def from_memory(cls, memory: NDArray[np.int32], width: int) -> "Answers":
        """Take the answers from the memory of ``targets.allocate``, without a copy."""
        count = len(memory) // (2 * width + 2)
        entries = count * width
        ids, logprobs, tail, label = np.split(memory, [entries, 2 * entries, 2 * entries + count])
        shape = count, width
        floats = (part.view(np.float32) for part in (logprobs.reshape(shape), tail, label))
        return cls(ids.reshape(shape), *floats)

    @classmethod
    def empty(cls, width: int) -> "Answers":
        """Return answers at no position."""
        absent = Targets.absent(0, width)
        return cls(absent.ids, absent.logprobs, absent.tail_logprob, absent.tail_logprob)


class Teacher(Protocol):
    """Answers documents. Each document is read alone: a position attends to its own document only."""

    vocab_size: int

    def submit(
        self,
        documents: Sequence[np.ndarray],
        offsets: Sequence[np.ndarray] | None = None,
        *,
        labels_only: bool = False,
    ) -> list[Callable[[], Answers]]:
        """Ask for an answer at every token position that has a next token.

        The engine may keep documents for its next steps, so that it never runs a step that is half empty.

        Parameters
        ----------
        documents
            int32 tokens, 2 to max_length each.
        offsets
            For a sampled target, the sampling offset of each position: float64 [len(document) - 1] in [0, 1)
            for each document.
        labels_only
            Leave the entries out (E = 0, tail_logprob -inf).

        Returns
        -------
        The answers that are ready, of this call and those before it, in the order of the calls; each is a
        function that waits, once and in any thread, until they have left the device.

        Raises
        ------
        ConfigError
            Out of memory, also with a single document at a time, or logits that are not numbers (which a
            returned function may raise too): names the settings to change.
        EngineDiedError
            The engine's processes failed for another reason.
        """
        ...

    def drain(self) -> list[Callable[[], Answers]]:
        """Answer all that was asked; return the answers that ``submit`` has not returned, as it does."""
        return []

    def score(
        self,
        documents: Sequence[np.ndarray],
        offsets: Sequence[np.ndarray] | None = None,
        *,
        labels_only: bool = False,
    ) -> Answers:
        """Submit documents, and nothing else, and wait for their answers."""
        [answers] = [*self.submit(documents, offsets, labels_only=labels_only), *self.drain()]
        return answers()

    def close(self) -> None:
        """Free the engine's memory for the next teacher."""
        return


ENGINES = {"vllm": "ddk_build.teacher.vllm_engine", "transformers": "ddk_build.teacher.transformers_engine"}
"""Modules with ``load`` and ``check_arguments``."""


def load_teacher(config: TeacherConfig, target: Target, max_length: int) -> Teacher:
    """Start the engine of ``config`` for documents of up to ``max_length`` tokens.

    Raises ConfigError if the engine is not installed, or cannot start with this model and these arguments.
    """
    check_engine(config)
    teacher: Teacher = import_module(ENGINES[config.engine]).load(config, target, max_length)
    return teacher


def check_teacher(config: TeacherConfig, max_length: int, *, is_here: bool = True) -> None:
    """Check all that can be checked before the teacher starts.

    ``is_here``: it starts in this process, not on other machines, so its engine must be installed.

    Raises ConfigError if the engine is not installed or has no such argument; the model cannot be read, takes
    fewer than ``max_length`` tokens, or its weight files are incomplete.
    """
    check_length(config, max_length)
    if is_here:
        check_engine(config)
        import_module(ENGINES[config.engine]).check_arguments(config, max_length)
    check_weights(config)


def check_engine(config: TeacherConfig) -> None:
    """Raise ConfigError where the engine is not installed."""
    if find_spec(config.engine) is None:
        raise ConfigError(
            "teacher.engine: vllm is not installed; pip install 'ddk-cache[build]' (without a GPU: "
            "'ddk-cache[build-cpu]'), or set teacher.engine: transformers"
        )


def check_length(config: TeacherConfig, max_length: int, key: str = "seq_length") -> None:
    """Raise ConfigError where a row is longer than the model's positions; scaled RoPE may go beyond.

    ``key`` is what decides the length.
    """
    text = model_config(config)
    limit = getattr(text, "max_position_embeddings", None)
    scaled = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if limit is not None and max_length > limit and not scaled:
        raise ConfigError(f"{key}: {max_length} is more than the {limit} positions of {config.model}")
