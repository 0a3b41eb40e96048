"""The learning rate and the weights of a step. Pure."""

import math
from collections.abc import Callable

from ddk_train.config import Schedule, TrainConfig, Weight


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of ``step``, which counts from 1: linear warm-up from 0, then a cosine.

    With W = ``warmup_steps`` and M = ``max_steps``::

        peak * step / W                                                        step < W
        minimum + (peak - minimum) * (1 + cos(pi * (step - W) / (M - W))) / 2  W <= step <= M
    """
    peak, minimum, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if step >= config.max_steps:
        return minimum
    done = (step - warmup) / (config.max_steps - warmup)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * done)) / 2


# Map the fraction of the steps done to the fraction of the change made, both 0 to 1.
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
