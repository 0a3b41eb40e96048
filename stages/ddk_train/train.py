"""Stage two from top to bottom: DDK's Algorithm 1 on a cache (arXiv 2407.16154).

This module can be called: ``ddk_train.train(config)`` is ``ddk_train.train.train(config)``.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch

from ddk_cache.util.interrupt import catch_signals
from ddk_train.config import TrainConfig
from ddk_train.errors import Interrupted, TrainingError
from ddk_train.loop.objective import step_weights
from ddk_train.loop.plan import plan
from ddk_train.loop.run import TrainingRun, open_run
from ddk_train.loop.schedule import learning_rate
from ddk_train.loop.setup import prepare
from ddk_train.output.finish import STAGED, finish
from ddk_train.output.folder import check_folder, check_writable, locked_folder
from ddk_train.student.distributed import Ranks, process_group
from ddk_train.student.files import save_student


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a student from a cache and return the run's folder: ``ddk-cache train``, from Python.

    Progress goes to the logger ``ddk_train`` at level INFO: ``logging.basicConfig(level="INFO")`` shows it in
    a notebook or script. In the main thread SIGTERM and SIGINT are handled until the function returns. The
    random state of torch is restored at the end.

    Parameters
    ----------
    config
        The run's configuration.
    resume
        Resume from the newest checkpoint in ``config.output_dir``, if there is one.

    Raises
    ------
    ConfigError
        Configuration, cache and student do not fit together, or the output folder is in use.
    CacheError
        The cache cannot be read.
    TrainingError
        The loss is not finite, another process is lost, or the GPU's memory is full.
    Stopped
        SIGTERM or SIGINT: a checkpoint is saved. A kind of TrainingError.
    """
    folder = Path(config.output_dir)
    with _processes(config) as ranks, _locked_folder(config, ranks, resume=resume):
        setup = prepare(config, ranks, resume=resume)
        with catch_signals(once=ranks.world == 1) as interrupt, open_run(setup, interrupt) as run:
            if not run.progress.step:
                run.write_samples()
            try:
                distill(run)
                run.checkpoints.wait()
            except Interrupted:
                raise run.stop() from None
            student_step = run.take_best()
            run.write_samples()
        save_student(setup.student, folder / STAGED, config, is_main=ranks.is_main)
        if ranks.is_main:
            finish(folder, setup.tokenizer, setup.config, student_step)
        ranks.log(f"the student is in {folder}")
    return folder


def dry_run(config: TrainConfig, *, resume: bool = False) -> str:
    """Check everything up to the first step and return the plan of the run; write nothing."""
    with _processes(config) as ranks:
        check_folder(config, resume=resume)
        check_writable(Path(config.output_dir))
        setup = prepare(config, ranks, resume=resume)
        return plan(setup.config, setup.cache, ranks)


def distill(run: TrainingRun) -> None:
    """Run Algorithm 1 from the step that ``run`` has reached.

    A resumed run begins inside an interval: its factor is set, and some of its rows are trained on.
    """
    config, progress, window = run.config, run.progress, run.window
    run.meter.advance(progress.step)
    if progress.step == progress.start:
        run.measure()
    while not run.is_over():
        interval = run.begin_interval()
        for step in range(progress.step + 1, interval.last_step + 1):
            rate, weights = learning_rate(step, config), step_weights(config, run.cache.domains, step)
            with window.timing("step"):
                with window.timing("wait"):
                    parts = list(islice(interval.batches, config.gradient_accumulation_steps))
                result = run.optimizer_step(parts, rate, weights)
            window.add_norm(result.norm, step)
            progress.step, progress.tokens = step, progress.tokens + result.tokens
            run.meter.advance(1)

            if step % config.logging_steps == 0 or run.may_end(interval):
                run.write_metrics(rate, result.norm)
            if step % config.save_steps == 0 or step == config.max_steps:
                run.save()
            if result.interrupted:
                raise Interrupted

        run.measure()  # and set the factor of the next interval
        progress.interval, progress.start = progress.interval + 1, progress.step
        progress.sampler = interval.next_sampler
    run.write_measurement()


@contextmanager
def _locked_folder(config: TrainConfig, ranks: Ranks, *, resume: bool) -> Iterator[None]:
    """Check the output folder, and hold its lock in the main process."""
    with ExitStack() as stack:

        def lock() -> None:
            check_folder(config, resume=resume)
            stack.enter_context(locked_folder(Path(config.output_dir)))

        ranks.from_main(lock)
        yield


@contextmanager
def _processes(config: TrainConfig) -> Iterator[Ranks]:
    """Join the processes of the run, explain a full GPU and restore the random state."""
    with warnings.catch_warnings():
        # torch.distributed.checkpoint warns in every run of one process.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            with process_group(config.timeout_minutes) as ranks, ranks.random_state():
                yield ranks
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the GPU's memory is full: halve per_device_train_batch_size and double "
                "gradient_accumulation_steps, or set gradient_checkpointing: true"
            ) from error


class _CallableModule(ModuleType):
    """Lets ``ddk_train.train`` be both the function and this module, whichever is imported first."""

    def __call__(self, config: TrainConfig, *, resume: bool = False) -> Path:
        return train(config, resume=resume)

    __call__.__doc__ = train.__doc__


sys.modules[__name__].__class__ = _CallableModule
