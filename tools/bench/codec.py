"""Size, fidelity and speed of stored targets, on the real teacher's logits.

Bytes a token count every object of the train split of a cache written here, whose codebook was fitted to
other documents. Beside it: three layouts that other tools use (plain, plain in Blosc, bfloat16 values with
18-bit ids), for which only ids and values are counted.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

from ddk_cache import open_cache
from ddk_cache.format import codec, layout
from ddk_cache.format.layout import Target
from tools.bench.shared.real_logits import HEADS, SEQ_LENGTH, answers, fit, load, write_cache
from tools.frame import median_seconds, output_option, show, write_json

Arrays = dict[str, NDArray[Any]]
Figures = dict[str, Any]

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
    """Return size by array, fidelity and speed of this project's codec."""
    calibration, given = answers(captured, head, target)
    codebook = fit(calibration, target, int(captured["vocab_size"]))
    count = len(given["ids"])
    rows = {name: captured[name][-count:] for name in layout.token_arrays(SEQ_LENGTH)}
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), target, codebook, rows | given)
        sizes = sizes_by_array(Path(folder, "text", "train"), int(np.count_nonzero(rows["segments"])))
        read = open_cache(folder)["text"].train.read(range(count))
    assert read.ids is not None
    assert read.logprobs is not None
    assert read.tail_logprob is not None
    mask = given["ids"][..., 0] >= 0
    targets = codec.Targets.from_arrays(given, mask)
    stored = codec.encode(targets, mask, codebook, target)
    return {
        "bytes": sum(sizes.values()),
        "arrays": sizes,
        **fidelity(given, read.ids, read.logprobs, read.tail_logprob),
        **speeds(
            int(np.count_nonzero(given["ids"] >= 0)),
            lambda: codec.encode(targets, mask, codebook, target),
            lambda: codec.decode(stored, codebook, target),
        ),
    }


def sizes_by_array(split: Path, tokens: int) -> dict[str, float]:
    """Return the bytes a token of each array in the folder of a split."""
    return {
        array.name: sum(file.stat().st_size for file in (array / "c").rglob("*") if file.is_file()) / tokens
        for array in sorted(split.iterdir())
        if array.is_dir()
    }


def fidelity(
    given: Arrays, ids: NDArray[np.int32], logprobs: NDArray[np.float32], tail_logprob: NDArray[np.float32]
) -> Figures:
    """Return the errors of the entries in nats, KL(given || stored) a position, and how far sums are from 1.

    Where those sums differ, the KL is the generalised one, which counts that as well and is never negative.
    """
    answered = (given["ids"] >= 0).any(axis=-1)
    before, after = (
        np.take_along_axis(x[answered], np.argsort(i[answered], axis=-1), -1).astype(np.float64)
        for i, x in ((given["ids"], given["logprobs"]), (ids, logprobs))
    )
    entry = np.isfinite(before)
    error = np.subtract(after, before, where=entry, out=np.zeros_like(before))
    tail, tail_after = given["tail_logprob"][answered].astype(np.float64), tail_logprob[answered]
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
    """Return the entries a second in one process, medians."""
    return {
        "encoded_per_second": entries / median_seconds(encode),
        "decoded_per_second": entries / median_seconds(decode),
    }


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


def measure_layout(captured: Arrays, head: str, layout: Layout) -> Figures:
    """Return size of ids and log-probabilities, fidelity and speed for the top 64; the tail stays exact."""
    given = answers(captured, head, TARGETS["top 64"])[1]
    answered: NDArray[np.bool_] = np.any(given["ids"] >= 0, axis=-1)
    rows = [(i[t], x[t]) for i, x, t in zip(given["ids"], given["logprobs"], answered, strict=True)]
    stored = [layout.encode(*row) for row in rows]
    decoded = [layout.decode(*row) for row in stored]
    ids, logprobs = np.full_like(given["ids"], -1), np.full_like(given["logprobs"], -np.inf)
    ids[answered], logprobs[answered] = (
        np.concatenate(part).reshape(-1, 64) for part in zip(*decoded, strict=True)
    )
    tokens = np.count_nonzero(captured["segments"][-len(answered) :])
    return {
        "bytes": sum(len(a) + len(b) for a, b in stored) / tokens,
        **fidelity(given, ids, logprobs, given["tail_logprob"]),
        **speeds(
            ids[answered].size,
            lambda: [layout.encode(*row) for row in rows],
            lambda: [layout.decode(*row) for row in stored],
        ),
    }


def show_head(head: str, figures: dict[str, Figures]) -> None:
    """Print the tables of one head."""
    keys = ("bytes", "mean_error", "max_error", "drift", "kl", "sum_error")
    speed = ("encoded_per_second", "decoded_per_second")
    show(
        f"Logits in {head}: bytes a token, nats, million entries a second",
        ("", "bytes", "mean |Δ|", "max |Δ|", "drift", "KL", "|Σ-1|", "encode", "decode"),
        [
            [name, *(float(row[key]) for key in keys), *(float(row[key]) / 1e6 for key in speed)]
            for name, row in figures.items()
        ],
    )
    sizes = {name: row["arrays"] for name, row in figures.items() if "arrays" in row}
    arrays = list(next(iter(sizes.values())))
    show(
        f"Logits in {head}: bytes a token by array",
        ("", *arrays),
        [[name, *(row.get(array) for array in arrays)] for name, row in sizes.items()],
    )


@click.command()
@output_option("codec")
def main(output: Path) -> None:
    """Measure size, fidelity and speed of what the cache stores, next to other layouts."""
    captured = load()
    figures = {}
    for head in HEADS:
        ours = {name: measure(captured, head, target) for name, target in TARGETS.items()}
        others = {name: measure_layout(captured, head, layout) for name, layout in LAYOUTS.items()}
        figures[head] = ours | {f"{name} (ids and values alone)": row for name, row in others.items()}
        show_head(head, figures[head])
    write_json(output, figures)


if __name__ == "__main__":
    main()
