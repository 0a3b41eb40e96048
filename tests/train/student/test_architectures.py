"""Students of many architectures against transformers' logits, each document alone."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from ddk_cache.errors import ConfigError
from ddk_train.student.architecture import choose_attention, set_dropout_keys, set_dropout_modules
from tools.docs.students import ARCHITECTURES, compare, kind, make_model

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def listed_students() -> dict[str, str]:
    """Return the page's kind of each architecture."""
    text = PAGE.read_text(encoding="utf-8").partition("<!-- list of students")[2].partition("<!-- end")[0]
    lines = re.findall(r"^- \*\*(.*?)\*\*: (.*)$", text, re.MULTILINE)
    return {name: kind for kind, names in lines for name in re.findall(r"`([^`]+)`", names)}


@pytest.mark.filterwarnings("ignore")  # of transformers' older models, about themselves
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_student_has_transformers_losses_and_gradient(name: str) -> None:
    """And the page says how it is taken, or why it is not."""
    outcome = compare(*ARCHITECTURES[name])
    assert kind(outcome) == listed_students()[name]
    assert (outcome.errors is None) == (name == "modernbert-decoder"), outcome.refusal
    assert max(outcome.errors or [0]) < 1e-5


def test_the_page_has_no_other_students() -> None:
    assert sorted(listed_students()) == sorted(ARCHITECTURES)


def test_attention_is_the_best_that_is_right() -> None:
    capped = transformers.Gemma2Config()
    assert choose_attention("auto", capped) == "eager"
    assert choose_attention("flash_attention_2", capped) == "flash_attention_2"
    assert choose_attention("sdpa", transformers.LlamaConfig()) == "sdpa"
    with pytest.raises(ConfigError, match="sdpa ignores this model's attn_logit_softcapping of 50"):
        choose_attention("sdpa", capped)
    taken = {kind: make_model(kind, {}).config._attn_implementation for kind in ("llama", "gpt_oss", "bloom")}
    assert taken == {"llama": "sdpa", "gpt_oss": "eager", "bloom": "eager"}


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mixtral"])
def test_dropout_is_set_everywhere(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, vocab_size=100)
    if kind == "mixtral":
        config.attention_dropout, config.router_jitter_noise = 0.1, 0.3
    if kind == "opt":
        config.layerdrop = 0.5
    set_dropout_keys(config, 0.0)
    values = {name: value for name, value in vars(config).items() if "drop" in name or "jitter" in name}
    assert values
    assert all(value == 0 for value in values.values() if isinstance(value, float))
    module = torch.nn.Dropout(0.4)
    set_dropout_modules(module, 0.2)
    assert module.p == 0.2
