"""AdamW over the trained weights."""

from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig


def make_optimizer(student: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """Return AdamW with weight decay on matrices only (not on norms and biases); each step sets its rate."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    try:
        bitsandbytes = import_module("bitsandbytes.optim")  # without types for all of it
    except ImportError as error:
        raise ConfigError(
            "optimizer: adamw_8bit needs the package bitsandbytes: pip install bitsandbytes"
        ) from error
    optimizer: Optimizer = bitsandbytes.AdamW8bit(groups)
    return optimizer
