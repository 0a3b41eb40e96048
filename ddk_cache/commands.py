"""Commands for the first hour and for other trainers. Heavy imports stand inside."""

import json
from pathlib import Path

import click


@click.command()
@click.option("--from", "name", default="start", show_default=True, help="A recipe; ddk-cache recipes lists.")
@click.argument("folder", default=".", type=click.Path(exists=True, file_okay=False, path_type=Path))
def init(name: str, folder: Path) -> None:
    """Write a commented build.yaml and train.yaml into FOLDER (here, if none is named) to begin with."""
    from ddk_cache import start

    for path in start.init(folder, name):
        click.echo(path)


@click.command()
def recipes() -> None:
    """List the recipes that come with the package; `init --from NAME` takes one."""
    from ddk_cache import start

    found = start.recipes()
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


COMMANDS = (init, recipes, schema, doctor)
