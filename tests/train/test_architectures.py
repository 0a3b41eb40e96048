"""Students of many architectures against transformers' own logits, each document alone."""

import pytest
import transformers
from models_table import ARCHITECTURES, compare, make_model

from ddk_cache.errors import ConfigError
from ddk_train.architecture import choose_attention, set_dropout_keys, set_dropout_modules

# The rest take seconds each to import or to step through in Python; tools/models_table.py tries them all.
QUICK = """
biogpt bloom codegen cohere2 ctrl deepseek_v3 falcon_mamba gemma gemma2 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_oss gptj granite lfm2 llama llama4_text mamba minicpm3 mistral mixtral mpt nanochat olmo2 openai-gpt opt
phi phi3 qwen2 qwen3 recurrent_gemma starcoder2 vaultgemma xglm
"""
QUICK_VARIANTS = (
    "falcon (ALiBi)",
    "gemma3_text, capped",
    "llama, dynamic RoPE",
    "llama4_text, chunks of 8",
    "phi3, long RoPE",
)
NOT_PACKED = {
    *("biogpt", "bloom", "falcon (ALiBi)", "falcon_mamba", "gpt_oss", "lfm2", "llama4_text, chunks of 8"),
    *("mamba", "mpt", "openai-gpt", "opt", "phi3, long RoPE", "recurrent_gemma", "xglm"),
}
CAPS = {"gemma2": 30, "gemma3_text, capped": 5, "nanochat": 15, "recurrent_gemma": 30, "vaultgemma": 30}


@pytest.mark.filterwarnings("ignore")  # of transformers' older models, about themselves
@pytest.mark.parametrize("name", [*QUICK.split(), *QUICK_VARIANTS])
def test_a_student_has_transformers_losses_and_gradient(name: str) -> None:
    outcome = compare(*ARCHITECTURES[name])
    assert outcome.errors is not None, outcome.refusal
    assert outcome.student is not None
    assert max(outcome.errors) < 1e-5
    assert outcome.student.layout.packed == (name not in NOT_PACKED)
    assert outcome.student.traits.softcap == (pytest.approx(CAPS[name]) if name in CAPS else None)


def test_a_head_of_more_than_one_layer_is_refused() -> None:
    outcome = compare(*ARCHITECTURES["modernbert-decoder"])
    assert "does not make its logits by one linear layer" in outcome.refusal


def test_attention_is_the_best_that_is_right() -> None:
    capped = transformers.Gemma2Config()
    assert choose_attention("auto", capped) == "eager"
    assert choose_attention("flash_attention_2", capped) == "flash_attention_2"
    assert choose_attention("sdpa", transformers.LlamaConfig()) == "sdpa"
    with pytest.raises(ConfigError, match="sdpa leaves out this model's attn_logit_softcapping of 50"):
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
    found = {name: value for name, value in vars(config).items() if "drop" in name or "jitter" in name}
    assert found
    assert all(value == 0 for value in found.values() if isinstance(value, float))
    module = transformers.models.gpt2.modeling_gpt2.nn.Dropout(0.4)
    set_dropout_modules(module, 0.2)
    assert module.p == 0.2
