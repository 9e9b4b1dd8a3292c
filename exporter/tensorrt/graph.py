"""A graph as TensorRT is given it: KV capacities as numbers, and the ``vflow`` ops in the form that the target takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from ...engines.graphs import Graph, TensorInfo
from ...engines.manifest import Segment
from ...plugins.selection_lowering import FUNCTIONS

__all__ = ["engine_interface", "graph_for_target"]


def graph_for_target(target: str, file: Path, segments: Sequence[Segment]) -> onnx.ModelProto:
    """The graph in ``file``, without weights, for a target.

    Its caches have fixed capacities, which TensorScatter needs. TensorRT for RTX gets function bodies of the selections without TopK, which stops at
    3,840; TensorRT gets the ops without bodies, so that it looks for the plugins.
    """
    model = onnx.load(file, load_external_data=False)
    sizes = _capacities(segments)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in sizes:
                size.dim_value = sizes[size.dim_param]
    if target == "tensorrt":
        from ...plugins.tensorrt import with_plugins

        return with_plugins(model)
    others = {function.name: function for function in FUNCTIONS}
    for function in model.functions:
        if function.name in others:
            function.CopyFrom(others[function.name])
    return model


def engine_interface(graph: Graph, segments: Sequence[Segment]) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Inputs and outputs of the engine built from a graph: those of the graph with KV capacities as numbers."""
    sizes = _capacities(segments)

    def fixed(tensors: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
        shapes = [tuple(sizes.get(str(size), size) for size in tensor.shape) for tensor in tensors]
        return tuple(replace(tensor, shape=shape) for tensor, shape in zip(tensors, shapes, strict=True))

    return fixed(graph.inputs), fixed(graph.outputs)


def _capacities(segments: Sequence[Segment]) -> dict[str, int]:
    """By the name that a cache's free dimension has in the graph."""
    return {f"capacity_{number}": segment.capacity for number, segment in enumerate(segments)}
