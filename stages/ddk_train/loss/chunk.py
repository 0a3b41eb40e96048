"""The loss of one chunk of logits, and its gradient, which replaces the logits."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddk_train.config import Divergence, Tail
from ddk_train.loss.policy import Policy, policy_factor

LOG2_E = 1 / math.log(2)

# Reverse KL is infinite where only the student has mass. The teacher's 0 is rounded: float32 probabilities
# that sum to 1 leave at most e^-17 to other tokens.
LEAST_LOGPROB = -20.0  # nats


class TargetColumns(NamedTuple):
    """The targets of a chunk of logits, and their weights.

    Column 0 of ids and logprobs is the label, the others are the entries. An entry that is absent, or equals
    the label (whose mass is in column 0), repeats the label's id without mass. All tokens outside the columns
    share one factor in the gradient.
    """

    ids: Tensor  # int64 [n, 1 + E]
    logprobs: Tensor  # [n, 1 + E] nats, -inf where there is no mass
    tail_logprob: Tensor  # [n] of all tokens but the entries, as one outcome; -inf: no such outcome
    label_in_tail: Tensor  # bool [n] the tail is an outcome, and the label belongs to it
    likeliest: Tensor  # bool [n, 1 + E] no other entry has more mass
    cross_entropy_weight: Tensor  # [n]
    gamma: Tensor  # [n] weight of the divergence
    policy_weight: Tensor  # [n] these three are the columns of ``Policy``
    teacher_logprob: Tensor
    writer_logprob: Tensor

    def policy_factor(self, log_q_label: Tensor, objective: "Objective") -> Tensor:
        """Return what the policy gradient adds to the weight of the cross-entropy, [n]."""
        if objective.policy_clips is None:
            return torch.zeros_like(log_q_label)
        columns = self.policy_weight, self.teacher_logprob, self.writer_logprob
        return policy_factor(log_q_label, Policy(*columns, *objective.policy_clips))


class Objective(NamedTuple):
    """The parameters common to all rows."""

    temperature: float
    divergence: Divergence
    beta: float  # of jensen_shannon
    softcap: float | None  # logits become softcap * tanh(logits / softcap)
    policy_clips: tuple[float, float] | None  # of advantage and importance; None without a policy gradient


class RowLosses(NamedTuple):
    """The unweighted losses of each row of a chunk, [c] each."""

    cross_entropy: Tensor
    divergence: Tensor
    agrees: Tensor  # 1 where the student's likeliest token is one of the teacher's likeliest entries, else 0


# (logits [c, V], columns, objective, gradient [c, V] or None)
ChunkLoss = Callable[[Tensor, TargetColumns, Objective, Tensor | None], RowLosses]


def target_columns(
    labels: Tensor, ids: Tensor, logprobs: Tensor, tail_logprob: Tensor, tail: Tail
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the first five fields of TargetColumns; ids and logprobs [n, E], the others [n]."""
    label = labels[:, None]
    is_label = ids == label
    is_other = (ids >= 0) & ~is_label
    best = (logprobs == logprobs.amax(-1, keepdim=True)) & (logprobs > -torch.inf)
    likeliest = torch.cat([(best & is_label).any(-1, keepdim=True), best & is_other], -1)
    label_logprob = logprobs.masked_fill(~is_label, -torch.inf).amax(-1, keepdim=True)
    if tail == "label":
        label_logprob = label_logprob.logaddexp(tail_logprob[:, None])
    ids = torch.cat([label, torch.where(is_other, ids, label)], -1)
    logprobs = torch.cat([label_logprob, logprobs.masked_fill(~is_other, -torch.inf)], -1)
    if tail == "drop":
        logprobs -= logprobs.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(logprobs.dtype).min)
    if tail != "bucket":
        tail_logprob = torch.full_like(tail_logprob, -torch.inf)
        return ids, logprobs, tail_logprob, torch.zeros_like(labels, dtype=torch.bool), likeliest
    return ids, logprobs, tail_logprob, ~is_label.any(-1), likeliest


def chunk_loss(
    logits: Tensor, columns: TargetColumns, objective: Objective, gradient: Tensor | None
) -> RowLosses:
    """Return the losses of a chunk of logits [c, V], which are overwritten.

    ``gradient`` [c, V] receives the gradient of the weighted sum; it may be the logits themselves, or None.

    The columns are taken out first and the rest is summed on a separate scale, so q_tail is no difference
    from 1, does not underflow, and costs no more passes over the chunk than cross-entropy alone.
    """
    temperature, softcap = objective.temperature, objective.softcap
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if gradient is not None else None
        logits *= softcap
    repeated = columns.ids == columns.ids[:, :1]
    repeated[:, 0] = False
    column_logits = logits.gather(-1, columns.ids).masked_fill_(repeated, -torch.inf)
    logits.scatter_(-1, columns.ids, -torch.inf)
    # A finite top even if the rest is empty: -inf minus -inf would be NaN.
    rest_top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    top = torch.maximum(rest_top, column_logits.amax(-1, keepdim=True))
    column_logits, gap = column_logits - top, rest_top - top
    agrees = ((column_logits == 0) & columns.likeliest).any(-1).to(column_logits.dtype)
    logits -= rest_top
    softened = None if temperature == 1 else (logits * (LOG2_E / temperature)).exp2_()
    hard = soft = _softmax(column_logits, gap, logits.mul_(LOG2_E).exp2_())
    if softened is not None:
        soft = _softmax(column_logits / temperature, gap / temperature, softened)

    divergence, column_pull, rest_pull = _divergence(soft, columns, objective)
    if gradient is not None:
        of_label = columns.cross_entropy_weight + columns.policy_factor(hard.log_q[:, 0], objective)
        of_hard, of_soft = of_label[:, None], columns.gamma[:, None] / temperature
        column_gradient = of_hard * _exp(hard.log_q) + of_soft * column_pull
        column_gradient[:, :1] -= of_hard
        hard_factor = of_hard * _exp(hard.log_q_rest) * hard.scale
        soft_factor = of_soft * rest_pull * soft.scale
        if softened is None:
            logits *= hard_factor + soft_factor
        else:
            logits.mul_(hard_factor).addcmul_(softened, soft_factor)
        logits.scatter_add_(-1, columns.ids, column_gradient)
        if slope is not None:
            logits *= slope
        if gradient.data_ptr() != logits.data_ptr():
            gradient.copy_(logits)
    return RowLosses(-hard.log_q[:, 0], divergence, agrees)


class _Softmax(NamedTuple):
    log_q: Tensor  # [c, 1 + E] of the target's columns
    log_q_rest: Tensor  # [c, 1] of all other tokens together
    scale: Tensor  # [c, 1] turns exp(logit - rest_top) into a token's share of them


def _softmax(column_logits: Tensor, gap: Tensor, rest: Tensor) -> _Softmax:
    """Normalise the columns' logits [c, 1 + E] and the rest's exp(logit - rest_top) [c, V].

    ``column_logits`` and ``gap``, which is rest_top [c, 1], are relative to the row's largest logit, so <= 0.
    """
    rest_sum = rest.sum(-1, keepdim=True)
    log_rest = rest_sum.log() + gap
    log_total = (_exp(log_rest) + _exp(column_logits).sum(-1, keepdim=True)).log()
    # The rest's largest logit adds exp(0) = 1: only a sum over no tokens is smaller.
    return _Softmax(column_logits - log_total, log_rest - log_total, 1 / rest_sum.clamp(min=1))


def _divergence(
    student: _Softmax, columns: TargetColumns, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence [c], and T times its gradient by the columns' [c, 1 + E] and the rest's logits.

    Let D be a function of the outcomes' log q, g its gradient (DIVERGENCES returns -g), G the sum of g. The
    gradient by an entry's logit is g - G q, by a logit in the tail g_tail q / q_tail - G q. The rest's is the
    sum over its tokens.
    """
    log_q_label = student.log_q[:, :1].masked_fill(~columns.label_in_tail[:, None], -torch.inf)
    log_q_tail = student.log_q_rest.logaddexp(log_q_label)
    # If the entries are the whole vocabulary, the tail is no outcome and has no term.
    log_p_tail = columns.tail_logprob[:, None].masked_fill(log_q_tail == -torch.inf, -torch.inf)

    log_p = torch.cat([columns.logprobs, log_p_tail], -1)
    log_q = torch.cat([student.log_q, log_q_tail], -1)
    log_q[:, :1] = log_q[:, :1].masked_fill(columns.label_in_tail[:, None], -torch.inf)
    # A row without a teacher has no divergence.
    log_q = log_q.masked_fill(log_p.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
    terms, pull = DIVERGENCES[objective.divergence](log_p, log_q, objective.beta)

    total, pull_tail = pull.sum(-1, keepdim=True), pull[:, -1:]
    in_tail = log_q_tail.clamp(min=torch.finfo(log_q_tail.dtype).min)
    column_pull = total * _exp(student.log_q) - pull[:, :-1]
    column_pull[:, :1] -= pull_tail * _exp(log_q_label - in_tail)
    rest_pull = total * _exp(student.log_q_rest) - pull_tail * _exp(student.log_q_rest - in_tail)
    return terms.sum(-1), column_pull, rest_pull


# Each function gets log p and log q of the outcomes, [c, O], -inf where absent, and beta. It returns the
# terms of the divergence and minus their gradient by log q, both [c, O].


def _forward(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute KL(p ‖ q) = sum of p (log p - log q)."""
    p = _exp(log_p)
    lowest = torch.finfo(log_q.dtype).min
    return torch.where(p > 0, p * (log_p - log_q.clamp(min=lowest)), 0), p


def _reverse(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute KL(q ‖ p) = sum of q (log q - log p)."""
    q = _exp(log_q)
    terms = torch.where(q > 0, q * (log_q - log_p.clamp(min=LEAST_LOGPROB)), 0)
    return terms, -(terms + q)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute beta KL(p ‖ m) + (1 - beta) KL(q ‖ m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649)."""
    p, q = _exp(log_p), _exp(log_q)
    log_middle = (log_p + math.log(beta)).logaddexp(log_q + math.log(1 - beta))
    teachers = torch.where(p > 0, beta * p * (log_p - log_middle), 0)
    students = torch.where(q > 0, (1 - beta) * q * (log_q - log_middle), 0)
    return teachers + students, -students


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jensen_shannon": _jensen_shannon,
}


def _exp(x: Tensor) -> Tensor:
    """Return exp(x): on a CPU torch.exp is MKL's, 20 times slower where results underflow; exp2 is not."""
    return (x * LOG2_E).exp2_()
