"""Read and check the files of a run's folder, which may be a stranger's and of any size.

No link is followed out of the folder. Of a long JSON-lines file, lines spread over the whole file are read.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddk_cache.errors import ConfigError
from ddk_cache.storage.folder import Folder
from ddk_cache.util.configuration import first_problem, load
from ddk_train.config import TrainConfig
from ddk_train.loop.objective import reads_labels, reads_targets
from ddk_train.output.facts import FACTS, Count, Facts
from ddk_train.report.excerpt import read_excerpt

MAX_BYTES = 1 << 20  # of config.yaml and run.json
MOST_METRICS, MOST_INTERVALS, MOST_GENERATIONS = 2_000, 400, 200  # lines that are used


def _drawable(value: float) -> float:
    """Return an infinity from 1e30 on: a plot has no room for such a value."""
    return value if abs(value) < 1e30 or math.isnan(value) else math.copysign(math.inf, value)


Number = Annotated[float, AfterValidator(_drawable)]
Perplexity = Annotated[Number, Field(ge=1e-30)]
Share = Annotated[float, Field(ge=0, le=1)]
Line = TypeVar("Line", bound=BaseModel)


class Metrics(BaseModel):
    """A line of metrics.jsonl. Other keys, such as ``kl/<domain>``, have numbers too."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    step: Count
    loss: Number
    cross_entropy: Number
    kl: Number
    learning_rate: Number
    grad_norm: Number
    tokens: Count
    tokens_per_second: Annotated[Number, Field(gt=0)]
    data_wait_fraction: Number

    def by_domain(self, measure: str) -> dict[str, float]:
        """Return the values of the keys ``<measure>/<domain>``."""
        prefix = f"{measure}/"
        extra = self.__pydantic_extra__.items()
        return {key.removeprefix(prefix): value for key, value in extra if key.startswith(prefix)}


class Interval(BaseModel):
    """A line of discrepancy.jsonl: a measurement and the rows drawn after it."""

    model_config = ConfigDict(frozen=True)

    interval: Count
    step: Count
    factor: Annotated[dict[str, Share], Field(min_length=1)]
    student_ppl: dict[str, Perplexity]
    teacher_ppl: dict[str, Perplexity]
    rows: dict[str, Count]
    standard_error: dict[str, Annotated[Number, Field(ge=0)] | None] | None = None
    epochs: dict[str, Number] | None = None  # passes over each domain before this line's rows
    validation_kl: dict[str, Number] | None = None
    validation_agreement: dict[str, Share] | None = None
    student_bits_per_byte: dict[str, Number] | None = None
    teacher_bits_per_byte: dict[str, Number] | None = None

    @model_validator(mode="after")
    def _check_domains(self) -> "Interval":
        maps = (
            *(self.student_ppl, self.teacher_ppl, self.rows),
            *(self.standard_error, self.epochs, self.validation_kl, self.validation_agreement),
            *(self.student_bits_per_byte, self.teacher_bits_per_byte),
        )
        if any(by_domain is not None and by_domain.keys() != self.factor.keys() for by_domain in maps):
            raise ValueError("its maps do not all have the same domains")
        return self

    @property
    def ratio(self) -> dict[str, float]:
        """Student / teacher perplexity by domain."""
        return {name: self.student_ppl[name] / self.teacher_ppl[name] for name in self.factor}

    @property
    def mean_ratio(self) -> float:
        return fmean(self.ratio.values())

    @property
    def worst_ratio(self) -> float:
        return max(self.ratio.values())

    @property
    def mean_bits_per_byte(self) -> float | None:
        """The student's mean over the domains; None if the bytes of its tokens are unknown."""
        return fmean(self.student_bits_per_byte.values()) if self.student_bits_per_byte else None

    @property
    def mean_validation_kl(self) -> float | None:
        """Mean over the domains, in nats a token; None without validation targets."""
        return fmean(self.validation_kl.values()) if self.validation_kl else None

    def perplexity_error(self, domain: str) -> float | None:
        """Return the standard error of the student's perplexity over the validation rows."""
        relative = (self.standard_error or {}).get(domain)
        error = math.inf if relative is None else self.student_ppl[domain] * relative
        return error if math.isfinite(error) else None


class Generation(BaseModel):
    """A line of samples.jsonl: a held-out prompt, the text after it, and the student's continuation."""

    model_config = ConfigDict(frozen=True)

    step: Count
    domain: str
    prompt: str
    text: str
    sample: str


@dataclass(frozen=True)
class RunLog:
    """The files of a run, finished or not."""

    folder: Path
    config: TrainConfig
    metrics: list[Metrics]
    intervals: list[Interval]
    generations: list[Generation]
    facts: Facts | None
    """None until the run has written run.json."""
    excerpts: dict[str, int]
    """Files of which not every line was read, and the number of lines read."""

    @property
    def name(self) -> str:
        return self.config.run_name or self.folder.resolve().name

    @property
    def domains(self) -> list[str]:
        return list(self.intervals[0].factor) if self.intervals else []

    @property
    def trained_domains(self) -> tuple[str, ...]:
        """The domains, also before the first measurement; one without a name if they are not known yet."""
        return tuple(self.domains or (self.facts.train_rows if self.facts else ()) or ("",))

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss of a domain uses the teacher's targets."""
        return any(reads_targets(self.config, self.trained_domains))

    @property
    def uses_policy(self) -> bool:
        """Whether the loss of a domain has a policy gradient."""
        return any(reads_labels(self.config, self.trained_domains))

    @property
    def step(self) -> int:
        """The last step in any file."""
        return max([0, *(line.step for line in self.metrics), *(line.step for line in self.intervals)])

    @property
    def is_finished(self) -> bool:
        """The last line of a finished run has a measurement and no rows."""
        return bool(self.intervals) and not any(self.intervals[-1].rows.values())

    @property
    def kept(self) -> Interval:
        """The measurement of the student that the run has saved, the nearest of those read; else the last."""
        step = self.facts.student_step if self.facts else None
        step = self.step if step is None else step
        return min(reversed(self.intervals), key=lambda line: abs(line.step - step))

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.metrics[-1].tokens if self.metrics else 0

    @property
    def seconds(self) -> list[float]:
        """The time in training steps, without evaluation, up to each line of metrics."""
        before = [0, *(line.tokens for line in self.metrics)]
        pairs = zip(before, self.metrics, strict=False)
        return [*accumulate(max(line.tokens - start, 0) / line.tokens_per_second for start, line in pairs)]

    @property
    def training_seconds(self) -> float:
        """The time in all training steps."""
        return self.seconds[-1] if self.metrics else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Mean over the training steps."""
        return self.tokens / self.training_seconds if self.training_seconds else 0.0

    @property
    def rows_drawn(self) -> dict[str, int]:
        """Rows drawn by domain, over all intervals; a line stands for those after it that were not read."""
        ends = [*(line.interval for line in self.intervals[1:]), self.intervals[-1].interval + 1]
        counts = [max(end - line.interval, 1) for line, end in zip(self.intervals, ends, strict=True)]
        return {
            name: sum(line.rows[name] * count for line, count in zip(self.intervals, counts, strict=True))
            for name in self.domains
        }

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each domain's training rows, up to the last measurement."""
        return (self.intervals[-1].epochs or {}) if self.intervals else {}

    def most_epochs(self, domain: str) -> float | None:
        """Return the most passes over a domain's training rows; None without a limit."""
        rows = sum(self.facts.train_rows.values()) if self.facts else 0
        total = self.config.max_steps * self.facts.rows_in_a_step if self.facts else 0
        most = self.config.most_epochs(domain, total / rows if rows and total else math.inf)
        return most if most < math.inf else None

    @property
    def generations_by_domain(self) -> dict[str, list[Generation]]:
        by_domain: dict[str, list[Generation]] = {}
        for line in self.generations:
            by_domain.setdefault(line.domain, []).append(line)
        return by_domain

    def gap_closed(self, domain: str) -> float | None:
        """Return the share of the student's distance to the teacher, in nats a token, that training removed.

        None if the student was no worse than the teacher at the start, or infinitely worse.
        """
        before, after = (math.log(line.student_ppl[domain]) for line in (self.intervals[0], self.kept))
        teacher = math.log(self.intervals[0].teacher_ppl[domain])
        return (before - after) / (before - teacher) if teacher < before < math.inf else None

    def bits_per_byte(self, domain: str) -> tuple[float, float, float] | None:
        """Return the student's before and after training and the teacher's; None if they are unknown."""
        first, last = self.intervals[0].student_bits_per_byte, self.kept.student_bits_per_byte
        teacher = self.kept.teacher_bits_per_byte
        return (first[domain], last[domain], teacher[domain]) if first and last and teacher else None

    @property
    def mean_gap_closed(self) -> float | None:
        """Mean over the domains; None if a domain has no gap."""
        shares = [self.gap_closed(name) for name in self.domains]
        present = [share for share in shares if share is not None]
        return fmean(present) if present and len(present) == len(shares) else None


def read_run(folder: Path) -> RunLog:
    """Read the files of a run; raise ConfigError if the folder has none, or for an invalid line."""
    reader = _Reader(folder)
    if reader.read("config.yaml") is None:
        raise ConfigError(f"{folder}: no run of ddk-cache train: config.yaml is missing")
    intervals = reader.lines("discrepancy.jsonl", Interval, MOST_INTERVALS)
    for interval in intervals:
        if interval.factor.keys() != intervals[0].factor.keys():
            path = folder / "discrepancy.jsonl"
            raise ConfigError(f"{path}: interval {interval.interval}: its domains are not those of line 1")
    facts = reader.read(FACTS)
    return RunLog(
        folder=folder,
        config=load(folder / "config.yaml", [], TrainConfig),
        metrics=reader.lines("metrics.jsonl", Metrics, MOST_METRICS),
        intervals=intervals,
        generations=reader.lines("samples.jsonl", Generation, MOST_GENERATIONS),
        facts=None if facts is None else _parse(facts, Facts, str(folder / FACTS)),
        excerpts=reader.excerpts,
    )


class _Reader:
    """Reads bounded parts of the files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._path, self._folder = folder, Folder(folder, create=False)
        self.excerpts: dict[str, int] = {}

    def read(self, name: str) -> bytes | None:
        """Return a whole file, or None if it does not exist."""
        try:
            return self._folder.read(name, MAX_BYTES)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{self._path / name}: {reason}") from error

    def lines(self, name: str, model: type[Line], most: int) -> list[Line]:
        """Return at most ``most`` lines of a JSON-lines file; none if it does not exist."""
        path = self._path / name
        try:
            excerpt = read_excerpt(self._folder, name, path.stat().st_size, most)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        if not excerpt.is_whole:
            self.excerpts[name] = len(excerpt.lines)
        return [_parse(line, model, f"{path}: {where}") for where, line in excerpt.lines]


def _parse(text: bytes, model: type[Line], where: str) -> Line:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error, model)}") from error
