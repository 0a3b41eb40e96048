"""Two comparisons on the real student before the first step: its logits, and its documents' isolation."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.data.batches import PACKED, Batch, Layout
from ddk_train.student.architecture import body, can_pack, long_rope_length
from ddk_train.student.distributed import measuring
from ddk_train.student.student import Student

LENGTH = 8  # tokens of a test document


@torch.no_grad()
def examine(model: Any, config: TrainConfig, seq_length: int) -> Layout:
    """Compare the student's logits with the model's own, and choose how rows reach it.

    It runs in float32 (a frozen base in its type) and without autocast, which would hide small leaks between
    documents. With ``fsdp``, where the weights have the files' type, it examines a copy: call it in one
    process. Raises ConfigError if the loss cannot reproduce the model's logits.
    """
    if config.fsdp:
        model = copy.deepcopy(model).float()
    student = Student(model, config)
    inner, head = student.inner, student.head
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"student: its output head is a {type(head).__name__}; only a plain linear layer works here "
            "(LoRA adapters cannot be on it)"
        )
    rows = _document_pairs(student.vocab_size, inner.device)
    with _evaluating(inner):
        alone = body(inner)(input_ids=rows.reshape(6, LENGTH), use_cache=False).last_hidden_state
        logits = inner(input_ids=rows.reshape(6, LENGTH), use_cache=False).logits
        exact = alone.dtype == torch.float32
        if alone.shape[-1] != head.in_features or not _close(student.logits(alone), logits, exact):
            raise ConfigError(
                f"student: the logits of {type(inner).__name__} are not one linear layer of the last hidden "
                "state, scaled or capped as its configuration says; the loss cannot reproduce them"
            )
        boundary = long_rope_length(inner, seq_length)
        if boundary is not None or not can_pack(inner, seq_length):
            return Layout(packed=False, isolate_above=boundary)
        batch = _as_batch(rows)
        packed = body(inner)(
            input_ids=batch.tokens, position_ids=batch.positions.long(), use_cache=False
        ).last_hidden_state
    return PACKED if _close(packed.reshape(alone.shape), alone, exact) else Layout(packed=False)


def check_isolation(student: Student, device: torch.device) -> None:
    """Change one of two documents in a row; the other's hidden states must not change.

    ``student`` is in its state for training: on its device, with its attention, sharded or not. It runs in
    float32 unless weights or kernels need bfloat16 (a frozen base, FSDP2's policy, flash attention): then
    equal shapes still give equal bits, except for the order of experts. Raises ConfigError if this attention
    carries something from document to document.
    """
    autocast = student.bf16 and student.flatten
    rows = _document_pairs(student.vocab_size, device)
    with measuring(student), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        hidden = student.hidden_only(_as_batch(rows))
    exact = hidden.dtype == torch.float32 and not autocast
    before, second_changed, both_changed = hidden.reshape(3, 2, LENGTH, -1)
    isolated = _close(before[0], second_changed[0], exact) and _close(
        second_changed[1], both_changed[1], exact
    )
    if not isolated:
        raise ConfigError(
            "attn_implementation: documents in the same row see each other with "
            f"{student.inner.config._attn_implementation}; set it to auto"
        )


def _document_pairs(vocab_size: int, device: torch.device) -> Tensor:
    """Return rows of two random documents, (A, B), (A, C) and (D, C): int64 [3, 2 * LENGTH]."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randint(vocab_size, (4, LENGTH), generator=generator)
    return torch.stack([torch.cat(pair) for pair in ((a, b), (a, c), (d, c))]).to(device)


def _as_batch(rows: Tensor) -> Batch:
    """Return rows of two documents, int64 [n, 2 * LENGTH], as a batch without labels."""
    positions = torch.arange(LENGTH, dtype=torch.int32, device=rows.device).repeat(len(rows), 2)
    none = rows.new_zeros(0)
    return Batch(rows.int(), positions, none, none, none, None, None, None, text_tokens=rows.numel())


def _close(value: Tensor, expected: Tensor, exact: bool) -> bool:
    """Return whether vectors [..., H] agree: to float32's noise over layers, or else to bfloat16's."""
    error, size = (value.float() - expected.float()).norm(dim=-1), expected.float().norm(dim=-1)
    return bool((error <= (1e-4 if exact else 5e-2) * size).all())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Turn off dropout, and attention that a CPU does not run in float32 without compiling it."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention in ("flash_attention_2", "flex_attention"):
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.train(was_training)
        model.set_attn_implementation(attention)
