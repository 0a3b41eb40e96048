"""Run every benchmark in this folder, each in its own process; each writes one JSON file.

python -m tools.bench                # all of them
python -m tools.bench loss           # this one
"""

import subprocess
import sys
import time
from pathlib import Path

import click

BENCHMARKS = [path.stem for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))]


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(BENCHMARKS))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench_results"), show_default=True)
def main(names: tuple[str, ...], folder: Path) -> None:
    """Run the benchmarks NAMES, or all; list their JSON files. Exit with code 1 if any failed."""
    rows, failed = [], False
    for name in names or BENCHMARKS:
        click.secho(f"\n== {name}", bold=True)
        output, began = folder / f"{name}.json", time.monotonic()
        command = [sys.executable, "-m", f"tools.bench.{name}", "--output", str(output)]
        code = subprocess.run(command, check=False).returncode
        failed |= code != 0
        result = str(output) if code == 0 else f"failed with exit code {code}"
        rows.append(f"{name:<16}{time.monotonic() - began:>8.0f} s   {result}")
    click.secho(f"\n{'benchmark':<16}{'time':>10}   figures", bold=True)
    click.echo("\n".join(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
