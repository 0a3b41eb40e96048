"""The loss written plainly on full logits: the oracle of the tests."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddk_train.config import Divergence, Tail
from ddk_train.loss.chunk import LEAST_LOGPROB
from ddk_train.loss.policy import Policy, policy_factor

IGNORED = -100  # the label of a row without one, as in torch.nn.functional.cross_entropy


class DistillationLoss(NamedTuple):
    """Means over the labelled rows, and the rows' values, in nats; only ``loss`` has a gradient."""

    loss: Tensor  # mean of cross_entropy_weight * cross-entropy + gamma * kl + the policy gradient's loss
    cross_entropy: Tensor  # not weighted
    kl: Tensor  # the divergence, not weighted
    row_cross_entropy: Tensor  # [M], 0 in rows without a label
    row_kl: Tensor  # [M], the same
    row_agrees: Tensor  # [M], 1 where the student's likeliest token is one of the teacher's likeliest, else 0


def reference_loss(  # noqa: PLR0913, that of distillation_loss
    logits: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    logprobs: Tensor | None,
    tail_logprob: Tensor | None,
    *,
    gamma: float | Tensor,
    cross_entropy_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    divergence: Divergence = "forward",
    beta: float = 0.5,
    softcap: float | None = None,
    policy: Policy | None = None,
) -> DistillationLoss:
    """Compute ``distillation_loss`` on full logits [M, V], with its other arguments, by autograd."""
    rows = labels != IGNORED
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    label_logprob = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    row_cross_entropy = -label_logprob.where(rows, 0)
    if isinstance(gamma, float | int) and gamma == 0:
        row_kl = row_agrees = torch.zeros_like(row_cross_entropy)
    else:
        ids, logprobs, tail_logprob = required(ids, logprobs, tail_logprob)
        log_q = (logits / temperature).log_softmax(-1)
        outcomes = _outcomes(log_q, labels.clamp(min=0), (ids.long(), logprobs, tail_logprob), tail)
        row_kl = _DIVERGENCES[divergence](*outcomes, beta).sum(-1).where(rows, 0)
        best = (logprobs == logprobs.amax(-1, keepdim=True)) & (ids >= 0)
        chosen = logits.gather(-1, ids.long().clamp(min=0)) == logits.amax(-1, keepdim=True)
        row_agrees = (best & chosen).any(-1).where(rows, False).to(logits.dtype)
    count = rows.sum().clamp(min=1)
    if policy is not None:
        cross_entropy_weight = cross_entropy_weight + policy_factor(label_logprob.detach(), policy)
    loss = (cross_entropy_weight * row_cross_entropy + gamma * row_kl).sum() / count
    row_cross_entropy, row_kl = row_cross_entropy.detach(), row_kl.detach()
    means = row_cross_entropy.sum() / count, row_kl.sum() / count
    return DistillationLoss(loss, *means, row_cross_entropy, row_kl, row_agrees)


def required(*teacher: Tensor | None) -> list[Tensor]:
    """Return the teacher's tensors; raise ValueError if one is missing."""
    tensors = [tensor for tensor in teacher if tensor is not None]
    if len(tensors) < len(teacher):
        raise ValueError("gamma is not 0: ids, logprobs and tail_logprob must be given")
    return tensors


def _outcomes(
    log_q: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor, Tensor], tail: Tail
) -> tuple[Tensor, Tensor]:
    """Return p and log q of V tokens, none in the tail, and of the tail as one outcome, [M, V + 1]."""
    ids, logprobs, tail_logprob = teacher
    vocab_size = log_q.shape[-1]
    # Absent entries (-1) go to an extra column behind the vocabulary.
    column = torch.where(ids >= 0, ids, vocab_size)
    wide = log_q.new_zeros(len(log_q), vocab_size + 1)
    p = wide.scatter(-1, column, logprobs.to(log_q).exp())[:, :-1]
    inside = wide.scatter(-1, column, 1.0)[:, :-1].bool()
    rest = tail_logprob.to(log_q).exp()[:, None]
    if tail == "bucket":
        # If the entries are the whole vocabulary, the tail is no outcome and has no term.
        partial = ~inside.all(-1, keepdim=True)
        log_q_tail = log_q.masked_fill(inside & partial, -torch.inf).logsumexp(-1, keepdim=True)
        p = torch.cat([p, rest * partial], -1)
        log_q = torch.cat([log_q.masked_fill(~inside, -torch.inf), log_q_tail.where(partial, -torch.inf)], -1)
    elif tail == "label":
        p = p.scatter_add(-1, labels[:, None], rest)
    else:
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return p, log_q.masked_fill((p == 0).all(-1, keepdim=True), -torch.inf)


def _forward(p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.xlogy(p, p) - p * log_q.masked_fill(p == 0, 0)


def _reverse(p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    absent = log_q == -torch.inf
    log_q = log_q.masked_fill(absent, 0)
    return (log_q.exp() * (log_q - p.log().clamp(min=LEAST_LOGPROB))).masked_fill(absent, 0)


def _jensen_shannon(p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    absent = log_q == -torch.inf
    log_q = log_q.masked_fill(absent, 0)
    log_middle = (p.log() + math.log(beta)).logaddexp(log_q + math.log(1 - beta))
    teachers = beta * (torch.xlogy(p, p) - p * log_middle)
    return (teachers + (1 - beta) * log_q.exp() * (log_q - log_middle)).masked_fill(absent, 0)


_DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jensen_shannon": _jensen_shannon,
}
