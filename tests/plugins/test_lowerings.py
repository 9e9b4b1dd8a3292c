"""Every op's function body in TensorRT-RTX, in every precision: it builds, and the parsed network holds what the body says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ops
import pytest
import torch
from hypothesis import given
from onnx import TensorProto, helper
from rtx import Parsed
from test_kernels_compaction import length, selections
from vflow.exporter.schedule import Schedule, Stage
from vflow.plugins import selection_lowering
from vflow.plugins.compaction import group_tokens, keep_top
from vflow.plugins.node import DOMAIN, OPSET, VERSION

T = "T"
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FIXED = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}
SCALE = 0.3125  # exact in every precision, and found nowhere else in the bodies
FLOOR = 2.0**-20
MOST_TOKENS = 16384
Signature = tuple[list[tuple[str, list[Any]]], list[tuple[str, list[Any]]], dict[str, float]]
OPS: dict[str, Signature] = {  # inputs and outputs (type, shape), attributes
    "RowLogSumExp": ([(T, [4, "R", 16]), (T, [4, "P", 16])], [("float32", [4, "R"])], {"scale": SCALE}),
    "MaskedColumnMean": (
        [(T, [4, "R", 16]), (T, [4, "P", 16]), ("float32", [4, "R"]), ("bool", ["R"])], [("float32", [4, "P"])], {"scale": SCALE},
    ),
    "KeepTop": ([("float32", ["S"]), ("int32", ["M"])], [("int64", ["M"])], {}),
    "KeepTopPerCell": (
        [("float32", ["N"]), ("int64", ["N"]), ("int64", ["C"]), ("int32", ["M"])],
        [("int64", ["M"]), ("int64", ["N"]), ("int64", ["M"]), ("int64", ["C"])], {},
    ),
    "GroupTokens": ([("int64", ["M"]), ("int64", ["N"]), ("int64", ["M"])], [("int64", ["N"]), ("int64", ["M"])], {}),
    "MergeTokens": (
        [(T, ["N", 32]), ("float32", ["N"]), *(("int64", [size]) for size in ("M", "N", "M", "N", "M"))],
        [(T, ["M", 32]), ("float32", ["M"])], {"floor": FLOOR},
    ),
    "GatherTokens": (
        [(T, ["B", "S", 32]), (T, ["B", "S", 4]), (T, ["B", "S", 4]), ("float32", ["S"]), ("int64", ["M"])],
        [(T, ["B", "M", 32]), (T, ["B", "M", 4]), (T, ["B", "M", 4]), ("float32", ["M"])], {},
    ),
    "LastTokenLogSumExp": ([(T, [4, 16]), (T, [2, "S", 16]), ("bool", ["S"])], [("float32", [4, "B"])], {"scale": SCALE}),
    "LastTokenAttention": (
        [(T, [4, 16]), (T, [2, "S", 16]), ("bool", ["S"]), ("float32", [4, "B"])], [("float32", ["S"])], {"scale": SCALE},
    ),
}  # fmt: skip


UNREAD = {"GroupTokens": ("index",), "MergeTokens": ("order", "start")}  # by the body: index for its length alone, the others are for kernels


def complaints(op: str, parsed: Parsed) -> list[str]:
    return [line for line in parsed.complaints if not any(re.search(rf"(Unused Input:|Input Tensor) {name}\b", line) for name in UNREAD.get(op, ()))]


def parsed_op(op: str, precision: str, function: onnx.FunctionProto | None = None) -> Parsed:
    body = function or onnx_ops.FUNCTIONS[op]
    inputs, outputs, attributes = OPS[op]
    kinds = {**FIXED, T: TYPES[precision]}
    values = [helper.make_tensor_value_info(name, kinds[kind], shape) for name, (kind, shape) in zip(body.input, inputs, strict=True)]
    results = [helper.make_tensor_value_info(f"{name}_out", kinds[kind], shape) for name, (kind, shape) in zip(body.output, outputs, strict=True)]
    node = helper.make_node(op, list(body.input), [value.name for value in results], domain=DOMAIN, **attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], op, values, results)
    model = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=11)
    return Parsed(model.SerializeToString())


def few_tokens(name: str, shape: list[int]) -> list[tuple[int, ...]]:
    return [tuple(number if size < 0 else size for size in shape) for number in (1, 64, 256)]


def many_tokens(name: str, shape: list[int]) -> list[tuple[int, ...]]:
    return [tuple(number if size < 0 else size for size in shape) for number in (1, 1024, MOST_TOKENS)]


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_body_builds_without_complaint(op: str, precision: str) -> None:
    parsed = parsed_op(op, precision)
    parsed.build(few_tokens)
    assert complaints(op, parsed) == []
    names = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "float32": "FLOAT", "int64": "INT64"}
    outputs = [parsed.network.get_output(number).dtype.name for number in range(parsed.network.num_outputs)]
    assert outputs == [names[precision if kind == T else kind] for kind, _ in OPS[op][1]]


FEW_SURVIVE = {"R": 37, "P": 37, "N": 21, "S": 21, "M": 6, "C": 4, "B": 1}
BODIES = [*onnx_ops.FUNCTIONS.values(), *selection_lowering.FUNCTIONS]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_body_builds_where_sizes_are_known_and_differ(body: onnx.FunctionProto) -> None:
    """Only then the builder infers every shape: what free sizes leave open would fail where the engine runs."""
    parsed = parsed_op(body.name, "fp16", body)
    shapes = {name: tuple(FEW_SURVIVE.get(size, size) for size in shape) for name, (_, shape) in zip(body.input, OPS[body.name][0], strict=True)}
    parsed.build(lambda name, shape: [shapes[name]] * 3)
    assert complaints(body.name, parsed) == []


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("op", ["RowLogSumExp", "MaskedColumnMean"])
def test_scoring_is_fused_attention_in_the_precision_that_comes_in(op: str, precision: str) -> None:
    """Nothing that the body asks of Attention is dropped: no mask, not causal, one width for Q, K and V, and the scale is applied."""
    parsed = parsed_op(op, precision)
    wanted = {node.name or str(number): node for number, node in enumerate(onnx_ops.FUNCTIONS[op].node) if node.op_type == "Attention"}
    layers = parsed.attentions()
    assert len(layers) == len(wanted) > 0
    for layer in layers:
        attention = layer.attention
        query, key, value = (layer.get_input(number) for number in range(3))
        assert attention.mask is None
        assert attention.causal_kind.name == "NONE"
        assert attention.key_value_lengths is None
        assert query.shape[3] == key.shape[3] == value.shape[3]
        assert query.shape[3] % 8 == 0
        assert {tensor.dtype.name for tensor in (query, key, value)} == {{"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}[precision]}
    assert SCALE in parsed.constants()
    assert parsed.kinds()["SOFTMAX"] == parsed.kinds()["MATRIX_MULTIPLY"] == 0  # no map in sight


def test_attributes_reach_the_network() -> None:
    assert FLOOR in parsed_op("MergeTokens", "fp16").constants()
    assert SCALE in parsed_op("LastTokenAttention", "fp16").constants()


def test_merging_needs_no_scatter() -> None:
    kinds = parsed_op("MergeTokens", "fp16").kinds()
    assert kinds["SCATTER"] == 0
    assert kinds["MATRIX_MULTIPLY"] == 1


@pytest.mark.parametrize("op", ["KeepTop", "KeepTopPerCell", "GroupTokens"])
def test_top_k_body_is_refused_beyond_its_limit_and_the_other_takes_any_number(op: str) -> None:
    """The limit shows as a warning in the build and as an error where the engine runs; hence the bodies without TopK."""
    by_top_k = parsed_op(op, "fp32")
    by_top_k.build(many_tokens)
    assert any(f"K exceeds the maximum value allowed ({selection_lowering.TOP_K_LIMIT})" in line for line in by_top_k.complaints)
    body = next(function for function in selection_lowering.FUNCTIONS if function.name == op)
    by_comparison = parsed_op(op, "fp32", body)
    assert by_comparison.kinds()["TOPK"] == 0
    by_comparison.build(many_tokens)
    assert complaints(op, by_comparison) == []


@given(case=selections())
def test_selection_by_comparison_keeps_the_same_survivors(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> None:
    importance, cell, cells, count = case
    other = {function.name: function for function in selection_lowering.FUNCTIONS}
    actual = onnx_ops.run_body(other["KeepTopPerCell"], importance, cell, cells, length(count))
    *selected, home = torch.ops.vflow.keep_top_per_cell(importance, cell, cells, length(count))
    for by_comparison, expected in zip(actual, (*selected, home), strict=True):
        np.testing.assert_array_equal(by_comparison, expected)
    for by_comparison, expected in zip(onnx_ops.run_body(other["GroupTokens"], *selected), group_tokens(*selected), strict=True):
        np.testing.assert_array_equal(by_comparison, expected)
    np.testing.assert_array_equal(onnx_ops.run_body(other["KeepTop"], importance, length(count))[0], keep_top(importance, count))


FULL = Schedule((Stage("tower", 2, 700), Stage("decoder", 0, 500, 2.0), Stage("decoder", 2, 250)), guidance_weight=0.5)


SIZES = {"rows": 6, "columns": 8, "budget": 48, "visual": 24, "batch": 1, "length": 40}  # by the name of a free dimension


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exported_graphs_build(random_checkpoint: Path, build: Callable[..., Any], precision: str) -> None:
    """Both graphs of an engine, with stages in tower and decoder, recycling and guidance; the caches' capacities are fixed, as they must be."""
    folder = Path(build(random_checkpoint, FULL, precision).path)
    segments = json.loads((folder / "manifest.json").read_text())["segments"]
    capacity = {f"capacity_{number}": segment["capacity"] for number, segment in enumerate(segments)}
    for graph in ("vision", "language"):
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param in capacity:
                    size.dim_value = capacity[size.dim_param]
        shapes = {value.name: tuple(SIZES.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim) for value in model.graph.input}
        parsed = Parsed(model.SerializeToString(), str(folder / f"{graph}.onnx"))
        parsed.build(lambda name, shape, shapes=shapes: [shapes[name]] * 3)
        assert parsed.complaints == []
