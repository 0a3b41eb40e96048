"""Runs real vLLM engines on one tiny teacher and leaves what they answered; test_engines.py starts it.

A process of its own, because vLLM binds threads, seeds generators and warns as it likes.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from ddk_build.config import TeacherConfig
from ddk_build.teacher import capture
from ddk_build.teacher.engines import Answers, EngineDiedError, load_teacher
from ddk_build.teacher.targets import SparseTarget
from ddk_build.teacher.vllm_engine import VllmTeacher
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import Target

MAX_LENGTH = 128
BLOCKS = 64  # of keys and values: a gibibyte of them takes two seconds to be laid out
TARGETS = {
    "topk": Target(top_k=16),
    "nucleus": Target(top_k=16, top_p=0.8),
    "warm": Target(top_k=16, temperature=2.0),
    "sampled": Target(kind="sampled", samples=12),
}


def documents() -> list[np.ndarray]:
    """Random tokens, 2 and more; some documents are longer than a step of 64 tokens."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, 400, length, np.int32) for length in (2, 128, 3, 64, 65, 100, 17, 128)]


def offsets() -> list[np.ndarray]:
    generator = np.random.default_rng(2)
    return [generator.random(len(document) - 1) for document in documents()]


class Mortal(capture.WorkerExtension):
    """A worker whose memory can run out, in whichever process it is."""

    def exhaust(self) -> int:
        """Let every further target fail; return the process."""
        capture.sparse_target = out_of_memory  # type: ignore[assignment]
        return os.getpid()

    def head_error(self) -> tuple[str, float]:
        """Return the logits' type, and how far they are from the head's product in float32."""
        model = self.model_runner.model
        hidden = torch.randn(40, model.config.hidden_size).bfloat16()
        logits = model.compute_logits(hidden)
        exact = hidden.float() @ model.lm_head.weight.float().T
        return str(logits.dtype), (logits - exact[:, : logits.shape[1]]).abs().max().item()


def out_of_memory(*_: Any) -> SparseTarget:
    raise torch.OutOfMemoryError("CUDA out of memory")


def in_processes(teacher: VllmTeacher, results: dict[str, Any]) -> None:
    """Let vLLM's processes run out of memory, then kill the one that answers."""
    pid, *_ = teacher.engine.llm.collective_rpc("exhaust")
    for name, before in (("no_memory", lambda: None), ("killed", lambda: os.kill(pid, signal.SIGKILL))):
        before()
        try:
            teacher.score(documents())
        except (ConfigError, EngineDiedError) as error:
            results[name] = f"{type(error).__name__}: {error}"


def watch_probe(teacher: VllmTeacher, config: TeacherConfig, results: dict[str, Any]) -> None:
    """Start a teacher on the same engine; count its steps' tokens, and the parts of its last document."""
    steps: list[list[capture.Chunk]] = []
    add = capture.Collector.add

    def watched(self: capture.Collector, hidden: torch.Tensor, chunks: list[capture.Chunk]) -> None:
        steps.append(chunks)
        add(self, hidden, chunks)

    installed = patch.object(capture.WorkerExtension, "ddk_install")
    with installed, patch.object(capture.Collector, "add", watched):
        results["probe_fast"] = VllmTeacher(teacher.engine.llm, config, TARGETS["topk"], MAX_LENGTH).fast
    last = max(chunk.document for step in steps for chunk in step)
    results["probe_tokens"] = [sum(chunk.tokens for chunk in step) for step in steps]
    results["probe_parts"] = sum(chunk.document == last for step in steps for chunk in step)


def ask_ahead(teacher: VllmTeacher, results: dict[str, Any]) -> None:
    """Submit two calls, and one without documents between them; count the steps' tokens."""
    steps: list[int] = []
    add = capture.Collectors.add

    def watched(self: capture.Collectors, hidden: torch.Tensor, chunks: Iterable[capture.Chunk]) -> None:
        step = list(chunks)
        steps.append(sum(chunk.tokens for chunk in step))
        add(self, hidden, step)

    with patch.object(capture.Collectors, "add", watched):
        save(results, "ahead", submitted(teacher, documents()[:5], [], documents()[5:]))
    results["ahead_tokens"] = steps


def submitted(teacher: VllmTeacher, *calls: list[np.ndarray]) -> Answers:
    """Submit calls one after another, and drain the teacher after the last one."""
    ready = [answers for call in calls for answers in teacher.submit(call)]
    ready += teacher.drain()
    assert len(ready) == len(calls)
    return Answers.concatenate([wait() for wait in ready])


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def fall_back(teacher: VllmTeacher, config: TeacherConfig, results: dict[str, Any]) -> None:
    """Start teachers on the same engine as if its version differed from the tested ones."""

    def failing(*_: Any) -> None:
        raise AttributeError("no attribute 'query_start_loc'")

    with patch.object(capture.Collector, "take", failing), suppress(AttributeError):
        teacher.score(documents())
    save(results, "after_failure", teacher.score(documents()))
    with patch.multiple(capture.WorkerExtension, ddk_install=failing, ddk_drop=failing):
        VllmTeacher(teacher.engine.llm, config, TARGETS["topk"], MAX_LENGTH)
    installed = patch.object(capture.WorkerExtension, "ddk_install")
    with installed, patch.object(capture.Collector, "_add", failing):
        public = VllmTeacher(teacher.engine.llm, config, TARGETS["topk"], MAX_LENGTH)
    save(results, "public", public.score(documents()))
    save(results, "public_labels", public.score(documents(), labels_only=True))
    public.target = TARGETS["nucleus"]
    save(results, "public_nucleus", public.score(documents()))
    with installed, patch.object(capture.Collector, "add"):  # as if it were never called
        for name in ("sampled", "warm"):
            try:
                VllmTeacher(teacher.engine.llm, config, TARGETS[name], MAX_LENGTH)
            except ConfigError as error:
                results[f"refused_{name}"] = str(error)


def run_out_of_memory(teacher: VllmTeacher, results: dict[str, Any]) -> None:
    """Run with memory for 40 positions a step, then for none."""
    original = capture.Collector._add
    room = 40

    def add(self: capture.Collector, hidden: torch.Tensor, chunks: list[capture.Chunk]) -> None:
        if sum(chunk.tokens for chunk in chunks) > room:
            raise torch.OutOfMemoryError("out of memory")
        original(self, hidden, chunks)

    capture.Collector._add = add  # type: ignore[method-assign]
    short = [document[:30] for document in documents()]
    save(results, "little_memory", submitted(teacher, short[:4], short[4:]))
    room = 0
    try:
        teacher.score(short)
    except ConfigError as error:
        results["no_memory"] = str(error)
    capture.Collector._add = original  # type: ignore[method-assign]
    save(results, "enough_memory", teacher.score(short))


def round_logits(model: str, results: dict[str, Any]) -> None:
    """Another engine, whose head is in bfloat16 as its body is."""
    config = configuration(model, "bfloat16", head_dtype="model")
    save(results, "bfloat16_head", load_teacher(config, TARGETS["topk"], MAX_LENGTH).score(documents()))


def save(results: dict[str, Any], name: str, answers: Answers) -> None:
    results.update({f"{name}.{field}": array for field, array in asdict(answers).items()})


def answering_workers(teacher: VllmTeacher) -> list[bool]:
    """Return for each worker whether it answered."""
    call = teacher.engine.llm.collective_rpc
    taken: list[Any] = []

    def watched(method: str, **options: Any) -> list[Any]:
        taken[:] = call(method, **options)
        return taken

    teacher.engine.llm.collective_rpc = watched
    teacher.score(documents())
    teacher.engine.llm.collective_rpc = call
    return [answers is not None for answers in taken]


def configuration(model: str, dtype: str, head_dtype: Any = "auto", **engine_args: Any) -> TeacherConfig:
    arguments: dict[str, Any] = {"max_num_seqs": 64, "enforce_eager": True, "num_gpu_blocks_override": BLOCKS}
    arguments["worker_extension_cls"] = "engine_run.Mortal"
    arguments |= engine_args
    return TeacherConfig(model=model, dtype=dtype, head_dtype=head_dtype, engine_args=arguments)


def run_engine(model: str, dtype: str, engine_args: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of one engine to all calls, and in bfloat16 of another one."""
    log = Lines()
    logging.getLogger("ddk_build").addHandler(log)
    config = configuration(model, dtype, **engine_args)
    teacher = load_teacher(config, TARGETS["topk"], MAX_LENGTH)
    assert isinstance(teacher, VllmTeacher)
    results: dict[str, Any] = {"fast": teacher.fast, "version": teacher.engine.version}
    if not teacher.engine.is_one_process:
        results["answering"] = answering_workers(teacher)
        save(results, "topk", teacher.score(documents()))
        in_processes(teacher, results)
        teacher.close()
        return results
    save(results, "labels", teacher.score(documents(), labels_only=True))
    alone = [teacher.score([document]) for document in documents()]
    save(results, "alone", Answers.concatenate(alone))
    for name, target in TARGETS.items():
        teacher.target = target
        save(results, name, teacher.score(documents(), offsets() if target.kind == "sampled" else None))
    teacher.target = TARGETS["topk"]
    if dtype == "float32":
        ask_ahead(teacher, results)
        watch_probe(teacher, config, results)
        fall_back(teacher, config, results)
        run_out_of_memory(teacher, results)
    else:
        results["head_dtype"], results["head_error"] = teacher.engine.llm.collective_rpc("head_error")[0]
        round_logits(model, results)
    return results | {"log": np.array(log.lines)}


def main(model: str, folder: str, engines: str) -> None:
    """``engines``: of each dtype the engine's arguments, in JSON; <dtype>.npz is left in the folder."""
    for dtype, engine_args in json.loads(engines).items():
        np.savez(Path(folder, dtype), **run_engine(model, dtype, engine_args))


if __name__ == "__main__":
    main(*sys.argv[1:])
