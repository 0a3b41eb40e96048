"""Time and peak memory of a training step: ours beside Hugging Face's Trainer and TRL's.

Trainer        transformers' Trainer: cross-entropy alone, rows in memory
ours, gamma 0  `ddk-cache train` on the same rows: cross-entropy alone
ours           the same, with KL to the teacher's top 64 from the cache
TRL            TRL's GKDTrainer: KL to a teacher of twice the layers, in the loop (where trl is installed)

All train the same random student on the same packed rows in the same precision: whole programs, with reading,
clipping, update and logging. Positions isolate documents, but not in TRL, which takes none. Each side is a
process that is held between two steps; they take turns. Memory is the process's, or its tensors' on a GPU. On
a busy CPU compare CPU time: the seconds of all threads of a process.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np
import torch

from ddk_build import BuildConfig, build_cache
from ddk_cache import Rows, open_cache
from ddk_train import TrainConfig, train
from ddk_train.data.batches import document_positions
from ddk_train.loop.step import OptimizerStep
from tools.bench.shared.teachers import shaped_model
from tools.frame import output_option, paired_ratio, peak_memory, reset_peak_memory, show, write_json
from tools.real_data import texts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {  # rows of a step, tokens of a row
    "cpu": {"tiny": (4, 512), "30m": (4, 512), "135m": (2, 512)},
    "cuda": {"135m": (16, 2048), "0.5b": (8, 2048), "1.5b": (4, 2048)},
}
CACHED_ROWS = 100  # about


class Case(NamedTuple):
    """What every side trains: the student in ``folder``, on rows of the cache there."""

    folder: Path
    rows: int  # of a step
    bf16: bool
    steps: int = 0  # of all turns, and one more: it ends the last turn, and is never made

    def path(self, name: str) -> str:
        return str(self.folder / name)


class Measured(NamedTuple):
    """One turn of a side."""

    seconds: float
    cpu_seconds: float  # of all threads
    peak: int  # bytes


class Turn:
    """Called by a training loop before every step, holds it until the main process asks for steps."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._left, self._start = pipe, 0, (0.0, 0.0)

    def __call__(self) -> None:
        if self._left == 0:
            wall, cpu = (after - before for before, after in zip(self._start, self._now(), strict=True))
            self._pipe.send(Measured(wall, cpu, peak_memory(DEVICE)))
            self._left = self._pipe.recv()
            reset_peak_memory(DEVICE)
            self._start = self._now()
        self._left -= 1

    @staticmethod
    def _now() -> tuple[float, float]:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def ours(case: Case, turn: Callable[[], None], gamma: float) -> None:
    """Run ``ddk-cache train``."""
    config = {
        "cache": case.path("cache"),
        "student": case.path("student"),
        "output_dir": case.path(f"run-{gamma}"),
        "gamma": gamma,
        "max_steps": case.steps,
        "distill_interval": case.steps,
        "per_device_train_batch_size": case.rows,
        "num_reader_threads": 1,  # reads two batches while it is held
        "sample_tokens": 0,
        "bf16": case.bf16,
        "report_to": "none",
    }
    step = OptimizerStep.__call__

    def held(self: OptimizerStep, *arguments: Any) -> Any:
        turn()
        return step(self, *arguments)

    with patch.object(OptimizerStep, "__call__", held):
        train(TrainConfig.model_validate(config))


def trainer(case: Case, turn: Callable[[], None]) -> float:
    """Run transformers' Trainer; return its mean loss."""
    from transformers import Trainer, TrainingArguments

    model, rows, settings = _for_trainers(case)
    arguments, held = TrainingArguments(**settings), _holding(turn)
    done = Trainer(model, arguments, train_dataset=rows, callbacks=[held]).train()
    return float(done.training_loss)


def trl(case: Case, turn: Callable[[], None]) -> None:
    """Run TRL's trainer with a teacher in the loop, on given text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(examples: Any) -> Any:
        batch = default_data_collator(examples)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    model, rows, settings = _for_trainers(case)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    GKDTrainer(
        model,
        AutoModelForCausalLM.from_pretrained(case.path("teacher"), dtype=dtype),
        GKDConfig(**settings, lmbda=0.0, beta=0.0, gradient_checkpointing=False),
        data_collator=collate,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(case.path("student")),
        callbacks=[_holding(turn)],
    ).train()


def _for_trainers(case: Case) -> tuple[Any, Any, dict[str, Any]]:
    """Return the student, the rows as a data set and the training arguments, which are those of ours."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    splits = [domain.train for domain in open_cache(case.path("cache")).values()]
    rows = Rows.concatenate([split.read(range(len(split)), targets=False) for split in splits])
    labels = np.where(rows.loss_mask, np.roll(rows.tokens, -1, axis=1), -100)
    columns = {
        "input_ids": rows.tokens,
        "position_ids": document_positions(rows.segments),
        "labels": np.roll(labels, 1, axis=1),
    }
    model = AutoModelForCausalLM.from_pretrained(case.path("student"), dtype=torch.float32)
    model.config.use_cache = False  # else positions that restart do not isolate documents
    settings = {
        "output_dir": case.path("trainer"),
        "max_steps": case.steps,
        "per_device_train_batch_size": case.rows,
        "bf16": case.bf16,
        "use_cpu": DEVICE == "cpu",
        "learning_rate": 3e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1000,
        "weight_decay": 0.1,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return model, Dataset.from_dict(columns).with_format("torch"), settings


def _holding(turn: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class Held(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()

    return Held()


TRAINER, OURS, TRL = "Trainer", "ours", "TRL, teacher in the loop"
SIDES: dict[str, Callable[[Case, Turn], object]] = {
    TRAINER: trainer,
    "ours, gamma 0": partial(ours, gamma=0.0),
    OURS: partial(ours, gamma=0.2),
    TRL: trl,
}


def run_side(name: str, case: Case, pipe: Connection, threads: int) -> None:
    """Run a side in this process, which the main process ends."""
    torch.set_num_threads(threads)
    turn = Turn(pipe)
    SIDES[name](case, turn)


def prepare(folder: Path, name: str, seq_length: int) -> None:
    """Write a student of SHAPES, a teacher twice as deep, and a cache of rows, answered by a tiny teacher."""
    shaped_model(folder / "student", name)
    shaped_model(folder / "teacher", name, depth=2)
    file, tokens = folder / "text.jsonl", CACHED_ROWS * seq_length
    documents = islice(texts("python"), tokens // 1000)  # they have 2,000 tokens on average
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    teacher = shaped_model(folder / "tiny", "tiny")
    config = {
        "teacher": {"model": str(teacher), "engine": "transformers", "check": "never"},
        "cache": str(folder / "cache"),
        "seq_length": seq_length,
        "validation_rows": 4,
        "domains": {"text": {"path": str(file), "max_tokens": tokens}},
    }
    build_cache(BuildConfig.model_validate(config))


def measure(case: Case, rounds: int, steps: int) -> dict[str, list[Measured]]:
    """Return the turns of every side, but for the first one, which warms up."""
    context = get_context("spawn")
    case = case._replace(steps=(rounds + 1) * steps + 1)
    turns: dict[str, list[Measured]] = {name: [] for name in SIDES if name != TRL or find_spec("trl")}
    pipes = {}
    for name in turns:
        pipes[name], end = context.Pipe()
        arguments = (name, case, end, torch.get_num_threads())
        context.Process(target=run_side, args=arguments, daemon=True).start()
        end.close()
        pipes[name].recv()  # it is before its first step
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(steps)
            turns[name].append(pipe.recv())
    for process in active_children():
        process.kill()
    return {name: measured[1:] for name, measured in turns.items()}


def summary(turns: dict[str, list[Measured]], steps: int) -> dict[str, dict[str, float]]:
    """Return each side's medians for a step, and their ratios to Trainer's."""
    wall, cpu, peak = (
        {name: [getattr(turn, field) for turn in side] for name, side in turns.items()}
        for field in Measured._fields
    )
    return {
        name: {
            "seconds": statistics.median(wall[name]) / steps,
            "time_ratio": paired_ratio(wall[name], wall[TRAINER]),
            "cpu_seconds": statistics.median(cpu[name]) / steps,
            "cpu_time_ratio": paired_ratio(cpu[name], cpu[TRAINER]),
            "peak_bytes": max(peak[name]),
            "memory_ratio": max(peak[name]) / max(peak[TRAINER]),
        }
        for name in turns
    }


@click.command(help=__doc__)
@click.option("--sizes", default=",".join(SIZES[DEVICE]), show_default=True, help="With commas.")
@click.option("--bf16/--float32", default=True, show_default=True)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Turns of each side.")
@click.option("--steps", default=4, show_default=True, type=click.IntRange(1), help="Of a turn.")
@output_option("step")
def main(sizes: str, bf16: bool, rounds: int, steps: int, output: Path) -> None:
    if not find_spec("trl"):
        click.echo("TRL is not installed: without it. pip install trl measures it too")
    results = {}
    for name in sizes.split(","):
        rows, seq_length = SIZES[DEVICE][name]
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch), name, seq_length)
            case = Case(Path(scratch), rows, bf16)
            results[name] = summary(measure(case, rounds, steps), steps)
        show(
            f"{name}, {rows} rows of {seq_length:,} tokens, {'bfloat16' if bf16 else 'float32'}, {DEVICE}",
            ("", "s a step", "ratio", "CPU s", "ratio", "peak, MB", "ratio"),
            [
                (side, *(value / 1e6 if key == "peak_bytes" else value for key, value in row.items()))
                for side, row in results[name].items()
            ],
        )
    versions = {
        package: version(package) for package in ("torch", "transformers", "trl") if find_spec(package)
    }
    threads = {"threads": torch.get_num_threads(), "bf16": bf16, "steps": steps, "rounds": rounds}
    write_json(output, {**versions, **threads, "results": results})


if __name__ == "__main__":
    main()
