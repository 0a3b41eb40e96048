"""A training run in progress: the steps of Algorithm 1, and the files that they leave."""

import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, tensor

from ddk_cache.format.layout import EPOCHS_OF_DRAWS
from ddk_cache.sampler import RowSampler, SamplerState
from ddk_train.data.batches import Batch, read_ahead, reader
from ddk_train.errors import Interrupted, Stopped, TrainingError
from ddk_train.loop.evaluate import measure_student
from ddk_train.loop.generations import generate
from ddk_train.loop.interrupt import Interrupt
from ddk_train.loop.mixture import Measurement, interval_share, most_rows, next_factor, row_share
from ddk_train.loop.objective import reads_targets
from ddk_train.loop.setup import Setup
from ddk_train.loop.step import OptimizerStep
from ddk_train.loop.window import Window
from ddk_train.output import checkpoint
from ddk_train.output.checkpoint import CheckpointWriter, Progress
from ddk_train.output.facts import write_facts
from ddk_train.output.folder import prepare_folder
from ddk_train.output.tracking import FILES, Records, progress_line

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class Interval(NamedTuple):
    """The rows of one interval, drawn."""

    rows: Int64
    """The number of rows of each domain, [N], in all processes."""
    batches: list[tuple[Int64, Int64]]
    """This process's, without those it has trained on: domain index [B] and row index [B] of each."""
    last_step: int
    next_sampler: SamplerState


@dataclass
class TrainingRun:
    """A run between two steps: its parts, how far it is, and what Algorithm 1 does to it."""

    setup: Setup
    optimizer_step: OptimizerStep
    window: Window
    progress: Progress
    records: Records
    checkpoints: CheckpointWriter
    interrupt: Interrupt
    share: Float64 = field(default_factory=lambda: np.empty(0))  # of each domain in this interval, [N]
    validation: dict[str, Float64] = field(default_factory=dict)
    """Results of the last measurement besides perplexity, [N] each: ``standard_error``, ``validation_kl`` and
    ``validation_agreement``, without those that the cache has no targets for."""

    def __post_init__(self) -> None:
        self.config, self.ranks, self.cache = self.setup.config, self.setup.ranks, self.setup.cache
        self._start, self._first_step = time.perf_counter(), self.progress.step

    def measure(self) -> Float64:
        """Return the student's perplexities, [N], and set the factor that follows from them."""
        setup, config, progress = self.setup, self.config, self.progress
        result = measure_student(
            setup.student,
            self.cache,
            self.ranks,
            config,
            self.check_interrupt,
        )
        columns = {
            "standard_error": result.standard_error,
            "validation_kl": result.kl,
            "validation_agreement": result.agreement,
        }
        self.validation = {name: values for name, values in columns.items() if values is not None}
        if not np.isfinite(result.perplexity).all():
            raise self._not_finite(progress.step)
        before = np.array(progress.factor) if progress.factor else None
        now = Measurement(self.cache.domains, before, result.perplexity, setup.teacher_ppl, setup.rows)
        progress.factor = next_factor(config, now).tolist()
        return result.perplexity

    def is_over(self, student_ppl: Float64) -> bool:
        """Return whether this measurement is the last: all steps are done, or the student is close enough."""
        is_close = bool((student_ppl <= (self.config.stop_ratio or 0.0) * self.setup.teacher_ppl).all())
        return is_close or self.progress.step == self.config.max_steps

    def may_end(self, interval: Interval) -> bool:
        """Return whether the run may end after this step, so that its metrics must be written."""
        step, config = self.progress.step, self.config
        return step == config.max_steps or (config.stop_ratio is not None and step == interval.last_step)

    def draw_interval(self) -> Interval:
        """Draw the rows of the interval by its share of each domain."""
        setup, config, progress = self.setup, self.config, self.progress
        start = progress.interval * config.distill_interval
        end = min(start + config.distill_interval, config.max_steps)
        self.share = interval_share(config, progress.interval, np.array(progress.factor), setup.rows)
        sampler = RowSampler(setup.rows, config.seed, most_rows(config, self.cache.domains, setup.rows))
        domain, row, next_sampler = sampler.draw(
            progress.sampler,
            row_share(config, progress.interval, self.share, setup.labels_per_row),
            (end - start) * self.ranks.rows_in_a_step(config),
        )
        done = (progress.step - start) * config.gradient_accumulation_steps
        by_process = (-1, self.ranks.world, config.per_device_train_batch_size)
        mine = (array.reshape(by_process)[done:, self.ranks.rank] for array in (domain, row))
        rows = np.bincount(domain, minlength=len(setup.rows))
        return Interval(rows, list(zip(*mine, strict=True)), end, next_sampler)

    def read(self, interval: Interval) -> Iterator[Batch]:
        """Yield this process's batches, read and decoded ahead by threads."""
        student, threads = self.setup.student, self.config.num_reader_threads
        read = reader(
            self.cache,
            targets=reads_targets(self.config, self.cache.domains),
            vocab_size=student.vocab_size,
            layout=student.layout,
            pin=self.ranks.device.type == "cuda",
        )
        return read_ahead(lambda item: read(*item), interval.batches, threads=threads, ahead=2 * threads)

    def write_measurement(self, student_ppl: Float64, rows: Int64) -> None:
        """Write a line of discrepancy.jsonl; ``rows`` of each domain, [N], are those of the next interval.

        ``labels`` are those that these rows have on average, ``epochs`` the passes over each domain so far.
        """
        setup, progress = self.setup, self.progress
        epochs = np.array(progress.sampler.drawn) / setup.rows
        for name, before, after in zip(self.cache.domains, epochs, epochs + rows / setup.rows, strict=True):
            if self.cache.target.kind == "sampled" and before <= EPOCHS_OF_DRAWS < after:
                self.ranks.log(
                    f"{name}: {after:.1f} epochs after this interval; past {EPOCHS_OF_DRAWS} the student "
                    "begins to learn the noise of sampled targets (docs/targets.md)"
                )
        self.records.discrepancy(
            progress.interval,
            progress.step,
            self.cache.domains,
            factor=progress.factor,
            student_ppl=student_ppl,
            teacher_ppl=setup.teacher_ppl,
            rows=rows,
            labels=np.rint(rows * setup.labels_per_row).astype(np.int64),
            epochs=epochs,
            **self.validation,
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
        by = "factor" if np.array_equal(self.share, progress.factor) else "by size"
        shares = dict(zip(self.cache.domains, self.share.tolist(), strict=True))
        left = pace * (config.max_steps - progress.step)
        self.ranks.log(progress_line(line, config.max_steps, left, by, shares))

    def write_samples(self) -> None:
        """Write a line of samples.jsonl for each domain, if ``sample_tokens`` is not 0."""
        if self.config.sample_tokens:
            setup = self.setup
            for line in generate(setup.student, setup.cache, setup.tokenizer, setup.config, setup.ranks):
                self.records.generation(self.progress.step, line)

    def save(self) -> None:
        """Save a checkpoint of this step."""
        self._check_finite()
        state = {
            "progress": self.progress.to_json(self.cache.domains),
            "fingerprint": self.setup.fingerprint,
            "files": self.records.sizes(),
        }
        self.checkpoints.save(self.progress.step, state, self.window.sums)

    def check_interrupt(self) -> None:
        """Raise Interrupted in all processes if one of them has received a signal."""
        if self.ranks.sum(tensor(int(self.interrupt.signal is not None))).item():
            raise Interrupted

    def stop(self) -> Stopped:
        """Save a checkpoint, if there is something new to save, and return the error to raise."""
        received = self.interrupt.signal or signal.SIGTERM  # where another process received it
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
        """Raise TrainingError if a gradient was not finite; else the weights are sound."""
        if step := self.window.first_bad_step():
            raise self._not_finite(step)

    def _not_finite(self, step: int) -> TrainingError:
        self.checkpoints.wait()
        newest = checkpoint.newest(self.checkpoints.folder)
        where = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return TrainingError(
            f"step {step}: the student's loss or its gradient is not a finite number; {where}. "
            "A lower learning_rate, a longer warmup_steps or bf16: false may help"
        )


@contextmanager
def open_run(setup: Setup, interrupt: Interrupt) -> Iterator[TrainingRun]:
    """Begin the run in its folder, or resume it from the checkpoint; its files are closed at the end."""
    config, ranks, cache, folder = setup.config, setup.ranks, setup.cache, Path(setup.config.output_dir)
    window = Window(ranks, cache.domains, reads_targets(config, cache.domains))
    progress = Progress(SamplerState((0,) * len(cache.domains)), run_id=uuid.uuid4().hex)
    sizes = dict.fromkeys(FILES, 0)
    if setup.checkpoint and setup.state:
        progress, sizes = Progress.from_json(setup.state["progress"], cache.domains), setup.state["files"]
        window.sums = checkpoint.load(setup.checkpoint, setup.student, setup.optimizer, ranks)
        if ranks.is_main:  # a killed run may have left one too many
            checkpoint.remove_old(folder, config.save_total_limit)
        ranks.log(f"resumed from {setup.checkpoint}")
    elif ranks.is_main:
        prepare_folder(folder, config)
        write_facts(folder, cache, ranks.device, ranks.world)
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
    with Records(config, progress.run_id, progress.step, sizes, is_main=ranks.is_main) as records:
        yield TrainingRun(setup, optimizer_step, window, progress, records, checkpoints, interrupt)
