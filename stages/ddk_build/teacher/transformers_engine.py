"""The reference engine: plain transformers, one document after another. Slow, and easy to trust."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from ddk_build.config import TeacherConfig
from ddk_build.teacher.engines import Answers, Teacher
from ddk_build.teacher.model import full_config
from ddk_build.teacher.targets import sparse_target
from ddk_cache.errors import ConfigError, brief
from ddk_cache.format.layout import Target


class TransformersTeacher(Teacher):
    """Answers with transformers."""

    def __init__(self, model: Any, target: Target) -> None:
        self.model = model
        self.target = target
        self.vocab_size = int(model.config.get_text_config().vocab_size)

    def close(self) -> None:
        """Free the model's memory."""
        del self.model
        gc.collect()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def submit(
        self,
        documents: Sequence[np.ndarray],
        offsets: Sequence[np.ndarray] | None = None,
        *,
        labels_only: bool = False,
    ) -> list[Callable[[], Answers]]:
        """Answer documents at once; see :meth:`ddk_build.teacher.engines.Teacher.submit`."""
        target = None if labels_only else self.target
        by_document = [Answers.empty(target.width if target else 0)]
        for index, document in enumerate(documents):
            tokens = torch.from_numpy(document.astype(np.int64)).to(self.model.device)
            logits = self.model(tokens[None], use_cache=False).logits[0, :-1]
            starts = None if offsets is None else torch.from_numpy(offsets[index]).to(logits.device)
            kept = sparse_target(logits, tokens[1:], target, starts)
            by_document.append(Answers(*(part.cpu().numpy() for part in kept)))
        return [lambda: Answers.concatenate(by_document)]


def load(config: TeacherConfig, target: Target, max_length: int) -> TransformersTeacher:
    """Load the model; ``engine_args``, such as device_map, go to ``from_pretrained``."""
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {"attn_implementation": right_attention(full_config(config))}
    if torch.cuda.is_available():
        arguments["device_map"] = "cuda"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **(arguments | config.engine_args),
        )
    except Exception as error:  # any type, as in full_config
        raise ConfigError(f"teacher: transformers cannot load it: {brief(error)}") from error
    if config.head_dtype == "float32":
        multiply_in_float32(model.get_output_embeddings())
    return TransformersTeacher(model.eval(), target)


def multiply_in_float32(head: Any) -> None:
    """Let an output layer multiply in float32; its weights, which embeddings may share, keep their type."""

    def forward(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        return linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward


def check_arguments(config: TeacherConfig, max_length: int) -> None:
    """Raise ConfigError where ``engine_args`` ask for an attention that is wrong for the model.

    Arguments that ``from_pretrained`` does not take raise when the weight files are checked.
    """
    attention = config.engine_args.get("attn_implementation")
    if attention not in (None, "eager") and right_attention(full_config(config)) == "eager":
        raise ConfigError(
            f"teacher.engine_args.attn_implementation: {attention} ignores the soft cap on attention of "
            f"{config.model}; use eager"
        )


def right_attention(config: Any) -> str | None:
    """Return the attention implementation that a model needs; None for transformers' default.

    Its sdpa silently drops soft caps on attention (Gemma 2, VaultGemma); eager keeps them.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return None if capped is None else "eager"
