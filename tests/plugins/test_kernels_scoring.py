"""The scoring kernels in the Triton language's interpreter against the formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_errors import check
from vflow.plugins.contract import ContractError
from vflow.plugins.entropy import patch_entropy
from vflow.plugins.entropy_kernels import PATCH_ENTROPY
from vflow.plugins.guidance import KEY_BLOCK, last_token_attention
from vflow.plugins.guidance_kernels import LAST_TOKEN_ATTENTION, LAST_TOKEN_LOG_SUM_EXP
from vflow.plugins.importance import masked_column_mean, row_log_sum_exp
from vflow.plugins.importance_kernels import MASKED_COLUMN_MEAN, ROW_LOG_SUM_EXP
from vflow.plugins.launch import launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = 2e-5  # float32 sums over at most 150 terms, scores up to 60 in size; measured 4e-6
FLOOR = 1e-6  # relevance below this ranks nothing
EXAMPLES = settings(max_examples=25, deadline=None)

Drawn = tuple[torch.Tensor, torch.Tensor, float, np.random.Generator]


@st.composite
def queries_and_keys(draw: st.DrawFn, square: bool = False) -> Drawn:
    """Heads, rows, patches and widths of any size, odd ones and ones included; scores flat, ordinary, or peaked."""
    heads, rows, patches = draw(st.integers(1, 3)), draw(st.integers(1, 150)), draw(st.integers(1, 150))
    width = draw(st.sampled_from([1, 8, 16, 24, 40, 72, 80]))
    size, dtype = draw(st.sampled_from([0.0, 1.0, 4.0])), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows = patches if square else rows
    query, key = (torch.tensor(rng.normal(size=(heads, n, width)) * size, dtype=torch.float32).to(dtype) for n in (rows, patches))
    if draw(st.booleans()):  # strided, as they come out of a fused projection
        query, key = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key))
    return query, key, width**-0.5, rng


def attention(query: torch.Tensor, key: torch.Tensor, scale: float, segment: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The map and its rows' log-sum-exp, in float64."""
    scores = scale * query.double().numpy() @ key.double().numpy().transpose(0, 2, 1)
    if segment is not None:
        scores = np.where(segment[:, None] == segment[None, :], scores, -np.inf)
    lse = np.logaddexp.reduce(scores, 2)
    return np.exp(scores - lse[:, :, None]), lse


@given(queries_and_keys())
@EXAMPLES
def test_row_log_sum_exp(drawn: Drawn) -> None:
    query, key, scale, _ = drawn
    _, expected = attention(query, key, scale)
    (actual,) = launch(ROW_LOG_SUM_EXP, [query, key, None], scale=scale)
    check(f"RowLogSumExp {query.dtype}", actual, expected, tolerance=TOLERANCE, floor=1.0)
    torch.testing.assert_close(actual, row_log_sum_exp(query, key, scale=scale), atol=2e-5, rtol=2e-5)


@given(queries_and_keys())
@EXAMPLES
def test_masked_column_mean(drawn: Drawn) -> None:
    query, key, scale, rng = drawn
    mask = rng.random(query.shape[1]) < rng.choice([0.02, 0.5, 1.0])
    mask[rng.integers(len(mask))] = True
    expected, lse = attention(query, key, scale)
    (actual,) = launch(MASKED_COLUMN_MEAN, [query, key, torch.tensor(lse).float(), torch.tensor(mask), None], scale=scale)
    check(f"MaskedColumnMean {query.dtype}", actual, expected[:, mask].mean(1), tolerance=TOLERANCE, floor=FLOOR)
    reference = masked_column_mean(query, key, torch.tensor(lse).float(), torch.tensor(mask), scale=scale)
    torch.testing.assert_close(actual.mean(0), reference, atol=FLOOR, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:divide by zero")  # rows beyond the last, which are not stored
@given(queries_and_keys(square=True), st.integers(1, 5))
@EXAMPLES
def test_nothing_passes_between_segments(drawn: Drawn, segments: int) -> None:
    query, key, scale, rng = drawn
    segment = rng.integers(0, segments, query.shape[1]).astype(np.int32)
    expected, expected_lse = attention(query, key, scale, segment)
    ids = torch.tensor(segment)
    (lse,) = launch(ROW_LOG_SUM_EXP, [query, key, ids], scale=scale)
    check("RowLogSumExp, segments", lse, expected_lse, tolerance=TOLERANCE, floor=1.0)
    everyone = torch.ones(query.shape[1], dtype=torch.bool)
    (mean,) = launch(MASKED_COLUMN_MEAN, [query, key, lse, everyone, ids], scale=scale)
    check("MaskedColumnMean, segments", mean, expected.mean(1), tolerance=TOLERANCE, floor=FLOOR)
    torch.testing.assert_close(lse, row_log_sum_exp(query, key, scale=scale, segment=ids), atol=2e-5, rtol=2e-5)
    reference = masked_column_mean(query, key, lse, everyone, scale=scale, segment=ids)
    torch.testing.assert_close(mean.mean(0), reference, atol=FLOOR, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_patches_score_equally(dtype: torch.dtype) -> None:
    query = torch.ones(2, 77, 16, dtype=dtype)
    (lse,) = launch(ROW_LOG_SUM_EXP, [query, query, None], scale=0.25)
    (mean,) = launch(MASKED_COLUMN_MEAN, [query, query, lse, torch.ones(77, dtype=torch.bool), None], scale=0.25)
    assert len(set(lse.flatten().tolist())) == len(set(mean.flatten().tolist())) == 1


@pytest.mark.filterwarnings("ignore:divide by zero")  # blocks without visual tokens, and heads beyond the last
@pytest.mark.filterwarnings("ignore:overflow")  # of tokens that are not visual where none is, which get a zero
@given(
    kv_heads=st.integers(1, 3), share=st.integers(1, 3), visual=st.lists(st.booleans(), min_size=1, max_size=150),
    width=st.sampled_from([8, 24, 80]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
@EXAMPLES
def test_last_token_attention(kv_heads: int, share: int, visual: list[bool], width: int, dtype: torch.dtype, seed: int) -> None:
    rng, scale = np.random.default_rng(seed), width**-0.5
    query = torch.tensor(rng.normal(size=(kv_heads * share, width)) * 2).to(dtype)
    key = torch.tensor(rng.normal(size=(kv_heads, len(visual), width)) * 2).to(dtype)
    is_visual = np.array(visual)
    given = [query, key, torch.tensor(visual)]
    (block_lse,) = launch(LAST_TOKEN_LOG_SUM_EXP, given, scale=scale)
    (actual,) = launch(LAST_TOKEN_ATTENTION, [*given, block_lse], scale=scale)
    expected = np.zeros(len(visual))
    if is_visual.any():
        shown, lse = attention(query[:, None], key[:, torch.tensor(visual)].repeat_interleave(share, 0), scale)
        expected[is_visual] = shown[:, 0].mean(0)
        check(f"LastTokenLogSumExp {dtype}", torch.logsumexp(block_lse.double(), 1), lse[:, 0], tolerance=TOLERANCE, floor=1.0)
    blocks = [is_visual[start : start + KEY_BLOCK].any() for start in range(0, len(visual), KEY_BLOCK)]
    assert (block_lse > -1e29).tolist() == [blocks] * len(query)
    check(f"LastTokenAttention {dtype}", actual, expected, tolerance=TOLERANCE, floor=FLOOR)


@pytest.mark.filterwarnings("ignore:divide by zero")  # heads beyond the last, which are not stored
def test_more_blocks_of_keys_than_are_read_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    length = 65 * KEY_BLOCK + 3
    query, key = torch.randn(2, 8, generator=generator).half(), torch.randn(1, length, 8, generator=generator).half()
    given = [query, key, torch.arange(length) % 5 > 0]
    (block_lse,) = launch(LAST_TOKEN_LOG_SUM_EXP, given, scale=1.0)
    (actual,) = launch(LAST_TOKEN_ATTENTION, [*given, block_lse], scale=1.0)
    torch.testing.assert_close(actual, last_token_attention(*given, scale=1.0), atol=1e-8, rtol=2e-5)


@given(patches=st.integers(1, 5), side=st.sampled_from([1, 4, 14]), levels=st.sampled_from([1, 2, 7, 256]), seed=st.integers(0, 1000))
@EXAMPLES
def test_patch_entropy(patches: int, side: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.choice(rng.integers(0, 256, levels), (patches, 3, 2 * side * side))
    mean, deviation = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])
    normalised = (pixels / 255 - mean[:, None]) / deviation[:, None]
    inputs = [torch.tensor(x, dtype=torch.float32) for x in (normalised.reshape(patches, -1), mean, deviation)]
    expected = []
    for grey in pixels.sum(1) // 3:
        share = np.bincount(grey, minlength=256) / grey.size
        expected.append(-sum(p * np.log2(p) for p in share if p > 0))
    check("PatchEntropy torch.float32", launch(PATCH_ENTROPY, inputs)[0], expected, tolerance=1e-5, floor=1e-2)
    check("PatchEntropy, reference", patch_entropy(*inputs), expected, tolerance=1e-5, floor=1e-2)


def test_pixels_beyond_the_range_are_clipped() -> None:
    patches = torch.tensor([[-9.0, 9.0] * 3])  # far below black and far above white: two levels
    assert launch(PATCH_ENTROPY, [patches, torch.full((3,), 0.5), torch.full((3,), 0.25)])[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(1, 4, 8), torch.zeros(2, 4, 8), None], "key"),
        ([torch.zeros(1, 4, 8), torch.zeros(1, 4, 9), None], "D = 8"),
        ([torch.zeros(4, 8), torch.zeros(1, 4, 8), None], "2 dimensions"),
        ([torch.zeros(1, 4, 8, dtype=torch.float64), torch.zeros(1, 4, 8, dtype=torch.float64), None], "float64"),
        ([torch.zeros(1, 4, 8), torch.zeros(1, 4, 8).half(), None], "key must be torch.float32"),
        ([torch.zeros(1, 4, 8), None, None], "key: missing"),
        ([torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)], "takes 3 inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: list[torch.Tensor | None], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        launch(ROW_LOG_SUM_EXP, inputs, scale=1.0)


def test_segments_need_a_row_for_every_patch() -> None:
    with pytest.raises(ValueError, match="must match"):
        row_log_sum_exp(torch.zeros(1, 4, 8), torch.zeros(1, 5, 8), scale=1.0, segment=torch.zeros(5, dtype=torch.int32))
