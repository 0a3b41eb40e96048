"""Arrays that a build keeps for itself: safetensors behind their sha256."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

SEAL = 32  # bytes


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """All of them, by name."""
    body = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return sha256(body).digest() + body


def unpack_arrays(data: bytes | None) -> dict[str, NDArray[Any]] | None:
    """What was packed; None where there is nothing, or it is damaged."""
    if data is None or sha256(data[SEAL:]).digest() != data[:SEAL]:
        return None
    found: dict[str, NDArray[Any]] = load(data[SEAL:])
    return found
