"""Beyond perplexity: named tasks, and how good a draft model the student is.

    pip install 'ddk-cache[eval]'
    python -m tools.evaluate tasks arc_easy,hellaswag TEACHER STUDENT_BEFORE STUDENT_AFTER
    python -m tools.evaluate acceptance CACHE TEACHER STUDENT_BEFORE STUDENT_AFTER

Models are folders or hub ids. ``tasks`` runs lm-evaluation-harness's own command for each, with further
arguments if given (``--harness '--limit 100 --include_path my_tasks'``). ``acceptance`` reads the held-out
rows of a cache and asks both models: it needs the rows' text alone, so the target may be of any kind.
"""

import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from ddk_cache import Cache, open_cache
from ddk_cache.errors import CacheError, ConfigError
from ddk_train.config import TrainConfig
from ddk_train.data.batches import make_batch
from ddk_train.student.student import Student
from tools import frame
from tools.studies.online_teacher import all_logits, load_frozen

Figures = dict[str, dict[str, dict[str, float]]]  # by model, by task or domain, by what was measured


def acceptance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the chance [M] that a teacher keeps a student's draft token; logits [M, V] and [M, W].

    The sum over tokens of min(p, q), the chance of speculative sampling at temperature 1 (arXiv 2211.17192,
    corollary 3.6). A token that only one vocabulary has, padding, has no mass in the other.
    """
    p, q = teacher.softmax(-1), student.softmax(-1)
    width = min(p.shape[-1], q.shape[-1])
    return p[:, :width].minimum(q[:, :width]).sum(-1)


@torch.no_grad()
def acceptance_by_domain(
    cache: Cache, teacher: Student, students: Sequence[Student]
) -> list[dict[str, dict[str, float]]]:
    """Return, by student and domain, the mean over the held-out labels, its standard error, and their count.

    Labels of one row are correlated, so the error is that of a mean over rows, weighted by their labels.
    """
    figures: list[dict[str, dict[str, float]]] = [{} for _ in students]
    narrowest = min(model.vocab_size for model in (teacher, *students))
    for domain, name in enumerate(cache.domains):
        split = cache[name].validation
        sums, labels = np.zeros((len(students), len(split))), np.zeros(len(split))
        for row in range(len(split)):
            part = split.read([row], targets=False, labels=False)
            batch = make_batch({domain: part}, narrowest)
            labels[row] = len(batch.labels)
            logits = all_logits(teacher, batch)
            for index, student in enumerate(students):
                sums[index, row] = float(acceptance(logits, all_logits(student, batch)).double().sum())
        for index, by_row in enumerate(sums):
            mean = by_row.sum() / labels.sum()
            spread = math.sqrt(((by_row - mean * labels) ** 2).sum()) / labels.sum()
            figures[index][name] = {"acceptance": mean, "stderr": spread, "labels": float(labels.sum())}
    return figures


def run_tasks(models: Sequence[str], tasks: str, more: Sequence[str] = ()) -> Figures:
    """Return lm-evaluation-harness's figures of each model, by task and metric.

    Parameters
    ----------
    tasks
        Names, with commas between.
    more
        Further arguments of its command.

    Raises
    ------
    ConfigError
        It is not installed, or fails; with its last line.
    """
    if not find_spec("lm_eval"):
        raise ConfigError("tasks: need the package lm-eval: pip install 'ddk-cache[eval]'")
    # A process of its own: the harness imports a package that has this file's name.
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", tasks, *more]
    by_model: Figures = {}
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--model_args", f"pretrained={model},use_safetensors=True", "--output_path", folder]
            ended = subprocess.run(
                [*command, *arguments], stdout=sys.stderr, stderr=subprocess.PIPE, text=True
            )
            if ended.returncode:
                raise ConfigError(f"tasks: {model}: {ended.stderr.strip().splitlines()[-1]}")
            (written,) = Path(folder).rglob("results*.json")
            results = json.loads(written.read_text(encoding="utf-8"))["results"]
        by_model[model] = {
            task: {key: value for key, value in figures.items() if isinstance(value, float | int)}
            for task, figures in results.items()
        }
    return by_model


def show(by_model: Figures) -> None:
    """Print the figures, a line for each task or domain and measure, a column for each model."""
    rows = []
    for task, figures in next(iter(by_model.values())).items():
        for key in figures:
            if "stderr" in key or key == "labels":
                continue
            name, _, how = key.partition(",")
            error = f"{name}_stderr,{how}" if how else "stderr"
            cells = [
                f"{model[task][key]:.4f}" + (f" ± {model[task][error]:.4f}" if error in model[task] else "")
                for model in by_model.values()
            ]
            rows.append([task, name, *cells])
    frame.show("", ("", "", *(Path(model).name for model in by_model)), rows, labels=2)


@click.group(help=__doc__)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON of the figures.")
@click.pass_context
def main(context: click.Context, output: Path | None) -> None:
    context.obj = output


@main.command("tasks")
@click.argument("tasks")
@click.argument("models", nargs=-1, required=True)
@click.option("--harness", default="", help="Arguments of lm-evaluation-harness, as '--limit 100'.")
@click.pass_obj
def tasks_command(output: Path | None, tasks: str, models: tuple[str, ...], harness: str) -> None:
    """Run TASKS (names with commas between) with lm-evaluation-harness on each of MODELS."""
    write(run_tasks(models, tasks, shlex.split(harness)), output)


@main.command("acceptance")
@click.argument("cache")
@click.argument("teacher")
@click.argument("students", nargs=-1, required=True)
@click.pass_obj
def acceptance_command(output: Path | None, cache: str, teacher: str, students: tuple[str, ...]) -> None:
    """Measure how often TEACHER keeps what STUDENTS draft, by domain, on the held-out rows of CACHE."""
    opened = open_cache(cache)
    config = TrainConfig(cache=cache, student=students[0], output_dir="unused", bf16=False)
    asked, *drafting = [load_frozen(model, config, opened) for model in (teacher, *students)]
    figures = acceptance_by_domain(opened, asked, drafting)
    write(dict(zip(students, figures, strict=True)), output)


def write(figures: Figures, output: Path | None) -> None:
    """Print the figures, and keep them if a file is named."""
    show(figures)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, CacheError) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
