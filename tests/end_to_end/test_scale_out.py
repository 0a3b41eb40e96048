"""Builds on a local Ray cluster: the same cache, byte for byte, also where an engine is killed on the way."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.builds import finish, objects, write_config, write_corpus
from helpers.models import make_model

from ddk_cache.cache.verify import verify
from tools.torture.subject import comparable

Build = subprocess.Popen[str]
Start = Callable[..., Build]

# One thread an engine, so that sums are added in one order wherever it runs.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
COMMAND = "from ddk_cache.cli.main import main; main()"
VLLM = {
    "engine": "vllm",
    "engine_args": {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 64,
        "enforce_eager": True,
        "num_gpu_blocks_override": 64,
    },
}
# Every engine dies when it is asked for anything; started from a script, so that Ray sends the class itself.
DYING = """
import os
from ddk_build.capture import crew

class Dying(crew.Engine):
    def start(self, *_):
        return [], ["about to die"]

    def do(self, shard):
        os._exit(1)

crew.Engine = Dying
"""

# A mistake that only the start of an engine can find.
REFUSING = """
from ddk_build.capture import crew
from ddk_cache.errors import ConfigError

class Refusing(crew.Engine):
    def start(self, *_):
        raise ConfigError("teacher: this engine cannot run it")

crew.Engine = Refusing
"""

# Nothing is tokenised by the process itself.
ON_OTHERS = """
from ddk_build.tokenize import workers
workers.SECONDS_ALONE = 0.0
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the least that vLLM's CPU attention takes."""
    folder: Path = make_model(tmp_path_factory.mktemp("model"), seed=1, hidden=128)
    return folder


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    return write_config(tmp_path / "build.yaml", model, write_corpus(tmp_path))


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a build; at the end its processes are killed and Ray's logs removed."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, ExitStack() as started:

        def start(config: Path, *arguments: str, script: str = "") -> Build:
            build = subprocess.Popen(
                [sys.executable, "-c", script + COMMAND, "build", str(config), *arguments],
                env=ENVIRONMENT | {"RAY_TMPDIR": folder},
                stderr=subprocess.PIPE,
                text=True,
            )
            started.enter_context(build)
            started.callback(build.kill)
            return build

        yield start


def descendants(pid: int) -> dict[int, str]:
    """Every process that came from this one, by number, with its title."""
    found = {}
    with suppress(psutil.NoSuchProcess):  # it may end at any time
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found[child.pid] = " ".join(child.cmdline())
    return found


def wait_until_gone(processes: dict[int, str]) -> None:
    deadline = time.monotonic() + 120
    while left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, {pid: processes[pid] for pid in left}
        time.sleep(0.1)


def differing(one: Path, other: Path) -> list[str]:
    """Return the objects that two caches do not both have, to the byte."""
    first, second = comparable(objects(one)), comparable(objects(other))
    return [key for key in first | second if first.get(key) != second.get(key)]


def test_two_engines_one_of_them_killed(tmp_path: Path, model: Path, start: Start) -> None:
    corpus = write_corpus(tmp_path, documents=14, characters=1500)
    alone = write_config(tmp_path / "alone.yaml", model, corpus, cache=str(tmp_path / "alone"))
    config = write_config(tmp_path / "build.yaml", model, corpus)
    cache = tmp_path / "cache"
    build = start(config, "--ray", "--num-engines", "2")
    while build.poll() is None and not list(cache.glob("*/train/commits/c/*/0")):
        time.sleep(0.02)
    seen: dict[int, str] = {}
    killed: list[int] = []
    while build.poll() is None:
        seen |= (there := descendants(build.pid))
        if not killed:
            killed = [pid for pid, title in there.items() if title.startswith("ray::Engine.do")][:1]
            for engine in killed:
                os.kill(engine, signal.SIGKILL)
        time.sleep(0.2 if killed else 0.02)
    _, log = build.communicate()
    assert build.returncode == 0, log
    assert log.count("is lost: its process") == 1
    wait_until_gone(seen)
    assert finish(alone) == 0, alone.with_suffix(".log").read_text()
    assert differing(tmp_path / "alone", cache) == []
    assert not list(verify(str(cache)))


def test_a_killed_builds_engines_do_no_harm(tmp_path: Path, model: Path, start: Start) -> None:
    """They may live on for seconds, with a shard in hand; another build takes the cache at once."""
    corpus = write_corpus(tmp_path, documents=14, characters=1500)
    alone = write_config(tmp_path / "alone.yaml", model, corpus, cache=str(tmp_path / "alone"))
    config = write_config(tmp_path / "build.yaml", model, corpus)
    cache = tmp_path / "cache"
    killed = start(config, "--ray", "--num-engines", "2")
    while not list(cache.glob("*/train/commits/c/*/0")):
        assert killed.poll() is None
        time.sleep(0.02)
    engines = {
        pid: title for pid, title in descendants(killed.pid).items() if title.startswith("ray::Engine")
    }
    assert engines
    killed.kill()
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    wait_until_gone(engines)
    assert finish(alone) == 0, alone.with_suffix(".log").read_text()
    assert differing(tmp_path / "alone", cache) == []
    assert not list(verify(str(cache)))


def test_two_teachers_side_by_side(tmp_path: Path, model: Path, start: Start) -> None:
    """Each has an engine of its own, one of them vLLM; the bytes are those of one process."""
    other = make_model(tmp_path / "other", seed=5, hidden=128)
    corpus = write_corpus(tmp_path)
    domains: dict[str, dict[str, Any]] = {
        name: {"path": "json", "data_files": str(path)} for name, path in corpus.items()
    }
    domains["tail"] |= {"teacher": {"model": str(other), **VLLM}}
    caches = [tmp_path / "alone", tmp_path / "cache"]
    configs = [
        write_config(cache.with_suffix(".yaml"), model, corpus, cache=str(cache), domains=domains)
        for cache in caches
    ]
    assert finish(configs[0]) == 0, configs[0].with_suffix(".log").read_text()
    build = start(configs[1], "--ray", "--num-engines", "2", script=ON_OTHERS)
    most_at_once = 0
    while build.poll() is None:
        titles = descendants(build.pid).values()
        most_at_once = max(most_at_once, sum(title.startswith("ray::Engine") for title in titles))
        time.sleep(0.2)
    _, log = build.communicate(timeout=300)
    assert build.returncode == 0, log
    assert most_at_once == 2
    assert differing(*caches) == []


def test_engines_that_die_again_and_again(config: Path, start: Start) -> None:
    build = start(config, "--ray", script=DYING)
    _, log = build.communicate(timeout=300)
    assert build.returncode == 1, log
    assert log.count("engine 0: about to die") == 3
    assert log.splitlines()[-1].startswith("Error: the calibration: 3 engines were lost over it")
    assert "Traceback" not in log


def test_a_mistake_that_the_engines_start_finds_comes_before_tokenising(config: Path, start: Start) -> None:
    build = start(config, "--ray", script=REFUSING)
    _, log = build.communicate(timeout=300)
    assert build.returncode == 2, log
    assert log.splitlines()[-1] == f"Error: {config}: teacher: this engine cannot run it"
    assert "Traceback" not in log
    assert not list(config.parent.glob("cache/*/*/tokens"))
