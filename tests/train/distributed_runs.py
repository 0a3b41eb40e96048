"""Train from each configuration named, one after another, as one of torchrun's processes."""

import sys

import torch

from ddk_cache.configuration import load
from ddk_train.config import TrainConfig
from ddk_train.train import train

torch.set_num_threads(1)

for argument in sys.argv[1:]:
    path, _, resume = argument.partition(":")
    train(load(path, [], TrainConfig), resume=bool(resume))
