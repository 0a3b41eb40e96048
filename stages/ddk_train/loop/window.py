"""Collect metrics between two lines: sums over labels, seconds and tokens."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from ddk_train.loss.reference import DistillationLoss
from ddk_train.student.distributed import Ranks

NAMES = ("loss", "cross_entropy", "kl")


class Window:
    """Means over the labels of several steps, in total and by domain, and the time of these steps.

    Sums stay on the device until a line is due, so that no step waits for them. ``reads_targets`` [N] says
    which domains have a KL term; the mean ``kl`` is over those.
    """

    def __init__(self, ranks: Ranks, domains: Sequence[str], reads_targets: Sequence[bool]) -> None:
        self._ranks = ranks
        self._names = [*NAMES, *(f"{name}/{domain}" for name in NAMES[1:] for domain in domains)]
        self._indices = torch.arange(len(domains), device=ranks.device)
        self._reads_targets = torch.tensor(reads_targets, dtype=torch.float64, device=ranks.device)
        # The sum of each name's values and its number of labels, in this process.
        self.sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=ranks.device)
        self._bad_step = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._clear()

    def _clear(self) -> None:
        self.sums.zero_()
        self._tokens, self._seconds = 0, {"step": 0.0, "wait": 0.0}

    def add(self, result: DistillationLoss, domain: Tensor) -> None:
        """Add the losses of a batch; ``domain`` is the index of each label's domain, [M]."""
        # By matmul, because sums by index do not always add in the same order on a GPU.
        is_of = (domain[:, None] == self._indices).double()
        losses = torch.stack([result.row_cross_entropy, result.row_kl]).double()
        cross_entropy, kl = (losses @ is_of).unbind()
        labels = is_of.sum(0)
        with_target = labels * self._reads_targets
        loss = result.loss.detach().double() * len(domain)
        totals = torch.stack([loss, cross_entropy.sum(), kl.sum()])
        total_labels = torch.stack([labels.sum(), labels.sum(), with_target.sum()])
        self.sums[0] += torch.cat([totals, cross_entropy, kl])
        self.sums[1] += torch.cat([total_labels, labels, with_target])

    def add_tokens(self, tokens: int) -> None:
        """Add tokens that all processes trained on."""
        self._tokens += tokens

    def add_norm(self, norm: Tensor, step: int) -> None:
        """Record the first step whose gradient norm is not finite."""
        self._bad_step = torch.where((self._bad_step == 0) & ~norm.isfinite(), step, self._bad_step)

    def first_bad_step(self) -> int:
        """Return the step that ``add_norm`` recorded, or 0; waits for the device."""
        return int(self._bad_step)

    @contextmanager
    def timing(self, part: Literal["step", "wait"]) -> Iterator[None]:
        """Count the seconds of the block as a step's, or as those in which it waits for rows."""
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def line(self) -> dict[str, float]:
        """Return means by name (none for a domain without labels) and speed, and clear; collective."""
        totals, labels = self._ranks.sum(self.sums).tolist()
        means = {
            name: total / max(count, 1)
            for name, total, count in zip(self._names, totals, labels, strict=True)
            if count or name in NAMES
        }
        speed = {
            "tokens_per_second": self._tokens / self._seconds["step"],
            "data_wait_fraction": self._seconds["wait"] / self._seconds["step"],
        }
        self._clear()
        return means | speed
