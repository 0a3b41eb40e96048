"""The student's loss and hidden states against transformers; which students are refused, and why."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.training import SEQ_LENGTH

import ddk_cache
from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, make_batch
from ddk_train.loss.fused import reference_loss
from ddk_train.student.files import load_model, save_student
from ddk_train.student.probe import check_isolation, examine
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import harmless_differences, load_tokenizer
from ddk_train.train import dry_run

SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def make(kind: str, **keys: Any) -> Any:
    """Make a random model of an architecture, with weights large enough for its parts to matter."""
    torch.manual_seed(0)
    common = GPT2 if kind == "GPT2" else SMALL
    config = getattr(transformers, f"{kind}Config")(**common | {"initializer_range": 0.2} | keys)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def as_config(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate({"cache": "c", "student": "s", "output_dir": "o", "bf16": False} | keys)


def as_student(model: Any, **keys: Any) -> Student:
    config = as_config(**keys)
    return Student(model, config, examine(model, config, SEQ_LENGTH)).eval()


def load(config: TrainConfig) -> tuple[ddk_cache.Cache, Any]:
    """Return the cache and the student's model, loaded as a run does."""
    cache = ddk_cache.open_cache(config.caches[0])
    return cache, load_model(config, cache, load_tokenizer(config, cache))


def edited(source: Path, target: Path, name: str = "config.json", **keys: Any) -> str:
    """Copy a student and change keys of one of its JSON files."""
    path = shutil.copytree(source, target) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return str(target)


def packed(*rows: tuple[list[int], list[int]]) -> Batch:
    """Return rows of two documents each, all of the same length, without labels."""
    positions = [[*range(len(first)), *range(len(second))] for first, second in rows]
    none = torch.zeros(0, dtype=torch.int64)
    tokens = torch.tensor([first + second for first, second in rows])
    return Batch(tokens, torch.tensor(positions), none, none, none, None, None, None, tokens.numel())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "flattened"])
def test_documents_do_not_see_each_other(attention: str) -> None:
    model = make("Llama")
    if attention != "flattened":
        model.set_attn_implementation(attention)
    student = as_student(model)
    # How rows reach flash attention, which itself needs a GPU.
    student.flatten = attention == "flattened"
    second = [7, 3, 9, 250, 14, 8, 77, 140]
    batch = packed(*((first, second) for first in ([1, 2, 3, 4, 5, 6, 7, 8], [300, 2, 90, 4, 5, 6, 7, 1])))
    # Compiling flex attention takes minutes on a CPU and does not change its mask.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model.lm_head(student.hidden(batch)).view(2, 16, -1)
        alone = model(torch.tensor([second]), use_cache=False).logits[0]
        check_isolation(student, torch.device("cpu"))
    torch.testing.assert_close(logits[0, 8:], logits[1, 8:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[0, 8:], alone, atol=1e-4, rtol=1e-4)
    assert (logits[0, 7] - logits[1, 7]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("GPT2", {}),  # learned positions, tied
        ("Phi", {}),  # a bias on the head
        ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 3.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Qwen3", {"head_dim": 8}),
        ("Gemma", {"head_dim": 8}),
        ("Mistral", {"sliding_window": 4}),
        ("OlmoE" if hasattr(transformers, "OlmoEConfig") else "Olmo2", {}),
    ],
)
@pytest.mark.parametrize("tail", ["bucket", "label", "drop"])
def test_the_loss_is_that_of_the_models_own_logits(
    cache_folder: Path, kind: str, keys: dict[str, Any], tail: str
) -> None:
    model = make(kind, **keys)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    student = as_student(model, tail=tail)
    rows = ddk_cache.open_cache(str(cache_folder))["code"].train.read([0, 3, 4])
    batch = make_batch({0: rows}, 400)
    with torch.no_grad():
        result = student(batch, 0.5)
        check_isolation(student, torch.device("cpu"))
        logits = torch.zeros(3, SEQ_LENGTH, 400)
        for row in range(3):
            for segment in set(rows.segments[row].tolist()) - {0}:
                inside = torch.from_numpy(rows.segments[row] == segment)
                tokens = torch.from_numpy(rows.tokens[row])[inside].long()
                logits[row, inside] = model(tokens[None], use_cache=False).logits[0]
    expected = reference_loss(
        logits.flatten(0, 1)[batch.label_positions].double(),
        batch.labels,
        batch.ids,
        batch.logprobs,
        batch.tail_logprob,
        gamma=0.5,
        tail=tail,  # type: ignore[arg-type]
    )
    for value, right in zip(result[:3], expected[:3], strict=True):
        assert value.item() == pytest.approx(right.item(), rel=1e-4)


class Bent(transformers.LlamaForCausalLM):
    """A model whose logits no scale and no cap gives."""

    def forward(self, *args: Any, **keys: Any) -> Any:
        output = super().forward(*args, **keys)
        output.logits = output.logits + output.logits.sigmoid()
        return output


def test_logits_that_the_loss_cannot_make_are_refused() -> None:
    model = Bent(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ConfigError, match="logits of Bent are not one linear layer"):
        as_student(model)


@pytest.mark.parametrize(("kind", "cap"), [("Gemma2", 30.0), ("Gemma3Text", 0.5), ("Gemma3Text", 500.0)])
def test_a_cap_on_the_logits_is_found(kind: str, cap: float) -> None:
    config = getattr(transformers, f"{kind}Config")(**SMALL, head_dim=8, final_logit_softcapping=cap)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert as_student(model).transform.softcap == pytest.approx(cap, rel=1e-6)


def mamba() -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2
    )
    return transformers.MambaForCausalLM(config)


def test_a_model_that_carries_state_across_documents_gets_each_as_a_row() -> None:
    student = as_student(mamba())
    assert not student.layout.packed
    assert "each document a row" in student.description()
    assert as_student(make("Llama")).layout.packed
    assert not as_student(mamba(), fsdp=True).layout.packed


def test_documents_that_see_each_other_in_training_are_refused() -> None:
    """As with a kernel that ignores positions."""
    model = make("Llama")
    forward = model.model.forward
    model.model.forward = lambda input_ids, position_ids, use_cache: forward(input_ids, use_cache=use_cache)
    student = Student(model, as_config()).eval()
    with pytest.raises(ConfigError, match="documents in the same row see each other"):
        check_isolation(student, torch.device("cpu"))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_small_leak_is_seen_whatever_the_run_computes_in(bf16: bool) -> None:
    """A thousandth of what came before in the row: much less than bfloat16 rounds by."""
    model = make("Llama")

    def leak(module: Any, inputs: Any, output: Any) -> Any:
        before = output.last_hidden_state
        output.last_hidden_state = before + 1e-3 * before.cumsum(1)
        return output

    model.model.register_forward_hook(leak)
    student = Student(model, as_config(bf16=bf16)).eval()
    with pytest.raises(ConfigError, match="documents in the same row see each other"):
        check_isolation(student, torch.device("cpu"))
    assert student.bf16 == bf16


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, "no dropout"), (None, "dropout 0.2")])
def test_the_start_says_which_dropout_is_on(
    make_config: Any, student_folder: Path, tmp_path: Path, dropout: float | None, expected: str
) -> None:
    noisy = edited(student_folder, tmp_path / "noisy", attention_dropout=0.2)
    student = as_student(load(make_config(student=noisy, dropout=dropout))[1])
    assert f"documents packed in rows, {expected}" in student.description()
    assert re.search(r"; trains all [\d,]+ weights$", student.description())


@pytest.mark.parametrize("loader", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_a_failed_import_names_its_cause(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    def fail(*args: Any, **keys: Any) -> None:
        cause = RuntimeError("operator torchvision::nms does not exist")
        raise ImportError("Could not import module 'LlamaConfig'. Are its requirements met?") from cause

    monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", fail)
    assert "'LlamaConfig': operator torchvision::nms does not exist: torchvision does not fit" in refusal(
        make_config()
    )


def test_another_tokenizer_is_refused(make_config: Any, student_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(student_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (token for token, index in vocabulary.items() if index in (100, 101))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    config = make_config(student=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="its tokenizer is not the cache's") as caught:
        load_tokenizer(config, ddk_cache.open_cache(config.cache))
    assert "has id 100 and id 101" in str(caught.value)


def test_a_tokenizer_with_another_end_of_text_is_taken(
    make_config: Any, student_folder: Path, tmp_path: Path
) -> None:
    """An Instruct model's cache and its base: every id means the same."""
    base = edited(student_folder, tmp_path / "base", "tokenizer_config.json", eos_token="<|im_end|>")
    config = make_config(student=base)
    cache = ddk_cache.open_cache(config.cache)
    line = harmless_differences(load_tokenizer(config, cache), cache)
    assert line is not None
    assert "eos_token is '<eos>' and '<|im_end|>'" in line


def test_a_head_too_narrow_for_the_tokenizer_is_refused(
    make_config: Any, student_folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(student_folder)
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(student_folder / name, tmp_path / "narrow")
    assert "200 logits" in refusal(make_config(student=str(tmp_path / "narrow")))


def refusal(config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_weights_are_refused(make_config: Any, student_folder: Path, tmp_path: Path) -> None:
    deeper = edited(student_folder, tmp_path / "deeper", num_hidden_layers=2)
    assert "lacks weights, such as model.layers.1" in refusal(make_config(student=deeper))


def test_a_damaged_generation_configuration_is_no_missing_one(
    make_config: Any, student_folder: Path, tmp_path: Path
) -> None:
    student = edited(student_folder, tmp_path / "student")
    (Path(student) / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(make_config(student=student))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**7}, "asks for 10,000,000 layers; 1 to 10,000 are possible"),
        ({"num_hidden_layers": -1}, "asks for -1 layers"),
        ({"num_attention_heads": 0}, "num_attention_heads: must be at least 1"),
        ({"head_dim": "x"}, "head_dim"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": 2**40}, "do not have the shapes that its config.json requires"),
        ({"hidden_size": 10**9}, "do not have the shapes that its config.json requires"),
        ({"final_logit_softcapping": "x"}, "cannot load"),
        ({"layer_types": 3}, "not iterable"),
        (None, "must hold keys and values"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(
    make_config: Any, student_folder: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    bad = edited(student_folder, tmp_path / "bad", **change or {})
    if change is None:
        (tmp_path / "bad" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"^student: ") as caught:
        dry_run(make_config(student=bad))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_id_beyond_all_integers_is_refused(
    make_config: Any, student_folder: Path, tmp_path: Path
) -> None:
    bad = edited(student_folder, tmp_path / "bad")
    tokenizer = json.loads((tmp_path / "bad" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 2**40, "content": "<huge>"})
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has no loadable tokenizer" in refusal(make_config(student=bad))


def test_only_safetensors_are_loaded(make_config: Any, student_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(student_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert "safetensors" in refusal(make_config(student=str(tmp_path / "pickled")))


def test_damaged_weights_are_refused(make_config: Any, student_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(student_folder, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "cannot load" in refusal(make_config(student=str(tmp_path / "cut")))


def test_a_student_for_shorter_rows_is_refused(
    make_config: Any, student_folder: Path, tmp_path: Path
) -> None:
    short = edited(student_folder, tmp_path / "short", max_position_embeddings=16)
    assert "takes at most 16 tokens" in refusal(make_config(student=short))


def test_a_missing_folder_is_refused(make_config: Any, tmp_path: Path) -> None:
    cache = ddk_cache.open_cache(make_config().cache)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "models/small/student"):
        with pytest.raises(ConfigError, match=f"^student: {re.escape(name)}: there is no such folder$"):
            load_tokenizer(make_config(student=name), cache)


@pytest.mark.parametrize("name", ["no/such-student", "missing"])
def test_a_missing_student_is_refused(make_config: Any, name: str) -> None:
    config = make_config(student=name)
    with pytest.raises(ConfigError, match=f"student: {name} has no loadable tokenizer: there is no folder"):
        load_tokenizer(config, ddk_cache.open_cache(config.cache))


def test_an_adapter_on_the_head_is_refused(make_config: Any) -> None:
    config = make_config(lora={"target_modules": ["lm_head"]})
    with pytest.raises(ConfigError, match="LoRA adapters cannot be on it"):
        examine(load(config)[1], config, SEQ_LENGTH)


def test_adapters_on_missing_layers_are_refused(make_config: Any) -> None:
    assert refusal(make_config(lora={"target_modules": ["query"]})).startswith("lora.target_modules: ")


def test_gradient_checkpointing_changes_nothing_but_memory(make_config: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        cache, model = load(make_config(gradient_checkpointing=checkpointing))
        student = as_student(model).train()
        assert student.inner.is_gradient_checkpointing == checkpointing
        student(make_batch({0: cache["code"].train.read([0, 1])}, 400), 0.2).loss.backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(*gradients)


def test_bf16_is_autocast_over_float32_weights(make_config: Any, tmp_path: Path) -> None:
    config = make_config(bf16=True)
    cache, model = load(config)
    student = as_student(model, bf16=True)
    batch = make_batch({0: cache["code"].train.read([0, 1])}, 400)
    loss = student(batch, 0.2).loss
    loss.backward()
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    student.bf16 = False
    exact = student(batch, 0.2).loss.item()
    assert loss.item() != exact
    assert loss.item() == pytest.approx(exact, rel=2e-3)  # bfloat16 rounds to 2^-9; here it makes 6e-4
    save_student(student, tmp_path / "saved", config, is_main=True)
    saved = tmp_path / "saved"
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1  # weights may be read as the rest


def test_a_folder_without_a_model_is_one_line(cache_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=str(cache_folder), student=str(tmp_path), output_dir="unused")
    with pytest.raises(ConfigError, match=r"^student: .*: the folder holds no model: no config\.json$"):
        load_tokenizer(config, ddk_cache.open_cache(str(cache_folder)))
