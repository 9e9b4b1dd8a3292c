"""Scoring: the reference and the ONNX function bodies against the explicit attention map in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_ops import run_op
from vflow.plugins.importance import add_entropy, context_relevance, masked_column_mean, row_log_sum_exp

# Worst relative error of a column mean, of columns that receive at least a twentieth of the average (the extra key's score is chosen for
# these; what lies below is not selected). A score s is rounded by |s| · 2⁻²⁴ or |s| · 2⁻¹¹, and exp makes a relative error of that: so the
# error grows with the largest score. Worst seen over 600 random cases, scores up to 10: 4e-6 and 6e-3; up to 80: 3.5e-5 and 5.8e-2.
RELATIVE = {torch.float32: (1e-5, 5e-7), torch.float16: (2e-3, 8e-4)}  # at scores of 0, and more for each unit of the largest score


def tolerance(dtype: torch.dtype, peak: float) -> float:
    base, slope = RELATIVE[dtype]
    return base + slope * peak


def attention_map(query: NDArray[np.float64], key: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    scores = np.einsum("hrd,hpd->hrp", query.astype(np.float64), key.astype(np.float64)) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def explicit_relevance(query: NDArray[np.float64], key: NDArray[np.float64], scale: float, threshold: float) -> NDArray[np.float64]:
    """Sections 1.1 to 1.4 of the method, with the map."""
    mean_map = attention_map(query, key, scale).mean(0)  # [P, P]
    received = mean_map.sum(0)
    rows = [k for k, value in enumerate(received) if value > threshold] or [int(received.argmax())]
    return mean_map[rows].mean(0)


def draw(heads: int, rows: int, keys: int, width: int, peak: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and keys whose scaled scores reach about ±``peak``; rounded to float16, so that both precisions get the same numbers."""
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(heads, rows, width)), rng.normal(size=(heads, keys, width))
    scale = width**-0.5
    size = (peak / (np.abs(np.einsum("hrd,hpd->hrp", query, key)).max() * scale)) ** 0.5
    return torch.tensor(query * size).half().float(), torch.tensor(key * size).half().float(), scale


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    floor = expected.mean() / 20
    return float((np.abs(actual - expected) / np.maximum(expected, floor)).max())


def onnx_relevance(query: torch.Tensor, key: torch.Tensor, scale: float, is_global: torch.Tensor) -> NDArray[np.float32]:
    """Context relevance over the function bodies, with the global set given: near the threshold a rounding decides who is in it."""
    (lse,) = run_op("RowLogSumExp", query, key, scale=scale)
    return run_op("MaskedColumnMean", query, key, lse, is_global, scale=scale)[0].mean(0)


def global_set(query: torch.Tensor, key: torch.Tensor, scale: float, threshold: float) -> torch.Tensor:
    received = context_relevance(query, key, scale=scale, global_threshold=0.0) * query.shape[1]
    return (received > threshold) | (received >= received.max())


SIZES = {
    "heads": st.integers(1, 4),
    "width": st.sampled_from([4, 8, 16, 80]),
    "peak": st.sampled_from([0.0, 1.0, 10.0, 80.0]),
    "threshold": st.sampled_from([0.0, 0.5, 1.0, 1.7, 50.0]),
    "seed": st.integers(0, 10_000),
}


@given(patches=st.integers(1, 300), **SIZES)
def test_reference_is_the_explicit_map(patches: int, heads: int, width: int, peak: float, threshold: float, seed: int) -> None:
    query, key, scale = draw(heads, patches, patches, width, peak, seed)
    expected = explicit_relevance(query.numpy(), key.numpy(), scale, threshold)
    assert relative_error(context_relevance(query, key, scale=scale, global_threshold=threshold).numpy(), expected) <= tolerance(torch.float32, peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@given(patches=st.integers(1, 120), **SIZES)
def test_function_bodies_are_the_reference(
    dtype: torch.dtype, patches: int, heads: int, width: int, peak: float, threshold: float, seed: int
) -> None:
    query, key, scale = draw(heads, patches, patches, width, peak, seed)
    reference = context_relevance(query, key, scale=scale, global_threshold=threshold).double().numpy()
    actual = onnx_relevance(query.to(dtype), key.to(dtype), scale, global_set(query, key, scale, threshold))
    assert relative_error(actual, reference) <= tolerance(dtype, peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("peak", [0.0, 5.0, 80.0])
def test_row_log_sum_exp_takes_fewer_rows_than_keys(dtype: torch.dtype, peak: float) -> None:
    query, key, scale = draw(3, 7, 50, 16, peak, seed=4)
    expected = torch.logsumexp(query.double() @ key.double().transpose(1, 2) * scale, -1).numpy()
    np.testing.assert_allclose(row_log_sum_exp(query, key, scale=scale).numpy(), expected, rtol=1e-6, atol=1e-5)
    actual = run_op("RowLogSumExp", query.to(dtype), key.to(dtype), scale=scale)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance(dtype, peak))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_column_mean_of_one_masked_row_is_that_row(dtype: torch.dtype) -> None:
    query, key, scale = draw(2, 9, 30, 8, 6.0, seed=5)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[4] = True
    lse = row_log_sum_exp(query, key, scale=scale)
    expected = attention_map(query.numpy(), key.numpy(), scale)[:, 4].mean(0)
    assert relative_error(masked_column_mean(query, key, lse, mask, scale=scale).numpy(), expected) <= tolerance(torch.float32, 6.0)
    actual = run_op("MaskedColumnMean", query.to(dtype), key.to(dtype), lse, mask, scale=scale)[0].mean(0)
    assert relative_error(actual, expected) <= tolerance(dtype, 6.0)


def test_scoring_is_chunked_without_a_seam() -> None:
    query, key, scale = draw(2, 600, 600, 8, 8.0, seed=6)
    for threshold in (0.0, 2.0):
        expected = explicit_relevance(query.numpy(), key.numpy(), scale, threshold)
        found = context_relevance(query, key, scale=scale, global_threshold=threshold).numpy()
        assert relative_error(found, expected) <= tolerance(torch.float32, 8.0)


def test_empty_global_set_falls_back_to_the_most_attended_patch() -> None:
    query, key, scale = draw(2, 40, 40, 8, 3.0, seed=7)
    mean_map = attention_map(query.numpy(), key.numpy(), scale).mean(0)
    most_attended = int(mean_map.sum(0).argmax())
    relevance = context_relevance(query, key, scale=scale, global_threshold=50.0).numpy()
    assert np.isfinite(relevance).all()
    np.testing.assert_allclose(relevance, mean_map[most_attended], rtol=1e-5)


def test_threshold_zero_is_plain_received_attention() -> None:
    query, key, scale = draw(2, 40, 40, 8, 3.0, seed=8)
    received = attention_map(query.numpy(), key.numpy(), scale).mean(0).sum(0)
    np.testing.assert_allclose(context_relevance(query, key, scale=scale, global_threshold=0.0).numpy() * 40, received, rtol=1e-5)


@given(patches=st.integers(1, 200), threshold=st.sampled_from([0.0, 1.2, 50.0]), seed=st.integers(0, 10_000))
def test_relevance_sums_to_one(patches: int, threshold: float, seed: int) -> None:
    query, key, scale = draw(2, patches, patches, 8, 5.0, seed)
    assert float(context_relevance(query, key, scale=scale, global_threshold=threshold).sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_patches_are_equally_important(dtype: torch.dtype) -> None:
    query, key = torch.ones(2, 25, 8), torch.ones(2, 25, 8)
    reference = context_relevance(query, key, scale=0.3, global_threshold=2.0)
    assert len(set(reference.tolist())) == 1
    assert len(set(onnx_relevance(query.to(dtype), key.to(dtype), 0.3, torch.ones(25, dtype=torch.bool)).tolist())) == 1


def test_half_precision_reference_accumulates_in_float32() -> None:
    query, key, scale = draw(2, 64, 64, 16, 80.0, seed=9)
    half = context_relevance(query.half(), key.half(), scale=scale, global_threshold=0.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, context_relevance(query, key, scale=scale, global_threshold=0.0))


@pytest.mark.parametrize("weight", [-1.0, -0.3, 0.5, 1.0])
def test_entropy_is_added_as_a_weighted_softmax(weight: float) -> None:
    relevance, entropy = [0.1, 0.5, 0.4], [0.0, 3.5, 8.0]
    total = sum(math.exp(e) for e in entropy)
    expected = [c + weight * math.exp(e) / total for c, e in zip(relevance, entropy, strict=True)]
    actual = add_entropy(torch.tensor(relevance), torch.tensor(entropy), entropy_weight=weight)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)


def test_entropy_weight_zero_leaves_relevance_bit_for_bit() -> None:
    relevance = torch.rand(9)
    assert torch.equal(add_entropy(relevance, torch.full((9,), torch.nan), entropy_weight=0.0), relevance)
