"""Many engines: each request is answered once, whatever engines die on the way."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ddk_build.capture.cluster import Cluster
from ddk_build.generate.engine import Completion, Request, Shard
from ddk_build.generate.prompts import Prompt
from ddk_build.generate.ray_engines import RayEngines
from ddk_cache.errors import CacheError, ConfigError

MOST = 4


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    """An engine in this process; its n-th call may raise what ``fault`` returns."""

    def __init__(self, index: int, fault: Callable[[int, int], Exception | None]) -> None:
        self.index, self._fault, self._calls = index, fault, 0
        self.held: list[Request] = []
        self.start = SimpleNamespace(remote=lambda *_: (self, "start", None))
        self.advance = SimpleNamespace(remote=lambda requests: (self, "advance", tuple(map(id, requests))))

    def do(self, call: tuple[Any, str, Any], requests: dict[int, Request]) -> Any:
        self._calls += 1
        if error := self._fault(self.index, self._calls):
            raise error
        if call[1] == "start":
            return MOST
        self.held += [requests[key] for key in call[2]]
        assert len(self.held) <= MOST
        ended, self.held = self.held[:2], self.held[2:]
        return [(request, Completion([request.sample], [-1.0], "stop", "")) for request in ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """Return a function that completes 30 requests with three engines; it returns what was answered."""

    def run(fault: Callable[[int, int], Exception | None] = lambda *_: None) -> list[tuple[int, int]]:
        actors: list[Actor] = []
        shard = Shard("qa", 0, 10)
        requests = [
            Request(shard, index, Prompt(f"{index}", [index], {}), sample, 0)
            for index in range(10)
            for sample in range(3)
        ]

        def make(*_: Any) -> Actor:
            actors.append(Actor(len(actors), fault))
            return actors[-1]

        ray = SimpleNamespace(
            remote=lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make)),
            wait=lambda calls: ([calls[len(calls) // 2]], calls),
            get=lambda call: call[0].do(call, {id(request): request for request in requests}),
            exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError),
        )
        monkeypatch.setitem(sys.modules, "ray", ray)
        engines = RayEngines(Cluster(3, {"num_cpus": 1}))
        return [(request.index, request.sample) for request, _ in engines.complete(requests)]

    return run


ALL = [(index, sample) for index in range(10) for sample in range(3)]


def test_every_request_is_answered_once(run: Callable[..., Any]) -> None:
    assert sorted(run()) == ALL


@pytest.mark.parametrize("died", [1, 2, 3, 4])
def test_the_others_take_the_requests_of_an_engine_that_dies(
    run: Callable[..., Any], died: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert sorted(run(lambda index, call: RayError() if (index, call) == (1, died) else None)) == ALL
    assert "an engine is lost: its process or machine died" in caplog.text


def test_without_an_engine_it_ends_in_one_line(run: Callable[..., Any]) -> None:
    with pytest.raises(CacheError, match="no engine is left; the files that are done stay"):
        run(lambda index, call: RayError() if call == 3 else None)


def test_what_no_engine_can_do_ends_at_once(run: Callable[..., Any]) -> None:
    error = ConfigError("model: vLLM cannot run it")
    with pytest.raises(ConfigError, match="vLLM cannot run it"):
        run(lambda index, call: RayTaskError(error) if index == 2 else None)
