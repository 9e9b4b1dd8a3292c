"""Schedules that ship: found by model and budget, within it, and offered by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from vflow.exporter import presets
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.methods import METHODS
from vflow.exporter.models import model_shape
from vflow.exporter.presets import METHOD_PRESETS, PRESET_NAMES, PRESETS, preset_schedule, tuned_keeps, tuned_schedule
from vflow.exporter.schedule import KEEP_UNIT, Schedule, ScheduleError, Stage
from vflow.exporter.search_space import Budget, SearchSpace

TINY = open_checkpoint("tiny")
SHAPE = model_shape(TINY.config)
KEEPS = {"tiny": (0.05, 0.1, 0.11, 0.22, 0.33), "tiny-2.5": (0.1,), "tiny-3": (0.1,)}  # the first: those of the paper's tables


@pytest.mark.parametrize("model", KEEPS)
def test_the_small_models_ship_tuned_schedules(model: str) -> None:
    assert tuned_keeps(open_checkpoint(model).fingerprint) == KEEPS[model]
    assert tuned_keeps("another") == ()


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize(("model", "keep"), [(model, keep) for model, keeps in KEEPS.items() for keep in keeps])
def test_tuned_schedules_fit_their_model_and_budget(model: str, keep: float, tower: bool) -> None:
    checkpoint = open_checkpoint(model)
    shape = model_shape(checkpoint.config)
    schedule = tuned_schedule(checkpoint.fingerprint, keep, tower=tower)
    assert schedule is not None
    schedule.check(shape, fingerprint=checkpoint.fingerprint)
    budget = Budget(**schedule.provenance["budget"])
    assert budget.keep == keep
    assert schedule.average_keep(shape.decoder.layers) <= keep
    assert (budget.prefill_flops is not None) == tower
    if budget.prefill_flops is not None:
        assert schedule.tower_stages
        assert SearchSpace(shape, budget).flops_share(schedule) <= budget.prefill_flops
    assert {"objective", "value", "trials", "seed", "calibration"} <= set(schedule.provenance)


def test_a_schedule_is_found_by_the_model_that_it_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "TUNED_FOLDER", tmp_path)
    made = Schedule((Stage("decoder", 0, 90),), model="abc", provenance={"budget": {"keep": 0.1}})
    made.save(tmp_path / "some.json")
    assert preset_schedule("tuned", SHAPE, 0.1, fingerprint="abc") == made
    assert tuned_schedule("abc", 0.1, tower=True) is None
    with pytest.raises(ScheduleError, match=r"no preset 'tuned' at keep 0.2 \(tuned are keeps 0.1\); run vflow-export tune"):
        preset_schedule("tuned", SHAPE, 0.2, fingerprint="abc")
    with pytest.raises(ScheduleError, match="for this model nothing is"):
        preset_schedule("tuned-tower", SHAPE, 0.1, fingerprint="def")


def test_what_is_not_tuned_says_so() -> None:
    for name in PRESET_NAMES:
        if not name.startswith("tuned"):
            schedule = preset_schedule(name, SHAPE, 0.33)
            assert schedule.provenance == {"preset": name, "tuned": False}
            assert json.dumps(schedule.to_dict())


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_at_keep_1_no_preset_prunes_or_scores_anything(name: str) -> None:
    assert preset_schedule(name, SHAPE, 1, fingerprint=TINY.fingerprint) == Schedule()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.33, 0.45, 0.7, 0.8, 0.95, 0.999, 1 - 1e-14])
def test_every_stage_of_a_preset_drops_something(name: str, keep: float) -> None:
    keeps = [KEEP_UNIT, *(stage.keep for stage in preset_schedule(name, SHAPE, keep).stages)]
    assert (len(keeps) > 1 or keep > 0.999) and all(after < before for before, after in itertools.pairwise(keeps))


def test_every_exportable_method_can_be_built_by_name() -> None:
    assert {name for name, method in METHODS.items() if method.exportable} == {*METHOD_PRESETS, "paper"}
