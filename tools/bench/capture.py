"""What capture costs beside the teacher's forward pass, in tokens a second.

prefill       the forward pass alone: logits of one position of each document
dicts         vLLM's prompt_logprobs, its default
flat          the same with flat_logprobs, the fastest public way
every head    the forward pass with logits of every position, none of which are kept
capture       Teacher.score
build         `ddk-cache build` with reading, encoding and writing, without the engine's start

The first three run in a plain vLLM, the others in the build's engine, each in a new process, so that neither
changes the memory and settings of the other. The two take turns; a warm-up round comes before each measured
one. All read the documents of the same rows; dicts and flat, the slow ones, read some of them. build counts
the tokens of both splits.

    python -m tools.bench.capture --teacher tiny          # 2 layers of 64, vocabulary 49,152
    python -m tools.bench.capture --teacher 135m          # SmolLM2-135M-Instruct
    python -m tools.bench.capture --teacher 7b --tokens 1000000 --seq-length 2048     # needs a GPU
"""

import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch

from ddk_build import build
from ddk_build.capture.scoring import requests
from ddk_build.config import BuildConfig
from ddk_build.teacher.engines import load_teacher
from ddk_build.teacher.hooked_engine import ONE_TOKEN
from ddk_build.teacher.targets import SparseTarget
from ddk_build.teacher.vllm_arguments import engine_arguments
from ddk_build.teacher.vllm_engine import VllmTeacher
from ddk_cache import open_cache
from ddk_cache.format.layout import Target
from tools.bench.shared.teachers import SHAPES, shaped_teacher
from tools.frame import in_new_process, output_option, seconds, show, write_json
from tools.real_data import teacher_folder, write_domains

DOMAINS = ("python", "docs")
SIDES = ("prefill", "dicts", "flat", "every head", "capture", "build")


@dataclass(frozen=True)
class Settings:
    """What is measured, as on the command line."""

    teacher: str
    tokens: int
    slow_tokens: int
    seq_length: int
    top_k: int
    dtype: str
    rounds: int
    engine_args: str

    def build(self, folder: Path) -> BuildConfig:
        """Write teacher and text into ``folder``; return the build over them, whose ``cache`` is replaced."""
        is_real = self.teacher == "135m"
        # On a CPU, compiling takes longer than it saves here.
        arguments: dict[str, Any] = {"enforce_eager": not torch.cuda.is_available()}
        arguments |= {} if is_real else {"load_format": "dummy"}
        model = teacher_folder() if is_real else shaped_teacher(folder / "teacher", self.teacher)
        files = write_domains(folder, self.tokens)
        return BuildConfig.model_validate(
            {
                "teacher": {
                    "model": str(model),
                    "dtype": self.dtype,
                    "engine_args": arguments | json.loads(self.engine_args),
                },
                "cache": "replaced",
                "seq_length": self.seq_length,
                "target": {"top_k": self.top_k},
                "validation_rows": 4,
                "domains": {
                    name: {"path": str(files[name]), "max_tokens": self.tokens // len(DOMAINS)}
                    for name in DOMAINS
                },
            }
        )


def timed_build(config: BuildConfig, teacher: VllmTeacher, folder: Path) -> float:
    """Return the seconds of a whole build by a teacher that is already started."""
    config = config.model_copy(update={"cache": str(folder)})
    with patch.object(build, "checked_teacher", lambda *_: teacher):
        return seconds(lambda: build.build_cache(config))


def documents_of(folder: Path) -> list[np.ndarray]:
    """Return the documents of a cache's train rows, as the build hands them to the teacher."""
    documents = []
    for split in (open_cache(str(folder))[name].train for name in DOMAINS):
        rows = split.read(range(len(split)), targets=False)
        documents += requests(vars(rows)).documents
    return documents


def first(documents: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Return the first documents, up to the one that reaches ``tokens``."""
    ends = np.cumsum([len(document) for document in documents])
    return documents[: int(np.searchsorted(ends, tokens)) + 1]


def nothing_kept(logits: torch.Tensor, labels: torch.Tensor, target: Target, *_: Any) -> SparseTarget:
    """Stand in for ``sparse_target`` without looking at the logits."""
    shape = (len(logits), target.width)
    return SparseTarget(
        torch.zeros(shape, dtype=torch.int32), torch.zeros(shape), labels.float(), labels.float()
    )


def build_sides(config: BuildConfig, folder: Path) -> dict[str, float]:
    """Return the tokens a second of the build engine's sides; leave a cache in ``folder``."""
    teacher = load_teacher(config.teacher, config.target, config.seq_length)
    assert isinstance(teacher, VllmTeacher)
    assert teacher.fast, "the fast path is not available here"
    timed_build(config, teacher, folder)
    documents = documents_of(folder)
    total = sum(map(len, documents))
    states = [domain.state for domain in open_cache(str(folder)).values()]
    both_splits = sum(state.train.tokens + state.validation.tokens for state in states)
    rates = {}
    for turn in range(2):  # the second counts
        with patch("ddk_build.teacher.capture.sparse_target", nothing_kept):
            heads = seconds(lambda: teacher.score(documents))
        rates = {
            "every head": total / heads,
            "capture": total / seconds(lambda: teacher.score(documents)),
            "build": both_splits / timed_build(config, teacher, folder.with_name(f"{folder.name}-{turn}")),
        }
    return rates


def public_sides(config: BuildConfig, folder: Path, slow_tokens: int) -> dict[str, float]:
    """Return the tokens a second of a plain vLLM over the documents of the cache in ``folder``."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as in the build
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(config.teacher, config.target, config.seq_length)
    for name in {"worker_extension_cls", "hf_overrides"} - config.teacher.engine_args.keys():
        arguments.pop(name, None)
    llm = LLM(**arguments)
    documents = documents_of(folder)
    k = config.target.top_k

    def rate(chosen: list[np.ndarray], **prompt_logprobs: Any) -> float:
        prompts = [{"prompt_token_ids": document[:-1].tolist()} for document in chosen]  # as the build
        params = SamplingParams(**ONE_TOKEN, **prompt_logprobs)
        return sum(map(len, chosen)) / seconds(lambda: llm.generate(prompts, params, use_tqdm=False))

    rates = {}
    for _ in range(2):  # the second counts
        rates = {
            "prefill": rate(documents),
            "dicts": rate(first(documents, slow_tokens), prompt_logprobs=k),
            "flat": rate(first(documents, slow_tokens), prompt_logprobs=k, flat_logprobs=True),
        }
    return rates


@click.command()
@click.option("--teacher", type=click.Choice([*SHAPES]), default="tiny", show_default=True)
@click.option("--tokens", default=100_000, show_default=True, help="Tokens of a build.")
@click.option("--slow-tokens", default=8_000, show_default=True, help="Tokens that dicts and flat read.")
@click.option("--seq-length", default=512, show_default=True)
@click.option("--top-k", default=64, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--engine-args", default="{}", help="JSON, for vLLM.")
@output_option("capture")
def main(output: Path, **options: Any) -> None:
    """Measure the sides in turn; print medians and ratios."""
    settings = Settings(**options)
    measured = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = settings.build(folder)
        for index in range(settings.rounds):
            cache = folder / f"cache-{index}"
            ours = in_new_process(build_sides, config, cache)
            measured.append(ours | in_new_process(public_sides, config, cache, settings.slow_tokens))
    rates = {side: statistics.median(turn[side] for turn in measured) for side in SIDES}
    show(
        f"{settings.teacher} teacher",
        ("side", "tokens/s", "of prefill", "of flat"),
        [(side, rate, rate / rates["prefill"], rate / rates["flat"]) for side, rate in rates.items()],
    )
    write_json(output, {"teacher": settings.teacher, "tokens_per_second": rates, "rounds": measured})


if __name__ == "__main__":
    main()
