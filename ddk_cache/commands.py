"""Commands for the first hour and for other trainers. Heavy imports stand inside."""

import json
from pathlib import Path

import click


@click.command()
@click.option("--from", "name", default="start", show_default=True, help="A recipe; ddk-cache recipes lists.")
@click.argument("folder", default=".", type=click.Path(file_okay=False, path_type=Path))
def init(name: str, folder: Path) -> None:
    """Write a commented build.yaml and train.yaml into FOLDER (here, if none is named; it may be new)."""
    from ddk_cache.recipes import write_recipe

    for path in write_recipe(folder, name):
        click.echo(path)


@click.command()
def recipes() -> None:
    """List the recipes that come with the package; `init --from NAME` takes one."""
    from ddk_cache.recipes import read_recipes

    found = read_recipes()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        click.echo(f"{recipe.name:{width}}  {recipe.about}")


@click.command()
@click.argument("name", metavar="build|train")
def schema(name: str) -> None:
    """Print the JSON schema of the build's or the training's configuration, for editors that check YAML."""
    from ddk_cache import schema as schemas

    if name not in schemas.names():
        raise click.UsageError(f"{name}: must be one of {', '.join(schemas.names())}")
    click.echo(json.dumps(schemas.schema(name), indent=2, ensure_ascii=False))


@click.command()
@click.argument("cache", required=False)
def doctor(cache: str | None) -> None:
    """Print what belongs into a bug report; with CACHE (a folder or URL) try whether it can be read."""
    from ddk_cache.doctor import facts

    for name, value in facts(cache):
        click.echo(f"{name:14} {value}")


@click.command()
@click.argument("cache")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--format", "form", type=click.Choice(["axolotl", "distillkit", "parquet"]), required=True)
@click.option("--domain", "domains", multiple=True, help="Only this one; may be given more than once.")
@click.option("--rows", type=click.IntRange(min=1), help="At most so many of each domain, its first.")
@click.option("--dry-run", is_flag=True, help="Say how large it will be, and write nothing.")
@click.option("--allow-incomplete", is_flag=True, help="Take what an unfinished cache holds.")
def export(
    cache: str,
    out: Path,
    form: str,
    domains: tuple[str, ...],
    rows: int | None,
    dry_run: bool,
    allow_incomplete: bool,
) -> None:
    """Write CACHE's training rows to the folder OUT as parquet files that another trainer reads.

    Run again after an interruption: it goes on where it was. docs/export.md says what the columns hold.
    """
    from ddk_cache.export import Export, as_text
    from ddk_cache.progress import meter
    from ddk_cache.reader import open_cache

    work = Export(open_cache(cache, allow_incomplete=allow_incomplete), out, form, domains, rows)
    click.echo(as_text(work.forecast()))
    if dry_run:
        return
    with meter("export", "rows", sum(work.rows.values())) as shown:
        for count in work.write():
            shown.advance(count)


COMMANDS = (export, init, recipes, schema, doctor)
