"""Missing weights are refused before anything is spent, and other weights have another fingerprint."""

import importlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddk_build.config import TeacherConfig
from ddk_build.teacher.engines import check_teacher
from ddk_build.teacher.identity import SPEED, teacher_info, weights
from ddk_build.teacher.model import full_config
from ddk_build.teacher.tokenizer import load_tokenizer
from ddk_build.teacher.transformers_engine import load, right_attention
from ddk_build.teacher.weights import check_weights
from ddk_cache.errors import ConfigError, brief
from ddk_cache.format.layout import Target

MISSING = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path, teacher_folder: Path) -> Path:
    """Return a teacher to damage."""
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def config(model: Path, engine: str = "transformers", **engine_args: Any) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {"model": str(model), "engine": engine, "dtype": "float32", "engine_args": engine_args}
    )


def refusal(model: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_teacher(config(model, **more), 64)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def change(model: Path, **tensors: torch.Tensor | None) -> None:
    path = model / "model.safetensors"
    held = load_file(path) | {key: value for key, value in tensors.items() if value is not None}
    gone = {key for key, value in tensors.items() if value is None}
    save_file({key: value for key, value in held.items() if key not in gone}, path, {"format": "pt"})


def test_a_missing_weight_is_named(model: Path) -> None:
    change(model, **{MISSING: None})
    assert refusal(model) == f"teacher.model: {model} lacks 1 weight, such as {MISSING}"


def test_a_weight_of_another_shape_is_refused(model: Path) -> None:
    change(model, **{MISSING: torch.zeros(4, 4)})
    shapes = "has shape [4, 4]; config.json requires [128, 64]"
    assert refusal(model) == f"teacher.model: {model}: {MISSING} {shapes}"


def test_a_configuration_that_contradicts_itself_is_one_line(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace('"head_dim": 16', '"head_dim": 15'))
    assert "head_dim" in refusal(model)


@pytest.mark.parametrize("argument", [{"device_map": "cuda"}, {"quantization_config": "4 bits"}])
def test_what_only_loading_finds_is_one_line(model: Path, argument: dict[str, Any]) -> None:
    """Transformers raises errors of any type here."""
    if torch.cuda.is_available() and "device_map" in argument:
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        load(config(model, **argument), Target(), 64)


@pytest.mark.parametrize("keep", [-100, 3, 1000], ids=["the end", "the header's length", "half the header"])
def test_a_file_that_was_cut_off_is_named(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(model).startswith(f"teacher.model: {path}: ")


def test_pickled_weights_are_not_opened(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "safetensors" in refusal(model)


def test_load_formats_that_execute_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.engine_args\.load_format: pt executes"):
        check_weights(config(model, "vllm", load_format="pt"))
    check_weights(config(model, "vllm", load_format="dummy"))


def test_tied_weights_are_one(model: Path) -> None:
    change(model, **{"lm_head.weight": None})
    assert "lm_head.weight" in refusal(model)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(
        text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    check_teacher(config(model), 64)


def test_quantised_weights_stand_under_their_modules(model: Path) -> None:
    """As GPTQ and AWQ write them: other names and shapes, one for each module."""
    path = model / "model.safetensors"
    held = load_file(path)
    module = MISSING.removesuffix(".weight")
    del held[MISSING]
    held |= {f"{module}.qweight": torch.zeros(3, dtype=torch.int32), f"{module}.scales": torch.zeros(3)}
    save_file(held, path, {"format": "pt"})
    described = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(
        described + ', "quantization_config": {"quant_method": "gptq", "bits": 4}}'
    )
    check_weights(config(model, "vllm"))
    del held[f"{module}.qweight"], held[f"{module}.scales"]
    save_file(held, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=MISSING):
        check_weights(config(model, "vllm"))


def test_an_argument_that_transformers_does_not_take(model: Path) -> None:
    assert refusal(model, no_such_argument=1).startswith("teacher.engine_args: ")


def test_a_path_that_does_not_exist() -> None:
    assert refusal(Path("/no/such/folder")) == "teacher.model: /no/such/folder: there is no such folder"


def test_other_weights_are_told_apart(model: Path, teacher_folder: Path) -> None:
    """Of the same names, types, shapes and sizes; and what generation alone reads does not count."""
    before = weights(config(teacher_folder))
    assert before is not None
    assert before.startswith("sha256:")
    (model / "generation_config.json").write_text('{"temperature": 0.1}')
    assert weights(config(model)) == before
    held = load_file(model / "model.safetensors")
    change(model, **{MISSING: held[MISSING] + 1})
    assert weights(config(model)) != before


def test_what_decides_how_weights_are_taken_is_told_apart(model: Path) -> None:
    """A quantisation's description, and code of the model's own where it is run."""
    plain = config(model)
    trusting = plain.model_copy(update={"trust_remote_code": True})
    before = weights(plain)
    (model / "modeling_own.py").write_text("SCALE = 1")
    assert weights(plain) == before
    digests = [weights(trusting)]
    (model / "modeling_own.py").write_text("SCALE = 2")
    digests.append(weights(trusting))
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    digests += [weights(trusting), weights(plain)]
    assert len({before, *digests}) == 5


def test_soft_caps_on_attention_want_eager(tmp_path: Path) -> None:
    """0.27 nats in a small Gemma 2: sdpa leaves the cap out without a word."""
    from transformers import Gemma2Config, LlamaConfig

    assert right_attention(LlamaConfig()) is None
    capped = Gemma2Config(vocab_size=400, hidden_size=32, num_hidden_layers=1, attn_logit_softcapping=2.0)
    assert right_attention(capped) == "eager"
    capped.save_pretrained(tmp_path)
    line = refusal(tmp_path, attn_implementation="sdpa")
    assert line.startswith("teacher.engine_args.attn_implementation: sdpa ignores the soft cap")


def test_an_import_error_names_its_cause(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers reports a torchvision that was built for another torch."""
    import transformers

    class Broken:
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            try:
                raise RuntimeError("operator torchvision::nms does not exist")
            except RuntimeError as error:
                raise ModuleNotFoundError(
                    "Could not import module 'LlamaConfig'. Are this object's requirements defined correctly?"
                ) from error

    expected = (
        "Could not import module 'LlamaConfig': operator torchvision::nms does not exist: torchvision does "
        "not fit this torch; pip uninstall torchvision or install the matching version"
    )
    for name, part in (("AutoConfig", full_config), ("AutoTokenizer", load_tokenizer)):
        monkeypatch.setattr(transformers, name, Broken)
        with pytest.raises(ConfigError) as caught:
            part(config(model))
        assert str(caught.value).endswith(f": {expected}")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_part.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)

    def load() -> None:
        try:
            importlib.import_module("lazy_part")
        except ModuleNotFoundError:
            raise ModuleNotFoundError("Could not import module 'Part'. Are its requirements met?")  # noqa: B904

    with pytest.raises(ModuleNotFoundError) as caught:
        load()
    assert brief(caught.value) == "Could not import module 'Part': No module named 'no_such_package'"
    assert brief(ImportError("needs sentencepiece. Install it")) == "needs sentencepiece. Install it"


def test_an_error_of_ten_thousand_letters_is_one_line() -> None:
    line = brief(RuntimeError("one\n  two\n" + "three " * 2000))
    assert line.startswith("one two three")
    assert len(line) < 310


def test_arguments_of_speed_and_secrets_are_not_stored(teacher_folder: Path) -> None:
    info = teacher_info(
        config(
            teacher_folder,
            "vllm",
            quantization="fp8",
            max_num_seqs=8,
            hf_token="hf_x",
            seed=3,
            load_format=None,
        )
    )
    assert info.engine_args == {"quantization": "fp8"}
    finer = config(teacher_folder, "vllm").model_copy(update={"head_dtype": "float32"})
    assert teacher_info(finer).engine_args == {"head_dtype": "float32"}


def test_the_arguments_of_speed_exist() -> None:
    """Arguments that vLLM or transformers have had; a misspelt name would refuse a cache for nothing."""
    vllm = find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    source = (Path(vllm.origin).parent / "engine/arg_utils.py").read_text()
    gone = {"swap_space", "max_num_partial_prefills"}  # of older versions
    of_transformers = {
        "device_map",
        "max_memory",
        "offload_folder",
        "offload_state_dict",
        "low_cpu_mem_usage",
    }
    assert [name for name in SPEED - gone - of_transformers if f"    {name}:" not in source] == []
