"""Train from the configuration named as one of several processes; the last of them is killed at step 3."""

import os
import sys

import torch
from dying import die_at_call

import ddk_train.train
from ddk_cache.configuration import load
from ddk_train.config import TrainConfig

torch.set_num_threads(1)
if os.environ["RANK"] == "1":
    ddk_train.train.learning_rate = die_at_call(3, ddk_train.train.learning_rate)
ddk_train.train.train(load(sys.argv[1], [], TrainConfig))
