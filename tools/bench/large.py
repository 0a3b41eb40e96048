"""A cache of ten million rows: what opening it, drawing from it and reading it at random cost.

One real shard of 1,024 rows (shared/real_logits.py) is repeated by hard links, each with its own commit
record. A second process then does what training does, with batches of 8 rows. Its memory is measured from the
first batch on: what grows are the commit records that the reader keeps and the order of the rows.
"""

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from ddk_cache import open_cache
from ddk_cache.format import layout
from ddk_cache.sampler import RowSampler, SamplerState, natural_share
from tools.bench.reader import make_cache
from tools.bench.shared.big_cache import put_into, repeat_shard
from tools.bench.shared.real_logits import SEQ_LENGTH
from tools.frame import in_new_process, output_option, process_memory, write_json

SHARD_ROWS = 1024  # the default: shards of 2^20 tokens
BATCH = 8


def use(folder: str, batches: int) -> dict[str, float]:
    """Read as a training process does; return its time and memory."""
    began = time.perf_counter()
    cache = open_cache(folder)
    figures = {"open_seconds": time.perf_counter() - began}
    split = cache["text"].train
    split.read(range(BATCH), labels=False)
    before = process_memory("VmHWM")
    began = time.perf_counter()
    _, row, _ = RowSampler([len(split)], seed=0).draw(
        SamplerState((0,)), natural_share([len(split)]), batches * BATCH
    )
    figures["draw_seconds"] = time.perf_counter() - began
    began, cpu = time.perf_counter(), time.process_time()
    for batch in np.split(row, batches):
        split.read(batch, labels=False)
    figures["tokens_per_second"] = len(row) * SEQ_LENGTH / (time.perf_counter() - began)
    figures["tokens_per_cpu_second"] = len(row) * SEQ_LENGTH / (time.process_time() - cpu)
    figures["rows"] = len(split)
    figures["indices_mebibytes"] = (process_memory("VmHWM") - before) / 2**20
    return figures


@click.command()
@click.option("--rows", default=10_000_000, show_default=True, help="Rows in the cache.")
@click.option("--batches", default=2000, show_default=True, help="Batches of 8 rows to read.")
@output_option("large")
def main(rows: int, batches: int, output: Path) -> None:
    """Make the cache, and measure."""
    with tempfile.TemporaryDirectory() as scratch:
        small, folder = Path(scratch) / "small", Path(scratch) / "cache"
        make_cache(small, SHARD_ROWS, SHARD_ROWS)
        repeat_shard(small, put_into(folder), layout.shards(rows, SHARD_ROWS))
        figures = in_new_process(use, str(folder), batches)
        click.echo(
            f"{figures['rows']:,} rows: opened in {figures['open_seconds']:.3f} s (bar 1); "
            f"{batches * BATCH:,} rows drawn in {figures['draw_seconds']:.2f} s "
            f"and read at {figures['tokens_per_second']:,.0f} tokens/s; "
            f"indices take {figures['indices_mebibytes']:.0f} MiB (bar 300); removing its files"
        )
    write_json(output, figures)


if __name__ == "__main__":
    main()
