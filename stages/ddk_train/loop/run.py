"""A training run in progress: the steps of Algorithm 1 and the files they write."""

import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, tensor

from ddk_cache.format.layout import EPOCHS_OF_DRAWS
from ddk_cache.sampler import RowSampler, SamplerState
from ddk_cache.util.interrupt import Interrupt
from ddk_cache.util.progress import Meter, meter, shown_by
from ddk_train.data.batches import Batch, read_ahead, reader
from ddk_train.errors import Interrupted, Stopped, TrainingError
from ddk_train.loop.evaluate import measure_student
from ddk_train.loop.generations import generate
from ddk_train.loop.mixture import (
    Measurement,
    interval_share,
    is_plain_sample,
    most_rows,
    next_factor,
    row_share,
)
from ddk_train.loop.objective import reads_labels, reads_targets
from ddk_train.loop.setup import Setup
from ddk_train.loop.step import OptimizerStep
from ddk_train.loop.window import Window
from ddk_train.output import checkpoint
from ddk_train.output.best import Best, best_weights, load_weights
from ddk_train.output.checkpoint import CheckpointWriter, Progress
from ddk_train.output.facts import write_facts
from ddk_train.output.finish import STAGED
from ddk_train.output.folder import write_config
from ddk_train.output.sums import SUMS
from ddk_train.output.tracking import LogState, Records, progress_line

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class Interval(NamedTuple):
    """The data of one interval."""

    batches: Iterator[Batch]  # of this process, without those already trained on
    last_step: int
    next_sampler: SamplerState


@dataclass
class TrainingRun:
    """A run between two steps: its parts, its progress and the operations of Algorithm 1."""

    setup: Setup
    optimizer_step: OptimizerStep
    window: Window
    progress: Progress
    records: Records
    checkpoints: CheckpointWriter
    interrupt: Interrupt
    meter: Meter  # of the steps, for a terminal or a notebook; lines are logged every ``logging_steps``
    best: Best | None  # with ``keep_best``
    measured: dict[str, Float64] = field(default_factory=dict)
    """The last ``Measured``, without None; empty before the first one and after a resume."""

    def __post_init__(self) -> None:
        self.config, self.ranks, self.cache = self.setup.config, self.setup.ranks, self.setup.cache
        self._start, self._first_step = time.perf_counter(), self.progress.step

    @property
    def share(self) -> Float64:
        """The share of each domain in this interval, [N]."""
        progress = self.progress
        return interval_share(self.config, progress.interval, np.array(progress.factor), self.setup.rows)

    def measure(self) -> None:
        """Measure the student, and set the factor that follows."""
        setup, config, progress = self.setup, self.config, self.progress
        result = measure_student(
            setup.student, self.cache, self.ranks, setup.token_bytes, self.check_interrupt
        )
        self.measured = {name: values for name, values in result._asdict().items() if values is not None}
        if not np.isfinite(result.student_ppl).all():
            raise self._not_finite(progress.step)
        ratios = zip(self.cache.domains, result.student_ppl / setup.teacher_ppl, strict=True)
        by_domain = " ".join(f"{name} {ratio:.3f}" for name, ratio in ratios)
        self.ranks.log(f"student/teacher perplexity at step {progress.step}: {by_domain}")
        self._keep_if_best(float(np.log(result.student_ppl).mean()))
        before = np.array(progress.factor) if progress.factor else None
        now = Measurement(self.cache.domains, before, result.student_ppl, setup.teacher_ppl, setup.rows)
        progress.factor = next_factor(config, now).tolist()

    def _keep_if_best(self, loss: float) -> None:
        """With ``keep_best`` write the weights if ``loss`` is the lowest since the first step."""
        if self.config.keep_best and self.progress.step and (self.best is None or loss < self.best.loss):
            step = self.progress.step
            self.checkpoints.save_best(step, loss)
            self.best = Best(self.checkpoints.folder / f"best-{step}", step, loss)

    def take_best(self) -> int:
        """Load the weights of the best measurement, unless they are the last ones; return their step."""
        if self.best is None or self.best.step == self.progress.step:
            return self.progress.step
        load_weights(self.best.path, self.setup.student, self.ranks)
        self.ranks.log(f"the student is that of step {self.best.step}, the best on held-out text")
        return self.best.step

    def is_over(self) -> bool:
        """Return whether the last measurement ends the run: by ``max_steps``, or by ``stop_ratio``."""
        if not self.measured:
            return False
        ratio = self.measured["student_ppl"] / self.setup.teacher_ppl
        is_close = bool((ratio <= (self.config.stop_ratio or 0)).all())
        return is_close or self.progress.step == self.config.max_steps

    def may_end(self, interval: Interval) -> bool:
        """Return whether the run may end after this step, so that its metrics must be written."""
        step, config = self.progress.step, self.config
        return step == config.max_steps or (config.stop_ratio is not None and step == interval.last_step)

    def begin_interval(self) -> Interval:
        """Draw the interval's rows by the share of each domain; write its measurement unless resumed.

        Threads read and decode its batches ahead of the step.
        """
        setup, config, progress = self.setup, self.config, self.progress
        end = min(progress.start + config.distill_interval, config.max_steps)
        domain, row, next_sampler = self._draw(config.max_steps)
        done = (progress.step - progress.start) * config.gradient_accumulation_steps
        by_process = (-1, self.ranks.world, config.per_device_train_batch_size)
        mine = (array.reshape(by_process)[done:, self.ranks.rank] for array in (domain, row))
        if self.measured:
            self.write_measurement(np.bincount(domain, minlength=len(setup.rows)))
        student, threads = setup.student, config.num_reader_threads
        read = reader(
            self.cache,
            targets=reads_targets(config, self.cache.domains),
            labels=reads_labels(config, self.cache.domains),
            vocab_size=student.vocab_size,
            layout=student.layout,
        )
        is_pinned = self.ranks.device.type == "cuda"  # then copies to the GPU do not block the step

        def read_batch(item: tuple[Int64, Int64]) -> Batch:
            batch = read(*item)
            return batch.map(Tensor.pin_memory) if is_pinned else batch

        work = zip(*mine, strict=True)
        batches = read_ahead(read_batch, work, threads=threads, ahead=2 * threads)
        return Interval(batches, end, next_sampler)

    def _draw(self, max_steps: int) -> tuple[Int64, Int64, SamplerState]:
        """Draw the rows of the current interval of a run of ``max_steps``."""
        setup, config, progress = self.setup, self.config, self.progress
        rows_in_a_step = self.ranks.rows_in_a_step(config)
        total = max_steps * rows_in_a_step
        most = most_rows(config, self.cache.domains, setup.rows, total)
        return RowSampler(setup.rows, config.seed, most, total).draw(
            progress.sampler,
            row_share(config, progress.interval, self.share, setup.labels_per_row),
            min(config.distill_interval, max_steps - progress.start) * rows_in_a_step,
        )

    def extend(self) -> None:
        """Begin a new interval after the last step of a finished run."""
        progress, after = self.progress, self.config.max_steps
        *_, progress.sampler = self._draw(progress.step)
        progress.interval, progress.start = progress.interval + 1, progress.step
        self.ranks.log(
            f"max_steps was {progress.step:,} and is {after:,}: from here on the learning rate and all "
            f"schedules are those of a run of {after:,} steps"
        )

    def write_measurement(self, rows: Int64 | None = None) -> None:
        """Write a line of discrepancy.jsonl, with the interval's rows of each domain, [N]; none at the end.

        ``labels`` estimates the labels in these rows; ``epochs`` are the passes over each domain so far.
        """
        setup, progress = self.setup, self.progress
        rows = np.zeros(len(setup.rows), np.int64) if rows is None else rows
        epochs = np.array(progress.sampler.drawn) / setup.rows
        for name, before, after in zip(self.cache.domains, epochs, epochs + rows / setup.rows, strict=True):
            if self.cache.target.kind == "sampled" and before <= EPOCHS_OF_DRAWS < after:
                self.ranks.log(
                    f"{name}: {after:.1f} epochs after this interval; past {EPOCHS_OF_DRAWS} the student "
                    "begins to learn the noise of sampled targets (docs/choosing.md)"
                )
        self.records.discrepancy(
            progress.interval,
            progress.step,
            self.cache.domains,
            factor=progress.factor,
            **self.measured,
            teacher_ppl=setup.teacher_ppl,
            rows=rows,
            labels=np.rint(rows * setup.labels_per_row).astype(np.int64),
            epochs=epochs,
        )

    def write_metrics(self, rate: float, norm: Tensor) -> None:
        """Write a line of metrics.jsonl, and log the progress."""
        self._check_finite()
        progress, config = self.progress, self.config
        line = {
            "step": progress.step,
            **self.window.line(),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "tokens": progress.tokens,
        }
        self.records.metrics(line)
        pace = (time.perf_counter() - self._start) / (progress.step - self._first_step)
        by = "by size" if is_plain_sample(config, progress.interval) else "factor"
        shares = dict(zip(self.cache.domains, self.share.tolist(), strict=True))
        left = pace * (config.max_steps - progress.step)
        self.ranks.log(progress_line(line, config.max_steps, left, by, shares))

    def write_samples(self) -> None:
        """Write a line of samples.jsonl for each domain unless ``sample_tokens`` is 0."""
        if self.config.sample_tokens:
            setup = self.setup
            for line in generate(setup.student, setup.cache, setup.tokenizer, setup.config, setup.ranks):
                self.records.generation(self.progress.step, line)

    def save(self) -> None:
        """Save a checkpoint of this step."""
        self._check_finite()
        state = {
            "progress": asdict(self.progress),
            "fingerprint": self.setup.fingerprint,
            "files": self.records.state(),
        }
        self.checkpoints.save(self.progress.step, state, self.window.sums)

    def check_interrupt(self) -> None:
        """Raise Interrupted in all processes if one of them has received a signal."""
        if self.ranks.sum(tensor(int(self.interrupt.signal is not None))).item():
            raise Interrupted

    def stop(self) -> Stopped:
        """Save a checkpoint unless this step has one, and return the error to raise."""
        received = self.interrupt.signal or signal.SIGTERM  # if another process received it
        step, checkpoints = self.progress.step, self.checkpoints
        if step != checkpoints.step:
            self.save()
        checkpoints.wait()
        path = checkpoints.folder / f"checkpoint-{step}"
        saved = f"{path} is saved, --resume continues from it" if step else "no step was done yet"
        stopped = Stopped(f"stopped by {received.name}: {saved}", received)
        self.ranks.log(str(stopped))
        return stopped

    def _check_finite(self) -> None:
        """Raise TrainingError if a gradient was not finite."""
        if step := self.window.first_bad_step():
            raise self._not_finite(step)

    def _not_finite(self, step: int) -> TrainingError:
        self.checkpoints.wait()
        saved = checkpoint.checkpoints(self.checkpoints.folder)
        where = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        return TrainingError(
            f"step {step}: the student's loss or its gradient is not a finite number; {where}. "
            "A lower learning_rate, a longer warmup_steps or bf16: false may help"
        )


@contextmanager
def open_run(setup: Setup, interrupt: Interrupt) -> Iterator[TrainingRun]:
    """Start the run in its folder, or resume it from the checkpoint; close its files at the end."""
    config, ranks, cache, folder = setup.config, setup.ranks, setup.cache, Path(setup.config.output_dir)
    window = Window(config, ranks, cache.domains)
    progress = Progress(SamplerState((0,) * len(cache.domains)), run_id=uuid.uuid4().hex)
    files: dict[str, LogState] = {}
    if setup.start:
        path, state = setup.start
        progress, files = replace(state.progress), state.files
        window.sums = checkpoint.load(path, setup.student, setup.optimizer, ranks)
        if ranks.is_main:
            checkpoint.set_aside(folder, progress.step)
            checkpoint.remove_old(folder, config.save_total_limit)  # a killed run may leave one too many
        ranks.log(f"resumed from {path}")
    if ranks.is_main:
        checkpoint.remove(folder / SUMS)  # the run is not finished any more
        checkpoint.remove(folder / STAGED)
        write_config(folder, config)
        write_facts(folder, cache, config, ranks, resumed=setup.start is not None)
    best = ranks.from_main(lambda: best_weights(folder, ranks.log)) if config.keep_best else None
    checkpoints = CheckpointWriter(
        folder,
        setup.student,
        setup.optimizer,
        ranks,
        keep=config.save_total_limit,
        in_background=config.save_behind,
        step=progress.step,
    )
    optimizer_step = OptimizerStep(config, ranks, setup.model, setup.optimizer, window, interrupt)
    log = ranks.log if ranks.is_main else None
    with (
        Records(config, progress.run_id, progress.step, files, log) as records,
        nullcontext() if ranks.is_main else shown_by(lambda update: None),
        meter("train", "steps", config.max_steps) as bar,
    ):
        run = TrainingRun(setup, optimizer_step, window, progress, records, checkpoints, interrupt, bar, best)
        if setup.start and setup.start.extends and progress.step < config.max_steps:
            run.extend()
        yield run
