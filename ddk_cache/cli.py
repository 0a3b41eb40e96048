"""The ``ddk-cache`` command. The stages join it by the entry point ``ddk_cache.stages``."""

import os
import sys
from importlib.metadata import entry_points

import click

from ddk_cache.errors import CacheError, ConfigError


class Commands(click.Group):
    """The library's own commands and, loaded when they are named, those of the installed stages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *entry_points(group="ddk_cache.stages").names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for stage in entry_points(group="ddk_cache.stages", name=cmd_name):
            command: click.Command = stage.load()
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk-cache")
def commands() -> None:
    """Knowledge distillation in two stages, with a cache between them.

    `build` runs the teacher once over a corpus and keeps what it said; `train` makes a student from that.
    Any command takes --debug: show the traceback of an error.
    """


def main() -> None:
    """Run the command line; every foreseen error is one line on stderr and an exit code (1 or 2)."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        sys.exit(commands.main(arguments, standalone_mode=False))
    except click.exceptions.Abort:
        sys.exit(130)
    except (click.ClickException, ConfigError, CacheError) as error:
        if debug:
            raise
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if os.environ.get("RANK", "0") == "0":
            click.echo("Error: " + " ".join(message.split()), err=True)
        sys.exit(error.exit_code)
