"""What the loss is made of, by row and by choice, against the oracle and against plain torch."""

from typing import Any

import pytest
import torch
from helpers.losses import (
    BACKEND,
    ROWS,
    TEMPERATURES,
    assert_equal_to_oracle,
    error,
    fused,
    gradients,
    make_student,
    make_target,
    target_of,
    top_entries,
)
from torch import Tensor
from torch.autograd import gradcheck

from ddk_train.loss.fused import distillation_loss, reference_loss
from ddk_train.loss.policy import UNKNOWN, Policy, policy_terms

DIVERGENCES: Any = pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])


def make_weights(rows: int = ROWS) -> dict[str, Tensor]:
    """Of each row one for the KL and one for cross-entropy; some of each are 0."""
    torch.manual_seed(4)
    gamma, weight = torch.rand(2, rows, dtype=torch.float64).unbind()
    return {"gamma": gamma * (gamma > 0.3), "cross_entropy_weight": weight * (weight > 0.3)}


@DIVERGENCES
@TEMPERATURES
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_row_has_its_weights(divergence: Any, temperature: float, softcap: float | None) -> None:
    settings = {"divergence": divergence, "temperature": temperature, "softcap": softcap, "beta": 0.3}
    assert_equal_to_oracle(make_student(), *make_target(), torch.float32, 1e-5, **make_weights(), **settings)


@pytest.mark.skipif(BACKEND == "triton", reason="thousands of calls, minutes under the interpreter")
@pytest.mark.parametrize(
    "settings",
    [
        *({"tail": tail, "temperature": t} for tail in ("bucket", "label", "drop") for t in (1.0, 0.5, 2.0)),
        *(
            {"divergence": name, "temperature": 2.0, "softcap": cap}
            for name in ("forward", "reverse", "jensen_shannon")
            for cap in (None, 3.0)
        ),
    ],
)
def test_gradcheck(settings: dict[str, Any]) -> None:
    labels, target = make_target(rows=6, vocab_size=11, entries=3)
    student = [tensor.requires_grad_() for tensor in make_student(rows=6, width=3, vocab_size=11)]

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        weights = make_weights(6)
        return fused(hidden, head, labels, target, chunk_size=4, head_bias=bias, **weights, **settings).loss

    assert gradcheck(loss, student)


def test_equal_weights_are_one_number() -> None:
    labels, target = make_target()
    hidden, head, _ = make_student()
    one = fused(hidden, head, labels, target, gamma=0.3, cross_entropy_weight=0.7)
    rows = {"gamma": torch.full((ROWS,), 0.3), "cross_entropy_weight": torch.full((ROWS,), 0.7)}
    torch.testing.assert_close(fused(hidden, head, labels, target, **rows), one, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.loss, 0.7 * one.cross_entropy + 0.3 * one.kl)


def test_the_means_are_those_of_the_rows() -> None:
    labels, target = make_target()
    hidden, head, _ = make_student()
    result = fused(hidden, head, labels, target, gamma=0.3)
    count = (labels != -100).sum()
    torch.testing.assert_close(result.row_cross_entropy.sum() / count, result.cross_entropy)
    torch.testing.assert_close(result.row_kl.sum() / count, result.kl)
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none")
    torch.testing.assert_close(result.row_cross_entropy, plain)


@pytest.mark.parametrize("tail", ["bucket", "label", "drop"])
def test_student_and_teacher_agree_where_their_likeliest_tokens_are_the_same(tail: Any) -> None:
    """Whatever becomes of the tail, and whether or not the label is an entry."""
    labels, target = make_target(rows=150, vocab_size=9, entries=3)
    target[1][1:4] = -torch.inf  # no teacher there
    hidden, head, bias = make_student(rows=150, vocab_size=9)
    result = fused(hidden, head, labels, target, gamma=1.0, tail=tail, head_bias=bias, softcap=20.0)
    teacher = target[0].gather(-1, target[1].argmax(-1, keepdim=True))[:, 0]
    expected = ((hidden @ head.T + bias).argmax(-1) == teacher) & (labels != -100)
    expected[1:4] = False
    assert 10 < expected.sum() < 75
    assert torch.equal(result.row_agrees, expected.double())


def test_any_of_the_teachers_likeliest_tokens_agrees() -> None:
    """Entries that are alike have no order in a cache."""
    hidden, head = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    target = target_of(*[([0, 1, 2], [0.4, 0.4, 0.2], 0.0)] * 3)
    result = fused(hidden, head, torch.tensor([2, 1, 0]), target, gamma=1.0)
    assert result.row_agrees.tolist() == [1, 1, 0]
    assert (fused(hidden, head, torch.tensor([2, 1, 0]), target, gamma=0).row_agrees == 0).all()


@DIVERGENCES
def test_a_row_without_a_teacher_has_cross_entropy_alone(divergence: Any) -> None:
    """As a domain whose targets are not read stands beside one whose are."""
    labels, (ids, logprobs, tail) = make_target()
    student = make_student()
    unread = torch.arange(ROWS) % 2 == 0
    ids[unread], logprobs[unread], tail[unread] = -1, -torch.inf, -torch.inf
    gamma = torch.where(unread, 0.0, 0.5)
    target = ids, logprobs, tail
    assert_equal_to_oracle(student, labels, target, torch.float32, 1e-5, gamma=gamma, divergence=divergence)
    result = fused(*student[:2], labels, target, gamma=gamma, divergence=divergence)
    assert (result.row_kl[unread] == 0).all()
    assert (result.row_kl[~unread & (labels != -100)] > 0).all()


def test_without_cross_entropy_the_labels_do_not_matter() -> None:
    labels, target = make_target()
    hidden, head, _ = (tensor.requires_grad_() for tensor in make_student())
    others = torch.where(labels == -100, -100, (labels + 1) % 103)
    made = [
        gradients(fused(hidden, head, given, target, gamma=0.3, cross_entropy_weight=0.0).loss, hidden, head)
        for given in (labels, others)
    ]
    for one, other in zip(*made, strict=True):
        assert error(one, other) <= 1e-12


def full_distributions() -> tuple[Tensor, Tensor, Any]:
    """Return a student's logits and a teacher's log-probabilities [5, 12], these as a target too."""
    torch.manual_seed(2)
    logits, log_p = torch.randn(2, 5, 12, dtype=torch.float64).unbind()
    log_p = log_p.log_softmax(-1)
    nothing = torch.full((5,), -torch.inf, dtype=torch.float64)
    return logits, log_p, (torch.arange(12).expand(5, 12), log_p, nothing)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_when_every_token_is_an_entry_the_divergences_are_their_textbook_forms(beta: float) -> None:
    logits, log_p, target = full_distributions()
    log_q = logits.log_softmax(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(log_b, log_a, reduction="batchmean", log_target=True)

    expected = {
        "forward": kl(log_p, log_q),
        "reverse": kl(log_q, log_p),
        "jensen_shannon": beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
    }
    for divergence, value in expected.items():
        settings: Any = {"gamma": 0.5, "divergence": divergence, "beta": beta}
        torch.testing.assert_close(reference_loss(logits, torch.arange(5), *target, **settings).kl, value)
        head = torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(fused(logits, head, torch.arange(5), target, **settings).kl, value)


@DIVERGENCES
@TEMPERATURES
@pytest.mark.parametrize("entries", [1, 7, 103])
def test_a_student_equal_to_the_teacher_has_no_divergence(
    divergence: Any, temperature: float, entries: int
) -> None:
    hidden, head, bias = (tensor.float().requires_grad_() for tensor in make_student())
    target = top_entries(((hidden @ head.T + bias).double() / temperature).log_softmax(-1).detach(), entries)
    if entries == 103:
        target[2].fill_(-torch.inf)
    settings = {"divergence": divergence, "temperature": temperature}
    settings |= {"cross_entropy_weight": 0.0, "head_bias": bias}
    result = fused(hidden, head, torch.arange(ROWS), target, gamma=1.0, **settings)
    assert abs(result.kl.item()) <= 1e-6
    for gradient in gradients(result.loss, hidden, head, bias):
        assert error(gradient, torch.zeros_like(gradient).double()) <= 1e-5


@DIVERGENCES
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    "row",
    [
        ([3, 5], [0.7, 0.3], 0.0),
        ([3, 5], [0.7, 0.3], 1e-30),
        ([2, 6], [0.0, 0.8], 0.2),
        ([-1, -1], [0.0, 0.0], 1.0),
        ([0, 1, 2, 3, 4, 5, 6], [0.14] * 7, 0.02),
    ],
)
def test_no_divergence_is_infinite(divergence: Any, scale: float, row: Any) -> None:
    """Where the teacher has no mass and the student has all of it, reverse KL is what e^-20 would give."""
    signs = torch.tensor([[1.0, -1.0, 0.25, -0.5, 0.75, -1.0, 1.0]], dtype=torch.float64)
    student = (torch.ones(1, 1, dtype=torch.float64), scale * signs.T.contiguous())
    settings = {"gamma": 1.0, "divergence": divergence}
    assert_equal_to_oracle(student, torch.tensor([2]), target_of(row), torch.float32, 1e-5, **settings)


def test_a_softcap_is_the_tanh_of_plain_torch() -> None:
    labels, _ = make_target()
    hidden, head, _ = (tensor.requires_grad_() for tensor in make_student())
    result = fused(hidden, head, labels, (None, None, None), gamma=0, softcap=2.0)
    plain = torch.nn.functional.cross_entropy(2 * torch.tanh(hidden @ head.T / 2), labels)
    torch.testing.assert_close(result.loss, plain)
    made, expected = (gradients(loss, hidden, head) for loss in (result.loss, plain))
    for one, other in zip(made, expected, strict=True):
        assert error(one, other) <= 1e-9


def test_a_divergence_without_the_bucket_is_refused() -> None:
    labels, target = make_target()
    hidden, head, _ = make_student()
    with pytest.raises(ValueError, match="reverse: needs tail bucket, not drop"):
        distillation_loss(hidden, head, labels, *target, gamma=1.0, divergence="reverse", tail="drop")


def make_policy(rows: int = ROWS) -> Policy:
    """Return weights, some of them 0, a teacher, and writers near the student, far from it, or unknown."""
    torch.manual_seed(6)
    labels, _ = make_target(rows)
    hidden, head, bias = make_student(rows)
    log_q = (hidden @ head.T + bias).log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    weight, teacher = torch.rand(rows).double(), log_q + 8 * torch.randn(rows).double()
    writer = log_q + torch.randn(rows).double()
    writer[1], writer[2], writer[3] = UNKNOWN, log_q[2] - 5, log_q[3] + 5
    return Policy(weight * (weight > 0.2), teacher, writer, advantage_clip=6.0, importance_clip=4.0)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_policy_gradient_is_the_formula_by_autograd(gamma: float, softcap: float | None) -> None:
    labels, target = make_target()
    hidden, head, bias = (tensor.requires_grad_() for tensor in make_student())
    weight, teacher, writer, limit, bound = policy = make_policy()
    settings: Any = {"gamma": gamma, "softcap": softcap, "head_bias": bias, "cross_entropy_weight": 0.5}
    logits = hidden @ head.T + bias
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    rows = labels != -100
    log_q = logits[rows].log_softmax(-1).gather(-1, labels[rows, None])[:, 0]
    ratio = (log_q.detach() - writer[rows]).exp()
    ratio[writer[rows].isinf()] = 1
    ratio[(ratio < 1 / bound) | (ratio > bound)] = 0
    advantage = (teacher[rows] - log_q.detach()).clamp(-limit, limit)
    expected = fused(hidden, head, labels, target, **settings).loss
    expected = expected - (weight[rows] * ratio * advantage * log_q).mean()
    actual = fused(hidden, head, labels, target, policy=policy, **settings).loss
    torch.testing.assert_close(actual, expected)
    wanted = gradients(expected, hidden, head, bias)
    for one, other in zip(gradients(actual, hidden, head, bias), wanted, strict=True):
        torch.testing.assert_close(one, other)


@DIVERGENCES
def test_a_policy_gradient_goes_with_every_divergence_in_single_precision(divergence: Any) -> None:
    settings = {"gamma": 0.3, "divergence": divergence, "temperature": 2.0, "policy": make_policy()}
    assert_equal_to_oracle(make_student(), *make_target(), torch.float32, 1e-5, **settings)


@pytest.mark.parametrize("is_old", [False, True])
def test_its_mean_over_written_tokens_is_the_gradient_of_reverse_kl(is_old: bool) -> None:
    """Over all 12 tokens, each weighted by the chance that the student, or an older one, writes it."""
    torch.manual_seed(3)
    logits, teacher, older = torch.randn(3, 12, dtype=torch.float64).unbind()
    logits.requires_grad_()
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    log_w = (logits.detach() + older / 2).log_softmax(-1) if is_old else log_q.detach()
    policy = Policy(log_w.exp() * 12, log_p, log_w, advantage_clip=1e3, importance_clip=1e3)
    head = torch.eye(12, dtype=torch.float64)
    nothing: Any = (None, None, None)
    loss = fused(
        logits.expand(12, 12), head, torch.arange(12), nothing, gamma=0, cross_entropy_weight=0, policy=policy
    ).loss
    reverse_kl = (log_q.exp() * (log_q - log_p)).sum()
    torch.testing.assert_close(gradients(loss, logits), gradients(reverse_kl, logits))


def test_tokens_outside_the_importance_bounds_are_left_out() -> None:
    log_q = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    writer = torch.tensor([-1.0, -4.0, 2.0 - 1e-3, UNKNOWN])
    advantage, _, is_kept = policy_terms(
        log_q, Policy(torch.ones(4), torch.tensor([-30.0, 0.0, 0.0, 0.0]), writer)
    )
    assert is_kept.tolist() == [True, False, False, True]
    torch.testing.assert_close(advantage, torch.tensor([-20.0, 1.0, 1.0, 1.0]))


def test_an_importance_past_all_bounds_leaves_the_means_finite() -> None:
    """An infinite one would make those of all domains NaN: they are sums of its product with 0."""
    one = torch.ones(2)
    _, importance, is_kept = policy_terms(-one, Policy(one, -one, torch.tensor([-200.0, -torch.inf])))
    assert importance.square().isfinite().all()
    assert not is_kept.any()
