"""How fast rows of 1,024 tokens with their 64 best entries are read and decoded, in one process.

The rows are real (shared/real_logits.py), repeated until there are enough; the folder's pages are in memory.
The object store is moto's S3 server in this same process: it competes with the reader, so its figures show
that it works and what a request costs here, not what a real store does.
"""

import logging
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import numpy as np
import obstore
from obstore.store import LocalStore, from_url

from ddk_cache import open_cache
from ddk_cache.cache.split import Split
from ddk_cache.cache.verify import verify
from ddk_cache.format.layout import token_arrays
from tools.bench.shared.real_logits import SEQ_LENGTH, TOP_64, answers, fit, load, write_cache
from tools.frame import median_seconds, output_option, show, write_json

BATCH = 8  # rows a call
BAR = 1_000_000  # tokens a second of random rows, on two cores
BARRED = f"random rows, {BATCH} a call, 2 threads"
THREADS = (1, 2, 4)


def make_cache(folder: Path, count: int, shard_rows: int = 256) -> None:
    """Write a cache of ``count`` real rows."""
    captured = load()
    calibration, measured = answers(captured, "float32", TOP_64)
    rows = {name: captured[name][-len(measured["ids"]) :] for name in token_arrays(SEQ_LENGTH)} | measured
    repeated = {name: array[np.arange(count) % len(array)] for name, array in rows.items()}
    write_cache(folder, TOP_64, fit(calibration, TOP_64, int(captured["vocab_size"])), repeated, shard_rows)


def opening(folder: Path) -> dict[str, float]:
    """Return the seconds and peak bytes of opening, which reads the last commit record of each split."""
    tracemalloc.start()
    open_cache(str(folder))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"seconds": median_seconds(lambda: open_cache(str(folder))), "peak_bytes": peak}


@contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """Yield the s3:// URL of a copy of ``folder`` on a server on loopback."""
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
    local, remote = LocalStore(folder), from_url("s3://bench/cache")
    for page in obstore.list(local):
        for entry in page:
            obstore.put(remote, entry["path"], obstore.get(local, entry["path"]).bytes())
    try:
        yield "s3://bench/cache"
    finally:
        server.stop()


def measure(split: Split, rows: int) -> dict[str, float]:
    """Return the tokens a second of each way to read ``rows`` rows."""
    chosen = np.random.default_rng(0).integers(len(split), size=rows).tolist()
    batches = [range(start, start + BATCH) for start in range(0, min(rows, len(split)) - BATCH + 1, BATCH)]

    def scan() -> None:
        for batch in batches:
            split.read(batch)

    def single_rows(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda row: split.read([row]), chosen))

    def one_by_one() -> None:
        for row in chosen:
            split.read([row])

    def as_training(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda rows: split.read(rows, labels=False), np.array_split(chosen, rows // BATCH)))

    one_by_one()  # fetches the shards' indices, makes the codec's tables
    ways = {"random single rows": one_by_one}
    ways |= {f"random rows, {BATCH} a call, {n} threads": partial(as_training, n) for n in THREADS}
    ways |= {f"random single rows, {n} threads": partial(single_rows, n) for n in THREADS}
    rates = {way: rows * SEQ_LENGTH / median_seconds(read) for way, read in ways.items()}
    scanned = len(batches) * BATCH * SEQ_LENGTH
    return rates | {f"sequential scan, {BATCH} rows a call": scanned / median_seconds(scan)}


@click.command()
@click.option("--rows", default=256, show_default=True, help="Rows in the cache.")
@click.option("--reads", default=256, show_default=True, help="Rows read a round from the folder.")
@click.option("--remote-reads", default=32, show_default=True, help="Rows read a round from the store.")
@output_option("reader")
def main(rows: int, reads: int, remote_reads: int, output: Path) -> None:
    """Measure random reads and a scan, from a folder and from S3."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        make_cache(folder, rows)
        opened = opening(folder)
        rates = {"folder": measure(open_cache(str(folder))["text"].train, reads)}
        verified = rows * SEQ_LENGTH / median_seconds(lambda: list(verify(str(folder))))
        with object_store(folder) as url:
            rates["S3 (moto, loopback)"] = measure(open_cache(url)["text"].train, remote_reads)
    show(
        "Tokens a second, 64 entries each",
        ("", *rates, "bar, folder"),
        [
            (way, *(figures[way] for figures in rates.values()), BAR if way == BARRED else None)
            for way in rates["folder"]
        ],
    )
    mebibytes = opened["peak_bytes"] / 2**20
    click.echo(f"opening {rows:,} rows: {opened['seconds'] * 1e3:.0f} ms, {mebibytes:.0f} MiB at most")
    click.echo(f"verify, one process: {verified:,.0f} tokens/s")
    figures = {"tokens_per_second": rates, "rows": rows, "threads": THREADS, "opening": opened}
    write_json(output, {**figures, "verify_tokens_per_second": verified})


if __name__ == "__main__":
    main()
