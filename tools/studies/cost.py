"""The cost of a teacher in the loop and of a cache instead: CPU seconds measured, FLOPs computed.

    python -m tools.studies.cost tools/studies/configs/small.world.yaml        # a world that is made

Online, every student's every token goes through the teacher. With a cache the teacher reads C tokens once,
whatever is trained on them: n students of D tokens each are cheaper from the cache when n D > C, if capturing
a token costs what the teacher in the loop costs. Both are measured here, on one thread and in seconds of CPU,
so that what else the machine does changes little.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch

from ddk_build.build import build_cache
from ddk_cache import open_cache
from ddk_cache.util.interrupt import Interrupt
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, reader
from ddk_train.loop.objective import Weights
from ddk_train.loop.optimizer import make_optimizer
from ddk_train.loop.step import OptimizerStep
from ddk_train.loop.window import Window
from ddk_train.student.distributed import Ranks
from ddk_train.student.files import load_model
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import load_tokenizer
from tools.frame import output_option, write_json
from tools.studies.world import build_config, read_world

Result = TypeVar("Result")

ROWS, STEPS, TOKENS = 16, 30, 40_000  # a step's rows; steps timed; tokens captured of each domain
PAPER = {"student": 1.456e8, "online": 5.401e8}  # TFLOPs of the paper's CPT and DDK


def timed(work: Callable[..., Result], *arguments: Any) -> tuple[float, Result]:
    """Return the CPU seconds of all threads of this process, and the result."""
    before = time.process_time()
    result = work(*arguments)
    return time.process_time() - before, result


class Loop:
    """Steps on the same rows, with the targets from the cache, from a teacher in the loop, or without."""

    def __init__(self, cache_folder: Path, student: Path, teacher: Path) -> None:
        self.cache = open_cache(str(cache_folder))
        config = TrainConfig.model_validate(
            {"cache": str(cache_folder), "student": str(student), "output_dir": "unused", "bf16": False}
        )
        ranks, tokenizer = Ranks(0, 1, torch.device("cpu")), load_tokenizer(config, self.cache)
        self.student = Student(load_model(config, self.cache, tokenizer), config)
        teacher_config = config.model_copy(update={"student": str(teacher)})
        self.teacher = Student(load_model(teacher_config, self.cache, tokenizer), teacher_config)
        window = Window(config, ranks, self.cache.domains)
        optimizer = make_optimizer(self.student, config, ranks.device)
        self.step = OptimizerStep(config, ranks, self.student, optimizer, window, Interrupt())

    def run(self, kind: str, steps: int) -> int:
        """Train for ``steps``; returns the tokens trained on."""
        count = len(self.cache.domains)
        read = reader(self.cache, targets=[kind == "cache"] * count, vocab_size=self.student.vocab_size)
        random, tokens = np.random.default_rng(0), 0
        for _ in range(steps):
            domain = random.integers(0, count, ROWS)
            row = np.array([random.integers(0, len(self.cache[self.cache.domains[d]].train)) for d in domain])
            batch = read(domain, row)
            if kind == "online":
                batch = self._with_teacher(batch)
            gamma = 0.0 if kind == "no teacher" else 0.2
            tokens += self.step([batch], 1e-4, Weights([1.0] * count, [gamma] * count, [0.0] * count)).tokens
        return tokens

    @torch.no_grad()
    def _with_teacher(self, batch: Batch) -> Batch:
        """Return the batch with the teacher's best entries, as many as the cache keeps."""
        hidden = self.teacher.hidden(batch).index_select(0, batch.label_positions)
        logits = self.teacher.inner.get_output_embeddings()(hidden)
        best = logits.log_softmax(-1).topk(self.cache.target.top_k)
        tail = torch.log1p(-best.values.exp().sum(-1).clamp(max=1 - 1e-6))
        return replace(batch, ids=best.indices.int(), logprobs=best.values, tail_logprob=tail)


def measure(world_file: Path) -> dict[str, float]:
    """Return the CPU seconds a token, and the number of weights."""
    world = read_world(world_file)
    with tempfile.TemporaryDirectory() as scratch:
        config = build_config(world, Path(scratch) / "cache", {"kind": "topk", "top_k": 64})
        domains = {
            name: domain.model_copy(update={"max_tokens": TOKENS}) for name, domain in config.domains.items()
        }
        config = config.model_copy(update={"domains": domains})
        tokenising, _ = timed(partial(build_cache, config, tokens_only=True))
        capturing, _ = timed(build_cache, config)
        cache = open_cache(config.cache)
        states = [cache[name].state for name in cache.domains]
        tokens = sum(state.train.tokens + state.validation.tokens for state in states)
        loop = Loop(Path(config.cache), world.root / "student-0", world.root / "teacher")
        figures = {"tokenise": tokenising / tokens, "capture": capturing / tokens}
        for kind in ("no teacher", "cache", "online"):
            loop.run(kind, 3)  # warm
            seconds, trained = timed(loop.run, kind, STEPS)
            figures[kind] = seconds / trained
    for name, model in (("student weights", loop.student), ("teacher weights", loop.teacher)):
        figures[name] = sum(parameter.numel() for parameter in model.parameters())
    return figures


def markdown(figures: dict[str, float]) -> str:
    """Return tables: measured seconds beside computed FLOPs, and what n students cost either way."""
    student, teacher = figures["student weights"], figures["teacher weights"]
    computed = {
        "capture": 2 * teacher,
        "no teacher": 6 * student,
        "cache": 6 * student,
        "online": 6 * student + 2 * teacher,
    }
    lines = [
        f"Teacher {teacher:,.0f} weights, student {student:,.0f}; microseconds of CPU a token:",
        "",
        "| a token that is | measured | FLOPs computed |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {1e6 * figures[name]:.1f} | {flops:.3g} |" for name, flops in computed.items()),
        "",
        "n students, each once over the cached tokens; cached / online:",
        "",
        "| n | measured here | FLOPs here | the paper's FLOPs |",
        "| ---: | ---: | ---: | ---: |",
    ]
    build = figures["tokenise"] + figures["capture"]
    for n in (1, 2, 3, 5, 10):
        measured = (build + n * figures["cache"]) / (n * figures["online"])
        flops = (2 * teacher + n * 6 * student) / (n * (6 * student + 2 * teacher))
        paper = (PAPER["online"] - PAPER["student"] + n * PAPER["student"]) / (n * PAPER["online"])
        lines.append(f"| {n} | {measured:.2f} | {flops:.2f} | {paper:.2f} |")
    even = build / (figures["online"] - figures["cache"])
    lines += ["", f"Break-even: {even:.2f} passes over the cached tokens, by all students together."]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("world", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@output_option("cost")
def main(world: Path, output: Path) -> None:
    """Measure what the teacher of WORLD.yaml costs in the loop and by a cache."""
    torch.set_num_threads(1)
    figures = measure(world)
    write_json(output, figures)
    click.echo(markdown(figures))


if __name__ == "__main__":
    main()
