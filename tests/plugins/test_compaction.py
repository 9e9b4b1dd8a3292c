"""Compaction: the definition of the exact budget in plain Python, its invariants, and the ONNX function bodies bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx_ops import run_op
from vflow.exporter.schedule import cell_count, cell_of, keep_count
from vflow.plugins.compaction import WEIGHT_FLOOR, gather_tokens, group_tokens, keep_top, keep_top_per_cell, merge_tokens

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]


def explicit_keep_top_per_cell(importance: list[float], cell: list[int], cells: int, count: int) -> tuple[list[int], list[int]]:
    """Section 2 of the method, sentence by sentence."""
    order = sorted(range(len(importance)), key=lambda i: (-importance[i], i))
    kept = order[: max(0, count - cells)]
    others = [i for i in order if i not in kept]
    representative: dict[int, int] = {}
    for i in others:
        representative.setdefault(cell[i], i)
    representatives = [i for i in others if representative[cell[i]] == i]
    rest = [i for i in others if representative[cell[i]] != i]
    index = sorted((kept + representatives + rest)[:count])
    slot = []
    for i in range(len(importance)):
        home = i if i in index else representative.get(cell[i], -1)
        slot.append(index.index(home) if home in index else -1)
    return index, slot


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A grid of tokens with its cells, and a count; importances with many ties, or none, or all equal, some negative."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    side = draw(st.integers(1024, 12 * 1024))
    across = cell_count(columns, side)
    cell = [cell_of(r, side) * across + cell_of(c, side) for r in range(rows) for c in range(columns)]
    tokens = rows * columns
    count = draw(st.one_of(st.integers(1, tokens), st.sampled_from([1, tokens])))
    values = draw(st.sampled_from([[0.0], [0.0, 0.5, 1.0], [-0.25, 0.0, 0.125, 1e30], None]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    importance = rng.normal(size=tokens) if values is None else rng.choice(values, tokens)
    cells = torch.arange(cell_count(rows, side) * across)
    return torch.tensor(importance, dtype=torch.float32), torch.tensor(cell), cells, count


@given(cases())
def test_survivors_and_slots_are_those_of_the_definition(case: Case) -> None:
    importance, cell, cells, count = case
    index, slot, members = keep_top_per_cell(importance, cell, cells, count)
    assert (index.tolist(), slot.tolist()) == explicit_keep_top_per_cell(importance.tolist(), cell.tolist(), len(cells), count)
    assert members.tolist() == [slot.tolist().count(place) for place in range(count)]


@given(cases())
def test_function_body_selects_the_same_tokens(case: Case) -> None:
    importance, cell, cells, count = case
    survivors = torch.zeros(count, dtype=torch.int32)
    actual = run_op("KeepTopPerCell", importance, cell, cells, survivors)
    for array, expected in zip(actual, torch.ops.vflow.keep_top_per_cell(importance, cell, cells, survivors), strict=True):
        np.testing.assert_array_equal(array, expected)


@given(cases())
def test_exactly_the_budget_survives_in_ascending_order(case: Case) -> None:
    index, slot, _ = keep_top_per_cell(*case)
    assert len(index) == case[3]
    assert index.tolist() == sorted(set(index.tolist()))
    assert slot[index].tolist() == list(range(case[3]))


@given(cases())
def test_the_most_important_tokens_are_always_kept(case: Case) -> None:
    importance, cell, cells, count = case
    index, _, _ = keep_top_per_cell(importance, cell, cells, count)
    certain = max(0, count - len(cells))
    order = torch.sort(importance, descending=True, stable=True).indices
    assert set(order[:certain].tolist()) <= set(index.tolist())


@given(cases())
def test_what_is_merged_goes_to_one_representative_of_its_cell(case: Case) -> None:
    importance, cell, cells, count = case
    index, slot, _ = keep_top_per_cell(importance, cell, cells, count)
    dropped = [i for i in range(len(slot)) if i not in set(index.tolist())]
    homes: dict[int, set[int]] = {}
    for i in dropped:
        homes.setdefault(int(cell[i]), set()).add(int(slot[i]))
    assert all(len(places) == 1 for places in homes.values())
    for where, places in homes.items():
        for place in places - {-1}:
            assert int(cell[index[place]]) == where
    home = torch.ops.vflow.keep_top_per_cell(importance, cell, cells, torch.zeros(count, dtype=torch.int32))[3]
    assert all(places == {int(home[where])} for where, places in homes.items())


@given(cases())
def test_tokens_are_grouped_by_survivor_in_both_forms(case: Case) -> None:
    index, slot, members = keep_top_per_cell(*case)
    groups = [[i for i, place in enumerate(slot.tolist()) if place == survivor] for survivor in (*range(case[3]), -1)]
    expected = [token for group in groups for token in group], [sum(map(len, groups[:survivor])) for survivor in range(case[3])]
    assert tuple(x.tolist() for x in group_tokens(index, slot, members)) == expected
    assert tuple(x.tolist() for x in run_op("GroupTokens", index, slot, members)) == expected


def test_members_of_a_cell_without_surviving_representative_are_dropped() -> None:
    importance = torch.tensor([4.0, 3.0, 2.0, 1.0])
    index, slot, members = keep_top_per_cell(importance, torch.tensor([0, 0, 1, 1]), torch.arange(2), 1)
    assert (index.tolist(), slot.tolist(), members.tolist()) == ([0], [0, 0, -1, -1], [2])


def test_all_equal_importance_keeps_the_lowest_indices() -> None:
    importance = torch.zeros(6)
    assert keep_top(importance, 4).tolist() == [0, 1, 2, 3]
    index, slot, members = keep_top_per_cell(importance, torch.tensor([0, 0, 0, 1, 1, 1]), torch.arange(2), 3)
    assert (index.tolist(), slot.tolist(), members.tolist()) == ([0, 1, 3], [0, 1, 1, 2, 2, 2], [1, 2, 3])  # 0 is kept, 1 and 3 stand for their cells


@given(st.lists(st.sampled_from([0.0, 0.5, 2.0, -1.0, math.inf]), min_size=1, max_size=40), st.data())
def test_keep_top_breaks_ties_to_the_lower_index_in_both_forms(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    key = torch.tensor(values)
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert keep_top(key, count).tolist() == expected
    assert run_op("KeepTop", key, np.zeros(count, np.int32))[0].tolist() == expected


@pytest.mark.parametrize("tokens", [1, 300, 5000])
def test_ties_are_broken_alike_at_any_size(tokens: int) -> None:
    key = torch.tensor(np.random.default_rng(0).integers(0, 9, tokens), dtype=torch.float32)
    for count in {1, (tokens + 1) // 2, tokens}:
        np.testing.assert_array_equal(run_op("KeepTop", key, np.zeros(count, np.int32))[0], keep_top(key, count))


@given(cases())
def test_keep_1024_changes_nothing_bit_for_bit(case: Case) -> None:
    importance, cell, cells, _ = case
    tokens = len(importance)
    count = keep_count(tokens, 1024)
    features = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(0)).half()
    index, slot, members = keep_top_per_cell(importance, cell, cells, count)
    merged, summed = merge_tokens(features, importance, index, slot, members, *group_tokens(index, slot, members))
    assert torch.equal(index, torch.arange(tokens))
    assert torch.equal(slot, torch.arange(tokens))
    assert torch.equal(merged, features)
    assert torch.equal(summed, importance)
    assert members.tolist() == [1] * tokens
    *selected, _ = run_op("KeepTopPerCell", importance, cell, cells, np.zeros(count, np.int32))
    exported = run_op("MergeTokens", features, importance, *selected, *run_op("GroupTokens", *selected), floor=WEIGHT_FLOOR)
    assert exported[0].tobytes() == features.numpy().tobytes()


@given(cases(), st.integers(1, 5))
def test_merged_features_are_the_weighted_means_of_the_definition(case: Case, width: int) -> None:
    importance, cell, cells, count = case
    index, slot, members = keep_top_per_cell(importance, cell, cells, count)
    features = torch.randn(len(importance), width, generator=torch.Generator().manual_seed(1))
    merged, summed = merge_tokens(features, importance, index, slot, members, *group_tokens(index, slot, members))
    for place, survivor in enumerate(index.tolist()):
        group = [i for i in range(len(slot)) if slot[i] == place]
        weights = [max(float(importance[i]), 0.0) + WEIGHT_FLOOR for i in group]
        expected = sum(w * features[i].double() for w, i in zip(weights, group, strict=True)) / sum(weights)
        torch.testing.assert_close(merged[place].double(), expected if len(group) > 1 else features[survivor].double(), rtol=1e-5, atol=1e-6)
        assert int(members[place]) == len(group)
        assert float(summed[place]) == pytest.approx(sum(float(importance[i]) for i in group), rel=1e-5, abs=1e-6)
        low, high = features[group].min(0).values, features[group].max(0).values  # a convex combination stays between its parts
        assert ((merged[place] >= low - 1e-5) & (merged[place] <= high + 1e-5)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])  # fp16: one rounding of the result, 2⁻¹¹ of up to 4
@given(case=cases())
def test_function_body_merges_the_same(dtype: torch.dtype, tolerance: float, case: Case) -> None:
    importance, cell, cells, count = case
    index, slot, members = keep_top_per_cell(importance, cell, cells, count)
    features = torch.randn(len(importance), 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    merged, summed = merge_tokens(features, importance, index, slot, members, *group_tokens(index, slot, members))
    actual = run_op("MergeTokens", features, importance, index, slot, members, *group_tokens(index, slot, members), floor=WEIGHT_FLOOR)
    assert actual[0].dtype == features.numpy().dtype
    np.testing.assert_allclose(actual[0].astype(float), merged.double(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(actual[1], summed, rtol=1e-6, atol=1e-6)
    alone = members.numpy() == 1
    np.testing.assert_array_equal(actual[0][alone], features.numpy()[index.numpy()][alone])


def test_a_cell_of_zero_or_negative_importance_still_has_a_mean() -> None:
    features = torch.tensor([[1.0], [3.0], [8.0]])
    importance = torch.tensor([0.0, -2.0, -5.0])
    index, slot, members = keep_top_per_cell(importance, torch.zeros(3, dtype=torch.long), torch.arange(1), 1)
    merged, _ = merge_tokens(features, importance, index, slot, members, *group_tokens(index, slot, members))
    assert merged.tolist() == [[4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gathering_takes_the_same_rows_of_everything(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, cos, sin = (torch.randn(1, 7, width, generator=generator).to(dtype) for width in (5, 3, 3))
    key, index = torch.randn(7, generator=generator), torch.tensor([0, 3, 6])
    kept = gather_tokens(hidden, cos, sin, key, index)
    for tensor, expected in zip(kept, (hidden[:, index], cos[:, index], sin[:, index], key[index]), strict=True):
        assert torch.equal(tensor, expected)
    for array, expected in zip(run_op("GatherTokens", hidden, cos, sin, key, index), kept, strict=True):
        np.testing.assert_array_equal(array, expected)
