"""Torture small commands: failing calls, power cuts, kills; builds also by a second builder and damage.

``python -m tools.torture --seconds 600`` gives each kind ten minutes. It prints the seed and every failure,
and exits with 1 if there is one. docs/reliability.md has the counts.
"""

import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click

from tools.frame import show
from tools.torture import documents, faults, fuzz, interleavings, kills, power, two_builders
from tools.torture.subject import quiet
from tools.torture.subjects import BUILDS, IN_PROCESSES, SUBJECTS, TRAININGS, make_subject

Torture = Callable[[Any, int, float], tuple[Mapping[str, int], list[str]]]
OF_ALL: dict[str, Torture] = {
    "files": faults.torture,
    "chains": partial(faults.torture, chained=True),
    "power": power.torture,
    "kills": kills.torture,
}
OF_BUILDS: dict[str, Torture] = {
    "requests": partial(faults.torture, in_bucket=True),
    "request-chains": partial(faults.torture, in_bucket=True, chained=True),
    "builders": two_builders.torture,
    "interleavings": partial(interleavings.torture, faults=1, beats=1),
    "damage": fuzz.torture,
    "bits": fuzz.torture_bits,
}
OF_TRAINING: dict[str, Torture] = {"documents": documents.torture}
KINDS = OF_ALL | OF_BUILDS | OF_TRAINING


def is_possible(kind: str, name: str) -> bool:
    """Return whether a command can be put to a kind of torture."""
    if name in IN_PROCESSES:  # whose calls are not this process's
        return kind == "kills"
    return kind in OF_ALL or name in (BUILDS if kind in OF_BUILDS else TRAININGS)


@click.command()
@click.argument("kinds", nargs=-1, type=click.Choice(list(KINDS)))
@click.option(
    "--of", "names", multiple=True, type=click.Choice(list(SUBJECTS)), help="The commands; by default all."
)
@click.option("--seconds", default=60.0, show_default=True, help="Time for each kind.")
@click.option("--seed", type=int, help="Of the random choices; by default another one in every run.")
def main(kinds: tuple[str, ...], names: tuple[str, ...], seconds: float, seed: int | None) -> None:
    """Torture small commands in all KINDS or the named ones."""
    seed = secrets.randbits(32) if seed is None else seed
    click.echo(f"seed {seed}")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # an fsync takes no time there
    rows, failed = [], False
    with tempfile.TemporaryDirectory(dir=memory) as folder, quiet():
        for name, kind in product(names or SUBJECTS, kinds or KINDS):
            if not is_possible(kind, name):
                continue
            counts, failures = KINDS[kind](make_subject(name, Path(folder)), seed, seconds)
            for failure in failures:
                click.echo(f"FAILED {name} {kind}: {failure}")
            others = (f"{count:,} {name}" for name, count in counts.items() if name != "trials")
            rows.append((f"{name} {kind}", ", ".join(others), counts["trials"], len(failures)))
            failed = failed or bool(failures)
    show("torture", ("kind", "of them", "trials", "failures"), rows, labels=2)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
