"""A cache of ten million rows: what opening it, drawing from it and reading it at random cost.

One real shard of 1,024 rows (real_logits.py) is repeated by hard links, each time with a commit record of its
own. A second process then does what training does, with batches of 8 rows; its memory is measured from the
first batch on, so that what grows are the indices: the commit records that the reader keeps and the order of
the rows.
"""

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from bench_reader import make_cache
from real_logits import SEQ_LENGTH

from ddk_cache import layout, open_cache
from ddk_cache.codebooks import codebook_digest, read_codebook
from ddk_cache.commit_reader import CommitReader
from ddk_cache.lock import locked
from ddk_cache.metadata import domain_documents, existing_manifest, read_state, split_arrays
from ddk_cache.sampler import SamplerState, draw, natural_share

SHARD_ROWS = 1024  # the default: shards of 2^20 tokens
BATCH = 8


def repeat(folder: Path, rows: int) -> None:
    """Let the cache's one training shard stand for as many as make ``rows`` rows."""
    with locked(str(folder)) as held:
        manifest = existing_manifest(held)
        book, state = read_codebook(held, 0), read_state(held, manifest, "text")
        assert book is not None
        assert state is not None
        digest = codebook_digest(book)
        reader = CommitReader(held, manifest, lambda _: digest)
        (record,) = reader.read([layout.ShardKey("text", "train", 0)], layout.COMMITS)
        assert not isinstance(record, Exception)
        shards = layout.shards(rows, SHARD_ROWS)
        for name in split_arrays(manifest, "train"):
            click.echo(f"{name}: {shards:,} links")
            first = folder / layout.object_key("text", "train", name, 0)
            for number in range(1, shards):
                at = folder / layout.object_key("text", "train", name, number)
                at.parent.mkdir()
                os.link(first, at)
        for number in range(1, shards):
            key = layout.ShardKey("text", "train", number)
            at = folder / key.object(layout.COMMITS)
            at.parent.mkdir()
            at.write_bytes(record.serialise(reader.identity(key, layout.COMMITS)))
        counts = {name: getattr(state.train, name) * shards for name in ("rows", "tokens", "labels")}
        state = state.model_copy(update={"train": layout.SplitState(**counts)})
        for key, data in domain_documents(manifest, "text", state).items():
            held.write(key, data)


def most_memory() -> float:
    """Of this process since it began, MiB; getrusage would count what its parent had."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def use(folder: str, batches: int, results: "multiprocessing.Queue[dict[str, float]]") -> None:
    """What a training process does, and how long and how much memory it takes."""
    began = time.perf_counter()
    cache = open_cache(folder)
    found = {"open_seconds": time.perf_counter() - began}
    split = cache["text"].train
    split.read(range(BATCH), labels=False)
    before = most_memory()
    began = time.perf_counter()
    _, row, _ = draw(SamplerState((0,)), natural_share([len(split)]), [len(split)], batches * BATCH, seed=0)
    found["draw_seconds"] = time.perf_counter() - began
    began, cpu = time.perf_counter(), time.process_time()
    for batch in np.split(row, batches):
        split.read(batch, labels=False)
    found["tokens_per_second"] = len(row) * SEQ_LENGTH / (time.perf_counter() - began)
    found["tokens_per_cpu_second"] = len(row) * SEQ_LENGTH / (time.process_time() - cpu)
    found["rows"] = len(split)
    found["indices_mebibytes"] = most_memory() - before
    results.put(found)


@click.command()
@click.option("--rows", default=10_000_000, show_default=True, help="Rows in the cache.")
@click.option("--batches", default=2000, show_default=True, help="Batches of 8 rows that are read.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_large.json"))
def main(rows: int, batches: int, output: Path) -> None:
    """Make the cache, and measure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        make_cache(folder, SHARD_ROWS, SHARD_ROWS)
        repeat(folder, rows)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=use, args=(str(folder), batches, results))
        process.start()
        found = results.get()
        process.join()
        click.echo(
            f"{found['rows']:,} rows: opened in {found['open_seconds']:.3f} s (bar 1); "
            f"{batches * BATCH:,} rows drawn in {found['draw_seconds']:.2f} s "
            f"and read at {found['tokens_per_second']:,.0f} tokens/s; "
            f"indices take {found['indices_mebibytes']:.0f} MiB (bar 300); now its files go again"
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
