"""Estimate from shapes the memory that a process of a run needs, in bytes."""

from dataclasses import dataclass
from typing import Any

import torch

from ddk_cache.errors import counted
from ddk_train.config import TrainConfig
from ddk_train.student.architecture import inner_model
from ddk_train.student.distributed import Ranks
from ddk_train.student.student import Student, count, is_quantized

GIB = 2**30
LONG_ROW = 4096  # tokens of a row whose mask is worth a line
NF4_BYTES = 0.516  # of a weight: 4 bits, a byte a block of 64, 4 bytes for 256 of those


@dataclass(frozen=True)
class Shape:
    """The sizes of a student that decide its memory."""

    weights: int  # the number of parameters
    trained: int  # of them, all or the adapters
    head: int  # the number of its parameters, 0 if they are not trained
    layers: int
    hidden: int
    intermediate: int
    quantized: int = 0  # of the parameters, in 4 bits

    @classmethod
    def of(cls, model: Any) -> "Shape":
        """Return the shape of a loaded transformers model, adapters included."""
        inner = inner_model(model)
        text = inner.config.get_text_config()
        head = inner.get_output_embeddings().weight
        return cls(
            weights=sum(map(count, model.parameters())),
            trained=sum(count(parameter) for parameter in model.parameters() if parameter.requires_grad),
            quantized=sum(count(parameter) for parameter in model.parameters() if is_quantized(parameter)),
            head=head.numel() if head.requires_grad else 0,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        )


def activation_bytes(shape: Shape, tokens: int, *, bf16: bool, checkpointing: bool) -> int:
    """Return the bytes that the forward pass of ``tokens`` positions keeps for the backward pass.

    Counted per token and layer on a Llama: norms work in float32, attention and MLP in the run's type.
    """
    layer = (36 if bf16 else 44) * shape.hidden + (8 if bf16 else 16) * shape.intermediate
    layers = layer + shape.layers * 4 * shape.hidden if checkpointing else shape.layers * layer
    return tokens * (layers + 10 * shape.hidden)


def needed(
    shape: Shape, config: TrainConfig, seq_length: int, world: int, *, packed: bool = True
) -> dict[str, int]:
    """Return the bytes that a process needs on its device, by purpose; the allocator adds some.

    Documents that are not packed are padded to at most twice their tokens: the worst case is counted.
    """
    shards = world if config.fsdp else 1
    frozen = 2 if config.lora is not None and config.bf16 and not config.fsdp else 4
    plain = shape.weights - shape.quantized
    copies = 2 * plain if config.bf16 else 0  # made by autocast or FSDP2 for the matrix products
    weights = (plain - shape.trained) * frozen + shape.trained * 4 + int(shape.quantized * NF4_BYTES)
    return {
        "weights": weights // shards + (copies // shape.layers if shards > 1 else copies),
        "gradients": shape.trained * 4 // shards,
        "optimizer": shape.trained * (8 if config.optimizer == "adamw" else 2) // shards,
        "activations": activation_bytes(
            shape,
            config.per_device_train_batch_size * seq_length * (1 if packed else 2),
            bf16=config.bf16,
            checkpointing=config.gradient_checkpointing,
        ),
        # The head's gradient, made in the forward pass; a chunk of logits is small beside it.
        "loss": (2 if config.bf16 else 4) * shape.head,
    }


def report(student: Student, config: TrainConfig, seq_length: int, ranks: Ranks) -> str:
    """Return one line: the memory that a process needs, by purpose, and the GPU's free memory."""
    packed = student.layout.packed
    parts = needed(Shape.of(student.model), config, seq_length, ranks.world, packed=packed)
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    free = ""
    if ranks.device.type == "cuda":
        free = f"; free: {_size(torch.cuda.mem_get_info(ranks.device)[0])}"
    padded = "" if packed else "; each document is a row, so up to half of the activations may be padding"
    return f"memory needed: about {_size(sum(parts.values()))} ({listed}){free}{padded}"


def mask_remark(attention: str, rows: int, seq_length: int) -> list[str]:
    """Return a line on the mask [n, S, S] that isolates documents in packed rows, if these are long."""
    if seq_length <= LONG_ROW or attention not in ("sdpa", "eager"):
        return []
    mask = _size(rows * seq_length**2)
    return [
        f"attn_implementation: {attention} isolates documents by a mask of {mask} or more for "
        f"{counted(rows, 'row')} of {seq_length:,} tokens, and four times that for twice the length; on a "
        "GPU flex_attention and flash_attention_2 need none"
    ]


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
