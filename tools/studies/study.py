"""Compare ways to train: every variant of a study's YAML, once for each seed, then tables and a report.

    python -m tools.studies.study tools/studies/configs/small-a.yaml    # run what is missing, then the tables
    python -m tools.studies.study tools/studies/configs/small-a.yaml --dry-run

A finished run is skipped; a killed one resumes from its checkpoint, or starts again. Two processes on the
same study share its runs. All runs of a seed start from the same student and draw with the same seed, so
differences to the control are taken seed by seed.

In the study's ``folder``: a folder of ``ddk-cache train`` for each run, ``<variant>-<seed>``, ``report.html``
(the first seed's runs over each other), ``results.md``, ``differences.svg`` and ``shares.svg``. The figures
go to ``bench_results/<name>.json``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import click
from filelock import FileLock, Timeout
from pydantic import Field, model_validator

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_cache.util.configuration import Config, load
from ddk_train.config import TrainConfig
from ddk_train.report.page import write_report
from ddk_train.report.run_files import read_run
from tools.studies.plots import draw
from tools.studies.tables import figures, markdown
from tools.studies.world import World, build_config, finish, has_ended, make, make_student, read_world


class Study(Config):
    """What is compared with what."""

    folder: str = Field(description="of runs and results")
    world: str | None = Field(None, description="YAML of tools/studies/world.py, beside the study's")
    caches: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by name. With a world: its target; else all keys of ddk-cache build"
    )
    student: str | None = Field(None, description="what every run begins with, instead of the world's")
    seeds: Annotated[int, Field(ge=1)]
    control: str = Field(description="the variant that the others are compared with")
    train: dict[str, Any] = Field(description="keys of ddk-cache train that all variants share")
    variants: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="keys that differ, by name; cache: a name of caches, else the first; student: another",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.control not in self.variants:
            raise ValueError(f"control: must be one of {', '.join(self.variants)}")
        if self.world is None and self.student is None:
            raise ValueError("give world or student")
        for name, changes in self.variants.items():
            if changes.get("cache", next(iter(self.caches))) not in self.caches:
                raise ValueError(f"variants.{name}.cache: must be one of {', '.join(self.caches)}")
        return self


@dataclass(frozen=True)
class Plan:
    """A study with its paths worked out."""

    study: Study
    path: Path
    """Of the YAML."""

    @property
    def folder(self) -> Path:
        return Path(self.study.folder)

    @property
    def world(self) -> World | None:
        return read_world(self.path.parent / self.study.world) if self.study.world else None

    def builds(self) -> Iterator[BuildConfig]:
        """Yield a build for each cache."""
        for name, keys in self.study.caches.items():
            if world := self.world:
                yield build_config(world, self.cache(name), keys)
            else:
                yield BuildConfig.model_validate({**keys, "cache": str(self.cache(name))})

    def cache(self, name: str) -> Path:
        """Return a cache's folder; a world's caches are shared by all its studies."""
        return (self.world.root if self.world else self.folder) / f"cache-{name}"

    def runs(self, student: str) -> Iterator[tuple[str, TrainConfig]]:
        """Yield every run, seed by seed, with its variant; ``student`` may name the seed as ``{seed}``."""
        for seed in range(self.study.seeds):
            for variant, changes in self.study.variants.items():
                given = {
                    "student": student.format(seed=seed),
                    "output_dir": str(self.folder / f"{variant.replace(' ', '-')}-{seed}"),
                    "seed": seed,
                }
                keys = {**given, **self.study.train, **changes}
                keys["cache"] = str(self.cache(changes.get("cache", next(iter(self.study.caches)))))
                yield variant, TrainConfig.model_validate(keys)


def students(plan: Plan, *, dry_run: bool) -> str:
    """Make the students and everything they need; return the pattern that ``Plan.runs`` takes."""
    world, given = plan.world, plan.study.student
    if world is not None and not dry_run:
        make(world)
    if given is not None:
        return given
    assert world is not None
    if not dry_run:
        for seed in range(plan.study.seeds):
            make_student(world, seed)
    return str(world.root / "student-{seed}")


def run_all(plan: Plan, student: str) -> None:
    """Train every run that has not ended and that no other process works on."""
    for variant, config in plan.runs(student):
        try:
            with FileLock(f"{config.output_dir}.lock", timeout=0):
                click.secho(f"{variant}, seed {config.seed}", bold=True)
                finish(config)
        except Timeout:
            click.echo(f"{variant}, seed {config.seed}: skipped, another process trains it")


def tabulate(plan: Plan, student: str) -> str:
    """Write the results of the runs that have ended, and return them as Markdown."""
    ended = [
        (variant, config) for variant, config in plan.runs(student) if has_ended(Path(config.output_dir))
    ]
    if not ended:
        raise click.ClickException(f"{plan.folder}: no run has ended yet")
    runs: dict[str, dict[int, Any]] = {}
    for variant, config in ended:
        runs.setdefault(variant, {})[config.seed] = read_run(Path(config.output_dir))
    first = [Path(config.output_dir) for _, config in ended if config.seed == ended[0][1].seed]
    write_report(first, plan.folder / "report.html")
    numbers = figures(runs, plan.study.control)
    output = Path("bench_results") / f"{plan.path.stem}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    draw(numbers, plan.folder)
    text: str = markdown(numbers, plan.study.control)
    (plan.folder / "results.md").write_text(text, encoding="utf-8")
    return text


@click.command()
@click.argument("study", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check every configuration and say what would be run.")
@click.option("--tables", is_flag=True, help="Run nothing; tabulate what has ended.")
def main(study: Path, dry_run: bool, tables: bool) -> None:
    """Run the study of STUDY.yaml and write its tables."""
    plan = Plan(load(study, [], Study), study)
    student = students(plan, dry_run=dry_run or tables)
    runs = list(plan.runs(student))
    builds = list(plan.builds())
    if dry_run:
        for variant, config in runs:
            click.echo(f"{variant}, seed {config.seed}: {config.output_dir}")
        click.echo(f"{len(builds)} caches, {len(runs)} runs")
        return
    if not tables:
        plan.folder.mkdir(parents=True, exist_ok=True)
        for build in builds:
            with FileLock(f"{build.cache}.lock"):  # another process may be at it
                build_cache(build)
        run_all(plan, student)
    click.echo(tabulate(plan, student))


if __name__ == "__main__":
    main()
