"""How soon a large build that was stopped is at work again, on a disk and on a store that is 30 ms away.

A cache of tiny shards, nearly all of them finished, is laid out object by object; then `build` goes on with
it, until the engine is handed its first documents (the engine itself is left out). Beside it: `info`, opening
what is finished, `estimate`, and `verify` of a smaller cache, all of whose shards are finished. On the disk
60,000 shards are 1.3 million files and folders, which are made and removed again.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import obstore
from rich.console import Console
from rich.table import Table

from ddk_build.build import build_cache, describe
from ddk_build.config import BuildConfig
from ddk_build.estimate import estimate
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache import codec, layout, markers, open_cache, shards
from ddk_cache.inspection import info
from ddk_cache.records import domain_documents, vouched_arrays
from ddk_cache.tables import codebook_digest
from ddk_cache.token_seals import digest
from ddk_cache.verification import verify
from ddk_cache.writer import open_writer
from tools.bench.capture import SHAPES, shaped_teacher
from tools.bench.shared.distant import URL, Distant, distant_store

SEQ_LENGTH, ENTRIES = 64, 4
GOING_ON, VERIFY = "build, until the engine has work", "verify"
BARS = (120, 60)  # seconds, of 60,000 shards: in a store, on a disk
Put = Callable[[str, bytes], object]


class AtWork(Exception):
    """The engine has been handed its first documents."""


class Engine:
    """Stands where the teacher would."""

    def score(self, documents: Sequence[np.ndarray], *_: Any, **options: Any) -> None:
        raise AtWork


def configure(folder: Path, cache: str) -> BuildConfig:
    teacher = shaped_teacher(folder / "teacher", SHAPES["tiny"])
    (folder / "text.jsonl").write_text("".join(f'{{"text": "only estimate reads {n}"}}\n' for n in range(99)))
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "engine_args": {"load_format": "dummy"}},
            "cache": cache,
            "seq_length": SEQ_LENGTH,
            "target": {"top_k": ENTRIES},
            "shard_tokens": SEQ_LENGTH,
            "validation_rows": 1,
            "domains": {"text": {"path": "json", "data_files": str(folder / "text.jsonl")}},
        }
    )


def lay_out(config: BuildConfig, put: Put, count: int, done: int) -> None:
    """A cache of ``count`` shards of one row, all tokenised, ``done`` of them and the validation answered."""
    words = vocabulary(load_tokenizer(config.teacher))
    manifest = describe(config, words)
    random = np.random.default_rng(0)
    rows: dict[str, np.ndarray] = {
        "tokens": random.integers(0, manifest.vocab_size, (1, SEQ_LENGTH)),
        "segments": np.ones((1, SEQ_LENGTH)),
        "loss_mask": np.arange(SEQ_LENGTH)[None] < SEQ_LENGTH - 1,
    }
    mask = rows["loss_mask"]
    ids = np.where(mask[..., None], random.integers(0, 999, (1, SEQ_LENGTH, ENTRIES)), -1).astype(np.int32)
    logprobs = np.where(mask[..., None], -np.arange(2.0, 2.0 + ENTRIES), -np.inf).astype(np.float32)
    tail = np.log1p(-np.exp(logprobs).sum(-1)).astype(np.float32)
    tail[~mask] = -np.inf
    book = codec.fit(ids[mask], logprobs[mask], manifest.target, manifest.vocab_size)
    with open_writer(config.cache, manifest, words) as writer:
        writer.set_codebook(book)
    rows |= codec.encode(ids, logprobs, tail, book, manifest.target)
    rows["label_logprob"] = np.where(mask, np.float32(-2), np.float32(0))
    counts: dict[str, dict[str, Any]] = {}
    for split, total, answered in (("train", count, done), ("validation", 1, 1)):
        arrays = vouched_arrays(manifest, split)
        objects = {name: shards.pack(rows[name], array, 1) for name, array in arrays.items()}
        for kind, last in ((layout.TOKEN_MARKERS, total), (layout.MARKERS, answered)):
            meant = vouched_arrays(manifest, split, kind)
            marker = markers.describe([objects[name] for name in meant], 1, 1)
            sealed = codebook_digest(book) if kind == layout.MARKERS and split == "train" else None
            seals = []
            for shard in range(last):
                packed = marker.pack(markers.place(manifest, "text", split, shard, sealed))
                put(layout.marker_key("text", split, shard, kind), packed)
                seals.append(packed[-markers.SEAL :])
            if kind == layout.TOKEN_MARKERS:
                put(layout.seals_key("text", split), b"".join(seals))
                counted = {"rows": total, "tokens": total * SEQ_LENGTH, "labels": total * (SEQ_LENGTH - 1)}
                counts[split] = counted | {"token_seals": digest(seals)}
        tokens = layout.token_arrays(SEQ_LENGTH)
        for name, data in objects.items():
            for shard in range(total if name in tokens else answered):
                put(layout.shard_key("text", split, name, shard), data)
    state = layout.DomainState.model_validate(
        {
            **counts,
            "limits": [None],
            "exhausted": True,
            "source_rows": count,
            "source_tokens": count * SEQ_LENGTH,
            "documents": count,
            "skipped": {},
            "left_over": 0,
            "held_out": None,
        }
    )
    for key, document in domain_documents(manifest, "text", state).items():
        put(key, document)


def go_on(config: BuildConfig) -> None:
    with patch("ddk_build.build.checked_teacher", lambda *_: Engine()):
        try:
            build_cache(config)
        except AtWork:
            return
    raise click.ClickException("nothing was left to do")


def check(config: BuildConfig) -> None:
    problems = list(verify(config.cache))
    if problems:
        raise click.ClickException(f"verify finds {problems[0]}")


def measure(calls: dict[str, Callable[[], object]], store: Distant | None) -> dict[str, dict[str, float]]:
    """Seconds, CPU seconds and requests of each."""
    found = {}
    for name, call in calls.items():
        before = store.requests.total() if store else 0
        began, used = time.perf_counter(), time.process_time()
        call()
        found[name] = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - used,
            "requests": store.requests.total() - before if store else 0,
        }
        click.echo(f"{name}: {found[name]['seconds']:.1f} s")
    return found


def calls(config: BuildConfig, small: BuildConfig) -> dict[str, Callable[[], object]]:
    return {
        GOING_ON: lambda: go_on(config),
        "info": lambda: info(config.cache),
        "open what is finished": lambda: open_cache(config.cache, allow_incomplete=True),
        "estimate": lambda: estimate(config, probe=False),
        VERIFY: lambda: check(small),
    }


@click.command()
@click.option("--shards", "in_store", default=60_000, show_default=True, help="In the store.")
@click.option("--disk-shards", "on_disk", default=60_000, show_default=True)
@click.option("--verify-shards", "verified", default=500, show_default=True, help="That `verify` reads.")
@click.option("--left", default=1_000, show_default=True, help="Shards that are not finished.")
@click.option("--latency", default=0.03, show_default=True, help="Seconds; of the store.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_going_on.json"))
def main(in_store: int, on_disk: int, verified: int, left: int, latency: float, output: Path) -> None:
    """Measure going on, `info`, opening, `estimate` and `verify`."""
    found = {}
    away = f"store, {latency * 1e3:.0f} ms"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def write(key: str, data: bytes) -> None:
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        def make(name: str, count: int, done: int) -> BuildConfig:
            click.echo(f"a folder of {count:,} shards")
            config = configure(folder, str(folder / name))
            lay_out(config, lambda key, data: write(f"{name}/{key}", data), count, done)
            return config

        go_on(make("warm", 2, 1))  # what is imported is not counted
        config = make("cache", on_disk, on_disk - left)
        found["disk"] = measure(calls(config, make("whole", verified, verified)), None)
        with distant_store(0) as (store, functions):
            config = configure(folder, URL)
            click.echo(f"a store of {in_store:,} shards")
            lay_out(config, lambda key, data: obstore.put(store, key, data), in_store, in_store - left)
            functions.latency = latency
            some = calls(config, config)
            some.pop(VERIFY)
            found[away] = measure(some, functions)
        with distant_store(0) as (store, functions):
            config = configure(folder, URL)
            lay_out(config, lambda key, data: obstore.put(store, key, data), verified, verified)
            functions.latency = latency
            found[away] |= measure({VERIFY: lambda: check(config)}, functions)
    table = Table(
        "", "", "shards", "seconds", "bar", "CPU seconds", "requests", title=f"{left:,} shards left"
    )
    for place, figures in found.items():
        for name, one in figures.items():
            one["shards"] = verified if name == VERIFY else on_disk if place == "disk" else in_store
            bar = str(BARS[place == "disk"]) if name == GOING_ON else ""
            seconds = f"{one['seconds']:.1f}"
            counts = f"{one['cpu_seconds']:.1f}", f"{one['requests']:,}"
            table.add_row(place, name, f"{one['shards']:,}", seconds, bar, *counts)
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"left": left, "latency": latency, "found": found}, indent=2))


if __name__ == "__main__":
    main()
