"""How fast rows of 1,024 tokens with their 64 best entries come out of a cache, decoded, in one process.

The rows are real (real_logits.py), written again and again until there are enough of them; the folder's pages
are in memory. The object store is moto's S3 server in this very process: it takes turns with the reader, so
its figures say that it works and what a request costs here, not what a real store does.
"""

import json
import logging
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import obstore
from obstore.store import LocalStore, from_url
from rich.console import Console
from rich.table import Table

from ddk_cache import open_cache
from ddk_cache.layout import token_arrays
from ddk_cache.split_reader import SplitReader
from ddk_cache.verification import verify
from tools.bench.shared.real_logits import SEQ_LENGTH, TOP_64, answers, fit, load, write_cache

ROUNDS = 3
BATCH = 8  # rows a call
BAR = 1_000_000  # tokens a second of random rows, on two cores
BARRED = f"random rows, {BATCH} a call, 2 threads"
THREADS = (1, 2, 4)


def make_cache(folder: Path, count: int, shard_rows: int = 256) -> None:
    captured = load()
    calibration, found = answers(captured, "float32", TOP_64)
    measured = len(found["ids"])
    again = np.arange(count) % measured
    rows = {name: captured[name][-measured:][again] for name in token_arrays(SEQ_LENGTH)}
    codebook = fit(calibration, TOP_64, int(captured["vocab_size"]))
    said = {name: array[again] for name, array in found.items()}
    write_cache(folder, TOP_64, codebook, rows, said, shard_rows)


def opening(folder: Path) -> dict[str, float]:
    """What opening costs, in seconds and bytes: of each split the last marker is read, of however many."""
    tracemalloc.start()
    open_cache(str(folder))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        open_cache(str(folder))
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_bytes": peak}


@contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """s3://… of a copy of ``folder`` on a server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    import boto3

    boto3.client("s3").create_bucket(Bucket="bench")
    here, there = LocalStore(folder), from_url("s3://bench/cache")
    for objects in obstore.list(here):
        for described in objects:
            obstore.put(there, described["path"], obstore.get(here, described["path"]).bytes())
    try:
        yield "s3://bench/cache"
    finally:
        server.stop()


def rate(read: Callable[[], object], rows: int) -> float:
    """Tokens a second, the median of ROUNDS."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return rows * SEQ_LENGTH / statistics.median(seconds)


def measure(split: SplitReader, rows: int) -> dict[str, float]:
    """Tokens a second of each way to read ``rows`` rows."""
    chosen = np.random.default_rng(0).integers(len(split), size=rows).tolist()
    batches = [range(start, start + BATCH) for start in range(0, min(rows, len(split)) - BATCH + 1, BATCH)]

    def scan() -> None:
        for batch in batches:
            split.read(batch)

    def random_rows(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda row: split.read([row]), chosen))

    def one_by_one() -> None:
        for row in chosen:
            split.read([row])

    def as_training(threads: int) -> None:
        several = np.array_split(chosen, rows // BATCH)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda batch: split.read(batch, labels=False), several))

    one_by_one()  # fetches the shards' indices, makes the codec's tables
    found = {"random single rows": rate(one_by_one, rows)}
    for threads in THREADS:
        found[f"random rows, {BATCH} a call, {threads} threads"] = rate(
            lambda n=threads: as_training(n), rows
        )
    for threads in THREADS:
        found[f"random single rows, {threads} threads"] = rate(lambda n=threads: random_rows(n), rows)
    found[f"sequential scan, {BATCH} rows a call"] = rate(scan, len(batches) * BATCH)
    return found


@click.command()
@click.option("--rows", default=256, show_default=True, help="Rows in the cache.")
@click.option("--reads", default=256, show_default=True, help="Rows read a round from the folder.")
@click.option("--remote-reads", default=32, show_default=True, help="Rows read a round from the store.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_reader.json"))
def main(rows: int, reads: int, remote_reads: int, output: Path) -> None:
    """Measure random reads and a scan, from a folder and from S3."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        make_cache(folder, rows)
        opened = opening(folder)
        found = {"folder": measure(open_cache(str(folder))["text"].train, reads)}
        verified = rate(lambda: list(verify(str(folder))), rows)
        with object_store(folder) as url:
            found["S3 (moto, loopback)"] = measure(open_cache(url)["text"].train, remote_reads)
    table = Table("", *found, "bar, folder", title="Tokens a second, 64 entries each")
    for way in found["folder"]:
        bar = f"{BAR:,}" if way == BARRED else ""
        table.add_row(way, *(f"{figures[way]:,.0f}" for figures in found.values()), bar)
    Console().print(table)
    mebibytes = opened["peak_bytes"] / 2**20
    click.echo(f"opening {rows:,} rows: {opened['seconds'] * 1e3:.0f} ms, {mebibytes:.0f} MiB at most")
    click.echo(f"verify, one process: {verified:,.0f} tokens/s")
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {"tokens_per_second": found, "rows": rows, "threads": THREADS, "opening": opened}
    result["verify_tokens_per_second"] = verified
    output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
