"""The weights of the best measurement, in ``best-<step>/``, which ``CheckpointWriter.save_best`` writes."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from torch import nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from ddk_train.output.checkpoint import remove, trained
from ddk_train.output.sums import damage
from ddk_train.student.distributed import Ranks


class Best(NamedTuple):
    """The weights of the best measurement."""

    path: Path
    step: int
    loss: float  # mean cross-entropy on held-out text, nats


class _State(BaseModel):
    step: int
    loss: float


def best_weights(folder: Path, log: Callable[[str], None]) -> Best | None:
    """Return the weights with the lowest loss and remove all others.

    None if all are damaged.
    """
    intact = []
    for path in folder.glob("best-*"):
        if problem := "is a link" if path.is_symlink() else next(damage(path), None):
            log(f"damaged: {path.name}: {problem}; removed, so the best of the other measurements is kept")
        else:
            with suppress(ValidationError):  # a stranger's
                state = _State.model_validate_json((path / "state.json").read_bytes())
                intact.append(Best(path, state.step, state.loss))
    best = min(intact, key=lambda best: best.loss, default=None)
    for path in folder.glob("best-*"):
        if best is None or path != best.path:
            remove(path)
    return best


def load_weights(path: Path, student: nn.Module, ranks: Ranks) -> None:
    """Load the trained weights into the student."""
    weights = {f"weight/{name}": weight.detach() for name, weight in trained(student)}
    state_dict_loader.load(
        weights,
        storage_reader=HuggingFaceStorageReader(str(path)),
        process_group=ranks.on_cpu,
        no_dist=ranks.world == 1,
    )
