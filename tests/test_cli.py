"""The command line: what it does when all is well, and one line with the right exit code when it is not."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support import DECODER_STAGES, HANDLED_SIGNALS, picture
from vflow.engines import Engine, open_engine
from vflow.exporter import cli, plots
from vflow.exporter import evaluate as evaluation
from vflow.exporter.cli import main
from vflow.exporter.schedule import Schedule, load_schedule

LIMITS = ["--max-visual-tokens", "64", "--max-text-tokens", "64"]
PROMPT = ["--prompt", "how many objects are there ?"]


@pytest.fixture
def call() -> Iterator[Callable[..., Result]]:
    """``call("run", …)``: the command in this process."""
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, DECODER_STAGES)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(picture(6, 5)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def copy(engine: Engine, tmp_path: Path) -> Path:
    """An engine that the test may damage."""
    return Path(shutil.copytree(engine.path, tmp_path / "engine"))


def refused(result: Result, message: str, code: int = 1) -> None:
    """One line on stderr, nothing on stdout, the exit code, and no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.splitlines()[-1] == errors[0]


# ------------------------------------------------------------------------------------------------------------------ build


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


# -------------------------------------------------------------------------------------------------------------------- run


def test_run_answers_on_stdout_and_reports_on_stderr(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    result = call("run", engine.path, "--image", image, *PROMPT, "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) <= 5
    for words in ("first token", "vision", "prefill", "visual tokens  30 → 15 (decoder 0) → 8 (decoder 2)", "KV cache", "allocated; visual part"):
        assert words in result.stderr


def test_run_json_has_the_promised_fields(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    result = call("run", engine.path, "--image", image, "--image", image, *PROMPT, "--max-new-tokens", 4, "--json", "--threads", 1)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert set(values) == {
        "text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens", "visual_tokens", "kv_bytes",
        "vision_s", "prefill_s", "ttft_s", "tokens_per_s",
    }  # fmt: skip
    assert values["visual_tokens"] == {
        "input": 60, "per_stage": [{"part": "decoder", "layer": 0, "kept": 30}, {"part": "decoder", "layer": 2, "kept": 15}]
    }  # fmt: skip
    per_token = 2 * 2 * 8 * 4
    visual = (2 * 32 + 2 * 16) * per_token  # two layers each of ⌈64 · 500/1024⌉ and ⌈64 · 250/1024⌉ tokens
    assert values["kv_bytes"] == {"allocated": visual + 4 * 64 * per_token, "visual": visual, "visual_unpruned": 4 * 64 * per_token}
    assert len(values["token_ids"]) == values["new_tokens"] <= 4
    assert 0 < values["vision_s"] + values["prefill_s"] <= values["ttft_s"]


def test_run_is_greedy_and_repeatable_and_samples_by_seed(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    def answer(*options: Any) -> list[int]:
        tokens: list[int] = json.loads(call("run", engine.path, "--image", image, *PROMPT, "--json", "--max-new-tokens", 8, *options).stdout)[
            "token_ids"
        ]
        return tokens

    assert answer() == answer()
    hot = ["--temperature", 5.0, "--top-k", 40, "--top-p", 0.99, "--seed"]
    assert answer(*hot, 1) == answer(*hot, 1)
    assert len({tuple(answer(*hot, seed)) for seed in range(4)}) > 1


def test_run_takes_text_alone_and_a_picture_of_one_pixel(call: Callable[..., Result], engine: Engine, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    result = call("run", engine.path, *PROMPT, "--max-new-tokens", 2, "--json")
    assert json.loads(result.stdout)["visual_tokens"]["input"] == 0
    result = call("run", engine.path, *PROMPT, "--image", tmp_path / "dot.png", "--max-new-tokens", 2, "--json")
    assert json.loads(result.stdout)["visual_tokens"]["input"] == 1  # scaled up to the checkpoint's least size


def test_max_pixels_scales_images_down(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    result = call("run", engine.path, "--image", image, *PROMPT, "--json", "--max-new-tokens", 1, "--max-pixels", 64 * 12)
    assert json.loads(result.stdout)["visual_tokens"]["input"] <= 12


def write_images(folder: Path) -> None:
    (folder / "text.png").write_text("this is not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(picture(8, 8)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    (folder / "folder.png").mkdir()
    Image.new("L", (1, 300)).save(folder / "strip.png")
    header = b"P4\n60000 60000\n"  # a bitmap that says it has 3.6 thousand million pixels
    (folder / "bomb.pbm").write_bytes(header + b"\0" * 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "none.png: no such file"),
        ("text.png", "text.png: not an image that Pillow can read"),
        ("empty.jpg", "empty.jpg: not an image that Pillow can read"),
        ("cut.png", "cut.png: damaged image"),
        ("folder.png", "folder.png: is a folder, not an image"),
        ("bomb.pbm", "larger than 89,478,485 pixels (a decompression bomb?)"),
        ("strip.png", "aspect ratio must be below 200"),
    ],
)
def test_run_refuses_images_that_are_none(call: Callable[..., Result], engine: Engine, tmp_path: Path, name: str, message: str) -> None:
    write_images(tmp_path)
    refused(call("run", engine.path, "--image", tmp_path / name, *PROMPT), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "what " * 80], "prompt has 85 text tokens, the engine was built for 64"),
        (["--prompt", "what is <|image_pad|> ?"], "holds <|image_pad|>, which structures prompts"),
        ([*PROMPT, "--max-new-tokens", "1000"], "max_new_tokens 1000 is more than"),
        ([*PROMPT, "--seed", "-1"], "seed must be a whole number from 0"),
        ([*PROMPT, "--temperature", "nan"], "temperature must be a number"),
        ([*PROMPT, "--image", "{image}", "--image", "{image}", "--image", "{image}"], "max_visual_tokens 64 built, images have 90 together"),
        ([*PROMPT, "--image", "{image}", "--max-pixels", "3"], "max_pixels must be at least 64"),
    ],
)
def test_run_refuses_requests_that_do_not_fit(call: Callable[..., Result], engine: Engine, image: Path, options: list[str], message: str) -> None:
    result = call("run", engine.path, *(option.format(image=image) if "{image}" in option else option for option in options))
    refused(result, message)


@pytest.mark.parametrize("options", [[], [*PROMPT, "--max-new-tokens", "0"], [*PROMPT, "--top-p", "0"], [*PROMPT, "--provider", "npu"]])
def test_wrong_usage_of_run_is_exit_code_2(call: Callable[..., Result], engine: Engine, options: list[str]) -> None:
    assert call("run", engine.path, *options).exit_code == 2


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "weights.bin").unlink(), "weights.bin: missing; build the engine again"),
    (lambda folder: flip_last_byte(folder / "weights.bin"), "weights.bin: damaged, its SHA-256 is not the one built"),
    (lambda folder: flip_last_byte(folder / "vision.onnx"), "vision.onnx: damaged"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: has 2 bytes"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing, so this is not an engine directory"),
    (lambda folder: (folder / "manifest.json").write_text('{"format": 2}'), "format 2 is newer than the one that this vflow-export reads"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
    (lambda folder: shutil.rmtree(folder), "no such engine directory"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_run_refuses_engines_that_are_not_as_built(call: Callable[..., Result], copy: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(copy)
    refused(call("run", copy, *PROMPT), message)


def test_run_refuses_an_old_onnx_runtime(call: Callable[..., Result], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    refused(call("run", engine.path, *PROMPT), "onnxruntime 1.30.0 is too old: it may align causal attention differently")


# ----------------------------------------------------------------------------------------------------------- tune, evaluate


def write_data(folder: Path) -> Path:
    Image.fromarray(picture(4, 5)).save(folder / "a.png")
    lines = [{"image": "a.png", "prompt": prompt, "answer": "left"} for prompt in ("what is there ?", "list the objects .")]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "data.jsonl"


SMALL = ("--trials", 3, "--side", 140, "--text-tokens", 12)


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


# ---------------------------------------------------------------------------------------------------------- verify, doctor


def test_verify_climbs_all_rungs(call: Callable[..., Result], engine: Engine) -> None:
    result = call("verify", engine.path, "--samples", 5, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["passed"] is True
    assert [finding["rung"] for finding in values["findings"]] == ["a", "b", "b", "b", "c", "c", "d", "d", "d"]
    assert all(set(finding) == {"rung", "quantity", "worst", "tolerance", "passed", "note"} for finding in values["findings"])
    assert values["findings"][1]["worst"] == 0.0  # no survivor differs


def test_verify_fails_an_engine_that_computes_something_else(
    call: Callable[..., Result], engine: Engine, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend
    from vflow.exporter import verify

    language = OnnxRuntimeBackend.language

    def shifted(self: OnnxRuntimeBackend, **inputs: Any) -> Any:
        logits, last_hidden = language(self, **inputs)
        return logits + 0.01, last_hidden

    monkeypatch.setattr(OnnxRuntimeBackend, "language", shifted)
    monkeypatch.setattr(verify, "build_engine", lambda *_, **__: engine)  # rung (a) then compares another engine, and fails as well
    result = call("verify", engine.path, "--image", image)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "ok" in result.stdout  # step by step is as wrong as all at once


def test_verify_looks_at_the_graphs_that_other_runtimes_get(
    call: Callable[..., Result], engine: Engine, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend

    vision = OnnxRuntimeBackend.vision

    def shifted(self: OnnxRuntimeBackend, *inputs: Any) -> Any:
        image = vision(self, *inputs)
        return image._replace(importance=image.importance * np.float32(1.01 if self._standard else 1.0))

    monkeypatch.setattr(OnnxRuntimeBackend, "vision", shifted)
    values = json.loads(call("verify", engine.path, "--image", image, "--json").stdout)
    failed = [(finding["rung"], finding["quantity"]) for finding in values["findings"] if not finding["passed"]]
    assert failed == [("d", "importance of the survivors, relative")]


def test_verify_refuses_another_model(call: Callable[..., Result], engine: Engine, untied_checkpoint: Path) -> None:
    refused(call("verify", engine.path, "--model", untied_checkpoint), "is not the model of this engine")
    refused(call("verify", engine.path, "--model", "nothing"), "nothing: no such folder")


def test_doctor_finds_what_is_needed_here(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for words in ("machine", "ONNX Runtime", "build", "TensorRT", "pip install 'vflow-export["):
        assert words in result.stdout
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    result = call("doctor")
    assert result.exit_code == 1
    assert "onnxruntime 1.30.0" in result.stdout


def test_help_and_version_name_every_command(call: Callable[..., Result]) -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("build", "run", "verify", "bench", "doctor"))
    assert "0.1.0" in call("--version").stdout


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
