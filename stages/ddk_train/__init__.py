"""Stage two: train a student from a cache, choosing its data by DDK.

::

    from ddk_train import TrainConfig, train

    folder = train(TrainConfig.from_yaml("train.yaml", ["max_steps=100"]))

Progress goes to the logger ``ddk_train`` at level INFO; ``logging.basicConfig(level="INFO")`` shows it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_train.config import TrainConfig
    from ddk_train.train import train

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    """Import what a name needs when it is used, torch for ``train``, so that the command line starts fast."""
    if name == "train":  # the module, which can be called
        return import_module("ddk_train.train")
    if name == "TrainConfig":
        return import_module("ddk_train.config").TrainConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
