"""The ops as TensorRT quick plugins, made from the contracts and PTX of an engine directory.

An engine built with them carries the PTX and runs without Python and without a plugin library (``tensorrt.plugin``, TensorRT 10.7 and
later). ``register_plugins`` is called before the network is parsed, and ``with_plugins`` turns the exported graph into one whose ``vflow``
nodes the parser gives to the plugins instead of inlining their function bodies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from .compile import read_contracts
from .contract import Contract, ContractError, bind, evaluate
from .node import DOMAIN

__all__ = ["PLUGIN_VERSION", "register_plugins", "with_plugins"]

PLUGIN_VERSION = "1"  # what quick plugins always have
TYPE_NAMES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "float32": "FP32", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
ATTRIBUTE_TOLERANCE = 1e-6  # attributes pass through ONNX as float32


@dataclass(frozen=True)
class _Compiled:
    contract: Contract
    folder: Path


_compiled: dict[str, list[_Compiled]] = {}  # op → kernels of all folders registered so far; TensorRT's registry is global as well


def register_plugins(folder: Path, target: str, *, lazy: bool = False) -> list[str]:
    """Register a plugin for every op of which ``folder`` holds kernels.

    Args:
        folder: the ``plugins`` folder of an engine directory; may be called for several.
        target: compute capability of the GPU that is built for from now on, as "9.0".
        lazy: leave TensorRT's own registry alone until a plugin is used from Python; the ONNX parser does not find such plugins.

    Returns:
        The plugins' ids; none for a folder of an unpruned engine.

    Raises:
        ContractError: the folder has kernels, but none for the target.
        ImportError: TensorRT is not installed.
    """
    import tensorrt.plugin as trtp

    found = read_contracts(folder)
    contracts = [contract for contract in found if contract.target == target]
    if found and not contracts:
        raise ContractError(f"{folder}: no kernels for {target}; build with this target")
    for known in _compiled.values():  # what was registered for another GPU is of no use to this one
        known[:] = [compiled for compiled in known if compiled.contract.target == target]
    for contract in contracts:
        if contract.op not in _compiled:
            _compiled[contract.op] = []
            _register(trtp, contract, lazy)
        _compiled[contract.op].append(_Compiled(contract, folder))
    return sorted({f"{DOMAIN}::{contract.op}" for contract in contracts})


def with_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an exported graph in which the ``vflow`` nodes whose plugins are registered have no function bodies any more.

    Weights stay where they are (pass the parser the file's path for external data).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.domain == DOMAIN and node.op_type in _compiled:
            node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
            node.attribute.append(helper.make_attribute("plugin_version", PLUGIN_VERSION))
    bodies = [function for function in copy.functions if function.domain != DOMAIN or function.name not in _compiled]
    del copy.functions[:]
    copy.functions.extend(bodies)
    return copy


def _register(trtp: Any, contract: Contract, lazy: bool) -> None:
    """One plugin; ``contract`` stands for all of the op's, which differ in widths, precision and files only."""
    identity, inputs, attributes = f"{DOMAIN}::{contract.op}", contract.inputs, tuple(contract.attributes)

    def describe(*tensors: Any, **_: float) -> tuple[Any, ...]:
        symbols = bind(inputs, [tuple(tensor.shape_expr) for tensor in tensors])
        return tuple(_describe_output(trtp, contract, number, symbols, tensors) for number in range(len(contract.outputs)))

    def autotune(*descriptors: Any) -> list[Any]:
        precisions = sorted({compiled.contract.precision for compiled in _fitting(contract.op, descriptors[: len(inputs)])})
        generic = "|".join(TYPE_NAMES[precision] for precision in precisions)
        arguments = (*inputs, *contract.outputs)
        # In a list of dependent types every entry has as many alternatives as there are precisions.
        types = [generic if argument.dtype == "T" else "|".join([TYPE_NAMES[argument.dtype]] * len(precisions)) for argument in arguments]
        if all(argument.dtype != "T" for argument in arguments):
            types = [TYPE_NAMES[argument.dtype] for argument in arguments]
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR")]

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        tensors, values = arguments[: len(inputs)], arguments[len(inputs) : len(inputs) + len(attributes)]
        compiled = _choose(contract.op, tensors, dict(zip(attributes, values, strict=True)))
        return _launch(trtp, compiled, tensors)

    names = [argument.name for argument in inputs]
    trtp.register(identity, lazy_register=lazy)(
        _signed(describe, trtp, names, attributes, (), tuple[(trtp.TensorDesc,) * len(contract.outputs)])  # type: ignore[misc]
    )
    trtp.autotune(identity)(_signed(autotune, trtp, names, (), ("outputs",), list[trtp.AutoTuneCombination]))
    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.aot_impl(identity)(_signed(implement, trtp, names, attributes, ("outputs", "tactic"), result))


def _signed(
    function: Callable[..., Any], trtp: Any, tensors: Sequence[str], attributes: Sequence[str], rest: Sequence[str], result: Any
) -> Callable[..., Any]:
    """Give a function the signature that TensorRT reads its schema from."""
    kinds = {
        **dict.fromkeys(tensors, trtp.TensorDesc),
        **dict.fromkeys(attributes, float),
        **{name: {"outputs": tuple[trtp.TensorDesc], "tactic": int}[name] for name in rest},
    }
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in kinds.items()]
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return function


def _describe_output(trtp: Any, contract: Contract, number: int, symbols: dict[str, Any], tensors: Sequence[Any]) -> Any:
    import tensorrt as trt

    argument = contract.outputs[number]
    sizes = tuple(evaluate(size, symbols, constant=trtp.ShapeExpr) for size in argument.shape)
    generic = next((tensor.dtype for tensor, spec in zip(tensors, contract.inputs, strict=True) if spec.dtype == "T"), None)
    dtype = generic if argument.dtype == "T" else getattr(trt, argument.dtype)
    return trtp.TensorDesc(trtp.ShapeExprs.from_tuple(sizes), dtype)


def _fitting(op: str, tensors: Sequence[Any]) -> list[_Compiled]:
    """The op's kernels, of any precision, for inputs of these widths; sizes that are free yet are −1 in ``tensor.shape``."""
    found = []
    for compiled in _compiled[op]:
        widths = compiled.contract.static
        pairs = [pair for spec, tensor in zip(compiled.contract.inputs, tensors, strict=True) for pair in zip(spec.shape, tensor.shape, strict=True)]
        if all(size == widths.get(name, size) for name, size in pairs):
            found.append(compiled)
    if not found:
        raise ContractError(f"{op}: no kernel for {_described(tensors)}; compile the plugins for this graph")
    return found


def _choose(op: str, tensors: Sequence[Any], attributes: dict[str, float]) -> _Compiled:
    """The kernel for these dtypes, widths and attributes."""
    for compiled in _fitting(op, tensors):
        contract = compiled.contract
        attributes_fit = all(abs(contract.attributes[name] - value) <= ATTRIBUTE_TOLERANCE * abs(value) for name, value in attributes.items())
        types_fit = all(
            tensor.dtype == _data_type(contract.precision) for tensor, spec in zip(tensors, contract.inputs, strict=True) if spec.dtype == "T"
        )
        if attributes_fit and types_fit:
            return compiled
    raise ContractError(f"{op}: no kernel for {_described(tensors)} with {attributes}; compile the plugins for this graph")


def _described(tensors: Sequence[Any]) -> str:
    return ", ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors)


def _launch(trtp: Any, compiled: _Compiled, tensors: Sequence[Any]) -> tuple[str, str, Any, Any]:
    """What TensorRT puts into the engine: kernel name, PTX, launch parameters and size arguments as expressions of the input shapes."""
    contract = compiled.contract
    symbols = bind(contract.inputs, [tuple(tensor.shape_expr) for tensor in tensors]) | dict(contract.static)
    grid = [evaluate(size, {**symbols, **contract.constants}, constant=trtp.ShapeExpr) for size in contract.grid]
    parameters = trtp.KernelLaunchParams(*grid, *contract.block, contract.shared_bytes)
    sizes = trtp.SymIntExprs(len(contract.sizes))
    for number, size in enumerate(contract.sizes.values()):
        sizes[number] = trtp.SymInt32(evaluate(size, symbols, constant=trtp.ShapeExpr))
    return contract.kernel, (compiled.folder / contract.ptx).read_text(encoding="ascii"), parameters, sizes


def _data_type(precision: str) -> Any:
    import tensorrt as trt

    return {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}[precision]
