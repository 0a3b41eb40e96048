"""Whether a long build's memory stays constant, and what very short documents cost, seen from outside.

`ddk-cache build` lets a tiny teacher read two million tokens of source code, then a hundred thousand
documents of ten tokens.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
import psutil
from transformers import AutoTokenizer

from tools.bench.shared.teachers import shaped_teacher
from tools.frame import COMMAND, output_option, show, write_json, write_yaml
from tools.real_data import teacher_folder, texts

SHORT = 10  # tokens of a short document, the end-of-sequence token included


@dataclass(frozen=True)
class Sample:
    """The build at one moment."""

    seconds: float
    shards: int
    resident_bytes: int


def write_long(file: Path, tokens: int) -> None:
    """Write whole documents of source code up to ``tokens``."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    with file.open("w", encoding="utf-8") as lines:
        for text in chain(texts("python"), texts("cpp")):
            lines.write(json.dumps({"text": text}) + "\n")
            tokens -= len(tokenizer(text, verbose=False).input_ids)
            if tokens <= 0:
                break


def write_short(file: Path, documents: int) -> None:
    """Write parts of documentation of SHORT - 1 tokens each; the build adds the end of each."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    with file.open("w", encoding="utf-8") as lines:
        for text in chain(texts("docs"), texts("python")):
            ids = tokenizer(text, verbose=False).input_ids
            for start in range(0, len(ids) - SHORT, SHORT - 1):
                part = tokenizer.decode(ids[start : start + SHORT - 1])
                lines.write(json.dumps({"text": part}) + "\n")
                documents -= 1
                if documents == 0:
                    return


def watch(folder: Path, config: dict[str, Any]) -> tuple[list[Sample], int]:
    """Run a build; return samples a second apart and the number of train tokens."""
    build = subprocess.Popen([COMMAND, "build", write_yaml(folder / "build.yaml", config)])
    watched, began, samples = psutil.Process(build.pid), time.monotonic(), []
    while build.poll() is None:
        shards = len(list((folder / "cache/text/train/label_logprob/c").glob("*/0")))
        samples.append(Sample(time.monotonic() - began, shards, watched.memory_info().rss))
        time.sleep(1)
    if build.returncode:
        raise click.ClickException(f"the build ended with exit code {build.returncode}")
    info = json.loads(subprocess.check_output([COMMAND, "info", "--json", folder / "cache"]))
    return samples, info["domains"]["text"]["train"]["tokens"]


def figures_of(samples: list[Sample], tokens: int) -> dict[str, Any]:
    """Return speed and memory between the first shard and the last."""
    capture = [sample for sample in samples if 0 < sample.shards < samples[-1].shards]
    if len(capture) < 2:
        raise click.ClickException("the build was too short to measure: use more --tokens, --short-documents")
    share = (capture[-1].shards - capture[0].shards) / samples[-1].shards
    third = max(1, len(capture) // 3)
    parts = {"first third": capture[:third], "last third": capture[-third:], "whole build": samples}
    return {
        "tokens": tokens,
        "tokens_per_second": tokens * share / (capture[-1].seconds - capture[0].seconds),
        "mebibytes": {
            part: max(sample.resident_bytes for sample in chosen) / 2**20 for part, chosen in parts.items()
        },
        "samples": [asdict(sample) for sample in samples],
    }


@click.command()
@click.option("--tokens", default=2_000_000, show_default=True, help="Of the long documents.")
@click.option("--short-documents", default=100_000, show_default=True, help=f"Of {SHORT} tokens each.")
@click.option("--top-k", default=64, show_default=True)
@output_option("long_build")
def main(tokens: int, short_documents: int, top_k: int, output: Path) -> None:
    """Watch two builds; print their memory and speed."""
    sources: dict[str, Callable[[Path], None]] = {
        "long documents": partial(write_long, tokens=tokens),
        f"documents of {SHORT} tokens": partial(write_short, documents=short_documents),
    }
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        teacher = shaped_teacher(Path(scratch) / "teacher", "tiny")
        engine = {"load_format": "dummy", "enforce_eager": True}
        for name, write in sources.items():
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            write(folder / "text.jsonl")
            config = {
                "teacher": {"model": str(teacher), "engine_args": engine},
                "cache": str(folder / "cache"),
                "seq_length": 512,
                "target": {"top_k": top_k},
                "validation_rows": 8,
                "shard_tokens": 65_536,
                "domains": {"text": {"path": str(folder / "text.jsonl"), "max_tokens": tokens}},
            }
            figures[name] = figures_of(*watch(folder, config))
    show(
        "resident memory, MiB",
        ("", "tokens", "tokens/s", "first third", "last third", "whole build"),
        [
            (name, row["tokens"], row["tokens_per_second"], *row["mebibytes"].values())
            for name, row in figures.items()
        ],
    )
    write_json(output, figures)


if __name__ == "__main__":
    main()
