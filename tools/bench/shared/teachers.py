"""Models with random weights, in the shapes of real ones."""

from pathlib import Path
from typing import Any

from tools.real_data import teacher_folder

# In the shape of Qwen2.5: layers, width, heads, key-value heads, MLP width, vocabulary
SHAPES = {
    "tiny": (2, 64, 2, 2, 128, 49_152),
    "30m": (8, 384, 6, 2, 1024, 49_152),
    "135m": (30, 576, 9, 3, 1536, 49_152),  # SmolLM2
    "0.5b": (24, 896, 14, 2, 4864, 151_936),
    "1.5b": (28, 1536, 12, 2, 8960, 151_936),
    "7b": (28, 3584, 28, 4, 18_944, 152_064),
}


def shaped_teacher(folder: Path, name: str) -> Path:
    """Write a model of SHAPES without weights, for vLLM's ``load_format: dummy``, and SmolLM2's tokenizer."""
    _config(name).save_pretrained(folder)
    return _with_tokenizer(folder)


def shaped_model(folder: Path, name: str, depth: int = 1) -> Path:
    """Write a random model of SHAPES, with ``depth`` times its layers, and SmolLM2's tokenizer."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(_config(name, depth)).save_pretrained(folder)
    return _with_tokenizer(folder)


def _config(name: str, depth: int = 1) -> Any:
    from transformers import Qwen2Config

    layers, hidden, heads, key_value_heads, mlp, vocabulary = SHAPES[name]
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=depth * layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=hidden < 3000,
        max_position_embeddings=32_768,
    )


def _with_tokenizer(folder: Path) -> Path:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(teacher_folder()).save_pretrained(folder)
    return folder
