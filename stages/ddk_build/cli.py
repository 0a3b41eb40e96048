"""The commands of stage one."""

import json

import click

config_argument = click.argument("config", type=click.Path(dir_okay=False))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Change a key of the configuration."
)


@click.command()
@config_argument
@set_option
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Let a Ray cluster do the work, the one that RAY_ADDRESS names or else this machine. "
    "Every machine writes to the cache: it must be an object store or a folder that all of them see.",
)
@click.option(
    "--num-engines",
    type=click.IntRange(min=1),
    help="With --ray: how many engines; by default as many as the cluster's GPUs allow, 1 without GPUs.",
)
@click.option("--tokens-only", is_flag=True, help="Tokenise and pack alone; needs neither engine nor GPU.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing.")
def build(
    config: str,
    overrides: tuple[str, ...],
    on_ray: bool,
    num_engines: int | None,
    tokens_only: bool,
    dry_run: bool,
) -> None:
    """Run the teacher over the corpus of CONFIG once and keep what it says.

    Run again after any interruption: it goes on where it was.
    """
    from ddk_build import dry_run as dry
    from ddk_build.build import build_cache
    from ddk_build.config import BuildConfig
    from ddk_build.interrupt import Stopped, stopping
    from ddk_build.scale_out import gpus_per_engine, joined_cluster
    from ddk_cache.configuration import load

    if num_engines is not None and not on_ray:
        raise click.UsageError("--num-engines: needs --ray")
    loaded = load(config, overrides, BuildConfig)
    if dry_run:
        click.echo(dry.dry_run(loaded, is_here=not (on_ray or tokens_only)), nl=False)
        return
    try:
        if on_ray:
            largest = max(loaded.teachers, key=gpus_per_engine)
            with joined_cluster(largest, num_engines) as cluster, stopping():
                build_cache(loaded, cluster, tokens_only=tokens_only, report=click.echo)
        else:
            with stopping():
                build_cache(loaded, tokens_only=tokens_only, report=click.echo)
    except Stopped as stopped:
        click.echo(stopped, err=True)
        raise click.exceptions.Exit(stopped.exit_code) from stopped


@click.command()
@config_argument
@set_option
@click.option("--json", "as_json", is_flag=True, help="Everything, for a script.")
@click.option("--probe", is_flag=True, help="Let the teacher read a few rows: real bytes a token, and hours.")
def estimate(config: str, overrides: tuple[str, ...], as_json: bool, probe: bool) -> None:
    """Rows, tokens and bytes that a build of CONFIG will make, before anything is spent."""
    from ddk_build import estimate as estimating
    from ddk_build.config import BuildConfig
    from ddk_cache.configuration import load

    found = estimating.estimate(load(config, overrides, BuildConfig), probe=probe).to_json()
    click.echo(json.dumps(found, indent=2) if as_json else estimating.as_text(found))
