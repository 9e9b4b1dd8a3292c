"""Tuning: the cached objective is the plain one, searches improve on their start, resume, and refuse another model's study."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from schedules import DEEPSTACK_SCHEDULES, SCHEDULES, WINDOWED_SCHEDULES
from support import picture
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.reference import ReferenceModel
from vflow.exporter.schedule import Importance, Schedule, ScheduleError, Stage
from vflow.exporter.search_space import Budget, SearchSpace
from vflow.exporter.shared_tower import SharedTower, embed_plainly
from vflow.exporter.tune import CalibrationSample, FlowObjective, Resource, tune_front, tune_schedule

optuna = pytest.importorskip("optuna")

SAMPLES = [CalibrationSample((picture(4, 5, seed),), "how many objects are there ?") for seed in range(3)]


@pytest.fixture(scope="module")
def objective(random_checkpoint: Path) -> FlowObjective:
    return FlowObjective(open_checkpoint(str(random_checkpoint)), SAMPLES, blocks=(1, 2))


@pytest.fixture(scope="module")
def by_cosine(random_checkpoint: Path) -> FlowObjective:
    return FlowObjective(open_checkpoint(str(random_checkpoint)), SAMPLES, measure="cosine")


@pytest.fixture
def space(objective: FlowObjective) -> SearchSpace:
    return SearchSpace.for_model(objective.shape, Budget(keep=0.4, rows=4, columns=5))


def test_nothing_pruned_keeps_everything(objective: FlowObjective, by_cosine: FlowObjective) -> None:
    assert objective.score(Schedule()) == pytest.approx(1.0, abs=1e-6)
    assert by_cosine.score(Schedule()) == pytest.approx(1.0, abs=1e-6)


def test_both_measures_read_the_last_prompt_token(objective: FlowObjective, by_cosine: FlowObjective, random_checkpoint: Path) -> None:
    schedule, reference = SCHEDULES["decoder"], ReferenceModel(open_checkpoint(str(random_checkpoint)))
    weight = reference.model.get_output_embeddings().weight.detach().float()
    cosines, overlaps = [], []
    for sample in SAMPLES:
        question = reference.read(sample.images, sample.prompt)
        hidden = []
        for pruned in (Schedule(), schedule):
            vision, language = reference.graphs(pruned)
            embedded = [embed_plainly(vision, picture) for picture in question.pictures]
            hidden.append(torch.from_numpy(reference.reply(language, vision, question, embedded, new_tokens=0).last_hidden))
        cosines.append(float(torch.cosine_similarity(*hidden, dim=0)))
        whole, less = ((weight @ h).softmax(0) for h in hidden)
        overlaps.append(1 - 0.5 * float((whole - less).abs().sum()))  # 1 − total variation
    assert by_cosine.score(schedule) == pytest.approx(np.mean(cosines), abs=1e-5)
    assert objective.score(schedule) == pytest.approx(np.mean(overlaps), abs=1e-5)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_cached_objective_equals_the_plain_one(objective: FlowObjective, name: str) -> None:
    assert objective.score(SCHEDULES[name]) == pytest.approx(objective.score_plainly(SCHEDULES[name]), abs=1e-6)


@pytest.mark.parametrize("blocks", [(), (2,), (3,), (2, 3)])
@pytest.mark.parametrize("name", WINDOWED_SCHEDULES)
def test_cached_objective_equals_the_plain_one_with_windows(windowed_checkpoint: Path, name: str, blocks: tuple[int, ...]) -> None:
    objective = FlowObjective(open_checkpoint(str(windowed_checkpoint)), SAMPLES[:1], blocks=blocks)
    assert objective.score(WINDOWED_SCHEDULES[name]) == pytest.approx(objective.score_plainly(WINDOWED_SCHEDULES[name]), abs=1e-6)


@pytest.mark.parametrize("blocks", [(), (1,), (3,), (1, 3)])
@pytest.mark.parametrize("name", DEEPSTACK_SCHEDULES)
def test_cached_objective_equals_the_plain_one_with_deepstack(deepstack_checkpoint: Path, name: str, blocks: tuple[int, ...]) -> None:
    objective = FlowObjective(open_checkpoint(str(deepstack_checkpoint)), SAMPLES[:1], blocks=blocks)
    assert objective.score(DEEPSTACK_SCHEDULES[name]) == pytest.approx(objective.score_plainly(DEEPSTACK_SCHEDULES[name]), abs=1e-6)


def test_of_a_tower_with_windows_states_are_kept_where_tokens_are_ranked(windowed_checkpoint: Path) -> None:
    reference = ReferenceModel(open_checkpoint(str(windowed_checkpoint)))
    picture_read = reference.read(SAMPLES[0].images, SAMPLES[0].prompt).pictures[0]
    assert set(SharedTower(reference, (2,)).walk(picture_read).states) == {0, 1, 2, 3, 4}  # 3: the decoder's
    assert set(SharedTower(reference, (3,)).walk(picture_read).states) == {0, 1, 3, 4}  # block 1 ranks before 3


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.5, 40.0])
@pytest.mark.parametrize("score_rows", [1024, 300])
def test_cached_importance_follows_its_parameters(objective: FlowObjective, threshold: float, score_rows: int) -> None:
    importance = Importance(global_threshold=threshold, entropy_weight=0.5, score_rows=score_rows)
    schedule = Schedule((Stage("tower", 2, 600), Stage("decoder", 0, 300, 2.0)), importance)
    assert objective.score(schedule) == pytest.approx(objective.score_plainly(schedule), abs=1e-6)


def test_pruning_everything_but_a_token_hurts_more_than_pruning_half(objective: FlowObjective) -> None:
    half, one = (objective.score(Schedule((Stage("decoder", 0, keep),))) for keep in (512, 1))
    assert one < half < 1


def test_search_is_at_least_as_good_as_the_point_it_starts_from(objective: FlowObjective, space: SearchSpace) -> None:
    start = space.middle()
    result = tune_schedule(objective, space, fingerprint="abc", trials=6, start=[start, start])
    assert result.value >= objective.score(space.schedule(start)) - 1e-9
    assert objective.score(result.schedule) == pytest.approx(result.value, abs=1e-9)
    assert result.schedule.average_keep(objective.shape.decoder.layers) <= 0.4
    assert result.schedule.model == "abc"
    assert (result.schedule.provenance["value"], result.schedule.provenance["trials"]) == (result.value, 6)
    assert result.trials == 6
    scores = [objective.score(space.schedule(point)) for point in result.leaders]
    assert result.leaders[0] == result.point and 1 < len(scores) < 6  # the start is there once
    assert scores == sorted(set(scores), reverse=True)


def test_a_search_starts_at_the_points_of_its_space_and_follows_its_seed(objective: FlowObjective, space: SearchSpace) -> None:
    assert tune_schedule(objective, space, fingerprint="abc", trials=1).point == space.starts()[0]
    first, again, other = (tune_schedule(objective, space, fingerprint="abc", trials=2, start=[], seed=seed).point for seed in (1, 1, 2))
    assert first == again != other


def test_a_schedule_says_how_it_was_found(by_cosine: FlowObjective, space: SearchSpace) -> None:
    provenance = tune_schedule(by_cosine, space, fingerprint="abc", trials=1, seed=7).schedule.provenance
    assert provenance["objective"].startswith("mean cosine") and provenance["seed"] == 7
    assert provenance["calibration"] == {"samples": 3, "sha256": by_cosine.fingerprint}
    assert provenance["budget"] == {"keep": 0.4, "rows": 4, "columns": 5, "text_tokens": 64, "bytes_per_value": 2}  # what was not given is not there


@pytest.mark.parametrize(("resource", "keep"), [("kv", None), ("flops", 0.4)])
def test_a_front_goes_from_cheap_to_good(objective: FlowObjective, resource: Resource, keep: float | None) -> None:
    space, told = SearchSpace.for_model(objective.shape, Budget(keep=keep, rows=4, columns=5), tower=True), []
    front = tune_front(
        objective, space, resource, fingerprint="abc", trials=8, startup=8, progress=lambda done, best: told.append((done, best))
    )  # fmt: skip
    assert len(front) > 1
    for before, after in itertools.pairwise(front):
        assert before.cost < after.cost and before.value < after.value
    for point in front:
        share = point.schedule.average_keep(objective.shape.decoder.layers) if resource == "kv" else space.flops_share(point.schedule)
        assert (point.cost, point.value) == (pytest.approx(share), pytest.approx(objective.score(point.schedule), abs=1e-6))
        assert point.schedule.model == "abc" and point.schedule.provenance["front"] == resource
        assert point.schedule.provenance["value"] == point.value
    assert [done for done, _ in told] == list(range(1, 9))
    assert told[-1][1] == front[-1].value == max(best for _, best in told)
    if resource == "kv":
        assert front[0].cost < 0.1 and front[-1].cost > 0.4  # as the points to start from


def test_a_front_over_the_kv_cache_leaves_the_keep_open(objective: FlowObjective, space: SearchSpace) -> None:
    with pytest.raises(ScheduleError, match="leave out --keep and --kv-budget"):
        tune_front(objective, space, "kv", fingerprint="abc", trials=1)


def test_a_study_of_a_schedule_is_none_of_a_front(objective: FlowObjective, space: SearchSpace, tmp_path: Path) -> None:
    storage, name = str(tmp_path / "study.log"), "one"
    tune_schedule(objective, space, fingerprint="abc", trials=1, storage=storage, study_name=name)
    with pytest.raises(ScheduleError, match="another space"):
        tune_front(objective, space, "flops", fingerprint="abc", trials=1, storage=storage, study_name=name)


def test_without_optuna_it_is_said_what_to_install(objective: FlowObjective, space: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ScheduleError, match=r"pip install 'vflow-export\[tune\]'"):
        tune_schedule(objective, space, fingerprint="abc", trials=1)


def test_a_study_in_a_file_is_resumed(objective: FlowObjective, space: SearchSpace, tmp_path: Path) -> None:
    study = str(tmp_path / "study.log")
    first = tune_schedule(objective, space, fingerprint="abc", trials=3, storage=study)
    second = tune_schedule(objective, space, fingerprint="abc", trials=2, storage=study)
    assert (first.trials, second.trials) == (3, 5)
    assert second.value >= first.value


def test_a_study_of_another_model_search_objective_or_calibration_is_refused(
    objective: FlowObjective, by_cosine: FlowObjective, space: SearchSpace, random_checkpoint: Path, tmp_path: Path
) -> None:
    study = str(tmp_path / "study.log")
    tune_schedule(objective, space, fingerprint="abc", trials=1, storage=study)
    with pytest.raises(ScheduleError, match="another model"):
        tune_schedule(objective, space, fingerprint="def", trials=1, storage=study)
    other = SearchSpace.for_model(objective.shape, Budget(keep=0.2, rows=4, columns=5))
    with pytest.raises(ScheduleError, match="another space"):
        tune_schedule(objective, other, fingerprint="abc", trials=1, storage=study)
    with pytest.raises(ScheduleError, match="another objective"):
        tune_schedule(by_cosine, space, fingerprint="abc", trials=1, storage=study)
    fewer = FlowObjective(open_checkpoint(str(random_checkpoint)), SAMPLES[:2], blocks=(1, 2))
    with pytest.raises(ScheduleError, match="made for another calibration set; choose another --study or --study-name"):
        tune_schedule(fewer, space, fingerprint="abc", trials=1, storage=study)


def test_no_samples_are_refused(random_checkpoint: Path) -> None:
    with pytest.raises(ScheduleError, match="at least one sample"):
        FlowObjective(open_checkpoint(str(random_checkpoint)), [])


def test_a_sample_without_an_image_is_named(random_checkpoint: Path) -> None:
    with pytest.raises(ScheduleError, match=r"calibration sample 2 \(what is there \?\) has no image"):
        FlowObjective(open_checkpoint(str(random_checkpoint)), [SAMPLES[0], CalibrationSample((), "what is there ?")])


def test_calibration_sets_are_told_apart_by_pictures_and_by_prompts(random_checkpoint: Path) -> None:
    checkpoint, prompts = open_checkpoint(str(random_checkpoint)), ("what is there ?", "list the objects .")
    sets = [[CalibrationSample((picture(2, 3, seed),), prompt)] for seed in range(2) for prompt in prompts]
    fingerprints = [FlowObjective(checkpoint, samples).fingerprint for samples in (*sets, sets[0])]
    assert len(set(fingerprints)) == 4 and fingerprints[0] == fingerprints[4]


def test_prompts_of_other_lengths_and_pictures_of_other_sizes_mix(random_checkpoint: Path) -> None:
    samples = [CalibrationSample((picture(2, 3),), "what is there ?"), CalibrationSample((picture(5, 4),), "list the objects .")]
    mixed = FlowObjective(open_checkpoint(str(random_checkpoint)), samples)
    assert np.isfinite(mixed.score(Schedule((Stage("decoder", 0, 300),))))
