"""Students of another tokenizer: given the teacher's and distilled, or trained with their own.

    python -m tools.studies.other_tokenizer tools/studies/configs/other-tokenizer.yaml

All students of a seed read the same rows of one cache in the same order; those with a tokenizer of their own
read the text of these rows in their own tokens. Held-out bits per byte are over the same bytes for all. After
its warm-up the learning rate is constant; each length ends with a branch in which it falls linearly, so that
each is a whole run. A run is one line of ``output``; runs that it has are skipped.
"""

import copy
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self

import click
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch.nn.utils import clip_grad_norm_

from ddk_build.build import build_cache
from ddk_cache import Cache, Rows, Split, open_cache
from ddk_cache.util.configuration import Config, load
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, make_batch
from ddk_train.loop.optimizer import make_optimizer
from ddk_train.loop.schedule import learning_rate
from ddk_train.student.distributed import measuring
from ddk_train.student.files import load_model
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import read_tokenizer
from ddk_train.transplant.transplant import transplant
from tools.studies.online_kd import drawn
from tools.studies.online_teacher import all_logits
from tools.studies.respelling import Part, Respeller, alm, join
from tools.studies.results import Line, Results
from tools.studies.tables import shown, spread, table
from tools.studies.world import (
    World,
    build_config,
    make,
    make_student,
    random_model,
    read_world,
    settle,
)

Int64 = NDArray[np.int64]

ROWS = 16  # measured at once
BOUNDARY = r" ?\S+|\s+(?!\S)|\s+"  # words of the other tokenizer: they end at spaces alone


class Arm(Config):
    """What a student begins as, and what it is trained on."""

    start: Literal["own", "mean", "omp", "teacher"] = Field(
        description="own: another tokenizer; mean, omp: transplanted by this method; teacher: the teacher's"
    )
    gamma: float = Field(0.0, description="weight of the KL or, with its own tokenizer, of ALM")
    cross_entropy_weight: float = 1.0
    frozen: int = Field(0, description="first steps in which the embeddings alone are trained")


class Study(Config):
    """A study's YAML."""

    world: str = Field(description="YAML of tools/studies/world.py, beside the study's")
    vocab_size: int = Field(description="of the other tokenizer")
    tokenizer: str | None = Field(None, description="its folder; without it one is trained on the text")
    train: dict[str, Any] = Field(description="keys of ddk-cache train")
    lengths: Annotated[list[int], Field(min_length=1)] = Field(description="steps")
    decay: float = Field(0.2, description="part of a run in which the learning rate falls")
    seeds: list[int]
    arms: dict[str, Arm]
    control: str = Field(description="the arm that the others are compared with")
    output: str = Field(description="file of results, a line a run")

    @model_validator(mode="after")
    def _has_a_control(self) -> Self:
        if self.control not in self.arms:
            raise ValueError(f"control: there is no arm {self.control!r}")
        return self

    def config(self, cache: Path, student: Path, seed: int) -> TrainConfig:
        """Return a training configuration, of which the longest run draws its rows."""
        steps = {"max_steps": max(self.lengths), "distill_interval": max(self.lengths)}
        return train_config(cache, student, seed, {**self.train, **steps})


def train_config(cache: Path, student: Path, seed: int, keys: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration of ``ddk-cache train`` that is not used to run it."""
    given = {"cache": str(cache), "student": str(student), "output_dir": "unused", "seed": seed}
    return TrainConfig.model_validate({**given, "bf16": False, "report_to": "none", **keys})


class Texts:
    """The rows of a cache, in the teacher's tokens or in the others, and what is held out."""

    def __init__(self, cache: Cache, respeller: Respeller) -> None:
        self.cache, self._respeller = cache, respeller
        self._rows: dict[tuple[int, int], Rows] = {}  # about 70 kB each
        self._respelled: dict[tuple[int, int], list[Part]] = {}
        splits = [cache[name].validation for name in cache.domains]
        self.sizes = [len(cache[name].train) for name in cache.domains]
        self._held_out = [[self._respell(split, row) for row in range(len(split))] for split in splits]

    def _respell(self, split: Split, row: int) -> list[Part]:
        return self._respeller.respell(split.read([row], targets=False))

    def read(self, domain: Int64, row: Int64, student: Student, *, targets: bool) -> Batch:
        """Return training rows (domain and row, [n] each) in the teacher's tokens."""
        keys = list(zip(domain.tolist(), row.tolist(), strict=True))
        for index, at in set(keys) - self._rows.keys():
            self._rows[index, at] = self.cache[self.cache.domains[index]].train.read([at], labels=False)
        rows = Rows.concatenate([self._rows[key] for key in keys])
        return make_batch({0: rows if targets else replace(rows, targets=None)}, student.vocab_size)

    def respelled(self, domain: Int64, row: Int64) -> list[list[Part]]:
        """Return training rows (domain and row, [n] each) in the other tokens."""
        keys = list(zip(domain.tolist(), row.tolist(), strict=True))
        for index, at in set(keys) - self._respelled.keys():
            self._respelled[index, at] = self._respell(self.cache[self.cache.domains[index]].train, at)
        return [self._respelled[key] for key in keys]

    def bits_per_byte(self, student: Student, *, own: bool) -> dict[str, float]:
        """Return the held-out bits per byte by domain, over the bytes that both tokenizers can predict."""
        result = {}
        for name, rows in zip(self.cache.domains, self._held_out, strict=True):
            nats = 0.0
            for first in range(0, len(rows), ROWS):
                with measuring(student):
                    batch = self._held_out_batch(name, first, rows[first : first + ROWS], student, own=own)
                    nats += float(student(batch, 0.0).cross_entropy) * len(batch.labels)
            result[name] = nats / math.log(2) / sum(part.size for row in rows for part in row)
        return result

    def _held_out_batch(
        self, name: str, first: int, rows: list[list[Part]], student: Student, *, own: bool
    ) -> Batch:
        if own:
            batch, chunk, _ = join(rows, student.vocab_size)
            columns = ("label_positions", "labels", "domain")
            return replace(batch, **{column: getattr(batch, column)[chunk >= 0] for column in columns})
        read = self.cache[name].validation.read(range(first, first + len(rows)), targets=False, labels=False)
        mask = np.zeros_like(read.loss_mask)
        for index, row in enumerate(rows):
            for part in row:
                mask[index, part.in_chunks] = True
        return make_batch({0: replace(read, loss_mask=mask)}, student.vocab_size)


class Training:
    """A student and its optimizer between two steps."""

    def __init__(self, config: TrainConfig, arm: Arm, texts: Texts) -> None:
        torch.manual_seed(config.seed)
        tokenizer = read_tokenizer("student", config.student)
        self.student = Student(load_model(config, texts.cache, tokenizer), config)
        self.optimizer = make_optimizer(self.student, config, torch.device("cpu"))
        embeddings = [self.student.inner.get_input_embeddings().weight, self.student.head.weight]
        ids = set(map(id, embeddings))
        self._body = [weight for weight in self.student.parameters() if id(weight) not in ids]
        self._config, self._arm = config, arm

    def branch(self) -> "Training":
        """Return a copy that goes its own way."""
        return copy.deepcopy(self)

    def step(self, texts: Texts, rows: tuple[Int64, Int64], rate: float, number: int) -> None:
        """Train on these rows (domain and row, [n] each)."""
        self._loss(texts, *rows).backward()
        if number <= self._arm.frozen:
            for weight in self._body:
                weight.grad = None
        norm = clip_grad_norm_(self.student.parameters(), self._config.max_grad_norm)
        assert torch.isfinite(norm), f"step {number}: the loss is not finite"
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, texts: Texts, domain: Int64, row: Int64) -> Any:
        student, arm = self.student, self._arm
        weight = arm.cross_entropy_weight
        if arm.start != "own":
            batch = texts.read(domain, row, student, targets=arm.gamma > 0)
            return student(batch, arm.gamma, weight).loss
        batch, chunk, teacher = join(texts.respelled(domain, row), student.vocab_size)
        if not arm.gamma:
            return student(batch, 0.0, weight).loss
        logprob = all_logits(student, batch).log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        return arm.gamma * alm(logprob, chunk, teacher) - weight * logprob.mean()


def run(study: Study, config: TrainConfig, arm: Arm, texts: Texts) -> dict[int, dict[str, float]]:
    """Train; return the held-out bits per byte by domain for each length, and before the first step."""
    training, own, done = Training(config, arm, texts), arm.start == "own", 0
    rows = list(drawn(config, texts.cache, texts.sizes))
    result = {0: texts.bits_per_byte(training.student, own=own)}

    def rate(step: int) -> float:
        return config.learning_rate * min(1.0, step / max(config.warmup_steps, 1))

    for length in sorted(study.lengths):
        falling = round(length * (1 - study.decay))
        for step in range(done + 1, falling + 1):
            training.step(texts, rows[step - 1], rate(step), step)
        done, ending = falling, training.branch()
        for step in range(falling + 1, length + 1):
            left = (length - step) / (length - falling)
            lowest = config.min_learning_rate
            ending.step(texts, rows[step - 1], lowest + left * (rate(step) - lowest), step)
        result[length] = texts.bits_per_byte(ending.student, own=own)
    return result


def make_tokenizer(world: World, folder: Path, vocab_size: int) -> Path:
    """Train a byte-level BPE whose words end at spaces alone, on all of the world's text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if folder.exists():
        return folder
    files = [world.root / "text" / f"{domain}.jsonl" for domain in world.characters]
    texts = (json.loads(line)["text"] for file in files for line in file.read_text("utf-8").splitlines())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BOUNDARY), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(scratch)
    settle(scratch, folder)
    return folder


class Students:
    """The folders that runs start from; what is missing is made."""

    def __init__(self, world: World, study: Study, cache: Path, texts: Texts) -> None:
        self._world, self._study, self._cache, self._texts = world, study, cache, texts
        self._own = other_world(world, study)

    def folder(self, start: str, seed: int) -> Path:
        """Return the folder of an arm's ``start``."""
        if start == "teacher":
            return make_student(self._world, seed)
        own = self._make_own(seed)
        if start == "own":
            return own
        folder = self._own.root / f"{start}-{seed}"
        if not folder.exists():
            transplant(str(own), str(self._world.teacher_folder), folder, method=start)
        return folder

    def _make_own(self, seed: int) -> Path:
        """Train a first student on the world's mixture, as ``make_student`` does."""
        folder = self._own.root / f"student-{seed}"
        if folder.exists():
            return folder
        begin = random_model(self._own, self._world.student, f"student-start-{seed}", seed)
        config = train_config(self._cache, begin, seed, self._world.student_training)
        training = Training(config, Arm(start="own"), self._texts)
        rows = drawn(config, self._texts.cache, self._texts.sizes)
        for step, drawn_rows in enumerate(rows, start=1):
            training.step(self._texts, drawn_rows, learning_rate(step, config), step)
        scratch = Path(tempfile.mkdtemp(dir=self._own.root))
        training.student.inner.save_pretrained(scratch)
        read_tokenizer("student", str(begin)).save_pretrained(scratch)
        settle(scratch, folder)
        return folder


def other_world(world: World, study: Study) -> World:
    """Return the world's folder of students with the other tokenizer, whose rows are up to twice as long."""
    other = {"folder": str(world.root / f"other-{study.vocab_size}"), "vocab_size": study.vocab_size}
    return world.model_copy(update={**other, "seq_length": 2 * world.seq_length})


def run_all(study: Study, world: World) -> list[Line]:
    """Train the runs that are missing; return the lines of all."""
    results, lines = Results(study.output), []
    teacher, folder = make(world), world.root / "cache-top64"
    build_cache(build_config(world, folder, {"kind": "topk", "top_k": 64}))
    own = other_world(world, study)
    own.root.mkdir(exist_ok=True)
    if study.tokenizer is None:
        make_tokenizer(world, own.root / "tokenizer", study.vocab_size)
    elif not (own.root / "tokenizer").exists():
        shutil.copytree(study.tokenizer, own.root / "tokenizer")
    texts = Texts(open_cache(folder), Respeller(teacher, own.root / "tokenizer"))
    students = Students(world, study, folder, texts)
    for seed in study.seeds:
        for name, arm in study.arms.items():
            config = study.config(folder, students.folder(arm.start, seed), seed)
            schedule = {"lengths": sorted(study.lengths), "decay": study.decay}
            what = {"config": config.model_dump(), "arm": arm.model_dump(), **schedule}

            def train(name: str = name, arm: Arm = arm, config: TrainConfig = config) -> Line:
                began = time.process_time()
                bits = run(study, config, arm, texts)
                means = " ".join(f"{length}: {fmean(of.values()):.4f}" for length, of in bits.items())
                click.echo(f"{name}, seed {config.seed}: {means}")
                return {"seed": config.seed, "seconds": time.process_time() - began, "bits": bits}

            lines.append(results.get(what, train) | {"name": name})
    return lines


def markdown(study: Study, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the mean bits per byte, and one of differences to the control, seed by seed."""
    lengths = ["0", *map(str, sorted(study.lengths))]
    of = {
        (line["name"], line["seed"], length): fmean(line["bits"][length].values())
        for line in lines
        for length in lengths
    }
    tables = []
    for sign, control in ((False, None), (True, study.control)):
        rows = [
            [
                name,
                *(
                    shown(
                        spread(
                            [
                                of[name, seed, at] - (of[control, seed, at] if control else 0)
                                for seed in study.seeds
                            ]
                        ),
                        3,
                        sign=sign,
                    )
                    for at in lengths
                ),
            ]
            for name in study.arms
            if name != control
        ]
        tables.append(table(["steps", *lengths], rows))
    return f"minus {study.control}, by seed:\n".join(tables)


@click.command(help=__doc__)
@click.argument("study", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--set", "overrides", multiple=True, help="key.sub=value, as in ddk-cache train")
def main(study: Path, overrides: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    described = load(study, overrides, Study)
    click.echo(markdown(described, run_all(described, read_world(study.parent / described.world))))


if __name__ == "__main__":
    main()
