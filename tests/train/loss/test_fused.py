"""The fused loss against a float64 oracle. Under TRITON_INTERPRET=1 the same tests run on the Triton path."""

from typing import Any

import pytest
import torch
from helpers.losses import (
    BACKEND,
    ROWS,
    TAILS,
    TEMPERATURES,
    Target,
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
from torch.utils._python_dispatch import TorchDispatchMode

from ddk_train.loss import fused as loss_module
from ddk_train.loss.fused import default_chunk_size, distillation_loss, reference_loss


@TAILS
@TEMPERATURES
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_equal_the_oracle(
    tail: Any, temperature: float, dtype: torch.dtype, bound: float
) -> None:
    settings = {"gamma": 0.3, "temperature": temperature, "tail": tail}
    assert_equal_to_oracle(make_student(), *make_target(), dtype, bound, **settings)


@pytest.mark.parametrize("vocab_size", [8192, 2 * 8192 + 5])
def test_a_vocabulary_of_several_blocks(vocab_size: int) -> None:
    labels, target = make_target(rows=4, vocab_size=vocab_size)
    student = make_student(rows=4, vocab_size=vocab_size)
    assert_equal_to_oracle(student, labels, target, torch.float32, 1e-5, gamma=0.3)


def test_the_oracle_has_the_gradient_of_the_bucket_loss() -> None:
    """On the entries q - p, elsewhere q (1 - p_tail / q_tail)."""
    labels, (ids, logprobs, tail) = make_target()
    logits = torch.randn(ROWS, 103, dtype=torch.float64, requires_grad=True)
    with_kl = reference_loss(logits, labels, ids, logprobs, tail, gamma=1.0).loss
    without = reference_loss(logits, labels, None, None, None, gamma=0).loss
    (gradient,) = gradients(with_kl - without, logits)
    row = 4
    q, entries = logits[row].softmax(-1), ids[row].long()
    q_tail = 1 - q[entries].sum()
    expected = q * (1 - tail[row].exp() / q_tail)
    expected[entries] = q[entries] - logprobs[row].exp()
    torch.testing.assert_close(gradient[row] * (labels != -100).sum(), expected)


def test_a_shifted_target_is_not_the_teacher() -> None:
    hidden, head, _ = (tensor.float() for tensor in make_student())
    target = top_entries((hidden @ head.T).double().log_softmax(-1), 7)
    shifted = tuple(tensor.roll(1, dims=0) for tensor in target)
    assert fused(hidden, head, torch.arange(ROWS), target, gamma=1.0).kl < 1e-5
    assert fused(hidden, head, torch.arange(ROWS), shifted, gamma=1.0).kl > 0.5


EXTREMES: dict[str, tuple[Target, list[int]]] = {
    "mass that rounds to 1": (target_of(([3, 5], [1 - 1e-8, 1e-8], 1e-9)), [3]),
    "mass above 1": (target_of(([3, 5], [0.7, 0.3005], 1e-4)), [5]),
    "a tail of 1e-30": (target_of(([3, 5], [0.7, 0.3], 1e-30)), [3]),
    "a tail of 0.999": (target_of(([3, 5], [0.0006, 0.0004], 0.999)), [2]),
    "no tail, as sampled targets have": (target_of(([3, 5], [0.75, 0.25], 0.0)), [2]),
    "one entry": (target_of(([4], [0.6], 0.4)), [4]),
    "one entry, the label outside": (target_of(([4], [0.6], 0.4)), [0]),
    "all entries absent, all mass in the tail": (target_of(([-1, -1], [0.0, 0.0], 1.0)), [1]),
    "all entries absent, no mass at all": (target_of(([-1, -1], [0.0, 0.0], 0.0)), [1]),
    "an absent entry before a present one": (target_of(([-1, 0], [0.0, 0.8], 0.2)), [0]),
    "an entry without mass": (target_of(([2, 6], [0.0, 0.8], 0.2)), [2]),
    "every token an entry": (
        target_of(([6, 5, 4, 3, 2, 1, 0], [0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05], 0.0)),
        [0],
    ),
    "every token an entry, and a tail": (target_of(([0, 1, 2, 3, 4, 5, 6], [0.14] * 7, 0.02)), [6]),
}


@TAILS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, scale: float, temperature: float, tail: Any) -> None:
    """Finite, and equal to float64, whatever the target and however sure the student."""
    target, labels = EXTREMES[name]
    signs = torch.tensor([[1.0, -1.0, 0.25, -0.5, 0.75, -1.0, 1.0]], dtype=torch.float64)
    head = scale * signs.T.contiguous()
    settings = {"gamma": 0.2, "temperature": temperature, "tail": tail}
    student = (torch.ones(1, 1, dtype=torch.float64), head)
    assert_equal_to_oracle(student, torch.tensor(labels), target, torch.float32, 1e-5, **settings)


def test_a_tiny_student_tail_keeps_its_precision() -> None:
    """The student leaves 5e-13 outside the entries; 1 - sum(q) would be 0 or noise in float32."""
    head = torch.tensor([[30.0], [29.0], [1.0], [0.5]], dtype=torch.float64)
    target = target_of(([0, 1], [0.5, 0.25], 0.25))
    student = (torch.ones(1, 1, dtype=torch.float64), head)
    assert_equal_to_oracle(student, torch.tensor([3]), target, torch.float32, 1e-5, gamma=1.0)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_no_row_and_one_row(rows: int, gamma: float) -> None:
    labels, target = make_target(rows=6)
    hidden, head, _ = (tensor.requires_grad_() for tensor in make_student(rows=6))
    chosen = slice(1, 1 + rows)
    result = fused(hidden[chosen], head, labels[chosen], tuple(x[chosen] for x in target), gamma=gamma)
    for gradient in gradients(result.loss, hidden, head):
        assert torch.isfinite(gradient).all()
        assert (gradient == 0).all() == (rows == 0)
    assert (result.loss == 0) == (rows == 0)


def test_ignored_rows_count_for_nothing() -> None:
    labels, target = make_target()
    hidden, head, _ = (tensor.requires_grad_() for tensor in make_student())
    kept = labels != -100
    hidden.data[~kept] = torch.nan
    result = fused(hidden, head, labels, target, gamma=0.2)
    alone = fused(hidden[kept], head, labels[kept], tuple(x[kept] for x in target), gamma=0.2)
    assert result.loss == alone.loss
    hidden_gradient, _ = gradients(result.loss, hidden, head)
    assert (hidden_gradient[~kept] == 0).all()
    nothing = fused(hidden, head, torch.full_like(labels, -100), target, gamma=0.2)
    assert all((gradient == 0).all() for gradient in gradients(nothing.loss, hidden, head))


def test_without_gamma_the_targets_are_not_touched() -> None:
    labels, (ids, logprobs, tail) = make_target()
    hidden, head, _ = make_student()
    poison = (ids.fill_(10**6), logprobs.fill_(torch.nan), tail.fill_(torch.nan))
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
    for target in (poison, (None, None, None)):
        result = distillation_loss(hidden, head, labels, *target, gamma=0, temperature=2.0, backend=BACKEND)
        torch.testing.assert_close(result.loss, plain)
        assert result.kl == 0
        assert result.loss == result.cross_entropy
    for call in (
        distillation_loss,
        lambda hidden, head, *rest, **gamma: reference_loss(hidden @ head.T, *rest, **gamma),
    ):
        with pytest.raises(ValueError, match="must be given"):
            call(hidden, head, labels, None, None, None, gamma=0.2)


class Operations(TorchDispatchMode):
    """The operations that run inside, each with the number of elements it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.sizes += [(func.__name__, x.numel()) for x in (result,) if isinstance(x, Tensor)]
        return result

    def matmuls(self) -> int:
        return sum("mm" in name for name, _ in self.sizes)


@pytest.mark.parametrize(
    ("hidden_needs", "head_needs", "matmuls"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_what_needs_no_gradient_costs_no_matmul(hidden_needs: bool, head_needs: bool, matmuls: int) -> None:
    rows = 37  # so that all logits are larger than the head
    labels, target = make_target(rows)
    hidden, head, _ = make_student(rows)
    hidden.requires_grad_(hidden_needs)
    head.requires_grad_(head_needs)
    chunks = -(-int((labels != -100).sum()) // 2)
    with Operations() as operations:
        result = fused(hidden, head, labels, target, gamma=0.2, chunk_size=2)
        if hidden_needs or head_needs:
            result.loss.backward()
    assert operations.matmuls() == matmuls * chunks
    assert max(size for _, size in operations.sizes) < rows * 103 / 2
    assert (hidden.grad is not None, head.grad is not None) == (hidden_needs, head_needs)

    with torch.no_grad(), Operations() as operations:
        hidden, head = hidden.requires_grad_(), head.requires_grad_()
        evaluated = fused(hidden, head, labels, target, gamma=0.2, chunk_size=2)
    assert operations.matmuls() == chunks
    assert not evaluated.loss.requires_grad
    assert evaluated.loss == result.loss.detach()


def test_only_the_loss_has_a_gradient_and_it_scales() -> None:
    labels, target = make_target()
    hidden, head, _ = (tensor.requires_grad_() for tensor in make_student())
    result = fused(hidden, head, labels, target, gamma=0.2)
    assert not result.cross_entropy.requires_grad
    assert not result.kl.requires_grad
    torch.testing.assert_close(result.loss.detach(), result.cross_entropy + 0.2 * result.kl)
    once = torch.autograd.grad(result.loss, (hidden, head), retain_graph=True)
    thrice = torch.autograd.grad(3 * result.loss, (hidden, head))
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)
    with pytest.raises(RuntimeError, match="second time"):
        result.loss.backward()


def test_the_head_gradient_is_handed_over_without_a_copy() -> None:
    """It is the step's largest tensor; backward scales it in place and leaves it in .grad."""
    labels, target = make_target()
    hidden, head, _ = (tensor.requires_grad_() for tensor in make_student(width=64))
    result = fused(hidden, head, labels, target, gamma=0.2)
    with Operations() as operations:
        result.loss.backward()
    assert [name for name, size in operations.sizes if size >= head.numel() and name != "detach.default"] == [
        "mul_.Tensor"
    ]


def test_a_tied_head_gets_both_gradients() -> None:
    labels, target = make_target()
    tokens = torch.randint(103, (ROWS,))
    _, embedding, _ = make_student()
    tied, oracle = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    fused(tied[tokens].tanh(), tied, labels, target, gamma=0.2).loss.backward()
    reference_loss(oracle[tokens].tanh() @ oracle.T, labels, *target, gamma=0.2).loss.backward()
    torch.testing.assert_close(tied.grad, oracle.grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_float32_head_under_bf16(autocast: bool) -> None:
    """bf16 hidden states, or autocast: the head and the sum of its gradient stay float32."""
    labels, target = make_target()
    hidden, head, _ = (tensor.float().requires_grad_() for tensor in make_student())
    states = hidden if autocast else hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = fused(states, head, labels, target, gamma=0.2)
    made = gradients(result.loss, hidden, head)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    oracle = reference_loss(exact[0] @ exact[1].T, labels, *target, gamma=0.2).loss
    assert result.loss.dtype == torch.float32
    assert made[1].dtype == torch.float32
    assert error(result.loss, oracle) <= 1e-2
    for actual, expected in zip(made, gradients(oracle, *exact), strict=True):
        assert error(actual, expected) <= 1e-2


def test_only_under_autocast_may_a_cpu_round_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where it has bfloat16 arithmetic; the setting, which is the process's, is restored."""
    seen, run = list[str](), loss_module._run

    def watched(*arguments: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return run(*arguments)

    monkeypatch.setattr(loss_module, "_run", watched)
    labels, target = make_target()
    hidden, head, _ = (tensor.float().requires_grad_() for tensor in make_student())
    for has_bf16, autocast in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = fused(hidden, head, labels, target, gamma=0.2).loss
        for _ in range(2):  # the second backward pass runs again
            loss.backward(retain_graph=True)
        assert torch.get_float32_matmul_precision() == "highest"
    assert seen == ["medium"] * 2 + ["highest"] * 4


def test_the_chunk_size_changes_nothing_but_rounding() -> None:
    labels, target = make_target()
    hidden, head, _ = make_student()
    whole = fused(hidden, head, labels, target, gamma=0.2, chunk_size=1000)
    for chunk_size in (1, 7, None):
        torch.testing.assert_close(
            fused(hidden, head, labels, target, gamma=0.2, chunk_size=chunk_size), whole
        )


def test_the_default_chunk_is_a_small_part_of_all_logits() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_chunk_size(2048, 49152, cpu) == 256
    assert default_chunk_size(1024, 151936, cpu) == 110
    assert default_chunk_size(16384, 151936, cuda) == 1766
    assert default_chunk_size(8192, 151936, cuda) == 1024
