"""One chunk of logits: in go logits and target, out come losses and, in the logits' place, the gradient."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)

Tail = Literal["bucket", "label", "drop"]


class Columns(NamedTuple):
    """The columns of a row of logits that the target singles out; every other column shares one factor.

    Column 0 is the label, the others are the entries. An entry that is absent, or is the label itself (whose
    mass then stands in column 0), repeats the label's id and has no mass.
    """

    ids: Tensor  # int64 [n, 1 + E]
    logprobs: Tensor  # [n, 1 + E] nats, -inf where there is no mass
    tail_logprob: Tensor  # [n] all tokens but the entries, as one outcome; -inf: there is no such outcome
    label_in_tail: Tensor  # bool [n] the label is not among the entries


# (logits [c, V], columns, gamma, temperature, gradient [c, V] or None) -> cross-entropy [c], KL [c]
ChunkLoss = Callable[[Tensor, Columns, float, float, Tensor | None], tuple[Tensor, Tensor]]


def target_columns(
    labels: Tensor, ids: Tensor, logprobs: Tensor, tail_logprob: Tensor, tail: Tail
) -> Columns:
    """Labels [n], ids and logprobs [n, E] and tail_logprob [n] as columns, the tail put where it belongs."""
    label = labels[:, None]
    is_label = ids == label
    apart = (ids >= 0) & ~is_label
    label_logprob = logprobs.masked_fill(~is_label, -torch.inf).amax(-1, keepdim=True)
    if tail == "label":
        label_logprob = label_logprob.logaddexp(tail_logprob[:, None])
    ids = torch.cat([label, torch.where(apart, ids, label)], -1)
    logprobs = torch.cat([label_logprob, logprobs.masked_fill(~apart, -torch.inf)], -1)
    if tail == "drop":
        logprobs -= logprobs.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(logprobs.dtype).min)
    if tail != "bucket":
        tail_logprob = torch.full_like(tail_logprob, -torch.inf)
    return Columns(ids, logprobs, tail_logprob, ~is_label.any(-1))


def chunk_loss(
    logits: Tensor, columns: Columns, gamma: float, temperature: float, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [c] and KL [c] of a chunk of logits [c, V], which are used up.

    ``gradient`` [c, V] receives that of cross_entropy + gamma * kl; it may be the logits themselves, or None.

    The target's columns are taken out first and the rest is summed on a scale of its own. So q_tail is never
    a difference from 1, does not underflow, and needs no pass over the chunk that cross-entropy does not.
    """
    repeated = columns.ids == columns.ids[:, :1]
    repeated[:, 0] = False
    own = logits.gather(-1, columns.ids).masked_fill_(repeated, -torch.inf)
    logits.scatter_(-1, columns.ids, -torch.inf)
    # A finite top even where the rest is empty: -inf minus -inf would be NaN.
    rest_top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    top = torch.maximum(rest_top, own.amax(-1, keepdim=True))
    own, gap = own - top, rest_top - top
    logits -= rest_top
    softened = None if temperature == 1 else (logits * (LOG2_E / temperature)).exp2_()
    hard = soft = _softmax(own, gap, logits.mul_(LOG2_E).exp2_())
    if softened is not None:
        soft = _softmax(own / temperature, gap / temperature, softened)

    kl, own_pull, rest_pull = _kl(soft, columns)
    if gradient is not None:
        weight = gamma / temperature
        own_gradient = _exp(hard.log_q) + weight * own_pull
        own_gradient[:, 0] -= 1
        hard_factor, soft_factor = _exp(hard.log_q_rest) * hard.scale, weight * rest_pull * soft.scale
        if softened is None:
            logits *= hard_factor + soft_factor
        else:
            logits.mul_(hard_factor).addcmul_(softened, soft_factor)
        logits.scatter_add_(-1, columns.ids, own_gradient)
        if gradient.data_ptr() != logits.data_ptr():
            gradient.copy_(logits)
    return -hard.log_q[:, 0], kl


class _Softmax(NamedTuple):
    log_q: Tensor  # [c, 1 + E] of the target's columns
    log_q_rest: Tensor  # [c, 1] of all other tokens together
    scale: Tensor  # [c, 1] turns exp(logit - rest_top) into a token's share of them


def _softmax(own: Tensor, gap: Tensor, rest: Tensor) -> _Softmax:
    """Of the columns' logits [c, 1 + E] and the rest's exp(logit - rest_top) [c, V]; gap = rest_top [c, 1].

    ``own`` and ``gap`` count from the row's largest logit, so neither is above 0.
    """
    rest_sum = rest.sum(-1, keepdim=True)
    log_rest = rest_sum.log() + gap
    log_total = (_exp(log_rest) + _exp(own).sum(-1, keepdim=True)).log()
    # The rest's largest adds exp(0) = 1: a smaller sum is that of no tokens at all.
    return _Softmax(own - log_total, log_rest - log_total, 1 / rest_sum.clamp(min=1))


def _kl(student: _Softmax, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """KL [c], and T times its gradient by the columns' logits [c, 1 + E] and by the rest's, summed [c, 1].

    With p the teacher, q the student and S = sum(p) (1 but for rounding), a logit of an entry gets S q - p,
    one in the tail S q - p_tail q / q_tail.
    """
    log_q_label = student.log_q[:, :1].masked_fill(~columns.label_in_tail[:, None], -torch.inf)
    log_q_tail = student.log_q_rest.logaddexp(log_q_label)
    # Entries that are the whole vocabulary leave no outcome for the teacher's tail: it has no term.
    log_p_tail = columns.tail_logprob[:, None].masked_fill(log_q_tail == -torch.inf, -torch.inf)
    log_q_tail = log_q_tail.clamp(min=torch.finfo(log_q_tail.dtype).min)

    log_p = torch.cat([columns.logprobs, log_p_tail], -1)
    p = _exp(log_p)
    kl = torch.where(p > 0, p * (log_p - torch.cat([student.log_q, log_q_tail], -1)), 0).sum(-1)
    mass, p_tail = p.sum(-1, keepdim=True), p[:, -1:]
    own = mass * _exp(student.log_q) - p[:, :-1]
    own[:, :1] -= p_tail * _exp(log_q_label - log_q_tail)
    rest = mass * _exp(student.log_q_rest) - p_tail * _exp(student.log_q_rest - log_q_tail)
    return kl, own, rest


def _exp(x: Tensor) -> Tensor:
    """torch.exp is MKL's on a CPU, and 20 times slower there where results underflow; exp2 is not."""
    return (x * LOG2_E).exp2_()
