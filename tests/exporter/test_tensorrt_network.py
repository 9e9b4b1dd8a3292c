"""The parsed network says what the graph says, layer by layer, and one that does not is refused: the parser drops things in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from vflow.engines.graphs import GRAPHS, Graph, TensorInfo
from vflow.engines.manifest import Engine
from vflow.exporter.schedule import Importance, Schedule, Stage
from vflow.exporter.tensorrt.engine import build_serialized, check_log
from vflow.exporter.tensorrt.graph import engine_interface, graph_for_target
from vflow.exporter.tensorrt.library import load_library
from vflow.exporter.tensorrt.network import (
    NetworkError,
    Parsed,
    check_network,
    layer_report,
    parse_graph_file,
    patch_attention,
)
from vflow.exporter.tensorrt.profiles import language_profiles

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")

STAGES = (Stage("tower", 2, 700), Stage("decoder", 0, 500, 2.0), Stage("decoder", 2, 250))
SCHEDULE = Schedule(STAGES, Importance(entropy_weight=0.5), guidance_weight=0.5)
LENGTHS = 6  # place of nonpad_kv_seqlen among the inputs of Attention
Change = Callable[[onnx.ModelProto], Any]
Parse = Callable[..., Parsed]


@pytest.fixture(scope="module")
def engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    """fp16, with stages in tower and decoder, recycling and guidance."""
    return build(random_checkpoint, SCHEDULE, "fp16")


@pytest.fixture(scope="module")
def masked_engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    """The same with proportional attention, whose graph has masks for lengths and causality."""
    return build(random_checkpoint, dataclasses.replace(SCHEDULE, proportional_attention=2.0), "fp16")


@pytest.fixture
def parse(engine: Engine) -> Parse:
    """``parse("language", change)``: the network of a graph, after a change of the graph; attention is not patched yet."""
    return lambda name, change=lambda model: None: parse_of(engine, name, change)


def parse_of(engine: Engine, name: str, change: Change = lambda model: None) -> Parsed:
    model = graph_for_target("tensorrt-rtx", engine.path / graph_of(engine, name).file, engine.segments)
    change(model)
    file = engine.path / f".{name}-under-test.onnx"  # beside the weights
    onnx.save(model, file)
    try:
        return parse_graph_file(load_library("tensorrt-rtx"), file)
    finally:
        file.unlink()


def graph_of(engine: Engine, name: str) -> Graph:
    return {"vision": engine.vision, "language": engine.language}[name]


def check(engine: Engine, name: str, parsed: Parsed) -> None:
    check_network(parsed, *engine_interface(graph_of(engine, name), engine.segments))


def node_of(layer: Any) -> str:
    return str(layer.attention.metadata).removeprefix("[ONNX Layer: ").removesuffix("]")


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Attention"]


# -------------------------------------------------------------------------------------------------------- what is right passes


def test_every_attention_of_the_language_graph_gets_its_lengths_and_causality(engine: Engine, parse: Parse) -> None:
    parsed = parse("language")
    patch_attention(parsed)
    check(engine, "language", parsed)
    layers = {node_of(layer): layer for layer in parsed.of_type("ATTENTION_INPUT")}
    nodes = attention_nodes(parsed.model)
    assert len(nodes) == engine.shape.decoder.layers
    casts = {layer.get_output(0).name: layer.get_input(0).name for layer in parsed.of_type("CAST")}
    lengths_of_segments = []
    for node in nodes:
        attention = layers[node.name].attention
        assert attention.causal_kind.name == "LOWER_RIGHT"
        assert attention.decomposable
        assert attention.key_value_lengths.dtype.name == "INT32"
        assert casts[attention.key_value_lengths.name] == node.input[LENGTHS]
        lengths_of_segments.append(node.input[LENGTHS])
    assert lengths_of_segments[0] == lengths_of_segments[1] != lengths_of_segments[2] == lengths_of_segments[3]  # one for each segment


def test_every_attention_of_a_masked_graph_gets_the_mask_of_its_segment(masked_engine: Engine) -> None:
    parsed = parse_of(masked_engine, "language")
    patch_attention(parsed)
    check(masked_engine, "language", parsed)
    layers = {node_of(layer): layer.attention for layer in parsed.of_type("ATTENTION_INPUT")}
    masks = [node.input[3] for node in attention_nodes(parsed.model)]
    assert [layers[node.name].mask.name for node in attention_nodes(parsed.model)] == masks
    assert masks[0] == masks[1] != masks[2] == masks[3]
    assert {(attention.causal_kind.name, attention.decomposable) for attention in layers.values()} == {("NONE", True)}


@pytest.mark.parametrize(("place", "message"), [(0, "its mask is .*, the graph's is "), (None, "neither a mask nor both lengths and causality")])
def test_a_mask_of_another_segment_or_left_out_is_caught(masked_engine: Engine, place: int | None, message: str) -> None:
    parsed = parse_of(masked_engine, "language")
    patch_attention(parsed)
    model = onnx.ModelProto.FromString(parsed.model.SerializeToString())
    nodes = attention_nodes(model)
    nodes[-1].input[3] = "" if place is None else nodes[place].input[3]
    with pytest.raises(NetworkError, match=rf"{nodes[-1].name}.*{message}"):
        check(masked_engine, "language", dataclasses.replace(parsed, model=model))


def test_attention_of_the_vision_graph_may_decompose_and_stays_uncausal(engine: Engine, parse: Parse) -> None:
    parsed = parse("vision")
    patch_attention(parsed)
    check(engine, "vision", parsed)
    layers = parsed.of_type("ATTENTION_INPUT")
    assert len(layers) > engine.shape.tower.blocks  # those of the scoring functions as well
    for layer in layers:
        assert layer.attention.decomposable
        assert layer.attention.causal_kind.name == "NONE"
        assert layer.attention.key_value_lengths is None


@pytest.mark.parametrize("name", GRAPHS)
def test_selections_come_without_top_k(parse: Parse, name: str) -> None:
    """It stops at 3,840 tokens, which shows where the engine runs."""
    parsed = parse(name)
    assert any(node.op_type.startswith("KeepTop") for node in parsed.model.graph.node)
    assert parsed.of_type("TOPK") == []


def test_the_report_lists_every_layer_with_what_attention_is_told(parse: Parse) -> None:
    parsed = parse("language")
    patch_attention(parsed)
    report = layer_report(parsed)
    assert len(report) == parsed.network.num_layers
    attention = [row for row in report if row["type"] == "ATTENTION_INPUT"]
    assert {row["attention"]["causality"] for row in attention} == {"LOWER_RIGHT"}
    assert all(row["attention"]["key_value_lengths"] in row["inputs"] for row in attention)
    cache = next(row for row in report if row["type"] == "KV_CACHE_UPDATE")
    assert cache["inputs"][0] == "past_key_values.0.key"
    assert cache["outputs"][0]["dtype"] == "float16"


# ------------------------------------------------------------------------------------------------- what is forgotten is caught


@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_as_parsed_is_refused(engine: Engine, parse: Parse, name: str) -> None:
    with pytest.raises(NetworkError, match="attention layer of"):
        check(engine, name, parse(name))


def _no_lengths(attention: Any, trt: Any, network: Any) -> None:
    attention.key_value_lengths = None


def _top_left(attention: Any, trt: Any, network: Any) -> None:
    attention.causal_kind = trt.CausalMaskKind.UPPER_LEFT


def _not_causal(attention: Any, trt: Any, network: Any) -> None:
    attention.causal_kind = trt.CausalMaskKind.NONE


def _whole(attention: Any, trt: Any, network: Any) -> None:
    attention.decomposable = False


def _other_lengths(attention: Any, trt: Any, network: Any) -> None:
    attention.key_value_lengths = network.add_constant((1,), trt.Weights(np.ones(1, np.int32))).get_output(0)


FORGETTING = {
    _no_lengths: "has no key/value lengths",
    _top_left: "causality is UPPER_LEFT, the graph asks for LOWER_RIGHT",
    _not_causal: "causality is NONE, the graph asks for LOWER_RIGHT",
    _whole: "may not be decomposed",
    _other_lengths: "takes its lengths from",
}


@pytest.mark.parametrize("forget", FORGETTING)
@pytest.mark.parametrize("place", range(4))
def test_one_layer_left_out_is_caught_by_name(engine: Engine, parse: Parse, forget: Callable[[Any, Any, Any], None], place: int) -> None:
    parsed = parse("language")
    patch_attention(parsed)
    layer = parsed.of_type("ATTENTION_INPUT")[place]
    forget(layer.attention, parsed.library.trt, parsed.network)
    with pytest.raises(NetworkError, match=f"attention layer of {node_of(layer)} .*{FORGETTING[forget]}|{node_of(layer)}: {FORGETTING[forget]}"):
        check(engine, "language", parsed)


def test_lengths_of_another_segment_are_caught(engine: Engine, parse: Parse) -> None:
    parsed = parse("language")
    patch_attention(parsed)
    first, *_, last = parsed.of_type("ATTENTION_INPUT")
    last.attention.key_value_lengths = first.attention.key_value_lengths
    with pytest.raises(NetworkError, match=f"attention layer of {node_of(last)} takes its lengths from"):
        check(engine, "language", parsed)


def test_a_lost_layer_is_caught(engine: Engine, parse: Parse) -> None:
    parsed = parse("vision")
    patch_attention(parsed)
    model = onnx.ModelProto.FromString(parsed.model.SerializeToString())
    attention_nodes(model)[0].op_type = "Identity"
    with pytest.raises(NetworkError, match=r"the network has \d+ attention layers, the graph has \d+ Attention nodes"):
        check(engine, "vision", dataclasses.replace(parsed, model=model))


# ------------------------------------------------------------------------------------------- graphs that no engine is built from


def _lose_lengths(model: onnx.ModelProto) -> None:
    del attention_nodes(model)[1].input[LENGTHS:]


def _lose_causality(model: onnx.ModelProto) -> None:
    node = attention_nodes(model)[1]
    node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == "is_causal"))


def _softcap(model: onnx.ModelProto) -> None:
    attention_nodes(model)[1].attribute.append(helper.make_attribute("softcap", 30.0))


def _mask(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1), bool), "mask"))
    attention_nodes(model)[1].input[3] = "mask"


def _constant_instead(name: str, value: np.ndarray[Any, Any]) -> Change:
    """The graph computes with a constant, and the input stays without use."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}_constant"))
        for node in model.graph.node:
            for place, source in enumerate(node.input):
                if source == name:
                    node.input[place] = f"{name}_constant"

    return change


def _length_of_importance(model: onnx.ModelProto) -> None:
    """Importance still gives its length, but no longer its values."""
    users = [node for node in model.graph.node if "importance" in node.input]
    shape = helper.make_node("Shape", ["importance"], ["importance_shape"], "lengths")
    zeros = helper.make_node("ConstantOfShape", ["importance_shape"], ["importance_zeros"], "zeros")
    for node in users:
        node.input[list(node.input).index("importance")] = "importance_zeros"
    model.graph.node.insert(0, zeros)
    model.graph.node.insert(0, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose_lengths, "reads a KV cache but the graph gives it neither a mask nor both lengths and causality"),
        (_lose_causality, "reads a KV cache but the graph gives it neither a mask nor both lengths and causality"),
        (_constant_instead("visual_positions", np.arange(4)), "input visual_positions is not used"),
        (_constant_instead("budget_tokens", np.zeros(48, np.int32)), "input budget_tokens is not used"),
        (_length_of_importance, "input importance is used by its length alone"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_graph_that_lost_something_is_refused(engine: Engine, parse: Parse, change: Change, message: str) -> None:
    parsed = parse("language", change)
    patch_attention(parsed)
    with pytest.raises(NetworkError, match=message):
        check(engine, "language", parsed)


def _swap(field: str, op_type: str) -> Change:
    """The graph says something else than the network: two nodes exchange their first input or output."""

    def change(model: onnx.ModelProto) -> None:
        first, second = [node for node in model.graph.node if node.op_type == op_type][:2]
        ours, others = getattr(first, field), getattr(second, field)
        ours[0], others[0] = others[0], ours[0]

    return change


def _attribute(op_type: str, name: str, value: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == op_type)
        node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == name))
        node.attribute.append(helper.make_attribute(name, value))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap("input", "TensorScatter"), "KV cache update of .*: cache, places and result are"),
        (_swap("output", "TensorScatter"), "KV cache update of .*: cache, places and result are"),
        (_attribute("TensorScatter", "axis", 1), "must be linear on axis 2"),
        (_attribute("TensorScatter", "mode", "circular"), "must be linear on axis 2"),
        (_attribute("RotaryEmbedding", "interleaved", 1), "the network's settings differ from the graph's"),
        (_attribute("Attention", "scale", 0.5), "scores are scaled by 0.35.*, the graph asks for 0.5"),
        (_attribute("Attention", "scale", 0.25), "scores are scaled by 0.35.*, the graph asks for 0.25"),
        (_softcap, "attribute softcap may be dropped by the parser"),
        (_mask, "its mask is none, the graph's is mask"),
    ],
)
def test_a_network_that_differs_from_the_graph_is_refused(engine: Engine, parse: Parse, change: Change, message: str) -> None:
    parsed = parse("language")
    patch_attention(parsed)
    model = onnx.ModelProto.FromString(parsed.model.SerializeToString())
    change(model)
    with pytest.raises(NetworkError, match=message):
        check(engine, "language", dataclasses.replace(parsed, model=model))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorInfo("logits", "float16", ("batch", 48)), r"output logits is float \[-1, 48\], the graph's is float16"),
        (TensorInfo("logits", "float", ("batch", 47)), r"output logits is float \[-1, 48\], the graph's is float \[-1, 47\]"),
        (TensorInfo("logit", "float", ("batch", 48)), "outputs are "),
    ],
)
def test_another_interface_is_refused(engine: Engine, parse: Parse, tensor: TensorInfo, message: str) -> None:
    parsed = parse("language")
    patch_attention(parsed)
    inputs, (_, *others) = engine_interface(engine.language, engine.segments)
    with pytest.raises(NetworkError, match=message):
        check_network(parsed, inputs, (tensor, *others))


def test_what_the_parser_refuses_is_said_in_one_line(parse: Parse) -> None:
    def unknown_op(model: onnx.ModelProto) -> None:
        attention_nodes(model)[0].op_type = "NoSuchOperator"

    with pytest.raises(NetworkError, match=r"^\.language-under-test\.onnx: tensorrt-rtx cannot parse it \(.*NoSuchOperator.*\)$"):
        parse("language", unknown_op)


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ("Input Tensor importance is unused or used only at compile-time, but is not being removed.", True),
        ("Unused Input: nonpad_kv_seqlen", True),
        ("Profile kMAX values are not self-consistent. larger", True),
        ("K exceeds the maximum value allowed (3840)", True),
        ("Input Tensor budget_tokens is unused or used only at compile-time, but is not being removed.", False),
        ("Make sure output index has Int64 binding.", False),
    ],
)
def test_warnings_that_mean_a_wrong_engine_are_errors(message: str, refused: bool) -> None:
    library = load_library("tensorrt-rtx")
    library.log.clear()
    library.log.append((int(library.trt.ILogger.WARNING), message))
    try:
        if refused:
            with pytest.raises(ValueError, match="tensorrt-rtx warns: "):
                check_log(library)
        else:
            check_log(library)
    finally:
        library.log.clear()


# ------------------------------------------------------------------------------------------------------ what the builder is told


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")  # of Polygraphy, which sets a timing cache
def test_the_builder_gets_gpus_profiles_and_no_tf32(engine: Engine, parse: Parse) -> None:
    parsed = parse("language")
    patch_attention(parsed)
    configurations = []

    def recorded(**options: Any) -> Callable[[Any, Any], Any]:
        create = parsed.library.create_config(**options)

        def configure(builder: Any, network: Any) -> Any:
            configurations.append(create(builder, network))
            return configurations[-1]

        return configure

    trt = parsed.library.trt
    inputs, _ = engine_interface(engine.language, engine.segments)
    profiles = language_profiles(engine.segments, engine.limits)
    watched = dataclasses.replace(parsed, library=dataclasses.replace(parsed.library, create_config=recorded))
    plan = build_serialized(watched, inputs, profiles, ("8.9",))
    assert plan.nbytes > 0
    (configuration,) = configurations
    assert configuration.num_compute_capabilities == 1
    assert configuration.get_compute_capability(0) == trt.ComputeCapability.SM89
    assert configuration.num_optimization_profiles == 2
    assert not configuration.get_flag(trt.BuilderFlag.TF32)
    assert parsed.network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    check_log(parsed.library)
