"""The program of stage two, from top to bottom: DDK's Algorithm 1 on a cache (arXiv 2407.16154)."""

import time
import uuid
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch

from ddk_cache import Cache, open_cache
from ddk_cache.errors import ConfigError
from ddk_cache.sampler import SamplerState, draw
from ddk_train import checkpoint, memory
from ddk_train.batches import read_ahead, reader
from ddk_train.checkpoint import Progress
from ddk_train.config import TrainConfig
from ddk_train.distributed import Ranks, process_group, wrap
from ddk_train.errors import Interrupted, TrainingError
from ddk_train.evaluate import teacher_perplexity
from ddk_train.facts import finish_facts, write_facts
from ddk_train.folder import find_start, prepare_folder
from ddk_train.interrupt import noting
from ddk_train.mixture import check_weights, interval_share, most_rows, row_share, within_epochs
from ddk_train.objective import check_objective, reads_targets, step_weights
from ddk_train.optimizer import make_optimizer
from ddk_train.plan import plan, remarks
from ddk_train.probe import check_isolation, examine
from ddk_train.resume import fingerprint, read_state
from ddk_train.run import Run
from ddk_train.schedule import learning_rate
from ddk_train.step import OptimizerStep
from ddk_train.student import Student, load_model, save_student
from ddk_train.tokenizer import harmless_differences, load_tokenizer
from ddk_train.tracking import FILES, Records, check_installed
from ddk_train.window import Window


def train(config: TrainConfig, *, resume: bool = False, dry_run: bool = False) -> None:
    """Train a student from a cache: ``ddk-cache train``, and the same from a notebook.

    Parameters
    ----------
    config
        Everything that decides what the run does.
    resume
        Go on from the newest checkpoint in ``config.output_dir``.
    dry_run
        Check everything up to the first step, the student included, print what would be done, write nothing.

    Raises
    ------
    ConfigError
        The configuration, the cache and the student do not go together, or the output folder is in use.
    CacheError
        The cache cannot be read.
    TrainingError
        The loss is no longer a number, another process is lost, or the GPU's memory is full.
    Stopped
        SIGTERM or SIGINT: a checkpoint is saved. A kind of TrainingError.
    """
    try:
        with process_group(config.timeout_minutes) as ranks:
            _train(config, resume, dry_run, ranks)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU's memory is full: halve per_device_train_batch_size and double "
            "gradient_accumulation_steps, or set gradient_checkpointing: true"
        ) from error


def _train(config: TrainConfig, resume: bool, dry_run: bool, ranks: Ranks) -> None:
    # What there is: a cache, a student, and perhaps a checkpoint to go on from.
    folder = Path(config.output_dir)
    start = find_start(config, resume=resume)
    cache = open_cache(config.cache, allow_incomplete=config.allow_incomplete)
    check_fit(config, cache, ranks)
    rows = [len(cache[name].train) for name in cache.domains]
    config = within_epochs(config, cache.domains, rows, ranks)
    wanted = fingerprint(config, cache, ranks)
    state = read_state(start, wanted) if start else None
    tokenizer = load_tokenizer(config, cache)
    if line := harmless_differences(tokenizer, cache):
        ranks.say(line)
    torch.manual_seed(config.seed)  # for the adapters' first weights, alike in all processes
    language_model = load_model(config, cache, tokenizer)
    layout = ranks.from_main(lambda: examine(language_model, config, cache.seq_length))
    student = Student(language_model, config, layout)
    ranks.say(student.description())
    ranks.say(memory.report(student, config, cache.seq_length, ranks))
    for line in remarks(config):
        ranks.say(line)
    model = wrap(student, config, ranks)
    if student.layout.packed:
        check_isolation(student, ranks.device)
    optimizer = make_optimizer(student, config, ranks.device)
    torch.manual_seed(config.seed + ranks.rank)  # for dropout, different in each process
    teacher_ppl = teacher_perplexity(cache)
    if dry_run:
        if ranks.is_main:
            click.echo(plan(config, cache, ranks))
        return

    window = Window(ranks, cache.domains, reads_targets(config, cache.domains))
    progress = Progress(SamplerState((0,) * len(rows)), run_id=uuid.uuid4().hex)
    sizes = dict.fromkeys(FILES, 0)
    if start and state:
        progress, sizes = Progress.from_json(state["progress"], cache.domains), state["files"]
        window.sums = checkpoint.load(start, student, optimizer, ranks)
        if ranks.is_main:
            checkpoint.remove_old(folder, config.save_total_limit)  # it may have been killed before it did
        ranks.say(f"going on from {start}")
    elif ranks.is_main:
        prepare_folder(folder, config)
        write_facts(folder, cache, ranks.device, ranks.world)

    with (
        noting(alone=ranks.world == 1) as interrupt,
        Records(config, progress.run_id, progress.step, sizes, is_main=ranks.is_main) as records,
    ):
        run = Run(
            config=config,
            ranks=ranks,
            cache=cache,
            student=student,
            optimizer_step=OptimizerStep(config, ranks, model, optimizer, window, interrupt),
            window=window,
            progress=progress,
            records=records,
            teacher_ppl=teacher_ppl,
            rows=rows,
            fingerprint=wanted,
            interrupt=interrupt,
            saved=progress.step,
        )
        if not progress.step:
            run.write_samples(tokenizer)
        try:
            distill(run)
            run.finish_saving()
        except Interrupted:
            raise run.stop() from None
        run.write_samples(tokenizer)
    save_student(student, folder, config, is_main=ranks.is_main)
    if ranks.is_main:
        tokenizer.save_pretrained(folder)
        finish_facts(folder)
    ranks.say(f"the student is in {folder}")


def distill(run: Run) -> None:
    """Algorithm 1. A checkpoint lies inside an interval: its factor is known, part of its rows is used."""
    config, progress, window, rows = run.config, run.progress, run.window, run.rows
    parts_per_step = config.gradient_accumulation_steps
    share_of_ranks = (-1, run.ranks.world, config.per_device_train_batch_size)
    rows_per_step = run.ranks.rows_in_a_step(config)
    most = most_rows(config, run.cache.domains, rows)
    read = reader(
        run.cache,
        targets=reads_targets(config, run.cache.domains),
        vocab_size=run.student.vocab_size,
        layout=run.student.layout,
        pin=run.ranks.device.type == "cuda",
    )
    began, first_step = time.perf_counter(), progress.step

    student_ppl = None if progress.step else run.measure()
    while student_ppl is None or not run.is_over(student_ppl):
        begin = progress.interval * config.distill_interval
        end = min(begin + config.distill_interval, config.max_steps)
        run.share = interval_share(config, progress.interval, np.array(progress.factor), rows)
        count = (end - begin) * rows_per_step
        by_row = row_share(config, progress.interval, run.share, run.labels_per_row)
        domain, row, next_sampler = draw(progress.sampler, by_row, rows, count, config.seed, most)
        if student_ppl is not None:
            run.write_measurement(student_ppl, np.bincount(domain, minlength=len(rows)))
        mine = [array.reshape(share_of_ranks)[:, run.ranks.rank] for array in (domain, row)]
        todo = list(zip(*mine, strict=True))[(progress.step - begin) * parts_per_step :]
        threads = config.num_reader_threads
        batches = read_ahead(lambda item: read(*item), todo, threads=threads, ahead=2 * threads)

        for step in range(progress.step + 1, end + 1):
            rate = learning_rate(
                step,
                warmup_steps=config.warmup_steps,
                max_steps=config.max_steps,
                peak=config.learning_rate,
                minimum=config.min_learning_rate,
            )
            with window.busy():
                with window.waiting():
                    parts = list(islice(batches, parts_per_step))
                weights = step_weights(config, run.cache.domains, step)
                done = run.optimizer_step(parts, rate, weights)
            window.add_norm(done.norm, step)
            progress.step, progress.tokens = step, progress.tokens + done.tokens

            may_end = step == config.max_steps or (config.stop_ratio is not None and step == end)
            if step % config.logging_steps == 0 or may_end:
                pace = (time.perf_counter() - began) / (step - first_step)
                run.write_metrics(rate, done.norm, seconds_left=pace * (config.max_steps - step))
            if step % config.save_steps == 0 or step == config.max_steps:
                run.save()
            if done.interrupted:
                raise Interrupted

        student_ppl = run.measure()
        progress.interval, progress.sampler = progress.interval + 1, next_sampler
    run.write_measurement(student_ppl, np.zeros(len(rows), np.int64))


def check_fit(config: TrainConfig, cache: Cache, ranks: Ranks) -> None:
    """Raise ConfigError where the configuration asks for what the cache or the machine does not have."""
    check_installed(config.report_to)
    if config.attn_implementation.startswith("fl") and ranks.device.type != "cuda":
        raise ConfigError(
            f"attn_implementation: {config.attn_implementation} trains on a GPU only; take sdpa"
        )
    check_weights(config, cache.domains)
    check_objective(config, cache)
