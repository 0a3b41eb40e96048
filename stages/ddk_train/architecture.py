"""What is known of a student by its architecture and its configuration, before any number is computed."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ddk_cache.errors import ConfigError

# Layers that look at tokens alone, through a mask that can tell documents apart. Whatever else a layer is
# called (linear attention, convolutions, compressed or indexed attention) carries something past the mask.
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "sparse", "dense", "moe"}


def inner_model(model: Any) -> Any:
    """The ``PreTrainedModel`` inside a ``PeftModel``, or the model itself."""
    from transformers import PreTrainedModel

    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def body(model: Any) -> Any:
    """The module of a ``PreTrainedModel`` that ends in the last hidden state."""
    base = model.base_model
    return model.model if base is model else base  # Llama 4 calls its own body by another name


def choose_attention(wanted: str, config: Any) -> str | None:
    """What to hand ``from_pretrained`` as ``attn_implementation``: ``auto`` is the best that is right.

    None leaves the choice to transformers: sdpa where the architecture has it, else eager. But sdpa drops
    the cap on attention's logits (Gemma 2, VaultGemma) without a word.

    Raises
    ------
    ConfigError
        sdpa is wanted for a model with such a cap.
    """
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if wanted == "sdpa" and cap:
        raise ConfigError(
            f"attn_implementation: sdpa leaves out this model's attn_logit_softcapping of {cap:g}; "
            "take auto, eager or flash_attention_2"
        )
    if wanted == "auto":
        return "eager" if cap else None
    return wanted


def set_dropout_keys(config: Any, dropout: float) -> None:
    """Set every dropout of a transformers configuration.

    Noise of other kinds, layers left out at random and jitter on a router's input, is turned off.
    """
    for part, name, is_noise in _dropout_keys(config):
        setattr(part, name, 0.0 if is_noise else dropout)


def set_dropout_modules(model: nn.Module, dropout: float) -> None:
    """The same for modules whose probability no key decides."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = dropout


def largest_dropout(model: Any) -> float:
    """The largest probability or noise that training a ``PreTrainedModel`` will meet; 0 if there is none."""
    keys = [float(getattr(part, name)) for part, name, _ in _dropout_keys(model.config)]
    modules = [module.p for module in model.modules() if isinstance(module, _DropoutNd)]
    return max([0.0, *keys, *modules])


def _dropout_keys(config: Any) -> Iterator[tuple[Any, str, bool]]:
    """The configuration's part, the key, and whether it is noise of another kind."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            is_noise = name == "layerdrop" or "jitter" in name
            if is_noise or "dropout" in name or name.endswith("pdrop"):
                yield part, name, is_noise


def can_pack(model: Any, seq_length: int) -> bool:
    """Whether documents of one row might be kept apart by position ids; numbers must then show it.

    False where a state runs along the row (Mamba, Qwen3-Next), where positions are not asked for (Bloom,
    MPT), and where chunks of attention are counted from the row's beginning and rows are longer than one.
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
    """Tokens up to which long RoPE (Phi-3) takes its short factors, where rows go beyond; else None.

    The longest document of a row, or of a batch, decides for all of it.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return original if seq_length > original else None
