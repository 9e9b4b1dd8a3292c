"""Bench: every subject answers in its turn and in its own process, what is wrong is said first, and limits are the budget arithmetic's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from schedules import SCHEDULES
from vflow.engines import Engine, EngineError
from vflow.exporter.bench import runner, subjects
from vflow.exporter.bench.genai_text import write_text_model
from vflow.exporter.bench.limits import limits
from vflow.exporter.bench.measurement import Request, Timing, median
from vflow.exporter.bench.openvino import kept_tokens
from vflow.exporter.bench.report import bench_tables, bench_values
from vflow.exporter.bench.runner import Measured, measure_in_turns
from vflow.exporter.bench.subjects import SubjectSpec, baseline_specs, check_engines, engine_spec
from vflow.exporter.budget import traffic
from vflow.exporter.checkpoint import open_checkpoint, resolve_model
from vflow.exporter.cli import main
from vflow.exporter.schedule import Schedule, Stage, unpruned_schedule
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

SMALL = ModelShape(TowerShape(2, 8, 2, 16, 12, 2), DecoderShape(3, 8, 2, 1, 4, 20, 30))
SIDE = 48  # pixels: 36 visual tokens
CHILD = """
import json, os, sys
for number, line in enumerate(sys.stdin):
    question = json.loads(line)
    if number == 0:
        name = question["name"]
        if name == "broken":
            answer = {"error": "cannot be loaded"}
        elif name == "dying":
            sys.exit("out of luck")
        else:
            answer = {"versions": {"stand-in": "1"}}
    else:
        open(os.environ["BENCH_LOG"], "a").write(f"{name} {question['side']} {os.getpid()}\\n")
        answer = dict(vision_s=0.2, prefill_s=0.1, sampling_s=0.0, first_token_s=0.3, decode_s=0.4, new_tokens=question["new_tokens"],
                      visual_tokens=[4], text_tokens=3, kv_bytes=None, peak_memory_bytes=None)
    print(json.dumps(answer), flush=True)
"""


def spec(name: str, **changes: Any) -> SubjectSpec:
    return replace(SubjectSpec("engine", name, "engine", "model", "fp32", "cpu", 1, 1000), **changes)


@pytest.fixture
def standin_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """Children that answer without measuring; returns (name, side, process) of every answer, in order."""
    start, log = runner.subprocess.Popen, tmp_path / "log"
    monkeypatch.setenv("BENCH_LOG", str(log))
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", CHILD], **options))
    return lambda: [line.split() for line in log.read_text().splitlines()]


def test_subjects_take_turns_and_every_other_round_runs_backwards(standin_children: Callable[[], list[list[str]]]) -> None:
    results = measure_in_turns([spec("a"), spec("b")], [56, 112], new_tokens=5, repeats=2, warm_up=1, one_at_a_time=False)
    asked = standin_children()
    forwards, backwards = ["a 56", "a 112", "b 56", "b 112"], ["b 56", "b 112", "a 56", "a 112"]
    assert [f"{name} {side}" for name, side, _ in asked] == forwards + backwards + forwards
    assert [[len(result.timings[side]) for side in (56, 112)] for result in results] == [[2, 2], [2, 2]]  # the warm-up does not count
    assert len({process for *_, process in asked}) == 2
    assert results[0].versions == {"stand-in": "1"} and results[0].timings[56][0].step_s == pytest.approx(0.1)


def test_one_at_a_time_holds_one_process_and_keeps_it_over_the_turn(standin_children: Callable[[], list[list[str]]]) -> None:
    measure_in_turns([spec("a"), spec("b")], [56], new_tokens=1, repeats=2, warm_up=0, one_at_a_time=True)
    first, second, third, fourth = (process for *_, process in standin_children())  # a, b, b, a
    assert second == third and len({first, second, fourth}) == 3


@pytest.mark.parametrize(("free", "processes"), [(1e9, 2), (1200, 5), (None, 2)])
def test_memory_decides_how_many_processes_stay(
    standin_children: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch, free: float | None, processes: int
) -> None:
    monkeypatch.setattr(runner, "_free_memory", lambda: free)  # each of the subjects has 1,000 bytes of weights
    measure_in_turns(
        [
            spec("a"),
            spec("b"),
        ],
        [56],
        new_tokens=1,
        repeats=4,
        warm_up=0,
    )  # a b, b a, a b, b a
    assert len({process for *_, process in standin_children()}) == processes


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "broken: cannot be loaded"), ("dying", r"dying ended while it was measured \(out of luck\)")]
)
def test_a_subject_that_fails_is_named_and_the_others_end(standin_children: Callable[[], list[list[str]]], name: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        measure_in_turns([spec("a"), spec(name)], [56], new_tokens=1, repeats=1, warm_up=0, one_at_a_time=False)
    (_, _, process), *others = standin_children()
    assert others == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_traffic_is_counted_product_by_product() -> None:
    schedule, text = Schedule((Stage("tower", 1, 700), Stage("decoder", 0, 500), Stage("decoder", 2, 100))), 5
    t, d = SMALL.tower, SMALL.decoder
    tower_tokens, decoder_tokens = (6, 5), (3, 3, 1)

    def product(rows: int, inner: int, columns: int) -> int:
        return rows * inner + inner * columns + rows * columns

    def attention(rows: int, width: int, kv: int) -> int:
        return 2 * rows * width + 2 * rows * kv

    tower = product(24, t.patch_dim, 8) + product(5, 32, 32) + product(5, 32, 8)
    for alive in tower_tokens:
        p = alive * t.group
        tower += product(p, 8, 24) + attention(p, 8, 8) + product(p, 8, 8) + product(p, 8, 16) + product(p, 16, 8)
    head = product(1, 8, 30)
    decoder = step = head
    for alive in decoder_tokens:
        for length in (alive + text, 1):
            layer = product(length, 8, 8) + 2 * product(length, 8, 4) + attention(length, 8, 4) + product(length, 8, 8)
            layer += 2 * product(length, 8, d.mlp_dim) + product(length, d.mlp_dim, 8)
            decoder += layer if length > 1 else 0
            step += layer + 2 * 4 * (alive + text) if length == 1 else 0
    moved = traffic(schedule, SMALL, rows=2, columns=3, text_tokens=text, bytes_per_value=4)
    assert (moved.tower, moved.decoder, moved.step) == (4 * tower, 4 * decoder, 4 * step)


def test_limits_of_a_schedule_against_itself_are_one_and_pruning_raises_them() -> None:
    arithmetic = {"side": 6, "text_tokens": 5, "bytes_per_value": 4}
    assert set(vars(limits(unpruned_schedule(), unpruned_schedule(), SMALL, **arithmetic)).values()) == {1.0}
    pruned = limits(Schedule((Stage("tower", 1, 256), Stage("decoder", 0, 100))), unpruned_schedule(), SMALL, **arithmetic)
    assert min(pruned.vision_bytes, pruned.prefill_flops, pruned.prefill_bytes, pruned.step_bytes) > 1
    assert pruned.vision_flops < 1  # scoring costs more than one block of so small a tower saves


def timing(vision: float | None, prefill: float | None) -> Timing:
    return Timing(vision, prefill, 0.01 if prefill else None, 2.0, 1.0, 5, (36, 12), 9, None, None)


def test_a_first_token_without_an_image_is_not_compared() -> None:
    assert timing(None, 1.0).answer_s is None  # a decoder alone
    assert timing(None, None).answer_s == 2.0  # told as a whole
    assert median([timing(1.0, 1.0), timing(None, 1.0)], lambda t: t.vision_s) is None


@pytest.fixture(scope="module")
def engines(build: Callable[..., Engine], random_checkpoint: Path) -> list[Engine]:
    return [build(random_checkpoint, SCHEDULES[name]) for name in ("unpruned", "tower and decoder")]


def test_speed_ups_stand_beside_their_limits(engines: list[Engine]) -> None:
    specs = [engine_spec(engine, provider="cpu", threads=1) for engine in engines]
    measured = [Measured(s, {"onnxruntime": "1"}, {SIDE: [timing(vision, 0.5)]}) for s, vision in zip(specs, (1.5, 0.5), strict=True)]
    by_path = {str(engine.path): engine for engine in engines}
    values = bench_values(measured, by_path, threads=1)
    json.dumps(values, allow_nan=False)
    first, second = (result["sides"][0] for result in values["results"])
    assert first["speed_up"]["vision"] == 1.0 and set(first["limits"].values()) == {1.0}
    assert second["speed_up"]["vision"] == pytest.approx(3.0)
    expected = limits(engines[1].schedule, engines[0].schedule, engines[0].shape, side=6, text_tokens=9, bytes_per_value=4)
    assert second["limits"] == vars(expected)
    assert len(list(bench_tables(measured, by_path))) == 3


@pytest.mark.parametrize(
    ("sides", "new_tokens", "message"),
    [([50], 8, "--side 50: must be a multiple of 8"), ([80], 8, "--side 80: is 100 visual tokens, .* takes 64"),
     ([48], 64, "--new-tokens 64: .* has room for 64 text tokens")],
)  # fmt: skip
def test_what_an_engine_does_not_take_is_said_before_anything_is_timed(
    engines: list[Engine], sides: list[int], new_tokens: int, message: str
) -> None:
    check_engines(engines, [48, 64], 8)
    with pytest.raises(EngineError, match=message):
        check_engines(engines, sides, new_tokens)


def test_engines_of_two_models_are_not_compared(engines: list[Engine]) -> None:
    with pytest.raises(EngineError, match="compare engines of one model"):
        check_engines([engines[0], replace(engines[1], model_fingerprint="other")], [48], 8)


def test_a_missing_baseline_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: dict[str, Any] = {"fingerprint": "", "openvino_model": None, "pruning_ratios": [0, 90], "workspace": tmp_path}
    monkeypatch.setattr(subjects.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"--against openvino needs openvino_genai; pip install 'vflow-export\[bench\]'"):
        baseline_specs("openvino", spec("a"), **options)
    monkeypatch.setattr(subjects.util, "find_spec", lambda name: name)
    with pytest.raises(EngineError, match="needs --openvino-model, a folder from `optimum-cli export openvino"):
        baseline_specs("openvino", spec("a"), **options)
    (tmp_path / "openvino_language_model.xml").touch()
    names = [s.name for s in baseline_specs("openvino", spec("a"), **{**options, "openvino_model": tmp_path})]
    assert names == ["openvino-genai", "openvino-genai, 90 % pruned"]


@pytest.mark.parametrize(("visual", "ratio", "kept"), [(64, 0, 64), (64, 50, 32), (64, 90, 6), (144, 50, 72), (144, 90, 14)])
def test_openvino_s_own_pruning_is_counted_as_it_counts(visual: int, ratio: int, kept: int) -> None:
    assert kept_tokens(visual, ratio) == kept  # its own count of input tokens less the text's, release 2026.4


def test_a_baseline_has_the_engine_s_checkpoint(engines: list[Engine], untied_checkpoint: Path, tmp_path: Path) -> None:
    first = replace(engine_spec(engines[0], provider="cpu", threads=1), model=str(untied_checkpoint))
    options: dict[str, Any] = {"openvino_model": None, "pruning_ratios": [], "workspace": tmp_path}
    with pytest.raises(EngineError, match=r"is not the checkpoint that .* was built from; name that with --model"):
        baseline_specs("transformers", first, fingerprint=engines[0].model_fingerprint, **options)


def test_engines_and_hugging_face_are_timed_from_the_command_line(engines: list[Engine], random_checkpoint: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    arguments = [*(str(engine.path) for engine in engines), "--side", str(SIDE), "--new-tokens", "4", "--repeats", "2", "--threads", "1"]
    result = CliRunner().invoke(
        main, ["bench", *arguments, "--against", "transformers", "--model", str(random_checkpoint), "--plot", str(plot), "--json"]
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [entry["kind"] for entry in values["results"]] == ["engine", "engine", "transformers"]
    assert plot.stat().st_size > 0
    for entry in values["results"]:
        (side,) = entry["sides"]
        assert len(side["answers"]) == 2
        for answer in side["answers"]:
            assert answer["new_tokens"] == 4  # stop tokens do not end it
            parts = answer["vision_s"] + answer["prefill_s"] + answer["sampling_s"]
            assert 0 < parts <= answer["first_token_s"] * 1.001
            assert answer["kv_bytes"] > 0 and answer["visual_tokens"][0] == 36
    unpruned, pruned, theirs = (entry["sides"][0]["answers"][0] for entry in values["results"])
    assert unpruned["kv_bytes"] == theirs["kv_bytes"] > pruned["kv_bytes"]


@pytest.mark.parametrize("kind", ["random_checkpoint", "untied_checkpoint", "windowed_checkpoint", "deepstack_checkpoint"])
def test_the_text_model_that_onnxruntime_genai_gets_is_the_decoder(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder = request.getfixturevalue(kind)
    write_text_model(open_checkpoint(str(folder)), tmp_path / "text")
    text, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    ids = torch.tensor([[1, 8, 20, 21, 2, 9]])
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits)


@pytest.mark.slow
def test_onnxruntime_genai_builds_and_times_the_decoder(build: Callable[..., Engine], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from vflow.exporter.bench.genai import GenaiSubject

    engine = build(resolve_model("tiny"), unpruned_schedule())  # its heads are wide enough for it
    options: dict[str, Any] = {"fingerprint": engine.model_fingerprint, "openvino_model": None, "pruning_ratios": [], "workspace": tmp_path}
    (genai,) = baseline_specs("onnxruntime-genai", engine_spec(engine, provider="cpu", threads=1), **options)
    answer = GenaiSubject(genai).measure(Request(112, 4))
    assert answer.vision_s is None and answer.new_tokens == 4 and answer.visual_tokens == (16,)
