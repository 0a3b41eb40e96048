"""What the student's loss costs: time and peak memory, forward and backward, of five ways to compute it.

Naive cross-entropy, naive cross-entropy + sparse KL, Liger's fused cross-entropy (on CUDA, where installed),
and ours without and with the KL. Time: all ways take turns in one process. Memory: what a single call adds to
its inputs at its peak, the gradients it leaves included; on a CPU in a process of its own (Linux counts).
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddk_train.loss import distillation_loss

GAMMA = 0.2


class Shape(NamedTuple):
    rows: int
    hidden: int
    vocab_size: int
    entries: int


class Inputs(NamedTuple):
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
    """Random ones; float32 on a CPU, bfloat16 on CUDA."""
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

    return LigerFusedLinearCrossEntropyLoss()(inputs.head, inputs.hidden, inputs.labels)


def ours(inputs: Inputs) -> Tensor:
    return distillation_loss(*inputs, gamma=0).loss


def ours_with_kl(inputs: Inputs) -> Tensor:
    return distillation_loss(*inputs, gamma=GAMMA).loss


BASELINE, LIGER = "naive CE + sparse KL", "Liger's fused CE"
OURS, OURS_WITH_KL = "ours, gamma 0", f"ours, gamma {GAMMA}"
WAYS: dict[str, Callable[[Inputs], Tensor]] = {
    "naive CE": naive,
    BASELINE: naive_with_kl,
    LIGER: liger,
    OURS: ours,
    OURS_WITH_KL: ours_with_kl,
}


def step(way: str, inputs: Inputs) -> None:
    """Forward and backward, from no gradients to fresh ones."""
    inputs.hidden.grad = inputs.head.grad = None
    WAYS[way](inputs).backward()
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()


def measure_times(ways: list[str], inputs: Inputs, turns: int) -> dict[str, list[float]]:
    """Seconds of each way in each turn. A turn takes every way once, so a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way in ways:
            start = time.perf_counter()
            step(way, inputs)
            if turn > 0:  # the first warms up
                seconds[way].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], to: list[float]) -> float:
    """Median over the turns, each turn compared within itself."""
    return statistics.median(a / b for a, b in zip(seconds, to, strict=True))


def resident(kind: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def measure_memory(way: str, shape: Shape, device: str) -> int:
    """Bytes that one call adds to its inputs at its peak."""
    step(way, make_inputs(Shape(8, 64, 1024, 8), device))  # threads and libraries take theirs before
    inputs = make_inputs(shape, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(way, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    step(way, inputs)
    return resident("VmHWM") - before


def in_its_own_process(way: str, shape: Shape, device: str) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_memory, way, shape, device).result()


def bench_shape(shape: Shape, device: str, turns: int) -> dict[str, Any]:
    ways = [way for way in WAYS if way != LIGER or (device == "cuda" and find_spec("liger_kernel"))]
    memory = {way: in_its_own_process(way, shape, device) for way in ways}
    seconds = measure_times(ways, make_inputs(shape, device), turns)
    return {
        "shape": shape._asdict(),
        "kl_price": ratio(seconds[OURS_WITH_KL], seconds[OURS]),
        "ways": {
            way: {
                "seconds": statistics.median(seconds[way]),
                "time_ratio": ratio(seconds[way], seconds[BASELINE]),
                "extra_bytes": memory[way],
                "memory_ratio": memory[way] / memory[BASELINE],
            }
            for way in ways
        },
    }


def show(result: dict[str, Any], device: str) -> None:
    title = ", ".join(f"{name} {size}" for name, size in result["shape"].items()) + f" on {device}"
    table = Table("", "seconds", "ratio", "extra memory, MB", "ratio", title=title)
    for way, row in result["ways"].items():
        cells = f"{row['seconds']:.3f}", f"{row['time_ratio']:.2f}"
        table.add_row(way, *cells, f"{row['extra_bytes'] / 1e6:.0f}", f"{row['memory_ratio']:.2f}")
    Console().print(table)
    click.echo(f"The KL makes ours cost {result['kl_price']:.2f} x what cross-entropy alone costs.\n")


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option("--turns", default=3, show_default=True, type=click.IntRange(3), help="Timed runs of each way.")
@click.option("--output", default="bench_results/bench_loss.json", show_default=True, type=Path)
def main(device: str | None, turns: int, output: Path) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for shape in SHAPES[device]:
        results.append(bench_shape(shape, device, turns))
        show(results[-1], device)
    report = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "turns": turns,
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
