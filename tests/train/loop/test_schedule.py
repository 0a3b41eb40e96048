"""The learning rate against numbers worked out by hand."""

import pytest

from ddk_train.config import TrainConfig
from ddk_train.loop.schedule import learning_rate


def rate(step: int, **keys: float) -> float:
    """Return the learning rate; the keys' defaults are the paper's."""
    return learning_rate(step, TrainConfig(cache="c", student="s", output_dir="o", **keys))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 3e-8),
        (500, 1.5e-5),
        (1000, 3e-5),
        # A third of the way from 1,000 to 30,000: cos(60°) = 1/2, so 3e-6 + 2.7e-5 * 3/4.
        (1000 + 29_000 // 3, 3e-6 + 2.7e-5 * 0.75),
        (15_500, 1.65e-5),
        (30_000, 3e-6),
        (31_000, 3e-6),
    ],
)
def test_warm_up_then_cosine(step: int, expected: float) -> None:
    assert rate(step) == pytest.approx(expected, rel=1e-4)


def test_no_warm_up_begins_at_the_peak() -> None:
    assert rate(1, warmup_steps=0, max_steps=10**6, learning_rate=1.0) == pytest.approx(1.0)


def test_a_run_that_ends_in_the_warm_up_never_leaves_its_line() -> None:
    rates = [rate(step, warmup_steps=100, max_steps=10, learning_rate=1.0) for step in range(1, 11)]
    assert rates == [pytest.approx(step / 100) for step in range(1, 11)]
