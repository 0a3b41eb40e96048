"""What several commands have in common."""

import functools
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any

import click

from ddk_cache.errors import ConfigError
from ddk_cache.util.packages import require


def configured(
    *names: str, needs: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add CONFIG and --set to a command, and pass it the validated configuration.

    Parameters
    ----------
    names
        Of the ``CommandConfig``, such as ``"ddk_build.config:BuildConfig"``; imported when the command runs.
        Of several the file's keys decide; the first one if they fit no other.
    needs
        The arguments of ``require``, which is called once the configuration is right.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_configuration(config: str, overrides: tuple[str, ...], **options: Any) -> None:
            from ddk_cache.util.configuration import has_keys_of

            first, *others = map(resolve_name, names)
            model = next((other for other in others if has_keys_of(config, other)), first)
            settings = model.from_yaml(config, overrides)
            if needs:
                require(*needs)
            try:
                command(settings, **options)
            except ConfigError as error:
                if not str(error).startswith("--"):  # an option is not in the file
                    error.args = (f"{config}: {error}",)
                raise

        set_option = click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY.SUB=VALUE",
            help="Change a key of the configuration.",
        )
        return click.argument("config", type=click.Path(dir_okay=False))(set_option(with_configuration))

    return decorate
