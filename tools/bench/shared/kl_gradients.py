"""The student's gradient under different teachers, on real text: for the benchmarks.

The student is real_data.py's teacher without layers 12-19. Angles between gradients of KL(teacher || student)
are in degrees:

head    of the gradient of the head's weights, over all positions
token   of the gradient of a position's last hidden state, which is what the body gets; the mean angle
batch   of the same averaged over 256 positions, 64 of each domain: noise averages out there, bias stays
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, linear
from transformers import AutoModelForCausalLM

from ddk_build.scoring import Arrays, requests
from ddk_cache.layout import token_arrays
from ddk_train.loss import distillation_loss
from ddk_train.loss_chunk import Tail
from tools.bench.shared.real_logits import CALIBRATION, SEQ_LENGTH
from tools.prune_student import prune
from tools.real_data import DOMAINS, teacher_folder

DROPPED = set(range(12, 20))
BATCH = 256  # positions
Figures = dict[str, float | None]


class Entries(NamedTuple):
    """A target at M positions, as ``distillation_loss`` takes it."""

    ids: Tensor  # [M, E]
    logprobs: Tensor  # [M, E]
    tail_logprob: Tensor  # [M]


class Text(NamedTuple):
    """M positions, taken from the domains in turn, and what the student makes of them."""

    documents: list[Tensor]  # int64
    order: Tensor  # [M] which of the documents' positions
    places: Tensor  # [M] where in the flattened rows that are measured, [n * S]
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
    """The first ``positions``, as many from one measured row of each domain."""
    share = positions // len(DOMAINS)
    chosen = slice(CALIBRATION * len(DOMAINS), (CALIBRATION + 1) * len(DOMAINS))
    rows = {name: captured[name][chosen] for name in token_arrays(SEQ_LENGTH)}
    rows["loss_mask"] = rows["loss_mask"] * (rows["loss_mask"].cumsum(axis=1) <= share)
    assert (rows["loss_mask"].sum(axis=1) == share).all(), f"a row has fewer than {share} labels"
    asked = requests(rows)
    documents = [torch.from_numpy(document.astype(np.int64)) for document in asked.documents]
    order = torch.arange(share * len(DOMAINS)).view(len(DOMAINS), share).T.flatten()
    with tempfile.TemporaryDirectory() as folder:
        prune(teacher_folder(), Path(folder), DROPPED)
        student: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Text(
        documents,
        order,
        torch.from_numpy(np.concatenate(asked.places))[order],
        torch.cat([document[1:] for document in documents])[order],
        hidden_states(student, documents)[order],
        student.lm_head.weight.detach(),
    )


def hidden_states(model: Any, documents: list[Tensor]) -> Tensor:
    """Of every position that has a next token, one document after another."""
    with torch.no_grad():
        read = [model.model(document[None], use_cache=False) for document in documents]
    return torch.cat([found.last_hidden_state[0, :-1] for found in read])


def teacher_states(text: Text, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The teacher's last hidden states [M, H] and its head [V, H]; ``linear`` makes logits of them."""
    model: Any = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=dtype)
    return hidden_states(model, text.documents)[text.order], model.lm_head.weight.detach()


def full(text: Text, logits: Tensor) -> Gradients:
    """Of the mean KL(teacher || student) between full distributions, by autograd; logits [M, V]."""
    hidden, head = text.hidden.clone().requires_grad_(), text.head.clone().requires_grad_()
    for part, teacher in zip(hidden.split(BATCH), logits.split(BATCH), strict=True):
        q, p = linear(part, head).log_softmax(-1), teacher.float().log_softmax(-1)
        (kl_div(q, p, reduction="sum", log_target=True) / len(hidden)).backward()
    return _made(hidden, head)


def sparse(text: Text, entries: Entries | None, tail: Tail = "bucket") -> Gradients:
    """Of the mean cross-entropy + KL, as in training; without ``entries`` of cross-entropy alone."""
    hidden, head = text.hidden.clone().requires_grad_(), text.head.clone().requires_grad_()
    given = entries or (None, None, None)
    gamma = 0.0 if entries is None else 1.0
    distillation_loss(hidden, head, text.labels, *given, gamma=gamma, tail=tail).loss.backward()
    return _made(hidden, head)


def _made(hidden: Tensor, head: Tensor) -> Gradients:
    assert hidden.grad is not None
    assert head.grad is not None
    return Gradients(head.grad, hidden.grad)


def angles(found: Gradients, exact: Gradients) -> Figures:
    batches = [part.hidden.unflatten(0, (-1, BATCH)).mean(dim=1) for part in (found, exact)]
    return {
        "head": angle(found.head.flatten(), exact.head.flatten()),
        "token": angle(found.hidden, exact.hidden),
        "batch": angle(*batches),
    }


def angle(one: Tensor, other: Tensor) -> float:
    """Degrees between vectors along the last axis, the mean of the others."""
    cosine = cosine_similarity(one.double(), other.double(), dim=-1)
    return float(cosine.clamp(-1, 1).acos().rad2deg().mean())


def show(title: str, found: dict[str, Figures], columns: dict[str, str]) -> None:
    """Print a table; ``columns`` says how each is written."""
    table = Table(title=title)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in found.items():
        cells = [(figures.get(column), how) for column, how in columns.items()]
        table.add_row(name, *("" if value is None else format(value, how) for value, how in cells))
    Console(width=110).print(table)
