"""Every command in a process of its own: what it prints, what it writes, and how little it imports."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.builds import write_config, write_corpus
from helpers.commands import Done, control_characters, ddk_cache

COMMANDS = (
    "build",
    "doctor",
    "estimate",
    "export",
    "generate",
    "import",
    "info",
    "init",
    "push",
    "recipes",
    "report",
    "rounds",
    "schema",
    "show",
    "train",
    "transplant",
    "verify",
)
HEAVY = {"torch", "transformers", "vllm", "datasets"}


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> dict[str, Done]:
    """Run the whole job, each command in a process of its own; ``folder`` is its folder."""
    folder = tmp_path_factory.mktemp("job")
    build = write_config(folder / "build.yaml", teacher_folder, write_corpus(folder))
    train = folder / "train.yaml"
    settings: dict[str, Any] = {
        "cache": str(folder / "cache"),
        "student": str(student_folder),
        "output_dir": str(folder / "run"),
        "distill_interval": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "warmup_steps": 1,
        "bf16": False,
    }
    train.write_text(yaml.safe_dump(settings))
    home = {"HF_HOME": str(folder / "hf")}  # an empty cache of datasets
    return {
        "estimate": ddk_cache("estimate", build, "--json", "--set", "validation_rows=5", **home),
        "build": ddk_cache("build", build, "--set", "validation_rows=5", **home),
        "info": ddk_cache("info", folder / "cache"),
        "info --json": ddk_cache("info", folder / "cache", "--json"),
        "verify": ddk_cache("verify", folder / "cache"),
        "train": ddk_cache("train", train, "--set", "learning_rate=1e-3", **home),
        "report": ddk_cache("report", folder / "run"),
        "folder": Done(0, str(folder), ""),
    }


def test_every_command_succeeds(job: dict[str, Done]) -> None:
    assert {name: done.code for name, done in job.items()} == dict.fromkeys(job, 0), job


def test_stderr_has_only_our_lines(job: dict[str, Done]) -> None:
    """No bars, warnings or logs of libraries, and no control characters, outside a terminal."""
    ours = {
        "build": r"teacher: .* predicts its first domain's text no better than chance .*"
        r"|teacher: starting transformers with .*"
        r"|(calibration|tokenising|teacher): [\d,]+ (rows|tokens).*",
        "estimate": r"",
        "info": r"",
        "info --json": r"",
        "verify": r"verify: [\d,]+ bytes.*",
        "train": r"student: .*|memory needed: .*|step +\d/3.*|the student is in .*"
        r"|student/teacher perplexity at step .*",
        "report": r"",
    }
    for name, lines in ours.items():
        others = [line for line in job[name].err.splitlines() if not re.fullmatch(lines, line)]
        assert others == [], name
        assert control_characters(job[name].err + job[name].out) == [], name


def test_build_prints_a_summary(job: dict[str, Done]) -> None:
    *lines, made, following = job["build"].out.splitlines()
    cache = Path(job["folder"].out, "cache")
    assert made.startswith(f"{cache}: rows of ")
    assert following == f"next: ddk-cache info {cache}, or ddk-cache train with cache: {cache}"
    assert [line.partition(":")[0] for line in lines] == ["code", "tail"]
    for line in lines:
        assert re.search(
            r"\d+ train rows \([\d,]+ tokens\), 5 rows held out \(\d+\.\d%\), \d+ documents, ", line
        )
        assert re.search(r"teacher perplexity \d", line)


def test_info_json_has_everything(job: dict[str, Done], teacher_folder: Path) -> None:
    info = json.loads(job["info --json"].out)
    assert info["format_version"] == 3
    assert info["complete"] is True
    assert info["target"] == {"kind": "topk", "top_k": 8, "top_p": 1.0, "samples": 24, "temperature": 1.0}
    assert info["teacher"]["model"] == str(teacher_folder)
    assert info["teacher"]["engine"] == "transformers"
    assert re.fullmatch("[0-9a-f]{64}", info["tokenizer_hash"])
    folder = Path(job["folder"].out, "cache")
    assert info["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert list(info["domains"]) == ["code", "tail"]
    for name, domain in info["domains"].items():
        assert domain["teacher_perplexity"] == pytest.approx(math.exp(domain["teacher_cross_entropy"]))
        for split in ("train", "validation"):
            part = domain[split]
            stored = sum(p.stat().st_size for p in (folder / name / split).rglob("*") if p.is_file())
            assert part["bytes"] == stored
            assert part["bytes_per_token"] == pytest.approx(part["bytes"] / part["tokens"])
            assert part["shards_missing"] == []
            assert part["shards"] == part["shards_done"] == math.ceil(part["rows"] / 5)
            assert 0 < part["tokens"] <= part["rows"] * 64


def test_info_is_a_table_for_people(job: dict[str, Done]) -> None:
    info = json.loads(job["info --json"].out)
    text = job["info"].out
    assert "complete, " in text
    assert "NOT COMPLETE" not in text
    for name, domain in info["domains"].items():
        assert f"\n{name} " in text
        for split in ("train", "validation"):
            assert f"{domain[split]['tokens']:,}" in text
        assert f"{domain['teacher_perplexity']:.2f}" in text


def test_estimate_comes_close_in_rows_and_tokens(job: dict[str, Done]) -> None:
    """Not in bytes: a cache of a few rows is mostly file headers."""
    estimate, info = json.loads(job["estimate"].out), json.loads(job["info --json"].out)
    for name, domain in info["domains"].items():
        stored = domain["train"]["tokens"] + domain["validation"]["tokens"]
        assert estimate["domains"][name]["tokens"] == stored
        assert estimate["domains"][name]["train_rows"] == domain["train"]["rows"]


def test_train_and_report_leave_their_files(job: dict[str, Done]) -> None:
    folder = Path(job["folder"].out, "run")
    assert f"next: ddk-cache report {folder}\n" in job["train"].out
    assert [line for line in job["train"].err.splitlines() if line.startswith("step ")][-1:]
    assert job["report"].out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "model.safetensors").is_file()


def test_verify_names_a_damaged_shard(job: dict[str, Done], tmp_path: Path) -> None:
    assert job["verify"].out.endswith("cache: every byte is as it was written\n")
    cache = shutil.copytree(Path(job["folder"].out, "cache"), tmp_path / "cache")
    key = cache / "tail" / "train" / "codes" / "c" / "1" / "0"
    data = bytearray(key.read_bytes())
    data[len(data) // 3] ^= 1
    key.write_bytes(bytes(data))
    done = ddk_cache("verify", cache)
    assert done.code == 1
    assert (
        done.out == f"tail/train shard 1: codes is damaged or belongs to another shard\n{cache}: 1 problem\n"
    )
    info = json.loads(ddk_cache("info", cache, "--json").out)
    assert info["domains"]["tail"]["train"]["shards_missing"] == [1]
    assert info["complete"] is False


def imported(done: Done) -> set[str]:
    """Return the top-level modules that the process imported, from PYTHONPROFILEIMPORTTIME's list."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.err.splitlines()}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_loads_nothing_heavy(name: str) -> None:
    done = ddk_cache(*name.split(), "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.code == 0
    assert "click" in imported(done)
    assert not imported(done) & (HEAVY | {"zarr", "numpy"})
    if name:
        assert done.out.startswith(f"Usage: ddk-cache {name} ")
    else:
        assert [line.split()[0] for line in done.out.splitlines() if re.match("  [a-z]", line)][
            -len(COMMANDS) :
        ] == [*COMMANDS]


def test_info_and_verify_load_no_framework(job: dict[str, Done]) -> None:
    for command in ("info", "verify"):
        done = ddk_cache(command, Path(job["folder"].out, "cache"), PYTHONPROFILEIMPORTTIME="1")
        assert done.code == 0
        assert "numpy" in imported(done)
        assert not imported(done) & HEAVY


def test_no_command_shows_the_help() -> None:
    done = ddk_cache()
    assert done.code == 2
    assert (done.out + done.err).startswith("Usage: ddk-cache ")
    assert all(f"\n  {name} " in done.out + done.err for name in COMMANDS)


def test_a_mistake_is_one_line_and_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = ddk_cache("info", tmp_path / "none")
    assert (done.code, done.mistake) == (2, f"{tmp_path / 'none'}: there is no such folder")
    debugged = ddk_cache("--debug", "info", tmp_path / "none")
    assert debugged.code == 2
    assert debugged.err.startswith("Traceback (most recent call last):")
    assert debugged.err.splitlines()[-1].endswith(f"{tmp_path / 'none'}: there is no such folder")
