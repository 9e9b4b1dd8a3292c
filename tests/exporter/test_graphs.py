"""What the exported files look like: operators, function bodies, weights, inputs and outputs."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from schedules import DEEPSTACK_SCHEDULES, SCHEDULES, WINDOWED_SCHEDULES
from vflow.engines import Engine
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.model import load_model
from vflow.plugins.compile import graph_kernels
from vflow.plugins.node import DOMAIN, OPSET

PRUNED, GUIDED, PROPORTIONAL = "tower and decoder", "guided, no first stage", "proportional"
BUILT = ("unpruned", PRUNED, GUIDED, PROPORTIONAL)
CASES = [(name, graph) for name in BUILT for graph in ("vision", "language")]
FUSED = {
    "vision": {"Attention": 3, "RotaryEmbedding": 6},
    "language": {"Attention": 4, "RotaryEmbedding": 8, "RMSNormalization": 9, "TensorScatter": 8},
}


@pytest.fixture(scope="module")
def engines(build: Callable[..., Engine], random_checkpoint: Path) -> dict[str, Engine]:
    return {name: build(random_checkpoint, SCHEDULES[name]) for name in BUILT}


def load(engine: Engine, graph: str) -> onnx.ModelProto:
    return onnx.load(engine.path / f"{graph}.onnx", load_external_data=False)


def external(model: onnx.ModelProto) -> dict[str, ExternalDataInfo]:
    return {t.name: ExternalDataInfo(t) for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_graphs_pass_the_checker_at_opset_24(engines: dict[str, Engine], name: str, graph: str) -> None:
    onnx.checker.check_model(str(engines[name].path / f"{graph}.onnx"))
    model = load(engines[name], graph)
    versions = {opset.domain: opset.version for opset in model.opset_import}
    assert versions.pop("") == OPSET == 24
    assert set(versions) <= {DOMAIN, "pkg.onnxscript.torch_lib.common"}
    domains = {node.domain for node in model.graph.node}
    assert domains <= {"", DOMAIN}


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_standard_operators_that_engines_fuse_are_there_as_one_node_each(engines: dict[str, Engine], name: str, graph: str) -> None:
    counts = Counter(node.op_type for node in load(engines[name], graph).graph.node if node.domain == "")
    assert {op: counts[op] for op in FUSED[graph]} == FUSED[graph]
    assert counts["Softmax"] == (3 if (name, graph) == (PRUNED, "vision") else 0)  # of the entropy; another would be a decomposed attention


def test_a_tower_that_looks_at_windows_is_of_such_operators_too(build: Callable[..., Engine], windowed_checkpoint: Path) -> None:
    engine = build(windowed_checkpoint, WINDOWED_SCHEDULES["windows"])
    nodes = [node for node in load(engine, "vision").graph.node if node.domain == ""]
    counts = Counter(node.op_type for node in nodes)
    assert {op: counts[op] for op in ("Attention", "RotaryEmbedding", "RMSNormalization")} == {
        "Attention": 4, "RotaryEmbedding": 8, "RMSNormalization": 9,  # two norms a block, and the merger's
    }  # fmt: skip
    assert sorted(len(node.input) for node in nodes if node.op_type == "Attention") == [3, 3, 4, 4]  # windows have a mask
    onnx.checker.check_model(str(engine.path / "vision.onnx"))


def test_a_model_with_deepstack_is_of_such_operators_too(build: Callable[..., Engine], deepstack_checkpoint: Path) -> None:
    engine = build(deepstack_checkpoint, DEEPSTACK_SCHEDULES["deepstack"])
    vision, language = (Counter(node.op_type for node in load(engine, name).graph.node if node.domain == "") for name in ("vision", "language"))
    assert (vision["Attention"], vision["RotaryEmbedding"], vision["LayerNormalization"]) == (4, 8, 11)  # two norms a block, and three mergers'
    assert (language["Attention"], language["RotaryEmbedding"], language["RMSNormalization"]) == (4, 8, 17)  # two a layer, two of its heads, the last
    assert [list(tensor.shape) for tensor in engine.language.inputs if tensor.name == "visual_embeds"] == [["visual", 96]]
    assert [list(tensor.shape) for tensor in engine.vision.outputs if tensor.name == "visual_embeds"] == [["survivors", 96]]
    onnx.checker.check_model(str(engine.path / "vision.onnx"))
    onnx.checker.check_model(str(engine.path / "language.onnx"))


@pytest.mark.parametrize(
    ("name", "graph", "ops"),
    [
        ("unpruned", "vision", {}),
        ("unpruned", "language", {}),
        (PRUNED, "vision", {"RowLogSumExp": 3, "MaskedColumnMean": 6, "KeepTop": 4, "KeepTopPerCell": 2, "GroupTokens": 2, "MergeTokens": 2}),
        (PRUNED, "language", {"KeepTop": 2, "GatherTokens": 2}),
        (PROPORTIONAL, "vision", {"RowLogSumExp": 2, "MaskedColumnMean": 2, "KeepTop": 1, "KeepTopPerCell": 2, "GroupTokens": 2, "MergeTokens": 3}),
        (PROPORTIONAL, "language", {"KeepTop": 1, "GatherTokens": 1, "LastTokenLogSumExp": 1, "LastTokenAttention": 1}),
        (GUIDED, "vision", {"RowLogSumExp": 1, "MaskedColumnMean": 1}),
        (GUIDED, "language", {"KeepTop": 2, "GatherTokens": 2, "LastTokenLogSumExp": 2, "LastTokenAttention": 2}),
    ],
)
def test_pruning_is_nodes_with_function_bodies(engines: dict[str, Engine], name: str, graph: str, ops: dict[str, int]) -> None:
    model = load(engines[name], graph)
    assert Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN) == ops
    bodies = {function.name: function for function in model.functions if function.domain == DOMAIN}
    assert set(bodies) == set(ops)
    assert all(node.domain == "" for body in bodies.values() for node in body.node)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the Triton language is missing")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_pruning_node_has_a_kernel_of_its_types_and_widths(build: Callable[..., Engine], random_checkpoint: Path, precision: str) -> None:
    """Sizes of merged tokens are merged in float32 by an engine of any precision, one column wide."""
    engine = build(random_checkpoint, SCHEDULES[PROPORTIONAL], precision=precision)
    graphs = [load(engine, "vision"), load(engine, "language")]
    kernels = graph_kernels(graphs, precision)
    assert {kernel.spec.op for kernel in kernels} == {node.op_type for graph in graphs for node in graph.graph.node if node.domain == DOMAIN}
    tower, decoder = engine.shape.tower, engine.shape.decoder
    merging = {(kernel.values["F"], kernel.precision) for kernel in kernels if kernel.spec.op == "MergeTokens"}
    assert merging == {(tower.group * tower.embed_dim, precision), (decoder.hidden_size, precision), (1, "fp32")}


def names(values: Any) -> list[str]:
    return [value.name for value in values]


CACHES = [f"past_key_values.{layer}.{kind}" for layer in range(4) for kind in ("key", "value")]
BIASES = [f"past_key_values.bias.{segment}" for segment in range(2)]


@pytest.mark.parametrize(
    ("name", "vision", "later"),
    [
        ("unpruned", ["pixel_values"], []),
        (PRUNED, ["pixel_values", "entropy", "budget_tokens"], ["importance", "budget_tokens"]),
        (GUIDED, ["pixel_values"], ["importance", "budget_tokens"]),
        (PROPORTIONAL, ["pixel_values", "entropy", "budget_tokens"], ["importance", "budget_tokens", "key_bias"]),
    ],
)
def test_inputs_and_outputs_are_those_documented_and_no_mask(engines: dict[str, Engine], name: str, vision: list[str], later: list[str]) -> None:
    model = load(engines[name], "vision")
    assert names(model.graph.input) == vision
    assert names(model.graph.output) == ["visual_embeds", "importance", "index", *(["key_bias"] if name == PROPORTIONAL else [])]
    model = load(engines[name], "language")
    caches = [*CACHES, *(BIASES if name == PROPORTIONAL else [])]
    assert names(model.graph.input) == ["input_ids", "position_ids", "visual_embeds", "visual_positions", *later, "past_lengths", *caches]
    assert names(model.graph.output) == ["logits", "last_hidden", *(cache.replace("past_key_values", "present") for cache in caches)]


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_every_input_is_used(engines: dict[str, Engine], name: str, graph: str) -> None:
    model = load(engines[name], graph)
    used = {value for node in model.graph.node for value in node.input}
    assert set(names(model.graph.input)) <= used
    assert set(names(model.graph.initializer)) <= used


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_the_manifest_describes_the_files(engines: dict[str, Engine], name: str, graph: str) -> None:
    model, described = load(engines[name], graph), getattr(engines[name], graph)
    for values, tensors in ((model.graph.input, described.inputs), (model.graph.output, described.outputs)):
        assert names(values) == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            sizes = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            assert sizes == tensor.shape
            assert all(size for size in sizes)  # neither nameless nor empty
            assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name == {"float": "float32"}.get(tensor.dtype, tensor.dtype)


def test_kv_dimensions_name_their_segment(engines: dict[str, Engine]) -> None:
    shapes = {tensor.name: tensor.shape for tensor in engines[PRUNED].language.inputs}
    assert [shapes[f"past_key_values.{layer}.key"] for layer in range(4)] == [
        ("batch", 2, "capacity_0", 8), ("batch", 2, "capacity_1", 8), ("batch", 2, "capacity_1", 8), ("batch", 2, "capacity_2", 8)
    ]  # fmt: skip
    assert shapes["past_lengths"] == ("batch", 3)


@pytest.mark.parametrize("name", ["unpruned", PRUNED])
def test_no_weight_is_transposed_when_the_graph_runs(engines: dict[str, Engine], name: str) -> None:
    for graph in ("vision", "language"):
        model = load(engines[name], graph)
        weights = set(external(model))
        assert not [node.name for node in model.graph.node if node.op_type == "Transpose" and set(node.input) & weights]


@pytest.mark.parametrize("kind", ["random_checkpoint", "untied_checkpoint"])
def test_all_weights_are_in_one_file_and_none_twice(
    build: Callable[..., Engine], engines: dict[str, Engine], request: pytest.FixtureRequest, kind: str
) -> None:
    tied = kind == "random_checkpoint"
    engine = engines[PRUNED] if tied else build(request.getfixturevalue(kind), SCHEDULES["guidance alone"])
    places = [external(load(engine, graph)) for graph in ("vision", "language")]
    spans = {(info.offset, info.length) for infos in places for info in infos.values()}
    assert {info.location for infos in places for info in infos.values()} == {"weights.bin"}
    assert sum(length for _, length in spans) == open_checkpoint(str(request.getfixturevalue(kind))).size  # each weight once
    ordered = sorted(spans)
    assert all(offset % 4096 == 0 for offset, _ in ordered)
    assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(ordered))
    assert sum(ordered[-1]) == (engine.path / "weights.bin").stat().st_size
    graphs = ["language.cpu.onnx", "language.onnx", "vision.cpu.onnx", "vision.onnx"]
    triton = {name for name in engine.files if name.startswith("triton/")}
    assert {*engine.files} - triton == {"chat_template.jinja", *graphs, "schedule.json", "tokenizer.json", "weights.bin"}


def test_weights_are_the_checkpoint_s_bit_for_bit(engines: dict[str, Engine], random_checkpoint: Path) -> None:
    parameters = {
        name.removeprefix("model."): value.detach()
        for name, value in load_model(open_checkpoint(str(random_checkpoint)), torch.float32).named_parameters()
    }
    engine, seen = engines[PRUNED], set()
    for graph in ("vision", "language"):
        model = onnx.load(engine.path / f"{graph}.onnx")
        for tensor in model.graph.initializer:
            name = tensor.name.removesuffix(".T")
            if name in parameters:
                expected = parameters[name].numpy()
                stored = onnx.numpy_helper.to_array(tensor)
                np.testing.assert_array_equal(stored, expected.T if tensor.name.endswith(".T") else expected)
                seen.add(name)
    assert seen == set(parameters)


def test_graphs_hold_neither_data_nor_traces_of_the_machine_that_built_them(engines: dict[str, Engine]) -> None:
    for engine in engines.values():
        for graph in ("vision", "language", "vision.cpu", "language.cpu"):
            content = (engine.path / f"{graph}.onnx").read_bytes()
            assert len(content) < 100_000
            assert b".py" not in content


def test_the_schedule_lies_beside_the_graphs(engines: dict[str, Engine]) -> None:
    from vflow.exporter.schedule import load_schedule

    for name, engine in engines.items():
        assert load_schedule(engine.path / "schedule.json") == SCHEDULES[name] == engine.schedule
