"""Scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from schedules import SCHEDULES
from support import DECODER_STAGES, picture
from vflow.engines import EngineError, Session
from vflow.engines.manifest import Engine
from vflow.exporter.candidates import UNPRUNED, method_candidates
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.data import DataError, LabelledSample
from vflow.exporter.evaluate import Candidate, evaluate_candidates, evaluate_session, wilson_interval
from vflow.exporter.methods import METHODS
from vflow.exporter.plots import evaluation_plot
from vflow.exporter.reference import ReferenceModel
from vflow.exporter.schedule import Importance, Schedule, ScheduleError, Stage
from vflow.exporter.shared_tower import SharedTower, embed_plainly


@given(st.integers(1, 500), st.data())
def test_interval_holds_the_share_and_lies_in_the_unit_interval(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1


def test_interval_of_a_known_case() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe (1998), method 3


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> LabelledSample:
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.fromarray(picture(3, 4)).save(path)
    return LabelledSample((path,), "what is there ?", "no such answer", "wrong")


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> ReferenceModel:
    return ReferenceModel(open_checkpoint(str(random_checkpoint)))


def test_scores_count_what_the_engine_answers(build: Callable[..., Engine], random_checkpoint: Path, question: LabelledSample) -> None:
    session = Session(build(random_checkpoint, DECODER_STAGES))
    answer = session.generate(question.prompt, question.images, max_new_tokens=64).text
    result = evaluate_session(session, [replace(question, answer=answer.upper() + " .", kind="right"), question], name="e")
    assert result.by_kind["right"].accuracy == 1
    assert result.by_kind["wrong"].accuracy == 0
    assert result.total is not None and (result.total.accuracy, result.total.n) == (0.5, 2)
    assert (result.visual_tokens, result.kept) == (12, 3)
    assert result.agreement is None
    assert 0 < result.prefill_flops < 1.5
    values = json.loads(json.dumps(result.to_dict()))
    assert set(values["total"]) == {"accuracy", "interval", "n"}


def test_logits_that_are_not_finite_are_no_answer(
    build: Callable[..., Engine], random_checkpoint: Path, question: LabelledSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(build(random_checkpoint, DECODER_STAGES))
    language = session.backend.language
    monkeypatch.setattr(session.backend, "language", lambda **inputs: (np.full_like(language(**inputs)[0], np.nan), language(**inputs)[1]))
    with pytest.raises(EngineError, match="not finite"):
        evaluate_session(session, [question], name="overflow")


def test_no_questions_are_refused(build: Callable[..., Engine], random_checkpoint: Path, reference: ReferenceModel) -> None:
    with pytest.raises(DataError, match="no questions"):
        evaluate_session(Session(build(random_checkpoint, DECODER_STAGES)), [], name="nothing")
    with pytest.raises(DataError, match="no questions"):
        evaluate_candidates(reference, [UNPRUNED], [])


def test_the_largest_cache_of_all_questions_is_stated(build: Callable[..., Engine], random_checkpoint: Path) -> None:
    session = Session(build(random_checkpoint, DECODER_STAGES))
    small, large = (LabelledSample((picture(*grid),), "what is there ?", "x", "k") for grid in ((2, 2), (6, 6)))
    alone = evaluate_session(session, [large], name="large").kv_visual_bytes
    assert evaluate_session(session, [small, large, small], name="all").kv_visual_bytes == alone


def test_data_without_answers_gives_agreement_alone(build: Callable[..., Engine], random_checkpoint: Path, question: LabelledSample) -> None:
    unpruned = Session(build(random_checkpoint, Schedule()))
    unlabelled = [replace(question, answer="")]
    same = evaluate_session(Session(unpruned.engine), unlabelled, name="same", reference=unpruned)
    assert same.total is None and not same.by_kind
    assert same.agreement is not None and (same.agreement.first_token, same.agreement.cosine) == (1.0, pytest.approx(1.0, abs=1e-6))
    pruned = evaluate_session(Session(build(random_checkpoint, DECODER_STAGES)), unlabelled, name="pruned", reference=unpruned)
    assert pruned.agreement is not None and pruned.agreement.cosine < 0.999


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_candidate_is_scored_as_the_engine_of_its_schedule(
    build: Callable[..., Engine], reference: ReferenceModel, random_checkpoint: Path, question: LabelledSample, name: str
) -> None:
    engine = Session(build(random_checkpoint, SCHEDULES[name]))
    two_pictures = LabelledSample((question.images[0], picture(2, 5)), "list the objects .", "x", "two")
    questions = [question, two_pictures, LabelledSample((), "what ?", "x", "none")]
    (candidate,) = evaluate_candidates(reference, [Candidate(name, UNPRUNED, SCHEDULES[name])], questions)
    built = evaluate_session(engine, questions, name=name, reference=Session(build(random_checkpoint, Schedule())))
    assert candidate.agreement is not None and built.agreement is not None
    assert candidate.agreement.cosine == pytest.approx(built.agreement.cosine, abs=1e-4)
    assert candidate.agreement.first_token == built.agreement.first_token
    assert candidate.prefill_flops == pytest.approx(built.prefill_flops, rel=1e-9)
    assert candidate.average_keep == pytest.approx(built.average_keep)
    assert candidate.kv_visual_bytes == built.kv_visual_bytes  # of the largest request, not what the engine's limits allocate


def test_candidates_that_differ_in_proportional_attention_alone_share_no_tower(reference: ReferenceModel, question: LabelledSample) -> None:
    """The one counts what its tokens stand for, inside the tower already; the other does not."""
    plain = Schedule((Stage("tower", 0, 500, 2.0), Stage("decoder", 0, 300)))
    candidates = [Candidate("plain", UNPRUNED, plain), Candidate("counted", UNPRUNED, replace(plain, proportional_attention=2.0))]
    (_, together), (alone,) = (evaluate_candidates(reference, some, [question]) for some in (candidates, candidates[1:]))
    assert together.agreement == alone.agreement


@pytest.mark.parametrize("blocks", [(), (1,), (2,), (0, 1, 2), (1, 2, 3)])
def test_what_candidates_share_of_a_tower_is_what_each_would_compute(reference: ReferenceModel, blocks: tuple[int, ...]) -> None:
    graphs = [reference.graphs(schedule)[0] for schedule in SCHEDULES.values()]
    for importance in (Importance(vision_layer=0), Importance(vision_layer=1, entropy_weight=0.8), Importance(vision_layer=2, global_threshold=1.2)):
        for tower in ((), (Stage("tower", 1, 700),), (Stage("tower", 1, 400),), (Stage("tower", 1, 700), Stage("tower", 2, 500))):
            if not tower or importance.vision_layer >= tower[-1].layer:
                graphs.append(reference.graphs(Schedule((*tower, Stage("decoder", 0, 300)), importance))[0])
    for method in METHODS.values():
        graphs += [reference.graphs(Schedule(stages), method.vision)[0] for stages in ((Stage("decoder", 0, 512),), DECODER_STAGES.stages)]
    (seen,) = reference.read([picture(4, 5)], "hello").pictures
    tower = SharedTower(reference, blocks)
    kept, fresh = tower.walk(seen, keep_finals=True), tower.walk(seen)
    for graph in graphs:
        alone = embed_plainly(graph, seen)
        for shared in (tower.embed(graph, kept), tower.embed(graph, fresh)):
            for got, expected in zip(shared, alone, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert kept.finals and fresh.finals is None  # what a search would never ask for again is not kept


def test_a_candidate_answers_as_its_engine_does(
    build: Callable[..., Engine], reference: ReferenceModel, random_checkpoint: Path, question: LabelledSample
) -> None:
    answer = Session(build(random_checkpoint, DECODER_STAGES)).generate(question.prompt, question.images, max_new_tokens=64).text
    (result,) = evaluate_candidates(reference, [Candidate("d", UNPRUNED, DECODER_STAGES)], [replace(question, answer=answer)])
    assert result.total is not None and result.total.accuracy == 1


def test_downsampling_is_counted_at_the_size_that_is_sent(reference: ReferenceModel) -> None:
    candidates, refused = method_candidates(["downsample"], [0.25], reference.shape, "abc")
    unpruned, small = evaluate_candidates(reference, candidates, [LabelledSample((picture(8, 8),), "what is there ?", "x", "k")])
    assert (unpruned.average_keep, unpruned.prefill_flops, unpruned.kept) == (1.0, pytest.approx(1.0), 64)
    assert small.average_keep == pytest.approx(0.25)
    assert (small.visual_tokens, small.kept) == (64, 16)
    assert small.prefill_flops < 0.3
    assert small.kv_visual_bytes * 4 == unpruned.kv_visual_bytes
    assert not refused


def test_small_pictures_are_sent_at_their_share_as_well(reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor scales what is smaller than its ``min_pixels`` up, which a share of a picture must not."""
    monkeypatch.setattr(reference, "processor", replace(reference.processor, min_pixels=6 * reference.processor.factor**2))
    for rows, columns in ((1, 1), (1, 2), (2, 1), (1, 3)):
        whole = reference.read([picture(rows, columns)], "hello").visual_tokens
        assert whole > rows * columns
        for share in (0.2, 0.3, 0.5, 0.7):
            assert reference.read([picture(rows, columns)], "hello", image_share=share).visual_tokens <= max(1, int(share * whole + 1e-9))


def test_methods_are_named_or_refused(reference: ReferenceModel) -> None:
    candidates, refused = method_candidates(["all"], [0.5, 0.05], reference.shape, "abc")
    names = [candidate.name for candidate in candidates]
    assert names[0] == "unpruned"
    assert {"random", "downsample", "progressive", "fastv"} <= set(names)
    assert names.count("random") == 2
    assert any("fastv at keep 0.05" in reason for reason in refused)
    assert any("tuned at keep 0.5" in reason and "run vflow-export tune" in reason for reason in refused)
    with pytest.raises(ScheduleError, match="unknown method 'magic'; one of tuned, "):
        method_candidates(["magic"], [0.1], reference.shape, "abc")


def test_a_plot_has_a_line_a_method(reference: ReferenceModel, question: LabelledSample, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    candidates, _ = method_candidates(["random", "grid"], [0.5, 0.25], reference.shape, "abc")
    results = evaluate_candidates(reference, candidates, [question])
    evaluation_plot(results, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500
    with pytest.raises(ScheduleError, match=r"end its name in \.png"):
        evaluation_plot(results, tmp_path / "plot.nothing")
