"""Schedules: what is refused and how it is said, the JSON form, and the arithmetic of counts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vflow.exporter.schedule import (
    Importance,
    Schedule,
    ScheduleError,
    Stage,
    cell_count,
    cell_of,
    keep_count,
    load_schedule,
    unpruned_schedule,
)
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

SHAPE = ModelShape(TowerShape(4, 32, 2, 64, 96, 2), DecoderShape(6, 32, 4, 2, 8, 48, 50))
HUGE = 10**400  # larger than any float


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Valid schedules for ``SHAPE``."""
    tower = draw(st.sets(st.integers(0, 3), max_size=3))
    decoder = draw(st.sets(st.integers(0, 5), max_size=4))
    places = [("tower", layer) for layer in sorted(tower)] + [("decoder", layer) for layer in sorted(decoder)]
    keeps = sorted(draw(st.lists(st.integers(1, 1024), min_size=len(places), max_size=len(places))), reverse=True)
    sides = st.one_of(st.none(), st.floats(1.0, 64.0))
    stages = [
        Stage(part, layer, keep, draw(sides) if part == "tower" or layer == 0 else None)  # type: ignore[arg-type]
        for (part, layer), keep in zip(places, keeps, strict=True)
    ]
    return Schedule(
        stages=tuple(stages),
        importance=Importance(draw(st.floats(0, 50)), draw(st.floats(-1, 1)), draw(st.sampled_from([-1, 3])), draw(st.integers(1, 1024))),
        recycled_importance=draw(st.sampled_from(["own", "sum", "protected"])),
        guidance_weight=draw(st.floats(0, 1)),
        renumber_first_stage=0 in decoder and draw(st.booleans()),
        model=draw(st.one_of(st.none(), st.text(max_size=20))),
        provenance=draw(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.lists(st.floats(0, 1))), max_size=3)),
    )


@given(schedules())
def test_json_round_trip_gives_the_same_schedule(schedule: Schedule) -> None:
    schedule.check(SHAPE)
    text = json.dumps(schedule.to_dict())
    assert Schedule.from_dict(json.loads(text)) == schedule


def test_saved_file_round_trips(tmp_path: Path) -> None:
    schedule = Schedule((Stage("tower", 1, 900, 3.5), Stage("decoder", 0, 300)), provenance={"found by": "Größe ✓"})
    schedule.save(tmp_path / "schedule.json")
    assert load_schedule(tmp_path / "schedule.json") == schedule


@given(st.integers(1, 10**30), st.integers(1, 1024))
def test_keep_count_is_the_ceiling_exactly(tokens: int, keep: int) -> None:
    assert keep_count(tokens, keep) == math.ceil(Fraction(tokens) * Fraction(keep, 1024))
    assert 1 <= keep_count(tokens, keep) <= tokens


@given(st.integers(0, 10**6), st.floats(1.0, 64.0))
def test_cells_are_floors_of_the_position_and_as_many_as_are_needed(position: int, side: float) -> None:
    cell = Stage("tower", 0, 1, side).cell
    assert cell is not None
    assert cell_of(position, cell) == math.floor(Fraction(position) / Fraction(cell, 1024))
    assert cell_count(position + 1, cell) == cell_of(position, cell) + 1


@given(schedules())
def test_average_keep_is_the_mean_over_layers_of_what_enters_them(schedule: Schedule) -> None:
    keeps = [schedule.keep_at("decoder", layer) for layer in range(6)]
    assert schedule.average_keep(6) == pytest.approx(sum(keeps) / 6 / 1024)
    assert keeps == sorted(keeps, reverse=True)


@given(schedules())
def test_segments_are_runs_of_layers_between_stages_inside_the_decoder(schedule: Schedule) -> None:
    segments = schedule.decoder_segments(6)
    assert [layer for first, end, _ in segments for layer in range(first, end)] == list(range(6))
    assert [first for first, _, _ in segments[1:]] == [stage.layer for stage in schedule.later_stages]
    for first, end, keep in segments:
        assert {schedule.keep_at("decoder", layer) for layer in range(first, end)} == {keep}


def test_a_stage_counts_from_the_layer_before_which_it_stands() -> None:
    schedule = Schedule((Stage("tower", 2, 800), Stage("decoder", 0, 500), Stage("decoder", 3, 100)))
    assert [schedule.keep_at("tower", block) for block in range(4)] == [1024, 1024, 800, 800]
    assert [schedule.keep_at("decoder", layer) for layer in range(6)] == [500, 500, 500, 100, 100, 100]
    assert schedule.decoder_segments(6) == ((0, 3, 500), (3, 6, 100))
    assert unpruned_schedule().average_keep(6) == 1.0


STAGE_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"part": "merger"}, "part must be 'tower' or 'decoder'"),
    ({"part": ["tower"]}, "part must be 'tower' or 'decoder'"),
    ({"layer": -1}, "layer must be a whole number from 0"),
    ({"layer": 1.5}, "layer must be a whole number from 0"),
    ({"layer": True}, "layer must be a whole number from 0"),
    ({"keep": 0}, "keep must be a whole number in 1..1024"),
    ({"keep": 1025}, "keep must be a whole number in 1..1024"),
    ({"keep": 0.1}, "keep must be a whole number in 1..1024"),
    ({"keep": HUGE}, "keep must be a whole number in 1..1024"),
    ({"recycle": 0.5}, "recycle must be a cell side in"),
    ({"recycle": 65}, "recycle must be a cell side in"),
    ({"recycle": HUGE}, "recycle must be a cell side in"),
    ({"recycle": math.nan}, "recycle must be a cell side in"),
    ({"recycle": "4"}, "recycle must be a cell side in"),
    ({"layer": 2, "recycle": 4.0}, "recycle is only possible in the tower and before decoder layer 0"),
    ({"side": 3}, "unknown field 'side'; known: part, layer, keep, recycle"),
]


@pytest.mark.parametrize(("change", "message"), STAGE_REFUSALS)
def test_stages_out_of_range_are_refused_by_field(change: dict[str, Any], message: str) -> None:
    stage = {"part": "decoder", "layer": 0, "keep": 100} | change
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_dict({"format": 1, "stages": [stage]})


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "schedule format 2 is not supported"),
    ({"format": None}, "schedule format None is not supported"),
    ({"stages": {"part": "tower"}}, "stages must be a list"),
    ({"stages": "tower"}, "stages must be a list"),
    ({"stages": [3]}, "must be a JSON object, got 3"),
    ({"stages": [{"part": "tower", "layer": 1}]}, "keep"),
    ({"renumber_first_stage": True, "stages": [{"part": "decoder", "layer": 6, "keep": 9}]}, "there is no stage before decoder layer 0"),
    ({"importance": []}, "importance must be a JSON object"),
    ({"importance": {"global_threshold": -1}}, r"importance.global_threshold must be in \[0, 50\]"),
    ({"importance": {"global_threshold": 51}}, r"importance.global_threshold must be in \[0, 50\]"),
    ({"importance": {"global_threshold": math.nan}}, r"importance.global_threshold must be in \[0, 50\]"),
    ({"importance": {"global_threshold": HUGE}}, r"importance.global_threshold must be in \[0, 50\]"),
    ({"importance": {"entropy_weight": 1.01}}, r"importance.entropy_weight must be in \[-1, 1\]"),
    ({"importance": {"entropy_weight": -HUGE}}, r"importance.entropy_weight must be in \[-1, 1\]"),
    ({"importance": {"vision_layer": 1.0}}, "importance.vision_layer must be a whole number"),
    ({"importance": {"score_rows": 0}}, r"importance.score_rows must be a whole number in 1\.\.1024"),
    ({"importance": {"score_rows": 1025}}, r"importance.score_rows must be a whole number in 1\.\.1024"),
    ({"importance": {"alpha": 0}}, "importance: unknown field 'alpha'"),
    ({"recycled_importance": "mean"}, "recycled_importance must be 'own', 'sum' or 'protected'"),
    ({"recycled_importance": ["own"]}, "recycled_importance must be 'own', 'sum' or 'protected'"),
    ({"guidance_weight": 1.5}, r"guidance_weight must be in \[0, 1\]"),
    ({"guidance_weight": math.inf}, r"guidance_weight must be in \[0, 1\]"),
    ({"guidance_weight": HUGE}, r"guidance_weight must be in \[0, 1\]"),
    ({"guidance_weight": True}, r"guidance_weight must be in \[0, 1\]"),
    ({"renumber_first_stage": 1}, "renumber_first_stage must be true or false"),
    ({"model": 5}, "model must be a fingerprint or null"),
    ({"provenance": "by hand"}, "provenance must be a JSON object"),
    ({"provenance": {"score": math.nan}}, "provenance"),
    ({"keep": 0.1}, "schedule: unknown field 'keep'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_fields_out_of_range_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_dict({"format": 1} | change)


@pytest.mark.parametrize("values", [None, [], "schedule", 3])
def test_what_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(ScheduleError, match="must be a JSON object"):
        Schedule.from_dict(values)


@pytest.mark.parametrize(
    "stages",
    [
        (Stage("decoder", 2, 500), Stage("decoder", 1, 400)),
        (Stage("decoder", 0, 500), Stage("tower", 1, 400)),
        (Stage("tower", 2, 500), Stage("tower", 2, 400)),
    ],
)
def test_stages_out_of_order_are_refused(stages: tuple[Stage, ...]) -> None:
    with pytest.raises(ScheduleError, match=r"stages out of order: .* comes after .*; list tower stages by block"):
        Schedule(stages)


def test_ratios_that_grow_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"keep grows from 400 \(before tower 1\) to 500 \(before decoder 0\)"):
        Schedule((Stage("tower", 1, 400), Stage("decoder", 0, 500)))


def test_stages_that_are_none_are_refused() -> None:
    with pytest.raises(ScheduleError, match="stages"):
        Schedule(stages=({"part": "tower", "layer": 1, "keep": 3},))  # type: ignore[arg-type]


CHECKS = [
    (Schedule((Stage("tower", 4, 500),)), r"stage before tower 4: this model's tower has layers 0\.\.3"),
    (Schedule((Stage("decoder", 6, 500),)), r"stage before decoder 6: this model's decoder has layers 0\.\.5"),
    (Schedule(importance=Importance(vision_layer=4)), r"vision_layer 4: this model's tower has blocks 0\.\.3"),
    (Schedule(importance=Importance(vision_layer=-5)), r"vision_layer -5: this model's tower has blocks 0\.\.3"),
    (
        Schedule((Stage("tower", 3, 500), Stage("decoder", 0, 400)), Importance(vision_layer=1)),
        "vision_layer 1: block 1 ranks, which lies before the tower stage at block 3",
    ),
]
WINDOWED = replace(SHAPE, tower=replace(SHAPE.tower, window=4, full_blocks=(1, 3)))
WINDOWED_CHECKS = [
    (Schedule((Stage("tower", 1, 500),)), r"stage before tower 1: no block before it looks at the whole image; blocks that do: 1, 3"),
    (Schedule((Stage("decoder", 0, 400),), Importance(vision_layer=0)), r"vision_layer 0: no block up to it looks at the whole image; .*: 1, 3"),
    (Schedule((Stage("tower", 3, 500), Stage("decoder", 0, 400)), Importance(vision_layer=-2)), "vision_layer -2: block 1 ranks, which lies before"),
]


@pytest.mark.parametrize(("schedule", "message"), CHECKS)
def test_places_outside_the_model_are_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.check(SHAPE)


@pytest.mark.parametrize(("schedule", "message"), WINDOWED_CHECKS)
def test_where_windows_leave_nothing_to_rank_by_is_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.check(WINDOWED)


def test_the_last_block_that_looks_at_the_whole_image_ranks() -> None:
    schedule = Schedule((Stage("tower", 0, 900), Stage("tower", 2, 800), Stage("tower", 3, 700), Stage("decoder", 0, 600)))
    schedule.check(WINDOWED)
    assert schedule.scoring_blocks(WINDOWED.tower) == {1, 3}
    assert schedule.scoring_blocks(SHAPE.tower) == {1, 2, 3}
    assert replace(schedule, stages=schedule.tower_stages).scoring_blocks(WINDOWED.tower) == {1}
    Schedule((Stage("tower", 0, 900),), Importance(vision_layer=0)).check(WINDOWED)  # nothing is ranked for the decoder


def test_a_schedule_of_another_model_is_refused_unless_it_names_none() -> None:
    schedule = Schedule(model="aaaa")
    with pytest.raises(ScheduleError, match="made for model aaaa, this model is bbbb; tune one for it, or remove 'model'"):
        schedule.check(SHAPE, fingerprint="bbbb")
    schedule.check(SHAPE, fingerprint="aaaa")
    schedule.check(SHAPE)
    replace(schedule, model=None).check(SHAPE, fingerprint="bbbb")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"format": 1, "stages": [], "extra": 1}', "unknown field 'extra'"),
    ],
)
def test_unusable_files_are_refused_by_path(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "s.json"
    file.write_bytes(content)
    with pytest.raises(ScheduleError, match=message) as caught:
        load_schedule(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="No such file"):
        load_schedule(tmp_path / "none.json")
    with pytest.raises(ScheduleError, match="directory"):
        load_schedule(tmp_path)


def test_the_file_in_the_documentation_has_the_defaults_that_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text(encoding="utf-8")
    documented = json.loads(text.split("```json\n")[1].split("```")[0])
    schedule = Schedule.from_dict(documented)
    assert schedule == Schedule(schedule.stages)
    assert json.loads(json.dumps(schedule.to_dict())) == documented


def test_there_is_room_for_all_tokens_that_can_exceed_the_threshold() -> None:
    """Received attention averages 1: k of P tokens can exceed t where k·t < P."""
    patches = 100_000
    for threshold in (1.5, 3.0, 7.0, 30.0, 50.0):
        most = math.ceil(patches / threshold) - 1
        assert keep_count(patches, Importance(global_threshold=threshold).global_rows) >= most
