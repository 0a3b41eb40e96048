"""Students with another model's tokenizer: where its tokens are the same, it is the same model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.models import SENTENCES, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ddk_cache import open_cache
from ddk_cache.errors import ConfigError
from ddk_train.cli import transplant as command
from ddk_train.student.tokenizer import fit
from ddk_train.transplant.transplant import transplant

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    },  # tied, scaled
    "phi": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},  # a head with a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # tied
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
    },
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def permuted_tokenizer(source: Path, folder: Path) -> list[int]:
    """Save the tokenizer of ``source`` with its ordinary ids in another order; return the new id of each."""
    make_tokenizer(folder)
    path = folder / "tokenizer.json"
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    special = {token["id"] for token in content["added_tokens"]}
    ids = [index for index in vocabulary.values() if index not in special]
    moved = dict(zip(ids, random.Random(0).sample(ids, len(ids)), strict=True))
    content["model"]["vocab"] = {token: moved.get(index, index) for token, index in vocabulary.items()}
    path.write_text(json.dumps(content))
    return [moved.get(index, index) for index in range(len(vocabulary))]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_with_the_same_tokens_in_another_order_it_is_the_same_model(tmp_path: Path, kind: str) -> None:
    student, out = tmp_path / "student", tmp_path / "out"
    make_tokenizer(student)
    size = len(AutoTokenizer.from_pretrained(student))
    config = AutoConfig.for_model(kind, **{**HEADS, **ARCHITECTURES[kind]}, vocab_size=size + 7)  # padded
    config.eos_token_id = 0
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(student)
    order = torch.tensor(permuted_tokenizer(student, tmp_path / "other"))

    transplant(str(student), str(tmp_path / "other"), out)

    changed: Any = AutoModelForCausalLM.from_pretrained(out)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (student, out))
    assert changed.config.vocab_size == size
    assert changed.config.tie_word_embeddings == model.config.tie_word_embeddings
    for sentence in SENTENCES:
        with torch.no_grad():
            before = model.eval()(torch.tensor([old.encode(sentence)])).logits[..., :size]
            after = changed(torch.tensor([new.encode(sentence)])).logits
        torch.testing.assert_close(after[..., order], before, atol=1e-5, rtol=1e-5)


def test_special_ids_and_the_chat_template_come_along(tmp_path: Path) -> None:
    student = make_model(tmp_path / "student")
    other = make_model(tmp_path / "other", vocab_size=380, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(other)
    transplant(str(student), str(other), tmp_path / "out", method="omp")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.eos_token_id == end
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_the_command_says_what_was_made_from_what(tmp_path: Path) -> None:
    student, other = make_model(tmp_path / "student", vocab_size=400), tmp_path / "other"
    make_tokenizer(other, 420)
    arguments = [str(student), str(tmp_path / "out"), "--tokenizer", str(other)]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "tokens: " in done.output
    assert "copied from the same token" in done.output
    assert "that spell it" in done.output
    with pytest.raises(ConfigError, match=r"out: is not empty, or the current folder; name a new folder"):
        transplant(str(student), str(other), tmp_path / "out")


def test_where_a_student_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_model(tmp_path / "student", vocab_size=400)
    for name in ("empty", "current"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    transplant(str(student), str(student), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "current")
    with pytest.raises(ConfigError, match="is not empty, or the current folder"):
        transplant(str(student), str(student), Path())
    nowhere = student / "config.json" / "out"
    done = CliRunner().invoke(command, [str(student), str(nowhere), "--tokenizer", str(student)])
    assert done.exit_code == 1
    assert f"Error: {nowhere}: cannot be written: " in done.output


def test_a_model_with_other_parameters_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "student")
    config = AutoConfig.for_model(
        "gemma3n_text",
        vocab_size=400,
        vocab_size_per_layer_input=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "student")
    make_tokenizer(tmp_path / "other", 380)
    with pytest.raises(ConfigError, match=r"per_layer.* depends on the vocabulary too"):
        transplant(str(tmp_path / "student"), str(tmp_path / "other"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_info_says_whether_a_student_fits(cache_folder: Path, student_folder: Path, tmp_path: Path) -> None:
    cache = open_cache(cache_folder)
    assert (
        fit(cache, str(student_folder))
        == f"{student_folder} can be trained from this cache: every id is the same token"
    )
    other = tmp_path / "other"
    permuted_tokenizer(student_folder, other)
    line = fit(cache, str(other))
    assert line.startswith(f"{other}: its tokenizer is not the cache's: ")
    assert f"ddk-cache transplant {other} NEW_FOLDER --tokenizer " in line
    assert "of the cache's 400 tokens are in both" in line
