"""Sparse targets against float64 oracles, and the statistics of systematic draws.

test_triton_targets.py runs them again on Triton's path, under its interpreter.
"""

import math
import os

import pytest
import torch
from torch import Tensor

from ddk_build.teacher import targets
from ddk_cache.format.layout import Target

if os.environ.get("TRITON_INTERPRET") == "1":
    from ddk_build.teacher.triton_targets import sparse_target
else:
    from ddk_build.teacher.targets import sparse_target


def logits_of(rows: int, vocab: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) * 7 % logits.shape[1]


def sampling_offsets(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(ids: Tensor, logprobs: Tensor, vocab: int) -> Tensor:
    """Entries [R, E] as probabilities [R, V], float64."""
    full = torch.zeros(len(ids), vocab + 1, dtype=torch.float64)
    return full.scatter_(1, ids.long() % (vocab + 1), logprobs.double().exp())[:, :vocab]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("vocab", "top_k"), [(5000, 64), (5000, 1), (130, 64), (40, 40), (4096, 100)])
def test_topk_equals_a_float64_oracle(vocab: int, top_k: int, temperature: float, dtype: torch.dtype) -> None:
    logits = logits_of(70, vocab).to(dtype)
    labels = labels_of(logits)
    result = sparse_target(logits, labels, Target(top_k=top_k, temperature=temperature))

    exact = (logits.double() / temperature).log_softmax(-1)
    # A stable sort of the negative puts equal logits in the order of their ids.
    order = (-logits.double()).sort(stable=True).indices[:, :top_k]
    assert torch.equal(result.ids.long(), order)
    torch.testing.assert_close(result.logprobs.double(), exact.gather(1, order), atol=2e-6, rtol=1e-6)
    rest = exact.exp().scatter(1, order, 0.0).sum(-1).log()
    torch.testing.assert_close(result.tail_logprob.double(), rest, atol=2e-6, rtol=1e-6)
    label = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(result.label_logprob.double(), label, atol=2e-6, rtol=1e-6)


def test_a_small_tail_keeps_its_precision() -> None:
    """1 - sum in float32 would have no digit of these left."""
    logits = torch.full((3, 1000), -40.0)
    logits[:, :4] = 0.0
    logits[0, 10], logits[1, 11], logits[2, 12] = -15.0, -18.0, -25.0
    result = sparse_target(logits, torch.zeros(3, dtype=torch.int64), Target(top_k=4))
    rest = logits.double().log_softmax(-1).exp()[:, 4:].sum(-1).log()
    assert rest.max() < math.log(1e-7)
    torch.testing.assert_close(result.tail_logprob.double(), rest, atol=1e-5, rtol=0)


def test_entries_without_mass_are_absent() -> None:
    """A masked vocabulary, and one that is smaller than the entries asked for."""
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    result = sparse_target(logits, torch.tensor([2]), Target(top_k=6))
    assert result.ids.tolist() == [[2, 0, -1, -1, -1, -1]]
    assert result.logprobs[0, 2:].tolist() == [-math.inf] * 4
    assert result.tail_logprob.tolist() == [-math.inf]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_nucleus_keeps_the_smallest_prefix(top_p: float, temperature: float) -> None:
    logits = logits_of(50, 3000)
    target = Target(top_k=32, top_p=top_p, temperature=temperature)
    result = sparse_target(logits, labels_of(logits), target)
    best = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    reached = best.values.cumsum(-1)[:, :32] >= top_p
    count = torch.where(reached.any(-1), reached.int().argmax(-1) + 1, 32)
    kept = torch.arange(32) < count[:, None]
    assert torch.equal(result.ids.long(), best.indices[:, :32].where(kept, torch.tensor(-1)))
    assert torch.equal(result.logprobs > -math.inf, kept)
    total = result.logprobs.double().exp().sum(-1) + result.tail_logprob.double().exp()
    torch.testing.assert_close(total, torch.ones(50, dtype=torch.float64), atol=1e-6, rtol=0)


def test_labels_alone() -> None:
    logits = logits_of(9, 300)
    labels = labels_of(logits)
    result = sparse_target(logits, labels, None)
    assert result.ids.shape == result.logprobs.shape == (9, 0)
    assert result.tail_logprob.tolist() == [-math.inf] * 9
    label = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(result.label_logprob, label, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("target", [Target(top_p=0.9), Target(kind="sampled"), None], ids=str)
def test_blocks_and_the_input_do_not_matter(monkeypatch: pytest.MonkeyPatch, target: Target | None) -> None:
    logits, before = logits_of(33, 500), logits_of(33, 500)
    labels, offsets = labels_of(logits), sampling_offsets(33)
    whole = sparse_target(logits, labels, target, offsets)
    monkeypatch.setattr(targets, "CPU_BLOCK", 4 * 500)
    blocks = sparse_target(logits, labels, target, offsets)
    assert torch.equal(logits, before)
    assert all(map(torch.equal, whole, blocks))


def test_earlier_content_of_the_scratch_memory_makes_no_difference() -> None:
    logits, target = logits_of(9, 500), Target(top_k=8)
    fresh = sparse_target(logits, labels_of(logits), target)
    with torch.inference_mode():
        sparse_target(logits_of(20, 3000), torch.zeros(20).long(), target)
    again = sparse_target(logits, labels_of(logits), target)
    assert all(map(torch.equal, fresh, again))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("vocab", [200, 3001])
def test_every_count_is_floor_or_ceil(vocab: int, temperature: float) -> None:
    logits = logits_of(400, vocab, scale=2.0)
    target = Target(kind="sampled", samples=24, temperature=temperature)
    result = sparse_target(logits, labels_of(logits), target, sampling_offsets(400))
    expected = 24 * (logits.double() / temperature).softmax(-1)
    counts = 24 * dense(result.ids, result.logprobs, vocab)
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    # float32 exponentials: n p is known to about 1e-5
    assert (counts.round() >= (expected - 1e-5).floor()).all()
    assert (counts.round() <= (expected + 1e-5).ceil()).all()
    torch.testing.assert_close(counts.sum(-1), torch.full((400,), 24.0, dtype=torch.float64))
    assert result.tail_logprob.eq(-math.inf).all()
    label = logits.double().log_softmax(-1).gather(1, labels_of(logits)[:, None])[:, 0]
    torch.testing.assert_close(result.label_logprob.double(), label, atol=2e-6, rtol=1e-6)
    # distinct, most drawn first, absent ones behind
    present = result.ids >= 0
    assert torch.equal(present, result.logprobs > -math.inf)
    assert (result.logprobs[:, :-1] >= result.logprobs[:, 1:]).all()
    assert all(
        len(row.unique()) == len(row) for row in (i[p] for i, p in zip(result.ids, present, strict=True))
    )


def test_draws_follow_the_definition() -> None:
    """Against points looked up one at a time in a float64 cumulative distribution."""
    logits, offsets = logits_of(20, 1000, scale=1.0), sampling_offsets(20)
    result = sparse_target(logits, labels_of(logits), Target(kind="sampled", samples=10), offsets)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    for row in range(20):
        points = (torch.arange(10, dtype=torch.float64) + offsets[row]) / 10
        ids, counts = torch.searchsorted(cumulative[row], points, right=True).unique(return_counts=True)
        assert dict(zip(ids.tolist(), (counts / 10).tolist(), strict=True)) == pytest.approx(
            {
                int(i): math.exp(p)
                for i, p in zip(result.ids[row], result.logprobs[row], strict=True)
                if i >= 0
            }
        )


@pytest.mark.parametrize("offset", [0.0, 1 - 2**-53])
def test_draws_never_take_a_token_without_mass(offset: float) -> None:
    """At both ends of the offset, with masked tokens first, last and between."""
    logits = torch.full((1, 300), -math.inf)
    logits[0, [5, 63, 64, 250]] = torch.tensor([0.0, 1.0, 0.5, -8.0])
    offsets = torch.tensor([offset], dtype=torch.float64)
    result = sparse_target(logits, torch.tensor([5]), Target(kind="sampled", samples=50), offsets)
    assert set(result.ids[result.ids >= 0].tolist()) <= {5, 63, 64, 250}
    assert result.logprobs.exp().sum() == pytest.approx(1)


def test_a_large_flat_vocabulary_is_drawn_evenly() -> None:
    """262,144 tokens of 3.8e-6 each: a float32 cumulative sum would be off by whole tokens at the end."""
    vocab, rows = 262_144, 64
    offsets = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    logits = torch.zeros(1, vocab).expand(rows, vocab)
    result = sparse_target(logits, torch.zeros(rows, dtype=torch.int64), Target(kind="sampled"), offsets)
    points = (torch.arange(24, dtype=torch.float64) + offsets[:, None]) / 24
    assert torch.equal(result.ids.sort(-1).values.long(), (points * vocab).long())


def test_a_large_vocabulary_under_a_tall_token_is_drawn() -> None:
    """Behind a token of nearly all mass, a float32 cumulative sum would not move by 1e-9 at a time."""
    vocab, rows, mass = 262_144, 32, 1e-9
    logits = torch.full((1, vocab), math.log(mass))
    logits[0, 0] = 0.0
    tail = (vocab - 1) * logits[0, 1].double().exp().item()
    # Of the 24 points the last one falls on the tail, here spread all over it.
    inside = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    offsets = 24 * (1 + inside * tail) / (1 + tail) - 23
    labels = torch.zeros(rows, dtype=torch.int64)
    result = sparse_target(logits.expand(rows, -1), labels, Target(kind="sampled"), offsets)
    assert result.ids[:, 0].eq(0).all()
    torch.testing.assert_close(result.logprobs[:, 0].exp(), torch.full((rows,), 23 / 24))
    expected = 1 + (inside * (vocab - 1)).long()
    assert (result.ids[:, 1] - expected).abs().max() <= 1  # float32 exponentials


def draw_many(logits: Tensor, samples: int, seeds: int) -> Tensor:
    """Dense targets [seeds, V] of one row of logits."""
    target = Target(kind="sampled", samples=samples)
    rows = logits.expand(seeds, -1)
    result = sparse_target(
        rows, torch.zeros(seeds, dtype=torch.int64), target, sampling_offsets(seeds, seed=5)
    )
    return dense(result.ids, result.logprobs, logits.shape[-1])


def standard_error(exact: Tensor, samples: int, seeds: int) -> Tensor:
    """Of the mean target: a count is floor(n p), and one more with probability n p - floor(n p)."""
    chance = (samples * exact).frac()
    return (chance * (1 - chance) / seeds).sqrt() / samples


def test_the_mean_target_is_the_distribution() -> None:
    logits = logits_of(1, 300, scale=2.0)
    exact = logits.double().softmax(-1)[0]
    mean = draw_many(logits, samples=12, seeds=4000).mean(0)
    # Five standard errors, and two draws for tokens that are hardly ever drawn
    assert ((mean - exact).abs() <= 5 * standard_error(exact, 12, 4000) + 2 / 12 / 4000).all()


def test_the_mean_gradient_is_the_full_gradient_and_varies_less_than_independent_draws() -> None:
    """KL(target || student) by the student's logits is q - target, entries summing to 1."""
    logits = logits_of(1, 300, scale=2.0)
    student = (logits + logits_of(1, 300, seed=1, scale=0.5)).double().requires_grad_()
    exact = logits.double().softmax(-1)

    def gradient(target: Tensor) -> Tensor:
        kl = torch.xlogy(target, target).sum() - (target * student.log_softmax(-1)).sum()
        return torch.autograd.grad(kl, student)[0][0]

    full = gradient(exact)
    systematic = torch.stack([gradient(drawn[None]) for drawn in draw_many(logits, samples=12, seeds=1500)])
    error = standard_error(exact[0], 12, 1500)
    assert ((systematic.mean(0) - full).abs() <= 5 * error + 2 / 12 / 1500).all()

    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(exact.expand(1500, -1), 12, replacement=True, generator=generator)
    counts = torch.zeros(1500, 300, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full(drawn.shape, 1 / 12, dtype=torch.float64)
    )
    independent = torch.stack([gradient(drawn[None]) for drawn in counts])
    assert systematic.var(0).sum() < 0.6 * independent.var(0).sum()
