"""Text guidance: one row of attention against the formula in float64, reference and ONNX function body."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_ops import run_op
from torch import Tensor
from vflow.plugins.guidance import KEY_BLOCK, last_token_attention


def explicit(query: torch.Tensor, key: torch.Tensor, visual: list[bool], scale: float) -> NDArray[np.float64]:
    q, k = query.double().numpy(), key.double().numpy()
    share = q.shape[0] // k.shape[0]
    total = np.zeros(len(visual))
    places = [j for j, is_visual in enumerate(visual) if is_visual]
    for head in range(q.shape[0]):
        scores = np.array([scale * q[head] @ k[head // share, j] for j in places])
        weights = np.exp(scores - scores.max(initial=-np.inf))
        for j, weight in zip(places, weights / weights.sum(), strict=True):
            total[j] += weight / q.shape[0]
    return total


def by_functions(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> NDArray[np.float32]:
    """What the ONNX function bodies compute; those of the blocks are held to the operator on the way."""
    (block_lse,) = run_op("LastTokenLogSumExp", query, key, mask, scale=scale)
    np.testing.assert_allclose(block_lse, torch.ops.vflow.last_token_log_sum_exp(query, key, mask, scale), rtol=2e-5, atol=2e-5)
    attention: NDArray[np.float32] = run_op("LastTokenAttention", query, key, mask, block_lse, scale=scale)[0]
    return attention


@pytest.mark.parametrize("length", [1, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1, 3 * KEY_BLOCK])
def test_keys_in_blocks_are_the_formula(length: int) -> None:
    """Blocks that are full or not, and one without visual tokens."""
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(6, 8, generator=generator), torch.randn(2, length, 8, generator=generator)
    mask = torch.arange(length) % 3 < 2
    mask[KEY_BLOCK : 2 * KEY_BLOCK] = False
    expected = explicit(query, key, mask.tolist(), 0.25)
    np.testing.assert_allclose(last_token_attention(query, key, mask, scale=0.25), expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(by_functions(query, key, mask, 0.25), expected, rtol=2e-5, atol=1e-7)


@given(
    kv_heads=st.integers(1, 3), share=st.integers(1, 3), visual=st.lists(st.booleans(), min_size=1, max_size=40),
    size=st.sampled_from([0.0, 1.0, 6.0]), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_both_forms_are_the_formula(kv_heads: int, share: int, visual: list[bool], size: float, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = (torch.randn(kv_heads * share, 8, generator=generator) * size).to(dtype)
    key = (torch.randn(kv_heads, len(visual), 8, generator=generator) * size).to(dtype)
    mask = torch.tensor(visual)
    expected = explicit(query, key, visual, 0.25)
    reference = last_token_attention(query, key, mask, scale=0.25)
    assert reference.dtype == torch.float32
    np.testing.assert_allclose(reference, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(by_functions(query, key, mask, 0.25), reference, rtol=2e-5, atol=1e-7)


def test_without_a_visual_token_guidance_is_zero_and_finite() -> None:
    query, key, mask = torch.ones(2, 4), torch.ones(1, 3, 4), torch.zeros(3, dtype=torch.bool)
    assert last_token_attention(query, key, mask, scale=1.0).tolist() == [0.0, 0.0, 0.0]
    assert by_functions(query, key, mask, 1.0).tolist() == [0.0, 0.0, 0.0]


def test_guidance_sums_to_one_over_the_visual_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([False, True, True, False, True])
    guide = last_token_attention(torch.randn(4, 8, generator=generator), torch.randn(2, 5, 8, generator=generator), mask, scale=0.5)
    assert float(guide[mask].sum()) == pytest.approx(1.0, abs=1e-6)
    assert guide[~mask].tolist() == [0.0, 0.0]
