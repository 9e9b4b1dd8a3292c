"""The next token: greedy, the three filters, seeds, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vflow.engines import EngineError, SamplingParams
from vflow.engines.sampling import next_token

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def draws(params: SamplingParams, logits: np.ndarray = LOGITS, count: int = 4000) -> Counter[int]:
    generator = np.random.default_rng(0)
    return Counter(next_token(logits, params, generator) for _ in range(count))


def test_greedy_takes_the_largest_and_the_lower_index_among_equals() -> None:
    assert draws(SamplingParams(), count=5) == {1: 5}
    assert next_token(np.array([1, 3, 3], np.float32), SamplingParams(), np.random.default_rng()) == 1


def test_temperature_one_draws_by_probability() -> None:
    seen = draws(SamplingParams(temperature=1.0))
    np.testing.assert_allclose([seen[i] / 4000 for i in range(4)], [0.1, 0.4, 0.2, 0.3], atol=0.03)


def test_low_temperature_sharpens() -> None:
    seen = draws(SamplingParams(temperature=0.25))
    expected = np.array([0.1, 0.4, 0.2, 0.3]) ** 4
    np.testing.assert_allclose([seen[i] / 4000 for i in range(4)], expected / expected.sum(), atol=0.03)


def test_top_k_leaves_the_k_most_probable() -> None:
    assert set(draws(SamplingParams(temperature=5.0, top_k=2))) == {1, 3}


@pytest.mark.parametrize(("top_p", "left"), [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.75, {1, 3, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_leaves_the_fewest_that_reach_it(top_p: float, left: set[int]) -> None:
    assert set(draws(SamplingParams(temperature=1.0, top_p=top_p))) == left


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    assert set(draws(SamplingParams(temperature=2.0), logits)) == {1, 3}


def test_huge_logits_and_tiny_temperatures_do_not_overflow() -> None:
    assert draws(SamplingParams(temperature=1e-6), np.array([1e30, -1e30], np.float32), count=3) == {0: 3}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20), st.floats(0, 3), st.integers(0, 25), st.floats(0.01, 1), st.integers(0, 2**32)
)
def test_same_seed_same_token_and_always_a_token(logits: list[float], temperature: float, top_k: int, top_p: float, seed: int) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    first, second = (next_token(np.array(logits, np.float32), params, np.random.default_rng(seed)) for _ in range(2))
    assert first == second and 0 <= first < len(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(temperature: float, bad: float) -> None:
    with pytest.raises(EngineError, match=r"not finite.*--precision fp32"):
        next_token(np.array([0, bad, 1], np.float32), SamplingParams(temperature=temperature), np.random.default_rng())


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.9), seed=np.int64(3))  # type: ignore[arg-type]
    assert next_token(LOGITS, params, np.random.default_rng(3)) in range(4)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1, float("nan"), "1", True, 10**400]),
        ("top_k", [-1, 1.5, True]),
        ("top_p", [0, 1.1, float("nan"), 10**400]),
        ("seed", [-1, 0.5]),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(EngineError, match=f"^{field} must be"):
            SamplingParams(**{field: value})


def test_among_equals_the_lower_index_ranks_first_in_a_large_vocabulary() -> None:
    assert draws(SamplingParams(temperature=1.0, top_k=1), np.zeros(100, np.float32), count=5) == {0: 5}
