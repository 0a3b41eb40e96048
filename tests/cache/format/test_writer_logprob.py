"""The writer's log-probabilities come back to half a step."""

import numpy as np

from ddk_cache.format import writer_logprob


def test_a_round_trip_is_within_half_a_step() -> None:
    values = np.concatenate([-np.random.default_rng(0).exponential(2.0, 1000), [0, -1e-9, -200]])
    again = writer_logprob.decode(writer_logprob.encode(values.astype(np.float32)))
    assert again.dtype == np.float32
    assert np.abs(again - values).max() <= 0.5 / writer_logprob.STEPS + 1e-5
    assert not np.signbit(again[again == 0]).any()


def test_what_is_beyond_the_grid_is_at_its_end() -> None:
    values = np.array([-1000, -np.inf, 1e-4], np.float32)
    end = -writer_logprob.LARGEST / writer_logprob.STEPS
    assert writer_logprob.decode(writer_logprob.encode(values)).tolist() == [end, end, 0]
