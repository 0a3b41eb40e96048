"""Whether an engine says what the model says: a few real documents against transformers in float32."""

import gc
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_build.config import TeacherConfig
from ddk_build.model import full_config
from ddk_build.scoring import requests
from ddk_build.teacher import NOISE, Teacher, load_teacher
from ddk_build.teacher_transformers import TransformersTeacher
from ddk_cache import layout
from ddk_cache.errors import ConfigError
from ddk_cache.layout import Target
from ddk_cache.writer import Writer

logger = logging.getLogger(__name__)

DOCUMENTS, TOKENS = 4, 256  # that are compared, and of each
LONGEST = 2048  # of one of them: windows of attention and scaled RoPE differ only far from the beginning
MOST_WORK = 2e12  # check: auto; parameters x tokens without a GPU: a minute on a few cores
# Of the loss of knowing nothing, log of the vocabulary's size. Knowing how frequent each token is comes to
# 0.63 of it (the demo's docs, 49,152 tokens); what weights that nobody trained say lies around 1, also below.
CHANCE = 0.9
SHARE = 0.5  # check: auto; of the memory that is free


def checked_teacher(
    config: TeacherConfig, target: Target, max_length: int, documents: Sequence[NDArray[np.int32]]
) -> Teacher:
    """Start the engine, and compare it with the reference on ``documents``, real ones.

    The reference goes first, and its memory is free again when the engine starts.

    Raises
    ------
    ConfigError
        The engine cannot start, or is further from the reference than its type's noise.
    """
    if not documents:  # the build will say that nothing carries loss
        return load_teacher(config, target, max_length)
    expected = reference(config, documents)
    teacher = load_teacher(config, target, max_length)
    found = teacher.score(documents, labels_only=True).label_logprob
    chance = np.log(teacher.vocab_size)
    if -found.mean() >= CHANCE * chance:
        logger.warning(
            "teacher: %s knows its first domain's text no better than chance (%.2f nats a label; chance is "
            "%.2f): are these its weights and its tokenizer?",
            config.model,
            -found.mean(),
            chance,
        )
    if expected is not None:
        apart = float(np.abs(found - expected).mean())
        line = f"{config.engine} in {config.dtype} is {apart:.2g} nats a label from transformers in float32"
        if not apart <= NOISE[config.dtype]:
            raise ConfigError(
                f"teacher.check: {line} on real text, more than rounding makes ({NOISE[config.dtype]}): use "
                "teacher.engine: transformers or another version of the engine; with teacher.check: never it "
                "is built all the same"
            )
        logger.warning("teacher: %s", line)
    return teacher


def tokenised_documents(writer: Writer, domain: str) -> list[NDArray[np.int32]]:
    """Return excerpts of a tokenised domain's documents; empty if none has a label."""
    count = layout.shards(writer.split_state(domain, "validation").rows, writer.manifest.shard_rows)
    shards = (requests(writer.read_tokens(domain, "validation", shard)).documents for shard in range(count))
    return excerpts(next(filter(None, shards), []))


def excerpts(found: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """The longest of some documents, and the beginnings of a few others."""
    if not found:
        return []
    longest = max(range(len(found)), key=lambda number: len(found[number]))
    others = [*found[:longest], *found[longest + 1 :]]
    return [found[longest][:LONGEST], *(document[:TOKENS] for document in others[: DOCUMENTS - 1])]


def reference(config: TeacherConfig, documents: Sequence[NDArray[np.int32]]) -> NDArray[np.float32] | None:
    """Log-probabilities of the documents' labels; None where they are not wanted, or would cost too much."""
    shape = full_config(config)
    tokens = sum(map(len, documents))
    if config.check == "never" or (config.check == "auto" and not _is_cheap(config, shape, tokens)):
        return None
    from transformers import AutoModelForCausalLM

    for key, value in config.engine_args.get("hf_overrides", {}).items():
        setattr(shape, key, value)
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model,
        config=shape,
        revision=config.revision,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    found = TransformersTeacher(model.eval(), Target()).score(documents, labels_only=True).label_logprob
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _is_cheap(config: TeacherConfig, shape: Any, tokens: int) -> bool:
    """Whether the reference would be another than the engine, and fits beside what runs already."""
    import transformers

    automatic: Any = transformers.AutoModelForCausalLM
    quantized = config.engine_args.get("quantization") or getattr(shape, "quantization_config", None)
    if config.engine == "transformers" or quantized or config.engine_args.get("load_format") == "dummy":
        return False
    with torch.device("meta"):
        model = automatic.from_config(shape, trust_remote_code=config.trust_remote_code)
    parameters = sum(weight.numel() for weight in model.parameters())
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return bool(4 * parameters < SHARE * free)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return bool(parameters * tokens <= MOST_WORK and 4 * parameters < SHARE * free)
