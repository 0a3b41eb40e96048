"""The learning rate and the weights of a step. Pure."""

import math
from collections.abc import Callable

from ddk_train.config import Schedule, Weight


def learning_rate(step: int, *, warmup_steps: int, max_steps: int, peak: float, minimum: float) -> float:
    """Linear warm-up from 0 to ``peak``, then a cosine that reaches ``minimum`` at ``max_steps``.

    ``step`` counts from 1: the first of 1,000 warm-up steps already moves, by a thousandth of ``peak``
    (the paper's set-up: 0 to 3e-5 in 1,000 steps, then to 3e-6).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= max_steps:
        return minimum
    done = (step - warmup_steps) / (max_steps - warmup_steps)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * done)) / 2


# From the part of the way that is behind, 0 to 1, to the part of the change that is made.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}


def weight(value: Weight, step: int, max_steps: int) -> float:
    """A number, or a schedule's value in ``step``, which counts from 1: ``start`` in the first, and ``end``
    from the one numbered ``steps`` on (``max_steps`` where that is not given).
    """
    if not isinstance(value, Schedule):
        return value
    steps = value.steps or max_steps
    done = min((step - 1) / (steps - 1), 1.0) if steps > 1 else 1.0
    return value.start + (value.end - value.start) * SHAPES[value.shape](done)
