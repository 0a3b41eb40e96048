"""The ``ddk-cache`` command. Stages add their commands through the entry point ``ddk_cache.stages``."""

import difflib
import logging
import os
import sys
import traceback
import warnings
from importlib.metadata import entry_points

import click

from ddk_cache.cli.commands import COMMANDS
from ddk_cache.errors import CacheError, ConfigError, printable
from ddk_cache.util.interrupt import Stopped
from ddk_cache.util.progress import LINE_SECONDS, Callback, lines, shown_by

MOST_CHARACTERS = 1_000  # of an error's message
# Progress bars that libraries draw while loading; in a log they would be control characters.
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


class Commands(click.Group):
    """The library's own commands, and those of the installed stages, which are loaded when used."""

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
            names = self.list_commands(ctx)
            near = difflib.get_close_matches(args[0], names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The commands are {', '.join(names)}."
            raise click.UsageError(f"No such command {args[0]!r}. {hint}", ctx) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddk-cache")
def commands() -> None:
    """Knowledge distillation in two stages with a cache between them.

    `build` runs the teacher once over a corpus and stores its predictions; `train` trains a student from
    them. Every command takes --debug, which shows the traceback of an error.
    """


for command in COMMANDS:
    commands.add_command(command)


def main() -> None:
    """Run the command line: an expected error is one line on stderr and exit code 1 or 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    _quiet_libraries()
    try:
        with shown_by(on_stderr()):
            sys.exit(commands.main(arguments, standalone_mode=False))
    except click.exceptions.Abort:
        sys.exit(130)
    except Stopped as stopped:
        click.echo(stopped, err=True)
        sys.exit(stopped.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.ClickException, ConfigError, CacheError, OSError) as error:
        if debug:
            traceback.print_exception(error)
        else:
            _print_error(_message(error))
        sys.exit(1 if isinstance(error, OSError) else error.exit_code)
    except (MemoryError, RecursionError, RuntimeError, ImportError) as error:
        if debug or not (reason := _shortage(error)):
            raise
        _print_error(f"{reason}: {error}" if str(error) else reason)
        sys.exit(1)


def on_stderr() -> Callback:
    """Return the display of progress: bars if stderr is a terminal, else lines."""
    if not sys.stderr.isatty():
        return lines(lambda line: click.echo(line, err=True), LINE_SECONDS)
    from ddk_cache.cli.bars import Bars

    return Bars()


def _print_error(message: str) -> None:
    """Print one line on stderr; processes of a distributed run other than the first add their rank."""
    rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "0"
    prefix = "" if rank == "0" else f"[rank {rank}] "
    message = printable(" ".join(message.split()))
    if len(message) > MOST_CHARACTERS:  # the beginning says where, the end what to do
        message = f"{message[: MOST_CHARACTERS * 3 // 4]} ... {message[-MOST_CHARACTERS // 4 :]}"
    click.echo(f"Error: {prefix}{message}", err=True)


def _shortage(error: Exception) -> str | None:
    """Return which resource is exhausted, or None for another error."""
    if isinstance(error, RecursionError):
        return "something is nested too deep"
    signs = ("llocate memory", "can't start new thread", "failed to map segment", "out of memory")
    is_memory = isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
    return "out of memory" if is_memory else None


def _quiet_libraries() -> None:
    """Keep lines off stderr that no user can act on, unless the environment asks for them."""
    if not sys.stderr.isatty():
        for bar in BARS:
            os.environ.setdefault(bar, "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    # peft imports bitsandbytes, which warns about missing kernels for 4-bit weights; none are used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:  # python -W, PYTHONWARNINGS
        warnings.simplefilter("ignore", FutureWarning)  # from libraries about each other


def _message(error: click.ClickException | ConfigError | CacheError | OSError) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
