"""The commands of stage one."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddk_cache.cli.options import configured
from ddk_cache.util.packages import require

if TYPE_CHECKING:
    from ddk_build.config import BuildConfig
    from ddk_build.generate.config import GenerateConfig


NEEDS = "build", "torch", "transformers", "datasets"  # the extra, and its packages
BUILD, GENERATE = "ddk_build.config:BuildConfig", "ddk_build.generate.config:GenerateConfig"

num_engines_option = click.option(
    "--num-engines",
    type=click.IntRange(min=1),
    help="With --ray: number of engines; by default as many as the cluster's GPUs allow, 1 without GPUs.",
)


@click.command()
@configured(BUILD, needs=NEEDS)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Build on a Ray cluster: that of RAY_ADDRESS, else this machine. Every machine writes to the "
    "cache, which must be an object store or a shared folder.",
)
@num_engines_option
@click.option("--tokens-only", is_flag=True, help="Only tokenise and pack; needs neither engine nor GPU.")
@click.option("--dry-run", is_flag=True, help="Check everything, print what would be done, write nothing.")
@click.option("--yes", is_flag=True, help="Answer again what can no longer be decoded, however much it is.")
def build(
    config: "BuildConfig", on_ray: bool, num_engines: int | None, dry_run: bool, **options: Any
) -> None:
    """Run the teacher over the corpus of CONFIG once and store its answers.

    To resume after any interruption, run the same command again.
    """
    from ddk_build.build import build_cache
    from ddk_build.capture.cluster import gpus_per_engine, joined_cluster
    from ddk_build.plan import dry_run as dry
    from ddk_cache.util.interrupt import stopping
    from ddk_cache.util.progress import logged_on_stderr

    if num_engines is not None and not on_ray:
        raise click.UsageError("--num-engines: needs --ray")
    if dry_run:
        click.echo(dry.dry_run(config, is_here=not (on_ray or options["tokens_only"])), nl=False)
        return
    with logged_on_stderr("ddk_build"), ExitStack() as stack:
        cluster = None
        if on_ray:
            largest = max(config.teachers, key=gpus_per_engine)
            cluster = stack.enter_context(joined_cluster(largest, num_engines))
        stack.enter_context(stopping())
        cache = build_cache(config, cluster, **options, report=click.echo)
    click.echo(f"{config.cache}: {cache.summary()}")
    if options["tokens_only"]:
        click.echo("next: the same command without --tokens-only, where the teacher can run")
    else:
        click.echo(f"next: ddk-cache info {config.cache}, or ddk-cache train with cache: {config.cache}")


@click.command()
@configured(BUILD, GENERATE, needs=NEEDS)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--probe",
    is_flag=True,
    help="Let the model answer a few rows, or write a few completions, to measure sizes and hours.",
)
def estimate(config: "BuildConfig | GenerateConfig", as_json: bool, probe: bool) -> None:
    """Estimate a build of CONFIG, or what generate would write, without running it."""
    from ddk_build.config import BuildConfig
    from ddk_build.generate import estimate as of_generate
    from ddk_build.plan import estimate as of_build

    if isinstance(config, BuildConfig):
        estimated, as_text = of_build.estimate(config, probe=probe).to_json(), of_build.as_text
    else:
        estimated, as_text = of_generate.estimate(config, probe=probe), of_generate.as_text
    click.echo(json.dumps(estimated, indent=2) if as_json else as_text(estimated))


@click.command()
@configured(GENERATE, needs=NEEDS)
@click.option(
    "--ray", "on_ray", is_flag=True, help="Write on a Ray cluster: that of RAY_ADDRESS, else this machine."
)
@num_engines_option
@click.option("--dry-run", is_flag=True, help="Check everything, print what would be written, write nothing.")
def generate(config: "GenerateConfig", on_ray: bool, num_engines: int | None, dry_run: bool) -> None:
    """Let a model write completions to the prompts of CONFIG, with its token ids and log-probabilities.

    A build takes the folder of a domain as its path. To resume after any interruption, run the same command
    again.
    """
    from ddk_build.capture.cluster import joined_cluster
    from ddk_build.generate import program
    from ddk_cache.util.interrupt import stopping

    if num_engines is not None and not on_ray:
        raise click.UsageError("--num-engines: needs --ray")
    if dry_run:
        click.echo(program.dry_run(config, is_here=not on_ray), nl=False)
        return
    with ExitStack() as stack:
        cluster = None
        if on_ray:
            with program.keys_of_generate():
                cluster = stack.enter_context(joined_cluster(config.writer, num_engines))
        stack.enter_context(stopping())
        program.generate(config, cluster, report=click.echo)


@click.command("import")
@click.argument("form", type=click.Choice(["distillkit"]))
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.argument("out")
@click.option("--teacher", required=True, help="Folder or hub id of the model that answered.")
@click.option("--domain", default="imported", show_default=True, help="Name of the domain in the cache.")
def import_rows(form: str, path: Path, out: str, teacher: str, domain: str) -> None:
    """Make a cache from distributions that another tool has stored.

    PATH is a parquet file, or a folder of them, with DistillKit's columns input_ids, token_ids and top_values
    (log-probabilities). OUT is the cache's folder or URL. Of the teacher only the tokenizer and the
    configuration are read. Run again after an interruption, it resumes.
    """
    require("build-transformers", "transformers")
    from ddk_build.config import TeacherConfig
    from ddk_build.imported import import_distillkit

    click.echo(
        f"{out}: {import_distillkit(path, out, TeacherConfig(model=teacher), domain=domain).as_text()}"
    )
