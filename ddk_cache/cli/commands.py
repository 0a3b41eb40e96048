"""The commands that need no stage. Heavy imports are inside, so that ``--help`` is fast."""

import json
import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddk_cache.cli.options import configured

if TYPE_CHECKING:
    from ddk_cache.cli.rounds import RoundsConfig


@click.command()
@click.option("--from", "name", default="start", show_default=True, help="A name from `ddk-cache recipes`.")
@click.argument("folder", default=".", type=click.Path(file_okay=False, path_type=Path))
def init(name: str, folder: Path) -> None:
    """Write a commented build.yaml and train.yaml, or what else belongs to a recipe.

    They go into FOLDER, by default the current one. Existing files are not overwritten.
    """
    from ddk_cache.cli.recipes import write_recipe

    for path in write_recipe(folder, name):
        click.echo(path)


@click.command()
def recipes() -> None:
    """List the ready configurations.

    `ddk-cache init --from NAME` writes one of them.
    """
    from ddk_cache.cli.recipes import read_recipes

    available = read_recipes()
    width = max(map(len, available))
    for name, recipe in available.items():
        click.echo(f"{name:{width}}  {recipe.about}")


@click.command()
@click.argument("name", metavar="build|generate|rounds|train")
def schema(name: str) -> None:
    """Print the JSON schema of a configuration.

    Editors can validate and complete a YAML file with it.
    """
    from ddk_cache.util.configuration import stage_configurations

    configurations = stage_configurations()
    if name not in configurations:
        raise click.UsageError(f"{name}: must be one of {', '.join(configurations)}")
    click.echo(json.dumps(configurations[name].model_json_schema(), indent=2, ensure_ascii=False))


@click.command()
@click.argument("cache", required=False)
def doctor(cache: str | None) -> None:
    """Print versions and hardware for a bug report.

    With CACHE, a folder or URL, also print whether it can be read.
    """
    from ddk_cache.cli.doctor import facts

    for name, value in facts(cache):
        click.echo(f"{name:14} {value}")


@click.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--documents", is_flag=True, help="Print one line of JSON per document, with its perplexity.")
@click.option(
    "--student", help="Print whether this model, a folder or hub id, can be trained from the cache."
)
def info(cache: str, as_json: bool, documents: bool, student: str | None) -> None:
    """Show what a cache holds, and whether it is complete.

    CACHE is a folder or URL. The table has rows, tokens and bytes by domain and split. An option prints
    something else instead.
    """
    from ddk_cache.cache import info as inspection
    from ddk_cache.cache.reader import open_cache

    if as_json + documents + (student is not None) > 1:
        raise click.UsageError("--json, --documents and --student exclude each other: choose one of them")
    if documents:
        for document in inspection.documents(cache):
            click.echo(json.dumps(document))
        return
    if student is not None:
        for stage in entry_points(group="ddk_cache.students"):
            click.echo(stage.load()(open_cache(cache), student))
        return
    facts = inspection.info(cache)
    click.echo(json.dumps(facts, indent=2) if as_json else inspection.as_text(facts))


@click.command()
@click.argument("path")
@click.pass_context
def verify(ctx: click.Context, path: str) -> None:
    """Check every byte of a cache or a training run.

    PATH is the folder or URL of a cache, or the folder of a run. Names each damaged or missing shard,
    checkpoint and file, and exits with 1 if there is any. A damaged shard is marked as unfinished: the next
    build writes only that shard again.
    """
    from ddk_cache.errors import counted, printable

    problems = 0
    for problem in _problems(path):
        problems += 1
        click.echo(printable(problem))
    click.echo(f"{path}: {counted(problems, 'problem') if problems else 'every byte is as it was written'}")
    ctx.exit(1 if problems else 0)


def _problems(path: str) -> Iterator[str]:
    """Yield the problems of what is at ``path``: something that a stage knows, or else a cache."""
    from ddk_cache.cache import info as inspection
    from ddk_cache.cache import verify as verification
    from ddk_cache.util.progress import meter

    for point in entry_points(group="ddk_cache.verify"):
        problems: Iterator[str] | None = point.load()(path)
        if problems is not None:
            yield from problems
            return
    with meter("verify", "bytes", inspection.info(path)["bytes"]) as work:
        for problem in verification.verify(path, work.advance, os.cpu_count() or 1):
            yield str(problem)


@click.command()
@click.argument("cache")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--format", "form", type=click.Choice(["axolotl", "distillkit", "parquet"]), required=True)
@click.option("--domain", "domains", multiple=True, help="Export only this domain; may be repeated.")
@click.option("--rows", type=click.IntRange(min=1), help="Export at most the first ROWS of each domain.")
@click.option("--dry-run", is_flag=True, help="Print the expected size and write nothing.")
@click.option("--allow-incomplete", is_flag=True, help="Use the finished part of an incomplete cache.")
def export(cache: str, out: Path, dry_run: bool, allow_incomplete: bool, **selection: Any) -> None:
    """Write training rows for another trainer.

    The rows of CACHE go into the folder OUT as parquet files; docs/export.md describes the columns. Run it
    again after an interruption: it resumes.
    """
    from ddk_cache.cache.reader import open_cache
    from ddk_cache.export.writer import Export, as_text
    from ddk_cache.util.progress import meter

    work = Export(open_cache(cache, allow_incomplete=allow_incomplete), out, **selection)
    click.echo(as_text(work.forecast()))
    if dry_run:
        return
    with meter("export", "rows", sum(work.rows.values())) as progress:
        for count in work.write():
            progress.advance(count)


@click.command()
@click.argument("folder", metavar="PATH", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--public", is_flag=True, help="Make a new repository public; by default it is private.")
def push(folder: Path, repository: str, public: bool) -> None:
    """Upload a cache, or the student of a training run, to the Hugging Face hub.

    PATH is a complete cache, which goes to the data set REPO (OWNER/NAME), or the folder of a finished run,
    whose student goes to the model REPO without checkpoints, logs and configuration. Others then open the
    cache as hf://OWNER/NAME.
    """
    from ddk_cache.cache.metadata import read_manifest
    from ddk_cache.cache.reader import open_cache
    from ddk_cache.errors import ConfigError
    from ddk_cache.storage import hub
    from ddk_cache.storage.storage import Storage

    if read_manifest(Storage(str(folder))) is not None:
        open_cache(folder)  # refuses an incomplete one
        kind, left_out = "dataset", [".*", "*#*", "ddk.lock"]
    elif any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        kind, left_out = (
            "model",
            [".*", "*/*", "*.jsonl", "*.yaml", "run.json", "report.html", "SHA256SUMS", "ddk.lock"],
        )
    else:
        raise ConfigError(f"{folder}: holds neither a cache nor the student of a finished run")
    click.echo(hub.push(folder, repository, kind, public=public, left_out=left_out))


@click.command()
@configured("ddk_cache.cli.rounds:RoundsConfig")
@click.option("--dry-run", is_flag=True, help="Check the keys of all parts; run nothing.")
def rounds(config: "RoundsConfig", dry_run: bool) -> None:
    """Distil on text that the student writes, in rounds; CONFIG is a YAML file.

    In each round the student writes completions (`generate`), the teacher scores them (`build`), and the
    student is trained on them (`train`). Run it again after an interruption: it resumes.
    """
    from ddk_cache.cli.rounds import check, parts
    from ddk_cache.cli.rounds import run as run_rounds

    if dry_run:
        check(config)
        for part in parts(config):
            click.echo(f"ddk-cache {part.command} {part.file}")
        return
    click.echo(run_rounds(config, lambda line: click.secho(line, err=True, bold=True)))


@click.command()
@click.argument("source", metavar="CACHE|build.yaml")
@click.option("--domain", help="Show this domain only.")
@click.option("--row", type=click.IntRange(min=0), default=0, show_default=True, help="Row to show.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page instead.")
def show(source: str, domain: str | None, row: int, html: Path | None) -> None:
    """Show decoded rows: documents, loss, special tokens.

    Of a cache it also shows each label's probability and the teacher's best tokens; of a build's
    configuration, what will be tokenised. Neither needs an engine.
    """
    from rich.console import Console

    from ddk_cache.cli.show import as_page, print_row, read_rows
    from ddk_cache.util.durable import write

    rows = list(read_rows(source, domain, row))
    if html is not None:
        write(html, as_page(rows))
        click.echo(html)
        return
    console = Console()
    for shown in rows:
        print_row(shown, console)


COMMANDS = (doctor, export, info, init, push, recipes, rounds, schema, show, verify)
