"""``build --target tensorrt-llm``: schedules made into one decoder stage at the same average keep, or refused, and what is left in the directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from schedules import SCHEDULES
from vflow.engines import Engine, EngineError, open_engine
from vflow.engines.tensorrt_llm import check_schedule
from vflow.exporter.build import BuildOptions, build_engine
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.cli import main
from vflow.exporter.presets import PRESETS, preset_schedule
from vflow.exporter.schedule import KEEP_UNIT, Importance, Schedule, Stage
from vflow.exporter.search_space import Budget, SearchSpace
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape
from vflow.exporter.tensorrt_llm import SCRIPT_FILE, schedule_for_tensorrt_llm, search_for_tensorrt_llm

LAYERS = 7
BOTH = ("--target", "onnxruntime", "--target", "tensorrt-llm")
SHAPE = ModelShape(
    TowerShape(blocks=8, embed_dim=16, heads=2, mlp_dim=32, patch_dim=96, merge_size=2),
    DecoderShape(layers=LAYERS, hidden_size=16, heads=4, kv_heads=2, head_dim=8, mlp_dim=32, vocab_size=64),
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def check_one_stage(before: Schedule, after: Schedule, layers: int) -> None:
    assert not after.later_stages and after.guidance_weight == 0
    assert after.tower_stages == before.tower_stages and after.importance == before.importance
    assert 0 <= before.average_keep(layers) - after.average_keep(layers) < 1 / KEEP_UNIT
    assert after.first_stage is not None and after.first_stage.recycle == (before.first_stage.recycle if before.first_stage else None)


# --------------------------------------------------------------------------------------------------------------- the search


@given(st.data(), st.floats(0.02, 1.0), st.booleans())
def test_every_point_of_its_search_is_one_decoder_stage_that_spends_the_budget(draw: st.DataObject, keep: float, tower: bool) -> None:
    space = search_for_tensorrt_llm(SearchSpace.for_model(SHAPE, Budget(keep=keep), tower=tower, guidance=True))
    point: dict[str, Any] = {name: draw.draw(st.floats(0, 1), name) for name in space.coordinates()}
    schedule = space.schedule(point | {name: draw.draw(st.sampled_from(values), name) for name, values in space.categories().items()})
    check_schedule(schedule, LAYERS)
    assert schedule_for_tensorrt_llm(schedule, LAYERS) is schedule
    assert -1e-12 <= keep - schedule.average_keep(LAYERS) < 2 / KEEP_UNIT  # as close as whole numbers of 1024 come
    assert tower or not schedule.tower_stages


def test_its_search_starts_from_different_points() -> None:
    space = search_for_tensorrt_llm(SearchSpace.for_model(SHAPE, Budget(keep=0.1), tower=True, guidance=True))
    starts = [json.dumps(point, sort_keys=True) for point in space.starts()]
    assert len(set(starts)) == len(starts) > 4
    assert not {"proportional_attention", "guidance_weight", "decoder_keep_0", "decoder_place_0"} & set(space.coordinates())


def test_tune_for_it_writes_a_schedule_that_its_build_takes(random_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--keep", 0.4, "--trials", 12, "--samples", 2, "--side", 140, "--target", "tensorrt-llm")
    tuned = call("tune", "--model", random_checkpoint, "--output", tmp_path / "schedule.json", *options)
    assert tuned.exit_code == 0, tuned.output
    assert "--target tensorrt-llm --output DIR" in tuned.stdout
    built = call(
        "build",
        "--model",
        random_checkpoint,
        "--schedule",
        tmp_path / "schedule.json",
        "--output",
        tmp_path / "engine",
        *BOTH,
        "--max-text-tokens",
        64,
    )
    assert built.exit_code == 0, built.output
    for others in (("--guidance",), ("--preset", "paper")):
        refused = call("tune", "--model", random_checkpoint, "--output", tmp_path / "no.json", *options, *others)
        assert refused.exit_code == 2 and "one decoder stage and no guidance" in refused.output


# ------------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("preset", "keep"), [*product(PRESETS, (0.02, 0.1, 0.25, 0.5, 0.9)), *product(("fastv", "pyramiddrop"), (0.5, 0.9))])
def test_presets_keep_their_average_in_one_stage(preset: str, keep: float) -> None:
    schedule = preset_schedule(preset, SHAPE, keep)
    after = schedule_for_tensorrt_llm(schedule, LAYERS)
    check_one_stage(schedule, after, LAYERS)
    after.check(SHAPE)
    assert after.provenance == {"tuned": False, "restricted_from": {"preset": preset, "tuned": False}}


@given(st.lists(st.integers(1, KEEP_UNIT), min_size=2, max_size=6), st.integers(0, 2), st.integers(0, 1))
def test_keeps_never_grow_into_the_one_stage(keeps: list[int], in_tower: int, first: int) -> None:
    keeps.sort(reverse=True)
    places = [("tower", block + 1) for block in range(in_tower)] + [("decoder", layer + first) for layer in range(len(keeps))]
    schedule = Schedule(tuple(Stage(part, layer, keep) for (part, layer), keep in zip(places, keeps, strict=False)))  # type: ignore[arg-type]
    after = schedule_for_tensorrt_llm(schedule, LAYERS)  # Schedule refuses keeps that grow
    if schedule.later_stages:
        check_one_stage(schedule, after, LAYERS)
    else:
        assert after is schedule


def test_what_a_first_stage_merges_is_still_merged_and_guidance_is_off() -> None:
    stages = (Stage("tower", 2, 700, 3.0), Stage("decoder", 0, 600, 2.5), Stage("decoder", 4, 100))
    schedule = Schedule(stages, Importance(1.3, 0.2), "sum", 0.4, renumber_first_stage=True, model="model")
    after = schedule_for_tensorrt_llm(schedule, LAYERS)
    assert after.stages == (Stage("tower", 2, 700, 3.0), Stage("decoder", 0, (4 * 600 + 3 * 100) // 7, 2.5))
    assert (after.recycled_importance, after.guidance_weight, after.renumber_first_stage, after.model) == ("sum", 0.0, True, "model")


@pytest.mark.parametrize(
    "stages", [(Stage("decoder", 0, 100, 4.0),), (Stage("tower", 0, 600, 2.0),), (Stage("tower", 0, 600, 2.0), Stage("decoder", 0, 100))]
)
def test_proportional_attention_is_left_out_and_refused(stages: tuple[Stage, ...]) -> None:
    schedule = Schedule(stages, proportional_attention=2.0)
    with pytest.raises(EngineError, match=r"cannot add to attention scores.*build with --target tensorrt-llm --keep .* leaves it out$"):
        check_schedule(schedule, LAYERS)
    after = schedule_for_tensorrt_llm(schedule, LAYERS)
    assert (after.proportional_attention, after.stages) == (0.0, stages)
    check_schedule(after, LAYERS)


# ------------------------------------------------------------------------------------------------------------- the build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Result]:
    output = tmp_path_factory.mktemp("llm") / "engine"
    result = call("build", "--model", "tiny", "--keep", 0.1, "--preset", "tower", *BOTH, "--output", output)
    assert result.exit_code == 0, result.output
    return open_engine(output), result


def test_keep_gives_schedule_for_tensorrt_llm_and_says_so(built: tuple[Engine, Result]) -> None:
    engine, result = built
    expected = preset_schedule("tower", engine.shape, 0.1)
    check_one_stage(expected, engine.schedule, engine.shape.decoder.layers)
    assert len(engine.schedule.tower_stages) == 2 and len(engine.segments) == 1
    said = "schedule   preset tower, as tensorrt-llm can run it: one decoder stage, plain attention, the same average keep; not tuned\n"
    assert said in result.output


def test_what_it_leaves_is_the_script(built: tuple[Engine, Result]) -> None:
    engine, _ = built
    assert SCRIPT_FILE in engine.files and engine.targets == {}
    compile((engine.path / SCRIPT_FILE).read_text(), SCRIPT_FILE, "exec")


def test_without_the_target_a_schedule_stays_as_it_is(tmp_path: Path) -> None:
    assert call("build", "--model", "tiny", "--keep", 0.1, "--preset", "progressive", "--output", tmp_path / "engine").exit_code == 0
    engine = open_engine(tmp_path / "engine")
    assert engine.schedule.later_stages and SCRIPT_FILE not in engine.files


def test_a_schedule_of_ones_own_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    SCHEDULES["guided, no first stage"].save(file)
    result = call("build", "--model", "tiny", "--schedule", file, "--target", "tensorrt-llm", "--output", tmp_path / "engine")
    assert result.exit_code == 1
    reason, remedy = "inside the decoder (before layers 1, 2)", "build with --target tensorrt-llm --keep 0.436, which drops as many before it"
    assert "one KV length per request" in result.output and f"{reason}; {remedy}" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize("name", ["unpruned", "pixels", "first stage only", "sampled rows"])
def test_schedules_without_later_stages_are_taken(name: str, random_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(max_text_tokens=64, targets=("tensorrt-llm",))
    assert build_engine(open_checkpoint(str(random_checkpoint)), SCHEDULES[name], tmp_path / "engine", options).schedule == SCHEDULES[name]


def test_the_library_refuses_like_the_command_line(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="one KV length per request"):
        build_engine(open_checkpoint(str(random_checkpoint)), SCHEDULES["decoder"], tmp_path / "engine", BuildOptions(targets=("tensorrt-llm",)))
    assert not list(tmp_path.iterdir())


def test_bf16_is_refused_since_onnx_runtime_runs_the_vision_graph(tmp_path: Path) -> None:
    result = call("build", "--model", "tiny", "--keep", 0.1, "--precision", "bf16", "--target", "tensorrt-llm", "--output", tmp_path / "engine")
    assert result.exit_code == 1 and "--precision bf16" in result.output and not list(tmp_path.iterdir())


def test_all_targets_get_the_same_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    build_target: Callable[..., Any] = lambda target, folder, graphs, segments, *_, **__: asked.append((target, len(segments))) or {}  # noqa: E731
    monkeypatch.setattr("vflow.exporter.build.build_target", build_target)
    monkeypatch.setattr("vflow.exporter.build.check_targets", lambda *_: None)
    monkeypatch.setattr("vflow.exporter.tensorrt.targets.check_targets", lambda *_: None)
    result = call("build", "--model", "tiny", "--keep", 0.1, "--target", "tensorrt-rtx", "--target", "tensorrt-llm", "--output", tmp_path / "engine")
    assert asked == [("tensorrt-rtx", 1)], result.output  # built for it alone, with one segment


def test_the_schedule_file_is_what_was_built(built: tuple[Engine, Result]) -> None:
    engine, _ = built
    assert Schedule.from_dict(json.loads((engine.path / "schedule.json").read_text())) == engine.schedule
