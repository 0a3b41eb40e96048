"""README and docs are run: every command and every Python block that a CPU without a hub can run in seconds.

Each page has a folder of its own in which the names that the pages use are there: ``build.yaml`` and
``train.yaml`` of the README, ``runs/cache``, models of a few thousand weights under the names of Qwen2.5. A
page's lines are run from the first to the last. docs/quickstart.md has a test of its own.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.builds import write_corpus
from helpers.commands import Run
from helpers.pages import FENCED, PAGES, ROOT, Step, steps

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_cache.util.configuration import load
from ddk_train.config import TrainConfig
from ddk_train.train import train

CAPITALS = {  # what stands for the reader's own
    "CACHE": "runs/cache",
    "RUN": "runs/student",
    "URL": "file:runs/cache",
    "TEACHER": "Qwen/Qwen2.5-14B",
    "STUDENT": "Qwen/Qwen2.5-0.5B",
}
SMALL = {  # the README's files, with what a few seconds on a CPU take in the place of a GPU's hours
    "build.yaml": {
        "dtype: bfloat16}": "dtype: float32, engine: transformers}",
        "seq_length: 2048": "seq_length: 64",
        "samples: 24": "samples: 8",
        "100_000_000": "6_000",
        "domains:": "validation_rows: 6\ndomains:",
    },
    "train.yaml": {
        "max_steps: 30000": "max_steps: 3\ndistill_interval: 2\nper_device_train_batch_size: 2\nbf16: false",
    },
}
FEWER = {  # likewise in a page's Python
    "python.md": {
        "32_000": "16",
        "range(30)": "range(2)",
        "num_workers=2": "num_workers=1",  # torch warns of more than there are cores
        "151_936": "400",
        "max_steps=100": "max_steps=3",
    },
}
ABSENT = {  # a page that makes these itself begins without them
    "README.md": ("runs", "build.yaml", "train.yaml"),
    "chat.md": ("build.yaml", "train.yaml"),
    "data.md": ("runs/student",),
    "evaluation.md": ("runs/uniform", "runs/text-alone"),
    "python.md": ("runs/student",),
    "on-policy.md": ("build.yaml", "train.yaml", "runs/student"),
}

STUDY = "python -m tools.studies."  # not run: hours each; test_studies.py runs the tools on a small world
REAL = "minutes, with the real teacher of 135M weights"
BENCH = f"{REAL}; `make bench` runs it"
TRIES = "minutes: a model of each architecture; test_architectures.py tries each student again"
VERSIONS = "minutes an engine, and other versions of vLLM; test_engines.py compares the installed one"
EVALUATE = "names of the reader's own; tests/tools/test_evaluate.py runs both"
WRITES = "vLLM writes; tests/build/generate runs it, and builds from what was written"
MACHINES = (
    "GPUs or machines; tests/train/student/test_distributed.py and test_scale_out.py run two processes here"
)
DOCKER = 'docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work"'
IMAGE = "a container's engine, and GPUs"
COMMANDS, BLOCKS = 20, 4  # at least: fewer, and the pages are not understood
NOT_RUN = {
    "benchmarks.md": {
        "python -m tools.bench.codec": BENCH,
        "python -m tools.bench.long_build": BENCH,
        "python -m tools.bench.capture --tokens 200000": BENCH,
        "python -m tools.bench.capture --teacher 135m --tokens 16000": BENCH,
        "python -m tools.bench.loss": BENCH,
        "python -m tools.bench.step": BENCH,
        "python -m tools.bench.reader": BENCH,
        "python -m tools.bench.waiting": BENCH,
    },
    "evaluation.md": {
        "python -m tools.evaluate tasks arc_easy,hellaswag TEACHER STUDENT_BEFORE STUDENT_AFTER": EVALUATE,
        "python -m tools.evaluate acceptance CACHE TEACHER STUDENT_BEFORE STUDENT_AFTER": EVALUATE,
    },
    "many-machines.md": {
        "ray start --head --port 6379": MACHINES,
        "ray start --address FIRST:6379": MACHINES,
        "ddk-cache build build.yaml --ray --num-engines 8": MACHINES,
        "ddk-cache generate generate.yaml --ray": WRITES,
        "torchrun --nproc-per-node 8 --no-python ddk-cache train train.yaml": MACHINES,
        "torchrun --nnodes 2 --node-rank NODE --nproc-per-node 8": MACHINES,
        "docker build -t ddk-cache .": IMAGE,
        f"{DOCKER} ddk-cache build build.yaml": IMAGE,
        f"{DOCKER} --entrypoint torchrun ddk-cache": IMAGE,
    },
    "on-policy.md": {
        "ddk-cache generate generate.yaml": WRITES,
        "ddk-cache generate generate.yaml --dry-run": WRITES,
        "ddk-cache estimate generate.yaml": WRITES,
        "ddk-cache rounds rounds.yaml": WRITES,
        "ddk-cache rounds rounds.yaml --dry-run": WRITES,
    },
    "gpu.md": {
        "python -m tools.gpu_acceptance": "a GPU; tests/tools/test_gpu_acceptance.py runs a part on a CPU",
        "python -m tools.gpu_acceptance --seconds 370": "the same",
    },
    "memory.md": {
        "python -m tools.docs.memory": "half a minute; tests/train/student/test_memory.py holds its formula"
    },
    "models.md": {
        "python -m tools.docs.students docs/models.md": TRIES,
        "python -m tools.docs.teachers docs/models.md": TRIES,
    },
    "reliability.md": {"python -m tools.torture": "a minute for each kind; test_torture.py runs it"},
    "results.md": {"python -m tools.bench.targets": BENCH},
    "coming-from.md": {
        "ddk-cache import distillkit LOGITS runs/imported --teacher TEACHER": "tests/build/test_imported.py"
    },
    "student.md": {
        "ddk-cache push runs/student you/my-student": "the hub; tests/cache/storage/test_hub.py",
        "ddk-cache push runs/cache you/my-cache": "the hub; tests/cache/storage/test_hub.py",
    },
    "scale.md": {
        "python -m tools.bench.feed --seconds 100": BENCH,
        "python -m tools.bench.tokenising": BENCH,
    },
    "vllm.md": {"python -m tools.vllm_versions docs/vllm.md versions/*": VERSIONS},
}
"""By page: what stays unrun, and why. test_docs.py takes its options."""


def wanted(page: Path) -> list[Step]:
    left_out = NOT_RUN.get(page.name, {})
    return [
        step
        for step in steps(page)
        if step.python or not (step.text in left_out or step.text.startswith(STUDY))
    ]


# The quickstart is run by test_quickstart.py, the functions in CONTRIBUTING.md by test_adding.py; docs/cli.md
# is made from the commands.
ELSEWHERE = ("quickstart.md", "CONTRIBUTING.md", "cli.md")
OTHERS = {page: list(steps(page)) for page in PAGES if page.name not in ELSEWHERE}
RUN = [page for page in OTHERS if wanted(page)]


def test_nothing_slips_in_or_out() -> None:
    """A new line is run unless it is listed; what is listed stands in its page."""
    for page, found in OTHERS.items():
        assert set(NOT_RUN.get(page.name, {})) <= {step.text for step in found}, page.name
        studies = [step.text.split() for step in found if not step.python and step.text.startswith(STUDY)]
        assert all((ROOT / words[3]).is_file() for words in studies), page.name
    counts = Counter(step.python for page in RUN for step in wanted(page))
    assert counts[False] >= COMMANDS
    assert counts[True] >= BLOCKS


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """Return a folder with everything that the pages name; each page gets a copy."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(teacher_folder, folder / "Qwen" / "Qwen2.5-14B")
    for name in ("Qwen2.5-1.5B", "Qwen2.5-0.5B"):
        shutil.copytree(student_folder, folder / "Qwen" / name)
    (folder / "tools").symlink_to(ROOT / "tools")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    write_sources(folder)
    write_configurations(folder)
    with contextlib.chdir(folder):
        build_cache(load("build.yaml", [], BuildConfig))
        adapters = "lora={r: 2, target_modules: [q_proj]}"
        for output, *overrides in (["student"], ["uniform"], ["text-alone"], ["adapters", adapters]):
            train(load("train.yaml", [f"output_dir=runs/{output}", *overrides], TrainConfig))
    return folder


def write_sources(folder: Path) -> None:
    """Write the README's two sources: a data set with a configuration of that name, and Python files."""
    corpus = write_corpus(folder, documents=24, characters=1500)
    wikipedia = folder / "wikimedia" / "wikipedia"
    wikipedia.mkdir(parents=True)
    corpus["tail"].rename(wikipedia / "train.jsonl")
    card = "---\nconfigs:\n- config_name: 20231101.en\n  data_files: train.jsonl\n---\n"
    (wikipedia / "README.md").write_text(card, "utf-8")
    for number, line in enumerate(corpus["code"].read_text("utf-8").splitlines()):
        path = folder / "code" / "package" / f"{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.loads(line)["text"], "utf-8")


def write_configurations(folder: Path) -> None:
    """Write the README's two configurations."""
    for language, body in FENCED.findall((ROOT / "README.md").read_text("utf-8")):
        if language == "yaml":
            name = body.partition("\n")[0].removeprefix("# ")
            (folder / name).write_text(changed(body, SMALL[name]), "utf-8")


def changed(text: str, changes: dict[str, str]) -> str:
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    return text


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_what_a_page_gives_to_run_works(
    page: Path, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(ready, folder, symlinks=True)
    for name in ABSENT.get(page.name, ()):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.chdir(folder)
    for step in wanted(page):
        if step.python:
            text = step.text
            for before, after in FEWER.get(page.name, {}).items():
                text = text.replace(before, after)
            exec(text, {})
            continue
        command, *words = shlex.split(step.text)
        words = [CAPITALS.get(word, word) for word in words]
        if command == "python":
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{step.text}\n{done.stderr}"
            continue
        said = run(*words)
        assert said.code == 0, f"{step.text}\n{said.err}"
        if words[0] == "init":
            write_configurations(folder)
