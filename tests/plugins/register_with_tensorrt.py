"""Runs in a process of its own with TensorRT's Python bindings over stub libraries: registers the plugins of the folders given, and prints,
as JSON, what NVIDIA's own code made of them.

Symbolic sizes are without values here, since only TensorRT itself has an expression builder: what is checked is every type, name and count
that ``tensorrt.plugin`` checks. Their values are ``Contract.launch``'s, from the same expressions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
from tensorrt.plugin._lib import QDP_REGISTRY, _TemplatePluginCreator
from tensorrt.plugin._tensor import Shape
from vflow.plugins.compile import read_contracts
from vflow.plugins.contract import Contract
from vflow.plugins.tensorrt import register_plugins

PRECISIONS = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}


def described(contract: Contract) -> list[Any]:
    """Input descriptors of the contract's dtypes and widths, all other sizes free."""
    descriptors = []
    for argument in contract.inputs:
        dtype = PRECISIONS[contract.precision] if argument.dtype == "T" else getattr(trt, argument.dtype)
        descriptor = trtp.TensorDesc(trtp.ShapeExprs(len(argument.shape), _is_dummy=True), dtype)
        descriptor.shape = Shape(tuple(contract.static.get(size, -1) for size in argument.shape))
        descriptors.append(descriptor)
    return descriptors


def created(contract: Contract, inputs: list[Any]) -> list[str]:
    """Output types of the plugin that TensorRT makes of a node: attributes arrive as float32, as the ONNX parser has them."""
    creator = _TemplatePluginCreator(contract.op, "vflow", dict.fromkeys(contract.attributes, (True, float)))
    fields = [trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32) for name, value in contract.attributes.items()]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(contract.op, "vflow", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, request)
    types = plugin.get_output_data_types([tensor.dtype for tensor in inputs], [len(argument.shape) for argument in contract.inputs])
    assert plugin.aot_impl_function(*inputs, *plugin.attrs.values(), (), 0)[0] == contract.kernel  # chosen although attributes were rounded
    return [kind.name for kind in types]


def run(folder: Path, contract: Contract) -> dict[str, Any]:
    definition = QDP_REGISTRY[f"vflow::{contract.op}"]
    inputs = described(contract)
    outputs = definition.register_func(*inputs, **contract.attributes)
    combinations = [c for combination in definition.autotune_func(*inputs, outputs) for c in combination._get_combinations()]
    name, code, launch, sizes = definition.aot_impl_func(*inputs, *contract.attributes.values(), outputs, 0)
    assert isinstance(launch, trtp.KernelLaunchParams)
    assert isinstance(sizes, trtp.SymIntExprs)
    assert all(isinstance(size, trtp.SymInt32) for size in sizes)
    return {
        "op": contract.op,
        "precision": contract.precision,
        "widths": contract.static,
        "outputs": [[output.dtype.name, len(output.shape_expr)] for output in outputs],
        "created": created(contract, inputs),
        "types": [[kind.name for kind in combination.types] for combination in combinations],
        "kernel": name,
        "same_code": code == (folder / contract.ptx).read_text(),
        "sizes": len(sizes),
        "inputs": list(definition.input_tensor_names),
        "attributes": {key: kind.__name__ for key, kind in definition.input_attrs.items()},
    }


def main() -> None:
    target, *folders = sys.argv[1:]
    registered = {identity for folder in folders for identity in register_plugins(Path(folder), target, lazy=True)}
    assert registered == set(QDP_REGISTRY)
    found = [run(Path(folder), c) for folder in folders for c in read_contracts(Path(folder)) if c.target == target]
    other = "8.9"
    register_plugins(Path(folders[0]), other, lazy=True)  # from now on for another GPU: kernels for the first must not be taken
    found_then = [run(Path(folders[0]), c) for c in read_contracts(Path(folders[0])) if c.target == other]
    assert all(plugin["same_code"] for plugin in found_then)
    print(json.dumps(found))


main()
