"""The configuration: its keys and defaults, and one-line errors."""

from pathlib import Path

import pytest
import yaml

from ddk_cache.errors import ConfigError
from ddk_cache.util.configuration import load
from ddk_train.config import TrainConfig

REQUIRED = {"cache": "c", "student": "s", "output_dir": "o"}


def read(tmp_path: Path, keys: dict[str, object], *overrides: str) -> TrainConfig:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(REQUIRED | keys))
    return load(path, overrides, TrainConfig)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = read(tmp_path, {})
    assert (config.strategy, config.smoothing, config.distill_interval) == ("ddk", 0.5, 1000)
    assert (config.gamma, config.temperature, config.tail) == (0.2, 1.0, "bucket")
    assert (config.learning_rate, config.min_learning_rate, config.warmup_steps) == (3e-5, 3e-6, 1000)
    assert config.max_steps == 30_000
    assert config.report_to == ["tensorboard"]


def test_every_key_says_what_it_is() -> None:
    assert all(field.description for field in TrainConfig.model_fields.values())


def test_null_turns_smoothing_off(tmp_path: Path) -> None:
    assert read(tmp_path, {}, "smoothing=null").smoothing is None


def test_lora_is_set_key_by_key(tmp_path: Path) -> None:
    config = read(tmp_path, {}, "lora.r=4", "lora.target_modules=[q_proj, v_proj]")
    assert config.lora is not None
    assert (config.lora.r, config.lora.target_modules) == (4, ["q_proj", "v_proj"])


@pytest.mark.parametrize("value", ["none", ["none"], []])
def test_no_tracker(tmp_path: Path, value: object) -> None:
    assert read(tmp_path, {"report_to": value}).report_to == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"strategy": "dkd"}, "strategy: "),
        ({"smoothing": 1.5}, "smoothing: "),
        ({"distill_intervall": 5}, "did you mean 'distill_interval'"),
        ({"strategy": "static"}, "weights: must be given with strategy static"),
        ({"gap_temperature": 0.5}, "gap_temperature: does nothing without strategy: gap"),
        ({"torch_compile": True, "fsdp": True}, "torch_compile: does not work with fsdp: true"),
        ({"advantage_clip": 2.0}, "advantage_clip: does nothing without policy_gradient_weight"),
        ({"policy_gradient_weight": 1.0, "importance_clip": 0.5}, "importance_clip: "),
        ({"lora": {"quantize": "nf4", "merge": True}}, "lora: merge: does not work with quantize"),
        ({"lora": {"quantize": "nf4"}, "fsdp": True}, "lora.quantize: does not work with fsdp"),
        ({"freeze": "body", "lora": {}}, "freeze: trains the embeddings, and lora trains adapters"),
        ({"weights": {"code": 1}}, "weights: must be given with strategy static"),
        ({"strategy": "static", "weights": {"code": 0}}, "weights: must not all be 0"),
        ({"learning_rate": 1e-6}, "min_learning_rate: must not be above learning_rate"),
        ({"report_to": ["tensorboard", "mlflow"]}, "report_to.1: "),
        ({"attn_implementation": "flash_attention_2", "bf16": False}, "flash_attention_2 needs bf16"),
        ({"fsdp": True, "optimizer": "adamw_8bit"}, "adamw_8bit does not work with fsdp"),
        ({"max_steps": 0}, "max_steps: "),
        ({"max_steps": True}, "max_steps: must be a number"),
        ({"gamma": {"start": True, "end": 0}}, "gamma.start: must be a number"),
        ({"strategy": "static", "weights": {"code": True}}, "weights.code: must be a number"),
        ({"beta": 0.3}, "beta: does nothing without divergence: jensen_shannon"),
        ({"strategy": "uniform", "smoothing": None}, "smoothing: does nothing without strategy: ddk or auto"),
        ({"gamma": {"start": 1}}, "gamma.end: is required"),
        ({"gamma": "much"}, "gamma: "),
        ({"domains": {"code": {"gama": 1}}}, "domains.code.gama: unknown key; did you mean 'gamma'"),
        ({"divergence": "reverse", "tail": "drop"}, "divergence: reverse needs tail: bucket"),
        ({"beta": 1.0}, "beta: "),
    ],
)
def test_a_mistake_is_a_one_line_error(tmp_path: Path, keys: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, keys)
    assert str(caught.value).startswith(f"{tmp_path / 'train.yaml'}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


FLOATS = (
    *("gamma", "gamma.start", "gamma.end", "cross_entropy_weight", "domains.code.gamma", "max_epochs"),
    *("domains.code.cross_entropy_weight", "domains.code.max_epochs", "max_grad_norm", "stop_ratio"),
    *("weights.code", "gap_temperature", "beta", "temperature", "learning_rate", "weight_decay"),
    *("timeout_minutes", "policy_gradient_weight", "advantage_clip", "importance_clip"),
)
NEEDS = {
    "gamma.start": ["gamma.end=1"],
    "gamma.end": ["gamma.start=1"],
    "weights.code": ["strategy=static"],
    "gap_temperature": ["strategy=gap"],
    "advantage_clip": ["policy_gradient_weight=1"],
    "importance_clip": ["policy_gradient_weight=1"],
    "beta": ["divergence=jensen_shannon"],
}


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [".inf", ".nan", "-1"])
def test_a_number_must_be_finite_and_not_negative(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.yaml: {key}: .*\(got ") as caught:
        read(tmp_path, {}, *NEEDS.get(key, []), f"{key}={value}")
    assert "\n" not in str(caught.value)


def test_a_tilde_is_null(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output_dir: .*\(got null: YAML reads ~ and an empty"):
        read(tmp_path, {}, "output_dir=~")


def test_a_run_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output_dir: must be a folder of this machine, not a URL"):
        read(tmp_path, {}, "output_dir=s3://bucket/run")


def test_a_whole_configuration_may_be_written_out(tmp_path: Path) -> None:
    """As a run's own config.yaml is: defaults that another key makes idle are no mistake."""
    config = read(tmp_path, {"strategy": "uniform"})
    assert read(tmp_path, config.model_dump(mode="json")) == config
