"""The program of stage two, from top to bottom: DDK's Algorithm 1 on a cache (arXiv 2407.16154)."""

import time
import uuid
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
import yaml
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from ddk_cache import Cache, open_cache
from ddk_cache.errors import ConfigError
from ddk_cache.sampler import SamplerState, draw
from ddk_train import checkpoint, memory
from ddk_train.batches import read_ahead, reader
from ddk_train.checkpoint import Progress
from ddk_train.config import TrainConfig
from ddk_train.distributed import Ranks, gradient_sync, process_group, wrap
from ddk_train.errors import TrainingError
from ddk_train.evaluate import student_perplexity, teacher_perplexity
from ddk_train.mixture import Measurement, check_weights, interval_share, next_factor
from ddk_train.optimizer import make_optimizer
from ddk_train.probe import check_documents_apart, logit_scale
from ddk_train.schedule import learning_rate
from ddk_train.student import Student, load_model, save_student
from ddk_train.tokenizer import load_tokenizer
from ddk_train.tracking import FILES, Records, check_installed, progress_line


def train(config: TrainConfig, *, resume: bool = False) -> None:
    """Train a student from a cache; see :class:`TrainConfig`. ``resume`` goes on from the newest checkpoint.

    Raises
    ------
    ConfigError
        The configuration, the cache and the student do not go together, or the output folder is in use.
    CacheError
        The cache cannot be read.
    TrainingError
        The loss is no longer a number, another process is lost, or the GPU's memory is full.
    """
    try:
        with process_group(config.timeout_minutes) as ranks:
            _train(config, resume, ranks)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU's memory is full: halve per_device_train_batch_size and double "
            "gradient_accumulation_steps, or set gradient_checkpointing: true"
        ) from error


def _train(config: TrainConfig, resume: bool, ranks: Ranks) -> None:
    # What there is: a cache, a student, and perhaps a checkpoint to go on from.
    folder = Path(config.output_dir)
    start = find_start(folder, resume=resume)
    cache = open_cache(config.cache, allow_incomplete=config.allow_incomplete)
    check_fit(config, cache, ranks)
    fingerprint = checkpoint.fingerprint(config, cache, ranks)
    state = checkpoint.read_state(start, fingerprint) if start else None
    tokenizer = load_tokenizer(config, cache)
    torch.manual_seed(config.seed)  # for the adapters' first weights, alike in all processes
    language_model = load_model(config, cache, tokenizer)
    student = Student(language_model, config, logit_scale(language_model))
    say(ranks, memory.report(language_model, config, cache.seq_length, ranks))
    model = wrap(student, config, ranks)
    check_documents_apart(student, ranks.device)
    optimizer = make_optimizer(student, config, ranks.device)
    torch.manual_seed(config.seed + ranks.rank)  # for dropout, different in each process

    domains = cache.domains
    rows = [len(cache[name].train) for name in domains]
    teacher_ppl = teacher_perplexity(cache)
    batches_per_step, threads = config.gradient_accumulation_steps, config.num_reader_threads
    share_of_ranks = (-1, ranks.world, config.per_device_train_batch_size)
    rows_per_step = batches_per_step * ranks.world * config.per_device_train_batch_size
    read = reader(
        cache, targets=config.gamma > 0, vocab_size=student.vocab_size, pin=ranks.device.type == "cuda"
    )

    progress = Progress(SamplerState((0,) * len(domains)), run_id=uuid.uuid4().hex)
    window = torch.zeros(4, dtype=torch.float64, device=ranks.device)  # loss, cross-entropy, KL; labels
    sizes = dict.fromkeys(FILES, 0)
    if start and state:
        progress, sizes = Progress.from_json(state["progress"]), state["files"]
        window = checkpoint.load(start, student, optimizer, ranks)
        say(ranks, f"going on from {start}")
    elif ranks.is_main:
        prepare_folder(folder, config)

    with Records(config, progress.run_id, progress.step, sizes, is_main=ranks.is_main) as records:
        # Algorithm 1. A checkpoint lies inside an interval: its factor is known, part of its rows is used.
        def measure() -> tuple[np.ndarray, bool]:
            """The student's perplexities [N], and whether training ends here; sets the next factor."""
            batch_size = config.per_device_train_batch_size
            student_ppl = student_perplexity(student, cache, ranks, batch_size=batch_size, threads=threads)
            if not np.isfinite(student_ppl).all():
                raise TrainingError(not_finite(progress.step, folder))
            old = np.array(progress.factor) if progress.factor else None
            now = Measurement(domains, old, student_ppl, teacher_ppl, rows)
            progress.factor = next_factor(config, now).tolist()
            close = bool((student_ppl <= (config.stop_ratio or 0.0) * teacher_ppl).all())
            return student_ppl, close or progress.step == config.max_steps

        def write_measurement(student_ppl: np.ndarray, drawn: np.ndarray) -> None:
            records.discrepancy(
                progress.interval,
                progress.step,
                domains,
                factor=progress.factor,
                student_ppl=student_ppl,
                teacher_ppl=teacher_ppl,
                rows=drawn,
            )

        student_ppl, is_done = measure() if start is None else (np.empty(0), False)
        began, first_step = time.perf_counter(), progress.step
        busy = waited = 0.0  # seconds in steps since the last line of metrics; of them waiting for rows
        tokens_before = progress.tokens
        while not is_done:
            begin = progress.interval * config.distill_interval
            end = min(begin + config.distill_interval, config.max_steps)
            share = interval_share(config, progress.interval, np.array(progress.factor), rows)
            count = (end - begin) * rows_per_step
            domain, row, next_sampler = draw(progress.sampler, share, rows, count, config.seed)
            if progress.step == begin:
                write_measurement(student_ppl, np.bincount(domain, minlength=len(domains)))
            mine = [array.reshape(share_of_ranks)[:, ranks.rank] for array in (domain, row)]
            todo = list(zip(*mine, strict=True))[(progress.step - begin) * batches_per_step :]
            batches = read_ahead(lambda item: read(*item), todo, threads=threads, ahead=2 * threads)

            for step in range(progress.step + 1, end + 1):
                step_began = time.perf_counter()
                parts = list(islice(batches, batches_per_step))
                waited += time.perf_counter() - step_began

                # The loss is a mean over the labels of the global batch, however it is split.
                counts = [sum(len(part.labels) for part in parts), sum(part.text_tokens for part in parts)]
                labels, tokens = ranks.sum(torch.tensor(counts)).tolist()
                for number, part in enumerate(parts):
                    with gradient_sync(model, enabled=number == batches_per_step - 1):
                        result = model(part.to(ranks.device), config.gamma)
                        # Gradients are averaged over processes, so each process's part counts world-fold.
                        (result.loss * (ranks.world * len(part.labels) / max(labels, 1))).backward()
                    sums = torch.stack(result).detach().double() * len(part.labels)
                    window += torch.cat([sums, sums.new_tensor([len(part.labels)])])
                norm = gradient_norm(student, config.max_grad_norm)
                if not np.isfinite(norm):
                    raise TrainingError(not_finite(step, folder))
                rate = learning_rate(
                    step,
                    warmup_steps=config.warmup_steps,
                    max_steps=config.max_steps,
                    peak=config.learning_rate,
                    minimum=config.min_learning_rate,
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
                progress.step, progress.tokens = step, progress.tokens + tokens
                busy += time.perf_counter() - step_began

                may_end = step == config.max_steps or (config.stop_ratio is not None and step == end)
                if step % config.logging_steps == 0 or may_end:
                    *totals, seen = ranks.sum(window).tolist()
                    loss, cross_entropy, kl = (total / max(seen, 1) for total in totals)
                    line = {
                        "step": step,
                        "loss": loss,
                        "cross_entropy": cross_entropy,
                        "kl": kl,
                        "learning_rate": rate,
                        "grad_norm": norm,
                        "tokens": progress.tokens,
                        "tokens_per_second": (progress.tokens - tokens_before) / busy,
                        "data_wait_fraction": waited / busy,
                    }
                    records.metrics(line)
                    left = (time.perf_counter() - began) / (step - first_step) * (config.max_steps - step)
                    say(ranks, progress_line(line, config.max_steps, left, domains, progress.factor))
                    window.zero_()
                    busy, waited, tokens_before = 0.0, 0.0, progress.tokens
                if step % config.save_steps == 0 or step == config.max_steps:
                    saved = {
                        "progress": progress.to_json(),
                        "fingerprint": fingerprint,
                        "files": records.sizes(),
                    }
                    checkpoint.save(folder, saved, student, optimizer, window, ranks)
                    if ranks.is_main:
                        checkpoint.remove_old(folder, config.save_total_limit)

            progress.interval, progress.sampler = progress.interval + 1, next_sampler
            student_ppl, is_done = measure()
        write_measurement(student_ppl, np.zeros(len(domains), int))

    save_student(student, folder, config, is_main=ranks.is_main)
    if ranks.is_main:
        tokenizer.save_pretrained(folder)
    say(ranks, f"the student is in {folder}")


def find_start(folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None starts at the beginning.

    Raises
    ------
    ConfigError
        The folder holds a run, and it is not to be resumed.
    """
    if resume:
        return checkpoint.newest(folder)
    if (folder / "config.yaml").exists() or checkpoint.newest(folder):
        raise ConfigError(f"output_dir: {folder} holds a run already: add --resume to go on, or name another")
    return None


def check_fit(config: TrainConfig, cache: Cache, ranks: Ranks) -> None:
    """Raise ConfigError where the configuration asks for what the cache or the machine does not have."""
    check_installed(config.report_to)
    if config.temperature != cache.target.temperature:
        raise ConfigError(
            f"temperature: is {config.temperature}, but the cache's targets were taken at "
            f"{cache.target.temperature}"
        )
    if config.attn_implementation.startswith("fl") and ranks.device.type != "cuda":
        raise ConfigError(
            f"attn_implementation: {config.attn_implementation} trains on a GPU only; take sdpa"
        )
    check_weights(config, cache.domains)


def prepare_folder(folder: Path, config: TrainConfig) -> None:
    """Make the output folder, with the resolved configuration in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write to {folder}: {error.strerror}") from error


def gradient_norm(student: torch.nn.Module, limit: float) -> float:
    """Clip the gradients to ``limit``, and return the norm they had, the same in all processes."""
    norm = clip_grad_norm_((p for p in student.parameters() if p.requires_grad), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def not_finite(step: int, folder: Path) -> str:
    last = checkpoint.newest(folder)
    where = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return (
        f"step {step}: the student's loss or its gradient is not a finite number; {where}. "
        "A lower learning_rate, a longer warmup_steps or bf16: false may help"
    )


def say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        click.echo(line, err=True)
