"""Whether a long build keeps its memory, and what very short documents cost, seen from outside the process.

`ddk-cache build` lets a tiny teacher (bench_capture.py's) read two million tokens of source code, then a
hundred thousand documents of ten tokens.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import click
import psutil
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from tools.bench.capture import SHAPES, shaped_teacher
from tools.real_data import teacher_folder, texts

SHORT = 10  # tokens of a short document, the end-of-sequence token included
COMMAND = Path(sys.executable).with_name("ddk-cache")


@dataclass(frozen=True)
class Sample:
    """The build at one moment."""

    seconds: float
    shards: int
    resident_bytes: int


def write_long(file: Path, tokens: int) -> None:
    """Whole documents of source code, until there are ``tokens``."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    with file.open("w", encoding="utf-8") as lines:
        for text in chain(texts("python"), texts("cpp")):
            lines.write(json.dumps({"text": text}) + "\n")
            tokens -= len(tokenizer(text, verbose=False).input_ids)
            if tokens <= 0:
                break


def write_short(file: Path, documents: int) -> None:
    """Pieces of documentation of SHORT - 1 tokens each; the build adds the end of each."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    with file.open("w", encoding="utf-8") as lines:
        for text in chain(texts("docs"), texts("python")):
            ids = tokenizer(text, verbose=False).input_ids
            for start in range(0, len(ids) - SHORT, SHORT - 1):
                piece = tokenizer.decode(ids[start : start + SHORT - 1])
                lines.write(json.dumps({"text": piece}) + "\n")
                documents -= 1
                if documents == 0:
                    return


def watched_build(
    folder: Path, teacher: Path, file: Path, tokens: int, top_k: int
) -> tuple[list[Sample], int]:
    """Samples of one build, a second apart, and the train tokens that it made."""
    config = {
        "teacher": {"model": str(teacher), "engine_args": {"load_format": "dummy", "enforce_eager": True}},
        "cache": str(folder / "cache"),
        "seq_length": 512,
        "target": {"top_k": top_k},
        "validation_rows": 8,
        "shard_tokens": 65_536,
        "domains": {"text": {"path": "json", "data_files": str(file), "max_tokens": tokens}},
    }
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(config))
    build = subprocess.Popen([COMMAND, "build", path])
    watched, began, samples = psutil.Process(build.pid), time.monotonic(), []
    while build.poll() is None:
        shards = len(list((folder / "cache/text/train/markers/c").glob("*/0")))
        samples.append(Sample(time.monotonic() - began, shards, watched.memory_info().rss))
        time.sleep(1)
    if build.returncode:
        raise click.ClickException(f"the build ended with exit code {build.returncode}")
    info = json.loads(subprocess.check_output([COMMAND, "info", "--json", folder / "cache"]))
    return samples, info["domains"]["text"]["train"]["tokens"]


def in_capture(samples: list[Sample]) -> list[Sample]:
    """From the first shard that is there to the last."""
    return [sample for sample in samples if 0 < sample.shards < samples[-1].shards]


@click.command()
@click.option("--tokens", default=2_000_000, show_default=True, help="Of the long documents.")
@click.option("--short-documents", default=100_000, show_default=True, help=f"Of {SHORT} tokens each.")
@click.option("--top-k", default=64, show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_long_build.json")
)
def main(tokens: int, short_documents: int, top_k: int, output: Path) -> None:
    """Watch two builds and print their memory and speed."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        teacher = shaped_teacher(Path(scratch) / "teacher", SHAPES["tiny"])
        for name in ("long documents", f"documents of {SHORT} tokens"):
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            file = folder / "text.jsonl"
            if name == "long documents":
                write_long(file, tokens)
            else:
                write_short(file, short_documents)
            samples, made = watched_build(folder, teacher, file, tokens, top_k)
            capture = in_capture(samples)
            share = (capture[-1].shards - capture[0].shards) / samples[-1].shards
            rate = made * share / (capture[-1].seconds - capture[0].seconds)
            found[name] = {
                "tokens": made,
                "tokens_per_second": rate,
                "samples": [asdict(sample) for sample in samples],
            }
            third = max(1, len(capture) // 3)
            found[name]["resident_bytes"] = {
                part: max(sample.resident_bytes for sample in chosen)
                for part, chosen in (
                    ("first third", capture[:third]),
                    ("last third", capture[-third:]),
                    ("whole build", samples),
                )
            }
    table = Table(
        "", "tokens", "tokens/s", "first third", "last third", "whole build", title="resident memory, MiB"
    )
    for name, figures in found.items():
        sizes = (f"{size / 2**20:,.0f}" for size in figures["resident_bytes"].values())
        table.add_row(name, f"{figures['tokens']:,}", f"{figures['tokens_per_second']:,.0f}", *sizes)
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
