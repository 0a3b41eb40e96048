"""What share of a step a tiny student waits for its rows: `ddk-cache train` at tens of thousands of tokens/s.

A vocabulary of 4,096, learned from the text itself, keeps the loss cheap, so that reading has to be fast. The
teacher is random: how its answers are read does not depend on what they say. Both commands run as a user
would run them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from tools.real_data import texts, write_domains

COMMAND = Path(sys.executable).with_name("ddk-cache")
DOMAINS = ("python", "docs")
SEQ_LENGTH, VOCABULARY = 512, 4096


def make_model(folder: Path) -> Path:
    """A random Llama, one layer of width 64, with a tokenizer for source code."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        islice(texts("python"), 100), VOCABULARY, special_tokens=["<eos>"], show_progress=False
    )
    folder.mkdir()
    learned.save(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=SEQ_LENGTH,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(folder: Path, command: str, config: dict[str, Any]) -> None:
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([COMMAND, command, path], check=True)


@click.command(help=__doc__)
@click.option("--tokens", default=400_000, show_default=True, help="In the cache.")
@click.option("--steps", default=100, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_waiting.json"))
def main(tokens: int, steps: int, output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = write_domains(folder, tokens)
        build = {
            "teacher": {"model": str(make_model(folder / "teacher")), "engine": "transformers"},
            "cache": str(folder / "cache"),
            "seq_length": SEQ_LENGTH,
            "validation_rows": 8,
            "domains": {
                name: {"path": "json", "data_files": str(files[name]), "max_tokens": tokens // len(DOMAINS)}
                for name in DOMAINS
            },
        }
        run(folder, "build", build)
        train = {
            "cache": str(folder / "cache"),
            "student": str(make_model(folder / "student")),
            "output_dir": str(folder / "run"),
            "max_steps": steps,
            "distill_interval": steps // 2,
            "warmup_steps": 10,
            "bf16": False,
            "report_to": "none",
        }
        run(folder, "train", train)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    table = Table("step", "tokens/s", "waiting for rows, share of the time")
    for line in lines:
        table.add_row(
            str(line["step"]), f"{line['tokens_per_second']:,.0f}", f"{line['data_wait_fraction']:.4f}"
        )
    medians = {
        key: statistics.median(line[key] for line in lines)
        for key in ("tokens_per_second", "data_wait_fraction")
    }
    table.add_row("median", f"{medians['tokens_per_second']:,.0f}", f"{medians['data_wait_fraction']:.4f}")
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"medians": medians, "lines": lines}, indent=2))


if __name__ == "__main__":
    main()
