"""Properties of the draws: shares, cyclic exhaustion, determinism, resuming."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache.sampler import SamplerState, draw, natural_share

ROWS = (700, 50, 250)


def start(rows: tuple[int, ...] = ROWS) -> SamplerState:
    return SamplerState((0,) * len(rows))


@given(st.integers(0, 2000), st.integers(0, 5), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_counts_are_the_share_rounded_up_or_down(count: int, seed: int, weights: list[float]) -> None:
    share = np.array(weights) / sum(weights)
    domain, row, state = draw(start(), share, ROWS, count, seed)
    assert len(domain) == len(row) == count
    drawn = np.bincount(domain, minlength=3)
    assert (np.abs(drawn - share * count) < 1 + 1e-6).all()
    assert state.drawn == tuple(drawn)
    assert (row >= 0).all()
    assert (row < np.array(ROWS)[domain]).all()


@given(
    st.integers(0, 900),
    st.integers(0, 5),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.integers(0, 600), min_size=2, max_size=2),
)
def test_no_domain_gives_more_than_it_may_and_the_others_give_the_rest(
    count: int, seed: int, weights: list[float], most: list[int]
) -> None:
    share = (np.array(weights) + 1e-300) / (sum(weights) + 3e-300)
    limit, seen, state = np.array([*most, 3000.0]), np.zeros(3, np.int64), start()
    for _ in range(3):
        domain, _, state = draw(state, share, ROWS, count, seed, limit)
        drawn = np.bincount(domain, minlength=3)
        assert drawn.sum() == count
        is_full = seen + drawn >= limit
        # Whoever was not cut gets what its share says, and a part of what was cut from the others.
        assert (is_full | (drawn > share * count - 1 - 1e-6)).all()
        seen += drawn
    assert (seen <= limit).all()
    assert state.drawn == tuple(seen)


def test_limits_that_are_not_reached_change_nothing() -> None:
    share = np.array([0.2, 0.6, 0.2])
    free, bound = (draw(start(), share, ROWS, 100, 4, most) for most in (None, np.full(3, 61.0)))
    np.testing.assert_array_equal(free[0], bound[0])
    np.testing.assert_array_equal(free[1], bound[1])


def test_all_that_may_be_given_can_be_drawn() -> None:
    share = np.array([1.0, 0.0, 1e-30])  # 0: so little that it is no number any more
    domain, row, _ = draw(start(), share, ROWS, 1000, 0, np.array(ROWS, float))
    assert [sorted(row[domain == number]) for number in range(3)] == [list(range(n)) for n in ROWS]


def test_rounding_is_right_on_average() -> None:
    share = np.array([0.31, 0.62, 0.07])
    seen = sum(np.bincount(draw(start(), share, ROWS, 5, seed)[0], minlength=3) for seed in range(4000))
    standard_error = np.sqrt(4000 * 0.25)  # a count is one of two neighbours: its variance is at most 1/4
    np.testing.assert_allclose(seen, share * 5 * 4000, atol=4 * standard_error)


def test_a_domain_is_used_up_before_it_starts_over() -> None:
    state, seen = start(), []
    for _ in range(7):
        domain, row, state = draw(state, np.array([0.2, 0.6, 0.2]), ROWS, 40, 3)
        seen.append(row[domain == 1])
    counts = np.bincount(np.concatenate(seen), minlength=50)
    assert counts.sum() == 7 * 24
    assert set(counts) <= {3, 4}  # 168 draws of 50 rows: three whole passes and a part of the fourth


def test_passes_are_shuffled_anew() -> None:
    _, first, state = draw(start((40,)), np.ones(1), (40,), 40, 0)
    _, second, _ = draw(state, np.ones(1), (40,), 40, 0)
    assert sorted(first) == sorted(second) == list(range(40))
    assert (first != second).any()


def test_resuming_from_json_continues_the_same_draws() -> None:
    share = natural_share(ROWS)
    _, _, state = draw(start(), share, ROWS, 100, 9)
    again = SamplerState.from_json(state.to_json())
    for one, other in zip(
        draw(state, share, ROWS, 64, 9)[:2], draw(again, share, ROWS, 64, 9)[:2], strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_draws_depend_on_the_seed_and_the_interval() -> None:
    share = natural_share(ROWS)
    first = draw(start(), share, ROWS, 100, 1)
    assert (first[1] != draw(start(), share, ROWS, 100, 2)[1]).any()
    assert (first[1] != draw(first[2], share, ROWS, 100, 1)[1]).any()
