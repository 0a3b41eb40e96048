"""The wheel in a clean environment: what it holds, and that what it depends on is enough without vLLM."""

import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from commands import Done, ddk_cache
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout; where hatchling is not installed, the package index lends it."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = [] if find_spec("hatchling") is None else ["--no-isolation"]
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.iterdir()
    return found


def needed(one: Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """What a distribution with those extras asks for: names, each with the extras it is wanted with."""
    for requirement in map(Requirement, one.requires or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def base_dependencies(wheel: Distribution) -> set[str]:
    """Every distribution that installing the wheel without extras brings."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [*needed(wheel, frozenset())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += needed(distribution(name), extras)
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The installed ``ddk-cache`` of an environment that has the wheel, its dependencies and no more.

    The dependencies are links to those of this environment: gigabytes that need not be installed again.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (installed,) = distributions(name="ddk-cache", path=[str(site)])
    for name in base_dependencies(installed):
        there = distribution(name)
        for entry in {file.parts[0] for file in there.files or ()} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(Path(str(there.locate_file(entry))))
    return folder / "bin" / "ddk-cache"


def test_the_wheel_holds_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert licences
    sources = [(ROOT, "ddk_cache"), (ROOT / "stages", "ddk_build"), (ROOT / "stages", "ddk_train")]
    files = {
        str(path.relative_to(root))
        for root, package in sources
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files
    assert {name.split("/")[0] for name in names} == {"ddk_cache", "ddk_build", "ddk_train"}
    assert {name.rpartition(".")[2] for name in names} == {"css", "py", "typed", "yaml"}


def test_the_clean_environment_has_no_engine(command: Path) -> None:
    """Or the tests below would show nothing."""
    text = "from importlib.util import find_spec; print(*map(find_spec, ['vllm', 'ray', 'peft', 'pytest']))"
    done = subprocess.run([command.with_name("python"), "-c", text], capture_output=True, text=True)
    assert done.stdout == "None None None None\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help(command: Path, arguments: list[str]) -> None:
    done = ddk_cache(*arguments, command=command)
    assert (done.code, done.err) == (0, "")


def test_a_cache_is_read(command: Path, built: Path) -> None:
    done = ddk_cache("info", built.parent / "cache", command=command)
    assert (done.code, done.err) == (0, "")
    assert done.out == ddk_cache("info", built.parent / "cache").out


def test_a_student_is_trained(command: Path, built: Path, student_folder: Path) -> None:
    folder = built.parent / "run"
    settings = {
        "cache": str(built.parent / "cache"),
        "student": str(student_folder),
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": False,
    }
    config = built.with_name("train.yaml")
    config.write_text(yaml.safe_dump(settings))
    done = ddk_cache("train", config, command=command)
    assert done.code == 0, done.err
    assert (folder / "model.safetensors").is_file()


def test_building_with_vllm_names_the_extra(command: Path, built: Path) -> None:
    done: Done = ddk_cache(
        "build",
        built,
        *("--set", "teacher.engine=vllm"),
        *("--set", f"cache={built.parent / 'other'}"),
        command=command,
    )
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("Error: teacher.engine: vllm is not installed; pip install 'ddk-cache[build]'")
    assert "Traceback" not in done.err
