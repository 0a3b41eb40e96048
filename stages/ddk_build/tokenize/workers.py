"""Who tokenises: this process first, and other processes once that has taken seconds.

Parts of a domain go to whoever is free and come back in order; the result does not depend on who made it.
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
from typing import TYPE_CHECKING, NamedTuple, Self

from ddk_build.config import BuildConfig, DomainConfig, TeacherConfig
from ddk_build.data import sources
from ddk_build.data.corpus import DocumentMaker
from ddk_build.data.documents import TokenisedPart
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.util.processes import follow_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Seconds of tokenising that are not worth starting other processes, each of which takes as long.
SECONDS_ALONE = 3.0
COLLECT_EVERY = 1_000_000  # objects made between two runs of Python's garbage collector
AHEAD = 2  # parts for each process, one of which is being tokenised


class Job(NamedTuple):
    """What a process needs to tokenise a domain's rows."""

    config: str
    """The build's configuration in JSON."""
    tokenizer_hash: str
    domain: str


Submit = Callable[[Job, int, bytes, bool], Callable[[], TokenisedPart]]
"""Sends a part out (see ``tokenise_part``); its result waits for the answer."""
Helpers = Callable[[], AbstractContextManager[tuple[Submit, int]]]
"""Starts other processes, and returns how many there are."""


class Tokenisers:
    """Tokenises parts of domains, here or elsewhere. Leaving the context ends the processes."""

    def __init__(self, config: BuildConfig, tokenizer: "PreTrainedTokenizerBase", helpers: Helpers) -> None:
        self._config, self._tokenizer, self._helpers = config, tokenizer, helpers
        self._stack = ExitStack()
        self._started: tuple[Submit, int] | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._stack.enter_context(rarely_collected())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def parts(self, name: str, domain: DomainConfig, skip: int) -> Iterator[TokenisedPart]:
        """Yield the documents of a domain's rows from row ``skip`` on, part after part."""
        source = sources.read(name, domain, skip)
        maker = DocumentMaker(name, domain, self._tokenizer, self._config.seed, self._config.seq_length)
        while self._seconds < SECONDS_ALONE:
            began = time.perf_counter()
            part = next(source, None)
            if part is None:
                return
            tokenised = maker.tokenise(part)
            self._seconds += time.perf_counter() - began
            yield tokenised
        if self._started is None:
            self._started = self._stack.enter_context(self._helpers())
        submit, count = self._started
        job = tokenising_job(self._config, name, vocabulary(self._tokenizer))
        results: deque[Callable[[], TokenisedPart]] = deque()
        for part in source:
            results.append(submit(job, part.first, part.to_bytes(), part.replaced))
            if len(results) > AHEAD * count:
                yield results.popleft()()
        while results:
            yield results.popleft()()


def tokenising_job(config: BuildConfig, domain: str, vocabulary: Vocabulary) -> Job:
    """Return the job of a domain."""
    return Job(config.model_dump_json(exclude_unset=True), vocabulary.fingerprint(), domain)


def tokenise_part(job: Job, first: int, table: bytes, replaced: bool) -> TokenisedPart:
    """Return some rows' documents; all but ``job`` are a ``sources.Part``."""
    return _maker(job).tokenise(sources.Part.from_bytes(first, table, replaced))


@lru_cache(maxsize=1)
def _maker(job: Job) -> DocumentMaker:
    config = BuildConfig.model_validate_json(job.config)
    tokenizer = _tokenizer(config.teacher.model_dump_json(exclude_unset=True), job.tokenizer_hash)
    domain = config.domains[job.domain]
    return DocumentMaker(job.domain, domain, tokenizer, config.seed, config.seq_length)


@lru_cache(maxsize=1)
def _tokenizer(teacher_json: str, tokenizer_hash: str) -> "PreTrainedTokenizerBase":
    teacher = TeacherConfig.model_validate_json(teacher_json)
    tokenizer = load_tokenizer(teacher)
    if vocabulary(tokenizer).fingerprint() != tokenizer_hash:
        raise ConfigError(f"teacher.model: {teacher.model} has another tokenizer on {os.uname().nodename}")
    return tokenizer


@contextmanager
def processes(count: int | None = None) -> Iterator[tuple[Submit, int]]:
    """Start ``count`` processes; by default one for each core that this process may use."""
    count = count or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "datasets", "transformers.models.auto.tokenization_auto"])
    with ProcessPoolExecutor(count, mp_context=context, initializer=begin_process) as pool:

        def submit(job: Job, first: int, table: bytes, replaced: bool) -> Callable[[], TokenisedPart]:
            future = pool.submit(tokenise_part, job, first, table, replaced)

            def result() -> TokenisedPart:
                try:
                    return future.result()
                except BrokenProcessPool as error:
                    raise CacheError(
                        "a process that tokenised has died, perhaps because it ran out of memory: run build "
                        "again"
                    ) from error

            return result

        try:
            yield submit, count
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Run Python's garbage collector rarely: it took a fifth of the time of many short documents.

    They have no cycles.
    """
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_EVERY)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def begin_process() -> None:
    """Prepare a new process: its tokenizer uses one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(COLLECT_EVERY)
    follow_parent()
