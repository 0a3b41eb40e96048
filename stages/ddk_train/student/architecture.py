"""Facts about a student from its architecture and its transformers configuration."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ddk_cache.errors import ConfigError

# Layers that see other tokens only through a mask, which can isolate documents. Other layers (linear
# attention, convolutions, compressed or indexed attention) carry something past the mask.
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "sparse", "dense", "moe"}

# Keys of transformers configurations, with the architectures that use them.
SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, xLSTM
MULTIPLIER_KEYS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISOR_KEY = "logits_scaling"  # Granite, MiniCPM3


def inner_model(model: Any) -> Any:
    """Return the ``PreTrainedModel`` inside a ``PeftModel``, or the model itself."""
    from transformers import PreTrainedModel

    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def body(model: Any) -> Any:
    """Return the module of a ``PreTrainedModel`` whose output is the last hidden state."""
    base = model.base_model
    return model.model if base is model else base  # Llama 4 gives its body another name


@dataclass(frozen=True)
class LogitTransform:
    """How logits come from the last hidden state h: W (scale * h) + b, then softcap * tanh(. / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read it from a transformers configuration."""
        text = config.get_text_config()
        scale = math.prod(getattr(text, key, None) or 1.0 for key in MULTIPLIER_KEYS)
        caps = (getattr(text, key, None) for key in SOFTCAP_KEYS)
        return cls(
            scale / (getattr(text, DIVISOR_KEY, None) or 1.0), next((cap for cap in caps if cap), None)
        )


def choose_attention(requested: str, config: Any) -> str | None:
    """Return the ``attn_implementation`` for ``from_pretrained``; ``auto``: the fastest that is correct.

    None leaves the choice to transformers: sdpa if the architecture has it, else eager. But its sdpa silently
    ignores a cap on attention logits (Gemma 2, VaultGemma): with such a cap sdpa raises ConfigError.
    """
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if requested == "sdpa" and cap:
        raise ConfigError(
            f"attn_implementation: sdpa ignores this model's attn_logit_softcapping of {cap:g}; "
            "use auto, eager or flash_attention_2"
        )
    if requested == "auto":
        return "eager" if cap else None
    return requested


def set_dropout_keys(config: Any, dropout: float) -> None:
    """Set every dropout of a transformers configuration; turn off skipped layers and router jitter."""
    for part, name, is_noise in _dropout_keys(config):
        setattr(part, name, 0.0 if is_noise else dropout)


def set_dropout_modules(model: nn.Module, dropout: float) -> None:
    """Set the probability of dropout modules: not every architecture has a key for it."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = dropout


def largest_dropout(model: Any) -> float:
    """Return the largest dropout or noise that training a ``PreTrainedModel`` applies; 0 without any."""
    keys = [float(getattr(part, name)) for part, name, _ in _dropout_keys(model.config)]
    modules = [module.p for module in model.modules() if isinstance(module, _DropoutNd)]
    return max([0.0, *keys, *modules])


def _dropout_keys(config: Any) -> Iterator[tuple[Any, str, bool]]:
    """Yield the part of the configuration, the key, and whether it is noise other than dropout."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            is_noise = name == "layerdrop" or "jitter" in name
            if is_noise or "dropout" in name or name.endswith("pdrop"):
                yield part, name, is_noise


def can_pack(model: Any, seq_length: int) -> bool:
    """Return whether position ids might isolate the documents of a row; ``examine`` then compares.

    False if a state runs along the row (Mamba, Qwen3-Next), if the model takes no positions (Bloom, MPT), or
    if attention is in chunks that count from the row's beginning and rows are longer.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    chunk = getattr(config, "attention_chunk_size", None) if "chunked_attention" in layers else None
    return (
        not model._is_stateful
        and layers <= MASKED_LAYERS
        and "position_ids" in inspect.signature(body(model).forward).parameters
        and (chunk is None or seq_length <= chunk)
    )


def long_rope_length(model: Any, seq_length: int) -> int | None:
    """Return the length up to which long RoPE (Phi-3) uses its short factors, if rows are longer; else None.

    The longest document of a batch decides for all of it.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return original if seq_length > original else None
