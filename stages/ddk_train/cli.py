"""The commands of stage two. Heavy imports are inside them, so that ``ddk-cache --help`` starts fast."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddk_cache.cli.options import configured
from ddk_cache.util.packages import require

if TYPE_CHECKING:
    from ddk_train.config import TrainConfig

RELOAD_SECONDS = 10.0  # between two pages of report --watch


@click.command()
@configured("ddk_train.config:TrainConfig", needs=("train", "torch", "transformers", "safetensors"))
@click.option("--resume", is_flag=True, help="Resume from the newest checkpoint in output_dir.")
@click.option("--dry-run", is_flag=True, help="Check everything, print what would be done, write nothing.")
def train(config: "TrainConfig", resume: bool, dry_run: bool) -> None:
    """Train a student from a cache; CONFIG is a YAML file."""
    from ddk_cache.util.progress import logged_on_stderr, shown_by
    from ddk_train.errors import Stopped, TrainingError
    from ddk_train.report.outcome import outcome
    from ddk_train.train import dry_run as check
    from ddk_train.train import train as run

    # A terminal shows a bar too, below the lines of the log.
    bar = contextlib.nullcontext() if sys.stderr.isatty() else shown_by(lambda update: None)
    try:
        with logged_on_stderr("ddk_train"), bar:
            is_main = os.environ.get("RANK", "0") == "0"
            if dry_run:
                plan = check(config, resume=resume)
                if is_main:
                    click.echo(plan)
            else:
                folder = run(config, resume=resume)
                if is_main:
                    click.echo(outcome(folder))
    except Stopped as stopped:
        raise click.exceptions.Exit(stopped.exit_code) from stopped
    except TrainingError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("student")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tokenizer", required=True, help="Folder or hub id of the model with the tokenizer.")
@click.option("--method", type=click.Choice(["mean", "omp"]), default="mean", show_default=True)
@click.option("--cache", "url", help="Also measure bits per byte before and after, on this cache's rows.")
def transplant(student: str, out: Path, tokenizer: str, method: str, url: str | None) -> None:
    """Write STUDENT with another model's tokenizer into OUT, to train it from that model's cache.

    The body stays, and so do the embeddings of tokens that both tokenizers have. Others are, with `mean`, the
    mean of the old tokens that spell them; with `omp`, the sum of shared tokens that is right in the other
    model.
    """
    require("train", "torch", "transformers")
    from ddk_cache import open_cache
    from ddk_train.errors import TrainingError
    from ddk_train.transplant.transplant import transplant as write

    cache = None if url is None else open_cache(url)
    try:
        made = write(student, tokenizer, out, method=method, cache=cache)
    except TrainingError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {made.as_text()}")


@click.command()
@click.argument(
    "runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File of the page.")
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
@click.option("--watch", is_flag=True, help="Update the page, and browsers that show it, until the runs end.")
def report(runs: tuple[Path, ...], output: Path | None, show: bool, watch: bool) -> None:
    """Write an HTML page of plots and tables about RUNS: folders of training runs, finished or not.

    Several runs are laid over each other. The page is report.html, in the run's folder or beside the first.
    """
    require("train", "jinja2", "matplotlib")
    from ddk_train.report import page as report

    page = report.write_report(runs, output, reload_seconds=RELOAD_SECONDS if watch else None)
    click.echo(page)
    if show:
        click.launch(page.resolve().as_uri())
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            report.watch(runs, page, RELOAD_SECONDS)
