"""Students and targets in float64 for the tests of the loss, and the comparison with its oracle."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from ddk_train.loss.fused import DistillationLoss, distillation_loss, reference_loss

BACKEND: Any = "triton" if os.environ.get("TRITON_INTERPRET") else "torch"
TAILS: Any = pytest.mark.parametrize("tail", ["bucket", "label", "drop"])
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])

ROWS = 13  # of which 10 have a label: a chunk of 8 and a rest
Target = tuple[Tensor, Tensor, Tensor]


def make_student(rows: int = ROWS, width: int = 16, vocab_size: int = 103) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and bias in float64; the logits' deviation is about 3."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=torch.float64)
    head = torch.randn(vocab_size, width, dtype=torch.float64) * 3 / width**0.5
    return hidden, head, torch.randn(vocab_size, dtype=torch.float64)


def top_entries(log_p: Tensor, entries: int) -> Target:
    logprobs, ids = log_p.topk(entries, dim=-1)
    return ids.int(), logprobs, torch.log1p(-logprobs.exp().sum(-1))


def make_target(rows: int = ROWS, vocab_size: int = 103, entries: int = 7) -> tuple[Tensor, Target]:
    """Labels (every fifth ignored, half of the rest among the entries) and a teacher with absent entries."""
    torch.manual_seed(1)
    log_p = (2 * torch.randn(rows, vocab_size, dtype=torch.float64)).log_softmax(-1)
    ids, logprobs, tail = top_entries(log_p, entries)
    labels = torch.where(torch.rand(rows) < 0.5, ids[:, -1].long(), torch.randint(vocab_size, (rows,)))
    labels[::5] = -100
    for row, kept in ((1, 1), (2, 0), (3, entries - 1)):
        if row < rows:
            ids[row, kept:], logprobs[row, kept:] = -1, -torch.inf
            tail[row] = torch.log1p(-logprobs[row].exp().sum())
    return labels, (ids, logprobs, tail)


def fused(hidden: Tensor, head: Tensor, labels: Tensor, target: Target, **settings: Any) -> DistillationLoss:
    return distillation_loss(
        hidden, head, labels, *target, **{"chunk_size": 8, "backend": BACKEND} | settings
    )


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def error(actual: Tensor, expected: Tensor, floor: float = 0.1) -> float:
    """Relative, in the Euclidean norm; relative to ``floor`` where less is expected, which may be 0."""
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach())
    return (difference / torch.linalg.vector_norm(expected.detach()).clamp(min=floor)).item()


def assert_equal_to_oracle(
    student: tuple[Tensor, ...],
    labels: Tensor,
    target: Target,
    dtype: torch.dtype,
    bound: float,
    **settings: Any,
) -> None:
    """Loss, its two parts and all gradients, from inputs rounded to ``dtype``, against float64."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in student]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    bias = {"head_bias": inputs[2]} if len(inputs) == 3 else {}
    actual = fused(inputs[0], inputs[1], labels, target, **settings, **bias)
    expected = reference_loss(exact[0] @ exact[1].T + sum(exact[2:]), labels, *target, **settings)
    for name, value in actual._asdict().items():
        assert torch.isfinite(value).all()
        assert error(value, getattr(expected, name)) <= bound, name
    # Terms as large as a logit may cancel in a gradient.
    floor = max(0.1, 0.1 * student[1].abs().max().item())
    for made, oracle in zip(gradients(actual.loss, *inputs), gradients(expected.loss, *exact), strict=True):
        assert made.dtype == dtype
        assert error(made, oracle, floor) <= bound


def target_of(*rows: tuple[list[int], list[float], float]) -> Target:
    """Rows of ids, probabilities and the probability of the tail, as the cache gives them (float32)."""
    ids, p, tail = zip(*rows, strict=True)
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(p).log(), torch.tensor(tail).log()
