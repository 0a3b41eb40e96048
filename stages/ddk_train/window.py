"""What happened since the last line of metrics: sums over labels, seconds and tokens."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ddk_train.distributed import Ranks

NAMES = ("loss", "cross_entropy", "kl")


class Window:
    """Means over the labels of several steps, and how their time was spent.

    Sums stay on the device until a line is asked for, so that no step waits for them.

    Parameters
    ----------
    ranks
        The processes whose sums make a line together.
    names
        What the values are called in a line, [K].
    """

    def __init__(self, ranks: Ranks, names: Sequence[str] = NAMES) -> None:
        self._ranks, self._names = ranks, tuple(names)
        # Of each name the sum of its values and the number of labels they are of, in this process.
        self.sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=ranks.device)
        self._clear()

    def _clear(self) -> None:
        self.sums.zero_()
        self._tokens, self._busy, self._waited = 0, 0.0, 0.0

    def add(self, means: Tensor, labels: Tensor | int) -> None:
        """Means [K] over ``labels`` labels (one number, or [K]) of a batch."""
        self.sums[0] += means.detach().double() * labels
        self.sums[1] += labels

    def add_tokens(self, tokens: int) -> None:
        """Tokens that all processes trained on."""
        self._tokens += tokens

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside is a step; its seconds count."""
        began = time.perf_counter()
        yield
        self._busy += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a step waits for rows."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def line(self) -> dict[str, float]:
        """Means by name, tokens_per_second and data_wait_fraction; begins anew. All processes call it."""
        totals, labels = self._ranks.sum(self.sums).tolist()
        means = {
            name: total / max(count, 1)
            for name, total, count in zip(self._names, totals, labels, strict=True)
        }
        speed = {
            "tokens_per_second": self._tokens / self._busy,
            "data_wait_fraction": self._waited / self._busy,
        }
        self._clear()
        return means | speed
