"""``chunk.chunk_loss`` on a GPU: a Triton kernel turns a chunk of logits into losses and their gradient."""

# A kernel has no Python types, and all its values are arguments.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from ddk_train.config import Divergence
from ddk_train.loss.chunk import LEAST_LOGPROB, Objective, RowLosses, TargetColumns

BLOCK = 8192  # logits that a program reads at once: 16 float32 a thread at 16 warps
WARPS = 16
KINDS: dict[Divergence, int] = {"forward": 0, "reverse": 1, "jensen_shannon": 2}


def chunk_loss(
    logits: Tensor, columns: TargetColumns, objective: Objective, gradient: Tensor | None
) -> RowLosses:
    """Compute ``chunk.chunk_loss``; every tensor is contiguous."""
    rows, vocab_size = logits.shape
    width = columns.ids.shape[1]
    losses = RowLosses(*logits.new_empty(len(RowLosses._fields), rows))
    row_loss[(rows,)](
        logits,
        logits if gradient is None else gradient,
        *columns,
        *losses,
        vocab_size,
        width,
        1 / objective.temperature,
        objective.softcap or 1.0,
        objective.beta,
        *(objective.policy_clips or (1.0, 1.0)),
        SOFTEN=objective.temperature != 1,
        CAPPED=objective.softcap is not None,
        DIVERGENCE=KINDS[objective.divergence],
        POLICY=objective.policy_clips is not None,
        GRADIENT=gradient is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
        WIDTH=triton.next_power_of_2(width),
        num_warps=WARPS,
    )
    return losses


LOWEST = tl.constexpr(-1e30)  # as good as -inf, without its NaNs
LEAST = tl.constexpr(LEAST_LOGPROB)


@triton.jit
def _softmax(column_logits, gap, rest_sum):
    """Compute ``chunk._softmax`` from the sum, which is at least 1, or 0 for an empty rest."""
    log_rest = tl.log(tl.maximum(rest_sum, 1)) + gap
    log_total = tl.log(tl.exp(log_rest) + tl.sum(tl.exp(column_logits), 0))
    return column_logits - log_total, log_rest - log_total, 1 / tl.maximum(rest_sum, 1)


@triton.jit
def _capped(logits, softcap, CAPPED: tl.constexpr):
    """Compute softcap * tanh(logits / softcap); -inf, which marks a missing logit, stays."""
    if CAPPED:
        tanh = 1 - 2 / (1 + tl.exp(2 / softcap * logits))
        logits = tl.where(logits > LOWEST, softcap * tanh, logits)
    return logits


@triton.jit
def _slope(capped, softcap, CAPPED: tl.constexpr):
    """Compute the derivative of ``_capped`` from its result."""
    slope = 1.0
    if CAPPED:
        tanh = tl.maximum(capped, -softcap) / softcap  # a missing logit is far below
        slope = 1 - tanh * tanh
    return slope


@triton.jit
def _divergence(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """Compute ``chunk.DIVERGENCES``: terms, and minus their gradient by log q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if DIVERGENCE == 0:
        terms, pull = tl.where(p > 0, p * (log_p - log_q), 0), p
    elif DIVERGENCE == 1:
        terms = tl.where(q > 0, q * (log_q - tl.maximum(log_p, LEAST)), 0)
        pull = -(terms + q)
    else:
        log_student, log_teacher = log_q + tl.log(1 - beta), log_p + tl.log(beta)
        larger = tl.maximum(log_student, log_teacher)
        log_middle = larger + tl.log(tl.exp(log_student - larger) + tl.exp(log_teacher - larger))
        pull = -tl.where(q > 0, (1 - beta) * q * (log_q - log_middle), 0)
        terms = tl.where(p > 0, beta * p * (log_p - log_middle), 0) - pull
    return terms, pull


@triton.jit
def row_loss(  # noqa: PLR0913, PLR0915, a kernel takes pointers, and one kernel is one function
    logits,  # [c, V], overwritten
    gradient,  # [c, V], may be the logits
    ids,  # the ten fields of TargetColumns
    logprobs,
    tail_logprob,
    label_in_tail,
    likeliest,
    cross_entropy_weight,
    gamma,
    policy_weight,
    teacher_logprob,
    writer_logprob,
    cross_entropy,  # [c], the three fields of RowLosses
    kl,
    agrees,
    vocab_size,
    width,  # 1 + E
    sharpness,  # 1 / temperature
    softcap,
    beta,
    advantage_clip,
    importance_clip,
    SOFTEN: tl.constexpr,  # whether the temperature is not 1
    CAPPED: tl.constexpr,  # whether a softcap is set
    DIVERGENCE: tl.constexpr,  # of KINDS
    POLICY: tl.constexpr,  # whether there is a policy gradient
    GRADIENT: tl.constexpr,  # whether it is computed
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # width, rounded up to a power of two
):
    """Run one program a row; ``chunk`` has the formulas, and the reason to take the columns out first."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    gradient += row * vocab_size

    column = tl.arange(0, WIDTH)
    token = tl.load(ids + row * width + column, mask=column < width, other=0)
    present = (column < width) & ((column == 0) | (token != tl.load(ids + row * width)))
    column_capped = _capped(tl.load(logits + token, mask=present, other=LOWEST), softcap, CAPPED)
    tl.debug_barrier()  # every thread has read its columns' logits before they are overwritten,
    tl.store(logits + token, -float("inf"), mask=present)
    tl.debug_barrier()  # and sees -inf there when it reads the rest

    rest_top = tl.max(column_capped, 0) * 0 + LOWEST
    hard_sum = rest_top * 0
    soft_sum = rest_top * 0
    for start in range(0, vocab_size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        rest = tl.load(logits + offset, mask=offset < vocab_size, other=-float("inf"))
        rest = _capped(rest, softcap, CAPPED)
        new_top = tl.maximum(rest_top, tl.max(rest, 0))
        hard_sum = hard_sum * tl.exp(rest_top - new_top) + tl.sum(tl.exp(rest - new_top), 0)
        if SOFTEN:
            shrink = tl.exp((rest_top - new_top) * sharpness)
            soft_sum = soft_sum * shrink + tl.sum(tl.exp((rest - new_top) * sharpness), 0)
        rest_top = new_top

    top = tl.maximum(rest_top, tl.max(column_capped, 0))
    column_logits = column_capped - top
    best = tl.load(likeliest + row * width + column, mask=present, other=0) != 0
    tl.store(agrees + row, tl.max(tl.where(best & (column_logits == 0), 1.0, 0.0), 0))
    gap = rest_top - top
    hard_log_q, hard_log_q_rest, hard_scale = _softmax(column_logits, gap, hard_sum)
    log_q, log_q_rest, scale = hard_log_q, hard_log_q_rest, hard_scale
    if SOFTEN:
        log_q, log_q_rest, scale = _softmax(column_logits * sharpness, gap * sharpness, soft_sum)

    in_tail = (column == 0) & (tl.load(label_in_tail + row) != 0)
    log_q_label = tl.max(tl.where(in_tail, log_q, LOWEST), 0)
    larger = tl.maximum(log_q_rest, log_q_label)
    log_q_tail = larger + tl.log(tl.exp(log_q_rest - larger) + tl.exp(log_q_label - larger))
    log_q_tail = tl.maximum(log_q_tail, LOWEST)
    # If the entries are the whole vocabulary, the tail is no outcome and has no term.
    tail_exists = (hard_sum > 0) | (tl.load(label_in_tail + row) != 0)
    log_p_tail = tl.where(tail_exists, tl.maximum(tl.load(tail_logprob + row), LOWEST), LOWEST)
    log_p = tl.load(logprobs + row * width + column, mask=present, other=LOWEST)
    log_p = tl.maximum(log_p, LOWEST)
    # A row without a teacher has no divergence.
    has_teacher = tl.maximum(tl.max(log_p, 0), log_p_tail) > LOWEST
    log_q_entries = tl.where(has_teacher, tl.where(in_tail, LOWEST, log_q), LOWEST)
    terms, pull = _divergence(log_p, log_q_entries, beta, DIVERGENCE)
    log_q_bucket = tl.where(has_teacher, tl.where(tail_exists, log_q_tail, LOWEST), LOWEST)
    term_tail, pull_tail = _divergence(log_p_tail, log_q_bucket, beta, DIVERGENCE)
    tl.store(kl + row, tl.sum(terms, 0) + term_tail)
    log_q_token = tl.sum(tl.where(column == 0, hard_log_q, 0), 0)
    tl.store(cross_entropy + row, -log_q_token)

    if GRADIENT:
        of_hard = tl.load(cross_entropy_weight + row)
        if POLICY:
            advantage = tl.load(teacher_logprob + row) - log_q_token
            advantage = tl.minimum(tl.maximum(advantage, -advantage_clip), advantage_clip)
            writer = tl.load(writer_logprob + row)
            importance = tl.where(writer == float("inf"), 1.0, tl.exp(log_q_token - writer))
            is_kept = (importance * importance_clip >= 1) & (importance <= importance_clip)
            of_hard += tl.where(is_kept, tl.load(policy_weight + row) * importance * advantage, 0.0)
        of_soft = tl.load(gamma + row) * sharpness
        total = tl.sum(pull, 0) + pull_tail
        of_label = tl.where(in_tail, pull_tail * tl.exp(log_q_label - log_q_tail), 0)
        column_pull = total * tl.exp(log_q) - pull - of_label
        column_gradient = of_hard * (tl.exp(hard_log_q) - tl.where(column == 0, 1, 0)) + of_soft * column_pull
        column_gradient *= _slope(column_capped, softcap, CAPPED)
        rest_pull = total * tl.exp(log_q_rest) - pull_tail * tl.exp(log_q_rest - log_q_tail)
        hard_factor = of_hard * tl.exp(hard_log_q_rest) * hard_scale
        soft_factor = of_soft * rest_pull * scale
        for start in range(0, vocab_size, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            capped = tl.load(logits + offset, mask=offset < vocab_size, other=-float("inf"))
            capped = _capped(capped, softcap, CAPPED)
            rest = capped - rest_top
            if SOFTEN:
                slope = hard_factor * tl.exp(rest) + soft_factor * tl.exp(rest * sharpness)
            else:
                slope = (hard_factor + soft_factor) * tl.exp(rest)
            slope *= _slope(capped, softcap, CAPPED)
            tl.store(gradient + offset, slope, mask=offset < vocab_size)
        tl.debug_barrier()  # the columns' zeros are written before their gradients
        tl.store(gradient + token, column_gradient, mask=present)
