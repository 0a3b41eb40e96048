"""The same on a GPU: one Triton kernel turns a chunk of logits into losses and, in place, their gradient."""

# A kernel has no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from ddk_train.loss_chunk import LEAST_LOGPROB, Columns, Divergence, Objective, RowLosses

# Logits a program reads at once: 16 float32 a thread at 16 warps.
BLOCK = 8192
WARPS = 16


KINDS: dict[Divergence, int] = {"forward": 0, "reverse": 1, "jensen_shannon": 2}


def chunk_loss(logits: Tensor, columns: Columns, objective: Objective, gradient: Tensor | None) -> RowLosses:
    """As ``loss_chunk.chunk_loss``; every tensor is contiguous."""
    rows, vocab_size = logits.shape
    width = columns.ids.shape[1]
    found = RowLosses(*logits.new_empty(len(RowLosses._fields), rows))
    row_loss[(rows,)](
        logits,
        logits if gradient is None else gradient,
        *columns,
        *found,
        vocab_size,
        width,
        1 / objective.temperature,
        objective.softcap or 1.0,
        objective.beta,
        SOFTEN=objective.temperature != 1,
        CAPPED=objective.softcap is not None,
        DIVERGENCE=KINDS[objective.divergence],
        GRADIENT=gradient is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
        WIDTH=triton.next_power_of_2(width),
        num_warps=WARPS,
    )
    return found


LOWEST = tl.constexpr(-1e30)  # as good as -inf, without its NaNs
LEAST = tl.constexpr(LEAST_LOGPROB)


@triton.jit
def _softmax(own, gap, rest_sum):
    """``loss_chunk._softmax``, given the sum; the sum is at least 1, or 0 where there is no rest."""
    log_rest = tl.log(tl.maximum(rest_sum, 1)) + gap
    log_total = tl.log(tl.exp(log_rest) + tl.sum(tl.exp(own), 0))
    return own - log_total, log_rest - log_total, 1 / tl.maximum(rest_sum, 1)


@triton.jit
def _capped(logits, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(logits / softcap); -inf, which marks what is no logit, stays."""
    if CAPPED:
        tanh = 1 - 2 / (1 + tl.exp(2 / softcap * logits))
        logits = tl.where(logits > LOWEST, softcap * tanh, logits)
    return logits


@triton.jit
def _slope(capped, softcap, CAPPED: tl.constexpr):
    """The derivative of ``_capped``, of its result."""
    slope = 1.0
    if CAPPED:
        tanh = tl.maximum(capped, -softcap) / softcap  # what is no logit is far below
        slope = 1 - tanh * tanh
    return slope


@triton.jit
def _divergence(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """``loss_chunk.DIVERGENCES``: terms, and minus their gradient by log q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if DIVERGENCE == 0:
        terms, pull = tl.where(p > 0, p * (log_p - log_q), 0), p
    elif DIVERGENCE == 1:
        terms = tl.where(q > 0, q * (log_q - tl.maximum(log_p, LEAST)), 0)
        pull = -(terms + q)
    else:
        ours, theirs = log_q + tl.log(1 - beta), log_p + tl.log(beta)
        larger = tl.maximum(ours, theirs)
        log_middle = larger + tl.log(tl.exp(ours - larger) + tl.exp(theirs - larger))
        pull = -tl.where(q > 0, (1 - beta) * q * (log_q - log_middle), 0)
        terms = tl.where(p > 0, beta * p * (log_p - log_middle), 0) - pull
    return terms, pull


@triton.jit
def row_loss(
    logits,  # [c, V], used up
    gradient,  # [c, V], may be the logits
    ids,  # the seven fields of Columns
    logprobs,
    tail_logprob,
    label_in_tail,
    likeliest,
    cross_entropy_weight,
    gamma,
    cross_entropy,  # [c], the three fields of RowLosses
    kl,
    agrees,
    vocab_size,
    width,  # 1 + E
    sharpness,  # 1 / temperature
    softcap,
    beta,
    SOFTEN: tl.constexpr,  # whether the temperature is not 1
    CAPPED: tl.constexpr,  # whether there is a softcap
    DIVERGENCE: tl.constexpr,  # of KINDS
    GRADIENT: tl.constexpr,  # whether it is wanted
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # width, rounded up to a power of two
):
    """One program a row. The formulas, and why the columns are taken out first, stand in ``loss_chunk``."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    gradient += row * vocab_size

    column = tl.arange(0, WIDTH)
    token = tl.load(ids + row * width + column, mask=column < width, other=0)
    present = (column < width) & ((column == 0) | (token != tl.load(ids + row * width)))
    own_capped = _capped(tl.load(logits + token, mask=present, other=LOWEST), softcap, CAPPED)
    tl.debug_barrier()  # every thread has read its columns' logits before they go,
    tl.store(logits + token, -float("inf"), mask=present)
    tl.debug_barrier()  # and sees them gone when it reads the rest

    rest_top = tl.max(own_capped, 0) * 0 + LOWEST
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

    top = tl.maximum(rest_top, tl.max(own_capped, 0))
    own = own_capped - top
    best = tl.load(likeliest + row * width + column, mask=present, other=0) != 0
    tl.store(agrees + row, tl.max(tl.where(best & (own == 0), 1.0, 0.0), 0))
    gap = rest_top - top
    hard_log_q, hard_log_q_rest, hard_scale = _softmax(own, gap, hard_sum)
    log_q, log_q_rest, scale = hard_log_q, hard_log_q_rest, hard_scale
    if SOFTEN:
        log_q, log_q_rest, scale = _softmax(own * sharpness, gap * sharpness, soft_sum)

    in_tail = (column == 0) & (tl.load(label_in_tail + row) != 0)
    log_q_label = tl.max(tl.where(in_tail, log_q, LOWEST), 0)
    larger = tl.maximum(log_q_rest, log_q_label)
    log_q_tail = larger + tl.log(tl.exp(log_q_rest - larger) + tl.exp(log_q_label - larger))
    log_q_tail = tl.maximum(log_q_tail, LOWEST)
    # Entries that are the whole vocabulary leave no outcome for the teacher's tail: it has no term.
    tail_exists = (hard_sum > 0) | (tl.load(label_in_tail + row) != 0)
    log_p_tail = tl.where(tail_exists, tl.maximum(tl.load(tail_logprob + row), LOWEST), LOWEST)
    log_p = tl.load(logprobs + row * width + column, mask=present, other=LOWEST)
    log_p = tl.maximum(log_p, LOWEST)
    # A row that has no teacher has no divergence.
    has_teacher = tl.maximum(tl.max(log_p, 0), log_p_tail) > LOWEST
    log_q_own = tl.where(has_teacher, tl.where(in_tail, LOWEST, log_q), LOWEST)
    terms, pull = _divergence(log_p, log_q_own, beta, DIVERGENCE)
    log_q_bucket = tl.where(has_teacher, tl.where(tail_exists, log_q_tail, LOWEST), LOWEST)
    term_tail, pull_tail = _divergence(log_p_tail, log_q_bucket, beta, DIVERGENCE)
    tl.store(kl + row, tl.sum(terms, 0) + term_tail)
    tl.store(cross_entropy + row, -tl.sum(tl.where(column == 0, hard_log_q, 0), 0))

    if GRADIENT:
        of_hard = tl.load(cross_entropy_weight + row)
        of_soft = tl.load(gamma + row) * sharpness
        total = tl.sum(pull, 0) + pull_tail
        of_label = tl.where(in_tail, pull_tail * tl.exp(log_q_label - log_q_tail), 0)
        own_pull = total * tl.exp(log_q) - pull - of_label
        own_gradient = of_hard * (tl.exp(hard_log_q) - tl.where(column == 0, 1, 0)) + of_soft * own_pull
        own_gradient *= _slope(own_capped, softcap, CAPPED)
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
        tl.store(gradient + token, own_gradient, mask=present)
