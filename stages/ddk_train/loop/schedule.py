"""The learning rate and the weights of a step. Pure."""

import math
from collections.abc import Callable

from ddk_train.config import Schedule, Weight


def learning_rate(step: int, *, warmup_steps: int, max_steps: int, peak: float, minimum: float) -> float:
    """Return the learning rate of ``step``: linear warm-up from 0 to ``peak``, then a cosine to ``minimum``.

    With W = ``warmup_steps`` and M = ``max_steps``::

        peak * step / W                                                        step < W
        minimum + (peak - minimum) * (1 + cos(pi * (step - W) / (M - W))) / 2  W <= step <= M

    ``step`` counts from 1, so the first of 1,000 warm-up steps trains with a thousandth of ``peak``. The
    paper (arXiv 2407.16154) warms up to 3e-5 in 1,000 steps and ends at 3e-6.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= max_steps:
        return minimum
    done = (step - warmup_steps) / (max_steps - warmup_steps)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * done)) / 2


# From the fraction of the steps that are done, 0 to 1, to the fraction of the change that is made.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}


def weight(value: Weight, step: int, max_steps: int) -> float:
    """Return a weight in ``step``, which counts from 1: the number itself, or the schedule's value.

    A schedule has the value ``start`` in step 1 and ``end`` from step ``steps`` on; null means ``max_steps``.
    With d = (step - 1) / (steps - 1) it is start + (end - start) * SHAPES[shape](d) in between.
    """
    if not isinstance(value, Schedule):
        return value
    steps = value.steps or max_steps
    done = min((step - 1) / (steps - 1), 1.0) if steps > 1 else 1.0
    return value.start + (value.end - value.start) * SHAPES[value.shape](done)
