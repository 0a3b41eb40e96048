"""The digest of a model folder sees every byte, and large files that did not change are not read again."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from ddk_cache.errors import ConfigError
from ddk_cache.util import model_folder
from ddk_cache.util.model_folder import check_model, model_digest


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two weight files, all of which count as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(model_folder, "REMEMBERED", 0)
    monkeypatch.setattr(model_folder, "SETTLED", 0.0)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"rope_theta": 1e4}')
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the name of each file that is read."""
    names: list[str] = []
    read = model_folder._sha256

    def counted(path: Path) -> str:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(model_folder, "_sha256", counted)
    return names


def test_the_digest_covers_every_byte(model: Path) -> None:
    before = {model_digest(model)}
    for offset in range(0, 13_000, 997):
        content = bytearray((model / "b.safetensors").read_bytes())
        content[offset] ^= 1
        (model / "b.safetensors").write_bytes(content)
        digest = model_digest(model)
        assert digest not in before
        before.add(digest)
    (model / "config.json").write_text('{"rope_theta": 1e6}')
    assert model_digest(model) not in before


def test_names_and_code_count(model: Path) -> None:
    plain, with_code = model_digest(model), model_digest(model, code=True)
    (model / "modeling.py").write_text("pass")
    assert model_digest(model) == plain
    assert model_digest(model, code=True) != with_code
    (model / "b.safetensors").rename(model / "c.safetensors")
    assert model_digest(model) != plain


def test_an_unchanged_file_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = count_reads(monkeypatch)
    digest = model_digest(model)
    assert sorted(names) == ["a.safetensors", "b.safetensors", "config.json"]
    assert model_digest(model) == digest
    assert len(names) == 3


def test_a_change_that_restores_size_and_time_is_seen(model: Path) -> None:
    path = model / "a.safetensors"
    digest, status = model_digest(model), path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert model_digest(model) != digest


def test_a_file_that_just_changed_is_not_remembered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "SETTLED", 1000.0)
    names = count_reads(monkeypatch)
    model_digest(model), model_digest(model)
    assert len(names) == 6


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"x": 3}', b"\xff"])
def test_a_damaged_memory_is_read_past(model: Path, content: bytes) -> None:
    digest = model_digest(model)
    memory = model_folder._memory()
    assert len(json.loads(memory.read_bytes())) == 3
    memory.write_bytes(content)
    assert model_digest(model) == digest


def test_without_a_folder_for_the_memory_files_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = model_digest(model)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert model_digest(model) == digest


def test_it_is_made_of_names_and_sha256(model: Path) -> None:
    lines = "".join(
        f"{name} {hashlib.sha256((model / name).read_bytes()).hexdigest()}\n"
        for name in ("a.safetensors", "b.safetensors", "config.json")
    )
    assert model_digest(model) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "must hold keys and values"),
        ("[" * 100_000, "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ('{"num_attention_heads": 0}', "num_attention_heads: must be at least 1"),
        (
            '{"text_config": {"num_attention_heads": 0}}',
            "num_attention_heads: must be at least 1",
        ),
    ],
)
def test_a_config_that_no_model_has(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        check_model("teacher.model", str(tmp_path))
    assert str(error.value) == f"teacher.model: {path}: {problem}"


def test_a_config_that_a_model_may_have(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 200, "num_attention_heads": [3, 0], "n_layer": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_model("teacher.model", str(tmp_path))
    check_model("teacher.model", "some/hub-id")
