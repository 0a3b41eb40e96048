"""Compare an engine with transformers in float32 on a few real documents."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_build.config import TeacherConfig
from ddk_build.teacher import transformers_engine
from ddk_build.teacher.engines import NOISE, Teacher, load_teacher
from ddk_build.teacher.model import full_config
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import Target

logger = logging.getLogger(__name__)

MOST_WORK = 2e12  # check: auto; parameters x tokens without a GPU: a minute on a few cores
# Share of the loss of a uniform guess, log(vocabulary size). Unigram frequencies reach 0.63 of it (the demo's
# docs, 49,152 tokens), untrained weights about 1.
CHANCE = 0.9
SHARE = 0.5  # check: auto; of the free memory


def checked_teacher(
    config: TeacherConfig, target: Target, max_length: int, documents: Sequence[NDArray[np.int32]]
) -> Teacher:
    """Start the engine, and compare it with transformers in float32 on real ``documents``.

    The reference runs first; its memory is free again when the engine starts.

    Raises ConfigError if the engine cannot start, or differs from the reference by more than its dtype's
    noise.
    """
    if not documents:  # the build raises: nothing carries loss
        return load_teacher(config, target, max_length)
    expected = reference(config, documents)
    logger.info("teacher: starting %s with %s", config.engine, config.model)
    teacher = load_teacher(config, target, max_length)
    logprobs = teacher.score(documents, labels_only=True).label_logprob
    chance = np.log(teacher.vocab_size)
    if -logprobs.mean() >= CHANCE * chance:
        logger.warning(
            "teacher: %s predicts its first domain's text no better than chance (%.2f nats a label; chance "
            "is %.2f): check its weights and its tokenizer",
            config.model,
            -logprobs.mean(),
            chance,
        )
    if expected is not None:
        nats = float(np.abs(logprobs - expected).mean())
        line = f"{config.engine} in {config.dtype} is {nats:.2g} nats a label from transformers in float32"
        if not nats <= NOISE[config.dtype]:
            raise ConfigError(
                f"teacher.check: {line} on real text, more than rounding explains ({NOISE[config.dtype]}): "
                "use teacher.engine: transformers or another version of the engine; teacher.check: never "
                "skips this check"
            )
        logger.warning("teacher: %s", line)
    return teacher


def reference(config: TeacherConfig, documents: Sequence[NDArray[np.int32]]) -> NDArray[np.float32] | None:
    """Return log-probabilities of the labels; None where ``check`` is never or the cost too high."""
    architecture = full_config(config)
    tokens = sum(map(len, documents))
    if config.check == "never" or (config.check == "auto" and not _is_cheap(config, architecture, tokens)):
        return None
    logger.info("teacher: answering a few documents with transformers in float32, to check the engine")
    for key, value in config.hf_overrides.items():
        setattr(architecture, key, value)
    engine_args = {"config": architecture, "attn_implementation": "eager"}
    plain = config.model_copy(update={"dtype": "float32", "engine_args": engine_args})
    teacher = transformers_engine.load(plain, Target(), 0)
    logprobs = teacher.score(documents, labels_only=True).label_logprob
    teacher.close()
    return logprobs


def _is_cheap(config: TeacherConfig, architecture: Any, tokens: int) -> bool:
    """Return whether the reference differs from the engine, and fits into the free memory."""
    from transformers import AutoModelForCausalLM

    automatic: Any = AutoModelForCausalLM
    quantized = config.engine_args.get("quantization") or getattr(architecture, "quantization_config", None)
    if config.engine == "transformers" or quantized or config.engine_args.get("load_format") == "dummy":
        return False
    with torch.device("meta"):
        model = automatic.from_config(architecture, trust_remote_code=config.trust_remote_code)
    parameters = sum(weight.numel() for weight in model.parameters())
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return bool(4 * parameters < SHARE * free)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return bool(parameters * tokens <= MOST_WORK and 4 * parameters < SHARE * free)
