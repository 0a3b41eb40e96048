"""An engine that writes completions without a model."""

import random
from collections.abc import Iterable, Iterator

import pytest

from ddk_build.generate import vllm_engine
from ddk_build.generate.engine import Completion, Request


class Echo:
    """An engine that writes a few tokens of each prompt's seed, and ends requests in a random order."""

    def __init__(self, order: int = 0) -> None:
        self.chance = random.Random(order)
        self.asked: list[Request] = []

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        waiting: list[Request] = []
        for request in requests:
            self.asked.append(request)
            waiting.append(request)
            if len(waiting) > 5:
                yield self._end(waiting)
        while waiting:
            yield self._end(waiting)

    def _end(self, waiting: list[Request]) -> tuple[Request, Completion]:
        request = waiting.pop(self.chance.randrange(len(waiting)))
        tokens = [3 + request.seed % 300, 3 + request.seed % 7, 0]
        reason = "length" if request.seed % 3 == 0 else "stop"
        return request, Completion(tokens, [-1.5, -0.25, -0.5], reason, self.text(request))

    def text(self, request: Request) -> str:
        return f"seed {request.seed}"


def use(monkeypatch: pytest.MonkeyPatch, engine: Echo) -> Echo:
    """Put ``engine`` in the place of vLLM."""
    monkeypatch.setattr(vllm_engine, "VllmEngine", lambda *_: engine)
    monkeypatch.setattr(vllm_engine, "check_arguments", lambda *_: None)
    return engine
