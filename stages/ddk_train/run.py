"""A run under way: what Algorithm 1 works with, and what it leaves behind as it goes."""

import signal
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_cache import Cache
from ddk_cache.layout import EPOCHS_OF_DRAWS
from ddk_train import checkpoint
from ddk_train.checkpoint import Progress
from ddk_train.config import TrainConfig
from ddk_train.distributed import Ranks
from ddk_train.errors import Interrupted, Stopped, TrainingError
from ddk_train.evaluate import measure_student
from ddk_train.generations import generate
from ddk_train.interrupt import Interrupt
from ddk_train.mixture import Measurement, next_factor
from ddk_train.step import OptimizerStep
from ddk_train.student import Student
from ddk_train.tracking import Records, progress_line
from ddk_train.window import Window

Float64 = NDArray[np.float64]


@dataclass
class Run:
    """What Algorithm 1 works with, from the configuration to the step it has come to."""

    config: TrainConfig
    ranks: Ranks
    cache: Cache
    student: Student
    optimizer_step: OptimizerStep
    window: Window
    progress: Progress
    records: Records
    teacher_ppl: Float64  # [N]
    rows: list[int]  # of each train split
    fingerprint: dict[str, Any]
    interrupt: Interrupt
    saved: int  # the step of the newest checkpoint; 0 without one
    saving: Future[None] | None = None  # it, while it is being written beside training
    share: Float64 = field(default_factory=lambda: np.empty(0))  # what the interval draws by, [N]

    of_validation: dict[str, Float64] = field(default_factory=dict)
    """What the last measurement found beside perplexity, [N] each: ``standard_error``, ``validation_kl`` and
    ``validation_agreement``, without what the cache has no targets for."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @cached_property
    def labels_per_row(self) -> Float64:
        """Mean number of labels in a training row, [N], of all that was tokenised."""
        states = [self.cache[name].state.train for name in self.cache.domains]
        return np.array([max(state.labels, 1) / max(state.rows, 1) for state in states])

    def measure(self) -> Float64:
        """The student's perplexities, [N]; the next factor comes from them."""
        config, progress = self.config, self.progress
        student_ppl, error, kl, agreement = measure_student(
            self.student,
            self.cache,
            self.ranks,
            config,
            self.check_interrupt,
        )
        found = {"standard_error": error, "validation_kl": kl, "validation_agreement": agreement}
        self.of_validation = {name: values for name, values in found.items() if values is not None}
        if not np.isfinite(student_ppl).all():
            raise self.not_finite(progress.step)
        old = np.array(progress.factor) if progress.factor else None
        now = Measurement(self.cache.domains, old, student_ppl, self.teacher_ppl, self.rows)
        progress.factor = next_factor(config, now).tolist()
        return student_ppl

    def is_over(self, student_ppl: Float64) -> bool:
        """Whether a measurement was the last."""
        close = bool((student_ppl <= (self.config.stop_ratio or 0.0) * self.teacher_ppl).all())
        return close or self.progress.step == self.config.max_steps

    def write_measurement(self, student_ppl: Float64, drawn: NDArray[np.int64]) -> None:
        """A line of discrepancy.jsonl; ``drawn`` is the number of rows by domain, [N], of the interval.

        ``labels`` are those that these rows have on average, ``epochs`` the passes over each domain so far.
        """
        epochs = np.array(self.progress.sampler.drawn) / self.rows
        after = epochs + drawn / self.rows
        if self.cache.target.kind == "sampled":
            for name, before, then in zip(self.cache.domains, epochs, after, strict=True):
                if before <= EPOCHS_OF_DRAWS < then:
                    self.ranks.say(
                        f"{name}: {then:.1f} epochs after this interval; past {EPOCHS_OF_DRAWS} the "
                        "noise of sampled targets begins to be learnt (docs/targets.md)"
                    )
        self.records.discrepancy(
            self.progress.interval,
            self.progress.step,
            self.cache.domains,
            factor=self.progress.factor,
            student_ppl=student_ppl,
            teacher_ppl=self.teacher_ppl,
            rows=drawn,
            labels=np.rint(drawn * self.labels_per_row).astype(np.int64),
            epochs=epochs,
            **self.of_validation,
        )

    def write_metrics(self, rate: float, norm: Tensor, seconds_left: float) -> None:
        """A line of metrics.jsonl, and one for who is watching."""
        self.check_numbers()
        line = {
            "step": self.progress.step,
            **self.window.line(),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "tokens": self.progress.tokens,
        }
        self.records.metrics(line)
        by = "factor" if np.array_equal(self.share, self.progress.factor) else "by size"
        shares = dict(zip(self.cache.domains, self.share.tolist(), strict=True))
        self.ranks.say(progress_line(line, self.config.max_steps, seconds_left, by, shares))

    def write_samples(self, tokenizer: Any) -> None:
        """A line of samples.jsonl for each domain, if samples are wanted."""
        if self.config.sample_tokens:
            for line in generate(self.student, self.cache, tokenizer, self.config, self.ranks):
                self.records.generation(self.progress.step, line)

    def save(self) -> None:
        """A checkpoint of where the run is."""
        self.check_numbers()
        state = {
            "progress": self.progress.to_json(self.cache.domains),
            "fingerprint": self.fingerprint,
            "files": self.records.sizes(),
        }
        self.finish_saving()
        self.saving = checkpoint.save(
            self.folder,
            state,
            self.student,
            self.optimizer_step.optimizer,
            self.window.sums,
            self.ranks,
            keep=self.config.save_total_limit,
            behind=self.config.save_behind,
        )
        self.saved = self.progress.step

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is whole; what went wrong with it is raised here."""
        if self.saving is not None:
            self.saving.result()
            self.saving = None

    def check_interrupt(self) -> None:
        """Raise Interrupted in all processes if one of them received a signal to stop."""
        signalled = torch.tensor(int(self.interrupt.signal is not None))
        if self.ranks.sum(signalled).item():
            raise Interrupted

    def stop(self) -> Stopped:
        """Save what has been done, and say so; the error to raise."""
        number = self.interrupt.signal or signal.SIGTERM  # another process's
        if self.progress.step != self.saved:
            self.save()
        self.finish_saving()
        place = self.folder / f"checkpoint-{self.progress.step}"
        saved = f"{place} is saved, --resume goes on from there" if self.saved else "nothing was done yet"
        stopped = Stopped(f"stopped by {number.name}: {saved}", number)
        self.ranks.say(str(stopped))
        return stopped

    def check_numbers(self) -> None:
        """Raise TrainingError if a gradient so far was not finite; else the weights are sound."""
        if step := self.window.first_bad_step():
            raise self.not_finite(step)

    def not_finite(self, step: int) -> TrainingError:
        """The error to raise where a number of ``step`` is none any more."""
        self.finish_saving()
        last = checkpoint.newest(self.folder)
        where = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        return TrainingError(
            f"step {step}: the student's loss or its gradient is not a finite number; {where}. "
            "A lower learning_rate, a longer warmup_steps or bf16: false may help"
        )
