"""Selection and compaction kernels in the Triton language's interpreter: survivors bit for bit, features against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_errors import check
from onnx_ops import run_op
from vflow.plugins.compaction import WEIGHT_FLOOR, gather_tokens, group_tokens, keep_top, keep_top_per_cell, merge_tokens
from vflow.plugins.compaction_kernels import GATHER_TOKENS, MERGE_TOKENS
from vflow.plugins.contract import ContractError
from vflow.plugins.launch import launch
from vflow.plugins.selection_kernels import GROUP_TOKENS, KEEP_TOP, KEEP_TOP_PER_CELL

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_STEP = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one rounding of the result, and float32 sums
VALUES = [
    [0.0], [0.0, 0.5, 1.0], [-0.25, 0.0, 0.125, 1e30], [0.0, -0.0], [float("inf"), 0.5, -0.5], [float("-inf"), 1e-40, -1e-40, 0.0], None,
]  # fmt: skip
EXAMPLES = settings(max_examples=25, deadline=None)


def drawn_importance(draw: st.DrawFn, tokens: int) -> torch.Tensor:
    """Scores with many ties, both zeros, infinities, subnormal numbers, or none of these."""
    values = draw(st.sampled_from(VALUES))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return torch.tensor(rng.normal(size=tokens) if values is None else rng.choice(values, tokens), dtype=torch.float32)


@st.composite
def selections(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Importance, cell of each token, cells, count. Cells may be empty or more than tokens, as after a stage in the tower."""
    tokens, cells = draw(st.integers(1, 90)), draw(st.integers(1, 70))
    count = draw(st.one_of(st.integers(1, tokens), st.sampled_from([1, tokens])))
    cell = np.random.default_rng(draw(st.integers(0, 10_000))).integers(0, cells, tokens)
    return drawn_importance(draw, tokens), torch.tensor(cell), torch.arange(cells), count


def length(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def check_grouping(index: torch.Tensor, slot: torch.Tensor, members: torch.Tensor) -> None:
    for actual, expected in zip(launch(GROUP_TOKENS, [index, slot, members]), group_tokens(index, slot, members), strict=True):
        assert torch.equal(actual, expected)


@given(selections())
@EXAMPLES
def test_survivors_are_the_same_bit_for_bit_in_reference_function_and_kernel(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> None:
    importance, cell, cells, count = case
    expected = torch.ops.vflow.keep_top_per_cell(importance, cell, cells, length(count))
    kernel = launch(KEEP_TOP_PER_CELL, [importance, cell, cells, length(count)])
    function = run_op("KeepTopPerCell", importance, cell, cells, length(count))
    for reference, by_kernel, by_function in zip(expected, kernel, function, strict=True):
        assert torch.equal(by_kernel, reference)
        np.testing.assert_array_equal(by_function, reference)
    selected = expected[:3]
    check_grouping(*selected)
    for by_function, reference in zip(run_op("GroupTokens", *selected), group_tokens(*selected), strict=True):
        np.testing.assert_array_equal(by_function, reference)


@given(st.data())
@EXAMPLES
def test_kept_indices_are_the_same_bit_for_bit_in_reference_function_and_kernel(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 90))
    count = data.draw(st.integers(0, tokens))
    key = drawn_importance(data.draw, tokens)
    expected = keep_top(key, count)
    assert torch.equal(launch(KEEP_TOP, [key, length(count)])[0], expected)
    if count > 0:
        np.testing.assert_array_equal(run_op("KeepTop", key, length(count))[0], expected)


@pytest.mark.parametrize("tokens", [1024, 1025, 2048, 2049, 2600])
def test_selection_runs_over_several_tiles(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    importance = torch.tensor(rng.integers(0, 40, tokens), dtype=torch.float32)
    cell, cells = torch.tensor(rng.integers(0, 100, tokens)), torch.arange(100)
    for count in (1, 60, 700, tokens):
        assert torch.equal(launch(KEEP_TOP, [importance, length(count)])[0], keep_top(importance, count))
        *selected, home = torch.ops.vflow.keep_top_per_cell(importance, cell, cells, length(count))
        for actual, expected in zip(launch(KEEP_TOP_PER_CELL, [importance, cell, cells, length(count)]), (*selected, home), strict=True):
            assert torch.equal(actual, expected)
        check_grouping(*selected)


@given(selections(), st.integers(1, 50), st.sampled_from(DTYPES), st.booleans())
@EXAMPLES
def test_merged_features(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], width: int, dtype: torch.dtype, strided: bool) -> None:
    importance, cell, cells, count = case
    importance = importance.clamp(-4, 4)  # infinite scores have no weighted mean
    index, slot, members = keep_top_per_cell(importance, cell, cells, count)
    features = torch.randn(len(importance), width, generator=torch.Generator().manual_seed(width)).to(dtype)
    features = features.t().contiguous().t() if strided else features
    given = [features, importance, index, slot, members, *group_tokens(index, slot, members)]
    merged, summed = launch(MERGE_TOKENS, given, floor=WEIGHT_FLOOR)
    weight = importance.double().clamp(min=0).numpy() + WEIGHT_FLOOR
    belongs = slot.numpy()[None, :] == np.arange(count)[:, None]
    shares = belongs * weight
    expected = shares / shares.sum(1, keepdims=True) @ features.double().numpy()
    check(f"MergeTokens {dtype}", merged, expected, tolerance=HALF_STEP[dtype], floor=1.0)
    np.testing.assert_allclose(summed, (belongs * importance.double().numpy()).sum(1), atol=2e-5)
    alone = members == 1
    assert torch.equal(merged[alone], features[index][alone])


def check_merging(features: torch.Tensor, importance: torch.Tensor, slot: torch.Tensor) -> None:
    """The kernels against the references, for the slots 0, 1, …, of which each survivor is the first token."""
    survivors = int(slot.max()) + 1
    index = torch.stack([(slot == survivor).nonzero()[0, 0] for survivor in range(survivors)])
    members = torch.bincount(slot[slot >= 0], minlength=survivors)
    check_grouping(index, slot, members)
    given = [features, importance, index, slot, members, *group_tokens(index, slot, members)]
    for actual, expected in zip(launch(MERGE_TOKENS, given, floor=WEIGHT_FLOOR), merge_tokens(*given), strict=True):
        torch.testing.assert_close(actual, expected)


def test_groups_of_many_tokens_and_tokens_of_no_group() -> None:
    slot = torch.full((2500,), -1)
    slot[[0, 1023, 1024, 1777, 2499]] = 0
    slot[5] = 1
    slot[100:900] = 2
    check_merging(torch.randn(2500, 33), torch.linspace(1, 2, 2500), slot)


def test_more_large_groups_than_programs_for_them() -> None:
    """Some programs have several, with survivors that are alone between them; more survivors than are searched in two steps."""
    large = torch.arange(40) * 57
    slot = torch.cat([torch.arange(2300), large.repeat(35)])
    check_merging(torch.randn(len(slot), 5), torch.rand(len(slot)), slot)


def test_groups_of_every_size_up_to_large_ones() -> None:
    """All sizes about those at which the way of merging changes, beside each other; sums repeat bit for bit."""
    slot = torch.cat([torch.arange(40), *(torch.arange(size, 40) for size in range(1, 40))])
    check_merging(torch.randn(len(slot), 5), torch.rand(len(slot)), slot[torch.randperm(len(slot))].sort().values)


@given(
    batch=st.integers(1, 3), length=st.integers(1, 60), width=st.integers(1, 50), rotary=st.integers(1, 20), count=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES), strided=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@EXAMPLES
def test_gathered_rows_are_copies(batch: int, length: int, width: int, rotary: int, count: int, dtype: torch.dtype, strided: bool, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, cos, sin = (torch.randn(batch, length, n).to(dtype) for n in (width, rotary, rotary))
    hidden = hidden.transpose(0, 2).contiguous().transpose(0, 2) if strided else hidden
    key, index = torch.randn(length), torch.randperm(length)[: min(count, length)].sort().values
    for actual, expected in zip(launch(GATHER_TOKENS, [hidden, cos, sin, key, index]), gather_tokens(hidden, cos, sin, key, index), strict=True):
        assert torch.equal(actual, expected)


def test_rows_wider_than_a_tile_are_copied_whole() -> None:
    hidden, rotary = torch.randn(1, 3, 5000), torch.randn(1, 3, 4)
    index = torch.tensor([2, 0])
    assert torch.equal(launch(GATHER_TOKENS, [hidden, rotary, rotary, torch.zeros(3), index])[0], hidden[:, index])


def test_wide_features_are_merged_in_several_tiles() -> None:
    check_merging(torch.randn(3, 2100), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 0, 1]))


def test_inputs_on_two_devices_are_refused() -> None:
    with pytest.raises(ContractError, match="cpu, meta"):
        launch(KEEP_TOP, [torch.zeros(3), torch.zeros(2, dtype=torch.int32, device="meta")])
