"""Weights into the graphs: one external file for both, streamed, nothing stored twice.

The traced graphs know their weights by name only. ``write_graphs`` names them as the checkpoint does, replaces transposes of
weights by weights stored transposed, writes each distinct tensor once and lets both graphs point into the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from .checkpoint import Checkpoint, CheckpointError, TensorReader

__all__ = ["WEIGHTS_FILE", "write_graphs"]

WEIGHTS_FILE = "weights.bin"
ALIGNMENT = 4096  # a page, so that runtimes can map every tensor
TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}
OPENING = "walk."  # how the traced modules call the model's own


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int


def write_graphs(
    models: Sequence[tuple[ir.Model, str]], checkpoint: Checkpoint, folder: Path, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write graphs and ``weights.bin`` into ``folder``.

    Args:
        models: traced graphs with their file names.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: a weight that the graphs need is missing or has another shape.
        OSError: disk full and the like.
    """
    for model, _ in models:
        _store_transposed(model)
    wanted: dict[str, ir.Value] = {}
    for model, _ in models:
        for value in _weights(model):
            wanted.setdefault(str(value.name), value)
    total = sum(_bytes(value) for value in wanted.values())
    places: dict[str, _Place] = {}
    with TensorReader(checkpoint) as reader, (folder / WEIGHTS_FILE).open("wb") as file:
        for name, value in wanted.items():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            data = _read(reader, name, value)
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


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _bytes(value: ir.Value) -> int:
    assert isinstance(value.shape, ir.Shape)
    bits = _dtype(value).bitwidth
    for size in value.shape:
        bits *= int(size)  # type: ignore[arg-type]  # weights have fixed sizes
    return bits // 8


def _read(reader: TensorReader, name: str, value: ir.Value) -> torch.Tensor:
    tensor = reader.read(name.removesuffix(".T"))
    wanted = TORCH_DTYPES[_dtype(value)]
    converted = tensor.to(wanted)
    if wanted is torch.float16 and tensor.dtype is not torch.float16 and not torch.isfinite(converted).all():
        raise CheckpointError(f"{name}: has values outside float16; build with --precision fp32")
    return (converted.T if name.endswith(".T") else converted).contiguous()
