"""Run every benchmark, tools/bench_*.py, each in a process of its own; each leaves one JSON file.

python tools/bench.py                # all of them
python tools/bench.py loss           # one
"""

import subprocess
import sys
import time
from pathlib import Path

import click

BENCHMARKS = {
    path.stem.removeprefix("bench_"): path for path in sorted(Path(__file__).parent.glob("bench_*.py"))
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*BENCHMARKS]))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench_results"), show_default=True)
def main(names: tuple[str, ...], folder: Path) -> None:
    """Run the benchmarks NAMES, or all, and say where their figures are; exit code 1 if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    for name in names or BENCHMARKS:
        click.secho(f"\n== {name}", bold=True)
        output, began = folder / f"{name}.json", time.monotonic()
        done = subprocess.run([sys.executable, BENCHMARKS[name], "--output", output], check=False)
        failed |= done.returncode != 0
        result = str(output) if done.returncode == 0 else f"failed with exit code {done.returncode}"
        rows.append(f"{name:<16}{time.monotonic() - began:>8.0f} s   {result}")
    click.secho(f"\n{'benchmark':<16}{'time':>10}   figures", bold=True)
    click.echo("\n".join(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
