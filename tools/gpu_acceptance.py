"""What only a GPU can show: one command, a table and a JSON file.

    python -m tools.gpu_acceptance                    # every part
    python -m tools.gpu_acceptance --seconds 370      # the first parts that fit by their estimates
    python -m tools.gpu_acceptance --dry-run          # the parts, and for how long they may run
    python -m tools.gpu_acceptance --device cpu engine-v1      # a tiny teacher, to try the part itself

Every part is a process; engines that share a GPU run side by side. A part passes if its answers are right.
Speeds and memory are written down, not judged.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from filelock import FileLock

from tools.frame import output_option, seconds, show, write_json

Facts = dict[str, Any]

CODE = "import sys, tools.gpu_acceptance as tool; tool.run_here(*sys.argv[1:])"
VOCABULARY = {"cuda": 151_936, "cpu": 2000}
LONGEST = {"cuda": 3000, "cpu": 200}  # tokens of a document
# Layers, width, heads, key-value heads, MLP width
SHAPE = {"cuda": (4, 896, 14, 2, 4864), "cpu": (2, 128, 4, 2, 256)}
STEP = {"cuda": 2048, "cpu": 64}  # tokens of an engine's step, so that documents are cut


def kernels(device: str, folder: Path) -> Facts:
    """Compare the targets made on the device with float64, for logits of both types."""
    from ddk_build.teacher.targets import sparse_target
    from ddk_cache.format.layout import Target

    vocabulary, facts = VOCABULARY[device], Facts(ids=True, label=0.0, tail=0.0)
    for dtype in (torch.bfloat16, torch.float32):
        logits = (4 * torch.randn(256, vocabulary, device=device)).to(dtype)
        labels = torch.randint(0, vocabulary, (256,), device=device)
        order = (-logits.double()).sort(stable=True).indices
        exact = logits.double().log_softmax(-1)
        for target in (Target(top_k=64), Target(top_k=200), Target(top_k=64, temperature=2.0)):
            made, best = sparse_target(logits, labels, target), order[:, : target.top_k]
            soft = (logits.double() / target.temperature).log_softmax(-1)
            tail = soft.exp().scatter(1, best, 0.0).sum(-1).log()
            facts["ids"] &= bool((made.ids == best).all())
            facts["tail"] = max(facts["tail"], (made.tail_logprob - tail).abs().max().item())
            label = made.label_logprob - exact.gather(1, labels[:, None])[:, 0]
            facts["label"] = max(facts["label"], label.abs().max().item())
        offsets = torch.rand(256, dtype=torch.float64, device=device)
        drawn = sparse_target(logits, labels, Target(kind="sampled"), offsets)
        shares = exact.exp().gather(1, drawn.ids.clamp(min=0).long())
        taken = drawn.logprobs.double().exp()  # floor or ceil of 24 p of 24 draws
        facts["draws"] = max(facts.get("draws", 0.0), ((taken - shares).abs() * (taken > 0)).max().item())
    facts["passed"] = (
        facts["ids"] and max(facts["label"], facts["tail"]) < 1e-4 and facts["draws"] < 1.001 / 24
    )
    return facts | (_times(device) if device == "cuda" else {})


def _times(device: str) -> Facts:
    """Return milliseconds of the capture's parts at 1,024 rows of a 0.5B teacher."""
    from triton.testing import do_bench

    from ddk_build.teacher.targets import sparse_target
    from ddk_cache.format.layout import Target

    vocabulary = VOCABULARY[device]
    head, hidden = (torch.randn(n, 896, device=device, dtype=torch.bfloat16) for n in (vocabulary, 1024))
    logits, labels = hidden @ head.T, torch.randint(0, vocabulary, (1024,), device=device)
    offsets = torch.rand(1024, dtype=torch.float64, device=device)
    ways: dict[str, Callable[[], object]] = {
        "head": lambda: hidden @ head.T,
        "head in float32": lambda: torch.mm(hidden, head.T, out_dtype=torch.float32),
        "torch.topk": lambda: logits.topk(64),
        "top 64": lambda: sparse_target(logits, labels, Target(top_k=64)),
        "24 draws": lambda: sparse_target(logits, labels, Target(kind="sampled"), offsets),
    }
    return {f"{name}, ms": round(do_bench(way), 3) for name, way in ways.items()}


def engine(device: str, folder: Path, head_dtype: Any = "auto", **engine_args: Any) -> Facts:
    """Compare a vLLM engine's capture with transformers in float32 and with vLLM's own prompt_logprobs."""
    from ddk_build.config import TeacherConfig
    from ddk_build.teacher.engines import NOISE, load_teacher
    from ddk_build.teacher.vllm_check import difference, draw_difference
    from ddk_build.teacher.vllm_engine import VllmTeacher
    from ddk_cache.format.layout import Target

    longest, target = LONGEST[device], Target(top_k=64)
    room: Facts = {"num_gpu_blocks_override": 64}
    if device == "cuda":  # a number of bytes: vLLM does not measure memory that its neighbours change
        room = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30}
    arguments = {
        "skip_tokenizer_init": True,
        "max_num_seqs": 64,
        "max_num_batched_tokens": STEP[device],
        **room,
        **engine_args,
    }
    model = str(small_model(device, folder))
    arguments = {"enforce_eager": True} | arguments
    config = TeacherConfig(model=model, head_dtype=head_dtype, engine_args=arguments)
    start = time.perf_counter()
    teacher = load_teacher(config, target, longest)
    assert isinstance(teacher, VllmTeacher)
    facts = Facts(
        vllm=teacher.engine.version, fast=teacher.fast, start_s=round(time.perf_counter() - start, 1)
    )
    random = np.random.default_rng(0)
    lengths = [2, 3, 17, 64, 65, longest // 2, longest - 1, longest, *random.integers(2, longest, 8)]
    documents = [random.integers(0, VOCABULARY[device], length, np.int32) for length in lengths]
    found = teacher.score(documents)
    facts["same_again"] = bool(np.array_equal(found.logprobs, teacher.score(documents).logprobs))
    positions = len(documents[0]) + len(documents[1]) - 2
    facts["same_alone"] = bool(
        np.array_equal(found.logprobs[:positions], teacher.score(documents[:2]).logprobs)
    )
    reference = {"model": model, "engine": "transformers"}
    exact, rounded = (
        load_teacher(TeacherConfig.model_validate(reference | {"dtype": dtype}), target, longest)
        for dtype in ("float32", "bfloat16")
    )
    expected = exact.score(documents)
    facts["mean_nats"], facts["largest_nats"] = difference(found, expected)
    facts["mean_of_transformers"], _ = difference(rounded.score(documents), expected)
    public = teacher.engine.public_answers(documents, target)
    facts["mean_of_public"], _ = difference(public, expected)
    teacher.target = Target(kind="sampled")
    offsets = [random.random(len(document) - 1) for document in documents]
    facts["draws"] = draw_difference(teacher.score(documents, offsets), public)
    teacher.close()
    is_near = facts["mean_nats"] < 2 * facts["mean_of_transformers"]
    return facts | {"passed": teacher.fast and is_near and facts["draws"] < 1 / 24 + NOISE["bfloat16"]}


def small_model(device: str, folder: Path) -> Path:
    """Write a random Qwen2 once, with large weights: its distributions are steep and depend on the text."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = folder / "small"
    with FileLock(folder / "small.lock"):
        if not (path / "config.json").exists():
            layers, width, heads, key_value_heads, mlp = SHAPE[device]
            torch.manual_seed(0)
            config = Qwen2Config(
                num_hidden_layers=layers,
                hidden_size=width,
                num_attention_heads=heads,
                num_key_value_heads=key_value_heads,
                intermediate_size=mlp,
                vocab_size=VOCABULARY[device],
                initializer_range=3 / width**0.5,
                tie_word_embeddings=False,
                max_position_embeddings=16_384,
                bos_token_id=None,
                eos_token_id=0,
            )
            model: Any = Qwen2ForCausalLM(config)
            model.to(torch.bfloat16).save_pretrained(path)
    return path


def attention(device: str, folder: Path) -> Facts:
    """Compare attention implementations on packed rows: gradient, time and memory.

    A gradient may be twice as far from eager attention's in float32 as eager attention's in bfloat16.
    """
    from transformers import AutoModelForCausalLM

    rows, length = (4, 4096) if device == "cuda" else (2, 64)
    tokens = torch.randint(0, VOCABULARY[device], (rows, length), device=device)
    positions = (torch.arange(length, device=device) % (length // 5)).repeat(rows, 1)
    reference = torch.empty(0)
    facts = Facts()
    for name in (
        "float32",
        "eager",
        "sdpa",
        *(("flex_attention", "flash_attention_2") if device == "cuda" else ()),
    ):
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                small_model(device, folder),
                dtype=torch.float32,
                attn_implementation="eager" if name == "float32" else name,
            )
            model.to(device)
        except ImportError as error:
            facts[name] = str(error).partition("\n")[0]
            continue
        shape = (1, -1) if name == "flash_attention_2" else (rows, length)  # as ddk_train's Student
        inputs = {"input_ids": tokens.view(shape), "position_ids": positions.view(shape), "use_cache": False}

        def step(model: Any = model, inputs: Facts = inputs, is_bf16: bool = name != "float32") -> None:
            with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
                hidden = model.model(**inputs).last_hidden_state
            torch.manual_seed(0)  # weights of a sum: a norm of what is normalised would have no gradient
            (hidden.float().flatten() * torch.randn(hidden.numel(), device=device)).sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()

        step()
        gradient = model.model.embed_tokens.weight.grad.clone()
        reference = gradient if name == "float32" else reference
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        off = (gradient - reference).norm() / reference.norm()
        facts[name] = {"gradient_off": off.item(), "seconds": round(min(seconds(step) for _ in range(5)), 4)}
        if device == "cuda":
            facts[name]["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        del model, step
    measured = [fact["gradient_off"] for fact in facts.values() if isinstance(fact, dict)]
    return facts | {"passed": max(measured) <= 2 * facts["eager"]["gradient_off"]}


def waiting(device: str, folder: Path) -> Facts:
    """Count what a capture waits for: the share of its time in which the device works, synchronisations."""
    from torch.profiler import ProfilerActivity, profile

    from ddk_build.config import TeacherConfig
    from ddk_build.teacher.engines import load_teacher
    from ddk_cache.format.layout import Target
    from tools.bench.shared.teachers import shaped_teacher

    engine_args = {"load_format": "dummy", "gpu_memory_utilization": 0.6, "skip_tokenizer_init": True}
    model = str(shaped_teacher(folder / "dummy", "0.5b"))
    teacher = load_teacher(TeacherConfig(model=model, engine_args=engine_args), Target(top_k=64), 2048)
    documents = list(np.random.default_rng(0).integers(0, VOCABULARY[device], (64, 2048), np.int32))
    teacher.score(documents)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        wall = seconds(lambda: teacher.score(documents))
    events = profiled.key_averages()
    busy = sum(event.self_device_time_total for event in events) / 1e6 / wall
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:12]
    return {
        "busy": round(busy, 3),
        "waits": {event.key: event.count for event in events if "Synchronize" in event.key},
        "longest, ms": {event.key[:60]: round(event.self_device_time_total / 1e3, 1) for event in longest},
        "passed": True,
    }


class Part(NamedTuple):
    """A process: a function of this module, or a benchmark's module with its arguments."""

    run: Callable[..., Facts] | Sequence[str]
    seconds: int  # estimated for one H200, not measured
    environment: Mapping[str, str] = {}
    shares: bool = False  # the GPU, with the parts beside it that share it too
    on_cpu: bool = True  # the part can be tried without a GPU


BIG = ["--tokens", "500000", "--seq-length", "2048", "--rounds", "1"]
PARTS = {
    "kernels": Part(kernels, 35),
    "engine-v2": Part(engine, 90, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, shares=True, on_cpu=False),
    "engine-v1": Part(engine, 90, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, shares=True),
    "engine-processes": Part(engine, 90, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, shares=True),
    "engine-invariant": Part(engine, 90, {"VLLM_BATCH_INVARIANT": "1"}, shares=True, on_cpu=False),
    "engine-float32-head": Part(partial(engine, head_dtype="float32"), 90, shares=True),
    "capture-0.5b": Part(["tools.bench.capture", "--teacher", "0.5b", *BIG], 110, on_cpu=False),
    "loss": Part(["tools.bench.loss"], 45),
    "attention": Part(attention, 40),
    "step": Part(["tools.bench.step", "--sizes", "0.5b"], 90, on_cpu=False),
    "waiting": Part(waiting, 60, on_cpu=False),
    "capture-7b": Part(["tools.bench.capture", "--teacher", "7b", *BIG], 150, on_cpu=False),
    "engine-compiled": Part(partial(engine, enforce_eager=False), 120),
}


def run_here(name: str, device: str, folder: str) -> None:
    """Run a part that is a function in this process; leave its facts in ``<folder>/<name>.json``."""
    run = PARTS[name].run
    assert callable(run)
    Path(folder, f"{name}.json").write_text(
        json.dumps(run(device, Path(folder)), default=str), encoding="utf-8"
    )


def run_part(name: str, device: str, folder: Path, limit: float) -> Facts:
    """Run a part as a process of its own for at most ``limit`` seconds; return its result and facts."""
    part, facts = PARTS[name], folder / f"{name}.json"
    command = ["-c", CODE, name, device, str(folder)]
    if not callable(part.run):
        command = ["-m", *part.run, "--output", str(facts)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", **part.environment}
    facts.unlink(missing_ok=True)
    start = time.monotonic()
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of an engine
            code = process.wait()
    took = time.monotonic() - start
    result = {"seconds": round(took, 1), "log": log.name}
    if code != 0 or not facts.exists():
        return result | {"result": "took too long" if took >= limit else f"failed with exit code {code}"}
    found = json.loads(facts.read_text(encoding="utf-8"))
    return result | {"result": "passed" if found.get("passed", True) else "FAILED", "facts": found}


def groups_of(names: Sequence[str], seconds: float) -> list[list[str]]:
    """Return the groups of parts that run side by side, but for those that do not fit into ``seconds``."""
    groups = []
    for _, group in groupby(names, key=lambda name: PARTS[name].shares or name):
        members = list(group)
        if (longest := max(PARTS[name].seconds for name in members)) <= seconds:
            seconds -= longest
            groups.append(members)
    return groups


@click.command(help=__doc__)
@click.argument("names", metavar="[PART]...", nargs=-1, type=click.Choice([*PARTS]))
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--seconds", "limit", default=float("inf"), help="For all parts together. Default: no limit.")
@click.option("--dry-run", is_flag=True, help="Name the parts and their estimates; run nothing.")
@output_option("gpu_acceptance")
def main(names: tuple[str, ...], device: str, limit: float, dry_run: bool, output: Path) -> None:
    usable = [name for name, part in PARTS.items() if part.on_cpu or device == "cuda"]
    if missing := set(names) - set(usable):
        raise click.UsageError(f"{min(missing)} needs a GPU")
    groups = groups_of(names or usable, limit)
    if dry_run:
        rows = [(" + ".join(group), max(PARTS[name].seconds for name in group)) for group in groups]
        show(
            "At most three times its estimate each", ("parts", "s"), [*rows, ("all", sum(s for _, s in rows))]
        )
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("this machine has no GPU; --device cpu tries the parts with a tiny teacher")
    folder = output.with_suffix("").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + limit, dict.fromkeys(names or usable, Facts(result="did not fit"))
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            left = end - time.monotonic()
            run = {
                name: pool.submit(run_part, name, device, folder, min(left, 3 * PARTS[name].seconds))
                for name in group
            }
        results |= {name: future.result() for name, future in run.items()}
        write_json(output, {"parts": results})
    lines = [
        (name, result["result"], result.get("seconds"), result.get("log", ""))
        for name, result in results.items()
    ]
    show("What a GPU shows", ("part", "result", "s", "log"), lines, labels=2)
    click.echo(f"figures: {output}")
    sys.exit(any(result["result"] not in ("passed", "did not fit") for result in results.values()))


if __name__ == "__main__":
    main()
