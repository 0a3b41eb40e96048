"""Many engines: who has which shard, how much each engine gets, and what every machine must see."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.builds import write_config, write_corpus

from ddk_build.capture.cluster import Cluster, allot, distribute, gpus_per_engine, joined_cluster
from ddk_build.capture.crew import Crew
from ddk_build.capture.engine import shared_storage
from ddk_build.capture.shard_queue import CALIBRATION, MOST_DEATHS, Queue
from ddk_build.config import BuildConfig, TeacherConfig
from ddk_build.manifest import describe
from ddk_build.teacher.engines import EngineDiedError
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache.cache.writer import open_writer
from ddk_cache.cli.main import main
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.layout import ShardKey
from ddk_cache.storage.lock import joined, locked
from ddk_cache.util.configuration import load

WORK: list[ShardKey] = [ShardKey("code", "train", shard) for shard in range(4)]


def test_each_shard_is_one_engines_until_it_is_written() -> None:
    queue = Queue(WORK)
    assert [queue.take(engine) for engine in (0, 1, 0, 1, 0)] == [*WORK, None]
    queue.finish(0, [WORK[0]])
    assert queue.holds(0)
    queue.finish(0, [WORK[2]])
    assert not queue.holds(0)
    assert not queue.is_done()
    queue.finish(1, [WORK[1], WORK[3]])
    assert queue.is_done()


def test_a_dead_engines_shards_go_back_to_the_end() -> None:
    queue = Queue(WORK)
    queue.take(0)
    queue.take(1)
    queue.take(0)
    queue.give_back(0, "killed")
    assert not queue.holds(0)
    assert [queue.take(1) for _ in range(4)] == [WORK[3], WORK[0], WORK[2], None]


def test_the_shard_at_which_engines_die_is_given_up() -> None:
    queue = Queue(WORK[:2])
    for _ in range(MOST_DEATHS - 1):
        assert queue.take(0) == WORK[0]
        assert queue.take(0) == WORK[1]
        queue.give_back(0, "killed")
    queue.take(0)
    queue.take(0)
    with pytest.raises(CacheError, match="code/train shard 0 or code/train shard 1: 3 engines were lost"):
        queue.give_back(0, "killed")


def test_the_calibration_too() -> None:
    queue = Queue([CALIBRATION])
    for _ in range(MOST_DEATHS - 1):
        queue.take(0)
        queue.give_back(0, "killed")
    queue.take(0)
    with pytest.raises(CacheError, match="the calibration: 3 engines"):
        queue.give_back(0, "killed")


def test_an_engine_that_dies_without_a_shard_leaves_the_queue_alone() -> None:
    queue = Queue(WORK[:1])
    for _ in range(2 * MOST_DEATHS):
        queue.give_back(0, "killed")
    assert queue.take(0) == WORK[0]


@pytest.mark.parametrize(
    ("machines", "gpus", "engines", "expected"),
    [
        ([{"CPU": 16, "GPU": 8}], 2, None, Cluster(4, {"num_cpus": 1, "num_gpus": 2})),
        ([{"CPU": 16, "GPU": 8}], 2, 3, Cluster(3, {"num_cpus": 1, "num_gpus": 2})),
        ([{"CPU": 64}, *[{"CPU": 8, "GPU": 3}] * 2], 2, None, Cluster(2, {"num_cpus": 1, "num_gpus": 2})),
        ([{"CPU": 16}], 1, None, Cluster(1, {"num_cpus": 16})),
        ([{"CPU": 16}], 1, 3, Cluster(3, {"num_cpus": 5})),
        ([{"CPU": 16}, {"CPU": 16}, {"memory": 1}], 1, 3, Cluster(3, {"num_cpus": 8})),
    ],
)  # fmt: skip
def test_engines_get_what_the_cluster_has(
    machines: list[dict[str, float]], gpus: int, engines: int | None, expected: Cluster
) -> None:
    assert allot(machines, gpus, engines) == expected


@pytest.mark.parametrize(
    ("machines", "gpus", "engines", "message"),
    [
        ([{"CPU": 2}], 1, 3, "--num-engines: the cluster has 2 CPUs"),
        ([{"CPU": 8, "GPU": 2}], 1, 3, "--num-engines: the cluster has GPUs for 2, at 1 for each"),
        ([{"CPU": 8, "GPU": 2}] * 2, 4, None, "--num-engines: the cluster has GPUs for 0, at 4 for each"),
    ],
)
def test_too_many_engines(
    machines: list[dict[str, float]], gpus: int, engines: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        allot(machines, gpus, engines)


def test_an_engine_needs_a_gpu_for_each_part_of_the_model() -> None:
    parts = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    assert gpus_per_engine(TeacherConfig(model="m")) == 1
    assert gpus_per_engine(TeacherConfig(model="m", engine_args=parts)) == 8
    with pytest.raises(ConfigError, match=r"teacher.engine_args.tensor_parallel_size: .* not 'two'"):
        gpus_per_engine(TeacherConfig(model="m", engine_args={"tensor_parallel_size": "two"}))


def test_every_machine_must_see_the_cache(tmp_path: Path, teacher_folder: Path) -> None:
    path = write_config(tmp_path / "build.yaml", teacher_folder, write_corpus(tmp_path))
    config = load(path, [], BuildConfig)
    manifest = describe(config, load_tokenizer(config.teacher))
    with pytest.raises(ConfigError, match=r"does not see the cache .*there is no such folder"):
        shared_storage(config.cache, manifest, "write_token")
    with open_writer(config.cache, manifest, vocabulary(load_tokenizer(config.teacher))) as writer:
        write_token = writer.holder.grant()
        assert shared_storage(config.cache, manifest, write_token).url == config.cache
        with pytest.raises(ConfigError, match=r"does not see the cache .*another cache"):
            shared_storage(config.cache, manifest.model_copy(update={"seed": 1}), write_token)
    # A copy of the cache: its lock is not held.
    with pytest.raises(ConfigError, match="does not see the cache"):
        shared_storage(config.cache, manifest, write_token)


def test_an_engine_that_was_given_up_writes_nothing_more(tmp_path: Path) -> None:
    """A machine that the others cannot reach for a while: its engine goes on where another has begun."""
    with locked(str(tmp_path / "cache")) as held:
        lost, other = (joined(held.url, held.grant()) for _ in range(2))
        lost.write("code/train/tokens/c/0/0", b"mine")
        held.revoke(lost.write_token)
        with pytest.raises(CacheError, match="has revoked this engine's right to write"):
            lost.write("code/train/tokens/c/0/0", b"late")
        other.write("code/train/segments/c/0/0", b"other")
        assert held.read("code/train/tokens/c/0/0") == b"mine"
    with pytest.raises(CacheError, match="no longer holds the lock"):
        other.delete("code/train/tokens/c/0/0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray"], "--ray: Ray is not installed; pip install 'ddk-cache[ray]'"),
        (["--num-engines", "2"], "--num-engines: needs --ray"),
        (
            ["--ray", "--num-engines", "0"],
            "Invalid value for '--num-engines': 0 is not in the range x>=1.",
        ),
    ],
)
def test_wrong_options(
    tmp_path: Path,
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    path = write_config(tmp_path / "build.yaml", teacher_folder, write_corpus(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["ddk-cache", "build", str(path), *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"Error: {message}\n"
    assert not (tmp_path / "cache").exists()


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ddk_build.capture.cluster.SETTINGS", {})
    with (
        pytest.raises(ConfigError, match=r"RAY_ADDRESS: 127.0.0.1:1: .*refused"),
        joined_cluster(TeacherConfig(model="m"), None),
    ):
        pass


def test_a_cluster_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.\nThe GCS is overloaded")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ddk_build.capture.cluster.SETTINGS", {})
    monkeypatch.setattr("ray.init", slow)
    with (
        pytest.raises(ConfigError, match=r"^RAY_ADDRESS: local: The current node timed out .*overloaded$"),
        joined_cluster(TeacherConfig(model="m"), None),
    ):
        pass


class TaskError(Exception):
    """Ray's error of a call, with the engine's own as its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@pytest.mark.parametrize("error", [EngineDiedError("vLLM's processes failed"), ConfigError("out of memory")])
def test_an_engine_whose_processes_died_is_replaced(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Another error of the cache or the configuration would be the next engine's too, and ends the build."""

    def get(_: object) -> None:
        raise TaskError(error)

    errors = SimpleNamespace(RayError=TaskError, RayTaskError=TaskError)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=get, exceptions=errors))
    crew = object.__new__(Crew)
    replaced: list[int] = []
    revoked: list[str] = []
    crew.calls, crew._queues, crew._write_tokens = {"call": 1}, [Queue(WORK)], {1: "token"}
    crew._writer = SimpleNamespace(holder=SimpleNamespace(revoke=revoked.append))  # type: ignore[assignment]
    crew._replace = lambda engine, reason: replaced.append(engine)  # type: ignore[method-assign]
    crew._queues[0].take(1)
    if isinstance(error, ConfigError):
        with pytest.raises(ConfigError):
            crew.collect("call")
        return
    assert crew.collect("call") == []
    assert (replaced, revoked) == ([1], ["token"])
    assert not crew._queues[0].holds(1)


def test_teachers_share_the_engines_by_their_tokens() -> None:
    assert distribute([100], 3) == [3]
    assert distribute([100, 100], 2) == [1, 1]
    assert distribute([900, 100, 0], 8) == [6, 1, 1]
    assert distribute([300, 100], 4) == [3, 1]
