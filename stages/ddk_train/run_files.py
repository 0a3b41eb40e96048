"""What a run left in its folder, read and checked for the report."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddk_cache.configuration import first_problem, load
from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.facts import FACTS, Facts


def _drawable(value: float) -> float:
    """Infinite from 1e30 on: no plot has room for both it and numbers of this world."""
    return value if abs(value) < 1e30 or math.isnan(value) else math.copysign(math.inf, value)


Number = Annotated[float, AfterValidator(_drawable)]
Perplexity = Annotated[Number, Field(ge=1e-30)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Share = Annotated[float, Field(ge=0, le=1)]
Line = TypeVar("Line", bound=BaseModel)


class Metrics(BaseModel):
    """A line of metrics.jsonl; what else it holds, such as ``kl/<domain>``, are numbers too."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    step: Count
    loss: Number
    cross_entropy: Number
    kl: Number
    learning_rate: Number
    grad_norm: Number
    tokens: Annotated[float, Field(ge=0, lt=1 << 63)]
    tokens_per_second: Annotated[float, Field(ge=1e-6, le=1e15)]
    data_wait_fraction: Number

    def by_domain(self, name: str) -> dict[str, float]:
        """The values called ``<name>/<domain>``."""
        found = self.__pydantic_extra__.items()
        return {key.removeprefix(f"{name}/"): value for key, value in found if key.startswith(f"{name}/")}


class Interval(BaseModel):
    """A line of discrepancy.jsonl: a measurement, and what was drawn after it."""

    model_config = ConfigDict(frozen=True)

    interval: Count
    step: Count
    factor: Annotated[dict[str, Share], Field(min_length=1)]
    student_ppl: dict[str, Perplexity]
    teacher_ppl: dict[str, Perplexity]
    rows: dict[str, Count]
    standard_error: dict[str, Annotated[Number, Field(ge=0)]] | None = None
    validation_kl: dict[str, Number] | None = None
    validation_agreement: dict[str, Share] | None = None

    @model_validator(mode="after")
    def _same_domains(self) -> "Interval":
        maps = (
            *(self.student_ppl, self.teacher_ppl, self.rows),
            *(self.standard_error, self.validation_kl, self.validation_agreement),
        )
        if any(found is not None and found.keys() != self.factor.keys() for found in maps):
            raise ValueError("its maps are not all by the same domains")
        return self

    @property
    def ratio(self) -> dict[str, float]:
        """Student / teacher perplexity by domain."""
        return {name: self.student_ppl[name] / self.teacher_ppl[name] for name in self.factor}


class Sample(BaseModel):
    """A line of samples.jsonl: a held-out beginning, how the text goes on, and how the student did."""

    model_config = ConfigDict(frozen=True)

    step: Count
    domain: str
    prompt: str
    text: str
    sample: str


@dataclass(frozen=True)
class Run:
    """A run, however far it has come."""

    folder: Path
    config: TrainConfig
    settings: dict[str, Any] = field(repr=False)
    """config.yaml as it stands there."""
    metrics: list[Metrics]
    intervals: list[Interval]
    samples: list[Sample]
    facts: Facts | None
    """None where a run of an earlier release left none."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def domains(self) -> list[str]:
        return list(self.intervals[0].factor) if self.intervals else []

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([0, *(line.step for line in self.metrics), *(line.step for line in self.intervals)])

    @property
    def is_finished(self) -> bool:
        """The last line of a whole run measures the student and draws nothing more."""
        return bool(self.intervals) and not any(self.intervals[-1].rows.values())

    @property
    def tokens(self) -> float:
        """Tokens trained on."""
        return self.metrics[-1].tokens if self.metrics else 0

    @property
    def training_seconds(self) -> float:
        """Time in training steps, from the lines of metrics; evaluation is not in it."""
        before = [0.0, *(line.tokens for line in self.metrics)]
        pairs = zip(before, self.metrics, strict=False)
        return sum(max(line.tokens - start, 0) / line.tokens_per_second for start, line in pairs)

    def gap_closed(self, domain: str) -> float | None:
        """Share of the student's distance to the teacher, in nats a token, that training took away.

        None where the student was no worse than the teacher to begin with, or infinitely so.
        """
        before, after = (math.log(self.intervals[number].student_ppl[domain]) for number in (0, -1))
        teacher = math.log(self.intervals[0].teacher_ppl[domain])
        return (before - after) / (before - teacher) if teacher < before < math.inf else None


def read_run(folder: Path) -> Run:
    """Read what ``ddk-cache train`` wrote.

    Raises
    ------
    ConfigError
        In one line: the folder is missing or holds no run, or a line of its files is not what it should be.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{folder}: holds no run of ddk-cache train: config.yaml is missing")
    intervals = _lines(folder / "discrepancy.jsonl", Interval)
    for number, interval in enumerate(intervals, start=1):
        if interval.factor.keys() != intervals[0].factor.keys():
            raise ConfigError(f"{folder / 'discrepancy.jsonl'}: line {number}: has other domains than line 1")
    facts = folder / FACTS
    return Run(
        folder=folder,
        config=load(config, [], TrainConfig),
        settings=yaml.safe_load(config.read_text(encoding="utf-8")),
        metrics=_lines(folder / "metrics.jsonl", Metrics),
        intervals=intervals,
        samples=_lines(folder / "samples.jsonl", Sample),
        facts=_parsed(facts.read_bytes(), Facts, str(facts)) if facts.is_file() else None,
    )


def _lines(path: Path, model: type[Line]) -> list[Line]:
    """The file's lines; what follows the last line's end is still being written."""
    if not path.is_file():
        return []
    whole = path.read_bytes().split(b"\n")[:-1]
    return [_parsed(line, model, f"{path}: line {number}") for number, line in enumerate(whole, start=1)]


def _parsed(text: bytes, model: type[Line], where: str) -> Line:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error, model)}") from error
