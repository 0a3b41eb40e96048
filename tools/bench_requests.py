"""What one request costs the engine beside its tokens, and whether a request may hold several documents.

The same number of tokens is read as documents of several lengths: by vLLM alone, one position's logits a
request, and by ``Teacher.score``, which is that with the answers taken. A line through the times says what a
token and a request cost. Then two documents are put into one request, and the second's labels are compared
with those it has by itself.

    python tools/bench_requests.py --teacher tiny         # 2 layers of 64, vocabulary 49,152
    python tools/bench_requests.py --teacher 135m         # SmolLM2-135M-Instruct
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench_capture import SHAPES, first, seconds, shaped_teacher
from real_data import teacher_folder, texts
from rich.console import Console
from rich.table import Table

from ddk_build.config import TeacherConfig
from ddk_build.teacher import load_teacher
from ddk_build.teacher_vllm import ONE_TOKEN, VllmTeacher
from ddk_build.tokenizer import load_tokenizer
from ddk_cache.layout import Target

LENGTHS = (10, 30, 100, 300, 1000)
JOINED = 100  # tokens of each of the documents that share a request


def real_tokens(config: TeacherConfig, count: int) -> np.ndarray:
    tokenizer = load_tokenizer(config)
    found = np.concatenate([tokenizer(text, verbose=False)["input_ids"] for text in texts("docs")])
    return np.resize(found, count).astype(np.int32)


def cost(times: dict[int, float], tokens: int) -> tuple[float, float]:
    """Seconds a token and a request, by least squares on relative errors."""
    counts = np.array([[tokens, tokens // length] for length in times], float)
    measured = np.array(list(times.values()))
    (token, request), *_ = np.linalg.lstsq(counts / measured[:, None], np.ones(len(measured)), rcond=None)
    return float(token), float(request)


def second_document(teacher: VllmTeacher, tokens: np.ndarray) -> tuple[float, float]:
    """Mean nats between a document's labels alone and behind another one, and their mean cross-entropy."""
    pairs = tokens[: len(tokens) // (2 * JOINED) * 2 * JOINED].reshape(-1, 2 * JOINED)[:50]
    alone = teacher.score([pair[JOINED:] for pair in pairs], labels_only=True).label_logprob
    together = teacher.score(list(pairs), labels_only=True).label_logprob.reshape(len(pairs), -1)
    behind = together[:, JOINED:].ravel()
    return float(np.abs(behind - alone).mean()), float(-alone.mean())


@click.command()
@click.option("--teacher", "name", type=click.Choice([*SHAPES, "135m"]), default="tiny", show_default=True)
@click.option("--tokens", default=60_000, show_default=True, help="Read as documents of each length.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench_results/bench_requests.json"))
def main(name: str, tokens: int, dtype: str, repeats: int, output: Path) -> None:
    """Measure both and print medians."""
    with tempfile.TemporaryDirectory() as scratch:
        shaped = None if name == "135m" else shaped_teacher(Path(scratch) / "teacher", SHAPES[name])
        arguments: dict[str, Any] = {"enforce_eager": True} | ({"load_format": "dummy"} if shaped else {})
        model = str(shaped or teacher_folder())
        config = TeacherConfig(model=model, dtype=dtype, engine_args=arguments)
        teacher = load_teacher(config, Target(), max(LENGTHS))
        assert isinstance(teacher, VllmTeacher)
        from vllm import SamplingParams

        found = real_tokens(config, tokens)

        def prefill(documents: list[np.ndarray]) -> None:
            prompts = [{"prompt_token_ids": document[:-1].tolist()} for document in documents]
            teacher.llm.generate(prompts, SamplingParams(**ONE_TOKEN), use_tqdm=False)

        sides: dict[str, Callable[[list[np.ndarray]], Any]] = {"vLLM alone": prefill, "score": teacher.score}
        times: dict[str, dict[int, float]] = {side: {} for side in sides}
        for length in LENGTHS:
            documents = list(found[: tokens // length * length].reshape(-1, length))
            for side, call in sides.items():
                call(first(documents, 4000))
                times[side][length] = statistics.median(
                    seconds(lambda: call(documents))  # noqa: B023
                    for _ in range(repeats)
                )
        apart, cross_entropy = second_document(teacher, found)
    title = f"{name} teacher: tokens/s in documents of so many tokens"
    table = Table("", *map(str, LENGTHS), "a token", "a request", title=title)
    costs = {side: cost(measured, tokens) for side, measured in times.items()}
    for side, measured in times.items():
        token, request = costs[side]
        rates = (f"{tokens / measured[length]:,.0f}" for length in LENGTHS)
        table.add_row(side, *rates, f"{token * 1e6:.1f} µs", f"{request * 1e3:.2f} ms")
    Console().print(table)
    click.echo(
        f"two documents of {JOINED} tokens in one request: the second's labels are {apart:.2f} nats off "
        f"those it has alone, whose mean is {cross_entropy:.2f}"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {"seconds": times, "costs": costs, "nats_apart": apart, "cross_entropy": cross_entropy}
    output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
