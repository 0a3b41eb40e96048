"""One process, or several under torchrun: collectives, and the student wrapped or sharded."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ddk_cache.errors import CacheError, ConfigError
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch
from ddk_train.errors import Stopped, TrainingError
from ddk_train.student.student import Student

logger = logging.getLogger("ddk_train")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The current process among the processes of the run."""

    rank: int
    world: int
    device: torch.device
    on_cpu: distributed.ProcessGroup | None = None  # a second group of all processes; None for one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows_in_a_step(self, config: TrainConfig) -> int:
        """Return the rows of an optimizer step, over all processes."""
        return self.world * config.gradient_accumulation_steps * config.per_device_train_batch_size

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all processes; with CPU tensors no GPU is waited for."""
        if self.world == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total

    def equalize(self, parts: Sequence[Batch]) -> list[Batch]:
        """Pad unpacked batches, on the CPU, to the most arrays of documents that any process has.

        A sharded layer must be called equally often in all processes, or they wait for each other forever.
        """
        counts = torch.tensor([len(part.documents) for part in parts])
        if self.world > 1 and counts.any():
            distributed.all_reduce(counts, distributed.ReduceOp.MAX)
        return [part.with_arrays(count) for part, count in zip(parts, counts.tolist(), strict=True)]

    def from_main(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` in the main process; all processes return its result or raise its error."""
        if self.world == 1:
            return function()
        shared: list[Any] = [None]
        if self.is_main:
            try:
                shared = [function()]
            except (ConfigError, CacheError, TrainingError) as error:
                shared = [error]
        distributed.broadcast_object_list(shared, group=self.on_cpu)
        if isinstance(shared[0], Exception):
            raise shared[0]
        result: Result = shared[0]
        return result

    def random_state(self) -> AbstractContextManager[None]:
        """Restore torch's random state, of the CPU and of this process's GPU, after the block."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def log(self, line: str) -> None:
        """Log a line of progress in the main process."""
        if self.is_main:
            logger.info("%s", line)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(torch.zeros(1))


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun there is one process.

    Raises TrainingError if another process died, or did not answer in ``timeout_minutes``.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    precision = torch.get_float32_matmul_precision()
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    try:
        if world == 1:
            yield Ranks(rank, world, device)
            return
        timeout = timedelta(minutes=timeout_minutes)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
        yield Ranks(rank, world, device, distributed.new_group(backend="gloo", timeout=timeout))
        distributed.destroy_process_group()
    except Stopped:  # all processes, together
        if world > 1:
            distributed.destroy_process_group()
        raise
    except RuntimeError as error:
        if world > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"process {rank} of {world} lost contact with the others: {reason}"
            ) from error
        raise
    finally:
        torch.set_float32_matmul_precision(precision)


def wrap(student: Student, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """Move the student to its device, and wrap it to average gradients over processes (DDP or FSDP2)."""
    if ranks.world == 1:
        return student.to(ranks.device, torch.float32 if config.fsdp else None)
    if not config.fsdp:
        return DistributedDataParallel(student.to(ranks.device), gradient_as_bucket_view=True)
    return shard(student, init_device_mesh(ranks.device.type, (ranks.world,)), bf16=config.bf16)


def shard(student: Student, mesh: DeviceMesh, *, bf16: bool) -> Student:
    """Shard every weight of the student, as float32, over ``mesh``; gather as bfloat16 if ``bf16``.

    FSDP2 gathers a decoder layer when it is used. Embedding, final norm and head belong to the root, which is
    gathered during the student's forward pass, so the loss sees the full head. Inputs keep their types: the
    teacher's log-probabilities in a batch must not be rounded.
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
    for method in ("hidden_only", "continued"):
        register_fsdp_forward_method(student, method)
    return student.float()


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Exchange gradients between processes in the block's backward passes only if ``enabled``."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    skips = isinstance(model, DistributedDataParallel) and not enabled
    with model.no_sync() if skips else nullcontext():  # type: ignore[operator]
        yield


@contextmanager
def measuring(student: Student) -> Iterator[None]:
    """Turn off dropout, gradients and compiled code for the block, and then reshard the student.

    Compiled code would be compiled again for each size of a validation batch, and each length of a sample.

    FSDP2's root stays gathered after a forward pass without a backward pass; it must not be saved or given to
    an optimizer like that.
    """
    was_training = student.training
    student.eval()
    is_compiled = student.config.torch_compile
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield
    finally:  # also after a signal, which saves a checkpoint
        student.train(was_training)
        if isinstance(student, FSDPModule):
            student.reshard()
