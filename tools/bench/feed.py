"""Whether a device of a given speed ever waits for the build: a teacher that only takes time.

The engine is replaced by one that sleeps as long as a device of so many tokens a second would need, in steps
of 8,192 tokens, and for short documents a millisecond each, and then answers from a pool of real answers. So
the whole build runs at the speed of hardware that is not present, and every loss is the build's.

    python -m tools.bench.feed --seconds 60
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np

from ddk_build.build import build_cache, describe
from ddk_build.config import BuildConfig
from ddk_build.teacher.engines import Answers, Teacher
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache.cache.writer import open_writer
from ddk_cache.format import layout
from ddk_cache.format.layout import Target
from tools.bench.shared.real_logits import (
    CALIBRATION,
    SAMPLED,
    SEQ_LENGTH,
    TOP_64,
    Arrays,
    answers,
    load,
    write_tokens,
)
from tools.bench.shared.slow_store import URL, slow_store
from tools.bench.shared.teachers import shaped_teacher
from tools.frame import output_option, show, write_json
from tools.real_data import DOMAINS

STEP = 8_192  # tokens
SHORT = 10  # tokens of a short document


class Case(NamedTuple):
    """One build."""

    name: str
    target: Target
    rate: int  # of the device, tokens a second
    bar: float  # share of the time in which the device has work
    is_remote: bool = False
    is_short: bool = False


CASES = (
    Case("top 64, 60,000 tokens/s, folder", TOP_64, 60_000, 0.97),
    Case("24 draws, 150,000 tokens/s, folder", SAMPLED[24], 150_000, 0.97),
    Case("top 64, 60,000 tokens/s, store", TOP_64, 60_000, 0.95, is_remote=True),
    Case(f"documents of {SHORT}, 60,000 tokens/s, folder", TOP_64, 60_000, 0.9, is_short=True),
)


@dataclass
class Device(Teacher):
    """A teacher whose answers take the time that a device would need."""

    pool: Answers
    rate: float
    """Tokens a second."""
    document_seconds: float
    calls: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each call."""
    busy: float = 0.0
    tokens: int = 0
    vocab_size: int = 49_152

    def submit(
        self, documents: Sequence[np.ndarray], offsets: object = None, *, labels_only: bool = False
    ) -> list[Callable[[], Answers]]:
        began = time.perf_counter()
        tokens = sum(map(len, documents))
        seconds = tokens / self.rate + self.document_seconds * len(documents)
        chosen = np.arange(tokens - len(documents)) % len(self.pool.ids)
        width = 0 if labels_only else None
        result = Answers(
            self.pool.ids[chosen][:, :width],
            self.pool.logprobs[chosen][:, :width],
            self.pool.tail_logprob[chosen],
            self.pool.label_logprob[chosen],
        )
        steps = -(-tokens // STEP)
        for step in range(1, steps + 1):
            time.sleep(max(0.0, began + seconds * step / steps - time.perf_counter()))
        self.calls.append((began, time.perf_counter()))
        self.busy += seconds
        self.tokens += tokens
        return [lambda: result]

    @classmethod
    def of(cls, case: Case, captured: Arrays) -> "Device":
        """Return a device that answers with what the real teacher said."""
        _, arrays = answers(captured, "float32", case.target)
        answered = arrays["ids"][..., 0] >= 0
        names = ("ids", "logprobs", "tail_logprob", "label_logprob")
        pool = Answers(*(arrays[name][answered] for name in names))
        return cls(pool, case.rate, 1e-3 if case.is_short else 0.0)


def short_documents(rows: Arrays) -> Arrays:
    """Cut the same tokens into documents of SHORT."""
    position = np.arange(SEQ_LENGTH)
    is_full = position < SEQ_LENGTH // SHORT * SHORT
    segments = np.where(is_full, position // SHORT + 1, 0).astype(np.uint16)
    mask = is_full & (position % SHORT < SHORT - 1)
    return {
        "tokens": rows["tokens"] * is_full,
        "segments": np.tile(segments, (len(rows["tokens"]), 1)),
        "loss_mask": np.tile(mask, (len(rows["tokens"]), 1)),
    }


def configure(scratch: Path, cache: str, target: Target, shard_tokens: int) -> BuildConfig:
    """Return a build of two domains whose source is never read."""
    teacher = shaped_teacher(scratch / "teacher", "tiny")
    (scratch / "text.jsonl").write_text('{"text": "never read"}\n')
    source = {"path": str(scratch / "text.jsonl")}
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "engine_args": {"load_format": "dummy"}},
            "cache": cache,
            "seq_length": SEQ_LENGTH,
            "target": target.model_dump(include=target.model_fields_set),
            "shard_tokens": shard_tokens,
            "domains": {"one": source, "two": source},
        }
    )


def lay_out(config: BuildConfig, rows: Arrays, count: int) -> None:
    """Write the tokens of every domain: real rows, repeated, ``count`` for training and 8 held out."""
    tokenizer = load_tokenizer(config.teacher)
    splits: dict[layout.SplitName, Arrays] = {
        "train": {name: x[np.arange(count) % len(x)] for name, x in rows.items()},
        "validation": {name: x[:8] for name, x in rows.items()},
    }
    with open_writer(config.cache, describe(config, tokenizer), vocabulary(tokenizer)) as writer:
        for domain in config.domains:
            write_tokens(writer, domain, splits)


def measure(config: BuildConfig, device: Device) -> dict[str, float]:
    """Run one build whose tokens are already written."""
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
        "share_until_last_answer": device.busy / (last - first),
        "seconds_between_calls": last - first - sum(end - begin for begin, end in device.calls),
        "seconds_after_last_answer": end - last,
        "cpu_seconds_a_million": (time.process_time() - used) / device.tokens * 1e6,
    }


@click.command()
@click.option("--seconds", default=40.0, show_default=True, help="Work of the device in each build.")
@click.option("--shard-tokens", default=BuildConfig.model_fields["shard_tokens"].default, show_default=True)
@click.option("--latency", default=0.05, show_default=True, help="Of the store, seconds.")
@click.option("--only", default="", help="Builds whose name contains this, such as store or 24 draws.")
@output_option("feed")
def main(seconds: float, shard_tokens: int, latency: float, only: str, output: Path) -> None:
    """Build with devices of several speeds."""
    cases = [case for case in CASES if only in case.name]
    if not cases:
        raise click.BadParameter(f"no build has {only!r} in its name", param_hint="--only")
    captured = load()
    first = CALIBRATION * len(DOMAINS)
    rows = {name: captured[name][first:] for name in layout.token_arrays(SEQ_LENGTH)}
    figures: dict[str, dict[str, Any]] = {}
    for case in cases:
        device = Device.of(case, captured)
        tokens = seconds / (1 / device.rate + device.document_seconds / SHORT)
        with (
            tempfile.TemporaryDirectory() as scratch,
            slow_store(latency) if case.is_remote else nullcontext(),
        ):
            cache = URL if case.is_remote else str(Path(scratch) / "cache")
            config = configure(Path(scratch), cache, case.target, shard_tokens)
            lay_out(config, short_documents(rows) if case.is_short else rows, round(tokens / SEQ_LENGTH / 2))
            figures[case.name] = measure(config, device) | {"bar": case.bar}
        share = figures[case.name]["share"]
        click.echo(f"{case.name}: the device works {share:.3f} of the time (bar {case.bar})")
    names = list(next(iter(figures.values())))
    show(
        f"Store with {latency * 1e3:.0f} ms a request",
        ("", *figures),
        [[name, *(row[name] for row in figures.values())] for name in names],
    )
    write_json(output, figures)


if __name__ == "__main__":
    main()
