"""The command line, ``evaluate``: what it does when all is well, and one line with the right exit code when it is not."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import refused, write_data
from click.testing import Result
from vflow.engines import Engine
from vflow.exporter import evaluate as evaluation
from vflow.exporter import plots
from vflow.exporter.schedule import Schedule


def test_evaluate_compares_engines_and_methods(call: Callable[..., Result], engine: Engine, random_checkpoint: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    options = ("--model", random_checkpoint, "--method", "random", "--method", "fastv", "--keep", 0.5, "--keep", 0.1, "--data", data, "--json")
    result = call("evaluate", engine.path, *options, "--plot", tmp_path / "plot.svg")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["name"] for row in rows] == [str(engine.path), "unpruned", "random", "fastv", "random"]
    assert all(row["total"]["n"] == 2 for row in rows)
    assert "left out: fastv at keep 0.1" in result.stderr
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    table = call("evaluate", engine.path, "--data", data)
    assert "2 questions, share of right answers" in table.stdout
    (tmp_path / "unlabelled.jsonl").write_text('{"image": "a.png", "prompt": "what is there ?"}')
    unlabelled = ("evaluate", engine.path, "--data", tmp_path / "unlabelled.jsonl")
    assert "cost alone: questions without answers, and no --reference" in call(*unlabelled).stdout
    method = ("--model", random_checkpoint, "--method", "random", "--keep", 0.5)
    assert "agreement with the unpruned model" in call("evaluate", *method, *unlabelled[2:]).stdout


def test_names_with_brackets_and_colons_are_printed_as_they_are(call: Callable[..., Result], engine: Engine, tmp_path: Path) -> None:
    """Both are markup to rich; ``[/b]`` closes what nobody has opened."""
    first, second = tmp_path / "[bold]:key:", tmp_path / "o[" / "b]"
    for path in (first, second):
        shutil.copytree(engine.path, path)
    evaluated = call("evaluate", first, second, "--data", write_data(tmp_path), "--threads", 1)
    assert evaluated.exit_code == 0, evaluated.output
    for path in (first, second):
        assert str(path) in evaluated.stdout
        assert f"evaluate {path} ..." in evaluated.stderr.splitlines()
    timed = call("bench", first, second, "--side", 48, "--new-tokens", 1, "--repeats", 1, "--warm-up", 0, "--threads", 1)
    assert timed.exit_code == 0, timed.output
    assert "times faster than [bold]:key:" in timed.stdout
    assert "b]" in timed.stdout


def test_tables_are_not_folded_where_no_terminal_limits_them(
    call: Callable[..., Result], copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    path = copy.rename(tmp_path / ("long" * 20))
    result = call("evaluate", path, "--data", write_data(tmp_path))
    (row,) = (line for line in result.stdout.splitlines() if str(path) in line)
    assert re.search(r" \d\.\d{3} +\d\.\d{3} +[\d.]+ \w+ +20 → 5 +\d\.\d{3} +\d\.\d{3}–\d\.\d{3}", row)
    monkeypatch.setenv("COLUMNS", "60")
    assert all(len(line) <= 60 for line in call("evaluate", path, "--data", tmp_path / "data.jsonl").stdout.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "{folder}/none/p.png"], "none: no such folder for the plot"),
        (["--plot", "{folder}/p.xyz"], "end its name in .png, .svg or .pdf"),
        (["--plot", "{folder}/p.png", "--data", "{folder}/data.jsonl"], "nothing to plot: the data has no answers and no --reference was given"),
    ],
)
def test_evaluate_looks_at_its_options_before_it_works(call: Callable[..., Result], tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "what is there ?"}\n')
    refused(call("evaluate", "no such engine", *(option.format(folder=tmp_path) for option in options)), message)


def test_evaluate_finds_what_it_cannot_evaluate_before_it_asks_anything(
    call: Callable[..., Result], engine: Engine, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate_session", lambda *_, **__: pytest.fail("asked"))
    refused(call("evaluate", engine.path, "no such engine"), "no such engine: no such engine directory")
    refused(call("evaluate", engine.path, "--model", random_checkpoint, "--method", "magic", "--keep", 0.1), "unknown method 'magic'")


def test_evaluate_refuses_a_reference_that_is_not_the_whole_model(
    call: Callable[..., Result], build: Callable[..., Engine], engine: Engine, untied_checkpoint: Path
) -> None:
    refused(call("evaluate", engine.path, "--reference", engine.path), "drops visual tokens itself; build one without --keep")
    other = build(untied_checkpoint, Schedule())
    refused(
        call("evaluate", engine.path, "--reference", other.path),
        f"{other.path}: not of the model of {engine.path}; build one from the same checkpoint",
    )


def test_evaluate_prints_before_it_plots(call: Callable[..., Result], engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "plot.svg")

    monkeypatch.setattr(plots, "_save", fail)
    result = call("evaluate", engine.path, "--data", write_data(tmp_path), "--plot", tmp_path / "plot.svg", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["name"] == str(engine.path)
    assert "plot.svg: No space left on device" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name engines, or a --model"),
        (["--method", "random", "--keep", "0.1"], "need --model"),
        (["--model", "tiny"], "--model needs --method"),
        (["--model", "tiny", "--method", "random"], "--method needs --keep"),
    ],
)
def test_wrong_usage_of_evaluate_is_exit_code_2(call: Callable[..., Result], options: list[str], message: str) -> None:
    refused(call("evaluate", *options), message, code=2)


def test_evaluate_lists_its_methods(call: Callable[..., Result]) -> None:
    names = call("evaluate", "--method", "list").stdout.split()
    assert {"tuned", "paper", "downsample", "visionzip"} <= set(names)
