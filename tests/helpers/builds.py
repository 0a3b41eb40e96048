"""Run builds in processes of their own, quickly: a server with everything imported forks them."""

import json
import multiprocessing
import os
import random
import sysconfig
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "ddk_build.build",
        "ddk_build.teacher.transformers_engine",
        "datasets",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.tokenization_llama",
    ]
)


def write_corpus(folder: Path, documents: int = 12, characters: int = 700) -> dict[str, Path]:
    """Two small domains of real text, as jsonl: Python's source and its licence-like docstrings."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(library.glob("[a-z]*.py"))[:documents]
    files = {}
    for name, start in (("code", 0), ("tail", 3000)):
        texts = [path.read_text("utf-8")[start:][: characters + 40 * i] for i, path in enumerate(sources)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text), "utf-8")
        files[name] = path
    return files


def write_config(path: Path, teacher: Path, corpus: dict[str, Path], **changes: Any) -> Path:
    """Write the configuration of a build of every domain in ``corpus`` by the reference engine."""
    config: dict[str, Any] = {
        "teacher": {"model": str(teacher), "engine": "transformers", "dtype": "float32"},
        "cache": str(path.parent / "cache"),
        "seq_length": 64,
        "target": {"top_k": 8},
        "validation_rows": 6,
        "overlap": 0,  # so that every position in a document has a label
        "shard_tokens": 64 * 5,
        "domains": {name: {"path": "json", "data_files": str(file)} for name, file in corpus.items()},
    }
    path.write_text(yaml.safe_dump(config | changes))
    return path


def start(
    config: Path, *arguments: str, command: str = "build", prepare: Callable[[], None] | None = None
) -> BaseProcess:
    """Start ``ddk-cache build``, in its process after ``prepare``; what it prints goes to <config>.log."""
    process = CONTEXT.Process(target=_run, args=(config, arguments, command, prepare, dict(os.environ)))
    process.start()
    return process


def _run(
    config: Path,
    arguments: tuple[str, ...],
    command: str,
    prepare: Callable[[], None] | None,
    environment: dict[str, str],
) -> None:
    import sys

    import torch

    from ddk_cache.cli.main import main

    with config.with_suffix(".log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environment)  # the server that forks has that of its own start
    torch.set_num_threads(1)
    sys.argv = ["ddk-cache", command, str(config), *arguments]
    if prepare:
        prepare()
    main()


def finish(config: Path, *arguments: str, **more: Any) -> int:
    """Run a build to its end and return its exit code; see ``start``."""
    process = start(config, *arguments, **more)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def objects(cache: Path) -> dict[str, bytes]:
    """Every file of a cache by key. What an interrupted write leaves ("name#1") is no object."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and "#" not in path.name and path.name != "ddk.lock"
    }


def kill_when_it_has_written(process: BaseProcess, cache: Path, more: int, chance: random.Random) -> bool:
    """Kill -9 soon after ``more`` further objects are there; False where the build ended before."""
    before = len(objects(cache)) if cache.exists() else 0
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if cache.exists() and sum(1 for path in cache.rglob("*") if path.is_file()) >= before + more:
            time.sleep(chance.random() * 0.02)
            process.kill()
            break
        time.sleep(0.002)
    process.join(120)
    return process.exitcode != 0
