"""The policy gradient on tokens that a student wrote: reverse KL to the teacher, by samples.

A token y that the student, or an older one, has written at some position gets the loss -f log q(y), where q
is the student's distribution there and the factor f has no gradient::

    advantage   A = log p(y) - log q(y), at most advantage_clip from 0; p is the teacher's distribution
    importance  r = q(y) / w(y), where w is the writer's distribution; 1 if that is unknown
    f = weight * r * A if 1 / importance_clip <= r <= importance_clip, else 0

Its expectation over tokens written by the student itself is the gradient of KL(q ‖ p). Sources: on-policy
distillation from stored log-probabilities, Lightning OPD (arXiv 2604.13010); the bound of 20 nats, Nemotron 3
Ultra; tokens outside the importance's bounds are left out, IcePop (Ring-1T).

As f has no gradient, the term is a cross-entropy with a weight for each token, and costs what that costs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = torch.inf  # the writer's log-probability where it was not stored
MOST_RATIO = 40.0  # nats of an importance, whose square is finite in float32


class Policy(NamedTuple):
    """The arguments of the term, for M tokens."""

    weight: Tensor  # [M]; 0 for tokens that no student wrote
    teacher_logprob: Tensor  # [M] log p(y), nats
    writer_logprob: Tensor  # [M] log w(y), nats, or UNKNOWN
    advantage_clip: float = 20.0
    importance_clip: float = 5.0


def policy_terms(log_q: Tensor, policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clipped advantage, the importance and whether it is within its bounds, [M] each."""
    limit, bound = policy.advantage_clip, policy.importance_clip
    advantage = (policy.teacher_logprob - log_q).clamp(-limit, limit)
    ratio = (log_q - policy.writer_logprob).clamp(max=MOST_RATIO).exp()
    importance = torch.where(policy.writer_logprob == UNKNOWN, 1.0, ratio)
    return advantage, importance, (importance >= 1 / bound) & (importance <= bound)


def policy_factor(log_q: Tensor, policy: Policy) -> Tensor:
    """Return f of each token, [M]."""
    advantage, importance, is_kept = policy_terms(log_q, policy)
    return torch.where(is_kept, policy.weight * importance * advantage, 0.0)
