"""Engines of one op for ``gpu_check.py``: built, run and compared. Not run anywhere yet: written from the documentation of TensorRT.

TensorRT gets the op as a plugin from freshly compiled kernels, TensorRT-RTX as its function body. Both have one Python interface.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from gpu_cases import Case
from onnx import TensorProto, helper
from torch import Tensor
from vflow.plugins import compaction, guidance, importance, selection_lowering
from vflow.plugins.compile import FORMAT, MANIFEST_FILE, compile_kernel
from vflow.plugins.contract import ALIGNMENT, bind, evaluate
from vflow.plugins.launch import DTYPES
from vflow.plugins.node import DOMAIN, OPSET, VERSION

__all__ = ["check_engine"]

BODIES = {f.name: f for module in (importance, compaction, guidance, selection_lowering) for f in module.FUNCTIONS}
ONNX_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}
PRECISIONS = {
    "fp32": (TensorProto.FLOAT, torch.float32),
    "fp16": (TensorProto.FLOAT16, torch.float16),
    "bf16": (TensorProto.BFLOAT16, torch.bfloat16),
}
# Function bodies go through half precision in places where kernels hold float32 (docs/algorithm.md, section 1).
BODY_TOLERANCE = 1e-2

_kept: list[tempfile.TemporaryDirectory[str]] = []  # folders of registered plugins, which are read whenever an engine is built

Compare = Callable[[Case, Sequence[Tensor], Sequence[Tensor]], dict[str, Any]]


def check_engine(module: str, case: Case, precision: str, compare: Compare) -> dict[str, Any]:
    """Build the op's engine with ``tensorrt`` or ``tensorrt_rtx``, run it once, compare it with float64.

    Returns:
        The row of the report; ``passed`` is None for ops that graphs do not hold.
    """
    if case.spec.op not in BODIES:
        return {"passed": None, "note": "not an op of the graphs"}
    trt = importlib.import_module(module)
    model = _one_op(case, precision)
    if module == "tensorrt":
        model = _with_plugin(case, precision, model)
    outputs = _run(trt, _build(trt, model, case), case, precision)
    found = compare(case, outputs, case.expected())
    if module == "tensorrt_rtx" and not found["passed"]:
        found["passed"] = all(
            error <= (BODY_TOLERANCE if tolerance else 0) for error, tolerance in zip(found["errors"], case.tolerances, strict=True)
        )
    return found


def _one_op(case: Case, precision: str) -> onnx.ModelProto:
    """A graph that holds the op alone, with its function body; sizes are free."""
    kinds = {**ONNX_TYPES, "T": PRECISIONS[precision][0]}
    inputs = [argument for argument in case.spec.inputs if not argument.optional]
    fixed = bind(inputs, [tuple(tensor.shape) for tensor in case.inputs])
    shapes = {a.name: [fixed[size] if size in case.spec.static else size for size in a.shape] for a in (*inputs, *case.spec.outputs)}
    values = [helper.make_tensor_value_info(a.name, kinds[a.dtype], shapes[a.name]) for a in inputs]
    results = [helper.make_tensor_value_info(a.name, kinds[a.dtype], shapes[a.name]) for a in case.spec.outputs]
    node = helper.make_node(case.spec.op, [v.name for v in values], [v.name for v in results], domain=DOMAIN, **case.attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(
        helper.make_graph([node], case.spec.op, values, results), functions=[BODIES[case.spec.op]], opset_imports=opsets, ir_version=11
    )


def _with_plugin(case: Case, precision: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph for TensorRT, the op's plugin registered from kernels compiled for this GPU."""
    from vflow.plugins.tensorrt import register_plugins, with_plugins

    target = ".".join(map(str, torch.cuda.get_device_capability()))
    inputs = [argument for argument in case.spec.inputs if not argument.optional]
    values = bind(inputs, [tuple(tensor.shape) for tensor in case.inputs]) | case.attributes
    contract, ptx, _ = compile_kernel(case.spec, values, precision, target)
    _kept.append(tempfile.TemporaryDirectory())
    folder = Path(_kept[-1].name)
    (folder / contract.ptx).write_text(ptx, encoding="ascii")
    manifest = {"format": FORMAT, "alignment": ALIGNMENT, "kernels": [contract.to_dict()]}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    register_plugins(folder, target)
    return with_plugins(model)


def _build(trt: Any, model: onnx.ModelProto, case: Case) -> Any:
    """The engine, for the case's sizes."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type.name == "ATTENTION_INPUT":  # shapes without a fused kernel are decomposed instead of refused
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    configuration, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for number, tensor in enumerate(case.inputs):
        profile.set_shape(network.get_input(number).name, *[tuple(tensor.shape)] * 3)
    configuration.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, configuration)
    if serialized is None:
        raise RuntimeError("the engine was not built; the log above says why")
    return trt.Runtime(logger).deserialize_cuda_engine(serialized)


def _run(trt: Any, engine: Any, case: Case, precision: str) -> list[Tensor]:
    """Outputs of one execution."""
    context = engine.create_execution_context()
    arguments = [argument for argument in case.spec.inputs if not argument.optional]
    symbols = bind(arguments, [tuple(tensor.shape) for tensor in case.inputs])
    for argument, tensor in zip(arguments, case.inputs, strict=True):
        context.set_input_shape(argument.name, tuple(tensor.shape))
        context.set_tensor_address(argument.name, tensor.data_ptr())
    outputs = []
    for argument in case.spec.outputs:
        dtype = DTYPES.get(argument.dtype, PRECISIONS[precision][1])
        outputs.append(torch.empty([evaluate(size, symbols) for size in argument.shape], dtype=dtype, device="cuda"))
        context.set_tensor_address(argument.name, outputs[-1].data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError(f"{trt.__name__} did not run the engine")
    stream.synchronize()
    return outputs
