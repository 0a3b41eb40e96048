"""Train from a configuration once for every moment named, and be killed (SIGKILL) at that moment.

A moment is ``step:<n>``, in the middle of the n-th optimizer step, ``save:<n>``, when the n-th checkpoint's
tensors are on disk and the rest is not, or ``rotate:<n>``, when it is whole and the old ones are still there.
Run as a process of its own, because it forks.
"""

import os
import signal
import sys

import torch
from dying import die_at_call

import ddk_train.checkpoint
import ddk_train.train
from ddk_cache.configuration import load
from ddk_train.config import TrainConfig

torch.set_num_threads(1)

for run in sys.argv[2:]:
    folder, moment, number = run.split(":")
    if os.fork() == 0:
        if moment == "step":
            function = die_at_call(int(number), ddk_train.train.learning_rate)
            ddk_train.train.learning_rate = function
        elif moment == "rotate":
            function = die_at_call(int(number), ddk_train.checkpoint.remove_old)
            ddk_train.checkpoint.remove_old = function
        else:
            function = die_at_call(int(number), ddk_train.checkpoint.state_dict_saver.save, after=True)
            ddk_train.checkpoint.state_dict_saver.save = function
        ddk_train.train.train(load(sys.argv[1], [f"output_dir={folder}"], TrainConfig))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
