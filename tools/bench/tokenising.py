"""How much of all cores' tokenising a build gets: packing, hold-out, compressing and writing included.

One is the tokenizer called alone in one process, with one thread, on the same text; as many of it at once say
what the machine can do, before the build and after it, as that changes. Long documents, lines of text as
documents of their own, and conversations are measured. A build begins its processes once and ends each domain
once, so the time of both is given apart: its rate is that of the time between the first parts that came back
and the last.

    python -m tools.bench.tokenising --tokens 4000000
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import psutil
from rich.console import Console
from rich.table import Table

from ddk_build import tokenisers
from ddk_build.build import describe
from ddk_build.config import BuildConfig
from ddk_build.documents import Found
from ddk_build.tokenisers import Submit, Tokenisers, processes
from ddk_build.tokenising import tokenise
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache.writer import open_writer
from tools.real_data import teacher_folder, texts

BAR = 0.85  # of the processes times the tokenizer alone
CALL = 64  # documents a call of the tokenizer alone
ALONE_CHARACTERS = 4_000_000
VALIDATION_ROWS = 16  # few: the choice among four times as many does not grow with the corpus
KINDS = ("documents", "lines", "conversations")


def alone(config: BuildConfig, documents: Sequence[str], least: float) -> tuple[float, float]:
    """Tokens a second of the tokenizer in this process, with one thread; also of its CPU's time."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(config.teacher)
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    tokenizer(documents[:CALL])
    began, used, tokens = time.perf_counter(), time.process_time(), 0
    for start in cycle(range(0, len(documents), CALL)):
        tokens += sum(map(len, tokenizer(documents[start : start + CALL], **options)["input_ids"]))
        if time.perf_counter() - began > least:
            return tokens / (time.perf_counter() - began), tokens / (time.process_time() - used)
    raise AssertionError


def rows_of(kind: str, text: str, number: int) -> Iterator[dict[str, Any]]:
    """A text as the rows of a dataset; ``number`` makes copies differ."""
    if kind == "documents":
        yield {"text": f"{number} {text}"}
        return
    lines = [line for line in text.splitlines() if line.strip()]
    if kind == "lines":
        yield from ({"text": f"{number} {line}"} for line in lines)
        return
    said = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    if len(turns) > 1:
        turns[0] = {"role": "user", "content": f"{number} {said[0]}"}
        yield {"messages": turns[: len(turns) // 2 * 2]}


def write_text(file: Path, kind: str, once: Sequence[str], tokens: int) -> None:
    """The texts again and again until there are enough; 4 characters a token."""
    written = 0
    with file.open("w") as lines:
        for number in range(tokens):
            for text in once:
                for row in rows_of(kind, text, number):
                    lines.write(json.dumps(row) + "\n")
                written += len(text)
                if written > 4 * tokens:
                    return


def as_texts(config: BuildConfig, file: Path) -> list[str]:
    """What the tokenizer is given of the first rows: enough that it does not know all words already."""
    tokenizer = load_tokenizer(config.teacher)
    found: list[str] = []
    characters = 0
    for line in file.open():
        row = json.loads(line)
        chat = row.get("messages")
        found.append(row["text"] if chat is None else tokenizer.apply_chat_template(chat, tokenize=False))
        characters += len(found[-1])
        if characters > ALONE_CHARACTERS:
            break
    return found


@dataclass
class Watched:
    """Who tokenises, and when parts came back, with how many tokens."""

    submit: Submit
    came: list[tuple[float, float, int]] = field(default_factory=list)
    """Clock, CPU seconds of all processes, tokens."""

    def __call__(self, *part: Any) -> Callable[[], Found]:
        wait = self.submit(*part)

        def result() -> Found:
            sent = wait()
            self.came.append((time.perf_counter(), cpu_seconds(), len(sent.columns["tokens"])))
            return sent

        return result


def cpu_seconds() -> float:
    """Of this process and all that came from it and are still there."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def build(config: BuildConfig, count: int) -> dict[str, float]:
    """Tokenise the one domain into a cache with ``count`` processes."""
    tokenizer = load_tokenizer(config.teacher)
    words = vocabulary(tokenizer)
    began = time.perf_counter()
    with processes(count) as (submit, _):
        [(name, domain)] = config.domains.items()
        part = next(tokenisers.sources.read(name, domain, skip=0))  # datasets turns the file into Arrow
        read = time.perf_counter() - began
        task = tokenisers.task(config, name, domain, words.fingerprint())
        one = tokenisers.sources.Part(0, part.table.slice(0, 1), part.replaced).to_bytes()
        for result in [submit(task, 0, one, part.replaced) for _ in range(4 * count)]:
            result()
        started = time.perf_counter() - began - read
        watched = Watched(submit)

        @contextmanager
        def helpers() -> Iterator[tuple[Submit, int]]:
            yield watched, count

        began = time.perf_counter()
        with (
            open_writer(config.cache, describe(config, words), words) as writer,
            Tokenisers(config, tokenizer, helpers) as those,
        ):
            list(tokenise(writer, config, those))
        whole = time.perf_counter() - began
    # The first part of each process came back at the same time.
    (first, cpu_first, _), (last, cpu_last, _) = watched.came[count - 1], watched.came[-1]
    tokens = sum(tokens for *_, tokens in watched.came[count:])
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / (last - first),
        "tokens_per_cpu_second": tokens / (cpu_last - cpu_first),
        "seconds_steady": last - first,
        "seconds_reading_json_once": read,
        "seconds_starting_processes": started,
        "seconds_before_and_after": whole - (last - first),
    }


def at_once(config: BuildConfig, some: Sequence[str], count: int, least: float) -> dict[str, float]:
    """So many tokenizers, each alone in its process."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        calls = [[config] * count, [some] * count]
        list(pool.map(alone, *calls, [0.1] * count))  # all have begun
        rates = list(pool.map(alone, *calls, [least] * count))
    return {
        "tokens_per_second": sum(rate for rate, _ in rates),
        "tokens_per_cpu_second": sum(rate for _, rate in rates) / count,
    }


def measure(kind: str, tokens: int, counts: Sequence[int], least: float) -> dict[str, Any]:
    """The tokenizer alone and the builds of one kind of text."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "text.jsonl"
        write_text(file, kind, [*texts("python"), *texts("docs")], tokens)
        found: dict[str, Any] = {}
        for count in counts:
            with patch("datasets.config.HF_DATASETS_CACHE", folder / f"datasets-{count}"):
                column = {"messages_column": "messages"} if kind == "conversations" else {}
                config = BuildConfig.model_validate(
                    {
                        "teacher": {"model": str(teacher_folder()), "engine": "transformers"},
                        "cache": str(folder / f"cache-{count}"),
                        "seq_length": 2048,
                        "validation_rows": VALIDATION_ROWS,
                        "domains": {"text": {"path": str(file), **column}},
                    }
                )
                some = as_texts(config, file)
                before = at_once(config, some, count, least)
                built = build(config, count)
                after = at_once(config, some, count, least)
                together = {key: (before[key] + after[key]) / 2 for key in before}
                if not found:
                    found["alone"] = together
                rates = " and ".join(f"{one['tokens_per_second']:,.0f}" for one in (before, after))
                click.echo(f"{kind}: {count} tokenizers alone, before and after: {rates} tokens/s")
                built["of_processes_x_alone"] = (
                    built["tokens_per_second"] / count / found["alone"]["tokens_per_second"]
                )
                built["of_as_many_at_once"] = built["tokens_per_second"] / together["tokens_per_second"]
                built["of_alone_by_cpu"] = built["tokens_per_cpu_second"] / together["tokens_per_cpu_second"]
                click.echo(f"{kind}: a build with {count} {built['tokens_per_second']:,.0f} tokens/s")
                found[f"{count} processes"] = built
    return found


@click.command()
@click.option("--tokens", default=6_000_000, show_default=True, help="Of each kind of text.")
@click.option("--least", default=4.0, show_default=True, help="Seconds that the tokenizer alone is at work.")
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_tokenising.json")
)
def main(tokens: int, least: float, kinds: str, output: Path) -> None:
    """Compare the tokenizer alone with builds of one process and of one for each core."""
    cores = len(os.sched_getaffinity(0))
    with patch.object(tokenisers, "ALONE", 0.0):
        found = {kind: measure(kind, tokens, sorted({1, cores}), least) for kind in kinds.split(",")}
    columns = {
        "tokens/s": "tokens_per_second",
        f"of 1 ({BAR})": "of_processes_x_alone",
        "of all": "of_as_many_at_once",
        "by CPU": "of_alone_by_cpu",
        "start": "seconds_starting_processes",
        "Arrow": "seconds_reading_json_once",
        "ends": "seconds_before_and_after",
    }
    table = Table("", "", *columns, title=f"{cores} cores")
    for kind, figures in found.items():
        for name, one in figures.items():
            values = [one.get(key) for key in columns.values()]
            table.add_row(
                kind, name, *("" if v is None else f"{v:,.0f}" if v > 99 else f"{v:.2f}" for v in values)
            )
    Console().print(table)
    click.echo(
        f"of 1: of processes x the tokenizer alone, bar {BAR}; of all: of as many tokenizers at once; "
        "by CPU: of one's tokens a CPU second; seconds: to start processes, JSON into Arrow, a domain's ends"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"cores": cores, "bar": BAR, "found": found}, indent=2))


if __name__ == "__main__":
    main()
