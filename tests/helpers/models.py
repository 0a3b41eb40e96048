"""Tiny models and tokenizers made on the spot."""

from pathlib import Path

SENTENCES = [
    "def add(a, b): return a + b  # the sum of two numbers",
    "The quick brown fox jumps over the lazy dog while the teacher watches.",
    "for index in range(10): print(index * 2)",
    "Permission is hereby granted, free of charge, to any person obtaining a copy.",
    "namespace detail { template <typename T> struct identity { using type = T; }; }",
]


def make_tokenizer(folder: Path, vocab_size: int = 400) -> None:
    """Train a byte-level BPE tokenizer with a chat template and save it as Hugging Face expects."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)


def make_model(
    folder: Path, *, seed: int = 0, vocab_size: int = 400, layers: int = 2, hidden: int = 64
) -> Path:
    """Save a random Llama of the given size, with a tokenizer, into ``folder`` and return it.

    The weights are large enough that the distribution is far from flat and depends on the context.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder, vocab_size)
    return folder
