"""What there is for an engine to do, as domains get their tokens: the others are tokenised beside it."""

import multiprocessing
import os
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Self

from ddk_build.config import BuildConfig
from ddk_build.pipeline import ShardKey
from ddk_build.tokenisers import Helpers, Tokenisers, begin_process
from ddk_build.tokenising import tokenise
from ddk_build.tokenizer import load_tokenizer
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.layout import SPLITS, Manifest
from ddk_cache.lock import joined
from ddk_cache.writer import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATIENCE = 10.0  # seconds of tokenising after which an engine need not wait for domains that are left
Message = str | ConfigError | CacheError | None  # a domain that has its tokens, trouble, or the end


class Arrivals:
    """Tokenises in this process while no engine could be at work, then in another.

    The engine's own process would share its interpreter's lock. Leaving it ends the other process.
    """

    def __init__(
        self,
        writer: Writer,
        config: BuildConfig,
        tokenizer: "PreTrainedTokenizerBase",
        helpers: Helpers,
    ) -> None:
        self._writer, self._config, self._helpers = writer, config, helpers
        self._opened = ExitStack()
        self._here = self._opened.enter_context(ExitStack())
        tokenisers = self._here.enter_context(Tokenisers(config, tokenizer, helpers))
        self._domains = self._here.enter_context(closing(tokenise(writer, config, tokenisers)))
        self._pipe: Connection | None = None
        self._ready: set[str] = set()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def missing(self, teacher: int) -> list[str]:
        """Its domains that have no tokens yet."""
        return [name for name in self._writer.manifest.domains_of(teacher) if name not in self._ready]

    def work(self, teacher: int) -> Iterator[list[ShardKey]]:
        """A teacher's shards that are still to be done, of one or more domains at a time.

        Of these, validation comes first, so that training can begin on a part of the cache.
        """
        self._began = time.monotonic()  # the engine's start is none of the tokenising
        left = self._writer.manifest.domains_of(teacher)
        while left:
            ready = self._wait(left)
            left = [name for name in left if name not in ready]
            work: list[ShardKey] = [
                (name, split, shard)
                for split in reversed(SPLITS)
                for name in ready
                for shard in self._writer.unfinished(name, split)
            ]
            if work:
                yield work

    def _wait(self, names: Collection[str]) -> list[str]:
        """Those of the domains that have their tokens, once there is one; in the order of ``names``."""
        while not self._ready >= self._config.domains.keys():
            found = self._ready.intersection(names)
            if self._pipe is not None:
                if found and not self._pipe.poll():
                    break
                self._receive(self._pipe)
            elif found and time.monotonic() - self._began > PATIENCE:
                self._here.close()
                self._pipe = self._start()
            else:
                self._ready.add(next(self._domains))
        self._here.close()
        return [name for name in names if name in self._ready]

    def _receive(self, pipe: Connection) -> None:
        try:
            message: Message = pipe.recv()
        except EOFError:
            raise CacheError(
                "the process that tokenises has died, of too little memory perhaps: run build again"
            ) from None
        if isinstance(message, Exception):
            raise message
        if message is not None:
            self._writer.refresh(message)
            self._ready.add(message)

    def _start(self) -> Connection:
        """Let another process go on with what is left."""
        receive, send = multiprocessing.Pipe(duplex=False)
        holder = self._writer.holder
        write_token = holder.grant()
        self._opened.callback(holder.revoke, write_token)
        process = multiprocessing.get_context("forkserver").Process(
            target=_tokenise,
            args=(self._config, self._writer.manifest, write_token, self._helpers, os.getcwd(), send),
        )
        process.start()
        self._opened.callback(process.join)
        self._opened.callback(process.kill)
        send.close()
        return receive


def _tokenise(
    config: BuildConfig, manifest: Manifest, write_token: str, helpers: Helpers, folder: str, send: Connection
) -> None:
    """In a process of its own: tokenise what is left, and say which domains are done."""
    os.chdir(folder)
    os.environ["TTY_COMPATIBLE"] = "0"  # a line now and then: the engine's progress has the terminal
    begin_process()
    writer = Writer(joined(config.cache, write_token), manifest)
    message: Message = None
    try:
        with Tokenisers(config, load_tokenizer(config.teacher), helpers) as tokenisers:
            for name in tokenise(writer, config, tokenisers):
                send.send(name)
    except (ConfigError, CacheError) as error:
        message = error
    send.send(message)
