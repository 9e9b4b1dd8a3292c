"""Every point of the cube is a schedule that meets the budget."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vflow.exporter.budget import cost, kv_bytes
from vflow.exporter.schedule import KEEP_UNIT, Schedule, ScheduleError
from vflow.exporter.search_space import Budget, SearchSpace, parse_bytes
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

SHAPE = ModelShape(TowerShape(32, 1280, 16, 5120, 1176, 2), DecoderShape(28, 1536, 12, 2, 128, 8960, 151_936))
SMALL = ModelShape(TowerShape(4, 128, 4, 512, 1176, 2), DecoderShape(7, 128, 4, 2, 32, 384, 60))
UNIT = st.floats(0, 1, allow_nan=False)


def points(space: SearchSpace, draw: st.DataObject) -> dict[str, Any]:
    point: dict[str, Any] = {name: draw.draw(UNIT, name) for name in space.coordinates()}
    return point | {name: draw.draw(st.sampled_from(values), name) for name, values in space.categories().items()}


def random_point(space: SearchSpace, rng: np.random.Generator) -> dict[str, float | str]:
    point: dict[str, float | str] = {name: float(rng.random()) for name in space.coordinates()}
    return point | {name: str(rng.choice(values)) for name, values in space.categories().items()}


@given(st.data(), st.floats(0.003, 1.0), st.booleans(), st.booleans())
def test_every_point_meets_the_keep_budget_and_spends_it(draw: st.DataObject, keep: float, tower: bool, paper: bool) -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=keep), tower=tower, paper=paper)
    schedule = space.schedule(points(space, draw))
    schedule.check(SHAPE)
    layers = SHAPE.decoder.layers
    assert schedule.average_keep(layers) <= keep + 1e-12
    assert schedule.average_keep(layers) > keep - 3 / KEEP_UNIT  # at most the rounding of three ratios is left
    assert tower or not schedule.tower_stages


@given(st.data(), st.floats(0.06, 0.95), st.one_of(st.none(), st.floats(0.01, 1.0)), st.booleans())
def test_every_point_meets_a_flops_budget(draw: st.DataObject, share: float, keep: float | None, tower: bool) -> None:
    budget = Budget(keep=keep, prefill_flops=share if tower else 0.75 + share / 4)  # without tower stages the tower's share is there to stay
    space = SearchSpace.for_model(SHAPE, budget, tower=tower)
    schedule = space.schedule(points(space, draw))
    schedule.check(SHAPE)
    size = {"rows": 32, "columns": 32, "text_tokens": 64}
    assert budget.prefill_flops is not None
    assert cost(schedule, SHAPE, **size).flops <= budget.prefill_flops * cost(Schedule(), SHAPE, **size).flops
    assert keep is None or schedule.average_keep(SHAPE.decoder.layers) <= keep + 1e-12


def test_what_guidance_and_proportional_attention_cost_is_in_the_budget() -> None:
    """On a model as small as this the rounding of keeps does not hide it: 6 of these points were over."""
    space = SearchSpace.for_model(SMALL, Budget(prefill_flops=0.15, rows=16, columns=16), tower=True, guidance=True)
    rng = np.random.default_rng(0)
    for _ in range(600):
        assert space.flops_share(space.schedule(random_point(space, rng))) <= 0.15


@given(st.data(), st.floats(0.1, 0.6))
def test_a_flops_budget_is_spent_where_the_tower_takes_what_it_leaves(draw: st.DataObject, share: float) -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.05, prefill_flops=share), tower=True)
    point = points(space, draw) | {"pixel_keep": 1.0, "tower_keep_0": 1.0, "tower_keep_1": 1.0, "global_threshold": 0.0}
    assert space.flops_share(space.schedule(point)) > share - 0.01


def test_budgets_are_kept_at_the_ends_of_every_coordinate() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.1, prefill_flops=0.2), tower=True)
    for name in space.coordinates():
        for value in (0.0, 1.0):
            schedule = space.schedule(space.middle() | {name: value})
            schedule.check(SHAPE)
            assert space.flops_share(schedule) <= 0.2


def test_without_stages_inside_the_decoder_there_is_no_guidance() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.3), guidance=True)
    point = space.middle() | {"guidance_weight": 0.8}
    assert space.schedule(point).guidance_weight > 0.5
    assert space.schedule(point | {"decoder_keep_0": 0.0}).guidance_weight == 0


def test_the_number_of_stages_is_part_of_the_search() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.3))
    one = space.schedule(space.middle() | {"decoder_keep_0": 0.0, "decoder_keep_1": 0.0})
    three = space.schedule(space.middle() | {"decoder_keep_0": 0.3, "decoder_keep_1": 0.3})
    none_before = space.schedule(space.middle() | {"decoder_keep_0": 1.0, "decoder_place_0": 0.0})
    assert (len(one.stages), len(three.stages)) == (1, 3)
    assert none_before.first_stage is None or none_before.first_stage.keep > 900


def test_the_last_eighth_of_the_tower_may_rank() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.1))
    assert [space.schedule(space.middle() | {"vision_layer": share}).importance.vision_layer for share in (0.0, 1.0)] == [-1, -4]


def test_no_stage_drops_but_a_rounding() -> None:
    space, rng = SearchSpace.for_model(SHAPE, Budget(keep=0.01), tower=True), np.random.default_rng(0)
    for _ in range(200):
        keeps = [stage.keep for stage in space.schedule(random_point(space, rng)).stages]
        assert all(after < before - 1 for before, after in itertools.pairwise(keeps))


def test_flops_are_those_of_the_budget_s_picture_and_text() -> None:
    size = {"rows": 12, "columns": 40, "text_tokens": 300}
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.1, **size))
    schedule = space.schedule(space.middle())
    assert space.flops_share(schedule) == cost(schedule, SHAPE, **size).flops / cost(Schedule(), SHAPE, **size).flops


def test_without_a_flops_budget_all_rows_may_be_scored() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.1), tower=True)
    assert [space.schedule(space.middle() | {"score_rows": share}).importance.score_rows for share in (0.0, 1.0)] == [1024, 32]


def test_a_stage_may_stand_before_any_layer_but_the_first() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.3))
    keeps = {"decoder_keep_0": 0.3, "decoder_keep_1": 0.3}
    for place, layers in ((0.0, [0, 1, 2]), (1.0, [0, 26, 27])):
        schedule = space.schedule(space.middle() | keeps | {"decoder_place_0": place, "decoder_place_1": place})
        assert [stage.layer for stage in schedule.stages] == layers


def test_the_low_end_of_threshold_guidance_and_proportional_attention_is_none_at_all() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.3, prefill_flops=0.95), tower=True, guidance=True)
    point = space.middle() | {"recycle": 1.0, "decoder_keep_0": 0.3}
    names = ("global_threshold", "guidance_weight", "proportional_attention")

    def values(share: float) -> tuple[float, ...]:
        schedule = space.schedule(point | dict.fromkeys(names, share))
        return schedule.importance.global_threshold, schedule.guidance_weight, schedule.proportional_attention

    assert values(0.1) == (0, 0, 0)
    assert all(value > 0 for value in values(0.3))


def test_in_the_tower_only_the_stage_by_pixels_merges() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.1), tower=True)
    point = space.middle() | {"pixel_keep": 0.6, "tower_keep_0": 0.5, "tower_keep_1": 0.5, "pixel_cell_size": 0.0}
    for merges, cell in ((0.0, None), (1.0, pytest.approx(1.5))):
        stages = space.schedule(point | {"pixel_recycle": merges}).tower_stages
        assert [stage.layer == 0 for stage in stages] == [True, False, False]
        assert [stage.recycle for stage in stages] == [cell, None, None]


@pytest.mark.parametrize("blocks", range(3, 70))
def test_candidate_blocks_of_the_tower_are_no_more_than_memory_is_meant_for(blocks: int) -> None:
    space = SearchSpace.for_model(replace(SHAPE, tower=replace(SHAPE.tower, blocks=blocks)), Budget(keep=0.1), tower=True)
    assert space.tower_places[0] == 2 and min(blocks - 2, 8) <= len(space.tower_places) <= 16


@given(st.data(), st.booleans())
def test_points_for_a_tower_with_windows_rank_by_blocks_that_look_at_the_whole_image(draw: st.DataObject, tower: bool) -> None:
    windowed = replace(SHAPE, tower=replace(SHAPE.tower, window=4, full_blocks=(7, 15, 23, 29, 31)))
    space = SearchSpace.for_model(windowed, Budget(keep=0.1), tower=tower)
    assert space.tower_places == ((8, 16, 24, 30) if tower else ())
    schedule = space.schedule(points(space, draw))
    schedule.check(windowed)
    ranking = schedule.importance.vision_layer % 32
    assert ranking in {29, 31} and schedule.scoring_blocks(windowed.tower) <= {7, 15, 23, 29, 31}
    assert not schedule.tower_stages or schedule.tower_stages[0].layer in {0, *space.entry_blocks}
    assert tower or (space.entry_blocks == (30,) and ranking + 1 in {30, 32})


def test_where_a_schedule_differs_from_the_unpruned_tower_its_state_is_kept() -> None:
    space, rng = SearchSpace.for_model(SHAPE, Budget(keep=0.1), tower=True), np.random.default_rng(0)
    without_tower = SearchSpace.for_model(SHAPE, Budget(keep=0.1))
    for _ in range(50):
        first = space.schedule(random_point(space, rng)).tower_stages
        assert not first or first[0].layer in {0, *space.entry_blocks}
        ranking = without_tower.schedule(random_point(without_tower, rng)).importance.vision_layer % 32
        assert ranking + 1 in {*without_tower.entry_blocks, 32}
    assert without_tower.entry_blocks == (29, 30, 31)  # and no more: each costs memory


def test_the_paper_searches_ratios_at_thirds_and_always_merges() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=0.25), paper=True)
    schedule = space.schedule(space.middle())
    assert {stage.layer for stage in schedule.stages} <= {0, 9, 18}
    assert [space.schedule(space.middle() | {"cell_size": end}).stages[0].recycle for end in (0.0, 1.0)] == pytest.approx([3.0, 24.0])
    assert set(space.coordinates()) == {"decoder_keep_0", "decoder_keep_1", "global_threshold", "entropy_weight", "cell_size"}


def test_what_is_fixed_does_not_vary() -> None:
    fixed = (("entropy_weight", 0.5), ("recycle", 1.0), ("recycled_importance", "sum"))
    space = SearchSpace(SHAPE, Budget(keep=0.1), decoder_places=(3, 9), beyond=True, fixed=fixed)
    assert not {name for name, _ in fixed} & (set(space.coordinates()) | set(space.categories()))
    schedule = space.schedule(space.middle())
    assert (schedule.importance.entropy_weight, schedule.recycled_importance) == (0.0, "sum")
    assert schedule.stages[0].recycle is not None


def test_points_to_start_from_are_points_of_the_cube() -> None:
    for tower in (False, True):
        space = SearchSpace.for_model(SHAPE, Budget(keep=0.1), tower=tower, guidance=True)
        for point in space.starts():
            assert set(point) == set(space.middle())
            space.schedule(point).check(SHAPE)


@given(st.data(), st.integers(2**20, 2**25))
def test_every_point_meets_a_kv_budget(draw: st.DataObject, size: int) -> None:
    space = SearchSpace.for_model(SHAPE, Budget(kv_bytes=size))
    schedule = space.schedule(points(space, draw))
    assert kv_bytes(schedule, SHAPE, tokens=1024, bytes_per_value=2) <= size


@pytest.mark.parametrize(("shape", "rows", "columns"), [(SHAPE, 5, 7), (SMALL, 24, 31)])
def test_a_kv_budget_is_met_and_spent_where_tokens_round_and_count_what_they_stand_for(shape: ModelShape, rows: int, columns: int) -> None:
    """At 1,024 tokens nothing rounds, and beside wide heads what proportional attention takes is hardly seen."""
    tokens, width = rows * columns, 4
    whole, token = (kv_bytes(Schedule(), shape, tokens=count, bytes_per_value=width) for count in (tokens, 1))
    rng = np.random.default_rng(0)
    for size in np.linspace(0.3 * whole, 0.9 * whole, 100).astype(int).tolist():
        space = SearchSpace.for_model(shape, Budget(kv_bytes=size, rows=rows, columns=columns, bytes_per_value=width))
        assert "average_keep" not in space.coordinates()
        spent = kv_bytes(space.schedule(random_point(space, rng)), shape, tokens=tokens, bytes_per_value=width)
        assert 0 <= size - spent < 2 * token + 3 * tokens * width


@pytest.mark.parametrize(("tower", "way_out"), [(False, "raise it, or allow tower stages"), (True, "raise it")])
def test_a_flops_budget_that_cannot_be_met_is_refused_with_what_would_help(tower: bool, way_out: str) -> None:
    with pytest.raises(ScheduleError, match=rf"prefill-flops 0\.01 cannot be met with these stages \(least 0\.\d+\); {way_out}$"):
        SearchSpace.for_model(SHAPE, Budget(keep=0.1, prefill_flops=0.01), tower=tower)


def test_a_budget_of_everything_is_taken() -> None:
    space = SearchSpace.for_model(SHAPE, Budget(keep=1.0, prefill_flops=1.0))
    assert space.schedule(space.middle()).stages == ()


@pytest.mark.parametrize("budget", [{"keep": 0.0}, {"keep": 1.5}, {"prefill_flops": 2.0}])
def test_senseless_budgets_are_refused(budget: dict[str, float]) -> None:
    with pytest.raises(ScheduleError):
        Budget(**budget)  # type: ignore[arg-type]


def test_less_than_one_token_is_refused() -> None:
    with pytest.raises(ScheduleError, match="less than 1/1024"):
        SearchSpace.for_model(SHAPE, Budget(keep=0.0005))
    with pytest.raises(ScheduleError, match="less than 1/1024"):
        SearchSpace.for_model(SHAPE, Budget(kv_bytes=1000))


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 64 * 2**20), ("1.5GB", 1_500_000_000), ("4096", 4096), ("7B", 7), ("3KB", 3000), ("2 KiB", 2048), ("1GiB", 2**30)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "64XB", "-1MB", "MiB", "1e3"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="not a size"):
        parse_bytes(text)
