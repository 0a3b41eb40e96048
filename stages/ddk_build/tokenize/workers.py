"""Tokenise in this process for the first seconds, then in other processes too.

The parts of a domain come back in the source's order, and do not depend on which process made them.
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
from ddk_build.teacher.tokenizer import load_tokenizer, tokenizer_digest
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.util.processes import follow_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Seconds of tokenising before other processes start: each takes as long to start.
SECONDS_ALONE = 3.0
# Objects made between two runs of Python's garbage collector, which took a fifth of the time of short texts.
COLLECT_EVERY = 1_000_000
AHEAD = 2  # parts sent to each process: one that it tokenises, one that waits


class Job(NamedTuple):
    """What a process needs to tokenise a domain's rows."""

    config: str
    """The build's configuration in JSON."""
    tokenizer_digest: str
    domain: str


Submit = Callable[[Job, sources.Part], Callable[[], TokenisedPart]]
"""Sends a part to another process; calling the result waits for the tokens."""
Helpers = Callable[[], AbstractContextManager[tuple[Submit, int]]]
"""Starts other processes; yields the function that uses them, and how many there are."""


class Tokenisers:
    """Tokenises parts of domains, in this process or others. Leaving the context ends the others."""

    def __init__(self, config: BuildConfig, tokenizer: "PreTrainedTokenizerBase", helpers: Helpers) -> None:
        self._config, self._tokenizer, self._helpers = config, tokenizer, helpers
        self._stack = ExitStack()
        self._started: tuple[Submit, int] | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._stack.callback(gc.set_threshold, *gc.get_threshold())
        gc.set_threshold(COLLECT_EVERY)
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
        config = self._config.model_dump_json(exclude_unset=True)
        job = Job(config, tokenizer_digest(self._tokenizer, chats=True), name)
        results: deque[Callable[[], TokenisedPart]] = deque()
        for part in source:
            results.append(submit(job, part))
            if len(results) > AHEAD * count:
                yield results.popleft()()
        while results:
            yield results.popleft()()


def tokenise_part(job: Job, part: sources.Part) -> TokenisedPart:
    """Return the documents of a part; a process loads the tokenizer once."""
    return _maker(job).tokenise(part)


@lru_cache(maxsize=1)
def _maker(job: Job) -> DocumentMaker:
    config = BuildConfig.model_validate_json(job.config)
    tokenizer = _tokenizer(config.teacher.model_dump_json(exclude_unset=True), job.tokenizer_digest)
    domain = config.domains[job.domain]
    return DocumentMaker(job.domain, domain, tokenizer, config.seed, config.seq_length)


@lru_cache(maxsize=1)
def _tokenizer(teacher_json: str, expected_digest: str) -> "PreTrainedTokenizerBase":
    teacher = TeacherConfig.model_validate_json(teacher_json)
    tokenizer = load_tokenizer(teacher)
    if tokenizer_digest(tokenizer, chats=True) != expected_digest:
        raise ConfigError(f"teacher.model: {teacher.model}: its tokenizer differs on {os.uname().nodename}")
    return tokenizer


@contextmanager
def processes(count: int | None = None) -> Iterator[tuple[Submit, int]]:
    """Start ``count`` processes; by default one for each core that this process may use."""
    count = count or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "datasets", "transformers.models.auto.tokenization_auto"])
    with ProcessPoolExecutor(count, mp_context=context, initializer=begin_process) as pool:

        def submit(job: Job, part: sources.Part) -> Callable[[], TokenisedPart]:
            future = pool.submit(tokenise_part, job, part)

            def result() -> TokenisedPart:
                try:
                    return future.result()
                except BrokenProcessPool as error:
                    raise CacheError(
                        "a tokenising process died, perhaps out of memory: run build again"
                    ) from error

            return result

        try:
            yield submit, count
        finally:
            pool.shutdown(cancel_futures=True)


def begin_process() -> None:
    """Prepare a new process: its tokenizer uses one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(COLLECT_EVERY)
    follow_parent()
