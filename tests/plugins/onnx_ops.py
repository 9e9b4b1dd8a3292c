"""Runs one ONNX function body in ONNX Runtime, as an engine that does not know the op would."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from vflow.plugins import compaction, guidance, importance
from vflow.plugins.node import DOMAIN, OPSET, VERSION

FUNCTIONS = {f.name: f for module in (importance, compaction, guidance) for f in module.FUNCTIONS}
OUTPUTS: dict[str, list[tuple[str | None, int]]] = {  # type (None: that of the first input) and rank
    "RowLogSumExp": [("float32", 2)],
    "MaskedColumnMean": [("float32", 2)],
    "KeepTop": [("int64", 1)],
    "KeepTopPerCell": [("int64", 1)] * 4,
    "GroupTokens": [("int64", 1)] * 2,
    "MergeTokens": [(None, 2), ("float32", 1)],
    "GatherTokens": [(None, 3), (None, 3), (None, 3), ("float32", 1)],
    "LastTokenLogSumExp": [("float32", 2)],
    "LastTokenAttention": [("float32", 1)],
}
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


@cache
def _session(body: bytes, inputs: tuple[tuple[str, int], ...], attributes: tuple[tuple[str, float], ...]) -> onnxruntime.InferenceSession:
    function = onnx.FunctionProto.FromString(body)
    op = function.name
    node = helper.make_node(op, list(function.input), list(function.output), domain=DOMAIN, **dict(attributes))
    values = [helper.make_tensor_value_info(name, TYPES[dtype], [None] * rank) for name, (dtype, rank) in zip(function.input, inputs, strict=True)]
    outputs = [
        helper.make_tensor_value_info(name, TYPES[kind or inputs[0][0]], [None] * rank)
        for name, (kind, rank) in zip(function.output, OUTPUTS[op], strict=True)
    ]
    graph = helper.make_graph([node], "op", values, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # ONNX Runtime 1.32.0 can crash in this optimizer (engines/backends/onnxruntime.py says where).
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )


def run_op(op: str, *inputs: Any, **attributes: float) -> list[NDArray[Any]]:
    """Outputs of the op's function body; inputs are arrays or tensors."""
    return run_body(FUNCTIONS[op], *inputs, **attributes)


def run_body(function: onnx.FunctionProto, *inputs: Any, **attributes: float) -> list[NDArray[Any]]:
    """Outputs of a function body that need not be the op's own."""
    arrays = [np.asarray(value) for value in inputs]
    session = _session(function.SerializeToString(deterministic=True), tuple((str(a.dtype), a.ndim) for a in arrays), tuple(attributes.items()))
    return session.run(None, dict(zip(function.input, arrays, strict=True)))
