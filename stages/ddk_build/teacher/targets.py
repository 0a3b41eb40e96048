"""Logits -> the sparse targets that are stored, in torch; on a GPU ``triton_targets`` makes the same.

The work is done in blocks of rows: a CPU's caches hold a block, and the float32 copies of a GPU's logits take
bounded memory.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from ddk_cache.format.layout import Target

# Float32 elements of one block: 8 MiB, which a CPU's caches hold, or 256 MiB of a GPU's memory.
CPU_BLOCK = 1 << 21
GPU_BLOCK = 1 << 26
# Columns whose mass is added up before the draws look inside; see systematic_draws.
DRAW_COLUMNS = 64
LOG2_E = 1 / math.log(2)


class SparseTarget(NamedTuple):
    """The targets of R token positions, on the logits' device; on the CPU they become ``Answers``."""

    ids: Tensor  # int32 [R, E], -1 absent, best first
    logprobs: Tensor  # float32 [R, E], nats, of softmax(logits / T); -inf absent
    tail_logprob: Tensor  # float32 [R], nats: log of the mass outside the entries; -inf where none is left
    label_logprob: Tensor  # float32 [R], nats: of the label, at temperature 1


def allocate(positions: int, width: int, device: torch.device) -> tuple[Tensor, SparseTarget]:
    """Return uninitialised targets of ``positions`` token positions, and the int32 memory that they share."""
    entries = positions * width
    memory = torch.empty(2 * (entries + positions), dtype=torch.int32, device=device)
    ids, *floats = torch.tensor_split(memory, (entries, 2 * entries, 2 * entries + positions))
    logprobs, tail, label = (part.view(torch.float32) for part in floats)
    return memory, SparseTarget(ids.view(positions, width), logprobs.view(positions, width), tail, label)


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Return how many rows of float32 logits one block has."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // vocab_size)


def sparse_target(
    logits: Tensor, labels: Tensor, target: Target | None, offsets: Tensor | None = None
) -> SparseTarget:
    """Keep the entries of each row that ``target`` asks for; ``None`` keeps the labels alone (E = 0).

    topk: the ``top_k`` largest logits; of these the shortest prefix whose mass reaches ``top_p``.
    The order is exact and the same everywhere: logit descending, equal logits by id ascending. The tail is
    the sum of the other exponentials, not 1 - sum, so small tails keep their precision.

    sampled: ``samples`` systematic draws (see :func:`systematic_draws`); entries sum to 1, no tail.

    Shapes
    ------
    logits [R, V], any float type; they are not changed. labels [R] int64. offsets [R] float64 in [0, 1), the
    sampling offsets for a sampled target. E is ``target.width``; a smaller vocabulary leaves entries absent.
    """
    rows, vocab = logits.shape
    width = target.width if target else 0
    device = logits.device
    if device.type == "cuda" and find_spec("triton"):
        from ddk_build.teacher import triton_targets

        with torch.cuda.device(device):  # Triton launches on the current device
            return triton_targets.sparse_target(logits, labels, target, offsets)
    out = SparseTarget(
        torch.full((rows, width), -1, dtype=torch.int32, device=device),
        torch.full((rows, width), -math.inf, device=device),
        torch.empty(rows, device=device),
        torch.empty(rows, device=device),
    )
    step = block_rows(vocab, device)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        block_logits = logits[block]
        # Columns up to a multiple of every block of _largest
        z = _scratch.block(len(block_logits), vocab + -vocab % DRAW_COLUMNS, device)
        z[:, :vocab] = block_logits
        z[:, vocab:] = -math.inf
        part = _block_target(z, labels[block], target, None if offsets is None else offsets[block])
        present = part.ids.shape[1]
        out.ids[block, :present], out.logprobs[block, :present] = part.ids, part.logprobs
        out.tail_logprob[block], out.label_logprob[block] = part.tail_logprob, part.label_logprob
    return out


class _Scratch(local):
    """A thread's memory for its blocks: on a CPU, new pages cost more than the work on them."""

    memory = torch.empty(0)

    def block(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return uninitialised float32 [rows, columns]."""
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=torch.float32, device=device)
        if len(self.memory) < rows * columns:
            with torch.inference_mode(False):  # usable in and outside of that mode
                self.memory = torch.empty(rows * columns, dtype=torch.float32)
        return self.memory[: rows * columns].view(rows, columns)


_scratch = _Scratch()


def _block_target(z: Tensor, labels: Tensor, target: Target | None, offsets: Tensor | None) -> SparseTarget:
    """Make one block's targets from its logits z [r, V'] float32, which are overwritten."""
    temperature = target.temperature if target else 1.0
    top_logits = top_ids = None
    if target is not None and target.kind == "topk":
        top_logits, top_ids = _largest(z, target.top_k)
    peak = z.amax(-1, keepdim=True) if top_logits is None else top_logits[:, :1]
    label_logit = z.gather(1, labels[:, None]) - peak
    label_log_total = None
    if temperature != 1.0:
        label_log_total = _exponentials(z, peak, 1.0, torch.empty_like(z)).sum(-1, keepdim=True).log()
    mass = _exponentials(z, peak, temperature, out=z)
    if target is not None and top_logits is not None and top_ids is not None:
        top_mass = mass.gather(1, top_ids)
        rest = mass.scatter_(1, top_ids, 0.0).sum(-1, keepdim=True)
        ids, logprobs, tail, log_total = top_entries(top_ids, top_logits - peak, top_mass, rest, target)
    else:
        log_total = mass.sum(-1, keepdim=True).log()
        tail = torch.full_like(log_total, -math.inf)
        ids, logprobs = labels.new_empty(len(z), 0), mass[:, :0]
        if target is not None:
            assert offsets is not None, "a sampled target needs an offset for each position"
            blocks = mass.view(len(mass), -1, DRAW_COLUMNS)
            rows = torch.arange(len(mass), device=mass.device)[:, None]
            ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
            ids, logprobs = systematic_draws(ends, lambda block: blocks[rows, block], offsets, target.samples)
    label_logprob = label_logit - (log_total if label_log_total is None else label_log_total)
    return SparseTarget(ids, logprobs, tail[:, 0], label_logprob[:, 0])


def top_entries(
    ids: Tensor, logits: Tensor, mass: Tensor, rest: Tensor, target: Target
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise the top entries, and cut them to the nucleus.

    ``logits`` are less the row's largest, and ``mass`` their exponentials [r, k]; ``rest`` [r, 1] is the sum
    of the others. Return ids and logprobs [r, k]; the tail's log-probability and the log of the total mass,
    [r, 1] each.
    """
    total_top = mass.sum(-1, keepdim=True)
    log_total = (total_top + rest).log()
    logprobs = logits / target.temperature - log_total
    absent = mass == 0
    if target.top_p < 1:
        # An entry stays when the mass before it is below top_p, so the entry that crosses it stays too.
        before = (mass.double() / (total_top + rest)).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        outside = before >= target.top_p
        rest = rest + (mass * outside).sum(-1, keepdim=True)
        absent |= outside
    ids = ids.int().masked_fill_(absent, -1)
    return ids, logprobs.masked_fill_(absent, -math.inf), rest.log() - log_total, log_total


def _exponentials(z: Tensor, peak: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Write exp((z - peak) / temperature) to ``out``. On a CPU exp2 takes half of exp's time."""
    scale = LOG2_E / temperature
    return torch.add(peak * -scale, z, alpha=scale, out=out).exp2_()


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row [r, V'] and their columns int64, [r, k]; exact, ties by column.

    In two stages: a block of columns whose maximum is not among the k largest maxima cannot hold an
    entry, so only k blocks are searched. Both stages compare (value, -column), so this holds for ties too.
    The block size balances the two.
    """
    rows, columns = z.shape
    k = min(k, columns)
    size = min(DRAW_COLUMNS, 1 << round(math.log2(math.sqrt(columns / k))))
    blocks = z.view(rows, -1, size)
    if blocks.shape[1] <= 2 * k:
        best = ordered(z, torch.arange(columns, device=z.device)).topk(k, dim=1).values
    else:
        maxima = blocks.amax(-1)
        order = ordered(maxima, torch.arange(maxima.shape[1], device=z.device))
        chosen = column_of(order.topk(k, dim=1, sorted=False).values)
        within = chosen + torch.arange(rows, device=z.device)[:, None] * blocks.shape[1]
        values = z.view(-1, size).index_select(0, within.flatten())
        ids = chosen[..., None] * size + torch.arange(size, device=z.device)
        best = ordered(values.view(rows, -1), ids.flatten(1)).topk(k, dim=1).values
    ids = column_of(best)
    return z.gather(1, ids), ids


def ordered(values: Tensor, columns: Tensor) -> Tensor:
    """Return int64 keys ordered by (value, -column): the float's bits above, the column below."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long().bitwise_left_shift_(32).sub_(columns)


def column_of(order: Tensor) -> Tensor:
    """Return the columns of keys that ``ordered`` made."""
    return -order & 0xFFFFFFFF


def systematic_draws(
    ends: Tensor, mass_of: Callable[[Tensor], Tensor], offsets: Tensor, draws: int
) -> tuple[Tensor, Tensor]:
    """Draw ``draws`` times from each row of unnormalised mass, at equally spaced points.

    The points (j + U) / n, j = 0..n-1, are looked up in the cumulative distribution in vocabulary order
    (systematic sampling): a token's count is floor(n p) or ceil(n p), and n p in expectation over U. The
    cumulative sums are float64, first over the totals of blocks of columns, then inside the blocks that a
    point falls into: an error of about 1e-16 of the total, at any vocabulary size. A float32 sum over 262,144
    columns would lose tokens below 1e-7.

    Parameters
    ----------
    ends: float64 [r, V' / DRAW_COLUMNS], the cumulative mass of blocks. mass_of: from indices of blocks
    [r, n] to the mass of their columns, float32 [r, n, DRAW_COLUMNS]. offsets: float64 [r], U in [0, 1).

    Returns
    -------
    int64 ids [r, n], each token once, highest count first, equal counts by id; then -1. The logs of their
    shares of the draws [r, n]; then -inf.
    """
    total = ends[:, -1:]
    points = (torch.arange(draws, dtype=torch.float64, device=ends.device) + offsets[:, None]) / draws * total
    # Below the end, also after rounding: the first sum above a point belongs to a token that has mass.
    points = points.minimum(total.nextafter(torch.zeros_like(total)))
    block = torch.searchsorted(ends, points, right=True)
    inside = mass_of(block).double().cumsum(-1)
    last = inside[..., -1]
    point_inside = points - torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    point_inside = point_inside.minimum(last.nextafter(torch.zeros_like(last)))
    drawn = block * DRAW_COLUMNS + (inside <= point_inside[..., None]).sum(-1)

    # The points ascend and so do the tokens: equal tokens are neighbours and share a slot.
    fresh = torch.ones_like(drawn)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = fresh.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, slot, torch.ones_like(drawn))
    ids = torch.full_like(drawn, -1).scatter_(1, slot, drawn)
    order = ((counts << 32) - ids).sort(dim=1, descending=True).indices
    return ids.gather(1, order), (counts.gather(1, order) / draws).log()
