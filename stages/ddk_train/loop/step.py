"""One optimizer step: the clipped gradient of the global batch's mean loss, and the update.

No operation waits for a GPU: counts are made on the CPU, and results stay on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from ddk_cache.util.interrupt import Interrupt
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch
from ddk_train.loop.objective import Weights
from ddk_train.loop.window import Window
from ddk_train.student.distributed import Ranks, gradient_sync


class StepResult(NamedTuple):
    """The result of a step, the same in all processes."""

    norm: Tensor  # of the gradient before clipping, on the device; not finite if the loss is not
    tokens: int  # of the global batch, without padding
    interrupted: bool  # a process has received a signal to stop


@dataclass(frozen=True)
class OptimizerStep:
    """A step of a run, called with its batches, learning rate and weights."""

    config: TrainConfig
    ranks: Ranks
    model: nn.Module  # the student, wrapped for several processes
    optimizer: Optimizer
    window: Window
    interrupt: Interrupt

    def __call__(self, parts: Sequence[Batch], rate: float, weights: Weights) -> StepResult:
        """Train on this process's ``parts`` of the global batch."""
        # The loss is a mean over the labels of the global batch, however it is divided.
        counts = [sum(len(part.labels) for part in parts), sum(part.text_tokens for part in parts)]
        sums = self.ranks.sum(torch.tensor([*counts, int(self.interrupt.signal is not None)]))
        labels, tokens, interrupted = sums.tolist()
        device = self.ranks.device
        by_domain = torch.tensor(weights, dtype=torch.float32, pin_memory=device.type == "cuda")
        cross_entropy, gamma, policy = by_domain.to(device, non_blocking=True)
        for count, host_part in enumerate(self.ranks.equalize(parts), start=1):
            part = host_part.to(device)
            with gradient_sync(self.model, enabled=count == len(parts)):
                of_policy = policy[part.domain] if self.config.uses_policy else None
                result = self.model(part, gamma[part.domain], cross_entropy[part.domain], of_policy)
                # Gradients are averaged over the processes, so each part is scaled by their number.
                (result.loss * (self.ranks.world * len(part.labels) / max(labels, 1))).backward()
            self.window.add(result, part)
        self.window.add_tokens(tokens)
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        norm = clip_grad_norm_(trained, self.config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(norm, tokens, interrupted > 0)
