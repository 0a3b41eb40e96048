"""What stage one costs beside the teacher's forward pass, in tokens a second.

a  prefill         the forward pass alone: one position's logits a document
b  dicts           vLLM's prompt_logprobs, its default
c  flat            the same with flat_logprobs, the best public way
h  every head      the forward pass with every position's logits, of which nothing is kept
d' capture         Teacher.score
d  build           `ddk-cache build` with reading, encoding and writing, all but the engine's start

a, b and c are measured in a vLLM as it comes, h and d in the build's, each in a process of its own: what one
does to memory and settings does not reach the other. The two take turns, and a round that is not counted
comes before each measured one. All read the documents of the same rows; b and c, the slow ones, read some
of them. d counts the tokens of both splits.

    python -m tools.bench.capture --teacher tiny          # 2 layers of 64, vocabulary 49,152
    python -m tools.bench.capture --teacher 135m          # SmolLM2-135M-Instruct
    python -m tools.bench.capture --teacher 7b --tokens 1000000 --seq-length 2048     # needs a GPU
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ddk_build import build
from ddk_build.config import BuildConfig, TeacherConfig
from ddk_build.scoring import requests
from ddk_build.targets import SparseTarget
from ddk_build.teacher import load_teacher
from ddk_build.teacher_vllm import ONE_TOKEN, VllmTeacher
from ddk_build.vllm_arguments import engine_arguments
from ddk_cache import open_cache
from ddk_cache.layout import Target
from tools.real_data import teacher_folder, write_domains

DOMAINS = ("python", "docs")
SIDES = ("prefill", "dicts", "flat", "every head", "capture", "build")
# Random weights in the shape of Qwen2.5: layers, width, heads, key-value heads, MLP width, vocabulary
SHAPES = {
    "tiny": (2, 64, 2, 2, 128, 49_152),
    "0.5b": (24, 896, 14, 2, 4864, 151_936),
    "1.5b": (28, 1536, 12, 2, 8960, 151_936),
    "7b": (28, 3584, 28, 4, 18_944, 152_064),
}


def shaped_teacher(folder: Path, shape: tuple[int, int, int, int, int, int]) -> Path:
    """A folder that vLLM fills with random weights; the tokenizer is SmolLM2's."""
    from transformers import AutoTokenizer, Qwen2Config

    layers, hidden, heads, kv_heads, mlp, vocab = shape
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocab,
        tie_word_embeddings=hidden < 3000,
        max_position_embeddings=32_768,
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder()).save_pretrained(folder)
    return folder


def build_config(teacher: TeacherConfig, files: dict[str, Path], tokens: int, rows: int) -> BuildConfig:
    return BuildConfig(
        teacher=teacher,
        cache="replaced",
        seq_length=rows,
        validation_rows=4,
        domains={  # type: ignore[arg-type]
            name: {"path": "json", "data_files": str(files[name]), "max_tokens": tokens // len(DOMAINS)}
            for name in DOMAINS
        },
    )


def timed_build(config: BuildConfig, teacher: VllmTeacher, folder: Path) -> float:
    """Seconds of a whole build by a teacher that has been started."""
    config = config.model_copy(update={"cache": str(folder)})
    with patch.object(build, "checked_teacher", lambda *_: teacher):
        return seconds(lambda: build.build_cache(config))


def documents_of(folder: Path) -> list[np.ndarray]:
    """The documents of a cache's train rows, as the build hands them to the teacher."""
    found = []
    for split in (open_cache(str(folder))[name].train for name in DOMAINS):
        rows = split.read(range(len(split)), targets=False)
        found += requests(vars(rows)).documents
    return found


def first(documents: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    ends = np.cumsum([len(document) for document in documents])
    return documents[: int(np.searchsorted(ends, tokens)) + 1]


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def nothing_kept(logits: torch.Tensor, labels: torch.Tensor, target: Target, *_: Any) -> SparseTarget:
    shape = (len(logits), target.width)
    return SparseTarget(
        torch.zeros(shape, dtype=torch.int32), torch.zeros(shape), labels.float(), labels.float()
    )


def build_sides(config: BuildConfig, folder: Path) -> dict[str, float]:
    """Tokens a second of h, d' and d, in the build's engine; leaves a cache in ``folder``."""
    teacher = load_teacher(config.teacher, config.target, config.seq_length)
    assert isinstance(teacher, VllmTeacher)
    assert teacher.fast, "the fast path does not hold here"
    timed_build(config, teacher, folder)
    documents = documents_of(folder)
    total = sum(map(len, documents))
    states = [domain.state for domain in open_cache(str(folder)).values()]
    both = sum(state.train.tokens + state.validation.tokens for state in states)
    for number in range(2):  # the second counts
        with patch("ddk_build.capture.sparse_target", nothing_kept):
            heads = seconds(lambda: teacher.score(documents))
        rates = {
            "every head": total / heads,
            "capture": total / seconds(lambda: teacher.score(documents)),
            "build": both / timed_build(config, teacher, folder.with_name(f"{folder.name}-{number}")),
        }
    return rates


def public_sides(config: BuildConfig, folder: Path, slow_tokens: int) -> dict[str, float]:
    """Tokens a second of a, b and c, in a vLLM as it comes, over the documents of the cache in ``folder``."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as in the build
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(config.teacher, config.target, config.seq_length)
    for ours in {"worker_extension_cls", "hf_overrides"} - config.teacher.engine_args.keys():
        arguments.pop(ours, None)
    llm = LLM(**arguments)
    documents = documents_of(folder)
    k = config.target.top_k

    def rate(chosen: list[np.ndarray], **prompt_logprobs: Any) -> float:
        prompts = [{"prompt_token_ids": document[:-1].tolist()} for document in chosen]  # as the build
        params = SamplingParams(**ONE_TOKEN, **prompt_logprobs)
        return sum(map(len, chosen)) / seconds(lambda: llm.generate(prompts, params, use_tqdm=False))

    for _ in range(2):  # the second counts
        rates = {
            "prefill": rate(documents),
            "dicts": rate(first(documents, slow_tokens), prompt_logprobs=k),
            "flat": rate(first(documents, slow_tokens), prompt_logprobs=k, flat_logprobs=True),
        }
    return rates


def alone(call: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """The call's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


@click.command()
@click.option("--teacher", "name", type=click.Choice([*SHAPES, "135m"]), default="tiny", show_default=True)
@click.option("--tokens", default=100_000, show_default=True, help="Tokens of a build.")
@click.option("--slow-tokens", default=8_000, show_default=True, help="Tokens that b and c read.")
@click.option("--seq-length", default=512, show_default=True)
@click.option("--top-k", default=64, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--engine-args", default="{}", help="JSON, for vLLM.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_capture.json"))
def main(
    name: str,
    tokens: int,
    slow_tokens: int,
    seq_length: int,
    top_k: int,
    dtype: str,
    repeats: int,
    engine_args: str,
    output: Path,
) -> None:
    """Measure the sides in turn and print medians and ratios."""
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = teacher_folder() if name == "135m" else shaped_teacher(folder / "teacher", SHAPES[name])
        # On a CPU, compiling takes longer than it saves here.
        arguments: dict[str, Any] = {"enforce_eager": not torch.cuda.is_available()}
        if name != "135m":
            arguments["load_format"] = "dummy"
        arguments |= json.loads(engine_args)
        teacher = TeacherConfig(model=str(model), dtype=dtype, engine_args=arguments)
        config = build_config(teacher, write_domains(folder, tokens), tokens, seq_length)
        config = config.model_copy(update={"target": Target(top_k=top_k)})
        for number in range(repeats):
            cache = folder / f"cache-{number}"
            rounds.append(alone(build_sides, config, cache) | alone(public_sides, config, cache, slow_tokens))
    report(name, {side: [rates[side] for rates in rounds] for side in SIDES}, output)


def report(name: str, measured: dict[str, list[float]], output: Path) -> None:
    medians = {side: statistics.median(rates) for side, rates in measured.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    table = Table("side", "tokens/s", "of prefill", "of flat", title=f"{name} teacher on {device}")
    for side, rate in medians.items():
        of_prefill, of_flat = rate / medians["prefill"], rate / medians["flat"]
        table.add_row(side, f"{rate:,.0f}", f"{of_prefill:.2f}", f"{of_flat:.2f}")
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {"teacher": name, "device": device, "tokens_per_second": medians, "all": measured}
    output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
