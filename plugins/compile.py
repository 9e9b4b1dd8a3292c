"""Ahead of time: kernels in the Triton language → PTX and cubin with their contracts, for any target, without a GPU.

``compile_plugins`` writes a folder ``plugins`` with ``manifest.json`` (a list of contracts) and the files it names. Widths, head counts and types
are compiled in, so what is compiled follows from the graphs (``graph_kernels``); token counts are arguments. Two things are done to the compiler's
PTX: the arguments for scratch memory that it appends are removed, since no kernel here uses scratch memory and no launcher would pass it; and no
source lines are recorded, so equal sources give equal files on any machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from .contract import ALIGNMENT, PRECISIONS, Contract, ContractError, KernelSpec
from .node import DOMAIN

__all__ = [
    "FORMAT",
    "MANIFEST_FILE",
    "TARGETS",
    "CompileError",
    "Kernel",
    "check_target",
    "compile_kernel",
    "compile_plugins",
    "entry_parameters",
    "graph_kernels",
    "read_contracts",
]

FORMAT = 1
MANIFEST_FILE = "manifest.json"
# Target → PTX version to write: the lowest that knows it (8.x before Blackwell: drivers of CUDA 12.3 on; then 12.8), not the newest.
TARGETS = {"8.0": 83, "8.6": 83, "8.7": 83, "8.9": 83, "9.0": 83, "10.0": 86, "12.0": 87}
MAX_SHARED_BYTES = 48 * 1024  # beyond it a launcher must opt in; TensorRT's does not say that it does
ELEMENT_TYPES: Mapping[int, str] = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
POINTERS = {"float32": "*fp32", "int64": "*i64", "int32": "*i32", "bool": "*i1"}
ENTRY = re.compile(r"(\.visible\s+\.entry\s+(\w+)\s*\()([^)]*)\)")
SCRATCH = ("global_scratch_size", "profile_scratch_size")  # of the compiler's metadata, for the two arguments that it appends


class CompileError(RuntimeError):
    """A kernel that cannot be compiled as its contract says."""


class Kernel(NamedTuple):
    """A kernel to compile: ``values`` are its static symbols and attributes, ``precision`` is the type of its inputs of dtype T."""

    spec: KernelSpec
    values: dict[str, Any]
    precision: str


def graph_kernels(models: Iterable[onnx.ModelProto], precision: str) -> list[Kernel]:
    """The distinct kernels that the ``vflow`` nodes of exported graphs call.

    A node's types decide, and not the engine's precision alone: the sizes of merged tokens are merged in float32, one column wide, in any engine.
    ``precision`` names the kernels of ops without an input of dtype T.

    Raises:
        CompileError: a node for which there is no kernel, or one whose widths the graph does not tell.
    """
    specs = _kernel_specs()
    found: list[Kernel] = []
    for model in models:
        tensors = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
        for node in (node for node in model.graph.node if node.domain == DOMAIN):
            if node.op_type not in specs:
                raise CompileError(f"{node.op_type}: there is no kernel for this op")
            kernel = _node_kernel(specs[node.op_type], node, tensors, precision)
            if kernel not in found:
                found.append(kernel)
    return found


def _node_kernel(spec: KernelSpec, node: onnx.NodeProto, tensors: Mapping[str, onnx.TypeProto.Tensor], precision: str) -> Kernel:
    arguments = [argument for argument in spec.inputs if not argument.optional]
    if len(node.input) != len(arguments):
        raise CompileError(f"{spec.op}: kernels are compiled for {len(arguments)} inputs, a node has {len(node.input)}")
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    for argument, name in zip(arguments, node.input, strict=True):
        tensor = tensors.get(name, onnx.TypeProto.Tensor())
        sizes = [size.dim_value for size in tensor.shape.dim]  # 0 where it is free
        values |= {symbol: size for symbol, size in zip(argument.shape, sizes, strict=False) if symbol in spec.static and size > 0}
        if argument.dtype == "T":
            precision = ELEMENT_TYPES.get(tensor.elem_type, "")
    unknown = [symbol for symbol in spec.static if symbol not in values] or ["dtype"] * (not precision)
    if unknown:
        raise CompileError(f"{spec.op}: the graph does not tell {', '.join(unknown)} of {', '.join(node.input)}")
    return Kernel(spec, values, precision)


def _kernel_specs() -> dict[str, KernelSpec]:
    from . import compaction_kernels, guidance_kernels, importance_kernels, selection_kernels

    modules = (importance_kernels, selection_kernels, compaction_kernels, guidance_kernels)
    return {spec.op: spec for module in modules for spec in module.KERNELS}


def compile_plugins(
    folder: Path,
    kernels: Sequence[Kernel],
    targets: Sequence[str] = tuple(TARGETS),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Contract]:
    """Compile kernels into ``folder``.

    Args:
        folder: made if missing; gets ``manifest.json`` = {"format": 1, "alignment": bytes, "kernels": [contract, …]} and the PTX and cubin files.
        targets: compute capabilities out of ``TARGETS``.
        progress: called with (kernels compiled, kernels in all).

    Raises:
        CompileError: unknown precision or target, the Triton language is missing or refuses a kernel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contracts = []
    for number, (spec, values, precision) in enumerate(kernels):
        for target in targets:
            contract, ptx, cubin = compile_kernel(spec, values, precision, target)
            (folder / contract.ptx).write_text(ptx, encoding="ascii")
            (folder / contract.cubin).write_bytes(cubin)
            contracts.append(contract)
        progress(number + 1, len(kernels))
    manifest = {"format": FORMAT, "alignment": ALIGNMENT, "kernels": [contract.to_dict() for contract in contracts]}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return contracts


def read_contracts(folder: Path) -> list[Contract]:
    """The contracts that ``compile_plugins`` wrote into ``folder``.

    Raises:
        ContractError: no manifest there, or not one of this format.
    """
    file = folder / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ContractError(f"format {manifest['format']}, this version reads {FORMAT}")
        return [Contract.from_dict(values) for values in manifest["kernels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{file}: not a manifest of compiled plugins ({error}); compile them again") from None


def check_target(precision: str, target: str) -> None:
    """Refuse what cannot be compiled, before anything is.

    Raises:
        CompileError: unknown precision or target, no Triton language, or its interpreter in place of its compiler.
    """
    if precision not in PRECISIONS:
        raise CompileError(f"precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if target not in TARGETS:
        raise CompileError(f"target {target!r}: use one of {', '.join(TARGETS)}")
    if importlib.util.find_spec("triton") is None:
        raise CompileError("the Triton language is missing: pip install 'vflow-export[kernels]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CompileError("TRITON_INTERPRET=1 replaces the compiler of the Triton language by its interpreter: unset it")


def compile_kernel(spec: KernelSpec, values: Mapping[str, Any], precision: str, target: str) -> tuple[Contract, str, bytes]:
    """Contract, PTX and cubin of one kernel without its optional inputs.

    Args:
        values: the kernel's static symbols and attributes by name.

    Raises:
        CompileError: see ``compile_plugins``.
    """
    check_target(precision, target)
    constants = spec.constants(values, precision)
    inputs = tuple(argument for argument in spec.inputs if not argument.optional)
    outputs = spec.outputs
    compiled = _compile(spec, constants, precision, target)
    used = {size: getattr(compiled.metadata, size, 0) for size in SCRATCH}
    if any(used.values()) or compiled.metadata.shared > MAX_SHARED_BYTES:
        raise CompileError(
            f"{spec.op} ({precision}, {target}): needs {used} and {compiled.metadata.shared} bytes of shared memory, more than launchers give"
        )
    ptx = _without_scratch_arguments(compiled.asm["ptx"], len(inputs) + len(spec.sizes) + len(outputs))
    widths = "".join(f"-{name.lower()}{values[name]}" for name in spec.static)
    name = f"{spec.op}{widths}-{precision}-sm{target.replace('.', '')}"
    contract = Contract(
        op=spec.op,
        precision=precision,
        target=target,
        kernel=compiled.metadata.name,
        ptx=f"{name}.ptx",
        cubin=f"{name}.cubin",
        inputs=inputs,
        sizes=dict(spec.sizes),
        outputs=outputs,
        grid=spec.grid,
        block=(32 * compiled.metadata.num_warps, 1, 1),
        shared_bytes=compiled.metadata.shared,
        static={name: values[name] for name in spec.static},
        attributes={name: values[name] for name in spec.attributes},
        constants={name: value for name, value in constants.items() if type(value) is int},
    )
    return contract, ptx, _assemble(ptx)


def entry_parameters(ptx: str) -> tuple[str, list[str]]:
    """Name of the one entry of a PTX text and the types of its parameters, as ["u64", "u32", …].

    Raises:
        CompileError: not exactly one entry.
    """
    entries = ENTRY.findall(ptx)
    if len(entries) != 1:
        raise CompileError(f"PTX holds {len(entries)} entries, expected 1")
    _, name, parameters = entries[0]
    return name, re.findall(r"\.param\s+\.(\w+)", parameters)


def _compile(spec: KernelSpec, constants: Mapping[str, Any], precision: str, target: str) -> Any:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {**POINTERS, "T": f"*{precision}"}
    types = {argument.name: pointers[argument.dtype] for argument in (*spec.inputs, *spec.outputs)} | dict.fromkeys(spec.sizes, "i32")
    absent = {argument.name: None for argument in spec.inputs if argument.optional}
    given = {**constants, **absent}
    names = spec.kernel.arg_names
    signature = {name: "constexpr" if name in given else types[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name, kind in signature.items() if kind.startswith("*")}
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "ptx_version": TARGETS[target]}
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        source = ASTSource(spec.kernel, signature, given, aligned)
        return triton.compile(source, target=GPUTarget("cuda", int(target.replace(".", "")), 32), options=options)


def _without_scratch_arguments(ptx: str, expected: int) -> str:
    """The PTX with the arguments after the first ``expected`` removed; they must be unused."""
    match = ENTRY.search(ptx)
    parameters = match.group(3).strip().split(",") if match else []
    if match is None or not expected <= len(parameters) <= expected + len(SCRATCH):
        raise CompileError(f"PTX entry takes {len(parameters)} arguments, expected {expected} and at most {len(SCRATCH)} for scratch memory")
    body = ptx[match.end() :]
    for parameter in parameters[expected:]:
        if re.search(rf"\b{parameter.split()[-1]}\b", body):
            raise CompileError(f"the kernel uses {parameter.split()[-1]}, which no launcher passes")
    return ptx[: match.start(3)] + "\n" + ",".join(parameters[:expected]).strip("\n") + "\n)" + body


def _assemble(ptx: str) -> bytes:
    """cubin of a PTX text, by the assembler that comes with the Triton language."""
    from triton import knobs

    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="ascii")
        command = [knobs.nvidia.ptxas_blackwell.path, f"--gpu-name={target.group(1)}", "-o", str(output), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise CompileError(f"ptxas refuses the kernel: {result.stderr.strip()}")
        return output.read_bytes()
