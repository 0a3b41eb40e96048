"""Write docs/configuration.md from the configurations: ``python -m tools.docs.configuration``."""

from pathlib import Path

import click

from ddk_cache.schema import names, reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# Configuration

Made by `python -m tools.docs.configuration` from the descriptions in the code; `ddk-cache schema build` and
`ddk-cache schema train` print the same as JSON schema. An editor with a YAML language server checks a file
as it is written, and offers its keys, when the schema is saved beside it and the file begins with a line
such as `# yaml-language-server: $schema=build.schema.json`.

`--set key.sub=value` changes a key for one run; values are YAML. Unknown keys are errors. `ddk-cache init`
writes a commented pair of files to begin with, `ddk-cache recipes` lists others.

## Completion in the shell

The command completes its own names and options. Put one of these lines into the shell's start file:

```sh
eval "$(_DDK_CACHE_COMPLETE=bash_source ddk-cache)"    # ~/.bashrc (bash 4.4 or later)
eval "$(_DDK_CACHE_COMPLETE=zsh_source ddk-cache)"     # ~/.zshrc
_DDK_CACHE_COMPLETE=fish_source ddk-cache | source     # ~/.config/fish/config.fish
```
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *map(reference, names())])


@click.command(help=__doc__)
def main() -> None:
    if names() != ["build", "train"]:
        raise click.ClickException("the stages' entry points are not installed: pip install -e . again")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
