"""What a run wrote, read back: the configuration, the metrics, the measurements, and what came of it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddk_cache.errors import ConfigError

Line = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One domain's perplexities and factors at the first and the last measurement, and the rows drawn."""

    domain: str
    teacher: float
    before: float
    after: float
    factor_start: float
    factor_end: float
    rows: int

    @property
    def gap_closed(self) -> float | None:
        """Share of the student's gap to the teacher, in nats of cross-entropy, that training closed.

        Negative where the student became worse; None where it was not behind to begin with.
        """
        gap = math.log(self.before / self.teacher)
        return math.log(self.before / self.after) / gap if gap > 0 else None


@dataclass(frozen=True)
class Run:
    """What a run wrote: ``metrics`` a line each logging step, ``intervals`` a line each measurement."""

    folder: Path
    config: dict[str, Any]
    metrics: list[Line]
    intervals: list[Line]

    @property
    def domains(self) -> list[str]:
        return list(self.intervals[0]["factor"]) if self.intervals else []

    @property
    def is_finished(self) -> bool:
        """The last measurement of a finished run is its end, where nothing more is drawn."""
        return bool(self.intervals) and not any(self.intervals[-1]["rows"].values())

    @property
    def outcomes(self) -> list[Outcome]:
        """A line for each domain, in the cache's order; before = after where there is one measurement."""
        if not self.intervals:
            return []
        first, last = self.intervals[0], self.intervals[-1]
        return [
            Outcome(
                name,
                teacher=first["teacher_ppl"][name],
                before=first["student_ppl"][name],
                after=last["student_ppl"][name],
                factor_start=first["factor"][name],
                factor_end=last["factor"][name],
                rows=sum(line["rows"][name] for line in self.intervals),
            )
            for name in self.domains
        ]


def read_run(folder: Path) -> Run:
    """Read what ``ddk-cache train`` left in ``folder``; the run may still be going on.

    Raises
    ------
    ConfigError
        The folder does not hold a run, or one of its files cannot be read as what it should be.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{folder}: holds no run of ddk-cache train (config.yaml is missing)")
    return Run(
        folder,
        yaml.safe_load(config.read_text(encoding="utf-8")),
        _lines(folder / "metrics.jsonl"),
        _lines(folder / "discrepancy.jsonl"),
    )


def _lines(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    # What follows the last newline is a line that is being written.
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: line {number} is not JSON") from error
    return found
