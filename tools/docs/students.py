"""Which architectures train correctly as students: the list in docs/models.md, made by trying each.

    python -m tools.docs.students docs/models.md

A small random model of each architecture is given rows of several documents. Cross-entropy, KL and the
gradient's norm are compared with those of transformers' own logits, each document alone, with eager
attention where there is one, under the loss written plainly (``reference_loss``); all in float32.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from torch import Tensor

from ddk_cache import Rows
from ddk_train.config import TrainConfig
from ddk_train.data.batches import make_batch
from ddk_train.loss.fused import reference_loss
from ddk_train.student.architecture import choose_attention
from ddk_train.student.probe import examine
from ddk_train.student.student import Student

VOCABULARY, SEQ_LENGTH, ENTRIES, GAMMA = 100, 24, 6, 0.5
CONFIG = TrainConfig(cache="c", student="s", output_dir="o", bf16=False)

# A small model's keys, under every name that configurations have for them. Heads of 32 are the smallest that
# vLLM's attention on a CPU takes, which tools/docs/teachers.py needs.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "state_size": 16,
    "ffn_dim": 128,
}
# vLLM on a CPU supports only this size.
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + index / 8 for index in range(16)],
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2, "mamba_d_ssm": 256}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}

PLAIN = """
afmoe apertus arcee biogpt bitnet bloom cohere cohere2 ctrl cwm diffllama doge dots1 ernie4_5
ernie4_5_moe exaone4 exaone_moe falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe
gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite granitemoe granitemoeshared helium
hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe llama llama4_text mamba minimax minimax_m2 ministral
mistral mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe openai-gpt opt
persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma rwkv seed_oss smollm3
solar_open stablelm starcoder2 vaultgemma xglm
"""
# Name in the table -> (transformers' model_type, the keys that differ from SMALL).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in PLAIN.split()} | {
    "bamba": ("bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    "codegen": ("codegen", {"rotary_dim": 16}),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v3": ("deepseek_v3", MLA),
    "falcon (ALiBi)": ("falcon", {"alibi": True}),
    "falcon (rotary)": ("falcon", {}),
    "falcon_h1": ("falcon_h1", MAMBA2),
    "gemma3_text, capped": ("gemma3_text", {"final_logit_softcapping": 5.0}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gptj": ("gptj", {"rotary_dim": 16}),
    "granitemoehybrid": ("granitemoehybrid", MAMBA2 | {"layer_types": ["mamba", "attention"]}),
    "llama, dynamic RoPE": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SEQ_LENGTH}),
    "llama, linear RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama4_text, chunks of 8": ("llama4_text", {"attention_chunk_size": 8}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 32, "expand": 2, "n_groups": 2}),
    "minicpm3": ("minicpm3", MLA | {"dim_model_base": 32}),
    "olmo_hybrid": ("olmo_hybrid", LINEAR),
    "phi3, long RoPE": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 8}),
    "qwen3_5_text": ("qwen3_5_text", LINEAR),
    "qwen3_next": ("qwen3_next", LINEAR),
    "xlstm": ("xlstm", {"num_heads": 4, "chunkwise_kernel": "chunkwise--native_autograd"}),
}


@dataclass(frozen=True)
class Outcome:
    """How an architecture trains as a student: its differences to transformers, or why it is refused."""

    student: Student | None
    errors: tuple[float, float, float] | None  # relative: cross-entropy, KL, gradient norm
    attention: str = ""
    refusal: str = ""


def make_model(kind: str, keys: dict[str, Any]) -> Any:
    """Return a small random model whose biases and norms matter, with the attention of training."""
    torch.manual_seed(0)
    default = transformers.AutoConfig.for_model(kind)
    config_class = type(default)
    config = config_class(**{key: value for key, value in SMALL.items() if settable(default, key)} | keys)
    attention = choose_attention("auto", config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def settable(config: Any, key: str) -> bool:
    """Return whether a configuration stores the key, rather than derives it from others."""
    attribute = getattr(type(config), key, None)
    return hasattr(config, key) and not (isinstance(attribute, property) and attribute.fset is None)


def make_rows() -> Rows:
    """Return three rows of three documents with a teacher's random answers."""
    random = np.random.default_rng(0)
    segments = np.repeat(np.array([[1, 2, 3, 0]] * 3, np.uint16), 6, axis=1)
    for row, lengths in enumerate([(5, 9, 7), (3, 17, 2), (12, 4, 8)]):
        segments[row] = np.repeat([1, 2, 3, 0], [*lengths, SEQ_LENGTH - sum(lengths)])
    shape = segments.shape
    mask = np.zeros(shape, bool)
    mask[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    ids = np.argsort(random.random((*shape, VOCABULARY)))[..., :ENTRIES].astype(np.int32)
    mass = random.dirichlet(np.ones(ENTRIES + 1), shape)
    return Rows.from_arrays(
        {
            "tokens": random.integers(3, VOCABULARY, shape, np.int32),
            "segments": segments,
            "loss_mask": mask,
            "ids": ids,
            "logprobs": np.log(mass[..., :-1]).astype(np.float32),
            "tail_logprob": np.log(mass[..., -1]).astype(np.float32),
            "label_logprob": np.zeros(shape, np.float32),
        }
    )


def plain_logits(model: Any, rows: Rows) -> Tensor:
    """Return transformers' own logits, each document alone, at positions with a label: [M, V]."""
    parts = []
    for tokens, segments, mask in zip(rows.tokens, rows.segments, rows.loss_mask, strict=True):
        for segment in np.unique(segments[segments > 0]):
            is_inside = segments == segment
            logits = model(torch.from_numpy(tokens[is_inside]).long()[None], use_cache=False).logits[0]
            parts.append(logits[torch.from_numpy(mask[is_inside])])
    return torch.cat(parts)


def gradient_norm(model: Any) -> float:
    """Return the norm of all weights' gradients, and clear them."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return float(norm)


def compare(kind: str, keys: dict[str, Any]) -> Outcome:
    """Compare one architecture's loss and gradient; ``refusal`` holds the message if it is refused."""
    model, rows = make_model(kind, keys), make_rows()
    try:
        student = Student(model, CONFIG, examine(model, CONFIG, SEQ_LENGTH)).eval()
    except ValueError as error:
        return Outcome(None, None, refusal=str(error))
    packed, attention = make_batch({0: rows}, VOCABULARY), model.config._attn_implementation
    result = student(make_batch({0: rows}, VOCABULARY, student.layout), GAMMA)
    result.loss.backward()
    values = [result.cross_entropy.item(), result.kl.item(), gradient_norm(model)]
    if attention == "sdpa":
        model.set_attn_implementation("eager")
    expected_loss = reference_loss(
        plain_logits(model, rows),
        packed.labels,
        packed.ids,
        packed.logprobs,
        packed.tail_logprob,
        gamma=GAMMA,
    )
    expected_loss.loss.backward()
    expected = [expected_loss.cross_entropy.item(), expected_loss.kl.item(), gradient_norm(model)]
    ce, kl, norm = (abs(actual / exact - 1) for actual, exact in zip(values, expected, strict=True))
    return Outcome(student, (ce, kl, norm), attention)


def kind(outcome: Outcome) -> str:
    """Return how an architecture is trained: rows, attention and changes of the logits; or its refusal."""
    if outcome.student is None:
        return f"refused: {outcome.refusal.removeprefix('student: ')}"
    transform = outcome.student.transform
    parts = ["packed" if outcome.student.layout.packed else "a document each", outcome.attention]
    if transform.scale != 1:
        parts.append(f"logits × {transform.scale:.4g}")
    if transform.softcap is not None:
        parts.append(f"logits capped at {transform.softcap:g}")
    return ", ".join(parts)


def listing(names: list[str]) -> str:
    """Return Markdown: the architectures by kind, and the largest difference of all."""
    kinds: dict[str, list[str]] = {}
    differences: dict[str, float] = {}
    for name in names:
        outcome = compare(*ARCHITECTURES[name])
        kinds.setdefault(kind(outcome), []).append(name)
        differences[name] = max(outcome.errors or [0])
        print(f"{name}: {kind(outcome)}, {differences[name]:.0e}", flush=True)
    worst = max(differences, key=differences.__getitem__)
    lines = [
        f"- **{kind}**: {quoted(kinds[kind])}"
        for kind in sorted(kinds, key=lambda kind: ("refused" in kind, -len(kinds[kind])))
    ]
    return "\n".join([*lines, "", f"The largest difference is {differences[worst]:.0e} (`{worst}`)."]) + "\n"


def quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def replace_list(page: Path, name: str, text: str) -> None:
    """Replace the list between the page's two marking lines."""
    begin, end = f"<!-- list of {name}: made by a tool -->\n\n", f"\n<!-- end of the list of {name} -->\n"
    head, marker, rest = page.read_text(encoding="utf-8").partition(begin)
    assert marker, f"{page} has no line {begin!r}"
    page.write_text(head + begin + text + end + rest.partition(end)[2], encoding="utf-8")


@click.command(help=__doc__)
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(page: Path) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    replace_list(page, "students", listing(sorted(ARCHITECTURES)))


if __name__ == "__main__":
    main()
