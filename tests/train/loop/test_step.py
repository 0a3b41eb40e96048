"""What an optimizer step does to a GPU's queue: it never waits for what is in it."""

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddk_cache import open_cache
from ddk_cache.util.interrupt import Interrupt
from ddk_train.data.batches import reader
from ddk_train.loop.objective import step_weights
from ddk_train.loop.optimizer import make_optimizer
from ddk_train.loop.step import OptimizerStep
from ddk_train.loop.window import Window
from ddk_train.student.distributed import Ranks
from ddk_train.student.files import load_model
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import load_tokenizer

# Operations whose result's value or size the CPU must know before it can go on.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


# Who may: Adam counts its steps on the CPU; transformers looks once a batch whether documents are packed.
ALLOWED = ("torch/optim/", "transformers/masking_utils.py")


class Watch(TorchDispatchMode):
    """Notes every such operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        callers = [frame.filename for frame in traceback.extract_stack()] if name in WAITING else []
        if by_mask or (name in WAITING and not any(part in file for part in ALLOWED for file in callers)):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gamma", [0.2, 0.0])
def test_a_step_waits_for_nothing(make_config: Any, gamma: float) -> None:
    config = make_config(gamma=gamma, gradient_accumulation_steps=2)
    cache, ranks = open_cache(config.cache), Ranks(0, 1, torch.device("cpu"))
    student = Student(load_model(config, cache, load_tokenizer(config, cache)), config)
    window = Window(config, ranks, cache.domains)
    optimizer = make_optimizer(student, config, ranks.device)
    step = OptimizerStep(config, ranks, student, optimizer, window, Interrupt())
    read = reader(cache, targets=[gamma > 0] * 3, vocab_size=student.vocab_size)
    parts = [read(torch.tensor([0, 1, 2, 0]).numpy(), torch.tensor([0, 1, 2, 3]).numpy())] * 2
    with Watch() as watch:
        done = step(parts, 1e-3, step_weights(config, cache.domains, 1))
        window.add_norm(done.norm, 1)
    assert watch.seen == []
    with watch:
        assert window.first_bad_step() == 0
    assert watch.seen == ["_local_scalar_dense"]  # so it is seen
