"""The student's loss: head, cross-entropy and sparse KL in one, never holding [M, V] logits.

One chunk of rows at a time: logits, loss terms, gradient in the logits' place, and from it the gradients of
hidden and head. They are made in the forward pass, by three matmuls; backward only scales them. (Chunking
after the logits exist saves nothing: autograd keeps every chunk.)
"""

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddk_train.loss_chunk import ChunkLoss, Columns, Tail, chunk_loss, target_columns

IGNORED = -100  # the label of a row that counts for nothing, as in torch.nn.functional.cross_entropy

Backend = Literal["auto", "torch", "triton"]


class DistillationLoss(NamedTuple):
    """Means over the labelled rows, in nats; only ``loss`` (cross_entropy + gamma * kl) has a gradient."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor


def reference_loss(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    logprobs: Tensor | None,
    tail_logprob: Tensor | None,
    *,
    gamma: float,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> DistillationLoss:
    """What ``distillation_loss`` computes, written plainly on full logits [M, V]: the oracle of the tests.

    The other arguments are those of ``distillation_loss``. Gradients come from autograd.
    """
    rows = labels != IGNORED
    count = rows.sum().clamp(min=1)
    logits, labels = logits[rows], labels[rows]
    cross_entropy = -logits.log_softmax(-1).gather(-1, labels[:, None]).sum() / count
    if gamma == 0:
        return DistillationLoss(cross_entropy, cross_entropy.detach(), torch.zeros_like(cross_entropy))
    ids, entries, rest = _given(ids, logprobs, tail_logprob)
    ids, entries, rest = ids[rows].long(), entries[rows].to(logits).exp(), rest[rows].to(logits).exp()

    log_q = (logits / temperature).log_softmax(-1)
    # One column more than the vocabulary has, for the absent entries (-1) to fall into.
    where = torch.where(ids >= 0, ids, logits.shape[-1])
    wide = logits.new_zeros(len(logits), logits.shape[-1] + 1)
    p = wide.scatter(-1, where, entries)[:, :-1]
    inside = wide.scatter(-1, where, 1.0)[:, :-1].bool()
    if tail == "label":
        p = p.scatter_add(-1, labels[:, None], rest[:, None])
    if tail == "drop":
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    kl = (torch.xlogy(p, p) - torch.where(p > 0, p * log_q, 0)).sum()
    if tail == "bucket":
        # Entries that are the whole vocabulary leave no outcome for the rest: it has no term.
        partial = ~inside.all(-1)
        rest = rest * partial
        log_q_tail = log_q.masked_fill(inside & partial[:, None], -torch.inf).logsumexp(-1)
        kl = kl + (torch.xlogy(rest, rest) - rest * log_q_tail).sum()
    kl = kl / count
    return DistillationLoss(cross_entropy + gamma * kl, cross_entropy.detach(), kl.detach())


def distillation_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    logprobs: Tensor | None,
    tail_logprob: Tensor | None,
    *,
    gamma: float,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    head_bias: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> DistillationLoss:
    """Cross-entropy + gamma * KL(teacher ‖ student), both softened at T (DDK, arXiv 2407.16154, equation 3).

    hidden [M, H], head_weight [V, H], head_bias [V]; labels int64 [M], -100 where a row counts for nothing.
    The teacher, already softened at ``temperature``: ids [M, E] (-1 absent), logprobs [M, E] and tail_logprob
    [M] in nats (-inf: no mass). With gamma = 0 the three are not touched and may be None; kl is then 0.

    ``tail`` says what becomes of the teacher's mass outside its entries: "bucket" compares it with the
    student's mass there, as one outcome; "label" gives it to the label; "drop" renormalises the entries.

    Matmuls run in autocast's dtype where autocast is on, else in hidden's, and the head is cast to it; but a
    CPU multiplies half precision in float32, which is faster there, and exact. Logits, losses and the sums
    that become gradients are float32 whatever the matmuls run in (float64 for a float64 hidden).

    ``chunk_size``: the rows whose logits exist at once; default as in ``default_chunk_size``. ``backend``:
    "auto" takes Triton for CUDA tensors. Inputs that need no gradient cost no matmul for it. A tied head is
    the embedding's weight. A sharded head must be handed over whole (a DTensor's ``full_tensor()``).

    Raises ValueError where gamma is not 0 and there is no teacher.
    """
    rows = (labels != IGNORED).nonzero().squeeze(-1)
    hidden, labels = hidden.index_select(0, rows), labels[rows]
    matmul_dtype = _matmul_dtype(hidden)
    dtype = torch.promote_types(matmul_dtype, torch.float32)
    if gamma == 0:
        temperature = 1.0
        absent = torch.full_like(labels, -1)[:, None]
        nothing = torch.full_like(absent, -torch.inf, dtype=dtype)
        columns = target_columns(labels, absent, nothing, nothing[:, 0], tail)
    else:
        ids, logprobs, tail_logprob = _given(ids, logprobs, tail_logprob)
        entries, rest = logprobs[rows].to(dtype), tail_logprob[rows].to(dtype)
        columns = target_columns(labels, ids[rows].long(), entries, rest, tail)
    inputs = (hidden, head_weight, head_bias)
    step = _Step(
        columns=columns,
        gamma=gamma,
        temperature=temperature,
        matmul_dtype=matmul_dtype,
        chunk_size=chunk_size or default_chunk_size(len(rows), len(head_weight), hidden.device),
        chunk_loss=_choose(backend, hidden.device),
        needs_gradient=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs],
    )
    return DistillationLoss(*_FusedLoss.apply(*inputs, step))  # type: ignore[no-untyped-call]


def default_chunk_size(rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows of logits to hold at once: an eighth of all, while their float32 logits take 1 GiB or less.

    Each chunk reads the head twice and its gradient once, and writes that; a GPU needs thousands of rows to
    hide it, a CPU a hundred, and loses its cache to more: there the limit is 64 MiB.
    """
    limit = 2**26 if device.type == "cpu" else 2**30
    return max(64, min(rows // 8, limit // (4 * vocab_size)))


def _given(*teacher: Tensor | None) -> list[Tensor]:
    tensors = [tensor for tensor in teacher if tensor is not None]
    if len(tensors) < len(teacher):
        raise ValueError("gamma is not 0: ids, logprobs and tail_logprob must be given")
    return tensors


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype


def _choose(backend: Backend, device: torch.device) -> ChunkLoss:
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and find_spec("triton")):
        from ddk_train import loss_triton

        return loss_triton.chunk_loss
    return chunk_loss


class _Step(NamedTuple):
    """All of a call but the tensors that get gradients."""

    columns: Columns
    gamma: float
    temperature: float
    matmul_dtype: torch.dtype
    chunk_size: int
    chunk_loss: ChunkLoss
    needs_gradient: list[bool]  # of hidden, head_weight, head_bias


def _run(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, step: _Step
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Cross-entropy and KL, summed over the rows, and the gradients of the sums (None where not needed)."""
    hidden, weight = hidden.to(step.matmul_dtype), head_weight.to(step.matmul_dtype)
    cross_entropy, kl = step.columns.logprobs.new_zeros(2).unbind()
    logits = kl.new_empty(min(step.chunk_size, len(hidden)), len(weight))
    gradient = logits if logits.dtype == hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
    need_hidden, need_weight, need_bias = step.needs_gradient
    hidden_gradient = kl.new_empty(hidden.shape) if need_hidden else None
    weight_gradient = kl.new_zeros(weight.shape) if need_weight else None
    bias_gradient = kl.new_zeros(len(weight)) if need_bias else None

    for start in range(0, len(hidden), step.chunk_size):
        rows = slice(start, start + step.chunk_size)
        inputs = hidden[rows]
        chunk, chunk_gradient = logits[: len(inputs)], gradient[: len(inputs)]
        _matmul(inputs, weight.t(), chunk)
        if head_bias is not None:
            chunk += head_bias
        chunk_cross_entropy, chunk_kl = step.chunk_loss(
            chunk,
            Columns(*(field[rows] for field in step.columns)),
            step.gamma,
            step.temperature,
            chunk_gradient if any(step.needs_gradient) else None,
        )
        cross_entropy += chunk_cross_entropy.sum()
        kl += chunk_kl.sum()
        if hidden_gradient is not None:
            _matmul(chunk_gradient, weight, hidden_gradient[rows])
        if weight_gradient is not None:
            _matmul(chunk_gradient.t(), inputs, weight_gradient, beta=1)
        if bias_gradient is not None:
            bias_gradient += chunk_gradient.sum(0, dtype=kl.dtype)
    return cross_entropy, kl, [hidden_gradient, weight_gradient, bias_gradient]


def _matmul(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> None:
    """out = beta * out + a @ b; half-precision factors (on a GPU) keep the sums' float32.

    Autocast leaves alone what is given its ``out``.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)


class _FusedLoss(torch.autograd.Function):
    """The gradients are made in the forward pass and handed out, unshared, by the first backward.

    Another backward through the same graph (``retain_graph=True``) makes them anew: a copy kept for a case so
    rare would double the largest tensor of the step.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, step: _Step
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(hidden, head_weight, head_bias)
        ctx.step = step
        ctx.count = max(1, len(hidden))
        cross_entropy, kl, ctx.gradients = _run(hidden, head_weight, head_bias, step)
        cross_entropy /= ctx.count
        kl /= ctx.count
        ctx.mark_non_differentiable(cross_entropy, kl)
        return cross_entropy + step.gamma * kl, cross_entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, head_bias = ctx.saved_tensors
        gradients = ctx.gradients or _run(hidden, head_weight, head_bias, ctx.step)[2]
        ctx.gradients = None
        scale = incoming[0] / ctx.count
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, head_weight, head_bias), strict=True)
        ]
        return *scaled, None
