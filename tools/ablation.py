"""The paper's comparisons on the demo's cache, small: what the sampling and the KL term bring.

    make demo && python tools/ablation.py

Every variant starts from the same student, draws from the same cache and sees the same number of tokens;
only what its name says differs. A run of this size (some 30,000 tokens, 106M weights) shows the direction at
best: with ``--seeds 3`` look at the spread before believing a difference.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click

DEMO = Path("runs/demo")
COMMAND = Path(sys.executable).with_name("ddk-cache")
# What differs from the demo's train.yaml (ddk, smoothing 0.5, gamma 0.2), and the paper's name for it.
VARIANTS: dict[str, list[str]] = {
    "ddk": [],  # DDK
    "no-smoothing": ["smoothing=null"],  # DDK (w/o FS)
    "uniform": ["strategy=uniform"],  # DDK (ES)
    "proportional": ["strategy=proportional"],  # KD
    "no-teacher": ["strategy=proportional", "gamma=0"],  # CPT
}


def train(name: str, changes: list[str], seed: int, steps: int | None, folder: Path) -> dict[str, Any]:
    """Train one variant; returns the last line of its discrepancy.jsonl."""
    output = folder / f"{name}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    settings = [*changes, f"seed={seed}", f"output_dir={output}"]
    settings += [f"max_steps={steps}"] if steps else []
    overrides = [word for setting in settings for word in ("--set", setting)]
    subprocess.run([COMMAND, "train", DEMO / "train.yaml", *overrides], check=True)
    lines = (output / "discrepancy.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    return last


def ratios(lines: list[dict[str, Any]]) -> list[float]:
    """Student / teacher perplexity, the mean of the domains, for each seed."""
    return [
        fmean(line["student_ppl"][name] / line["teacher_ppl"][name] for name in line["factor"])
        for line in lines
    ]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Perplexity by domain and the mean ratio, means over the seeds, and the ratio's spread."""
    domains = list(next(iter(found.values()))[0]["factor"])
    rows = [f"{'perplexity':<14}" + "".join(f"{name:>12}" for name in domains) + f"{'mean ratio':>14}"]
    for variant, lines in found.items():
        cells = [fmean(line["student_ppl"][name] for line in lines) for name in domains]
        mean = ratios(lines)
        spread = f" ± {stdev(mean):.3f}" if len(mean) > 1 else ""
        rows.append(
            f"{variant:<14}" + "".join(f"{cell:>12.2f}" for cell in cells) + f"{fmean(mean):>14.3f}{spread}"
        )
    teacher = next(iter(found.values()))[0]["teacher_ppl"]
    rows.append(f"{'teacher':<14}" + "".join(f"{teacher[name]:>12.2f}" for name in domains) + f"{1:>14.3f}")
    return "\n".join(rows)


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs of each variant.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps; default: the demo's.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/ablation.json"))
def main(seeds: int, steps: int | None, folder: Path, output: Path) -> None:
    """Train every variant from the demo's cache and compare."""
    if not (DEMO / "train.yaml").exists():
        raise click.ClickException(f"there is no {DEMO / 'train.yaml'}: run `make demo` first")
    found: dict[str, list[dict[str, Any]]] = {}
    for variant, changes in VARIANTS.items():
        click.secho(f"\n== {variant}: {', '.join(changes) or 'as in the demo'}", bold=True)
        found[variant] = [train(variant, changes, seed, steps, folder) for seed in range(seeds)]
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        name: {"changes": VARIANTS[name], "ratio": ratios(lines), "last": lines}
        for name, lines in found.items()
    }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(f"\n{table(found)}\n\nfigures: {output}")


if __name__ == "__main__":
    main()
