"""Weights into the graphs: one external file for both, streamed, nothing stored twice.

The traced graphs know their weights by name only. ``write_graphs`` names them as the checkpoint does, replaces transposes of
weights by weights stored transposed, and those by codes and scales where fewer bits are asked for; writes each distinct tensor once and lets
both graphs point into the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from .checkpoint import Checkpoint, CheckpointError, TensorReader
from .weights import BLOCK, is_quantized, quantize, scale_shape

__all__ = ["WEIGHTS_FILE", "write_graphs"]

WEIGHTS_FILE = "weights.bin"
ALIGNMENT = 4096  # a page, so that runtimes can map every tensor
TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
CODE_TYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
SCALES = ".scales"  # suffix of a stored transposed weight's scales; that of its codes is the name of their type
OPENING = "walk."  # how the traced modules call the model's own


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int


def write_graphs(
    models: Sequence[tuple[ir.Model, str]],
    checkpoint: Checkpoint,
    folder: Path,
    *,
    weights: str = "full",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write graphs and ``weights.bin`` into ``folder``.

    Args:
        models: traced graphs with their file names.
        weights: of ``engines.manifest.WEIGHTS``.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: a weight that the graphs need is missing or has another shape.
        OSError: disk full and the like.
    """
    for model, _ in models:
        _store_transposed(model)
        _store_quantized(model, weights)
    wanted: dict[str, ir.Value] = {}
    for model, _ in models:
        for value in _weights(model):
            wanted.setdefault(str(value.name), value)
    total = sum(_bytes(value) for value in wanted.values())
    places: dict[str, _Place] = {}
    with TensorReader(checkpoint) as reader, (folder / WEIGHTS_FILE).open("wb") as file:
        for name, data in _stored(reader, wanted, weights):
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            places[name] = _Place(file.tell(), data.nbytes)
            file.write(data.numpy().data)  # tofile would not say why a write failed
            if progress:
                progress(file.tell(), total)
    for model, file_name in models:
        for value in _weights(model):
            place = places[str(value.name)]
            assert value.dtype is not None and isinstance(value.shape, ir.Shape)
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE, place.offset, place.length, value.dtype, shape=value.shape, name=str(value.name), base_dir=folder
            )
        ir.save(model, folder / file_name)


def _weights(model: ir.Model) -> list[ir.Value]:
    """Initializers that come from the checkpoint: those that the trace left without a value, or that were placed since."""
    return [value for value in model.graph.initializers.values() if value.const_value is None]


def _store_transposed(model: ir.Model) -> None:
    """Name weights as the checkpoint does, and turn Transpose(weight) into a weight that is stored transposed (suffix ``.T``)."""
    graph = model.graph
    for value in _weights(model):
        del graph.initializers[str(value.name)]
        value.name = str(value.name).removeprefix(OPENING)
        graph.initializers[value.name] = value
    for value in _weights(model):
        transposes = [use.node for use in value.uses() if use.node.op_type == "Transpose"]
        if not transposes or len(transposes) != len(list(value.uses())):
            continue
        assert isinstance(value.shape, ir.Shape) and len(value.shape) == 2
        stored = ir.Value(name=f"{value.name}.T", shape=ir.Shape([value.shape[1], value.shape[0]]), type=ir.TensorType(_dtype(value)))
        del graph.initializers[str(value.name)]
        graph.initializers[str(stored.name)] = stored
        for node in transposes:
            ir.convenience.replace_all_uses_with(node.outputs[0], stored)
            graph.remove(node, safe=True)


def _store_quantized(model: ir.Model, weights: str) -> None:
    """Put DequantizeLinear(codes, scales) in the place of each weight that is multiplied by and is to have fewer bits."""
    graph = model.graph
    for value in _weights(model):
        name, uses = str(value.name), list(value.uses())
        if not name.endswith(".T") or not all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses):
            continue
        assert isinstance(value.shape, ir.Shape)
        inputs, outputs = (int(size) for size in value.shape)  # type: ignore[arg-type]  # weights have fixed sizes
        if not is_quantized(name, inputs, weights):
            continue
        codes = ir.Value(name=f"{name}.{weights}", shape=value.shape, type=ir.TensorType(CODE_TYPES[weights]))
        scales = ir.Value(name=f"{name}{SCALES}", shape=ir.Shape(scale_shape(inputs, outputs, weights)), type=ir.TensorType(_dtype(value)))
        attributes = {"axis": 0, "block_size": BLOCK} if weights == "int4" else {"axis": 1}
        node = ir.node("DequantizeLinear", [codes, scales], attributes, name=f"dequantize.{name}")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{name}.restored", value.shape, ir.TensorType(_dtype(value))
        graph.insert_before(min((use.node for use in uses), key=list(graph).index), node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        del graph.initializers[name]
        graph.initializers[str(codes.name)], graph.initializers[str(scales.name)] = codes, scales


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _bytes(value: ir.Value) -> int:
    assert isinstance(value.shape, ir.Shape)
    bits = _dtype(value).bitwidth
    for size in value.shape:
        bits *= int(size)  # type: ignore[arg-type]  # weights have fixed sizes
    return bits // 8


def _read(reader: TensorReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight of the checkpoint in this dtype, transposed where its name says so."""
    tensor = reader.read(name.removesuffix(".T"))
    converted = tensor.to(dtype)
    if dtype is torch.float16 and tensor.dtype is not torch.float16 and not torch.isfinite(converted).all():
        raise CheckpointError(f"{name}: has values outside float16; build with --precision fp32")
    return (converted.T if name.endswith(".T") else converted).contiguous()


def _stored(reader: TensorReader, wanted: dict[str, ir.Value], weights: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that is wanted, as bytes: uint8 [n]. Scales come right after their codes."""
    for name, value in wanted.items():
        whole = name.removesuffix(f".{weights}")
        if whole != name:
            codes, scales = quantize(_read(reader, whole, TORCH_DTYPES[_dtype(wanted[whole + SCALES])]), weights)
            yield name, _packed(codes) if weights == "int4" else codes.flatten().view(torch.uint8)
            yield whole + SCALES, scales.flatten().view(torch.uint8)
        elif not name.endswith(SCALES):
            yield name, _read(reader, name, TORCH_DTYPES[_dtype(value)]).flatten().view(torch.uint8)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the lower half."""
    halves = codes.flatten().view(torch.uint8) & 0x0F
    return halves[0::2] | halves[1::2] << 4
