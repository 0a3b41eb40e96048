"""Train from the configuration named as one of two processes; the second meets a fault at its third step.

``killed`` (SIGKILL), ``memory`` (a GPU's is full), ``reader`` (a damaged cache) or ``told`` (SIGTERM).
"""

import os
import signal
import sys
from typing import Any, NoReturn

import torch
from dying import at_call

import ddk_train.train
from ddk_cache.configuration import load
from ddk_cache.errors import CacheError
from ddk_train.config import TrainConfig
from ddk_train.errors import Stopped


def full() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory")


def damaged() -> NoReturn:
    raise CacheError("code/train, shard 0: the checksum does not match")


def reader(*args: Any, **kwargs: Any) -> Any:
    return at_call(3, original(*args, **kwargs), damaged)


torch.set_num_threads(1)
original, fault = ddk_train.train.reader, sys.argv[2]
if os.environ["RANK"] == "1":
    if fault == "reader":
        ddk_train.train.reader = reader
    else:
        act = {
            "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "told": lambda: os.kill(os.getpid(), signal.SIGTERM),
            "memory": full,
        }[fault]
        ddk_train.train.learning_rate = at_call(3, ddk_train.train.learning_rate, act)
try:
    ddk_train.train.train(load(sys.argv[1], [], TrainConfig))
except Stopped as stopped:
    sys.exit(stopped.exit_code)
