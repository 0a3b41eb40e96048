"""The ``ddk-cache`` command. The stages join it by the entry point ``ddk_cache.stages``."""

import json
import logging
import os
import sys
import warnings
from importlib.metadata import entry_points

import click

from ddk_cache.commands import COMMANDS
from ddk_cache.errors import CacheError, ConfigError, counted, printable

# Bars that libraries draw while they load: in a log they would be control characters.
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


class Commands(click.Group):
    """The library's own commands and, loaded when they are named, those of the installed stages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *entry_points(group="ddk_cache.stages").names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for stage in entry_points(group="ddk_cache.stages", name=cmd_name):
            command: click.Command = stage.load()
            return command
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            there = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"{error.message} There are {there}.", ctx) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk-cache")
def commands() -> None:
    """Knowledge distillation in two stages, with a cache between them.

    `build` runs the teacher once over a corpus and keeps what it said; `train` makes a student from that.
    Any command takes --debug: show the traceback of an error.
    """


for command in COMMANDS:
    commands.add_command(command)


@commands.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Everything, for a script.")
@click.option("--documents", is_flag=True, help="Each document's perplexity instead, a line of JSON each.")
def info(cache: str, as_json: bool, documents: bool) -> None:
    """What CACHE (a folder or URL) holds, by domain and split, and how complete it is."""
    from ddk_cache import inspection

    if documents:
        for document in inspection.documents(cache):
            click.echo(json.dumps(document))
        return
    found = inspection.info(cache)
    click.echo(json.dumps(found, indent=2) if as_json else inspection.as_text(found))


@commands.command()
@click.argument("cache")
@click.pass_context
def verify(ctx: click.Context, cache: str) -> None:
    """Read every byte of CACHE and name each shard that is damaged or missing; exit 1 if there is any.

    A damaged shard is marked as unfinished, so that the next build does just that one again.
    """
    from ddk_cache import inspection, verification
    from ddk_cache.progress import meter

    total = inspection.info(cache)["bytes"]
    problems = 0
    with meter("verify", "bytes", total) as shown:
        for problem in verification.verify(cache, shown.advance, os.cpu_count() or 1):
            problems += 1
            click.echo(printable(str(problem)))
    click.echo(f"{cache}: {counted(problems, 'problem') if problems else 'every byte is as it was written'}")
    ctx.exit(1 if problems else 0)


def main() -> None:
    """Run the command line; every foreseen error is one line on stderr and an exit code (1 or 2)."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    _keep_libraries_quiet()
    try:
        sys.exit(commands.main(arguments, standalone_mode=False))
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.ClickException, ConfigError, CacheError, OSError) as error:
        if debug:
            raise
        _say(_message(error))
        sys.exit(1 if isinstance(error, OSError) else error.exit_code)
    except (MemoryError, RecursionError, RuntimeError, ImportError) as error:
        if debug or not (reason := _shortage(error)):
            raise
        _say(f"{reason}: {error}" if str(error) else reason)
        sys.exit(1)


def _say(message: str) -> None:
    """One line on stderr; of several processes every one says its own, all but the first with its number."""
    rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "0"
    whose = "" if rank == "0" else f"[rank {rank}] "
    click.echo(f"Error: {whose}{printable(' '.join(message.split()))}", err=True)


def _shortage(error: Exception) -> str | None:
    """What this machine has too little of; None where the error is another."""
    if isinstance(error, RecursionError):
        return "something is nested too deep"
    text = str(error)
    short = ("llocate memory", "can't start new thread", "failed to map segment", "out of memory")
    return "out of memory" if isinstance(error, MemoryError) or any(part in text for part in short) else None


def _keep_libraries_quiet() -> None:
    """Leave stderr to what a user can act upon; whoever sets these variables decides otherwise."""
    if not sys.stderr.isatty():
        for bar in BARS:
            os.environ.setdefault(bar, "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    # peft imports it where it is installed, and it misses kernels for 4-bit weights, which nothing here has.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:  # python -W, PYTHONWARNINGS
        warnings.simplefilter("ignore", FutureWarning)  # what libraries say of each other


def _message(error: click.ClickException | ConfigError | CacheError | OSError) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
