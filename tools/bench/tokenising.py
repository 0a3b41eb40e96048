"""The share of all cores' tokenising that a build gets: packing, hold-out, compressing and writing included.

Baseline: the tokenizer alone on the same text, one process a core with one thread each, before the build and
after it, as a machine's speed varies. The build's rate is that of the second half of its text (a build of all
minus a build of half), so the start of processes and the end of a domain do not count. Measured for long
documents, for lines as documents of their own, and for conversations.

    python -m tools.bench.tokenising --tokens 4000000
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from ddk_build.config import BuildConfig
from ddk_build.teacher.tokenizer import load_tokenizer
from ddk_cache.cache.info import info
from tools import frame
from tools.frame import COMMAND, output_option, show, write_json, write_yaml
from tools.real_data import teacher_folder, texts

BAR = 0.85  # build / baseline
CALL = 64  # documents a call of the tokenizer alone
ALONE_CHARACTERS = 4_000_000
KINDS = ("documents", "lines", "conversations")


def alone(config: BuildConfig, documents: Sequence[str], least: float) -> float:
    """Return the tokens a second of the tokenizer in this process, with one thread, for ``least`` seconds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(config.teacher)
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    tokenizer(documents[:CALL])
    began, tokens = time.perf_counter(), 0
    for start in cycle(range(0, len(documents), CALL)):
        tokens += sum(map(len, tokenizer(documents[start : start + CALL], **options)["input_ids"]))
        if time.perf_counter() - began > least:
            break
    return tokens / (time.perf_counter() - began)


def baseline(config: BuildConfig, documents: Sequence[str], least: float) -> float:
    """Return the tokens a second of one tokenizer a core."""
    count = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        configs, texts = [config] * count, [documents] * count
        list(pool.map(alone, configs, texts, [0.1] * count))  # all processes have started
        return sum(pool.map(alone, configs, texts, [least] * count))


def rows_of(kind: str, text: str, copy: int) -> Iterator[dict[str, Any]]:
    """Yield a text as rows of a data set; ``copy`` makes copies differ."""
    lines = [line for line in text.splitlines() if line.strip()]
    if kind == "documents":
        yield {"text": f"{copy} {text}"}
    elif kind == "lines":
        yield from ({"text": f"{copy} {line}"} for line in lines)
    else:
        contents = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
        contents[0] = f"{copy} {contents[0]}"
        turns = [
            {"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)
        ]
        if len(turns) > 1:
            yield {"messages": turns[: len(turns) // 2 * 2]}


def write_text(file: Path, kind: str, tokens: int) -> None:
    """Write real text, repeated until there are ``tokens``, at 4 characters a token."""
    once = [*texts("python"), *texts("docs")]
    written = 0
    with file.open("w") as lines:
        for copy, text in ((copy, text) for copy in range(tokens) for text in once):
            for row in rows_of(kind, text, copy):
                lines.write(json.dumps(row) + "\n")
            written += len(text)
            if written > 4 * tokens:
                return


def first_texts(config: BuildConfig, file: Path) -> list[str]:
    """Return the texts of the first rows: enough that the tokenizer has not all words in its memory."""
    tokenizer = load_tokenizer(config.teacher)
    rendered: list[str] = []
    characters = 0
    for line in file.open():
        row = json.loads(line)
        chat = row.get("messages")
        text = str(row["text"] if chat is None else tokenizer.apply_chat_template(chat, tokenize=False))
        rendered.append(text)
        characters += len(text)
        if characters > ALONE_CHARACTERS:
            break
    return rendered


def configure(kind: str, file: Path, cache: Path) -> BuildConfig:
    """Return a build of the file; few rows are held out, as their choice does not grow with a corpus."""
    column = {"messages_column": "messages"} if kind == "conversations" else {}
    return BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher_folder()), "engine": "transformers"},
            "cache": str(cache),
            "seq_length": 2048,
            "validation_rows": 16,
            "domains": {"text": {"path": str(file), **column}},
        }
    )


def timed_build(config: BuildConfig) -> tuple[int, float]:
    """Return the tokens and the seconds of tokenising a corpus by the command."""
    keys = config.model_dump(mode="json", exclude_unset=True)
    path = write_yaml(Path(f"{config.cache}.yaml"), keys)
    run = partial(
        subprocess.run, [COMMAND, "build", path, "--tokens-only"], check=True, stdout=subprocess.DEVNULL
    )
    seconds = frame.seconds(run)
    splits = info(config.cache)["domains"]["text"]
    return sum(splits[name]["tokens"] for name in ("train", "validation")), seconds


def measure(kind: str, tokens: int, least: float) -> dict[str, float]:
    """Return the rates of one kind of text."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        builds = []
        for name, share in (("half", 0.5), ("all", 1)):
            file = folder / f"{name}.jsonl"
            write_text(file, kind, round(share * tokens))
            timed_build(configure(kind, file, folder / f"{name}-warm-up"))  # JSON into Arrow
            builds.append(configure(kind, file, folder / name))
        documents = first_texts(builds[1], folder / "all.jsonl")
        before = baseline(builds[1], documents, least)
        (half, half_seconds), (whole, seconds) = map(timed_build, builds)
        after = baseline(builds[1], documents, least)
    rate = (whole - half) / (seconds - half_seconds)
    return {
        "tokenizers before": before,
        "tokenizers after": after,
        "build": rate,
        "build / tokenizers": rate / ((before + after) / 2),
        "start and end, s": seconds - whole / rate,
    }


@click.command()
@click.option("--tokens", default=12_000_000, show_default=True, help="Of each kind of text.")
@click.option("--least", default=4.0, show_default=True, help="Seconds of the tokenizer alone.")
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@output_option("tokenising")
def main(tokens: int, least: float, kinds: str, output: Path) -> None:
    """Compare builds with the tokenizer alone, on all cores."""
    figures = {kind: measure(kind, tokens, least) for kind in kinds.split(",")}
    show(
        f"Tokens a second (bar of the ratio: {BAR})",
        ("", *next(iter(figures.values()))),
        [(kind, *row.values()) for kind, row in figures.items()],
    )
    write_json(output, {"bar": BAR, "figures": figures})


if __name__ == "__main__":
    main()
