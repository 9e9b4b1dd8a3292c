"""Evaluation data and scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import DECODER_STAGES, picture
from vflow.engines import Session
from vflow.engines.manifest import Engine
from vflow.exporter.evaluate import DataError, LabelledSample, evaluate_session, generated_samples, read_samples, wilson_interval


@given(st.integers(1, 500), st.data())
def test_interval_holds_the_share_and_lies_in_the_unit_interval(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1


def test_interval_of_a_known_case() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe (1998), method 3


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_jsonl_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    lines = [{"image": "a.png", "prompt": "p", "answer": "x", "kind": "k"}, {"images": ["a.png", "b.png"], "prompt": "q", "answer": "y"}]
    first, second = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    assert first == LabelledSample((tmp_path / "a.png",), "p", "x", "k")
    assert second.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert second.kind == "all"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "JSON object"),
        ({"prompt": "p"}, "'answer'"),
        ({"answer": "a"}, "'prompt'"),
        ({"prompt": "p", "answer": "a", "image": 3}, "'image'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(write_lines(tmp_path / "data.jsonl", [line]))


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        read_samples(write_lines(tmp_path / "data.jsonl", [""]))
    with pytest.raises(DataError, match="nothing"):
        read_samples(tmp_path / "nothing.jsonl")


def test_unlabelled_data_needs_no_answer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"image": "a.png", "prompt": "p"}])
    assert read_samples(path, labelled=False)[0].answer == ""


def test_generated_samples_take_kinds_in_turn() -> None:
    found = list(generated_samples(4, ["count", "exists"], 112))
    assert [sample.kind for sample in found] == ["count", "exists", "count", "exists"]
    assert all(np.asarray(sample.images[0]).shape == (112, 112, 3) for sample in found)


def test_scores_count_what_the_engine_answers(build: Callable[..., Engine], random_checkpoint: Path, tmp_path: Path) -> None:
    session = Session(build(random_checkpoint, DECODER_STAGES))
    Image.fromarray(picture(3, 4)).save(tmp_path / "a.png")
    prompt = "what is there ?"
    answer = session.generate(prompt, [tmp_path / "a.png"], max_new_tokens=64).text
    data = [
        LabelledSample((tmp_path / "a.png",), prompt, text, kind) for text, kind in ((answer.upper() + " .", "right"), ("no such answer", "wrong"))
    ]
    result = evaluate_session(session, data, name="e")
    assert result.by_kind["right"].accuracy == 1
    assert result.by_kind["wrong"].accuracy == 0
    assert (result.total.accuracy, result.total.n) == (0.5, 2)
    assert result.visual_tokens == 12
    assert set(result.to_dict()) >= {"accuracy", "interval", "n", "by_kind"}
