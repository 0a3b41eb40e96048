"""The frame of every measuring tool: sides timed in turn, a table on the terminal, one JSON file."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from rich.console import Console
from rich.table import Table

COMMAND = Path(sys.executable).with_name("ddk-cache")

Result = TypeVar("Result")
Command = TypeVar("Command", bound=Callable[..., Any])


def output_option(name: str) -> Callable[[Command], Command]:
    """Add ``--output``, the JSON file of a command's figures: by default ``bench_results/<name>.json``."""
    return click.option(
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        default=Path("bench_results") / f"{name}.json",
        show_default=True,
        help="JSON file of the figures.",
    )


def device() -> str:
    """Return the name of the GPU, or of the processor with the number of its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write_json(output: Path, figures: Mapping[str, Any]) -> None:
    """Write figures to ``output``, with the device and the date."""
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"device": device(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    output.write_text(json.dumps({**figures, **facts}, indent=2, default=float) + "\n", encoding="utf-8")


def write_yaml(path: Path, keys: Mapping[str, Any]) -> Path:
    """Write a configuration for a command; return its path."""
    path.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    return path


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, labels: int = 1) -> None:
    """Print a table. The first ``labels`` columns are text; numbers are shortened by ``cell``."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < labels else "right")
    for row in rows:
        table.add_row(*map(cell, row))
    Console(width=None if Console().is_terminal else 130).print(table)


def cell(value: object) -> str:
    """Format a figure: integers and large numbers with thousands separators, others with three digits."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def seconds(call: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_seconds(call: Callable[[], object], rounds: int = 3) -> float:
    """Return the median time of ``rounds`` calls."""
    return statistics.median(seconds(call) for _ in range(rounds))


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side in each round.

    A round calls every side once, so that a busy machine is busy for all. One round before them warms up.
    """
    times = [{name: seconds(call) for name, call in sides.items()} for _ in range(rounds + 1)]
    return {name: [turn[name] for turn in times[1:]] for name in sides}


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median over the rounds of one side's time divided by the baseline's in the same round."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))


def process_memory(kind: str) -> int:
    """Return bytes of this process's memory (Linux): VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{kind}:")[2].split()[0])


def reset_peak_memory(device: str) -> int:
    """Forget the peak of this process's memory, or of its tensors on a GPU; return the bytes in use."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to VmRSS
    return process_memory("VmRSS")


def peak_memory(device: str) -> int:
    """Return the bytes in use at the peak since ``reset_peak_memory``."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")


def in_new_process(call: Callable[..., Result], *arguments: Any) -> Result:
    """Return the result of a call in a process started for it alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()
