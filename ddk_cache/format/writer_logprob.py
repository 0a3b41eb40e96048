"""The log-probabilities of a text by the model that wrote it, on a grid of 1/256 nats. Pure.

They weigh a token by how far the student has moved since the text was written; half a step is 0.2% of such a
weight. A token takes about a byte, where float16 takes 1.7 and float32 3.4.
"""

import numpy as np
from numpy.typing import NDArray

STEPS = 256  # a nat
LARGEST = np.iinfo(np.uint16).max


def encode(logprob: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return each log-probability, in nats, as steps below 0; at most 256 nats."""
    return np.rint(-STEPS * logprob).clip(0, LARGEST).astype(np.uint16)


def decode(steps: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the log-probabilities in nats."""
    return steps.astype(np.float32) / np.float32(-STEPS) + np.float32(0)  # no -0.0
