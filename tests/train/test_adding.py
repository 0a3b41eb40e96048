"""The examples of CONTRIBUTING.md work in the files that they name."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.losses import assert_equal_to_oracle, make_student, make_target

from ddk_train.loop.mixture import Measurement
from ddk_train.loop.schedule import SHAPES
from ddk_train.loss import chunk as loss_chunk
from ddk_train.loss import reference as loss_reference

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")


def example(file: str, name: str) -> Any:
    """Return the function that CONTRIBUTING.md adds to a file."""
    (body,) = re.findall(rf"```python\n# ddk_train/{file}\.py, and [^\n]*\n(.*?)```", PAGE, re.DOTALL)
    module = dict(vars(import_module(f"ddk_train.{file.replace('/', '.')}")))
    exec(body, module)
    return module[name]


def test_a_strategy() -> None:
    ones = np.ones(2)
    share = example("loop/mixture", "_square_root")(
        None, Measurement(("a", "b"), None, ones, ones, [900, 100])
    )
    np.testing.assert_allclose(share, [0.75, 0.25])


def test_a_shape() -> None:
    late = example("loop/schedule", "_late")
    for shape in (late, *SHAPES.values()):
        assert (shape(0), shape(1)) == pytest.approx((0, 1))
    assert late(0.5) == 0.125


def test_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, table in ((loss_chunk, "DIVERGENCES"), (loss_reference, "_DIVERGENCES")):
        name = module.__name__.removeprefix("ddk_train.").replace(".", "/")
        monkeypatch.setattr(
            module, table, {**getattr(module, table), "hellinger": example(name, "_hellinger")}
        )
    labels, target = make_target()
    settings: dict[str, Any] = {"gamma": 0.7, "divergence": "hellinger"}
    assert_equal_to_oracle(make_student(), labels, target, torch.float32, 1e-5, **settings)
