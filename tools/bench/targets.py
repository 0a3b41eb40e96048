"""What a target costs and what the student's gradient from it is worth, on real text.

Each target comes out of the codec as training gets it, and its gradient of the KL is compared with that of
the teacher's full distribution; kl_gradients.py says what the angles are. Bytes a token are those of every
array of a cache's train split (bench_codec.py has them one by one). The codec's tables, which a cache has
once however long it is, stand beside them, uncompressed. Targets without bytes did not go through the codec.
"""

import json
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import linear

from ddk_build.scoring import Arrays
from ddk_build.targets import sparse_target
from ddk_cache import codec, layout, shards
from ddk_cache.layout import Target
from ddk_train.loss_chunk import Tail
from tools.bench.shared.kl_gradients import (
    Entries,
    Figures,
    Text,
    angles,
    full,
    read,
    show,
    sparse,
    teacher_states,
)
from tools.bench.shared.real_logits import SAMPLED, SEQ_LENGTH, TOP_64, answers, fit, load

STORED = {
    "top 12": Target(top_k=12),
    "top 64": TOP_64,
    "top 64, top-p 0.95": Target(top_p=0.95),
    "top 32, top-p 0.98": Target(top_k=32, top_p=0.98),
    **{f"{samples} systematic draws": target for samples, target in SAMPLED.items()},
}
TAILS: dict[str, list[Tail]] = {"top 12": ["drop", "bucket", "label"], "top 64": ["drop", "bucket", "label"]}


def stored(captured: Arrays, target: Target, places: Tensor) -> tuple[Entries, Figures]:
    """What a cache gives back at ``places``, and its size in bytes: a token's, and that of the tables."""
    calibration, found = answers(captured, "float32", target)
    codebook = fit(calibration, target, int(captured["vocab_size"]))
    label = found.pop("label_logprob")
    arrays = codec.encode(**found, codebook=codebook, target=target)
    tokens = {name: captured[name][-len(label) :] for name in layout.token_arrays(SEQ_LENGTH)}
    rows = tokens | arrays | {"label_logprob": label}
    shapes = layout.token_arrays(SEQ_LENGTH) | layout.label_array(SEQ_LENGTH)
    shapes |= codec.row_arrays(target, SEQ_LENGTH)
    size = sum(len(shards.pack(rows[name], shape, len(label))) for name, shape in shapes.items())
    decoded = codec.decode(arrays, codebook, target, SEQ_LENGTH)
    entries = Entries(*(torch.from_numpy(part).flatten(0, 1)[places] for part in decoded))
    tables = sum(table.nbytes for table in codebook.arrays().values())
    return entries, {"bytes": size / np.count_nonzero(tokens["segments"]), "tables": tables}


def not_stored(text: Text, logits: Tensor) -> dict[str, Entries]:
    """Targets to compare with, as exact as the logits [M, V]."""

    def top(count: int) -> Entries:
        return Entries(*sparse_target(logits, text.labels, Target(top_k=count))[:3])

    mass, best = logits.softmax(-1), top(16)
    nothing = torch.full(text.labels.shape, -torch.inf)
    found = {"top 100": top(100)}
    for draws in (12, 50):
        found[f"{draws} independent draws"] = Entries(*draw(mass, draws), nothing)
    ids, shares = draw(mass.scatter_(1, best.ids.long(), 0), 8)
    found["top 16 + 8 independent draws"] = Entries(
        torch.cat([best.ids, ids], -1),
        torch.cat([best.logprobs, shares + best.tail_logprob[:, None]], -1),
        nothing,
    )
    return found


def draw(mass: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Independent draws from mass [M, V]: distinct ids, and log(count / draws); [M, draws] each."""
    drawn = torch.multinomial(mass, draws, replacement=True, generator=torch.Generator().manual_seed(0))
    ids, shares = torch.full_like(drawn, -1), torch.zeros(drawn.shape)
    for row, some in enumerate(drawn):
        distinct, counts = some.unique(return_counts=True)
        ids[row, : len(distinct)], shares[row, : len(distinct)] = distinct, counts / draws
    return ids, shares.log()


def measure(captured: Arrays, text: Text) -> dict[str, Figures]:
    """Entries, angles and bytes by target and, where it is told apart, what becomes of the tail."""
    logits = linear(*teacher_states(text, torch.float32))
    exact, cross_entropy = full(text, logits), sparse(text, None)
    made = {name: stored(captured, target, text.places) for name, target in STORED.items()}
    made |= {name: (entries, {}) for name, entries in not_stored(text, logits).items()}
    del logits
    found: dict[str, Figures] = {}
    for name, (entries, size) in track(made.items(), "The student's gradients", transient=True):
        count = float((entries.ids >= 0).sum(-1).double().mean())
        for tail in TAILS.get(name, ["bucket"]):
            kl = sparse(text, entries, tail).minus(cross_entropy)
            full_name = f"{name}, tail: {tail}" if name in TAILS else name
            found[full_name] = {"entries": count, **angles(kl, exact), **size}
    return found


@click.command(help=__doc__)
@click.option("--tokens", default=2816, show_default=True, help="Positions whose gradients are compared.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bench_results/bench_targets.json"),
    show_default=True,
)
def main(tokens: int, output: Path) -> None:
    captured = load()
    found = measure(captured, read(captured, tokens))
    columns = dict.fromkeys(("entries", "head", "token", "batch", "bytes"), ".1f") | {"tables": ",.0f"}
    show("Angle to the full distribution's gradient, degrees; bytes a token, bytes of tables", found, columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"tokens": tokens, "targets": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
