"""``targets.sparse_target`` on a GPU: Triton reads the logits once, in their own type.

For each block of 64 columns the kernel writes its maximum and the sum of its exponentials. All else works on
these [R, V / 64] and on the blocks that can hold an entry or a draw. Entries and their order are those of
``targets``; a draw may differ where it falls on the edge between two tokens, within float32's rounding.
"""

# A kernel has no Python types, and all its values are arguments.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddk_build.teacher.targets import (
    DRAW_COLUMNS,
    LOG2_E,
    SparseTarget,
    column_of,
    ordered,
    systematic_draws,
    top_entries,
)
from ddk_cache.format.layout import Target

BLOCKS = tl.constexpr(64)  # that a program reads at once: 32 logits a thread at 4 warps
COLUMNS, SCALE = tl.constexpr(DRAW_COLUMNS), tl.constexpr(LOG2_E)


def sparse_target(
    logits: Tensor, labels: Tensor, target: Target | None, offsets: Tensor | None = None
) -> SparseTarget:
    """Compute ``targets.sparse_target``; the columns of a row of logits are contiguous."""
    temperature = target.temperature if target else 1.0
    maxima, sums, sums_at_1 = block_statistics(logits, temperature)
    peak = maxima.amax(-1, keepdim=True)
    mass = sums * _exponentials(maxima, peak, temperature)
    total = mass.sum(-1, keepdim=True)
    label_total = total
    if temperature != 1.0:
        label_total = (sums_at_1 * _exponentials(maxima, peak, 1.0)).sum(-1, keepdim=True)
    label_logprob = (logits.gather(1, labels[:, None]).float() - peak - label_total.log())[:, 0]
    tail = torch.full_like(label_logprob, -math.inf)
    if target is None:
        return SparseTarget(labels.new_empty(len(labels), 0).int(), mass[:, :0], tail, label_logprob)

    def block_logits(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of blocks [R, n], int64, and their logits, float32: [R, n, 64] each."""
        columns = blocks[..., None] * DRAW_COLUMNS + torch.arange(DRAW_COLUMNS, device=blocks.device)
        flat = columns.flatten(1)
        values = logits.gather(1, flat.clamp_max(logits.shape[1] - 1)).float()
        return columns, values.masked_fill_(flat >= logits.shape[1], -math.inf).view(columns.shape)

    if target.kind == "sampled":
        assert offsets is not None, "a sampled target needs an offset for each position"

        def block_mass(blocks: Tensor) -> Tensor:
            return _exponentials(block_logits(blocks)[1], peak[..., None], temperature)

        ids, logprobs = systematic_draws(mass.double().cumsum(-1), block_mass, offsets, target.samples)
        return SparseTarget(ids.int(), logprobs, tail, label_logprob)

    entries = min(target.top_k, logits.shape[1])
    # As in targets._largest: a block whose maximum is not among the k largest holds no entry.
    order = ordered(maxima, torch.arange(maxima.shape[1], device=maxima.device))
    chosen = column_of(order.topk(min(entries, maxima.shape[1]), dim=1, sorted=False).values)
    columns, values = (part.flatten(1) for part in block_logits(chosen))
    best = ordered(values, columns).topk(entries, dim=1)
    others = _exponentials(values, peak, temperature)
    top_mass = others.gather(1, best.indices)
    # The exponentials of chosen blocks that are no entries, and all other blocks.
    rest = others.scatter_(1, best.indices, 0.0).sum(-1, keepdim=True)
    rest += mass.scatter(1, chosen, 0.0).sum(-1, keepdim=True)
    top_logits = values.gather(1, best.indices) - peak
    ids, logprobs, log_tail, _ = top_entries(column_of(best.values), top_logits, top_mass, rest, target)
    absent = (0, target.top_k - entries)
    return SparseTarget(
        torch.nn.functional.pad(ids, absent, value=-1),
        torch.nn.functional.pad(logprobs, absent, value=-math.inf),
        log_tail[:, 0],
        label_logprob,
    )


def _exponentials(values: Tensor, peak: Tensor, temperature: float) -> Tensor:
    return torch.exp2((values - peak) * (LOG2_E / temperature))


def block_statistics(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each block of columns the maximum and two sums, float32 [R, blocks] each.

    The sums are of exponentials relative to the maximum: at the temperature, and at 1.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    count = triton.cdiv(vocab, DRAW_COLUMNS)
    statistics = torch.empty(3, rows, count, device=logits.device)
    grid = rows, triton.cdiv(count, BLOCKS.value)
    write_statistics[grid](logits, logits.stride(0), statistics, vocab, temperature, num_warps=4)
    maxima, sums, sums_at_1 = statistics
    return maxima, sums, sums_at_1


@triton.jit
def write_statistics(logits, stride, statistics, vocab, temperature):
    """Write the statistics [3, R, blocks] of BLOCKS blocks of one row; the third only if needed."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    maximum = tl.max(values, 1)
    below = values - tl.where(maximum == float("-inf"), 0.0, maximum)[:, None]
    count = tl.cdiv(vocab, COLUMNS)
    plane = tl.num_programs(0).to(tl.int64) * count
    out = statistics + row * count + block
    tl.store(out, maximum, mask=block < count)
    tl.store(out + plane, tl.sum(tl.exp2(below * (SCALE / temperature)), 1), mask=block < count)
    if temperature != 1.0:
        tl.store(out + 2 * plane, tl.sum(tl.exp2(below * SCALE), 1), mask=block < count)
