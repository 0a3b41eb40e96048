"""Train in separate processes, forked by a server with everything imported."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from helpers.dying import at_call, die_at_call

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "ddk_train.train",
        "torch.distributed.fsdp",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
    ]
)


def train_on_two(*arguments: str, fault: str | None = None) -> tuple[tuple[int | None, ...], list[str]]:
    """Run ``ddk-cache train`` without torchrun's agent, which would end a survivor.

    Return exit codes and stderr of both; the second has a ``fault`` of ``FAULTS`` at its third step, or, for
    ``measuring``, a signal at its fifth validation batch.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [Path(f"{arguments[0]}.{rank}.log") for rank in (0, 1)]
    processes = [
        CONTEXT.Process(target=_run, args=(rank, port, log, arguments, fault if rank else None))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return tuple(process.exitcode for process in processes), [log.read_text() for log in logs]


def train_until(config: str, folder: Path, moment: str) -> int | None:
    """Train into ``folder`` until SIGKILL at a moment; return the exit code.

    A moment is ``step:<n>``, within the n-th optimizer step, ``save:<n>``, when only the tensors of the n-th
    checkpoint are on disk, or ``rotate:<n>``, when it is complete and old ones are not yet removed.
    """
    process = CONTEXT.Process(target=_run_until, args=(config, folder, moment))
    process.start()
    process.join(300)
    return process.exitcode


def _full() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _damaged() -> NoReturn:
    from ddk_cache.errors import CacheError

    raise CacheError("code/train, shard 0: the checksum does not match")


FAULTS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "memory": _full,
    "reader": _damaged,
}


def _run(rank: int, port: int, log: Path, arguments: tuple[str, ...], fault: str | None) -> None:
    import ddk_train.loop.run
    from ddk_cache.cli.main import main

    program: Any = importlib.import_module("ddk_train.train")

    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    if fault == "reader":
        original = ddk_train.loop.run.reader

        def reader(*args: Any, **kwargs: Any) -> Any:
            return at_call(3, original(*args, **kwargs), FAULTS["reader"])

        ddk_train.loop.run.reader = reader
    elif fault == "measuring":
        run: Any = ddk_train.loop.run.TrainingRun
        run.check_interrupt = at_call(5, run.check_interrupt, FAULTS["signal"])
    elif fault is not None:
        program.learning_rate = at_call(3, program.learning_rate, FAULTS[fault])
    sys.argv = ["ddk-cache", "train", *arguments]
    main()


def _run_until(config: str, folder: Path, moment: str) -> None:
    import ddk_train.output.checkpoint
    from ddk_cache.util.configuration import load
    from ddk_train.config import TrainConfig

    program: Any = importlib.import_module("ddk_train.train")

    torch.set_num_threads(1)
    kind, _, call = moment.partition(":")
    module, name = {
        "step": (program, "learning_rate"),
        "save": (ddk_train.output.checkpoint.state_dict_saver, "save"),
        "rotate": (ddk_train.output.checkpoint, "remove_old"),
    }[kind]
    setattr(module, name, die_at_call(int(call), getattr(module, name), after=kind == "save"))
    program.train(load(config, [f"output_dir={folder}"], TrainConfig))
