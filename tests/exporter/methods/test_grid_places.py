"""The uniform grid: exactly so many places, all different, and none of them far from any token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from vflow.exporter.methods.uniform_grid import grid_places

GRIDS = st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(lambda size: st.tuples(*map(st.just, size), st.integers(1, size[0] * size[1])))


@given(GRIDS)
@example((3, 13, 27))  # square boxes would make two bands, of more places than there are columns
def test_places_are_as_many_as_asked_for_distinct_and_ascending(grid: tuple[int, int, int]) -> None:
    rows, columns, count = grid
    places = grid_places(rows, columns, count)
    assert places.dtype == torch.int64 and places.shape == (count,)
    assert places.diff().gt(0).all()
    assert places[0] >= 0 and places[-1] < rows * columns


@given(GRIDS)
def test_no_token_is_far_from_a_place(grid: tuple[int, int, int]) -> None:
    rows, columns, count = grid
    places = grid_places(rows, columns, count)
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    across = torch.maximum((row[:, None] - row[places]).abs(), (column[:, None] - column[places]).abs())  # [N, count], Chebyshev
    box = max(math.sqrt(rows * columns / count), rows / count, columns / count)  # side of a place's box
    assert int(across.amin(1).max()) <= box


@given(GRIDS)
def test_bands_hold_the_same_number_of_places(grid: tuple[int, int, int]) -> None:
    rows, columns, count = grid
    of_row = torch.bincount(grid_places(rows, columns, count) // columns, minlength=rows)
    used = of_row[of_row > 0]
    assert used.max() - used.min() <= 1


@pytest.mark.parametrize(
    ("rows", "columns", "count", "expected"),
    [(2, 4, 2, [5, 7]), (4, 4, 4, [5, 7, 13, 15]), (1, 5, 1, [2]), (5, 1, 2, [1, 3]), (3, 3, 9, list(range(9)))],
)
def test_small_grids(rows: int, columns: int, count: int, expected: list[int]) -> None:
    assert grid_places(rows, columns, count).tolist() == expected
