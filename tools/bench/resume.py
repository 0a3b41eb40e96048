"""How soon a large build resumes after a stop, on a disk and on a store 30 ms away.

A cache of tiny shards, nearly all of them finished, is laid out object by object. Then `build` resumes it,
until the engine (left out here) would get its first documents. Beside it: `info`, opening the finished part,
`estimate`, and `verify` of a smaller cache with all shards finished. On the disk 60,000 shards are 1.3
million files and folders, which are made and removed again.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import obstore

from ddk_build.build import build_cache, describe
from ddk_build.config import BuildConfig
from ddk_build.plan.estimate import estimate
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache import open_cache
from ddk_cache.cache.info import info
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import open_writer
from ddk_cache.format.codebook import fit_codebook
from tools.bench.shared.big_cache import put_into, repeat_shard
from tools.bench.shared.real_logits import Arrays, write_rows
from tools.bench.shared.slow_store import URL, SlowObstore, slow_store
from tools.bench.shared.teachers import shaped_teacher
from tools.frame import output_option, show, write_json

SEQ_LENGTH, ENTRIES = 64, 4
RESUME, VERIFY = "build, until the engine has work", "verify"
BARS = {"store": 120, "disk": 60}  # seconds, of 60,000 shards


class HasWorkError(Exception):
    """The engine got its first documents."""


class Engine:
    """Replaces the teacher."""

    def submit(self, documents: Sequence[np.ndarray], *_: Any, **options: Any) -> None:
        raise HasWorkError


@dataclass(frozen=True)
class Sizes:
    """Of the caches, as on the command line."""

    shards: int
    disk_shards: int
    verify_shards: int
    left: int
    """Shards that are not finished."""


def configure(folder: Path, cache: str) -> BuildConfig:
    """Return a build of shards of one row."""
    teacher = shaped_teacher(folder / "teacher", "tiny")
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "only estimate reads {n}"}}\n' for n in range(99)))
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "engine_args": {"load_format": "dummy"}},
            "cache": cache,
            "seq_length": SEQ_LENGTH,
            "target": {"top_k": ENTRIES},
            "shard_tokens": SEQ_LENGTH,
            "validation_rows": 1,
            "domains": {"text": {"path": str(text)}},
        }
    )


def random_row(vocab_size: int) -> Arrays:
    """Return one row of tokens and answers."""
    random = np.random.default_rng(0)
    mask = np.arange(SEQ_LENGTH)[None] < SEQ_LENGTH - 1
    shape = (1, SEQ_LENGTH, ENTRIES)
    logprobs = np.where(mask[..., None], -np.arange(2.0, 2.0 + ENTRIES), -np.inf).astype(np.float32)
    return {
        "tokens": random.integers(0, vocab_size, (1, SEQ_LENGTH), np.int32),
        "segments": np.ones((1, SEQ_LENGTH), np.uint16),
        "loss_mask": mask,
        "ids": np.where(mask[..., None], random.integers(0, 999, shape), -1).astype(np.int32),
        "logprobs": logprobs,
        "tail_logprob": np.where(mask, np.log1p(-np.exp(logprobs).sum(-1)), -np.inf).astype(np.float32),
        "label_logprob": np.where(mask, np.float32(-2), np.float32(0)),
    }


def small_cache(config: BuildConfig, folder: Path) -> Path:
    """Write a cache of one train shard that ``config`` would resume."""
    tokenizer = load_tokenizer(config.teacher)
    manifest = describe(config, tokenizer)
    row = random_row(manifest.vocab_size)
    ids, logprobs = (row[name][row["loss_mask"]] for name in ("ids", "logprobs"))
    with open_writer(str(folder), manifest, vocabulary(tokenizer)) as writer:
        write_rows(writer, fit_codebook(ids, logprobs, manifest.target, manifest.vocab_size), row)
    return folder


def resume(config: BuildConfig) -> None:
    with patch("ddk_build.build.checked_teacher", lambda *_: Engine()):
        try:
            build_cache(config)
        except HasWorkError:
            return
    raise click.ClickException("nothing was left to do")


def check(config: BuildConfig) -> None:
    if problems := list(verify(config.cache)):
        raise click.ClickException(f"verify reports {problems[0]}")


def calls(config: BuildConfig) -> dict[str, Callable[[], object]]:
    """Return what is measured on a cache that is not finished."""
    return {
        RESUME: lambda: resume(config),
        "info": lambda: info(config.cache),
        "open the finished part": lambda: open_cache(config.cache, allow_incomplete=True),
        "estimate": lambda: estimate(config, probe=False),
    }


def measure(
    calls: dict[str, Callable[[], object]], shards: int, store: SlowObstore | None = None
) -> dict[str, dict[str, Any]]:
    """Return seconds, CPU seconds and requests of each call."""
    figures = {}
    for name, call in calls.items():
        before = store.requests.total() if store else 0
        began, used = time.perf_counter(), time.process_time()
        call()
        figures[name] = {
            "shards": shards,
            "seconds": time.perf_counter() - began,
            "bar": BARS["store" if store else "disk"] if name == RESUME else None,
            "cpu_seconds": time.process_time() - used,
            "requests": store.requests.total() - before if store else 0,
        }
        click.echo(f"{name}: {figures[name]['seconds']:.1f} s")
    return figures


def measure_disk(folder: Path, small: Path, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Measure caches in folders."""

    def make(name: str, shards: int, answered: int) -> BuildConfig:
        repeat_shard(small, put_into(folder / name), shards, answered)
        return configure(folder, str(folder / name))

    resume(make("warm-up", 2, 1))  # imports are not counted
    figures = measure(
        calls(make("cache", sizes.disk_shards, sizes.disk_shards - sizes.left)), sizes.disk_shards
    )
    finished = make("finished", sizes.verify_shards, sizes.verify_shards)
    return figures | measure({VERIFY: lambda: check(finished)}, sizes.verify_shards)


def measure_store(folder: Path, small: Path, sizes: Sizes, latency: float) -> dict[str, dict[str, Any]]:
    """Measure the same in a store; its latency begins when the cache is complete."""
    figures: dict[str, dict[str, Any]] = {}
    config = configure(folder, URL)
    for shards, left in ((sizes.shards, sizes.left), (sizes.verify_shards, 0)):
        with slow_store(0) as (store, functions):
            repeat_shard(small, lambda key, data: obstore.put(store, key, data), shards, shards - left)
            functions.latency = latency
            figures |= measure(calls(config) if left else {VERIFY: lambda: check(config)}, shards, functions)
    return figures


@click.command()
@click.option("--shards", default=60_000, show_default=True, help="In the store.")
@click.option("--disk-shards", default=60_000, show_default=True)
@click.option("--verify-shards", default=500, show_default=True, help="That `verify` reads.")
@click.option("--left", default=1_000, show_default=True, help="Shards that are not finished.")
@click.option("--latency", default=0.03, show_default=True, help="Of the store, seconds.")
@output_option("resume")
def main(latency: float, output: Path, **options: int) -> None:
    """Measure resuming, `info`, opening, `estimate` and `verify`."""
    sizes = Sizes(**options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small = small_cache(configure(folder, "unused"), folder / "small")
        figures = {"disk": measure_disk(folder, small, sizes)}
        figures[f"store, {latency * 1e3:.0f} ms"] = measure_store(folder, small, sizes, latency)
    show(
        f"{sizes.left:,} shards left",
        ("", "", "shards", "seconds", "bar", "CPU seconds", "requests"),
        [(kind, name, *row.values()) for kind, rows in figures.items() for name, row in rows.items()],
        labels=2,
    )
    write_json(output, {"left": sizes.left, "latency": latency, "figures": figures})


if __name__ == "__main__":
    main()
