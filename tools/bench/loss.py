"""Time and peak memory of the student's loss, forward and backward, computed in five ways.

Naive cross-entropy, naive cross-entropy + sparse KL, Liger's fused cross-entropy (on CUDA, if installed), and
ours without and with the KL. Time: all ways take turns in one process. Memory: what one call adds to its
inputs at its peak, including the gradients it leaves; on a CPU in a new process (Linux counts).
"""

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddk_train.loss.fused import distillation_loss
from tools.frame import (
    in_new_process,
    in_turns,
    output_option,
    paired_ratio,
    peak_memory,
    reset_peak_memory,
    show,
    write_json,
)

GAMMA = 0.2


class Shape(NamedTuple):
    """Sizes of one step."""

    rows: int
    hidden: int
    vocab_size: int
    entries: int


class Inputs(NamedTuple):
    """What a loss is computed from."""

    hidden: Tensor  # [M, H]
    head: Tensor  # [V, H]
    labels: Tensor  # [M]
    ids: Tensor  # [M, E]
    logprobs: Tensor  # [M, E]
    tail_logprob: Tensor  # [M]


SHAPES = {
    "cpu": [Shape(2048, 576, 49152, 64), Shape(1024, 896, 151936, 64)],
    "cuda": [Shape(8192, 896, 151936, 64), Shape(8192, 2048, 128256, 64), Shape(16384, 1536, 151936, 64)],
}


def make_inputs(shape: Shape, device: str) -> Inputs:
    """Return random inputs; float32 on a CPU, bfloat16 on CUDA."""
    torch.manual_seed(0)
    rows, width, vocab_size, entries = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, width).to(device, dtype).requires_grad_()
    head = (torch.randn(vocab_size, width) / width**0.5).to(device, dtype).requires_grad_()
    stride = vocab_size // entries
    ids = stride * torch.arange(entries) + torch.randint(stride, (rows, entries))
    logprobs = (2 * torch.randn(rows, entries)).log_softmax(-1) + torch.tensor(0.92).log()
    tail = torch.full((rows,), 0.08).log()
    labels = torch.randint(vocab_size, (rows,))
    return Inputs(hidden, head, labels.to(device), ids.to(device), logprobs.to(device), tail.to(device))


def naive(inputs: Inputs) -> Tensor:
    return cross_entropy((inputs.hidden @ inputs.head.T).float(), inputs.labels)


def naive_with_kl(inputs: Inputs) -> Tensor:
    logits = (inputs.hidden @ inputs.head.T).float()
    log_q = logits.log_softmax(-1).gather(-1, inputs.ids)
    log_q_tail = (1 - log_q.exp().sum(-1)).clamp(min=1e-9).log()
    kl = (inputs.logprobs.exp() * (inputs.logprobs - log_q)).sum(-1)
    kl = kl + inputs.tail_logprob.exp() * (inputs.tail_logprob - log_q_tail)
    return cross_entropy(logits, inputs.labels) + GAMMA * kl.mean()


def liger(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(inputs.head, inputs.hidden, inputs.labels)
    return loss


def ours(inputs: Inputs, gamma: float) -> Tensor:
    return distillation_loss(*inputs, gamma=gamma).loss


BASELINE, LIGER = "naive CE + sparse KL", "Liger's fused CE"
OURS, OURS_WITH_KL = "ours, gamma 0", f"ours, gamma {GAMMA}"
WAYS: dict[str, Callable[[Inputs], Tensor]] = {
    "naive CE": naive,
    BASELINE: naive_with_kl,
    LIGER: liger,
    OURS: partial(ours, gamma=0),
    OURS_WITH_KL: partial(ours, gamma=GAMMA),
}


def step(way: str, inputs: Inputs) -> None:
    """Run forward and backward, starting without gradients."""
    inputs.hidden.grad = inputs.head.grad = None
    WAYS[way](inputs).backward()
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()


def measure_memory(way: str, shape: Shape, device: str) -> int:
    """Return the bytes that one call adds to its inputs at its peak."""
    step(way, make_inputs(Shape(8, 64, 1024, 8), device))  # threads and libraries allocate before
    inputs = make_inputs(shape, device)
    before = reset_peak_memory(device)
    step(way, inputs)
    return peak_memory(device) - before


def measure(shape: Shape, device: str, rounds: int) -> dict[str, Any]:
    """Return the figures of one shape, each way beside the naive one."""
    ways = [way for way in WAYS if way != LIGER or (device == "cuda" and find_spec("liger_kernel"))]
    memory = {way: in_new_process(measure_memory, way, shape, device) for way in ways}
    inputs = make_inputs(shape, device)
    seconds = in_turns({way: partial(step, way, inputs) for way in ways}, rounds)
    return {
        "shape": shape._asdict(),
        "kl_price": paired_ratio(seconds[OURS_WITH_KL], seconds[OURS]),
        "ways": {
            way: {
                "seconds": statistics.median(seconds[way]),
                "time_ratio": paired_ratio(seconds[way], seconds[BASELINE]),
                "extra_bytes": memory[way],
                "memory_ratio": memory[way] / memory[BASELINE],
            }
            for way in ways
        },
    }


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is one.")
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(3), help="Timed runs of each way."
)
@output_option("loss")
def main(device: str | None, rounds: int, output: Path) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for shape in SHAPES[device]:
        result = measure(shape, device, rounds)
        results.append(result)
        show(
            ", ".join(f"{name} {size}" for name, size in result["shape"].items()) + f" on {device}",
            ("", "seconds", "ratio", "extra memory, MB", "ratio"),
            [
                (way, row["seconds"], row["time_ratio"], row["extra_bytes"] / 1e6, row["memory_ratio"])
                for way, row in result["ways"].items()
            ],
        )
        click.echo(f"The KL makes ours cost {result['kl_price']:.2f} x what cross-entropy alone costs.\n")
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": rounds}
    write_json(output, {**facts, "results": results})


if __name__ == "__main__":
    main()
