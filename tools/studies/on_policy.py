"""What staleness costs: text that the student wrote in 1, 2 or 4 rounds or before every step, or given text.

    python -m tools.studies.on_policy tools/studies/configs/on-policy.yaml

Every student continues the beginnings of the same rows in the same order, with the same optimizer and
schedule; the teacher scores the continuations. In R rounds the student of a round's beginning writes for all
steps of the round, as in ``ddk-cache rounds``; with a round for every step the teacher is in the loop.
``rounds: 0`` trains on the rows' own continuations. Then each student is measured by KL(student ‖ teacher),
from both full distributions, on what it writes after held-out beginnings.

Loss, targets and the stored log-probabilities of the writer are those of ``ddk-cache``. vLLM takes no models
this small on a CPU, and a cache would hold the same numbers: so transformers writes, in this process, and the
targets go from the teacher to the step without a cache. A run is one line of ``output``; runs that it has are
skipped.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import cache
from statistics import fmean
from typing import Annotated, Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddk_build.teacher.targets import sparse_target
from ddk_cache import Cache, Rows, open_cache
from ddk_cache.format import writer_logprob
from ddk_cache.format.layout import SplitName, Target
from ddk_cache.util.configuration import Config, load
from ddk_cache.util.interrupt import Interrupt
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, make_batch
from ddk_train.loop.objective import step_weights
from ddk_train.loop.optimizer import make_optimizer
from ddk_train.loop.schedule import learning_rate
from ddk_train.loop.step import OptimizerStep
from ddk_train.loop.window import Window
from ddk_train.student.distributed import Ranks
from ddk_train.student.files import load_model
from ddk_train.student.probe import examine
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import load_tokenizer
from tools.studies.online_kd import differences
from tools.studies.online_teacher import all_logits, load_frozen
from tools.studies.results import Line, Results

AT_ONCE = 128  # continuations


class Arm(Config):
    """Who writes the text, how often, and what is learned from it."""

    rounds: Annotated[int, Field(ge=0)] = Field(description="times that the student writes; 0: given text")
    target: Target = Field(Target(kind="label"), description="as in a build")
    train: dict[str, Any] = Field({}, description="keys of ddk-cache train")


class Study(Config):
    """A study's YAML."""

    cache: str = Field(description="whose text begins the rows; its targets are not read")
    teacher: str = Field(description="folder")
    student: str = Field(description="folder; {seed} stands for the seed")
    prompt_tokens: PositiveInt = Field(description="of a row, the part that is given")
    samples: PositiveInt = Field(description="continuations of each held-out beginning")
    train: dict[str, Any] = Field(description="keys of ddk-cache train that all arms share")
    arms: Annotated[dict[str, Arm], Field(min_length=1)] = Field(description="by name")
    control: str = Field(description="the arm that the others are compared with")
    seeds: Annotated[list[int], Field(min_length=1)] = Field(description="of the runs")
    output: str = Field(description="file of results, a line a run")

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """Return the training configuration of one run."""
        keys = {"cache": self.cache, "output_dir": "unused", "bf16": False, "report_to": "none"}
        keys |= {"student": self.student.format(seed=seed), "seed": seed}
        return TrainConfig.model_validate(keys | self.train | arm.train)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows that are one document."""

    tokens: NDArray[np.int32]  # [n, S]
    domain: NDArray[np.int64]  # [n]

    @classmethod
    def of(cls, cache: Cache, split: SplitName) -> "Texts":
        """Return the rows of a split, of all domains, that one document fills."""
        tokens, domain = [], []
        for index, name in enumerate(cache.domains):
            part = cache[name].split(split)
            rows = part.read(range(len(part)), targets=False, labels=False)
            full = (rows.segments == 1).all(axis=1)
            tokens.append(rows.tokens[full])
            domain.append(np.full(full.sum(), index))
        return cls(np.concatenate(tokens), np.concatenate(domain))

    def __getitem__(self, rows: NDArray[np.int64]) -> "Texts":
        return Texts(self.tokens[rows], self.domain[rows])


class World:
    """The frozen teacher, the texts, and what the arms make of them."""

    def __init__(self, study: Study) -> None:
        config = study.config(next(iter(study.arms.values())), study.seeds[0])
        self.cache, self.prompt = open_cache(study.cache), study.prompt_tokens
        self.teacher = load_frozen(study.teacher, config, self.cache)
        self.end = int(load_tokenizer(config, self.cache).eos_token_id)
        self.train, self.held_out = Texts.of(self.cache, "train"), Texts.of(self.cache, "validation")

    @torch.no_grad()
    def continued(self, student: Student, texts: Texts) -> Texts:
        """Return what the student writes after the beginnings of ``texts``; the end token fills the rest."""
        tokens = np.full_like(texts.tokens, self.end)
        for first in range(0, len(tokens), AT_ONCE):
            prompts = torch.from_numpy(texts.tokens[first : first + AT_ONCE, : self.prompt]).long()
            written = student.inner.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_length=tokens.shape[1],
                eos_token_id=self.end,
                pad_token_id=self.end,
            )
            tokens[first : first + AT_ONCE, : written.shape[1]] = written.numpy()
        return Texts(tokens, texts.domain)

    def batch(self, texts: Texts) -> Batch:
        """Return the batch of some texts, with loss behind their beginnings up to the first end token."""
        is_end = texts.tokens == self.end
        is_end[:, : self.prompt] = False
        segments = (is_end.cumsum(axis=1) - is_end == 0).astype(np.uint16)
        mask = np.zeros(segments.shape, np.bool_)
        mask[:, self.prompt - 1 : -1] = segments[:, self.prompt :] > 0
        parts = {}
        for index in np.unique(texts.domain).tolist():
            here = texts.domain == index
            parts[index] = Rows(texts.tokens[here] * (segments[here] > 0), segments[here], mask[here])
        return make_batch(parts, self.teacher.vocab_size)

    @torch.no_grad()
    def written(self, student: Student, texts: Texts) -> Batch:
        """Return the batch of what the student wrote, with its log-probabilities as a cache has them."""
        batch = self.batch(texts)
        logprob = of_labels(all_logits(student, batch), batch)
        stored = writer_logprob.decode(writer_logprob.encode(logprob.numpy()))
        return dataclasses.replace(batch, writer_logprob=torch.from_numpy(stored))

    @torch.no_grad()
    def scored(self, batch: Batch, target: Target) -> Batch:
        """Return the batch with the teacher's answers."""
        logits = all_logits(self.teacher, batch)
        if target.kind == "label":
            return dataclasses.replace(batch, teacher_logprob=of_labels(logits, batch))
        ids, logprobs, tail, _ = sparse_target(logits, batch.labels, target)
        return dataclasses.replace(batch, ids=ids, logprobs=logprobs, tail_logprob=tail)


def of_labels(logits: Tensor, batch: Batch) -> Tensor:
    """Return the log-probability of each label, [M], from logits [M, V]."""
    return logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]


def distill(world: World, config: TrainConfig, arm: Arm) -> Student:
    """Train a student as ``arm`` says; with ``max_steps`` rounds it writes before every step."""
    torch.manual_seed(config.seed)
    student = make_student(world, config)
    ranks = Ranks(0, 1, torch.device("cpu"))
    window = Window(config, ranks, world.cache.domains)
    optimizer = make_optimizer(student, config, ranks.device)
    optimizer_step = OptimizerStep(config, ranks, student, optimizer, window, Interrupt())
    for step, batch in enumerate(batches(world, config, arm, student), start=1):
        weights = step_weights(config, world.cache.domains, step)
        done = optimizer_step([world.scored(batch, arm.target)], learning_rate(step, config), weights)
        assert torch.isfinite(done.norm), f"step {step}: the loss is not finite"
    return student


def make_student(world: World, config: TrainConfig) -> Student:
    """Return the student that a run begins with."""
    model = load_model(config, world.cache, load_tokenizer(config, world.cache))
    return Student(model, config, examine(model, config, world.cache.seq_length))


def batches(world: World, config: TrainConfig, arm: Arm, student: Student) -> Iterator[Batch]:
    """Yield the text of each step; the student, which learns meanwhile, writes a round's at once."""
    size, steps = config.per_device_train_batch_size, config.max_steps
    random = np.random.default_rng(config.seed)
    rows = np.stack([draw(random, world.train.domain, size) for _ in range(steps)])
    for part in np.array_split(rows, max(arm.rounds, 1)):
        texts = world.train[part.ravel()]
        if arm.rounds:
            texts = world.continued(student, texts)
        steps_texts = [texts[index] for index in np.arange(part.size).reshape(part.shape)]
        if arm.rounds:
            yield from [world.written(student, own) for own in steps_texts]
        else:
            yield from map(world.batch, steps_texts)


def draw(random: np.random.Generator, domain: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the rows of a step, equally many of each domain."""
    count = int(domain.max()) + 1
    return np.concatenate([random.choice(np.flatnonzero(domain == d), size // count) for d in range(count)])


@torch.no_grad()
def measure(world: World, student: Student, samples: int) -> dict[str, dict[str, float]]:
    """Return KL(student ‖ teacher) on own and KL(teacher ‖ student) on given held-out text, nats a token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        beginnings = world.held_out[np.tile(np.arange(len(world.held_out.domain)), samples)]
        own = world.continued(student, beginnings)
    return {"own": _kl(world, student, own, is_own=True), "given": _kl(world, student, world.held_out)}


def _kl(world: World, student: Student, texts: Texts, *, is_own: bool = False) -> dict[str, float]:
    """Return the mean KL by domain, and ``mean``, of domains."""
    sums = np.zeros((2, len(world.cache.domains)))
    for first in range(0, len(texts.domain), AT_ONCE):
        batch = world.batch(texts[np.arange(first, min(first + AT_ONCE, len(texts.domain)))])
        q, p = (all_logits(model, batch).log_softmax(-1) for model in (student, world.teacher))
        kl = (q.exp() * (q - p) if is_own else p.exp() * (p - q)).sum(-1)
        np.add.at(sums[0], batch.domain.numpy(), kl.double().numpy())
        np.add.at(sums[1], batch.domain.numpy(), 1)
    values = dict(zip(world.cache.domains, (sums[0] / sums[1]).tolist(), strict=True))
    return values | {"mean": fmean(values.values())}


def run(study: Study) -> list[Line]:
    """Train and measure what is missing, seed by seed; return the lines of all."""
    results, lines = Results(study.output), []
    world = cache(lambda: World(study))
    for seed in study.seeds:
        for name, arm in study.arms.items():
            config = study.config(arm, seed)
            shared = study.model_dump(include={"teacher", "prompt_tokens", "samples"})
            what = {"config": config.model_dump(), "arm": arm.model_dump(exclude={"train"}), **shared}

            def train(name: str = name, arm: Arm = arm, config: TrainConfig = config) -> Line:
                of, began = world(), time.process_time()
                student = distill(of, config, arm)
                trained, figures = time.process_time() - began, measure(of, student, study.samples)
                click.echo(
                    f"{name}, seed {config.seed}: {figures['own']['mean']:.4f} on own text, "
                    f"{figures['given']['mean']:.4f} on given text, {trained:.0f} s"
                )
                return {"name": name, "seed": config.seed, "cpu_seconds": trained, **figures}

            lines.append(results.get(what, train) | {"name": name})
    return lines


def show(study: Study, lines: list[dict[str, Any]]) -> None:
    """Print both measures by arm, and their differences to the control's, seed by seed."""
    table = Table("", "KL on own text", "more than the control", "KL on given text", "more", box=None)
    for name in study.arms:
        cells = [name]
        for figure in ("own", "given"):
            more, error = differences(lines, name, study.control, figure)
            mean = fmean(line[figure]["mean"] for line in lines if line["name"] == name)
            cells += [f"{mean:.4f}", f"{more:+.4f} ± {error:.4f}"]
        table.add_row(*cells)
    Console(width=120).print(table)


@click.command(help=__doc__)
@click.argument("study", type=click.Path(dir_okay=False))
@click.option("--set", "overrides", multiple=True, help="key.sub=value, as in ddk-cache train")
def main(study: str, overrides: tuple[str, ...]) -> None:
    described = load(study, overrides, Study)
    show(described, run(described))


if __name__ == "__main__":
    main()
