"""Whether a device of a given speed ever waits for the build: a teacher that only takes time.

In the engine's place stands one that sleeps for as long as a device of so many tokens a second would need, in
steps of 8,192 tokens, and a millisecond for each document, and then answers from a pool of real answers. So
the whole build runs at the speed of hardware that is not here, and what it loses is its own.

    python -m tools.bench.feed --seconds 60
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from ddk_build.build import build_cache, describe
from ddk_build.config import BuildConfig
from ddk_build.documents import Document
from ddk_build.samples import write_sample
from ddk_build.scoring import requests
from ddk_build.teacher import Answers
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache import layout
from ddk_cache.layout import Target
from ddk_cache.writer import Writer, open_writer
from tools.bench.capture import SHAPES, shaped_teacher
from tools.bench.shared.distant import URL, distant_store
from tools.bench.shared.real_logits import CALIBRATION, DOMAINS, SAMPLED, SEQ_LENGTH, TOP_64, answers, load

STEP = 8_192  # tokens
SHORT = 10  # tokens of a short document
Arrays = dict[str, np.ndarray]


@dataclass
class Device:
    """A teacher whose answers take the time that a device would need."""

    pool: Answers
    rate: float
    """Tokens a second."""
    each: float = 0.0
    """Seconds a document."""
    calls: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each."""
    busy: float = 0.0
    tokens: int = 0
    engine, engine_version, vocab_size = "pretended", "0", 49_152

    def score(
        self,
        documents: Sequence[np.ndarray],
        offsets: Sequence[np.ndarray] | None = None,
        *,
        labels_only: bool = False,
    ) -> Answers:
        began = time.perf_counter()
        tokens = sum(map(len, documents))
        seconds = tokens / self.rate + self.each * len(documents)
        chosen = np.arange(tokens - len(documents)) % len(self.pool.ids)
        said = Answers(
            self.pool.ids[chosen][:, : 0 if labels_only else None],
            self.pool.logprobs[chosen][:, : 0 if labels_only else None],
            self.pool.tail_logprob[chosen],
            self.pool.label_logprob[chosen],
        )
        steps = -(-tokens // STEP)
        for step in range(1, steps + 1):
            time.sleep(max(0.0, began + seconds * step / steps - time.perf_counter()))
        self.calls.append((began, time.perf_counter()))
        self.busy += seconds
        self.tokens += tokens
        return said


def lay_out(writer: Writer, rows: Arrays, count: int) -> None:
    """The tokens of every domain: real rows, again and again; a few of them for validation."""
    size = writer.manifest.shard_rows
    for domain in writer.manifest.domains:
        states: dict[str, Any] = {}
        for split, total in (("train", count), ("validation", 8)):
            chosen = np.arange(total) % len(rows["tokens"])
            for shard in range(-(-total // size)):
                part = chosen[shard * size : (shard + 1) * size]
                writer.write_tokens(domain.name, split, shard, {name: x[part] for name, x in rows.items()})
            tokens, labels = (
                int((rows[name] > 0).sum(axis=1)[chosen].sum()) for name in ("segments", "loss_mask")
            )
            states[split] = {"rows": total, "tokens": tokens, "labels": labels}
        rest = {"limits": [None], "exhausted": True, "source_rows": 1, "source_tokens": 1, "documents": 1}
        rest |= {"skipped": {}, "left_over": 0, "held_out": None}
        read = requests({name: x[:8] for name, x in rows.items()}).documents
        sample = [Document(tokens, np.ones(len(tokens), np.bool_), 0) for tokens in read]
        write_sample(writer, domain.name, sample)
        writer.set_state(domain.name, layout.DomainState.model_validate(states | rest))


def short_documents(rows: Arrays) -> Arrays:
    """The same tokens, cut into documents of SHORT."""
    place = np.arange(SEQ_LENGTH)
    whole = place < SEQ_LENGTH // SHORT * SHORT
    segments = np.where(whole, place // SHORT + 1, 0).astype(np.uint16)
    mask = whole & (place % SHORT < SHORT - 1)
    return {
        "tokens": rows["tokens"] * whole,
        "segments": np.tile(segments, (len(rows["tokens"]), 1)),
        "loss_mask": np.tile(mask, (len(rows["tokens"]), 1)),
    }


def measure(
    scratch: Path, cache: str, target: Target, device: Device, rows: Arrays, tokens: int, shard_tokens: int
) -> dict[str, float]:
    """One build whose tokens are there already, in two domains."""
    teacher = shaped_teacher(scratch / "teacher", SHAPES["tiny"])
    (scratch / "text.jsonl").write_text('{"text": "never read"}\n')
    source = {"path": "json", "data_files": str(scratch / "text.jsonl")}
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "engine_args": {"load_format": "dummy"}},
            "cache": cache,
            "seq_length": SEQ_LENGTH,
            "target": target.model_dump(include=target.model_fields_set),
            "shard_tokens": shard_tokens,
            "domains": {"one": source, "two": source},
        }
    )
    words = vocabulary(load_tokenizer(config.teacher))
    with open_writer(cache, describe(config, words), words) as writer:
        lay_out(writer, rows, max(1, tokens // SEQ_LENGTH // 2))
    used = time.process_time()
    with patch("ddk_build.build.checked_teacher", lambda *_: device):
        build_cache(config)
    end = time.perf_counter()
    first, last = device.calls[0][0], device.calls[-1][1]
    return {
        "tokens": device.tokens,
        "calls": len(device.calls),
        "engine_seconds": device.busy,
        "tokens_per_second": device.tokens / (end - first),
        "share": device.busy / (end - first),
        "share_while_at_work": device.busy / (last - first),
        "seconds_between_calls": last - first - sum(end - begin for begin, end in device.calls),
        "seconds_after_the_last": end - last,
        "cpu_seconds_a_million": (time.process_time() - used) / device.tokens * 1e6,
    }


@click.command()
@click.option("--seconds", default=40.0, show_default=True, help="That the device is at work, in each build.")
@click.option("--shard-tokens", default=BuildConfig.model_fields["shard_tokens"].default, show_default=True)
@click.option("--latency", default=0.05, show_default=True, help="Seconds; of the store.")
@click.option("--only", default="", help="The builds whose line in the table holds this: store, 24 draws.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_feed.json"))
def main(seconds: float, shard_tokens: int, latency: float, only: str, output: Path) -> None:
    """Build with devices of several speeds."""
    captured = load()
    first = CALIBRATION * len(DOMAINS)
    rows = {name: captured[name][first:] for name in layout.token_arrays(SEQ_LENGTH)}
    found = {}
    for name, target, rate, place, bar in (
        ("top 64", TOP_64, 60_000, "folder", 0.97),
        ("24 draws", SAMPLED[24], 150_000, "folder", 0.97),
        ("top 64", TOP_64, 60_000, "store", 0.95),
        (f"documents of {SHORT}", TOP_64, 60_000, "folder", 0.9),
    ):
        where = place if place == "folder" else f"store, {latency * 1e3:.0f} ms"
        line = f"{name}, {rate:,} tokens/s, {where}"
        if only not in line:
            continue
        _, said = answers(captured, "float32", target)
        there = said["ids"][..., 0] >= 0
        pool = Answers(*(said[key][there] for key in ("ids", "logprobs", "tail_logprob", "label_logprob")))
        short = name.startswith("documents")
        device = Device(pool, rate, 1e-3 if short else 0.0)
        tokens = round(seconds / (1 / rate + device.each / SHORT))
        away = distant_store(latency) if place == "store" else nullcontext()
        with tempfile.TemporaryDirectory() as scratch, away:
            cache = URL if place == "store" else str(Path(scratch) / "cache")
            chosen = short_documents(rows) if short else rows
            one = measure(Path(scratch), cache, target, device, chosen, tokens, shard_tokens) | {"bar": bar}
            found[line] = one
            click.echo(f"{line}: {one['share']:.3f} of the device's time (bar {bar})")
    if not found:
        raise click.BadParameter("there is no such build", param_hint="--only")
    table = Table("", *found, title=f"{os.cpu_count()} cores")
    for figure in next(iter(found.values())):
        values = (one[figure] for one in found.values())
        table.add_row(figure, *(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in values))
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
