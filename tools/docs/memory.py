"""What fits on a GPU, worked out by the formula that ``ddk-cache train`` prints: writes docs/memory.md.

python -m tools.docs.memory
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ddk_train.config import LoraConfig, TrainConfig
from ddk_train.student.memory import GIB, Shape, needed

SEQ_LENGTH = 2048
GPUS = (12, 24, 48, 80)  # GB as sold; about as many GiB
USABLE = 0.9  # the rest is CUDA's context, a chunk of logits and what the allocator cannot use
MOST_ROWS = 64


@dataclass(frozen=True)
class Architecture:
    """Sizes from the model's config.json; the rest is the family's."""

    family: type[Any]
    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool


STUDENTS = {
    "Qwen2.5-0.5B": Architecture(Qwen2ForCausalLM, 896, 24, 4864, 14, 2, 151_936, True),
    "Llama-3.2-1B": Architecture(LlamaForCausalLM, 2048, 16, 8192, 32, 8, 128_256, True),
    "Qwen2.5-1.5B": Architecture(Qwen2ForCausalLM, 1536, 28, 8960, 12, 2, 151_936, True),
    "Qwen2.5-3B": Architecture(Qwen2ForCausalLM, 2048, 36, 11_008, 16, 2, 151_936, True),
    "Qwen2.5-7B": Architecture(Qwen2ForCausalLM, 3584, 28, 18_944, 28, 4, 152_064, False),
}
SETUPS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "+ gradient_checkpointing": {"gradient_checkpointing": True},
    "+ adamw_8bit": {"gradient_checkpointing": True, "optimizer": "adamw_8bit"},
    "LoRA (r 16) + gradient_checkpointing": {"gradient_checkpointing": True, "lora": LoraConfig()},
}
HEAD = f"""# What fits on one GPU

For those who choose a GPU or a batch. Computed by the estimate that `ddk-cache train` prints, not measured;
made by `python -m tools.docs.memory`.

A cell is the largest `per_device_train_batch_size`, in rows of {SEQ_LENGTH:,} tokens (at most {MOST_ROWS}),
within {USABLE:.0%} of the GPU's memory; – where no row fits. *Fixed* does not depend on the batch: weights,
gradients and optimizer states. All with `bf16: true`; several GPUs with `fsdp: true` share the fixed part.

| student | trained | fixed, GiB | {" | ".join(f"{gpu} GB" for gpu in GPUS)} |
|---|---|---|{"---|" * len(GPUS)}
"""


def shape(student: Architecture, lora: LoraConfig | None) -> Shape:
    """Build the model without memory for its weights, and its adapters if there are any."""
    sizes: dict[str, Any] = {
        "hidden_size": student.hidden,
        "num_hidden_layers": student.layers,
        "intermediate_size": student.intermediate,
        "num_attention_heads": student.heads,
        "num_key_value_heads": student.key_value_heads,
        "vocab_size": student.vocabulary,
        "tie_word_embeddings": student.tied,
    }
    family = Qwen2Config if student.family is Qwen2ForCausalLM else LlamaConfig
    with torch.device("meta"):
        model = student.family(family(**sizes))
        if lora is not None:
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=lora.r, target_modules=lora.target_modules, task_type="CAUSAL_LM")
            )
    return Shape.of(model)


def memory(shape: Shape, setup: dict[str, Any], rows: int) -> dict[str, int]:
    """Return bytes by purpose, with ``rows`` rows at a time."""
    config = TrainConfig(cache="-", student="-", output_dir="-", per_device_train_batch_size=rows, **setup)
    return needed(shape, config, SEQ_LENGTH, world=1)


def most_rows(shape: Shape, setup: dict[str, Any], gpu: int) -> int:
    """Return the largest number of rows that fits on ``gpu`` (GiB); 0 if none fits."""
    fitting = [
        rows
        for rows in range(1, MOST_ROWS + 1)
        if sum(memory(shape, setup, rows).values()) <= USABLE * gpu * GIB
    ]
    return max(fitting, default=0)


def table() -> str:
    lines = []
    for name, student in STUDENTS.items():
        for row, (label, setup) in enumerate(SETUPS.items()):
            sizes = shape(student, setup.get("lora"))
            parts = memory(sizes, setup, 1)
            fixed = (sum(parts.values()) - parts["activations"]) / GIB
            cells = " | ".join(str(most_rows(sizes, setup, gpu) or "–") for gpu in GPUS)
            lines.append(f"| {name if row == 0 else ''} | {label} | {fixed:.1f} | {cells} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/memory.md"), show_default=True)
def main(output: Path) -> None:
    """Write the table of what fits, and print it."""
    rows = table()
    output.parent.mkdir(exist_ok=True)
    output.write_text(HEAD + rows, encoding="utf-8")
    click.echo(rows)


if __name__ == "__main__":
    main()
