"""One process, or several under torchrun: who is who, sums over all, and the student wrapped or sharded."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from ddk_cache.errors import ConfigError
from ddk_train.batches import Batch
from ddk_train.config import TrainConfig
from ddk_train.errors import Stopped, TrainingError
from ddk_train.student import Student

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    on_cpu: distributed.ProcessGroup | None = None
    """Of all processes, beside the group that training uses; None for one process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows_in_a_step(self, config: TrainConfig) -> int:
        """Of an optimizer step, all processes."""
        return self.world * config.gradient_accumulation_steps * config.per_device_train_batch_size

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes; on the CPU, where no GPU is waited for, if they are."""
        if self.world == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total

    def even(self, parts: Sequence[Batch]) -> list[Batch]:
        """The n-th parts of all processes with as many arrays of documents: a sharded layer is called by all
        processes together, or they wait for each other for ever. On the CPU; packed parts stay as they are.
        """
        counts = torch.tensor([len(part.documents) for part in parts])
        if self.world > 1 and counts.any():
            distributed.all_reduce(counts, distributed.ReduceOp.MAX)
        return [part.with_arrays(count) for part, count in zip(parts, counts.tolist(), strict=True)]

    def from_main(self, function: Callable[[], Result]) -> Result:
        """What ``function`` gives in the main process, in all; so with a ConfigError that it raises."""
        if self.world == 1:
            return function()
        given: list[Any] = [None]
        if self.is_main:
            try:
                given = [function()]
            except ConfigError as error:
                given = [error]
        distributed.broadcast_object_list(given, group=self.on_cpu)
        if isinstance(given[0], ConfigError):
            raise given[0]
        found: Result = given[0]
        return found

    def say(self, line: str) -> None:
        """Tell who is watching, once."""
        if self.is_main:
            click.echo(line, err=True)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum(torch.zeros(1))


@contextlib.contextmanager
def process_group(timeout_minutes: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun there is one.

    Raises
    ------
    TrainingError
        Another process died, or did not answer in ``timeout_minutes``.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world == 1:
        yield Ranks(rank, world, device)
        return
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    distributed.init_process_group(backend, timeout=timeout)
    try:
        yield Ranks(rank, world, device, distributed.new_group(backend="gloo", timeout=timeout))
    except Stopped:  # all of them, together
        distributed.destroy_process_group()
        raise
    except distributed.DistError as error:
        raise TrainingError(_lost(rank, world, error)) from error
    except RuntimeError as error:
        if "gloo" in str(error):
            raise TrainingError(_lost(rank, world, error)) from error
        raise
    distributed.destroy_process_group()


def _lost(rank: int, world: int, error: Exception) -> str:
    return f"process {rank} of {world} lost contact with the others: {str(error).strip().splitlines()[0]}"


def wrap(student: Student, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """The student on its device, ready for a gradient that is averaged over processes (DDP or FSDP2).

    With FSDP2 every decoder layer is gathered when it is used; embedding, final norm and head belong to the
    root, which is whole during the student's forward pass, so the loss sees the whole head.
    """
    if ranks.world == 1:
        return student.to(ranks.device, torch.float32 if config.fsdp else None)
    if not config.fsdp:
        return DistributedDataParallel(student.to(ranks.device), gradient_as_bucket_view=True)
    return shard(student, init_device_mesh(ranks.device.type, (ranks.world,)), bf16=config.bf16)


def shard(student: Student, mesh: DeviceMesh, *, bf16: bool) -> Student:
    """The student with every weight divided over ``mesh``; in bfloat16 where it is gathered, if ``bf16``.

    Shards are float32, whatever type the student came in.
    Inputs keep their types: the teacher's log-probabilities in a batch are not to be rounded.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    layers = set(student.inner._no_split_modules or ())
    for module in student.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    for method in ("hidden", "continued"):
        register_fsdp_forward_method(student, method)
    return student.float()


@contextlib.contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Backward passes inside exchange gradients between processes only if ``enabled``."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    local = isinstance(model, DistributedDataParallel) and not enabled
    with model.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
        yield


@contextlib.contextmanager
def measuring(student: Student) -> Iterator[None]:
    """Inside: no dropout and no gradients. After it the student trains on, in shards if it is sharded.

    FSDP2's root stays whole after a forward pass that no backward pass follows, and would be saved or
    handed to an optimizer so.
    """
    was_training = student.training
    student.eval()
    with torch.no_grad():
        yield
    student.train(was_training)
    if isinstance(student, FSDPModule):
        student.reshard()
