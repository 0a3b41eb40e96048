"""What happened since the last line of metrics: sums over labels, seconds and tokens."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ddk_train.distributed import Ranks
from ddk_train.loss_reference import DistillationLoss

NAMES = ("loss", "cross_entropy", "kl")


class Window:
    """Means over the labels of several steps, of all domains and of each, and how their time was spent.

    Sums stay on the device until a line is asked for, so that no step waits for them.

    Parameters
    ----------
    ranks
        The processes whose sums make a line together.
    domains
        Names, [N].
    reads_targets
        Whether each of them has a KL term, [N]; the mean ``kl`` is of those that have.
    """

    def __init__(self, ranks: Ranks, domains: Sequence[str], reads_targets: Sequence[bool]) -> None:
        self._ranks = ranks
        self._names = [*NAMES, *(f"{name}/{domain}" for name in NAMES[1:] for domain in domains)]
        self._numbers = torch.arange(len(domains), device=ranks.device)
        self._reads_targets = torch.tensor(reads_targets, dtype=torch.float64, device=ranks.device)
        # Of each name the sum of its values and the number of labels they are of, in this process.
        self.sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=ranks.device)
        self._bad = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._clear()

    def _clear(self) -> None:
        self.sums.zero_()
        self._tokens, self._busy, self._waited = 0, 0.0, 0.0

    def add(self, result: DistillationLoss, domain: Tensor) -> None:
        """The losses of a batch; ``domain`` is the number of the domain that each label belongs to, [M]."""
        # By matmul, because sums by index do not always come in the same order on a GPU.
        belongs = (domain[:, None] == self._numbers).double()
        rows = torch.stack([result.row_cross_entropy, result.row_kl]).double()
        cross_entropy, kl = (rows @ belongs).unbind()
        labels = belongs.sum(0)
        with_target = labels * self._reads_targets
        loss = result.loss.detach().double() * len(domain)
        whole = torch.stack([loss, cross_entropy.sum(), kl.sum()])
        whole_labels = torch.stack([labels.sum(), labels.sum(), with_target.sum()])
        self.sums[0] += torch.cat([whole, cross_entropy, kl])
        self.sums[1] += torch.cat([whole_labels, labels, with_target])

    def add_tokens(self, tokens: int) -> None:
        """Tokens that all processes trained on."""
        self._tokens += tokens

    def add_norm(self, norm: Tensor, step: int) -> None:
        """The norm of a step's gradient; the first step where it is not finite is remembered."""
        self._bad = torch.where((self._bad == 0) & ~norm.isfinite(), step, self._bad)

    def first_bad_step(self) -> int:
        """That step, or 0; waits for the device."""
        return int(self._bad)

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
        """Means by name, tokens_per_second and data_wait_fraction; begins anew. All processes call it.

        A domain that had no labels has no mean.
        """
        totals, labels = self._ranks.sum(self.sums).tolist()
        means = {
            name: total / max(count, 1)
            for name, total, count in zip(self._names, totals, labels, strict=True)
            if count or name in NAMES
        }
        speed = {
            "tokens_per_second": self._tokens / self._busy,
            "data_wait_fraction": self._waited / self._busy,
        }
        self._clear()
        return means | speed
