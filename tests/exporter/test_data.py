"""Evaluation and calibration data: JSONL files, folders of both layouts, generated scenes; what is wrong with them is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vflow.exporter.data import DataError, LabelledSample, generated_samples, read_samples


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def write_picture(path: Path, prompt: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    if prompt is not None:
        path.with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return path


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_jsonl_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    a, b = write_picture(tmp_path / "a.png"), write_picture(tmp_path / "deep" / "b.png")
    lines = [
        {"image": "a.png", "prompt": "p", "answer": "x", "kind": "k"},
        {"images": ["a.png", "deep/b.png"], "prompt": "q", "answer": "y", "kind": None},
    ]
    first, second = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    assert first == LabelledSample((a,), "p", "x", "k")
    assert second.images == (a, b)
    assert second.kind == "all"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "JSON object"),
        ({"prompt": "p"}, "'answer'"),
        ({"answer": "a"}, "'prompt'"),
        ({"prompt": "p", "answer": "a", "image": 3}, "'image' must be a path"),
        ({"prompt": "p", "answer": "a", "file_name": ["a.png"]}, "'file_name' must be a path"),
        ({"prompt": "p", "answer": "a", "images": "a.png"}, "'images' must be a list of paths"),
        ({"prompt": "p", "answer": "a", "images": ["a.png", None]}, "'images' must be a list of paths"),
        ({"prompt": "p", "answer": "a", "image": "a.png", "file_name": "b.png"}, "'image' and 'file_name' both name images"),
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
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "p"}, {"prompt": "p", "answer": "kept"}])
    assert [sample.answer for sample in read_samples(path, labelled=False)] == ["", "kept"]


def test_an_answer_of_null_is_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "p", "answer": None}])
    assert [sample.answer for sample in read_samples(path, labelled=False)] == [""]
    with pytest.raises(DataError, match="line 1: 'answer' must be a string"):
        read_samples(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_separators_that_json_allows_in_strings_end_no_line(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps({"prompt": f"a{separator}b", "answer": "x"}, ensure_ascii=False).encode() + b"\r\n{\n")
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_samples(path)
    path.write_bytes(path.read_bytes().removesuffix(b"{\n"))
    assert [sample.prompt for sample in read_samples(path)] == [f"a{separator}b"]


def test_a_missing_image_is_named_with_its_line(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    lines = [{"image": "a.png", "prompt": "p", "answer": "x"}, "", {"images": ["a.png", "gone.png"], "prompt": "p", "answer": "x"}]
    with pytest.raises(DataError) as error:
        read_samples(write_lines(tmp_path / "data.jsonl", lines))
    assert "data.jsonl, line 3: no image file" in one_line(error)
    assert str(tmp_path / "gone.png") in str(error.value)


def test_a_sample_without_an_image_is_refused_only_where_images_are_needed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "p", "answer": "x"}, {"images": [], "prompt": "p", "answer": "x"}])
    assert [sample.images for sample in read_samples(path)] == [(), ()]
    with pytest.raises(DataError, match="line 1: no image") as error:
        read_samples(path, images_required=True)
    one_line(error)


def test_a_folder_with_metadata_is_read_like_a_jsonl_file(tmp_path: Path) -> None:
    pictures = [write_picture(tmp_path / name) for name in ("a.png", "train/b.jpg", "c.webp")]
    lines = [
        {"file_name": "a.png", "prompt": "p", "answer": "x", "kind": "k"},
        {"file_name": "train/b.jpg", "prompt": "q", "answer": "y"},
        {"image": "c.webp", "prompt": "r", "answer": "z"},
        {"images": ["a.png", "c.webp"], "prompt": "s", "answer": "w"},
    ]
    write_lines(tmp_path / "metadata.jsonl", lines)
    found = read_samples(tmp_path)
    assert found == read_samples(tmp_path / "metadata.jsonl")
    assert found[0] == LabelledSample((pictures[0],), "p", "x", "k")
    assert [sample.images for sample in found[1:]] == [(pictures[1],), (pictures[2],), (pictures[0], pictures[2])]
    assert [sample.prompt for sample in found] == ["p", "q", "r", "s"]


def test_metadata_goes_before_text_files(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", "of the text file")
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "prompt": "of the metadata"}])
    assert [sample.prompt for sample in read_samples(tmp_path, labelled=False)] == ["of the metadata"]


def test_pictures_beside_their_prompts_are_unlabelled_samples_in_order_of_their_names(tmp_path: Path) -> None:
    names = ["a.png", "b.JPG", "c.jpeg", "d.webp", "e.bmp"]
    for name in reversed(names):
        write_picture(tmp_path / name, f" what is in {name} ?\n")
    (tmp_path / "notes.md").write_text("not a sample")
    (tmp_path / ".hidden.png").write_bytes(b"")
    write_picture(tmp_path / "deeper" / "f.png")
    found = read_samples(tmp_path, labelled=False, images_required=True)
    assert found == [LabelledSample((tmp_path / name,), f"what is in {name} ?", "", "all") for name in names]


def test_pictures_without_answers_are_refused_where_answers_are_needed(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", "p")
    with pytest.raises(DataError) as error:
        read_samples(tmp_path)
    assert f"write {tmp_path / 'metadata.jsonl'}" in one_line(error)
    assert '"file_name": "a.png"' in str(error.value)


def test_a_picture_without_a_prompt_is_named_with_the_file_to_write(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", "p")
    write_picture(tmp_path / "b.png")
    with pytest.raises(DataError) as error:
        read_samples(tmp_path, labelled=False)
    assert one_line(error) == f"{tmp_path / 'b.png'}: has no prompt; write it to {tmp_path / 'b.txt'}"
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b\.txt: empty"):
        read_samples(tmp_path, labelled=False)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"b\.txt: "):
        read_samples(tmp_path, labelled=False)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_without_data_is_refused(tmp_path: Path, labelled: bool) -> None:
    (tmp_path / "notes.txt").write_text("no picture of this name")
    with pytest.raises(DataError, match=r"neither metadata\.jsonl nor pictures \(\.png, \.jpg") as error:
        read_samples(tmp_path, labelled=labelled)
    one_line(error)
    write_lines(tmp_path / "metadata.jsonl", [""])
    with pytest.raises(DataError, match=r"metadata\.jsonl: no samples"):
        read_samples(tmp_path, labelled=labelled)


def test_generated_samples_take_kinds_in_turn() -> None:
    found = list(generated_samples(4, ["count", "exists"], 112))
    assert [sample.kind for sample in found] == ["count", "exists", "count", "exists"]
    assert all(np.asarray(sample.images[0]).shape == (112, 112, 3) for sample in found)
