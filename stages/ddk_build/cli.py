"""The commands of stage one."""

import click

config_argument = click.argument("config", type=click.Path(dir_okay=False))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Change a key of the configuration."
)


@click.command()
@config_argument
@set_option
def build(config: str, overrides: tuple[str, ...]) -> None:
    """Run the teacher over the corpus of CONFIG once and keep what it says.

    Run again after any interruption: it goes on where it was.
    """
    from ddk_build.build import build_cache
    from ddk_build.config import BuildConfig
    from ddk_cache.configuration import load

    build_cache(load(config, overrides, BuildConfig))
