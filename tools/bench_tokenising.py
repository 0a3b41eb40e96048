"""How much of all cores' tokenising the build gets: packing, hold-out, compressing and writing included.

    python tools/bench_tokenising.py --tokens 8000000

One is the tokenizer called alone in one process on the same text; as many of it at once as there are cores
say what the machine can do. The build's processes are started beforehand: a build of hours does it once.
Seconds of CPU are counted too: where others are at work on the machine, they tell more than the clock.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import click
import psutil
from real_data import teacher_folder, texts
from rich.console import Console
from rich.table import Table

from ddk_build import tokenisers
from ddk_build.build import describe
from ddk_build.config import BuildConfig
from ddk_build.tokenisers import Submit, Tokenisers, processes
from ddk_build.tokenising import tokenise
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache.writer import open_writer

DOMAINS = ("python", "docs")
OUTPUT = Path("bench_results/bench_tokenising.json")
CALL = 64  # documents a call of the tokenizer alone


def tokenizer_alone(config: BuildConfig, documents: list[str], least: float = 5.0) -> tuple[float, float]:
    """Tokens a second of the tokenizer in this process, with one thread; also of its CPU's time."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(config.teacher)
    tokenizer(documents[:CALL])
    began, used, tokens = time.perf_counter(), time.process_time(), 0
    for start in cycle(range(0, len(documents), CALL)):
        tokens += sum(map(len, tokenizer(documents[start : start + CALL], verbose=False)["input_ids"]))
        if time.perf_counter() - began > least:
            return tokens / (time.perf_counter() - began), tokens / (time.process_time() - used)
    raise AssertionError


def write_text(folder: Path, domain: str, tokens: int) -> Path:
    """The domain's text again and again, each time with another number in front; 4 characters a token."""
    once, file, written = list(texts(domain)), folder / f"{domain}.jsonl", 0
    with file.open("w") as lines:
        for number in range(tokens):
            for text in once:
                lines.write(json.dumps({"text": f"{number} {text}"}) + "\n")
                written += len(text)
                if written > 4 * tokens:
                    return file
    return file


def cpu_seconds() -> float:
    """Of this process and all that came from it and are still there."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure(config: BuildConfig) -> tuple[int, float, float]:
    """Tokens, seconds and CPU seconds of tokenising all domains into a cache."""
    tokenizer = load_tokenizer(config.teacher)
    words = vocabulary(tokenizer)
    with processes() as started:
        submit, count = started
        for (
            name,
            domain,
        ) in config.domains.items():  # each has loaded the tokenizer, and the text is read once
            part = next(tokenisers.sources.read(name, domain, skip=0))
            task = tokenisers.task(config, name, domain, words.fingerprint())
            sent = [submit(task, 0, part.to_bytes(), False) for _ in range(4 * count)]
            for result in sent:
                result()

        @contextmanager
        def helpers() -> Iterator[tuple[Submit, int]]:
            yield started

        began, used = time.perf_counter(), cpu_seconds()
        with (
            open_writer(config.cache, describe(config, words), words) as writer,
            Tokenisers(config, tokenizer, helpers) as those,
        ):
            names = list(tokenise(writer, config, those))
            seconds, used = time.perf_counter() - began, cpu_seconds() - used
            return sum(writer.existing_state(name).source_tokens for name in names), seconds, used


@click.command()
@click.option("--tokens", default=8_000_000, show_default=True, help="In each of two domains.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_tokenising.json")
)
def main(tokens: int, output: Path) -> None:
    """Compare the tokenizer alone with the build."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        patch.object(tokenisers, "ALONE", 0.0),
        patch("datasets.config.HF_DATASETS_CACHE", Path(scratch) / "datasets"),
    ):
        folder = Path(scratch)
        files = {domain: write_text(folder, domain, tokens) for domain in DOMAINS}
        config = BuildConfig.model_validate(
            {
                "teacher": {"model": str(teacher_folder()), "engine": "transformers"},
                "cache": str(folder / "cache"),
                "seq_length": 2048,
                "domains": {name: {"path": str(file)} for name, file in files.items()},
            }
        )
        some = [json.loads(line)["text"] for file in files.values() for line in file.open()][:2000]
        cores = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
            one, one_cpu = pool.submit(tokenizer_alone, config, some).result()
            list(pool.map(tokenizer_alone, *zip(*[(config, some)] * cores, strict=True)))  # all have begun
            at_once = pool.map(tokenizer_alone, *zip(*[(config, some)] * cores, strict=True))
            together = sum(rate for rate, _ in at_once)
        taken, seconds, used = measure(config)
    found = {
        "cores": cores,
        "tokenizer": one,
        "tokenizers at once": together,
        "build": taken / seconds,
        "of cores x tokenizer": taken / seconds / one / cores,
        "of tokenizers at once": taken / seconds / together,
        "tokenizer, by CPU time": one_cpu,
        "build, by CPU time": taken / used,
        "of tokenizer, by CPU time": taken / used / one_cpu,
        "tokens": taken,
    }
    table = Table("", "")
    for name, value in found.items():
        table.add_row(name, f"{value:,.2f}" if value < 100 else f"{value:,.0f}")
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
