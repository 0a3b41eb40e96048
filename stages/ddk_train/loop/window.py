"""Collect metrics between two lines: sums over labels, seconds and tokens."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch
from ddk_train.loop.objective import reads_labels, reads_targets
from ddk_train.loss.policy import policy_terms
from ddk_train.loss.reference import DistillationLoss
from ddk_train.student.distributed import Ranks
from ddk_train.student.student import batch_policy

POLICY = ("reverse_kl", "advantage", "importance", "importance_squared", "left_out")


class Window:
    """Means over the labels of several steps, in total and by domain, and the time of these steps.

    Sums stay on the device until a line is due, so that no step waits for them. The mean ``kl`` is over the
    domains with a KL term; those of ``POLICY``, if there is any, over the domains with a policy gradient.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, domains: tuple[str, ...]) -> None:
        self._config, self._ranks = config, ranks
        counted = {"cross_entropy": [True] * len(domains), "kl": reads_targets(config, domains)}
        if config.uses_policy:
            counted |= dict.fromkeys(POLICY, reads_labels(config, domains))
        self._names = ["loss", *counted, *(f"{name}/{domain}" for name in counted for domain in domains)]
        self._domains = torch.arange(len(domains), device=ranks.device)
        self._is_counted = torch.tensor([*counted.values()], dtype=torch.float64, device=ranks.device)
        # The sum of each name's values and its number of labels, in this process.
        self.sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=ranks.device)
        self._bad_step = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._clear()

    def _clear(self) -> None:
        self.sums.zero_()
        self._tokens, self._seconds = 0, {"step": 0.0, "wait": 0.0}

    def add(self, result: DistillationLoss, batch: Batch) -> None:
        """Add the losses of a batch."""
        rows = [result.row_cross_entropy, result.row_kl]
        if self._config.uses_policy:
            rows += self._policy_rows(-result.row_cross_entropy, batch)
        # By matmul, because sums by index do not always add in the same order on a GPU.
        is_of = (batch.domain[:, None] == self._domains).double()
        values = torch.stack(rows).double() @ is_of * self._is_counted
        labels = is_of.sum(0) * self._is_counted
        loss = result.loss.detach().double() * len(batch.domain)
        self.sums[0] += torch.cat([loss[None], values.sum(1), values.flatten()])
        self.sums[1] += torch.cat([is_of.sum()[None], labels.sum(1), labels.flatten()])

    def _policy_rows(self, log_q: Tensor, batch: Batch) -> list[Tensor]:
        """Return each label's value of ``POLICY``, [M] each, from the student's log q of the labels."""
        policy = batch_policy(batch, torch.ones_like(log_q), self._config)
        if policy is None:
            return [torch.zeros_like(log_q)] * len(POLICY)
        advantage, importance, is_kept = policy_terms(log_q, policy)
        left_out = (~is_kept).to(log_q.dtype)
        return [log_q - policy.teacher_logprob, advantage, importance, importance.square(), left_out]

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
            if count or "/" not in name
        }
        _square_to_spread(means)
        speed = {
            "tokens_per_second": self._tokens / self._seconds["step"],
            "data_wait_fraction": self._seconds["wait"] / self._seconds["step"],
        }
        self._clear()
        return means | speed


def _square_to_spread(means: dict[str, float]) -> None:
    """Replace each mean of squared importances by the importances' standard deviation."""
    for name in [name for name in means if name.startswith("importance_squared")]:
        importance = means[name.replace("importance_squared", "importance")]
        variance = means.pop(name) - importance**2
        means[name.replace("squared", "spread")] = math.sqrt(max(variance, 0.0))
