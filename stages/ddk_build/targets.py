"""From logits to the sparse target that is stored; pure torch, the same on CPU and GPU.

The vocabulary is passed over a handful of times, in blocks of rows: near a CPU's caches, and so that the
float32 copies of a GPU's logits take a bounded memory.
"""

import math
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from ddk_cache.layout import Target

# Float32 elements of one block: 8 MiB (what caches hold), or 256 MiB of a GPU's memory.
CPU_BLOCK = 1 << 21
GPU_BLOCK = 1 << 26
# Columns whose mass is added up before the draws look inside; see _systematic_draws.
DRAW_COLUMNS = 64
LOG2_E = 1 / math.log(2)


class SparseTarget(NamedTuple):
    """What is kept of R positions; on the logits' device."""

    ids: Tensor  # int32 [R, E], -1 absent, best first
    logprobs: Tensor  # float32 [R, E], nats, of softmax(logits / T); -inf absent
    tail_logprob: Tensor  # float32 [R], nats: log of the mass outside the entries; -inf where none is left
    label_logprob: Tensor  # float32 [R], nats: of the label, at temperature 1


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows whose float32 logits are worked on at a time."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // vocab_size)


def sparse_target(
    logits: Tensor, labels: Tensor, target: Target | None, offsets: Tensor | None = None
) -> SparseTarget:
    """Keep of each row what ``target`` asks for; ``None`` keeps the labels alone (E = 0).

    topk: the ``top_k`` largest logits, of which the smallest prefix whose mass reaches ``top_p`` stays.
    The order is exact and the same everywhere: logit descending, equal logits by id ascending. The tail is
    the sum of the exponentials that were not kept, not 1 - sum, so small tails keep their precision.

    sampled: ``samples`` systematic draws (see :func:`_systematic_draws`); entries sum to 1, no tail.

    Shapes
    ------
    logits [R, V], any float type; they are not changed. labels [R] int64. offsets [R] float64 in [0, 1),
    for a sampled target. E is ``target.width``; a vocabulary smaller than that leaves entries absent.
    """
    rows, vocab = logits.shape
    width = target.width if target else 0
    device = logits.device
    out = SparseTarget(
        torch.full((rows, width), -1, dtype=torch.int32, device=device),
        torch.full((rows, width), -math.inf, device=device),
        torch.full((rows,), -math.inf, device=device),
        torch.empty(rows, device=device),
    )
    step = block_rows(vocab, device)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        given = logits[here]
        # Columns up to a multiple of every block of _largest
        z = _scratch.block(len(given), vocab + -vocab % DRAW_COLUMNS, device)
        z[:, :vocab] = given
        z[:, vocab:] = -math.inf
        _keep(z, labels[here], target, offsets[here] if offsets is not None else None, here, out)
    return out


class _Scratch(local):
    """A thread's own memory for its blocks: on a CPU, new pages cost more than what is done in them."""

    memory = torch.empty(0)

    def block(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Room for float32 [rows, columns], with anything in it."""
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=torch.float32, device=device)
        if len(self.memory) < rows * columns:
            with torch.inference_mode(False):  # so that it can be used in and outside of that mode
                self.memory = torch.empty(rows * columns, dtype=torch.float32)
        return self.memory[: rows * columns].view(rows, columns)


_scratch = _Scratch()


def _keep(
    z: Tensor, labels: Tensor, target: Target | None, offsets: Tensor | None, here: slice, out: SparseTarget
) -> None:
    """Write one block's part of ``out`` from its logits z [r, V'] float32, which are used up."""
    if target is not None and target.kind == "topk":
        top_logits, top_ids = _largest(z, target.top_k)
        peak = top_logits[:, :1]
    else:
        peak = z.amax(-1, keepdim=True)
    label_logits = z.gather(1, labels[:, None])
    temperature = target.temperature if target else 1.0
    if temperature != 1.0:
        log_total = _exponentials(z, peak, 1.0, torch.empty_like(z)).sum(-1, keepdim=True).log()
        out.label_logprob[here] = (label_logits - peak - log_total)[:, 0]
    mass = _exponentials(z, peak, temperature, out=z)
    if target is not None and target.kind == "topk":
        kept = top_logits.shape[1]
        top_mass = mass.gather(1, top_ids)
        total_kept = top_mass.sum(-1, keepdim=True)
        rest = mass.scatter_(1, top_ids, 0.0).sum(-1, keepdim=True)
        log_total = (total_kept + rest).log()
        logprobs = (top_logits - peak) / temperature - log_total
        absent = top_mass == 0
        if target.top_p < 1:
            # An entry stays when the mass before it is short of top_p, so the one that crosses stays too.
            before = (top_mass.double() / (total_kept + rest)).cumsum(-1).roll(1, -1)
            before[:, 0] = 0
            outside = before >= target.top_p
            rest = rest + (top_mass * outside).sum(-1, keepdim=True)
            absent |= outside
        out.ids[here, :kept] = top_ids.int().masked_fill_(absent, -1)
        out.logprobs[here, :kept] = logprobs.masked_fill_(absent, -math.inf)
        out.tail_logprob[here] = (rest.log() - log_total)[:, 0]
    else:
        log_total = mass.sum(-1, keepdim=True).log()
        if target is not None:
            assert offsets is not None, "a sampled target needs an offset for each position"
            out.ids[here], counts = _systematic_draws(mass, offsets, target.samples)
            out.logprobs[here] = (counts / target.samples).log()
    if temperature == 1.0:
        out.label_logprob[here] = (label_logits - peak - log_total)[:, 0]


def _exponentials(z: Tensor, peak: Tensor, temperature: float, out: Tensor) -> Tensor:
    """exp((z - peak) / temperature), as ``out``. exp2 takes half of exp's time on a CPU."""
    scale = LOG2_E / temperature
    return torch.add(peak * -scale, z, alpha=scale, out=out).exp2_()


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [r, V'] with their columns int64, as [r, k]; exact, ties by column.

    In two stages: a block of columns whose maximum is not among the k largest maxima cannot hold an
    entry, so only k blocks are searched. Both stages compare (value, -column), so that the same argument
    holds for ties. The block size balances the two.
    """
    rows, columns = z.shape
    k = min(k, columns)
    size = min(DRAW_COLUMNS, 1 << round(math.log2(math.sqrt(columns / k))))
    blocks = z.view(rows, -1, size)
    if blocks.shape[1] <= 2 * k:
        best = _order(z, torch.arange(columns, device=z.device)).topk(k, dim=1).values
    else:
        maxima = blocks.amax(-1)
        order = _order(maxima, torch.arange(maxima.shape[1], device=z.device))
        chosen = _column(order.topk(k, dim=1, sorted=False).values)
        within = chosen + torch.arange(rows, device=z.device)[:, None] * blocks.shape[1]
        values = z.view(-1, size).index_select(0, within.flatten())
        ids = chosen[..., None] * size + torch.arange(size, device=z.device)
        best = _order(values.view(rows, -1), ids.flatten(1)).topk(k, dim=1).values
    ids = _column(best)
    return z.gather(1, ids), ids


def _order(values: Tensor, columns: Tensor) -> Tensor:
    """One int64 a value whose order is (value, -column): the float's bits above, the column below."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long().bitwise_left_shift_(32).sub_(columns)


def _column(order: Tensor) -> Tensor:
    return -order & 0xFFFFFFFF


def _systematic_draws(mass: Tensor, offsets: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Draw ``draws`` times from each row of unnormalised mass, at equally spaced points.

    The points (j + U) / n, j = 0..n-1, are looked up in the cumulative distribution in vocabulary order
    (systematic sampling): a token's count is floor(n p) or ceil(n p), and n p in expectation over U. The
    cumulative sums are float64, first over the totals of blocks of columns, then inside the blocks that
    were hit: an error of about 1e-16 of the whole, at any vocabulary size, where a float32 sum over
    262,144 columns would lose tokens below 1e-7.

    Parameters
    ----------
    mass: float32 [r, V'], V' a multiple of DRAW_COLUMNS. offsets: float64 [r], U in [0, 1).

    Returns
    -------
    int64 ids [r, n], each token once, most drawn first, equal counts by id; -1 behind the last. Their
    counts int64 [r, n]; 0 behind the last.
    """
    blocks = mass.view(len(mass), -1, DRAW_COLUMNS)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = ends[:, -1:]
    points = (torch.arange(draws, dtype=torch.float64, device=mass.device) + offsets[:, None]) / draws * total
    # Below the end, also after rounding: the first sum above a point belongs to a token that has mass.
    points = points.minimum(total.nextafter(torch.zeros_like(total)))
    block = torch.searchsorted(ends, points, right=True)
    rows = torch.arange(len(mass), device=mass.device)[:, None]
    inside = blocks[rows, block].double().cumsum(-1)
    last = inside[..., -1]
    point_inside = points - torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    point_inside = point_inside.minimum(last.nextafter(torch.zeros_like(last)))
    drawn = block * DRAW_COLUMNS + (inside <= point_inside[..., None]).sum(-1)

    # The points ascend and so do the tokens: equal ones are neighbours and share a slot.
    fresh = torch.ones_like(drawn)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = fresh.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, slot, torch.ones_like(drawn))
    ids = torch.full_like(drawn, -1).scatter_(1, slot, drawn)
    order = ((counts << 32) - ids).sort(dim=1, descending=True).indices
    return ids.gather(1, order), counts.gather(1, order)
