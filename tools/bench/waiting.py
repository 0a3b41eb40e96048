"""How long a tiny student waits for its rows: `ddk-cache train` at tens of thousands of tokens a second.

A vocabulary of 4,096, learned from the text itself, keeps the loss cheap, so that reading must be fast. The
teacher is random: reading does not depend on what it answers. Both commands run as a user would run them.
"""

import json
import statistics
import subprocess
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import click

from tools.frame import COMMAND, output_option, show, write_json, write_yaml
from tools.real_data import texts, write_domains

DOMAINS = ("python", "docs")
SEQ_LENGTH, VOCABULARY = 512, 4096


def make_model(folder: Path) -> Path:
    """Write a random Llama, one layer of width 64, with a tokenizer for source code."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        islice(texts("python"), 100), VOCABULARY, special_tokens=["<eos>"], show_progress=False
    )
    folder.mkdir()
    file = str(folder / "tokenizer.json")
    learned.save(file)
    PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<eos>").save_pretrained(folder)
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
    """Run a command of ddk-cache with a configuration."""
    path = write_yaml(folder / f"{command}.yaml", config)
    subprocess.run([COMMAND, command, path], check=True)


@click.command(help=__doc__)
@click.option("--tokens", default=400_000, show_default=True, help="In the cache.")
@click.option("--steps", default=100, show_default=True)
@output_option("waiting")
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
                name: {"path": str(files[name]), "max_tokens": tokens // len(DOMAINS)} for name in DOMAINS
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
    keys = ("tokens_per_second", "data_wait_fraction")
    medians = {key: statistics.median(line[key] for line in lines) for key in keys}
    rows = [(f"{line['step']}", *(line[key] for key in keys)) for line in lines]
    show(
        "A tiny student",
        ("step", "tokens/s", "share of the time that it waits for rows"),
        [*rows, ("median", *medians.values())],
    )
    write_json(output, {"medians": medians, "lines": lines})


if __name__ == "__main__":
    main()
