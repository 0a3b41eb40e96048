"""Write docs/cli.md from the commands: ``python -m tools.docs.cli``."""

import inspect
from collections.abc import Iterator

import click

from ddk_cache.cli.main import commands
from tools.docs.checkout import ROOT, loaded

PAGE = ROOT / "docs" / "cli.md"
HEAD = """# Commands

For everyone who types: every command with its options. `--help` prints the same. Made from the program by
`python -m tools.docs.cli`.

- CONFIG is a YAML file ([Configuration](configuration.md)). `--set KEY.SUB=VALUE` changes a key for one run;
  it can be repeated, and values are YAML.
- CACHE is a folder, or a URL: file:// s3:// gs:// az://, and hf://OWNER/NAME to read one.
- Exit code 0: done. 1: it could not be done. 2: the command line or the configuration is wrong. An error is
  one line, `Error: …`; `--debug` shows its traceback.

## Completion in the shell

Put one of these lines into the shell's start file:

```sh
eval "$(_DDK_CACHE_COMPLETE=bash_source ddk-cache)"    # ~/.bashrc (bash 4.4 or later)
eval "$(_DDK_CACHE_COMPLETE=zsh_source ddk-cache)"     # ~/.zshrc
_DDK_CACHE_COMPLETE=fish_source ddk-cache | source     # ~/.config/fish/config.fish
```
"""


def page() -> str:
    """Return the whole page."""
    group = click.Context(commands, info_name="ddk-cache")
    parts = ("\n".join(_section(name, command, group)) for name, command in all_commands().items())
    return "\n\n".join([HEAD.rstrip(), *parts]) + "\n"


def all_commands() -> dict[str, click.Command]:
    """Return the commands by name: the library's, and those of the stages."""
    return dict(sorted((dict(commands.commands) | loaded("ddk_cache.stages")).items()))


def _section(name: str, command: click.Command, group: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=group)
    yield from (f"## {name}", "", "```text")
    yield command.get_usage(context).removeprefix("Usage: ")
    yield from ("```", "", inspect.cleandoc(command.help or ""))
    records = (
        option.get_help_record(context) for option in command.params if option.param_type_name == "option"
    )
    options = list(filter(None, records))
    if options:
        yield ""
    yield from (f"- `{names}`: {' '.join(text.split())}" for names, text in options)


@click.command(help=__doc__)
def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
