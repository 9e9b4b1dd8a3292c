"""The command line, ``build``: what it does when all is well, and one line with the right exit code when it is not."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_support import LIMITS, SMALL, refused, write_data
from click.testing import Result
from vflow.engines import Engine, open_engine
from vflow.exporter import cli
from vflow.exporter.budget import kv_bytes
from vflow.exporter.report import bytes_text
from vflow.exporter.schedule import Schedule, load_schedule


def test_build_writes_an_engine_and_says_what_it_saves(
    call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    output = tmp_path / "deep" / "[bold]engine"  # brackets are markup to rich
    result = call("build", "--model", random_checkpoint, "--keep", 0.25, "--preset", "tower", "--output", output, *LIMITS)
    assert result.exit_code == 0, result.output
    engine = open_engine(output)
    assert engine.schedule.average_keep(4) <= 0.25
    assert engine.schedule.tower_stages
    for words in ("average keep 0.2", "visual tokens", "GFLOP before", "KV before", "tower", "decoder 0", "prefill", "try next"):
        assert words in result.stdout
    total = next(line for line in result.stdout.splitlines() if line.strip().startswith("prefill"))
    assert total.rstrip().endswith(bytes_text(kv_bytes(engine.schedule, engine.shape, tokens=64, bytes_per_value=4)))
    assert str(output) in result.stdout
    for phase in ("open checkpoint", "trace vision", "trace language", "write weights"):
        assert phase in result.stderr
    assert [path.name for path in output.parent.iterdir()] == ["[bold]engine"]

    again = call("build", "--model", random_checkpoint, "--output", output, *LIMITS)
    refused(again, "exists already; choose another folder or use --force")


def test_build_with_keep_1_prunes_nothing_and_asks_nothing(
    call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = call("build", "--model", random_checkpoint, "--keep", 1, "--output", tmp_path / "engine", *LIMITS)
    assert result.exit_code == 0, result.output
    assert "schedule   none, nothing is pruned" in result.stdout.splitlines()
    assert open_engine(tmp_path / "engine").schedule == Schedule()


def pasted(result: Result) -> list[list[str]]:
    """What a shell makes of the commands that are told to be tried next, those below it included."""
    lines = result.stdout.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("try next"))
    return [shlex.split(line.removeprefix("try next")) for line in lines[first:]]


def test_what_to_try_next_can_be_pasted_whatever_the_paths(call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's mine; $HOME"
    folder.mkdir()
    model, data, schedule, engine, repository = (folder / name for name in ("a model", "data", "a schedule.json", "an engine", "models"))
    shutil.copytree(random_checkpoint, model)
    data.mkdir()
    tuned = call("tune", "--model", model, "--data", write_data(data), "--keep", 0.4, "--output", schedule, *SMALL)
    assert pasted(tuned) == [["vflow-export", "build", "--model", str(model), "--schedule", str(schedule), "--output", "DIR"]]
    built = call("build", "--model", model, "--keep", 0.4, "--output", engine, "--target", "tensorrt-llm", *LIMITS)
    ask = ["--image", "FILE", "--prompt", "TEXT"]
    script = engine / "tensorrt-llm" / "generate.py"
    assert pasted(built) == [["vflow-export", "run", str(engine), *ask], ["python", str(script), str(model), *ask]]
    served = call("triton-repository", engine, "--output", repository)
    assert pasted(served) == [["tritonserver", f"--model-repository={repository}"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "0.0 is not in the range 0<x<=1"),
        (["--keep", "1.5"], "1.5 is not in the range 0<x<=1"),
        (["--keep", "ten"], "'ten' is not a valid float"),
        (["--preset", "paper"], "--preset needs --keep"),
        (["--keep", "0.1", "--preset", "best"], "'best' is not one of 'tuned', 'tuned-tower', 'progressive'"),
        (["--keep", "0.1", "--schedule", "s.json"], "--schedule says what is kept: leave out --keep and --preset"),
        (["--precision", "int8"], "'int8' is not one of 'fp32', 'fp16'"),
        (["--target", "cpu"], "'cpu' is not "),
        (["--max-visual-tokens", "0"], "0 is not in the range x>=1"),
        (["--colour"], "No such option"),
    ],
)
def test_wrong_usage_of_build_is_exit_code_2(call: Callable[..., Result], tmp_path: Path, options: list[str], message: str) -> None:
    refused(call("build", "--model", "tiny", "--output", tmp_path / "engine", *options), message, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": [{"part": "decoder", "layer": 2, "keep": 9}, {"part": "decoder", "layer": 1, "keep": 9}]}, "stages out of order"),
        ({"stages": [{"part": "tower", "layer": 1, "keep": 9}, {"part": "decoder", "layer": 1, "keep": 10}]}, "keep grows from 9"),
        ({"stages": [{"part": "decoder", "layer": 4, "keep": 9}]}, "this model's decoder has layers 0..3"),
        ({"stages": [{"part": "decoder", "layer": 1, "keep": 0}]}, "keep must be a whole number in 1..1024"),
        ({"model": "0123456789abcdef"}, "schedule was made for model 0123456789abcdef, this model is"),
        ({"format": 2}, "schedule format 2 is not supported"),
        ({"keep": 0.1}, "unknown field 'keep'"),
    ],
)
def test_build_refuses_schedules_that_cannot_be_met(
    call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"format": 1} | values))
    refused(call("build", "--model", random_checkpoint, "--schedule", tmp_path / "s.json", "--output", tmp_path / "out" / "engine", *LIMITS), message)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gpt-5"], "no such folder, and not a hub id (owner/name) or an alias"),
        (["--model", "{model}", "--keep", "0.0001"], "below 1/1024"),
        (["--model", "{model}", "--keep", "nan"], "keep must be above 0"),
        (["--model", "{model}", "--schedule", "none.json"], "none.json: No such file or directory"),
        (["--model", "{model}", "--max-text-tokens", "4096"], "--max-text-tokens 4096: the model's context is 512 tokens"),
        (["--model", "qwen2-vl"], "is not in the local cache and the hub cannot be reached"),
    ],
)
def test_build_refuses_what_cannot_be_built_and_leaves_nothing(
    call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    arguments = [option.format(model=random_checkpoint) for option in options]
    refused(call("build", "--output", tmp_path / "engine", *LIMITS, *arguments), message)
    assert [path.name for path in tmp_path.iterdir() if path.name != "empty"] == []


def test_build_does_not_write_where_a_file_is(call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    refused(call("build", "--model", random_checkpoint, "--output", tmp_path / "taken", *LIMITS), "is a file", code=2)
    refused(call("build", "--model", random_checkpoint, "--output", tmp_path / "taken" / "engine", *LIMITS), "taken")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("mine")
    refused(call("build", "--model", random_checkpoint, "--output", tmp_path / "folder", "--force", *LIMITS), "is not an engine directory")
    assert (tmp_path / "folder" / "letter.txt").read_text() == "mine"


def test_a_saved_schedule_can_be_given_back(engine: Engine, tmp_path: Path) -> None:
    schedule: Schedule = engine.schedule
    schedule.save(tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json") == schedule


@pytest.mark.parametrize(("capability", "options"), [("7.0", []), ("7.0", ["--weights", "fp8"]), ("abc", []), ("abc", ["--weights", "int8"])])
def test_a_gpu_that_kernels_are_not_compiled_for_is_refused_before_anything_is_traced(
    call: Callable[..., Result], random_checkpoint: Path, tmp_path: Path, capability: str, options: list[str]
) -> None:
    result = call("build", "--model", random_checkpoint, "--output", tmp_path / "e", "--compute-capability", capability, *options, *LIMITS)
    refused(result, f"target '{capability}': use one of 8.0")
    assert "trace" not in result.stderr
    assert list(tmp_path.iterdir()) == []
