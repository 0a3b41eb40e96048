"""Properties of the draws: shares, cyclic exhaustion, determinism, resuming."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddk_cache.sampler import RowSampler, SamplerState, natural_share

ROWS = (700, 50, 250)


def start(rows: tuple[int, ...] = ROWS) -> SamplerState:
    return SamplerState((0,) * len(rows))


@given(st.integers(0, 2000), st.integers(0, 5), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_counts_are_the_share_rounded_up_or_down(count: int, seed: int, weights: list[float]) -> None:
    share = np.array(weights) / sum(weights)
    domain, row, state = RowSampler(ROWS, seed).draw(start(), share, count)
    assert len(domain) == len(row) == count
    drawn = np.bincount(domain, minlength=3)
    assert (np.abs(drawn - share * count) < 1 + 1e-6).all()
    assert state.drawn == tuple(drawn)
    assert (row >= 0).all()
    assert (row < np.array(ROWS)[domain]).all()


@given(
    st.integers(1, 900),
    st.integers(0, 5),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.integers(0, 600), min_size=2, max_size=2),
)
def test_no_domain_exceeds_its_limit_and_the_others_give_the_rest(
    count: int, seed: int, weights: list[float], most: list[int]
) -> None:
    share = (np.array(weights) + 1e-300) / (sum(weights) + 3e-300)
    limit, seen, state = np.array([*most, 3000.0]), np.zeros(3, np.int64), start()
    for left in (3, 2, 1):
        domain, _, state = RowSampler(ROWS, seed, limit, 3 * count).draw(state, share, count)
        drawn = np.bincount(domain, minlength=3)
        assert drawn.sum() == count
        bound = np.ceil((limit - seen) / left)
        assert (drawn <= bound).all()
        # A domain below its bound gives its share, and part of what the others cannot.
        assert ((drawn == bound) | (drawn > share * count - 1 - 1e-6)).all()
        seen += drawn
    assert (seen <= limit).all()
    assert state.drawn == tuple(seen)


def test_a_domain_without_rows_gives_none() -> None:
    domain, row, _ = RowSampler((4, 0), 0).draw(start((4, 0)), natural_share((4, 0)), 8)
    assert (domain == 0).all()
    assert sorted(row) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_limits_that_are_not_reached_change_nothing() -> None:
    share = np.array([0.2, 0.6, 0.2])
    free, bound = (
        RowSampler(ROWS, 4, limit, 100).draw(start(), share, 100) for limit in (None, np.full(3, 61.0))
    )
    np.testing.assert_array_equal(free[0], bound[0])
    np.testing.assert_array_equal(free[1], bound[1])


def test_a_limit_is_spread_over_the_run() -> None:
    state, seen = start(), []
    for _ in range(10):
        domain, _, state = RowSampler(ROWS, 0, np.array([np.inf, 100, np.inf]), 1000).draw(
            state, np.full(3, 1 / 3), 100
        )
        seen.append(int((domain == 1).sum()))
    assert seen == [10] * 10


def test_everything_up_to_the_limits_can_be_drawn() -> None:
    share = np.array([1.0, 0.0, 1e-30])  # a share can underflow to 0
    domain, row, _ = RowSampler(ROWS, 0, np.array(ROWS, float), 1000).draw(start(), share, 1000)
    assert [sorted(row[domain == index]) for index in range(3)] == [list(range(n)) for n in ROWS]


def test_rounding_is_right_on_average() -> None:
    share = np.array([0.31, 0.62, 0.07])
    seen = sum(
        np.bincount(RowSampler(ROWS, seed).draw(start(), share, 5)[0], minlength=3) for seed in range(4000)
    )
    standard_error = np.sqrt(4000 * 0.25)  # a count is one of two neighbours: its variance is at most 1/4
    np.testing.assert_allclose(seen, share * 5 * 4000, atol=4 * standard_error)


def test_a_domain_is_used_up_before_it_starts_over() -> None:
    state, seen = start(), []
    for _ in range(7):
        domain, row, state = RowSampler(ROWS, 3).draw(state, np.array([0.2, 0.6, 0.2]), 40)
        seen.append(row[domain == 1])
    counts = np.bincount(np.concatenate(seen), minlength=50)
    assert counts.sum() == 7 * 24
    assert set(counts) <= {3, 4}  # 168 draws of 50 rows: three whole passes and a part of the fourth


def test_every_pass_has_its_own_shuffle() -> None:
    _, first, state = RowSampler((40,), 0).draw(start((40,)), np.ones(1), 40)
    _, second, _ = RowSampler((40,), 0).draw(state, np.ones(1), 40)
    assert sorted(first) == sorted(second) == list(range(40))
    assert (first != second).any()


def test_draws_depend_on_the_seed_and_the_interval() -> None:
    share = natural_share(ROWS)
    first = RowSampler(ROWS, 1).draw(start(), share, 100)
    assert (first[1] != RowSampler(ROWS, 2).draw(start(), share, 100)[1]).any()
    assert (first[1] != RowSampler(ROWS, 1).draw(first[2], share, 100)[1]).any()
