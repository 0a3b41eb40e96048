"""The learning rate of a step. Pure."""

import math


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
