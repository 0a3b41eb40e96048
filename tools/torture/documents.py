"""Fuzz the documents of a run, and configurations: each is read, or refused with a message.

Hypothesis changes values or bytes. A checkpoint's state gets its right digest, as a stranger could give it.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from ddk_build import BuildConfig
from ddk_cache.errors import ConfigError
from ddk_cache.util.configuration import load
from ddk_train.config import TrainConfig
from ddk_train.output.sums import SUMS, write_sums
from ddk_train.output.verify import verify
from ddk_train.report.run_files import read_run
from tools.torture.faults import MESSAGES
from tools.torture.fuzz import ODD
from tools.torture.training import Training

NAMES = (
    *("config.yaml", "run.json", "metrics.jsonl", "discrepancy.jsonl", "samples.jsonl", SUMS),
    *("checkpoint-4/state.json", f"checkpoint-4/{SUMS}", "best-5/state.json"),
)
CONFIGURATIONS: dict[str, type[BuildConfig] | type[TrainConfig]] = {
    "build.yaml": BuildConfig,
    "train.yaml": TrainConfig,
}
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw: st.DrawFn, name: str, data: bytes) -> bytes:
    """Change a value of a document, or some bytes."""
    if draw(st.booleans()) or name.endswith(SUMS):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        return (
            data[:start]
            + draw(st.binary(max_size=9))
            + data[draw(st.sampled_from([start, start + 1, end])) :]
        )
    if name.endswith(".yaml"):
        return yaml.safe_dump(_changed_value(draw, yaml.safe_load(data)), sort_keys=False).encode()
    if name.endswith(".jsonl"):
        lines = _changed_value(draw, [json.loads(line) for line in data.splitlines()])
        return "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    return json.dumps(_changed_value(draw, json.loads(data))).encode()


def _changed_value(draw: st.DrawFn, document: Any) -> Any:
    node, key = draw(st.sampled_from(list(_places(document))))
    if draw(st.integers(0, 4)):
        node[key] = draw(JSON)
    else:
        del node[key]
    return document


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


def check_run(training: Training, name: str, data: bytes) -> str:
    """Read, verify and resume a run one of whose documents is changed; return the outcome."""
    shutil.rmtree(training.output, ignore_errors=True)
    shutil.copytree(training.reference, training.output)
    shutil.rmtree(training.output / "checkpoint-5")  # so that there is something to do
    path = training.output / name
    path.write_bytes(data)
    if name.endswith("state.json"):
        lines = (path.parent / SUMS).read_text().splitlines()
        digests = {line[66:]: line[:64] for line in lines}
        write_sums(path.parent, digests | {path.name: hashlib.sha256(data).hexdigest()})
    outcomes, output = set(), str(training.output)
    for read in (
        lambda: read_run(training.output),
        lambda: list(verify(output) or ()),
        lambda: training.run(output),
    ):
        try:
            read()
            outcomes.add("read")
        except MESSAGES:
            outcomes.add("refused")
    return " and ".join(sorted(outcomes))


def check_configuration(folder: Path, name: str, data: bytes) -> str:
    """Load a changed configuration."""
    (folder / name).write_bytes(data)
    try:
        load(folder / name, [], CONFIGURATIONS[name])
    except ConfigError as error:
        if "\n" in str(error):
            raise AssertionError(f"a message of several lines: {error}") from error
        return "refused"
    return "read"


def documents(training: Training) -> dict[str, tuple[bytes, Callable[[bytes], str]]]:
    """Return the content of each document, and the check of a changed one."""
    config = (training.reference / "config.yaml").read_bytes()
    build = yaml.safe_dump(training.build.config("cache").model_dump(mode="json")).encode()
    checks: dict[str, tuple[bytes, Callable[[bytes], str]]] = {
        name: ((training.reference / name).read_bytes(), partial(check_run, training, name)) for name in NAMES
    }
    for name, data in zip(CONFIGURATIONS, (build, config), strict=True):
        checks[name] = (data, partial(check_configuration, training.folder, name))
    return checks


def torture(training: Training, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Change documents until the time is over; return counts by outcome, and a line for each failure."""
    counts, failures, round_ = Counter[str](), list[str](), 0
    chosen = settings(
        max_examples=5,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    inputs, outside = documents(training), sorted(training.folder.parent.iterdir())

    def example(name: str) -> Callable[[bytes], None]:
        def check(changed: bytes) -> None:
            counts["trials"] += 1
            counts[inputs[name][1](changed)] += 1

        return check

    deadline = time.monotonic() + seconds
    while inputs and time.monotonic() < deadline:
        for name in list(inputs):
            try:
                seeded(seed + round_)(chosen(given(changed(name, inputs[name][0]))(example(name))))()
            except Exception as error:
                failures.append(f"seed {seed + round_}: {name}: {error!r} {_notes(error)}")
                del inputs[name]
        round_ += 1
        if sorted(training.folder.parent.iterdir()) != outside:
            failures.append(f"seed {seed + round_}: a file outside of the folder")
            break
    return counts, failures


def _notes(error: BaseException) -> str:
    errors = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
    return "; ".join(note for each in errors for note in [repr(each), *getattr(each, "__notes__", [])])
