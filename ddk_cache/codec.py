"""A target <-> the integers that are stored. Plain for the time being: ids and float32 log-probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.layout import RowArray, Target

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Codebook:
    vocab_size: int

    def arrays(self) -> Arrays:
        return {"vocab_size": np.array([self.vocab_size], np.int64)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Codebook":
        return cls(int(arrays["vocab_size"][0]))


def fit(ids: NDArray[np.int32], logprobs: NDArray[np.float32], target: Target, vocab_size: int) -> Codebook:
    return Codebook(vocab_size)


def row_arrays(target: Target, seq_length: int) -> dict[str, RowArray]:
    width = seq_length * target.width
    return {
        "ids": RowArray("uint32", width, "pcodec"),
        "logprobs": RowArray("float32", width, "pcodec"),
        "tail_logprob": RowArray("float32", seq_length, "pcodec"),
    }


def encode(
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    tail_logprob: NDArray[np.float32],
    codebook: Codebook,
    target: Target,
) -> Arrays:
    n = len(ids)
    return {
        "ids": (ids + 1).astype(np.uint32).reshape(n, -1),
        "logprobs": logprobs.reshape(n, -1),
        "tail_logprob": tail_logprob,
    }


def decode(
    arrays: Mapping[str, NDArray[Any]], codebook: Codebook, target: Target, seq_length: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    shape = (-1, seq_length, target.width)
    return (
        arrays["ids"].reshape(shape).astype(np.int32) - 1,
        arrays["logprobs"].reshape(shape),
        arrays["tail_logprob"],
    )
