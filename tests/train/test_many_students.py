"""One cache trains students of other depths, with wider heads, and adapters, and none of them changes it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from helpers.models import make_model
from helpers.training import plain_perplexity, read_lines
from safetensors.torch import load_file

import ddk_cache
from ddk_train.train import train
from tools.prune_student import prune

Load = Callable[[Path, Path], Any]  # (student, output_dir) -> the trained model


def load_whole(student: Path, folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def load_adapters(student: Path, folder: Path) -> Any:
    assert not (folder / "model.safetensors").exists()
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    base = transformers.AutoModelForCausalLM.from_pretrained(student)
    return peft.PeftModel.from_pretrained(base, folder)


def widen(student: Path, target: Path) -> None:
    """Save the student with 48 rows of padding in embedding and head."""
    shutil.copytree(student, target)
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    model.resize_token_embeddings(448, mean_resizing=False)
    model.save_pretrained(target)


@pytest.fixture
def make_student(tmp_path: Path, student_folder: Path) -> Callable[[str], Path]:
    makers: dict[str, Callable[[Path], Any]] = {
        "a deep model's first layer": lambda path: prune(make_model(tmp_path / "deep", seed=1), path, {1}),
        "a wider head": lambda path: widen(student_folder, path),
        "the teacher's architecture": lambda path: make_model(path, seed=7),
    }

    def make(name: str) -> Path:
        makers[name](tmp_path / "student")
        return tmp_path / "student"

    return make


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "keys", "load"),
    [
        ("a deep model's first layer", {}, load_whole),
        ("a wider head", {}, load_whole),
        ("the teacher's architecture", {"lora": {"r": 4}}, load_adapters),
        ("the teacher's architecture", {"lora": {"r": 4, "merge": True}}, load_whole),
    ],
)
def test_a_student_from_the_same_cache(
    make_config: Any,
    make_student: Callable[[str], Path],
    cache_folder: Path,
    name: str,
    keys: dict[str, Any],
    load: Load,
) -> None:
    before = contents(cache_folder)
    student = make_student(name)
    config = make_config(student=str(student), **keys)
    train(config)
    assert contents(cache_folder) == before

    folder = Path(config.output_dir)
    model, lines = load(student, folder), read_lines(folder, "discrepancy")
    assert model.config.vocab_size == (448 if name == "a wider head" else 400)
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 400
    cache = ddk_cache.open_cache(config.cache)
    for domain in cache.domains:
        last = lines[-1]["student_ppl"][domain]
        assert last < lines[0]["student_ppl"][domain]
        assert plain_perplexity(model, cache[domain].validation) == pytest.approx(last, rel=1e-3)
