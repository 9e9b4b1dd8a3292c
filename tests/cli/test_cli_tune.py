"""The command line, ``tune``: what it does when all is well, and one line with the right exit code when it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import LIMITS, SMALL, refused, write_data
from click.testing import Result
from vflow.exporter.schedule import load_schedule


def test_tune_writes_a_schedule_that_build_takes(call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path) -> None:
    data, output = write_data(tmp_path), tmp_path / "schedule.json"
    result = call("tune", "--model", random_checkpoint, "--data", data, "--keep", 0.4, "--prefill-flops", 0.9, "--output", output, *SMALL)
    assert result.exit_code == 0, result.output
    schedule = load_schedule(output)
    assert schedule.average_keep(4) <= 0.4
    assert schedule.provenance["trials"] == 3
    assert schedule.provenance["calibration"]["samples"] == 2
    assert f"wrote {output}" in result.stdout
    assert "best overlap" in result.stderr
    built = call("build", "--model", random_checkpoint, "--schedule", output, "--output", tmp_path / "engine", *LIMITS)
    assert built.exit_code == 0, built.output
    assert f"schedule   from {output}" in built.stdout


@pytest.mark.parametrize(("side", "tokens"), [(44, 6), (140, 8)])  # of 8 pixels, to the nearest; the checkpoint takes at most 64 of them
def test_tune_counts_its_budget_for_the_picture_as_the_checkpoint_scales_it(
    call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path, side: int, tokens: int
) -> None:
    result = call("tune", "--model", random_checkpoint, "--data", write_data(tmp_path), "--kv-budget", "2KiB", "--output", tmp_path / "s.json",
                  "--trials", 1, "--side", side)  # fmt: skip
    assert result.exit_code == 0, result.output
    budget = load_schedule(tmp_path / "s.json").provenance["budget"]
    assert (budget["rows"], budget["columns"]) == (tokens, tokens)


def test_tune_writes_a_front_of_schedules(call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path) -> None:
    data, output = write_data(tmp_path), tmp_path / "front"
    arguments = ("tune", "--model", random_checkpoint, "--data", data, "--pareto", "kv", "--output", output, *SMALL)
    result = call(*arguments, "--trials", 6)
    assert result.exit_code == 0, result.output
    points = json.loads((output / "front.json").read_text())["points"]
    costs, overlaps = [point["cost"] for point in points], [point["overlap"] for point in points]
    assert costs == sorted(costs) and overlaps == sorted(overlaps)  # dearer is better, or it would not be on the front
    for point in points:
        assert load_schedule(output / point["schedule"]).average_keep(4) == pytest.approx(point["cost"])
    assert (output / "front.png").stat().st_size > 5000
    refused(call(*arguments), "is not an empty folder; choose another --output")


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ([], "a budget is needed", 2),
        (["--keep", "0.1", "--preset", "paper", "--tower"], "--preset has no tower stages", 2),
        (["--keep", "0.0005"], "less than 1/1024 of the visual tokens", 1),
        (["--kv-budget", "10B"], "less than 1/1024 of the visual tokens (or less than one)", 1),
        (["--kv-budget", "much"], "is not a size", 1),
        (["--keep", "0"], "--keep must be above 0 and at most 1", 1),
        (["--keep", "0.1", "--prefill-flops", "0.0001"], "cannot be met with these stages", 1),
        (["--keep", "0.1", "--pareto", "kv"], "leave out --keep", 2),
        (["--keep", "0.1", "--data", "{empty}"], "no samples", 1),
        (["--keep", "0.1", "--data", "{text}"], "image", 1),
    ],
)
def test_tune_refuses_what_it_cannot_do(
    call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path, options: list[str], message: str, code: int
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.jsonl").write_text('{"prompt": "what is there ?"}\n')
    options = [option.format(empty=tmp_path / "empty.jsonl", text=tmp_path / "text.jsonl") for option in options]
    data = [] if "--data" in options else ["--data", write_data(tmp_path)]
    result = call("tune", "--model", random_checkpoint, "--output", tmp_path / "s.json", *SMALL, *data, *options)
    refused(result, message, code)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "{folder}/none/s.json"], "none: no such folder for the schedule"),
        (["--output", "{folder}"], "is a folder; name a file for the schedule"),
        (["--output", "{folder}", "--pareto", "flops"], "is not an empty folder; choose another --output"),
        (["--output", "{folder}/file/front", "--pareto", "flops"], "no folder can be made in "),
    ],
)
def test_tune_looks_at_its_output_before_it_works(call: Callable[..., Result], tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "file").write_text("mine")
    options = [option.format(folder=tmp_path) for option in options]
    refused(call("tune", "--model", "no such model", "--keep", 0.4, *options), message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tune_refuses_a_study_of_another_search(call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path) -> None:
    common = (
        "tune",
        "--model",
        random_checkpoint,
        "--data",
        write_data(tmp_path),
        "--output",
        tmp_path / "s.json",
        "--study",
        tmp_path / "study.log",
    )
    assert call(*common, "--keep", 0.4, *SMALL).exit_code == 0
    refused(call(*common, "--keep", 0.3, *SMALL), "was made for another space; choose another --study or --study-name")
