"""Bisection finds the node that was changed, in either graph and wherever it stands; and an engine with further outputs can be built."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from support import picture
from vflow.engines.manifest import Engine
from vflow.engines.session import Session
from vflow.exporter import verify_target as verify_target_module
from vflow.exporter.bisection import Parting, RecordingBackend, build_with_outputs, first_difference, onnxruntime_probe, with_outputs
from vflow.exporter.cli import main
from vflow.exporter.comparison import compare
from vflow.exporter.schedule import Schedule, Stage
from vflow.exporter.verify import VerifyInput
from vflow.exporter.verify_target import NODE_SHARE, bisect, verify_target

pytest.importorskip("polygraphy")

SCHEDULE = Schedule((Stage("tower", 2, 700), Stage("decoder", 0, 500, 2.0), Stage("decoder", 2, 250)), guidance_weight=0.5)
ITEM = VerifyInput(picture(6, 5), "how many objects are there ?")
Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, SCHEDULE, request.param)


@pytest.fixture(scope="module")
def calls(engine: Engine) -> Calls:
    """What one image, a prefill and a step of decoding feed the graphs."""
    backend = RecordingBackend(engine)
    session = Session(engine, backend=backend)
    session.prefill(session.prepare(ITEM.prompt, [ITEM.image]))
    session.decode(9)
    return backend.calls


def load(engine: Engine, name: str) -> onnx.ModelProto:
    return onnx.load(engine.path / f"{name}.onnx", load_external_data=False)


def search(engine: Engine, name: str, feed: dict[str, Any], changed: onnx.ModelProto) -> Parting | None:
    model = load(engine, name)
    ours, reference = onnxruntime_probe(changed, engine.path), onnxruntime_probe(model, engine.path, optimized=False)
    return first_difference(name, model, feed, ours, reference, NODE_SHARE[engine.precision])


def attention_at(place: int) -> Callable[[onnx.ModelProto], onnx.NodeProto]:
    def change(model: onnx.ModelProto) -> onnx.NodeProto:
        node = [node for node in model.graph.node if node.op_type == "Attention"][place]
        next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.5
        return node

    return change


def another_constant(model: onnx.ModelProto) -> onnx.NodeProto:
    """The first node that adds or multiplies by a constant of the graph gets twice that."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data and tensor.data_type in (1, 10)}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.op_type in ("Add", "Mul") and name in constants:
                doubled = numpy_helper.from_array(2 * numpy_helper.to_array(constants[name]), f"{name}_doubled")
                model.graph.initializer.append(doubled)
                node.input[place] = doubled.name
                return node
    pytest.skip("no such node in this graph")


def other_norm(model: onnx.ModelProto) -> onnx.NodeProto:
    node = [node for node in model.graph.node if node.op_type == "RMSNormalization"][-1]
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 0.5
    return node


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, attention_at(0)),
        (0, attention_at(1)),
        (1, attention_at(0)),
        (1, attention_at(2)),
        (1, other_norm),
        (2, attention_at(3)),
        (0, another_constant),
    ],
)
def test_a_changed_node_is_found(engine: Engine, calls: Calls, number: int, change: Callable[[onnx.ModelProto], onnx.NodeProto]) -> None:
    name, feed = calls[number]
    changed = load(engine, name)
    node = change(changed)
    parting = search(engine, name, feed, changed)
    assert parting is not None
    assert (parting.graph, parting.node, parting.op_type) == (name, node.name, node.op_type)
    assert parting.output in node.output
    assert parting.worst > parting.allowed
    assert node.name in str(parting) and "\n" not in str(parting)


def test_equal_graphs_do_not_part(engine: Engine, calls: Calls) -> None:
    assert [name for name, _ in calls] == ["vision", "language", "language"]
    for name, feed in calls:
        assert search(engine, name, feed, load(engine, name)) is None


def test_a_cut_is_searched_in_as_many_runs_as_halving_takes(engine: Engine, calls: Calls) -> None:
    name, feed = calls[1]
    model, changed, runs = load(engine, name), load(engine, name), []
    attention_at(2)(changed)
    probe = onnxruntime_probe(changed, engine.path)

    def counted(feed: Any, names: Sequence[str]) -> Any:
        runs.append(len(names))
        return probe(feed, names)

    first_difference(name, model, feed, counted, onnxruntime_probe(model, engine.path, optimized=False), NODE_SHARE[engine.precision])
    assert len(runs) <= 2 + np.log2(len(model.graph.node))
    assert max(runs) < 40  # a cut, not the graph


@pytest.mark.parametrize(
    ("ours", "reference", "passed"),
    [
        ([1.0, 2.0], [1.0, 2.0019], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1e-9, 2.0], [2e-9, 2.0], True),
        ([0.5, 1e30], [0.6, 1e30], False),  # what protects a token is no measure for the others
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([np.nan, 1.0], [1.0, 1.0], False),
        ([1.0], [1.0, 1.0], False),
        ([], [], True),
    ],
)
def test_floats_may_differ_by_a_share_of_the_largest(ours: list[float], reference: list[float], passed: bool) -> None:
    (found,) = compare({"x": np.array(ours, np.float32)}, {"x": np.array(reference, np.float32)}, 1e-3)
    assert found.passed is passed


def test_whole_numbers_and_truth_values_may_not_differ() -> None:
    assert not compare({"x": np.array([100_000, 2])}, {"x": np.array([100_001, 2])}, 0.5)[0].passed
    assert not compare({"x": np.array([True])}, {"x": np.array([False])}, 0.5)[0].passed
    assert compare({"x": np.array([True])}, {"x": np.array([True])}, 0.5)[0].passed


# -------------------------------------------------------------------------------------------- the rung, and the command


def damaged(engine: Engine, folder: Path) -> Engine:
    """A copy whose language graph scales one layer's scores by half as much again."""
    shutil.copytree(engine.path, folder)
    model = load(engine, "language")
    attention_at(2)(model)
    onnx.save(model, folder / "language.onnx")
    return dataclasses.replace(engine, path=folder, language=dataclasses.replace(engine.language, cpu_file=None))


def test_a_rung_compares_a_target_with_onnx_runtime(engine: Engine, tmp_path: Path) -> None:
    findings = verify_target(Session(engine), "tensorrt-rtx", [ITEM])
    assert all(finding.passed and finding.rung == "e" for finding in findings)
    assert len(findings) == (4 if engine.precision == "fp32" else 3)

    session = Session(damaged(engine, tmp_path / "engine"))
    session.engine = engine  # whose graphs are the reference
    findings = verify_target(session, "tensorrt-rtx", [ITEM])
    assert [finding.passed for finding in findings][-2:] == [False, False]
    assert all(finding.passed for finding in findings[:-2])  # the vision graph is as it was


def test_onnx_runtime_does_not_part_from_itself(engine: Engine) -> None:
    assert bisect(engine, "onnxruntime", [ITEM]) is None


def test_the_command_names_the_node(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimisation that goes wrong is played by a graph that was changed behind the probe that optimises."""

    def probe(model: onnx.ModelProto, folder: Path, *, optimized: bool = True) -> Any:
        if optimized:
            model = with_outputs(model, [output.name for output in model.graph.output])
            attention_at(0)(model)
        return onnxruntime_probe(model, folder, optimized=optimized)

    monkeypatch.setattr("vflow.exporter.cli.stop_on_signals", lambda: None)
    monkeypatch.setattr(verify_target_module, "onnxruntime_probe", probe)
    monkeypatch.setattr("vflow.exporter.verify.verify_engine", lambda *_, **__: [verify_target_module.Finding("b", "logits", 1.0, 0.1, False)])
    command = ["verify", str(engine.path), "--samples", "1", "--bisect"]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["parting"]["op_type"] == "Attention"


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")  # of Polygraphy, which sets a timing cache
@pytest.mark.parametrize("name", ["vision", "language"])
def test_an_engine_with_further_outputs_is_built(name: str, build: Callable[..., Engine], random_checkpoint: Path, tmp_path: Path) -> None:
    """As far as it goes without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    from vflow.engines.graphs import BuiltEngine, Target
    from vflow.exporter.tensorrt.graph import engine_interface, graph_for_target
    from vflow.exporter.tensorrt.profiles import language_profiles, vision_profiles

    engine = build(random_checkpoint, SCHEDULE, "fp16")
    profiles = {"vision": vision_profiles(engine.limits), "language": language_profiles(engine.segments, engine.limits)}
    graphs = {"vision": engine.vision, "language": engine.language}
    built = {
        key: BuiltEngine(graph.file, "l", "r", *engine_interface(graph, engine.segments), profiles[key], 1, 1.0, None)
        for key, graph in graphs.items()
    }
    engine = dataclasses.replace(engine, targets={"tensorrt-rtx": Target("tensorrt-rtx", {}, (), **built)})
    model = graph_for_target("tensorrt-rtx", engine.path / f"{name}.onnx", engine.segments)
    nodes = list(model.graph.node)
    names = [nodes[place].output[0] for place in (len(nodes) // 4, len(nodes) // 2, 3 * len(nodes) // 4)]
    plan = bytes(build_with_outputs(engine, "tensorrt-rtx", name, model, [*names, model.graph.output[0].name]))
    assert all(output.encode() in plan for output in names)  # by name, as inputs and outputs are in a plan
