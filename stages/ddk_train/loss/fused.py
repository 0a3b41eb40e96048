"""The student's loss: head, cross-entropy and sparse KL fused, without [M, V] logits in memory.

The forward pass computes, one chunk of rows at a time, the logits, the loss terms, the logits' gradient in
the same memory, and the gradients of hidden and head, by three matmuls; backward only scales them. (Chunking
existing logits saves nothing: autograd keeps every chunk.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddk_train.config import Divergence, Tail
from ddk_train.loss.chunk import (
    ChunkLoss,
    Objective,
    RowLosses,
    TargetColumns,
    chunk_loss,
    target_columns,
)
from ddk_train.loss.policy import Policy
from ddk_train.loss.reference import IGNORED, DistillationLoss, reference_loss, required

__all__ = ["DistillationLoss", "default_chunk_size", "distillation_loss", "reference_loss"]

Backend = Literal["auto", "torch", "triton"]


def distillation_loss(  # noqa: PLR0913, the published signature
    hidden: Tensor,
    head_weight: Tensor,
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
    head_bias: Tensor | None = None,
    chunk_size: int | None = None,
    all_labelled: bool = False,
    policy: Policy | None = None,
    backend: Backend = "auto",
) -> DistillationLoss:
    """Compute cross-entropy + gamma * KL(teacher ‖ student) at T (DDK, arXiv 2407.16154, equation 3).

    The loss is the mean over the labelled rows of cross_entropy_weight * cross-entropy + gamma * kl. It has
    no factor T², as in the paper; for that of Hinton et al. (arXiv 1503.02531) multiply gamma by T².

    Matmuls run in autocast's dtype if autocast is on, else in hidden's, and the head is cast to it; logits,
    losses and gradient sums are float32 (float64 for a float64 hidden). A CPU multiplies half precision in
    float32, and under autocast, with bfloat16 arithmetic, may round factors to it, which is faster.
    Inputs that need no gradient cost no matmul for it. A sharded head must be gathered first (a DTensor's
    ``full_tensor()``).

    Parameters
    ----------
    hidden, head_weight, head_bias
        [M, H], [V, H], [V].
    labels
        int64 [M]; -100 in rows without a label.
    ids, logprobs, tail_logprob
        The teacher's targets at ``temperature``: [M, E] (-1 absent), [M, E] and [M] in nats (-inf: no mass).
        kl is 0 in rows where the teacher has no mass. With gamma=0 (a number) targets are unused and may be
        None; kl is then 0.
    gamma, cross_entropy_weight
        A number for all rows, or one for each, [M].
    tail
        The teacher's mass outside its entries: "bucket" compares it, as one outcome, with the student's mass
        outside them; "label" adds it to the label; "drop" renormalises the entries.
    divergence, beta
        Over the entries and the bucket: "forward" KL(teacher ‖ student), "reverse" KL(student ‖ teacher),
        "jensen_shannon" beta KL(teacher ‖ m) + (1 - beta) KL(student ‖ m) with
        m = beta teacher + (1 - beta) student (GKD, arXiv 2306.13649).
    softcap
        c replaces logits by c * tanh(logits / c) before anything else (Gemma 2).
    chunk_size
        Rows whose logits exist at once; default as in ``default_chunk_size``.
    all_labelled
        No label is -100: then nothing waits for the GPU to count the labels.
    policy
        A policy gradient on the labels, as tokens that a student wrote; its loss is added.
    backend
        "auto" uses Triton for CUDA tensors.

    Raises
    ------
    ValueError
        gamma is not 0 and the targets are missing; or a divergence other than "forward" without the bucket,
        which is infinite if the student has mass outside the teacher's entries.
    """
    if divergence != "forward" and tail != "bucket":
        raise ValueError(f"divergence {divergence}: needs tail bucket, not {tail}")
    row_count = len(labels)
    rows: Any = slice(None)
    if not all_labelled:
        rows = (labels != IGNORED).nonzero().squeeze(-1)
        hidden, labels = hidden.index_select(0, rows), labels[rows]
    matmul_dtype = _matmul_dtype(hidden)
    dtype = torch.promote_types(matmul_dtype, torch.float32)
    weights = [
        weight[rows].to(dtype)
        if isinstance(weight, Tensor)
        else labels.new_full(labels.shape, weight, dtype=dtype)
        for weight in (cross_entropy_weight, gamma)
    ]
    if not isinstance(gamma, Tensor) and gamma == 0:
        temperature, divergence = 1.0, "forward"
        absent = torch.full_like(labels, -1)[:, None]
        nothing = torch.full_like(absent, -torch.inf, dtype=dtype)
        target = target_columns(labels, absent, nothing, nothing[:, 0], tail)
    else:
        ids, logprobs, tail_logprob = required(ids, logprobs, tail_logprob)
        entries, rest = logprobs[rows].to(dtype), tail_logprob[rows].to(dtype)
        target = target_columns(labels, ids[rows].long(), entries, rest, tail)
    inputs = (hidden, head_weight, head_bias)
    on_policy, clips = [torch.zeros_like(weights[0])] * 3, None
    if policy is not None:
        columns = policy.weight, policy.teacher_logprob, policy.writer_logprob
        on_policy = [column[rows].to(dtype) for column in columns]
        clips = policy.advantage_clip, policy.importance_clip
    step = _Step(
        columns=TargetColumns(*target, *weights, *on_policy),
        objective=Objective(temperature, divergence, beta, softcap, clips),
        matmul_dtype=matmul_dtype,
        chunk_size=chunk_size or default_chunk_size(len(labels), len(head_weight), hidden.device),
        chunk_loss=_choose(backend, hidden.device),
        needs_gradient=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs],
        may_round=_may_round(hidden),
    )
    loss, *losses = _FusedLoss.apply(*inputs, step)  # type: ignore[no-untyped-call]
    means = torch.stack(losses).sum(-1) / max(1, len(labels))
    by_row = means.new_zeros(len(losses), row_count)
    by_row[:, rows] = torch.stack(losses)
    return DistillationLoss(loss, *means[:2], *by_row)


def default_chunk_size(rows: int, vocab_size: int, device: torch.device) -> int:
    """Return the rows of a chunk: an eighth of all, while their float32 logits take 1 GiB or less.

    Each chunk reads the head twice, and reads and writes its gradient once. A GPU needs thousands of rows to
    hide that, a CPU a hundred; more rows overflow its cache, so there the limit is 64 MiB.
    """
    limit = 2**26 if device.type == "cpu" else 2**30
    return max(64, min(rows // 8, limit // (4 * vocab_size)))


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype


def _may_round(hidden: Tensor) -> bool:
    is_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    is_float32 = hidden.device.type == "cpu" and hidden.dtype != torch.float64
    return is_bf16 and is_float32 and torch.cpu._is_avx512_bf16_supported()


@contextmanager
def _rounding_allowed(enabled: bool) -> Iterator[None]:
    """Let oneDNN round the factors of the block's float32 matmuls to bfloat16; sums stay float32.

    Whether it rounds depends on the CPU. Where it does not, it is still twice as fast as MKL on an AMD CPU.
    """
    if not enabled:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _choose(backend: Backend, device: torch.device) -> ChunkLoss:
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and find_spec("triton")):
        from ddk_train.loss import triton

        return triton.chunk_loss
    return chunk_loss


class _Step(NamedTuple):
    """The arguments of a call without gradients."""

    columns: TargetColumns
    objective: Objective
    matmul_dtype: torch.dtype
    chunk_size: int
    chunk_loss: ChunkLoss
    needs_gradient: list[bool]  # of hidden, head_weight, head_bias
    may_round: bool  # to bfloat16, on a CPU


def _run(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, step: _Step
) -> tuple[RowLosses, list[Tensor | None]]:
    """Return the losses of the rows [n], and the gradients of their weighted sum (None if not needed)."""
    hidden, weight = hidden.to(step.matmul_dtype), head_weight.to(step.matmul_dtype)
    losses = step.columns.logprobs.new_empty(len(RowLosses._fields), len(hidden))
    logits = losses.new_empty(min(step.chunk_size, len(hidden)), len(weight))
    gradient = logits if logits.dtype == hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
    need_hidden, need_weight, need_bias = step.needs_gradient
    hidden_gradient = losses.new_empty(hidden.shape) if need_hidden else None
    weight_gradient = losses.new_zeros(weight.shape) if need_weight else None
    bias_gradient = losses.new_zeros(len(weight)) if need_bias else None

    for start in range(0, len(hidden), step.chunk_size):
        rows = slice(start, start + step.chunk_size)
        inputs = hidden[rows]
        chunk, chunk_gradient = logits[: len(inputs)], gradient[: len(inputs)]
        _matmul(inputs, weight.t(), chunk)
        if head_bias is not None:
            chunk += head_bias
        chunk_losses = step.chunk_loss(
            chunk,
            TargetColumns(*(field[rows] for field in step.columns)),
            step.objective,
            chunk_gradient if any(step.needs_gradient) else None,
        )
        torch.stack(chunk_losses, out=losses[:, rows])
        if hidden_gradient is not None:
            _matmul(chunk_gradient, weight, hidden_gradient[rows])
        if weight_gradient is not None:
            _matmul(chunk_gradient.t(), inputs, weight_gradient, beta=1)
        if bias_gradient is not None:
            bias_gradient += chunk_gradient.sum(0, dtype=losses.dtype)
    return RowLosses(*losses), [hidden_gradient, weight_gradient, bias_gradient]


def _matmul(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> None:
    """Set out = beta * out + a @ b; half-precision factors (on a GPU) are summed in float32.

    Autocast does not change calls with ``out``.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)


class _FusedLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass; the first backward pass takes them over.

    A second backward pass through the same graph (``retain_graph=True``) computes them again: keeping a copy
    would double the largest tensor of the step.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, step: _Step
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, head_weight, head_bias)
        ctx.step = step
        ctx.count = max(1, len(hidden))
        with _rounding_allowed(step.may_round):
            losses, ctx.gradients = _run(hidden, head_weight, head_bias, step)
        ctx.mark_non_differentiable(*losses)
        columns = step.columns
        of_label = columns.cross_entropy_weight + columns.policy_factor(-losses.cross_entropy, step.objective)
        weighted = of_label * losses.cross_entropy + columns.gamma * losses.divergence
        return weighted.sum() / ctx.count, *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, head_bias = ctx.saved_tensors
        gradients = ctx.gradients
        if gradients is None:
            with _rounding_allowed(ctx.step.may_round):
                gradients = _run(hidden, head_weight, head_bias, ctx.step)[1]
        ctx.gradients = None
        scale = incoming[0] / ctx.count
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, head_weight, head_bias), strict=True)
        ]
        return *scaled, None
