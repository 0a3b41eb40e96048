"""What caching costs: students of a teacher in the loop against students of a cached target.

    python -m tools.studies.online_kd tools/studies/configs/caching.yaml

trains every choice of the study with every seed. All see the same rows in the same order with the same
optimizer, schedule and weights, which are those of ``ddk-cache train``; only the target differs. Then each
student is measured on the held-out rows against the teacher's full distribution. A run is one line of
``output``; runs that it has are skipped.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import cache
from statistics import fmean, stdev
from typing import Annotated, Any, Self

import click
import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddk_cache import Cache, open_cache
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.sampler import RowSampler, SamplerState
from ddk_cache.util.configuration import Config, first_problem, load
from ddk_cache.util.interrupt import Interrupt
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, make_batch
from ddk_train.loop.mixture import (
    Measurement,
    interval_share,
    mean_labels,
    next_factor,
    row_share,
)
from ddk_train.loop.objective import step_weights
from ddk_train.loop.optimizer import make_optimizer
from ddk_train.loop.schedule import learning_rate
from ddk_train.loop.step import OptimizerStep
from ddk_train.loop.window import Window
from ddk_train.student.distributed import Ranks, measuring
from ddk_train.student.files import load_model
from ddk_train.student.probe import examine
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import load_tokenizer
from tools.studies.online_teacher import (
    Choice,
    Int64,
    Teacher,
    all_logits,
    entries,
    entropy,
    full,
    least_sure,
    load_frozen,
)
from tools.studies.results import Line, Results


class Study(Config):
    """A study's YAML."""

    teacher: str = Field(description="folder or hub id")
    train: dict[str, Any] = Field(
        description="keys of ddk-cache train; {seed} in student stands for the seed"
    )
    choices: Annotated[dict[str, Choice], Field(min_length=1)] = Field(description="by name")
    control: str = Field(description="the choice that the others are compared with")
    rows: Annotated[int, Field(ge=1)] = Field(2**40, description="of each domain at most: the first ones")
    seeds: Annotated[list[int], Field(min_length=1)] = Field(description="of the runs")
    remember: Annotated[float, Field(ge=0)] = Field(
        4.0, description="GiB of the teacher's logits kept in memory"
    )
    output: str = Field(description="file of results, a line a run")

    @model_validator(mode="after")
    def _has_a_control(self) -> Self:
        if self.control not in self.choices:
            raise ValueError(f"control: there is no choice {self.control!r}")
        return self

    def narrowed(self, names: list[str]) -> "Study":
        """Return the study of these choices and the control; raise ConfigError for an unknown name."""
        if unknown := [name for name in names if name not in self.choices]:
            raise ConfigError(f"--only: there is no choice {unknown[0]!r}")
        kept = {name: self.choices[name] for name in self.choices if name in (self.control, *names)}
        return self.model_copy(update={"choices": kept})

    def config(self, choice: Choice, seed: int) -> TrainConfig:
        """Return the training configuration of one run."""
        keys = {"output_dir": "unused", "bf16": False, "report_to": "none", "strategy": "uniform"}
        keys |= self.train | choice.train | {"seed": seed}
        keys["student"] = str(keys["student"]).format(seed=seed)
        try:
            config = TrainConfig.model_validate(keys)
        except ValidationError as error:
            raise ConfigError(f"train: {first_problem(error, TrainConfig)}") from error
        if config.by_ddk or config.gradient_accumulation_steps > 1:
            raise ConfigError("train: this tool draws by fixed shares, a batch a step")
        return config


def drawn(config: TrainConfig, cache: Cache, rows: list[int]) -> Iterator[tuple[Int64, Int64]]:
    """Yield the rows of each step, domain and row [n], as ``ddk-cache train`` draws them in one process."""
    state, size = SamplerState((0,) * len(rows)), config.per_device_train_batch_size
    unmeasured = np.ones(len(rows))
    factor = next_factor(config, Measurement(cache.domains, None, unmeasured, unmeasured, rows))
    labels_per_row = mean_labels(cache)
    for begin in range(0, config.max_steps, config.distill_interval):
        interval = begin // config.distill_interval
        steps = min(config.distill_interval, config.max_steps - begin)
        share = row_share(config, interval, interval_share(config, interval, factor, rows), labels_per_row)
        domain, row, state = RowSampler(rows, config.seed).draw(state, share, steps * size)
        yield from zip(domain.reshape(steps, size), row.reshape(steps, size), strict=True)


def distill(config: TrainConfig, choice: Choice, teacher: Teacher, most_rows: int = 2**40) -> Student:
    """Train a student on what ``choice`` makes of the teacher's distribution."""
    cache, ranks = teacher.cache, Ranks(0, 1, torch.device("cpu"))
    torch.manual_seed(config.seed)
    language_model = load_model(config, cache, load_tokenizer(config, cache))
    student = Student(language_model, config, examine(language_model, config, cache.seq_length))
    optimizer = make_optimizer(student, config, ranks.device)
    window = Window(config, ranks, cache.domains)
    optimizer_step = OptimizerStep(config, ranks, student, optimizer, window, Interrupt())
    random = torch.Generator().manual_seed(config.seed)
    rows = [min(len(cache[name].train), most_rows) for name in cache.domains]
    for step, (domain, row) in enumerate(drawn(config, cache, rows), start=1):
        rate = learning_rate(step, config)
        batch, logits = teacher.read(domain, row)
        cached = teacher.cached_offsets(domain, row, batch)
        ids, logprobs, tail = entries(choice, logits, batch.labels, cached, random)
        batch = dataclasses.replace(batch, ids=ids, logprobs=logprobs, tail_logprob=tail)
        if choice.positions < 1:
            batch = least_sure(batch, doubt(choice, student, batch, logits, random), choice.positions)
        done = optimizer_step([batch], rate, step_weights(config, cache.domains, step))
        assert torch.isfinite(done.norm), f"step {step}: the loss is not finite"
    return student


def doubt(choice: Choice, student: Student, batch: Batch, logits: Tensor, random: torch.Generator) -> Tensor:
    """Return how unsure the choosing model is at each position [M]; ``logits`` are the teacher's."""
    if choice.unsure == "nobody":
        return torch.rand(batch.labels.shape, generator=random)
    if choice.unsure == "teacher":
        return entropy(logits)
    with measuring(student):
        return entropy(all_logits(student, batch))


def held_out(teacher: Teacher, batch_size: int) -> list[tuple[str, Batch]]:
    """Return every domain's validation rows with the teacher's full distribution."""
    batches = []
    for domain, name in enumerate(teacher.cache.domains):
        split = teacher.cache[name].validation
        for start in range(0, len(split), batch_size):
            rows = np.arange(start, min(start + batch_size, len(split)))
            part = split.read(rows, targets=False, labels=False)
            batch = make_batch({domain: part}, teacher.model.vocab_size)
            with torch.no_grad():
                ids, logprobs, tail = full(all_logits(teacher.model, batch))
            batches.append((name, dataclasses.replace(batch, ids=ids, logprobs=logprobs, tail_logprob=tail)))
    return batches


def measure(student: Student, batches: list[tuple[str, Batch]]) -> dict[str, dict[str, float]]:
    """Return cross-entropy and KL to the full distribution by domain, nats a label; ``mean``: of domains."""
    sums: dict[str, list[float]] = {}
    with measuring(student):
        for name, batch in batches:
            result, count = student(batch, 1.0), len(batch.labels)
            values = [float(result.cross_entropy) * count, float(result.kl) * count, count]
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 3), values, strict=True)]
    cross_entropy = {name: ce / count for name, (ce, _, count) in sums.items()}
    kl = {name: of / count for name, (_, of, count) in sums.items()}
    return {
        "cross_entropy": cross_entropy | {"mean": fmean(cross_entropy.values())},
        "kl": kl | {"mean": fmean(kl.values())},
    }


def run(study: Study) -> list[Line]:
    """Train the runs that are missing; return the lines of all."""
    results, lines = Results(study.output), []

    @cache
    def loaded() -> tuple[Teacher, list[tuple[str, Batch]]]:
        config = study.config(next(iter(study.choices.values())), study.seeds[0])
        opened = open_cache(config.caches[0])
        teacher = Teacher(load_frozen(study.teacher, config, opened), opened, int(study.remember * 2**30))
        return teacher, held_out(teacher, config.per_device_train_batch_size)

    for seed in study.seeds:
        for name, choice in study.choices.items():
            config = study.config(choice, seed)
            what = {
                "teacher": study.teacher,
                "rows": study.rows,
                "config": config.model_dump(),
                "choice": choice.model_dump(exclude={"train"}),
            }

            def train(name: str = name, choice: Choice = choice, config: TrainConfig = config) -> Line:
                teacher, batches = loaded()
                began = time.perf_counter()
                student = distill(config, choice, teacher, study.rows)
                seconds, figures = time.perf_counter() - began, measure(student, batches)
                click.echo(
                    f"{name}, seed {config.seed}: KL {figures['kl']['mean']:.4f}, "
                    f"cross-entropy {figures['cross_entropy']['mean']:.4f}"
                )
                return {"name": name, "seed": config.seed, "seconds": seconds, **figures}

            lines.append(results.get(what, train) | {"name": name})
    return lines


def differences(lines: list[dict[str, Any]], name: str, control: str, figure: str) -> tuple[float, float]:
    """Return mean and standard error over seeds of a figure's difference to the same seed's control."""
    by = {(line["name"], line["seed"]): line[figure]["mean"] for line in lines}
    each = [by[choice, seed] - by[control, seed] for choice, seed in by if choice == name]
    return fmean(each), stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")


def show(study: Study, lines: list[dict[str, Any]]) -> None:
    """Print the results by choice."""
    table = Table("", "cross-entropy", "more than the control", "%", "KL", "more", box=None)
    for name in study.choices:
        cells = [name]
        for figure in ("cross_entropy", "kl"):
            mean = fmean(line[figure]["mean"] for line in lines if line["name"] == name)
            control = fmean(line[figure]["mean"] for line in lines if line["name"] == study.control)
            more, error = differences(lines, name, study.control, figure)
            cells += [f"{mean:.4f}", f"{more:+.4f} ± {error:.4f}"]
            cells += [f"{100 * more / control:+.2f}"] if figure == "cross_entropy" else []
        table.add_row(*cells)
    Console(width=120).print(table)


@click.command(help=__doc__)
@click.argument("study", type=click.Path(dir_okay=False))
@click.option("--set", "overrides", multiple=True, help="key.sub=value, as in ddk-cache train")
@click.option("--only", help="Names of choices, with semicolons between.")
def main(study: str, overrides: tuple[str, ...], only: str | None) -> None:
    try:
        described = load(study, overrides, Study)
        if only:
            described = described.narrowed([name.strip() for name in only.split(";")])
        show(described, run(described))
    except (ConfigError, CacheError) as error:
        click.echo(f"Error: {error}", err=True)
        raise click.exceptions.Exit(error.exit_code) from error


if __name__ == "__main__":
    main()
