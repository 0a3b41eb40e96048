"""Two cheap questions to the real student before the first step, so that no run is silently wrong."""

from typing import Any

import torch
from torch import Tensor, nn

from ddk_cache.errors import ConfigError
from ddk_train.batches import Batch
from ddk_train.distributed import measuring
from ddk_train.student import Student, inner_model

LENGTH = 8  # tokens of a probe document


@torch.no_grad()
def logit_scale(model: Any) -> float:
    """What the model multiplies its head's output by to get logits: 1 for most, less for Granite or Cohere.

    ``model`` is a transformers model or peft's wrapper of one. The loss needs the logits as a linear
    function of the last hidden state. The head's output is stretched here to a largest magnitude of 1,000,
    where a softcap cannot go unseen.

    Raises
    ------
    ConfigError
        The logits are something else, such as capped (Gemma 2) or made by more than one linear layer.
    """
    model = inner_model(model)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"student: its output head is a {type(head).__name__}; only a plain linear layer works here "
            "(LoRA adapters cannot sit on it)"
        )
    seen: dict[str, Tensor] = {}

    def stretch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"] = inputs[0]
        seen["output"] = output * (1000 / output.abs().max())
        return seen["output"]

    was_training, attention = model.training, model.config._attn_implementation
    if attention == "flash_attention_2":  # works on CUDA in bfloat16 alone, and is not the question here
        model.set_attn_implementation("sdpa")
    model.eval()
    hook = head.register_forward_hook(stretch)
    try:
        tokens = _documents(head.out_features, model.device)[:1]
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
        model.train(was_training)
        model.set_attn_implementation(attention)
    plain = seen["output"].float()
    scale = float((logits * plain).sum() / plain.square().sum()) if logits.shape == plain.shape else 0.0
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    if not (_close(seen["input"], hidden, tolerance) and scale and _close(logits, scale * plain, tolerance)):
        raise ConfigError(
            f"student: {type(model).__name__} does not make its logits by one linear layer from the last "
            "hidden state (it may cap them, as Gemma 2 does); the loss cannot reproduce that"
        )
    return 1.0 if abs(scale - 1) < 1e-4 else scale


def check_documents_apart(student: Student, device: torch.device) -> None:
    """Change one of two documents in a row, and see whether the other's loss changes.

    ``student`` is as it trains: on its device, sharded or not.

    Raises
    ------
    ConfigError
        It does: this model carries something from document to document.
    """
    tokens = _documents(student.vocab_size, device)
    with measuring(student):
        first = [_loss_of_half(student, tokens[:2], row, half=0) for row in (0, 1)]
        second = [_loss_of_half(student, tokens[1:], row, half=1) for row in (0, 1)]
    for one, other in (first, second):
        if not _close(one, other, 1e-2 if student.bf16 else 1e-4):
            raise ConfigError(
                "student: documents in the same row see each other in this model; choose another "
                "attn_implementation, or another student (state-space layers cannot be kept apart)"
            )


def _documents(vocab_size: int, device: torch.device) -> Tensor:
    """int64 [3, 2 * LENGTH]: rows of two documents, (A, B), (A, C) and (D, C)."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randint(vocab_size, (4, LENGTH), generator=generator)
    rows = [torch.cat(pair) for pair in ((a, b), (a, c), (d, c))]
    return torch.stack(rows).to(device)


def _loss_of_half(student: Student, tokens: Tensor, row: int, half: int) -> Tensor:
    """The cross-entropy of one document of one row, the whole of ``tokens`` [n, 2 * LENGTH] being read."""
    index = torch.arange(LENGTH - 1, device=tokens.device)
    places = row * 2 * LENGTH + half * LENGTH + index
    positions = torch.arange(LENGTH, dtype=torch.int32, device=tokens.device).repeat(len(tokens), 2)
    batch = Batch(
        tokens.int(),
        positions,
        places,
        tokens.flatten()[places + 1],
        torch.zeros_like(places),
        None,
        None,
        None,
        text_tokens=tokens.numel(),
    )
    cross_entropy: Tensor = student(batch, 0.0).cross_entropy
    return cross_entropy


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max())
