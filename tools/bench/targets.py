"""What a target costs in bytes, and what the student's gradient from it is worth, on real text.

Each target is read back from the codec as training reads it. The student's gradient of KL(teacher || student)
under it is compared with that under the teacher's full distribution. The student is the teacher without
layers 12-19. Angles are in degrees:

head    between gradients of the head's weights, over all positions
token   between gradients of one position's last hidden state, which the body receives; the mean angle
batch   of the same averaged over 256 positions, 64 of each domain: noise averages out there, bias stays

Bytes a token count every array of a cache's train split (codec.py lists them). A cache has the codec's tables
once, however long it is; their uncompressed size is in a column of its own. Targets without bytes did not
pass through the codec.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, linear
from transformers import AutoModelForCausalLM

from ddk_build.capture.scoring import Arrays, requests
from ddk_build.teacher.targets import sparse_target
from ddk_cache.format import codec, layout, shards
from ddk_cache.format.layout import Target, token_arrays
from ddk_train.config import Tail
from ddk_train.loss.fused import distillation_loss
from tools.bench.shared.real_logits import CALIBRATION, SAMPLED, SEQ_LENGTH, TOP_64, answers, fit, load
from tools.frame import output_option, show, write_json
from tools.prune_student import prune
from tools.real_data import DOMAINS, teacher_folder

DROPPED_LAYERS = set(range(12, 20))
BATCH = 256  # positions
STORED = {
    "top 12": Target(top_k=12),
    "top 64": TOP_64,
    "top 64, top-p 0.95": Target(top_p=0.95),
    "top 32, top-p 0.98": Target(top_k=32, top_p=0.98),
    **{f"{samples} systematic draws": target for samples, target in SAMPLED.items()},
}
TAILS: dict[str, list[Tail]] = {"top 12": ["drop", "bucket", "label"], "top 64": ["drop", "bucket", "label"]}
Figures = dict[str, float]


class Entries(NamedTuple):
    """A target at M positions, as ``distillation_loss`` takes it."""

    ids: Tensor  # [M, E]
    logprobs: Tensor  # [M, E]
    tail_logprob: Tensor  # [M]


class Text(NamedTuple):
    """M positions, from the domains in turn, and the student's states at them."""

    documents: list[Tensor]  # int64
    order: Tensor  # [M] index into the positions of all documents
    positions: Tensor  # [M] index into the flattened rows that are measured, [n * S]
    labels: Tensor  # [M]
    hidden: Tensor  # [M, H]
    head: Tensor  # [V, H]


class Gradients(NamedTuple):
    """Of a mean over M positions."""

    head: Tensor  # [V, H]
    hidden: Tensor  # [M, H]

    def minus(self, other: "Gradients") -> "Gradients":
        return Gradients(self.head - other.head, self.hidden - other.hidden)


def read(captured: Arrays, positions: int) -> Text:
    """Return the first ``positions``: the same number from one measured row of each domain."""
    share = positions // len(DOMAINS)
    chosen = slice(CALIBRATION * len(DOMAINS), (CALIBRATION + 1) * len(DOMAINS))
    rows = {name: captured[name][chosen] for name in token_arrays(SEQ_LENGTH)}
    rows["loss_mask"] = rows["loss_mask"] * (rows["loss_mask"].cumsum(axis=1) <= share)
    assert (rows["loss_mask"].sum(axis=1) == share).all(), f"a row has fewer than {share} labels"
    asked = requests(rows)
    documents = [torch.from_numpy(document.astype(np.int64)) for document in asked.documents]
    order = torch.arange(share * len(DOMAINS)).view(len(DOMAINS), share).T.flatten()
    with tempfile.TemporaryDirectory() as folder:
        prune(teacher_folder(), Path(folder), DROPPED_LAYERS)
        student: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Text(
        documents,
        order,
        torch.from_numpy(np.concatenate(asked.positions))[order],
        torch.cat([document[1:] for document in documents])[order],
        hidden_states(student, documents)[order],
        student.lm_head.weight.detach(),
    )


def hidden_states(model: Any, documents: list[Tensor]) -> Tensor:
    """Return the last hidden state of every position with a next token, document after document."""
    with torch.no_grad():
        outputs = [model.model(document[None], use_cache=False) for document in documents]
    return torch.cat([output.last_hidden_state[0, :-1] for output in outputs])


def teacher_logits(text: Text) -> Tensor:
    """Return the float32 teacher's logits [M, V]."""
    model: Any = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32)
    return linear(hidden_states(model, text.documents)[text.order], model.lm_head.weight.detach())


def full(text: Text, logits: Tensor) -> Gradients:
    """Return the gradients of the mean KL between full distributions, by autograd; logits [M, V]."""
    hidden, head = text.hidden.clone().requires_grad_(), text.head.clone().requires_grad_()
    for part, teacher in zip(hidden.split(BATCH), logits.split(BATCH), strict=True):
        q, p = linear(part, head).log_softmax(-1), teacher.float().log_softmax(-1)
        loss = kl_div(q, p, reduction="sum", log_target=True) / len(hidden)
        loss.backward()
    return _gradients(hidden, head)


def sparse(text: Text, entries: Entries | None, tail: Tail = "bucket") -> Gradients:
    """Return the gradients of the mean cross-entropy + KL, as in training; None: of cross-entropy alone."""
    hidden, head = text.hidden.clone().requires_grad_(), text.head.clone().requires_grad_()
    given = entries or (None, None, None)
    gamma = 0.0 if entries is None else 1.0
    loss = distillation_loss(hidden, head, text.labels, *given, gamma=gamma, tail=tail).loss
    loss.backward()
    return _gradients(hidden, head)


def _gradients(hidden: Tensor, head: Tensor) -> Gradients:
    assert hidden.grad is not None
    assert head.grad is not None
    return Gradients(head.grad, hidden.grad)


def angles(gradients: Gradients, exact: Gradients) -> Figures:
    batches = [part.hidden.unflatten(0, (-1, BATCH)).mean(dim=1) for part in (gradients, exact)]
    return {
        "head": angle(gradients.head.flatten(), exact.head.flatten()),
        "token": angle(gradients.hidden, exact.hidden),
        "batch": angle(*batches),
    }


def angle(a: Tensor, b: Tensor) -> float:
    """Return the degrees between vectors along the last axis, averaged over the others."""
    cosine = cosine_similarity(a.double(), b.double(), dim=-1)
    return float(cosine.clamp(-1, 1).acos().rad2deg().mean())


def stored(captured: Arrays, target: Target, positions: Tensor) -> tuple[Entries, Figures]:
    """Return what a cache gives back at ``positions``, and its bytes: a token's, and those of the tables."""
    calibration, given = answers(captured, "float32", target)
    codebook = fit(calibration, target, int(captured["vocab_size"]))
    label = given.pop("label_logprob")
    mask = given["ids"][..., 0] >= 0
    arrays = codec.encode(codec.Targets.from_arrays(given, mask), mask, codebook, target)
    tokens = {name: captured[name][-len(label) :] for name in layout.token_arrays(SEQ_LENGTH)}
    rows = tokens | arrays | {"label_logprob": label}
    shapes = layout.token_arrays(SEQ_LENGTH)
    shapes["label_logprob"] = layout.RowArray("float32", SEQ_LENGTH, "pcodec")
    shapes |= codec.row_arrays(target, SEQ_LENGTH)
    size = sum(len(shards.encode(rows[name], shape, len(label))) for name, shape in shapes.items())
    decoded = codec.decode(arrays, codebook, target)
    index = torch.from_numpy(np.cumsum(mask) - 1)[positions]  # among the positions that have entries
    entries = Entries(*(torch.from_numpy(part)[index] for part in vars(decoded).values()))
    tables = sum(table.nbytes for table in codebook.arrays().values())
    return entries, {"bytes": size / np.count_nonzero(tokens["segments"]), "tables": tables}


def not_stored(text: Text, logits: Tensor) -> dict[str, Entries]:
    """Return targets to compare with, as exact as the logits [M, V]."""

    def top(count: int) -> Entries:
        return Entries(*sparse_target(logits, text.labels, Target(top_k=count))[:3])

    mass, best = logits.softmax(-1), top(16)
    no_tail = torch.full(text.labels.shape, -torch.inf)
    targets = {"top 100": top(100)}
    for draws in (12, 50):
        targets[f"{draws} independent draws"] = Entries(*draw(mass, draws), no_tail)
    ids, shares = draw(mass.scatter_(1, best.ids.long(), 0), 8)
    targets["top 16 + 8 independent draws"] = Entries(
        torch.cat([best.ids, ids], -1),
        torch.cat([best.logprobs, shares + best.tail_logprob[:, None]], -1),
        no_tail,
    )
    return targets


def draw(mass: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Draw independently from mass [M, V]; return distinct ids and log(count / draws), [M, draws] each."""
    drawn = torch.multinomial(mass, draws, replacement=True, generator=torch.Generator().manual_seed(0))
    ids, shares = torch.full_like(drawn, -1), torch.zeros(drawn.shape)
    for row, samples in enumerate(drawn):
        distinct, counts = samples.unique(return_counts=True)
        ids[row, : len(distinct)], shares[row, : len(distinct)] = distinct, counts / draws
    return ids, shares.log()


def measure(captured: Arrays, text: Text) -> dict[str, Figures]:
    """Return entries, angles and bytes by target and, for some, by the treatment of the tail."""
    logits = teacher_logits(text)
    exact, cross_entropy = full(text, logits), sparse(text, None)
    targets = {name: stored(captured, target, text.positions) for name, target in STORED.items()}
    targets |= {name: (entries, {}) for name, entries in not_stored(text, logits).items()}
    del logits
    figures: dict[str, Figures] = {}
    for name, (entries, size) in track(targets.items(), "The student's gradients", transient=True):
        count = float((entries.ids >= 0).sum(-1).double().mean())
        for tail in TAILS.get(name, ["bucket"]):
            kl = sparse(text, entries, tail).minus(cross_entropy)
            full_name = f"{name}, tail: {tail}" if name in TAILS else name
            figures[full_name] = {"entries": count, **angles(kl, exact), **size}
    return figures


@click.command(help=__doc__)
@click.option("--tokens", default=2816, show_default=True, help="Positions whose gradients are compared.")
@output_option("targets")
def main(tokens: int, output: Path) -> None:
    captured = load()
    figures = measure(captured, read(captured, tokens))
    columns = ("entries", "head", "token", "batch", "bytes", "tables")
    show(
        "Angle to the full distribution's gradient, degrees; bytes a token, bytes of tables",
        ("", *columns),
        [(name, *(row.get(column) for column in columns)) for name, row in figures.items()],
    )
    write_json(output, {"tokens": tokens, "targets": figures})


if __name__ == "__main__":
    main()
