"""A user's mistake is exit code 2 and one line with the place and the remedy; no file is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import Run, control_characters, ddk_cache
from helpers.models import make_model, make_tokenizer
from safetensors.numpy import load_file, save_file

Refused = Callable[..., str]


@pytest.fixture
def build(tmp_path: Path, built: Path) -> Path:
    """Return the configuration of ``built`` with a new cache."""
    config = yaml.safe_load(built.read_text()) | {"cache": str(tmp_path / "cache")}
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def train(tmp_path: Path, built: Path, student_folder: Path) -> Path:
    """Return the configuration of a run from the complete cache."""
    config: dict[str, Any] = {
        "cache": str(built.parent / "cache"),
        "student": str(student_folder),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "bf16": False,
        "report_to": "none",
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def refused(tmp_path: Path, built: Path, run: Run) -> Refused:
    """Return a function that runs a wrong command line and returns its error."""

    def refused(*arguments: object, code: int = 2) -> str:
        before = files(tmp_path), files(built.parent)
        done = run(*arguments)
        assert done.code == code, done.err
        assert not control_characters(done.err)
        assert done.err.count("\n") == 1, done.err
        assert (files(tmp_path), files(built.parent)) == before
        return done.mistake

    return refused


CONFIGS: dict[str, tuple[str | None, str]] = {
    "missing": (None, "there is no such file"),
    "unfinished.yaml": ("cache: [", "is not valid YAML: "),
    "list.yaml": ("- cache", "must hold keys and values"),
    "empty.yaml": ("", "must hold keys and values"),
    "nothing.yaml": ("{}", ": is required"),
    "binary.yaml": ("cache: \x00", "is not valid YAML: "),
}


@pytest.mark.parametrize("command", ["build", "estimate", "train"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_invalid_configuration_file(tmp_path: Path, refused: Refused, command: str, name: str) -> None:
    text, reason = CONFIGS[name]
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    line = refused(command, path)
    assert line.startswith(f"{path}: ")
    assert reason in line


@pytest.mark.parametrize("command", ["build", "estimate", "train"])
def test_a_folder_as_configuration(tmp_path: Path, refused: Refused, command: str) -> None:
    line = refused(command, tmp_path)
    assert str(tmp_path) in line
    assert "is a directory" in line


def test_a_configuration_that_is_not_utf8(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("cache: Läufe".encode("latin-1"))
    assert refused("build", path).startswith(f"{path}: cannot be read: ")


def test_a_configuration_of_the_other_command(build: Path, train: Path, refused: Refused) -> None:
    line = refused("train", build)
    assert line == f"{build}: looks like a configuration of ddk-cache build; here student is required"
    for command in ("build", "estimate"):
        line = refused(command, train)
        assert line == f"{train}: looks like a configuration of ddk-cache train; here teacher is required"


BUILD_KEYS = {
    "seq_len=64": "seq_len: unknown key; did you mean 'seq_length'?",
    "target.topk=8": "target.topk: unknown key; did you mean 'top_k'?",
    "domains.code.datafiles=x": "domains.code.datafiles: unknown key; did you mean 'data_files'?",
    "seq_length=long": "seq_length: Input should be a valid integer",
    "seq_length=1": "seq_length: Input should be greater than or equal to 2 (got 1)",
    "seq_length=1.5": "seq_length: Input should be a valid integer",
    "target.top_p=0": "target.top_p: Input should be greater than 0 (got 0)",
    "target.kind=all": "target.kind: Input should be 'topk', 'sampled' or 'label' (got 'all')",
    "teacher.engine=ollama": "teacher.engine: Input should be 'vllm' or 'transformers' (got 'ollama')",
    "teacher=x": "teacher: must hold keys and values",
    "domains={}": "domains: Dictionary should have at least 1 item",
    "domains.code=": "domains.code: ",
    "validation_rows=0": "validation_rows: Input should be greater than 0 (got 0)",
    "cache=": "cache: Input should be a valid string",
}
NAMES = {"up": "../x", "empty": "", "absolute": "/x", "long": "x" * 300, "control": "a\u0007b", "dot": "a.b"}


@pytest.mark.parametrize("override", BUILD_KEYS)
def test_a_wrong_key_of_a_build(build: Path, refused: Refused, override: str) -> None:
    assert refused("build", build, "--set", override).startswith(f"{build}: {BUILD_KEYS[override]}")


@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_domain_name(build: Path, refused: Refused, name: str) -> None:
    config = yaml.safe_load(build.read_text())
    config["domains"][NAMES[name]] = config["domains"].pop("tail")
    build.write_text(yaml.safe_dump(config))
    line = refused("build", build)
    assert line.startswith(f"{build}: domains.")
    assert "[A-Za-z0-9_-]{1,64}" in line


OVERRIDES = {
    "seq_length": "--set seq_length: must be key=value or key.sub=value",
    "=5": "--set =5: must be key=value or key.sub=value",
    "target..top_k=5": "--set target..top_k=5: must be key=value or key.sub=value",
    "seq_length=[": "--set seq_length=[: the value is not valid YAML",
    "seq_length.long=5": "--set seq_length.long=5: 'seq_length' holds a value, not keys",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_invalid_override(build: Path, refused: Refused, override: str) -> None:
    assert refused("build", build, "--set", override).startswith(OVERRIDES[override])


MODELS_AND_CACHES = {
    "teacher.model=nowhere/at-all": "teacher.model: ",
    "cache=ftp://there/cache": "ftp://there/cache: a cache is a folder or begins with one of file:// s3://",
}


@pytest.mark.parametrize("override", MODELS_AND_CACHES)
def test_an_invalid_teacher_or_cache(build: Path, refused: Refused, override: str) -> None:
    assert MODELS_AND_CACHES[override] in refused("build", build, "--set", override)


def test_rows_too_long_for_the_teacher(build: Path, refused: Refused) -> None:
    line = refused("build", build, "--set", "seq_length=100000")
    assert line.startswith(f"{build}: seq_length: 100000 is more than the 512 positions")


def test_the_engine_starts_before_tokenising(tmp_path: Path, build: Path, run: Run) -> None:
    """One block of memory for keys and values, which is less than a row needs."""
    model = make_model(tmp_path / "model", seed=1, hidden=128)  # heads of 32, as vLLM needs on a CPU
    arguments = "{num_gpu_blocks_override: 1, enforce_eager: true, max_num_seqs: 4}"
    teacher = f"{{model: {model}, dtype: float32, engine_args: {arguments}}}"
    changes = ("--set", f"teacher={teacher}", "--set", "seq_length=256", "--set", "shard_tokens=1024")
    line = ddk_cache("build", build, *changes).mistake
    assert line.startswith(f"{build}: teacher: vLLM cannot run llama: ")
    assert "cache" in line  # vLLM says it in two ways
    assert not list((tmp_path / "cache").glob("*/*/tokens"))
    # The next build resumes in the same cache.
    assert run("build", build, "--tokens-only", *changes).code == 0


def test_a_second_teachers_load_format_is_checked_first(tmp_path: Path, build: Path) -> None:
    """Its engine starts only after the first one has finished."""
    model = make_model(tmp_path / "model", seed=1)
    second = f"{{model: {model}, engine: vllm, dtype: float32, engine_args: {{load_format: tensors}}}}"
    line = ddk_cache("build", build, "--set", f"domains.tail.teacher={second}").mistake
    assert line.startswith(f"{build}: teacher.engine_args: vLLM refuses them: ")
    assert "tensors" in line
    assert not list((tmp_path / "cache").glob("*/*/tokens"))


SOURCES = {
    "data_files=nowhere.jsonl": "data_files: there is no file 'nowhere.jsonl'",
    "path=parqet": "cannot read 'parqet': ",
    "text_column=body": "there is no column 'body'; there are: text",
    "messages_column=talk": "there is no column 'talk'; there are: text",
    "split=test": "cannot read 'json': ",
}


@pytest.mark.parametrize("command", ["build", "estimate"])
@pytest.mark.parametrize("override", SOURCES)
def test_a_source_that_cannot_be_read(build: Path, run: Run, command: str, override: str) -> None:
    line = run(command, build, "--set", f"domains.tail.{override}").mistake
    assert line.startswith(f"{build}: domains.tail: ")
    assert SOURCES[override] in line


def test_a_corrected_source_goes_into_the_same_cache(build: Path, run: Run) -> None:
    """A mistake in the configuration must not remain in the cache."""
    assert run("build", build, "--set", "domains.tail.data_files=nowhere.jsonl").code == 2
    assert run("build", build).code == 0
    assert run("verify", build.parent / "cache").code == 0


def test_a_domain_without_loss_in_its_validation_split(build: Path, tmp_path: Path, run: Run) -> None:
    """The one validation row is filled by a question; no token of the answer is in it."""
    talks = [
        [{"role": "user", "content": f"{number} " + "fox " * 200}, {"role": "assistant", "content": "Yes."}]
        for number in range(2)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    domain = {"path": "json", "data_files": str(tmp_path / "talk.jsonl"), "messages_column": "messages"}
    config = yaml.safe_load(build.read_text()) | {"validation_rows": 1, "domains": {"talk": domain}}
    build.write_text(yaml.safe_dump(config))
    line = run("build", build).mistake
    assert line.startswith(f"{build}: domains.talk: no token of the validation split carries loss; ")
    assert run("build", build, "--set", "seq_length=500").code == 0  # as the line says, into the same cache


TRAIN_KEYS = {
    "cache=nowhere": "nowhere: there is no such folder",
    "cache=ftp://there": "ftp://there: a cache is a folder or begins with one of",
    "temperature=2": "temperature: is 2.0, but the cache's targets were made at 1.0; set it to that",
    "student=nowhere": "student: nowhere ",
    "gamma=-1": "gamma: Input should be greater than or equal to 0 (got -1)",
    "max_step=5": "max_step: unknown key; did you mean 'max_steps'?",
    "report_to=[paper]": "report_to.0: Input should be 'tensorboard', 'wandb' or 'trackio'",
    "strategy=static": "weights: must be given with strategy static",
    "lora.rank=4": "lora.rank: unknown key",
}


@pytest.mark.parametrize("override", TRAIN_KEYS)
def test_a_wrong_key_of_a_training_run(train: Path, refused: Refused, override: str) -> None:
    assert TRAIN_KEYS[override] in refused("train", train, "--set", override)


def test_a_folder_without_a_cache(tmp_path: Path, train: Path, refused: Refused) -> None:
    (tmp_path / "photos").mkdir()
    folder = tmp_path / "photos"
    for arguments in (("info", folder), ("verify", folder), ("train", train, "--set", f"cache={folder}")):
        assert refused(*arguments) == f"{folder}: there is no cache here"


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_missing_cache(tmp_path: Path, refused: Refused, command: str) -> None:
    assert refused(command, tmp_path / "none") == f"{tmp_path / 'none'}: there is no such folder"
    (tmp_path / "file").write_text("text")
    assert refused(command, tmp_path / "file") == f"{tmp_path / 'file'}: there is no such folder"
    assert refused(command, "ftp://there").startswith("ftp://there: a cache is a folder or begins with")


def test_a_broken_manifest(tmp_path: Path, built: Path, train: Path, refused: Refused) -> None:
    """It is not the user's mistake: exit code 1."""
    broken = shutil.copytree(built.parent / "cache", tmp_path / "broken")
    (broken / "zarr.json").write_text("{")
    for arguments in (("info", broken), ("verify", broken), ("train", train, "--set", f"cache={broken}")):
        assert (
            refused(*arguments, code=1)
            == f"{broken}/zarr.json: is damaged: it cannot be read as a document of a cache"
        )


def test_a_cache_in_which_verify_found_a_shard_damaged(
    tmp_path: Path, built: Path, train: Path, run: Run, refused: Refused
) -> None:
    """The cache is incomplete now, and trained on only with allow_incomplete."""
    part = shutil.copytree(built.parent / "cache", tmp_path / "part")
    (part / "code/train/codes/c/0/0").write_bytes(b"other")
    assert run("verify", part).code == 1
    line = refused("train", train, "--set", f"cache={part}")
    assert line.startswith(f"{part}: ")
    assert "allow_incomplete" in line


def test_an_output_folder_in_use(tmp_path: Path, train: Path, run: Run, refused: Refused) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(train, tmp_path / "run" / "config.yaml")
    assert refused("train", train) == (
        f"{train}: output_dir: {tmp_path / 'run'} already has a run: add --resume, or name another folder"
    )
    (tmp_path / "file").write_text("text")
    line = run("train", train, "--set", f"output_dir={tmp_path / 'file' / 'run'}").mistake
    assert line.startswith(f"{train}: output_dir: cannot write to {tmp_path / 'file' / 'run'}: ")


def test_a_student_with_another_tokenizer(
    tmp_path: Path, student_folder: Path, train: Path, refused: Refused
) -> None:
    other = shutil.copytree(student_folder, tmp_path / "other")
    make_tokenizer(other, 300)
    line = refused("train", train, "--set", f"student={other}")
    assert line.startswith(f"{train}: student: its tokenizer is not the cache's: ")


def test_a_student_without_all_of_its_weights(
    tmp_path: Path, student_folder: Path, train: Path, refused: Refused
) -> None:
    other = shutil.copytree(student_folder, tmp_path / "other")
    weights: dict[str, np.ndarray] = load_file(other / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    line = refused("train", train, "--set", f"student={other}")
    assert line == f"{train}: student: {other} lacks weights, such as model.norm.weight"


def test_a_folder_without_a_run(tmp_path: Path, refused: Refused) -> None:
    assert refused("report", tmp_path) == f"{tmp_path}: no run of ddk-cache train: config.yaml is missing"
    assert "'none'" in refused("report", "none")


LINES: dict[str, tuple[list[str], str]] = {
    "misspelt command": (["biuld"], "No such command 'biuld'. Did you mean 'build'?"),
    "unknown command": (["quantise"], "No such command 'quantise'. The commands are build, doctor, "),
    "no configuration": (["build"], "Missing argument 'CONFIG'"),
    "no cache": (["info"], "Missing argument 'CACHE'"),
    "no run": (["report"], "Missing argument 'RUNS...'"),
    "two caches": (["verify", "a", "b"], "unexpected extra argument (b)"),
    "unknown option": (["train", "x.yaml", "--reusme"], "No such option '--reusme'"),
    "two kinds of info": (
        ["info", "x", "--json", "--documents"],
        "--json, --documents and --student exclude",
    ),
    "no value": (["build", "x.yaml", "--set"], "Option '--set' requires an argument"),
}


@pytest.mark.parametrize("name", LINES)
def test_an_invalid_command_line(refused: Refused, name: str) -> None:
    arguments, reason = LINES[name]
    assert reason in refused(*arguments)
