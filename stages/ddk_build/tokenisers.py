"""Who tokenises: this process at first, and others beside it once that has taken seconds.

Parts of a domain go out to whoever is free, and come back in order; nothing depends on who made what.
"""

import gc
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Self

from ddk_build import sources
from ddk_build.config import BuildConfig, DomainConfig, TeacherConfig
from ddk_build.corpus import Maker
from ddk_build.documents import Found
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache.children import begin
from ddk_cache.configuration import Config
from ddk_cache.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALONE = (
    3.0  # seconds of tokenising that are not worth the start of other processes, each of which takes as long
)
SELDOM = 1_000_000  # objects made between two rounds of Python's collector
AHEAD = 2  # parts for each process, of which one is being tokenised

Submit = Callable[[str, int, bytes, bool], Callable[[], Found]]
"""Sends a part out (see ``tokenise_part``); the answer waits for it."""
Helpers = Callable[[], AbstractContextManager[tuple[Submit, int]]]
"""Starts others who tokenise, and says how many they are."""


class Task(Config):
    """All that a process must know to tokenise a domain's rows."""

    name: str
    domain: DomainConfig
    teacher: TeacherConfig
    seed: int
    seq_length: int
    tokenizer_hash: str


class Tokenisers:
    """Tokenises parts of domains, here or elsewhere. Leaving it ends the processes."""

    def __init__(
        self,
        config: BuildConfig,
        tokenizer: "PreTrainedTokenizerBase",
        helpers: Helpers,
    ) -> None:
        self._config, self._tokenizer, self._helpers = config, tokenizer, helpers
        self._opened = ExitStack()
        self._submit: tuple[Submit, int] | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._opened.enter_context(seldom_collected())
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def documents(self, name: str, domain: DomainConfig, skip: int) -> Iterator[Found]:
        """The documents of a domain's rows from number ``skip`` on, part after part."""
        parts = sources.read(name, domain, skip)
        make = Maker(name, domain, self._tokenizer, self._config.seed, self._config.seq_length)
        while self._seconds < ALONE:
            began = time.perf_counter()
            part = next(parts, None)
            if part is None:
                return
            found = make.documents(part)
            self._seconds += time.perf_counter() - began
            yield found
        if self._submit is None:
            self._submit = self._opened.enter_context(self._helpers())
        submit, count = self._submit
        known = task(self._config, name, domain, vocabulary(self._tokenizer).fingerprint())
        out: deque[Callable[[], Found]] = deque()
        for part in parts:
            out.append(submit(known, part.first, part.to_bytes(), part.replaced))
            if len(out) > AHEAD * count:
                yield out.popleft()()
        while out:
            yield out.popleft()()


def task(config: BuildConfig, name: str, domain: DomainConfig, tokenizer_hash: str) -> str:
    """A domain's ``Task`` in JSON."""
    return Task(
        name=name,
        domain=domain,
        teacher=config.teacher,
        seed=config.seed,
        seq_length=config.seq_length,
        tokenizer_hash=tokenizer_hash,
    ).model_dump_json(exclude_unset=True)


def tokenise_part(task: str, first: int, table: bytes, replaced: bool) -> Found:
    """Some rows' documents; ``task`` is a ``Task`` in JSON, the rest a ``sources.Part``."""
    return _maker(task).documents(sources.Part.from_bytes(first, table, replaced))


@lru_cache(maxsize=1)
def _maker(task: str) -> Maker:
    known = Task.model_validate_json(task)
    tokenizer = _tokenizer(known.teacher.model_dump_json(exclude_unset=True), known.tokenizer_hash)
    return Maker(known.name, known.domain, tokenizer, known.seed, known.seq_length)


@lru_cache(maxsize=1)
def _tokenizer(teacher: str, fingerprint: str) -> "PreTrainedTokenizerBase":
    known = TeacherConfig.model_validate_json(teacher)
    found = load_tokenizer(known)
    if vocabulary(found).fingerprint() != fingerprint:
        raise ConfigError(f"teacher.model: {known.model} has another tokenizer on {os.uname().nodename}")
    return found


@contextmanager
def processes(count: int | None = None) -> Iterator[tuple[Submit, int]]:
    """So many processes; without a number one for each core that this process may use."""
    count = count or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "datasets", "transformers.models.auto.tokenization_auto"])
    with ProcessPoolExecutor(count, mp_context=context, initializer=begin_process) as pool:

        def submit(task: str, first: int, table: bytes, replaced: bool) -> Callable[[], Found]:
            future = pool.submit(tokenise_part, task, first, table, replaced)

            def result() -> Found:
                try:
                    return future.result()
                except BrokenProcessPool as error:
                    raise CacheError(
                        "a process that tokenised has died, of too little memory perhaps: run build again"
                    ) from error

            return result

        try:
            yield submit, count
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Fewer rounds of Python's collector, which took a fifth of the time of many short documents.

    They have no cycles.
    """
    before = gc.get_threshold()
    gc.set_threshold(SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def begin_process() -> None:
    """Prepare a new process: its tokenizer uses one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(SELDOM)
    begin()
