"""How small a target gets, how true it stays and how fast that goes, on the real teacher's logits.

A cache is written, and every object of its train split is counted, per token; the codebook was fitted to
other documents. Beside it stand the ways in which targets are stored elsewhere, of which only ids and values
are counted: plain, plain in Blosc, and values in bfloat16 with ids of 18 bits.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numcodecs.blosc import Blosc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ddk_cache import codec, layout, open_cache
from ddk_cache.layout import Target
from tools.bench.shared.real_logits import CAPTURED, HEADS, SEQ_LENGTH, answers, fit, load, write_cache

Arrays = dict[str, NDArray[Any]]
Figures = dict[str, Any]

ROUNDS = 3
ID_BITS = 18  # enough for a vocabulary of 262,144
TARGETS = {
    "top 64": Target(),
    "top 64, top-p 0.95": Target(top_p=0.95),
    "top 32, top-p 0.98": Target(top_k=32, top_p=0.98),
    "12 draws": Target(kind="sampled", samples=12),
    "24 draws": Target(kind="sampled", samples=24),
    "50 draws": Target(kind="sampled", samples=50),
}


def measure(captured: Arrays, head: str, target: Target) -> Figures:
    """Size by array, fidelity and speed of this project's codec."""
    calibration, found = answers(captured, head, target)
    codebook = fit(calibration, target, int(captured["vocab_size"]))
    rows = {name: captured[name][-len(found["ids"]) :] for name in layout.token_arrays(SEQ_LENGTH)}
    tokens = np.count_nonzero(rows["segments"])
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), target, codebook, rows, found)
        sizes = {
            array.name: sum(file.stat().st_size for file in (array / "c").rglob("*") if file.is_file())
            / tokens
            for array in sorted(Path(folder, "text", "train").iterdir())
            if array.is_dir()
        }
        read = open_cache(folder)["text"].train.read(range(len(found["ids"])))
    assert read.ids is not None
    assert read.logprobs is not None
    assert read.tail_logprob is not None
    given = {name: array for name, array in found.items() if name != "label_logprob"}
    stored = codec.encode(**given, codebook=codebook, target=target)
    return {
        "bytes": sum(sizes.values()),
        "arrays": sizes,
        **fidelity(found, read.ids, read.logprobs, read.tail_logprob),
        **speeds(
            np.count_nonzero(found["ids"] >= 0),
            lambda: codec.encode(**given, codebook=codebook, target=target),
            lambda: codec.decode(stored, codebook, target, SEQ_LENGTH),
        ),
    }


def fidelity(
    given: Arrays, ids: NDArray[np.int32], logprobs: NDArray[np.float32], tail_logprob: NDArray[np.float32]
) -> Figures:
    """Errors of the entries in nats, KL(given || stored) a position in nats, and by how much sums miss 1.

    Where those sums differ, the KL is the generalised one, which counts that as well and is never negative.
    """
    there = (given["ids"] >= 0).any(axis=-1)
    before, after = (
        np.take_along_axis(x[there], np.argsort(i[there], axis=-1), -1).astype(np.float64)
        for i, x in ((given["ids"], given["logprobs"]), (ids, logprobs))
    )
    entry = np.isfinite(before)
    error = np.subtract(after, before, where=entry, out=np.zeros_like(before))
    tail, tail_after = given["tail_logprob"][there].astype(np.float64), tail_logprob[there]
    tail_error = np.subtract(tail_after, tail, where=np.isfinite(tail), out=np.zeros_like(tail))
    by_rank = np.argsort(-before, axis=-1)
    ranked, counted = (np.take_along_axis(x, by_rank, -1).sum(axis=0) for x in (error, entry))
    masses = np.exp(before).sum(axis=-1) + np.exp(tail)
    masses_after = np.exp(after).sum(axis=-1) + np.exp(tail_after)
    lost = -(np.exp(before) * error).sum(axis=-1) - np.exp(tail) * tail_error
    return {
        "mean_error": np.abs(error).sum() / np.count_nonzero(entry),
        "max_error": np.abs(error).max(),
        "drift": np.abs(ranked / np.maximum(counted, 1)).max(),
        "kl": (lost + masses_after - masses).mean(),
        "sum_error": np.abs(masses_after - 1).max(),
    }


def speeds(entries: int, encode: Callable[[], object], decode: Callable[[], object]) -> Figures:
    """Entries a second in one process, medians."""

    def rate(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return entries / statistics.median(seconds)

    return {"encoded_per_second": rate(encode), "decoded_per_second": rate(decode)}


class Layout(NamedTuple):
    """A way to store ids and log-probabilities [S, E] of one row, and to get them back."""

    encode: Callable[[NDArray[np.int32], NDArray[np.float32]], tuple[bytes, bytes]]
    decode: Callable[[bytes, bytes], tuple[NDArray[Any], NDArray[Any]]]


def to_bfloat16(values: NDArray[np.float32]) -> bytes:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def from_bfloat16(data: bytes) -> NDArray[np.float32]:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bits(ids: NDArray[np.int32]) -> bytes:
    bits = np.unpackbits(ids.astype(">u4").reshape(-1, 1).view(np.uint8), axis=1)
    return np.packbits(bits[:, 32 - ID_BITS :]).tobytes()


def from_bits(data: bytes) -> NDArray[np.uint32]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, ID_BITS)
    return np.packbits(np.pad(bits, [(0, 0), (32 - ID_BITS, 0)]), axis=1).view(">u4")


BLOSC = Blosc("zstd", clevel=5, shuffle=Blosc.BITSHUFFLE)
LAYOUTS = {
    "uint32 + float16": Layout(
        lambda ids, x: (ids.astype(np.uint32).tobytes(), x.astype(np.float16).tobytes()),
        lambda a, b: (np.frombuffer(a, np.uint32), np.frombuffer(b, np.float16).astype(np.float32)),
    ),
    "the same in Blosc zstd": Layout(
        lambda ids, x: (BLOSC.encode(ids.astype(np.uint32)), BLOSC.encode(x.astype(np.float16))),
        lambda a, b: (
            np.frombuffer(BLOSC.decode(a), np.uint32),
            np.frombuffer(BLOSC.decode(b), np.float16).astype(np.float32),
        ),
    ),
    "18-bit ids + bfloat16": Layout(
        lambda ids, x: (to_bits(ids), to_bfloat16(x)), lambda a, b: (from_bits(a), from_bfloat16(b))
    ),
}


def measure_layout(captured: Arrays, head: str, way: Layout) -> Figures:
    """Size of ids and log-probabilities, fidelity and speed, for the top 64; the tail is taken as exact."""
    found = answers(captured, head, TARGETS["top 64"])[1]
    there = (found["ids"] >= 0).any(axis=-1)
    rows = [(i[t], x[t]) for i, x, t in zip(found["ids"], found["logprobs"], there, strict=True)]
    stored = [way.encode(*row) for row in rows]
    decoded = [way.decode(*row) for row in stored]
    ids, logprobs = np.full_like(found["ids"], -1), np.full_like(found["logprobs"], -np.inf)
    ids[there], logprobs[there] = (
        np.concatenate(part).reshape(-1, 64) for part in zip(*decoded, strict=True)
    )
    tokens = np.count_nonzero(captured["segments"][-len(there) :])
    return {
        "bytes": sum(len(a) + len(b) for a, b in stored) / tokens,
        **fidelity(found, ids, logprobs, found["tail_logprob"]),
        **speeds(
            ids[there].size,
            lambda: [way.encode(*row) for row in rows],
            lambda: [way.decode(*row) for row in stored],
        ),
    }


def show(results: dict[str, dict[str, Figures]]) -> None:
    console = Console(width=130)
    for head, figures in results.items():
        table = Table(title=f"Logits in {head}: bytes a token, nats, million entries a second")
        columns = ("bytes", "mean |Δ|", "max |Δ|", "drift", "KL", "|Σ-1|", "encode", "decode")
        for column in ("", *columns):
            table.add_column(column, justify="right" if column else "left")
        for name, x in figures.items():
            errors = (x[key] for key in ("mean_error", "max_error", "drift", "kl", "sum_error"))
            rates = (x[key] / 1e6 for key in ("encoded_per_second", "decoded_per_second"))
            table.add_row(
                name, f"{x['bytes']:.1f}", *(f"{y:.1e}" for y in errors), *(f"{y:.0f}" for y in rates)
            )
        console.print(table)
        table = Table(title=f"Logits in {head}: bytes a token by array")
        measured = {name: x["arrays"] for name, x in figures.items() if "arrays" in x}
        names = list(next(iter(measured.values())))
        for column in ("", *names):
            table.add_column(column, justify="right" if column else "left")
        for name, sizes in measured.items():
            table.add_row(name, *(f"{sizes[array]:.2f}" if array in sizes else "" for array in names))
        console.print(table)


@click.command()
@click.option(
    "--logits",
    type=click.Path(path_type=Path),
    default=CAPTURED,
    show_default=True,
    help="An earlier capture; made if it is not there.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bench_results/bench_codec.json"),
    show_default=True,
)
def main(logits: Path, output: Path) -> None:
    """Measure size, fidelity and speed of what the cache stores, next to other layouts."""
    captured = load(logits)
    results: dict[str, dict[str, Figures]] = {
        head: {name: measure(captured, head, target) for name, target in TARGETS.items()}
        | {
            f"{name} (ids and values alone)": measure_layout(captured, head, way)
            for name, way in LAYOUTS.items()
        }
        for head in HEADS
    }
    show(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2, default=float))


if __name__ == "__main__":
    main()
