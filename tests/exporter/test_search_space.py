"""Every point of the cube is a schedule that meets the budget."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vflow.exporter.budget import cost, kv_bytes
from vflow.exporter.schedule import KEEP_UNIT, Schedule, ScheduleError
from vflow.exporter.search_space import Budget, SearchSpace, parse_bytes
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

SHAPE = ModelShape(TowerShape(32, 1280, 16, 5120, 1176, 2), DecoderShape(28, 1536, 12, 2, 128, 8960, 151_936))
UNIT = st.floats(0, 1, allow_nan=False)


def points(space: SearchSpace, draw: st.DataObject) -> dict[str, Any]:
    point: dict[str, Any] = {name: draw.draw(UNIT, name) for name in space.coordinates()}
    return point | {name: draw.draw(st.sampled_from(values), name) for name, values in space.categories().items()}


@given(st.data(), st.floats(0.003, 1.0), st.integers(0, 3), st.booleans())
def test_every_point_meets_the_keep_budget_and_spends_it(draw: st.DataObject, keep: float, tower_stages: int, paper: bool) -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=keep), tower_stages=tower_stages, paper=paper)
    schedule = space.schedule(points(space, draw))
    schedule.check(SHAPE)
    layers = SHAPE.decoder.layers
    assert schedule.average_keep(layers) <= keep + 1e-12
    last = layers - space.starts[-1]
    assert schedule.average_keep(layers) > keep - (last + 1) / (layers * KEEP_UNIT)  # at most the rounding of one ratio is left
    assert len(schedule.tower_stages) == tower_stages


@given(st.data(), st.floats(0.3, 0.9))
def test_every_point_meets_a_flops_budget(draw: st.DataObject, share: float) -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.1, prefill_flops=share), tower_stages=2)
    schedule = space.schedule(points(space, draw))
    size = {"rows": 32, "columns": 32, "text_tokens": 64}
    assert cost(schedule, SHAPE, **size).flops <= share * cost(Schedule(), SHAPE, **size).flops


@given(st.data(), st.integers(2**20, 2**25))
def test_every_point_meets_a_kv_budget(draw: st.DataObject, size: int) -> None:
    space = SearchSpace.for_model(SHAPE, Budget(kv_bytes=size))
    schedule = space.schedule(points(space, draw))
    assert kv_bytes(schedule, SHAPE, tokens=1024, bytes_per_value=2) <= size


def test_a_budget_that_tower_stages_cannot_meet_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"prefill-flops 0\.01 cannot be met"):
        SearchSpace.for_model(SHAPE, Budget(keep=0.1, prefill_flops=0.01), tower_stages=1)


@pytest.mark.parametrize("budget", [{}, {"keep": 0.0}, {"keep": 1.5}, {"prefill_flops": 2.0}])
def test_senseless_budgets_are_refused(budget: dict[str, float]) -> None:
    with pytest.raises(ScheduleError):
        Budget(**budget)  # type: ignore[arg-type]


def test_less_than_one_token_is_refused() -> None:
    with pytest.raises(ScheduleError, match="less than 1/1024"):
        SearchSpace.for_model(SHAPE, Budget(keep=0.0005))
    with pytest.raises(ScheduleError, match="less than 1/1024"):
        SearchSpace.for_model(SHAPE, Budget(kv_bytes=1000))


@pytest.mark.parametrize(("text", "size"), [("64MiB", 64 * 2**20), ("1.5GB", 1_500_000_000), ("4096", 4096), ("2 KiB", 2048)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "64XB", "-1MB", "MiB", "1e3"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="not a size"):
        parse_bytes(text)
