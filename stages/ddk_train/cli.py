"""The commands of stage two. Heavy imports stand inside, so that ``ddk-cache --help`` answers at once."""

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: key.sub=value.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in output_dir.")
def train(config: str, overrides: tuple[str, ...], resume: bool) -> None:
    """Train a student from a cache, as CONFIG (YAML) says."""
    from ddk_cache.configuration import load
    from ddk_train.config import TrainConfig

    settings = load(config, overrides, TrainConfig)

    from ddk_train.errors import Stopped, TrainingError
    from ddk_train.train import train as run

    try:
        run(settings, resume=resume)
    except Stopped as stopped:
        raise click.exceptions.Exit(stopped.exit_code) from stopped
    except TrainingError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(run_dir: Path) -> None:
    """Write one HTML page of plots and tables about the run in RUN_DIR."""
    from ddk_train.report import write_report

    click.echo(write_report(run_dir))
