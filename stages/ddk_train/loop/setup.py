"""Prepare a run: load cache, student and optimizer, and check them against each other."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from ddk_cache import Cache, open_cache
from ddk_cache.cache.joined import join
from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.loop.evaluate import teacher_perplexity
from ddk_train.loop.mixture import check_weights, mean_labels, steps_within_epochs, train_rows
from ddk_train.loop.objective import check_objective
from ddk_train.loop.optimizer import make_optimizer
from ddk_train.loop.plan import check_epochs, remarks
from ddk_train.output.resume import Start, find_checkpoint, fingerprint
from ddk_train.output.tracking import check_installed
from ddk_train.student import memory
from ddk_train.student.distributed import Ranks, wrap
from ddk_train.student.files import load_model, loading
from ddk_train.student.probe import check_isolation, examine
from ddk_train.student.spelling import token_bytes
from ddk_train.student.student import Student, compile_body
from ddk_train.student.tokenizer import harmless_differences, load_tokenizer

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Setup:
    """The parts of a run, before anything is written."""

    config: TrainConfig  # max_steps lowered to what max_epochs allows
    ranks: Ranks
    cache: Cache
    tokenizer: Any
    student: Student
    model: nn.Module  # the student, wrapped for several processes
    optimizer: Optimizer
    teacher_ppl: Float64  # [N]
    fingerprint: dict[str, Any]
    start: Start | None  # the checkpoint to resume from

    @cached_property
    def token_bytes(self) -> NDArray[np.int64] | None:
        """The bytes of text of each token, [V]; None if the tokenizer is of another kind."""
        return token_bytes(self.tokenizer, self.student.vocab_size)

    @cached_property
    def rows(self) -> list[int]:
        """Training rows of each domain, [N]."""
        return train_rows(self.cache)

    @cached_property
    def labels_per_row(self) -> Float64:
        """Mean number of labels in a training row of each domain, [N]."""
        return mean_labels(self.cache)


def prepare(config: TrainConfig, ranks: Ranks, *, resume: bool) -> Setup:
    """Open the cache, load the student and check that they fit the configuration.

    Raises ConfigError if they do not or the output folder cannot be used, and CacheError if the cache cannot
    be read or a domain is not finished.
    """
    check_installed(config.report_to)
    if config.attn_implementation.startswith("fl") and ranks.device.type != "cuda":
        raise ConfigError(
            f"attn_implementation: {config.attn_implementation} trains on a GPU only; set it to sdpa"
        )
    cache = join([open_cache(url, allow_incomplete=config.allow_incomplete) for url in config.caches])
    teacher_ppl = teacher_perplexity(cache)
    check_weights(config, cache.domains)
    check_objective(config, cache)
    config = _limit_steps(config, cache, ranks)
    for warning in check_epochs(config, cache, ranks):
        ranks.log(warning)
    expected = fingerprint(config, cache, ranks)
    folder = Path(config.output_dir)
    start = ranks.from_main(lambda: find_checkpoint(folder, expected, ranks.log)) if resume else None
    tokenizer = load_tokenizer(config, cache)
    if line := harmless_differences(tokenizer, cache):
        ranks.log(line)
    torch.manual_seed(config.seed)  # for the adapters' first weights, the same in all processes
    language_model = load_model(config, cache, tokenizer)
    with loading(config.student):
        layout = ranks.from_main(lambda: examine(language_model, config, cache.seq_length))
    student = Student(language_model, config, layout)
    needed = memory.report(student, config, cache.seq_length, ranks)
    attention, batch = student.inner.config._attn_implementation, config.per_device_train_batch_size
    masks = memory.mask_remark(attention, batch, cache.seq_length) if student.layout.packed else []
    for line in (student.description(), needed, *masks, *remarks(config)):
        ranks.log(line)
    model = wrap(student, config, ranks)
    if student.layout.packed:
        check_isolation(student, ranks.device)
    if config.torch_compile:
        compile_body(student)
    optimizer = make_optimizer(student, config, ranks.device)
    torch.manual_seed(config.seed + ranks.rank)  # for dropout, different in each process
    return Setup(
        config=config,
        ranks=ranks,
        cache=cache,
        tokenizer=tokenizer,
        student=student,
        model=model,
        optimizer=optimizer,
        teacher_ppl=teacher_ppl,
        fingerprint=expected,
        start=start,
    )


def _limit_steps(config: TrainConfig, cache: Cache, ranks: Ranks) -> TrainConfig:
    """Lower ``max_steps``, at which schedules end, to the steps that ``max_epochs`` allows."""
    steps = steps_within_epochs(config, cache.domains, train_rows(cache), ranks.rows_in_a_step(config))
    if steps == config.max_steps:
        return config
    ranks.log(f"max_epochs: the rows last for {steps:,} steps, so max_steps is {steps:,}")
    return config.model_copy(update={"max_steps": steps})
