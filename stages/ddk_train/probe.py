"""Cheap questions to the real student before the first step, so that no run is silently wrong."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddk_cache.errors import ConfigError
from ddk_train.architecture import body, can_pack, inner_model, long_rope_length
from ddk_train.batches import PACKED, Batch, Layout
from ddk_train.config import TrainConfig
from ddk_train.distributed import measuring
from ddk_train.student import Student, Traits

LENGTH = 8  # tokens of a probe document


@torch.no_grad()
def examine(model: Any, config: TrainConfig, seq_length: int) -> Traits:
    """What a loaded model (transformers', or peft's wrapper of one) does to logits, and how it takes rows.

    It may still be on the CPU, where it is asked in float32 (a frozen base in its own type) and without
    autocast, which would hide small leaks from document to document. With ``fsdp``, where it has the files'
    type, a copy is asked: let one process do it.

    Raises
    ------
    ConfigError
        Its logits are not a linear layer's, scaled and capped.
    """
    if config.fsdp:
        model = copy.deepcopy(model).float()
    inner = inner_model(model)
    with _undisturbed(inner):
        scale, bias_scale, softcap = _head(inner)
        boundary = long_rope_length(inner, seq_length)
        packs = boundary is None and can_pack(inner, seq_length) and _keeps_apart(inner)
    return Traits(scale, bias_scale, softcap, PACKED if packs else Layout(packed=False, apart_at=boundary))


def check_documents_apart(student: Student, device: torch.device) -> None:
    """Change one of two documents in a row, and see whether the other's hidden states change.

    ``student`` is as it trains, packed: on its device, with its attention, sharded or not. It is asked in
    float32, but where weights or kernels know bfloat16 alone (a frozen base, FSDP2's policy, flash
    attention): there the same shapes still give the same bits but for experts' order.

    Raises
    ------
    ConfigError
        They do: this attention carries something from document to document.
    """
    bf16 = student.bf16
    student.bf16 = autocast = bf16 and student.flatten
    seen: list[Tensor] = []
    hook = body(student.inner).register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state)
    )
    try:
        with measuring(student):
            student(_batch(_documents(student.vocab_size, device)), 0.0)
    finally:
        hook.remove()
        student.bf16 = bf16
    rough = autocast or seen[0].dtype != torch.float32
    before, changed_behind, changed_in_front = seen[0].reshape(3, 2, LENGTH, -1)
    apart = _close(before[0], changed_behind[0], rough) and _close(
        changed_behind[1], changed_in_front[1], rough
    )
    if not apart:
        raise ConfigError(
            "attn_implementation: documents in the same row see each other with "
            f"{student.inner.config._attn_implementation}; take auto"
        )


def _head(model: Any) -> tuple[float, float, float | None]:
    """Scale, scale of the bias and cap of the logits, as in :class:`ddk_train.student.Traits`.

    The head's output is stretched: to 1e6, where a cap is all that is left; to far below the cap, for the
    scale; and to where a cap bends, or a sum would show, and the two together must be what the model does.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"student: its output head is a {type(head).__name__}; only a plain linear layer works here "
            "(LoRA adapters cannot sit on it)"
        )
    tokens = _documents(head.out_features, model.device)[:1]
    hidden = body(model)(input_ids=tokens, use_cache=False).last_hidden_state.float()
    taken, plain, capped = _stretched(model, head, tokens, 1e6)
    slope, softcap = _slope(plain, capped), None
    if slope is None:
        softcap = float(capped.abs().max())
        slope = _slope(*_stretched(model, head, tokens, softcap / 1000)[1:])
    if slope:
        largest = 10.0 if softcap is None else 2 * softcap / abs(slope)
        _, plain, capped = _stretched(model, head, tokens, largest)
        plain = slope * plain
        plain = plain if softcap is None else softcap * (plain / softcap).tanh()
    inside = _slope(hidden, taken)
    if not slope or not inside or not _close(capped, plain, bf16=False):
        raise ConfigError(
            f"student: {type(model).__name__} does not make its logits by one linear layer from the last "
            "hidden state, scaled or capped by a tanh; the loss cannot reproduce that"
        )
    return _rounded(inside * slope), _rounded(slope), softcap


def _stretched(model: Any, head: nn.Linear, tokens: Tensor, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the head is given, what it returns, stretched to ``largest``, and the logits; float32."""
    seen: dict[str, Tensor] = {}

    def stretch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"] = inputs[0].float()
        seen["output"] = output.float() * (largest / output.float().abs().max())
        return seen["output"]

    hook = head.register_forward_hook(stretch)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
    if not seen:
        raise ConfigError(f"student: {type(model).__name__} does not call its output head as a layer")
    return seen["input"], seen["output"], logits


def _slope(one: Tensor, other: Tensor) -> float | None:
    """c where ``other`` is c * ``one``, else None."""
    if one.shape != other.shape:
        return None
    slope = float((one.double() * other).sum() / one.double().square().sum())
    # bfloat16 (a frozen base) rounds what lies between hidden state and head to 0.4%.
    return slope if bool((slope * one - other).norm() <= 5e-3 * other.norm()) else None


def _rounded(scale: float) -> float:
    return 1.0 if abs(scale - 1) < 1e-5 else scale


def _keeps_apart(model: Any) -> bool:
    """Whether documents packed in a row have the hidden states that each has alone."""
    rows = _documents(model.get_output_embeddings().out_features, model.device)
    batch = _batch(rows)
    run, bf16 = body(model), model.dtype != torch.float32
    packed = run(input_ids=batch.tokens, position_ids=batch.positions.long(), use_cache=False)
    alone = run(input_ids=rows.reshape(6, LENGTH), use_cache=False)
    return _close(packed.last_hidden_state.reshape(6, LENGTH, -1), alone.last_hidden_state, bf16)


def _documents(vocab_size: int, device: torch.device) -> Tensor:
    """int64 [3, 2 * LENGTH]: rows of two documents, (A, B), (A, C) and (D, C)."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randint(vocab_size, (4, LENGTH), generator=generator)
    rows = [torch.cat(pair) for pair in ((a, b), (a, c), (d, c))]
    return torch.stack(rows).to(device)


def _batch(tokens: Tensor) -> Batch:
    """Rows of two documents, int64 [n, 2 * LENGTH], with one label."""
    positions = torch.arange(LENGTH, dtype=torch.int32, device=tokens.device).repeat(len(tokens), 2)
    first = tokens.new_zeros(1)
    return Batch(tokens.int(), positions, first, first, first, None, None, None, text_tokens=tokens.numel())


def _close(one: Tensor, other: Tensor, bf16: bool) -> bool:
    """Whether every token's vector [..., H] is the other's: to float32's noise over layers, or bfloat16's."""
    apart = (one.float() - other.float()).norm(dim=-1)
    return bool((apart <= (5e-2 if bf16 else 1e-4) * other.float().norm(dim=-1)).all())


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Inside: no dropout, and an attention that works on the CPU in float32, uncompiled."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention in ("flash_attention_2", "flex_attention"):
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.train(was_training)
        model.set_attn_implementation(attention)
