"""Named arrays as one blob: safetensors behind their sha256."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

DIGEST_BYTES = 32


def to_blob(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Serialise the arrays."""
    body = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return sha256(body).digest() + body


def from_blob(blob: bytes | None) -> dict[str, NDArray[Any]] | None:
    """Return the arrays of a blob; None if it is missing or damaged."""
    if blob is None or sha256(blob[DIGEST_BYTES:]).digest() != blob[:DIGEST_BYTES]:
        return None
    arrays: dict[str, NDArray[Any]] = load(blob[DIGEST_BYTES:])
    return arrays
