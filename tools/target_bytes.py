"""Bytes and entries a token of a study's targets, from caches built for it of a small world's text.

    python tools/target_bytes.py tools/studies/caching.yaml tools/studies/small.world.yaml

Bytes are those of the train splits as ``ddk-cache info`` has them, without the codec's tables, which a cache
has once. A choice that no build makes, a prototype of tools/online_kd.py, has entries alone.
"""

import json
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from online_kd import Study
from rich.console import Console
from rich.table import Table
from teacher_in_the_loop import Choice, Teacher, entries, load_frozen
from world import build_config, read_world

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_cache import open_cache
from ddk_cache.configuration import load
from ddk_cache.inspection import info

READ = 16  # rows of each domain whose entries are counted


def stored(config: BuildConfig) -> float:
    """Build a cache and return its train splits' bytes a token."""
    build_cache(config)
    splits = [domain["train"] for domain in info(config.cache)["domains"].values()]
    return sum(split["bytes"] for split in splits) / sum(split["tokens"] for split in splits)


def counted(choice: Choice, teacher: Teacher) -> float:
    """Mean number of entries a position."""
    rows = [min(READ, len(teacher.cache[name].train)) for name in teacher.cache.domains]
    domain, row = np.repeat(np.arange(len(rows)), rows), np.concatenate([np.arange(n) for n in rows])
    batch, logits = teacher.read(domain, row)
    offsets = teacher.cached_offsets(domain, row, batch)
    ids = entries(choice, logits, batch.labels, offsets, torch.Generator().manual_seed(0))[0]
    return float((ids >= 0).sum(-1).double().mean())


@click.command(help=__doc__)
@click.argument("study", type=click.Path(dir_okay=False))
@click.argument("world", type=click.Path(dir_okay=False))
@click.option("--tokens", default=20_000, show_default=True, help="Of each domain in the caches.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/target_bytes.json"))
def main(study: str, world: str, tokens: int, output: Path) -> None:
    described, small = load(study, [], Study), read_world(world)
    first = next(iter(described.choices.values()))
    config = described.config(first, described.seeds[0])
    cache = open_cache(config.cache)
    teacher = Teacher(load_frozen(described.teacher, config, cache), cache, 2**30)
    found: dict[str, dict[str, float]] = {}
    sizes: dict[str, float] = {}
    table = Table("", "entries a token", "bytes a token", box=None)
    for name, choice in described.choices.items():
        if not described.config(choice, described.seeds[0]).uses_teacher:
            continue
        found[name] = {"entries": counted(choice, teacher)}
        if choice.target is not None and choice.draws in ("cached", "fresh") and not choice.head:
            target = choice.target.model_dump(exclude_unset=True) | {"kind": choice.target.kind}
            key = json.dumps(target, sort_keys=True)
            if key not in sizes:
                with tempfile.TemporaryDirectory() as folder:
                    build = build_config(small, f"{folder}/cache", target)
                    domains = {
                        domain: source.model_copy(update={"max_tokens": tokens})
                        for domain, source in build.domains.items()
                    }
                    sizes[key] = stored(build.model_copy(update={"domains": domains}))
            found[name]["bytes"] = sizes[key]
        cells = (
            f"{found[name][figure]:.1f}" if figure in found[name] else "" for figure in ("entries", "bytes")
        )
        table.add_row(name, *cells)
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
