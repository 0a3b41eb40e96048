"""Torture a build: failing calls, power cuts, kills, two builders at once, damaged objects.

``python -m tools.torture --seconds 600`` runs each kind for ten minutes. It prints the seed and every
failure, and exits with 1 if there is one. docs/reliability.md has the counts.
"""

import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import click

from tools.frame import show
from tools.torture import faults, fuzz, kills, power, two_builders
from tools.torture.subject import Subject, quiet

Torture = Callable[[Subject, int, float], tuple[Mapping[str, int], list[str]]]
KINDS: dict[str, Torture] = {
    "files": partial(faults.torture, in_bucket=False),
    "requests": partial(faults.torture, in_bucket=True),
    "power": power.torture,
    "kills": kills.torture,
    "builders": two_builders.torture,
    "damage": fuzz.torture,
}


@click.command()
@click.argument("kinds", nargs=-1, type=click.Choice(list(KINDS)))
@click.option("--seconds", default=60.0, show_default=True, help="Time for each kind.")
@click.option("--seed", type=int, help="Of the random choices; by default another one in every run.")
def main(kinds: tuple[str, ...], seconds: float, seed: int | None) -> None:
    """Torture a small build in all KINDS or the named ones."""
    seed = secrets.randbits(32) if seed is None else seed
    click.echo(f"seed {seed}")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # an fsync takes no time there
    rows, failed = [], False
    with tempfile.TemporaryDirectory(dir=memory) as folder, quiet():
        subject = Subject(Path(folder))
        for kind in kinds or KINDS:
            counts, failures = KINDS[kind](subject, seed, seconds)
            for failure in failures:
                click.echo(f"FAILED {kind}: {failure}")
            others = (f"{count:,} {name}" for name, count in counts.items() if name != "trials")
            rows.append((kind, ", ".join(others), counts["trials"], len(failures)))
            failed = failed or bool(failures)
    show("torture", ("kind", "of them", "trials", "failures"), rows, labels=2)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
