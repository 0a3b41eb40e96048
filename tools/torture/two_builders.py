"""A model of the lock and of commit-last: two builders on one object store, checked by hypothesis.

Each builder is the real code in a thread of its own, which stops before every request. Hypothesis decides who
makes the next request, whether it is lost, answered, unanswered or arrives late, and how the clock moves:
a builder that is not chosen is suspended. The two write different answers, so that a mixture would show.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Literal
from unittest import mock

import numpy as np
import obstore
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from ddk_cache.cache.metadata import existing_manifest, split_arrays
from ddk_cache.cache.reader import open_cache
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import Writer
from ddk_cache.errors import CacheError
from ddk_cache.format import layout, shards
from ddk_cache.format.layout import ShardKey
from ddk_cache.storage.lock import STALE, Holder
from ddk_cache.storage.object_store import ObjectStore
from ddk_cache.storage.storage import Storage, plain_errors
from tools.torture.faults import REQUESTS, objects_of
from tools.torture.subject import BUCKET, Build, bucket

Outcome = Literal["answered", "lost", "unanswered", "late"]
KEY = ShardKey("prose", "train", 0)  # the shard that both builders answer
_current = threading.local()  # the builder whose thread this is


class World:
    """A store that lacks one shard, and two answers to it."""

    def __init__(self, subject: Build) -> None:
        with bucket() as store:
            subject.run(BUCKET)
            storage = Storage(BUCKET)
            self.manifest = existing_manifest(storage)
            objects = objects_of(store)
            self.before = open_cache(BUCKET)["prose"].train.read([0, 1])
        arrays = split_arrays(self.manifest, *KEY[:2])
        rows = self.manifest.rows_per_shard(len(self.before) * 99)
        decoded = {
            name: shards.decode(objects[KEY.object(name)], array, rows)
            for name, array in arrays.items()
            if name not in layout.token_arrays(self.manifest.seq_length)
        }
        other = decoded | {"label_logprob": decoded["label_logprob"] * np.float32(2)}
        self.answers = [
            {name: shards.encode_rows(values, arrays[name]) for name, values in part.items()}
            for part in (decoded, other)
        ]
        self.objects = {
            key: data for key, data in objects.items() if key not in {KEY.object(name) for name in decoded}
        }
        self.objects.pop(KEY.object(layout.COMMITS))


class Ended(BaseException):
    """Ends a builder's thread with its example."""


class Builder:
    """One process; ``step`` lets it make one request."""

    def __init__(self, world: World, index: int) -> None:
        self._world, self._index = world, index
        self.outcome: Outcome | None = None
        self.holder: Holder | None = None
        self.crash: Exception | None = None
        self.done = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def step(self, outcome: Outcome | None) -> None:
        """Let the next request have this outcome; None ends the thread."""
        if not self.done:
            self.outcome = outcome
            self._go.release()
            self._stopped.acquire()

    def turn(self) -> Outcome:
        """Wait, in the builder's thread, until its next request is decided."""
        self._stopped.release()
        self._go.acquire()
        if self.outcome is None:
            raise Ended
        return self.outcome

    def _run(self) -> None:
        _current.builder = self
        with suppress(Ended):
            self.turn()
            try:
                self._build()
            except CacheError:
                pass  # as the command would end
            except Exception as error:
                self.crash = error
        self.done = True
        self._stopped.release()

    def _build(self) -> None:
        holder = Holder(BUCKET)
        with ExitStack() as claims:
            with plain_errors(BUCKET):
                holder.acquire(claims, wait=True)
            self.holder = holder
            writer = Writer(holder, self._world.manifest)
            for shard in writer.unfinished("prose", "train"):
                assert shard == KEY.shard
                writer.write_answers(*KEY, self._world.answers[self._index])
            writer.finalize_domain("prose")
            holder.release()


class TwoBuilders(RuleBasedStateMachine):
    """Subclasses have a ``world``."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.late = 0.0, list[Callable[[], object]]()
        self._patches = ExitStack()
        self.store: MemoryStore = self._patches.enter_context(bucket())
        for key, data in self.world.objects.items():
            self.store.put(key, data)
        for name in REQUESTS:
            request = self._decided(getattr(obstore, name), is_write=name in ("put", "delete"))
            self._patches.enter_context(mock.patch(f"ddk_cache.storage.object_store.obstore.{name}", request))
        clock = mock.Mock(monotonic=lambda: self.clock, sleep=self._sleep)
        self._patches.enter_context(mock.patch("ddk_cache.storage.lock.time", clock))
        self._patches.enter_context(mock.patch.object(ObjectStore, "map", _one_after_another))
        # Both are this process, which lives: only heartbeats may decide.
        self._patches.enter_context(mock.patch.object(Holder, "_has_ended", return_value=False))
        self.builders = [Builder(self.world, index) for index in range(2)]

    @rule(index=st.integers(0, 1), requests=st.integers(1, 40))
    def run(self, index: int, requests: int) -> None:
        """Let a builder make some requests."""
        for _ in range(requests):
            self.builders[index].step("answered")

    @rule(index=st.integers(0, 1), outcome=st.sampled_from(["lost", "unanswered", "late"]))
    def fail(self, index: int, outcome: Outcome) -> None:
        """Let a request go wrong."""
        self.builders[index].step(outcome)

    @rule(seconds=st.sampled_from([1.0, STALE / 2, STALE]))
    def wait(self, seconds: float) -> None:
        """Let time pass without a heartbeat."""
        self.clock += seconds

    @rule(index=st.integers(0, 1))
    def heartbeat(self, index: int) -> None:
        """Send a heartbeat, from the builder's other thread."""
        holder = self.builders[index].holder
        if holder is not None and not holder._sending.locked():  # or one is under way
            with suppress(CacheError):
                holder.heartbeat()

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """Let a late request arrive, perhaps after the lock has changed hands."""
        request = self.late.pop(data.draw(st.integers(0, len(self.late) - 1)))
        with suppress(Exception):
            request()

    @invariant()
    def one_holder(self) -> None:
        """Allow at most one builder to write, and only errors with a message."""
        assert sum(map(_holds, self.builders)) <= 1
        assert [builder.crash for builder in self.builders] == [None, None]

    @invariant()
    def no_mixture(self) -> None:
        """Read the answers of one builder, or get an error."""
        with suppress(CacheError):
            rows = open_cache(BUCKET, allow_incomplete=True)["prose"].train.read([0, 1])
            before = self.world.before
            assert rows.label_logprob is not None
            assert before.label_logprob is not None
            if np.array_equal(rows.tokens, before.tokens):
                ratio = rows.label_logprob[rows.loss_mask] / before.label_logprob[before.loss_mask]
                assert np.unique(np.round(ratio, 3)).tolist() in ([1.0], [2.0]), "a mixture of answers"

    def teardown(self) -> None:
        """End the builders; a third one must finish the cache."""
        for builder in self.builders:
            builder.step(None)
        try:
            self.clock += 2 * STALE
            with suppress(FileNotFoundError):
                self.store.delete("ddk.lock")
            list(verify(BUCKET))  # drops the record that a late request has made wrong
            holder = Holder(BUCKET)
            with ExitStack() as claims:
                holder.acquire(claims, wait=True)
                writer = Writer(holder, self.world.manifest)
                for shard in writer.unfinished("prose", "train"):
                    writer.write_answers("prose", "train", shard, self.world.answers[0])
                assert writer.finalize_domain("prose").complete
                holder.release()
            assert not list(verify(BUCKET))
        finally:
            self._patches.close()

    def _decided(self, request: Callable[..., Any], *, is_write: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            builder: Builder | None = getattr(_current, "builder", None)
            outcome = "answered" if builder is None else builder.turn()
            if outcome == "late" and is_write:
                self.late.append(lambda: request(*arguments, **options))
            if outcome == "unanswered":
                request(*arguments, **options)
            if outcome != "answered":
                raise GenericError("HTTP error, after 10 retries")
            return request(*arguments, **options)

        return call

    def _sleep(self, _: float) -> None:
        builder: Builder | None = getattr(_current, "builder", None)
        if builder is None:
            self.clock += STALE
        else:
            builder.turn()


def _holds(builder: Builder) -> bool:
    try:
        if builder.holder is not None and not builder.done:
            builder.holder.check()
            return True
    except CacheError:
        pass
    return False


def _one_after_another(_: ObjectStore, function: Callable[[Any], Any], items: Any) -> Any:
    return map(function, items)


def torture(subject: Build, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Run examples until the time is over; return their number and the failures."""
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test

    world, counts = World(subject), Counter[str]()

    class Machine(TwoBuilders):
        def teardown(self) -> None:
            counts["trials"] += 1
            counts["times the lock changed hands"] += all(builder.holder for builder in self.builders)
            super().teardown()

    Machine.world = world
    chosen = settings(
        max_examples=5,
        stateful_step_count=40,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    failures, deadline, round_ = list[str](), time.monotonic() + seconds, 0
    while time.monotonic() < deadline and not failures:
        try:
            run_state_machine_as_test(seeded(seed + round_)(Machine), settings=chosen)
        except Exception as error:
            notes = "; ".join(getattr(error, "__notes__", []))
            failures.append(f"seed {seed + round_}: {error!r} {notes}")
        round_ += 1
    return counts, failures
