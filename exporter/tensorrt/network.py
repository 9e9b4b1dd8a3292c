"""A graph as a TensorRT network: parsed, corrected where the parser drops what the graph says, and checked against the graph.

The parser of TensorRT for RTX reads ``nonpad_kv_seqlen`` of Attention and drops it, and takes ``is_causal`` for top-left alignment. It warns of
neither; the engine builds and attends to the wrong keys. ``patch_attention`` puts both right. ``check_network`` knows nothing of the patch: it
compares the network with the graph, layer by layer, and refuses one that says something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...engines.errors import EngineError
from ...engines.graphs import TensorInfo
from .library import Library

__all__ = ["NetworkError", "Parsed", "check_network", "layer_report", "parse_graph_file", "patch_attention"]

LENGTH_ONLY = ("budget_tokens",)  # inputs of which only the length counts
# What else a graph may ask of these operators; anything beyond has not been tried, and the parser may drop it.
KNOWN_ATTRIBUTES = {
    "Attention": {"scale", "is_causal"},
    "TensorScatter": {"axis", "mode"},
    "RotaryEmbedding": {"interleaved"},
    "RMSNormalization": {"axis", "epsilon", "stash_type"},
    "DequantizeLinear": {"axis", "block_size"},
}
CACHE_AXIS = 2
QUERY, KEY, MASK, LENGTHS = 0, 1, 3, 6  # places among the inputs of Attention
SCALE_TOLERANCE = 2e-3  # relative: the parser multiplies queries and keys by the root of the scale, rounded to float16
SIZED_BY_INPUTS = ("SHUFFLE", "SLICE", "RESIZE")  # layers whose further inputs are sizes
LAYER_OF = re.compile(r"\[ONNX Layer: (.*)\]$")
DTYPES = {"HALF": "float16", "FLOAT": "float", "INT64": "int64", "INT32": "int32", "BOOL": "bool", "BF16": "bfloat16"}  # as graphs name them


class NetworkError(EngineError):
    """A network that does not say what the graph says."""


@dataclass
class Parsed:
    """A network that the parser made of a graph, and what must live as long as it does."""

    library: Library
    model: onnx.ModelProto  # without weights
    builder: Any
    network: Any
    parser: Any

    def layers(self) -> Iterator[Any]:
        """All layers, those with settings that we read in their own class."""
        trt = self.library.trt
        classes = {
            trt.LayerType.ATTENTION_INPUT: trt.IAttentionInputLayer,
            trt.LayerType.KV_CACHE_UPDATE: trt.IKVCacheUpdateLayer,
            trt.LayerType.ROTARY_EMBEDDING: trt.IRotaryEmbeddingLayer,
            trt.LayerType.DEQUANTIZE: trt.IDequantizeLayer,
            trt.LayerType.CONSTANT: trt.IConstantLayer,
            trt.LayerType.ELEMENTWISE: trt.IElementWiseLayer,
        }
        for number in range(self.network.num_layers):
            layer = self.network.get_layer(number)
            layer.__class__ = classes.get(layer.type, layer.__class__)
            yield layer

    def of_type(self, name: str) -> list[Any]:
        """Layers of one ``LayerType``."""
        return [layer for layer in self.layers() if layer.type.name == name]

    def nodes(self, op_type: str) -> dict[str, onnx.NodeProto]:
        """The graph's own nodes of one type by name; those inside functions are not among them."""
        return {node.name: node for node in self.model.graph.node if node.op_type == op_type}

    def inputs(self) -> list[Any]:
        return [self.network.get_input(number) for number in range(self.network.num_inputs)]

    def outputs(self) -> list[Any]:
        return [self.network.get_output(number) for number in range(self.network.num_outputs)]

    def tensors(self) -> dict[str, Any]:
        """Inputs and everything that is computed, by name."""
        found = {tensor.name: tensor for tensor in self.inputs()}
        for layer in self.layers():
            found |= {layer.get_output(number).name: layer.get_output(number) for number in range(layer.num_outputs)}
        return found


def parse_graph_file(library: Library, path: Path) -> Parsed:
    """Parse an ONNX file, its external weights with it, into a strongly typed network.

    Raises:
        NetworkError: the parser refuses it.
    """
    library.log.clear()
    try:
        builder, network, parser = library.loaders.network_from_onnx_path(str(path), strongly_typed=True)
    except library.failure as error:
        raise NetworkError(f"{path.name}: {library.target} cannot parse it ({_first(library.said('ERROR')) or error})") from None
    return Parsed(library, onnx.load(path, load_external_data=False), builder, network, parser)


def patch_attention(parsed: Parsed) -> None:
    """Give every attention layer what the parser dropped: KV lengths and bottom-right causality; and leave to decompose.

    Without that leave, a shape for which there is no fused kernel fails on the user's GPU.
    """
    trt = parsed.library.trt
    tensors = parsed.tensors()
    nodes = parsed.nodes("Attention")
    lengths: dict[str, Any] = {}
    for layer in parsed.of_type("ATTENTION_INPUT"):
        layer.attention.decomposable = True
        node = nodes.get(_node_name(layer))
        if node is None or not _input(node, LENGTHS):
            continue
        name = node.input[LENGTHS]
        if name not in lengths:  # they must be INT32
            cast = parsed.network.add_cast(tensors[name], trt.int32)
            cast.name = f"{name}_as_int32"
            lengths[name] = cast.get_output(0)
        layer.attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
        layer.attention.key_value_lengths = lengths[name]


def check_network(parsed: Parsed, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> None:
    """Compare a network with the graph that it was parsed from: interface, attention, KV caches, rotary embeddings, use of the inputs.

    Args:
        inputs, outputs: what the engine is to have.

    Raises:
        NetworkError: the first difference, by the name of its layer, node or tensor.
    """
    _check_attributes(parsed)
    _check_interface(parsed, inputs, outputs)
    producers = {layer.get_output(number).name: layer for layer in parsed.layers() for number in range(layer.num_outputs)}
    _check_attention(parsed, producers)
    _check_scale(parsed, producers)
    _check_caches(parsed, producers)
    _check_rotary(parsed)
    _check_weights(parsed)
    _check_use(parsed, producers)


def _check_attributes(parsed: Parsed) -> None:
    bodies = [node for function in parsed.model.functions for node in function.node]
    for node in (*parsed.model.graph.node, *bodies):
        for name in sorted({attribute.name for attribute in node.attribute} - KNOWN_ATTRIBUTES.get(node.op_type, {a.name for a in node.attribute})):
            raise NetworkError(f"{node.op_type} {node.name}: attribute {name} may be dropped by the parser, so no engine is built with it")
        if node.op_type == "Attention" and len(node.output) > 1:
            raise NetworkError(f"Attention {node.name}: further outputs may be dropped by the parser, so no engine is built with them")


def _check_interface(parsed: Parsed, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> None:
    for side, tensors, wanted in (("input", parsed.inputs(), inputs), ("output", parsed.outputs(), outputs)):
        if [tensor.name for tensor in tensors] != [tensor.name for tensor in wanted]:
            raise NetworkError(f"{side}s are {[tensor.name for tensor in tensors]}, the graph's are {[tensor.name for tensor in wanted]}")
        for tensor, info in zip(tensors, wanted, strict=True):
            found = _dtype(tensor), [int(size) for size in tensor.shape]
            expected = info.dtype, [size if isinstance(size, int) else -1 for size in info.shape]
            if found != expected:
                raise NetworkError(f"{side} {info.name} is {found[0]} {found[1]}, the graph's is {expected[0]} {expected[1]}")


def _check_attention(parsed: Parsed, producers: Mapping[str, Any]) -> None:
    """Every attention has the causality and the lengths of its node, or its mask; those that read a KV cache must have the one or the other."""
    kinds = parsed.library.trt.CausalMaskKind
    nodes, seen = parsed.nodes("Attention"), []
    caches = {name for node in parsed.nodes("TensorScatter").values() for name in node.output}
    for layer in parsed.of_type("ATTENTION_INPUT"):
        name, attention = _node_name(layer), layer.attention
        node = nodes.get(name)
        seen.append(name)
        lengths = _input(node, LENGTHS) if node is not None else ""
        causal = node is not None and any(attribute.name == "is_causal" and attribute.i for attribute in node.attribute)
        mask = _input(node, MASK) if node is not None else ""
        if node is not None and node.input[1] in caches and not (mask or (lengths and causal)):
            raise NetworkError(f"Attention {name} reads a KV cache but the graph gives it neither a mask nor both lengths and causality")
        found_mask = attention.mask.name if attention.mask is not None else ""
        if found_mask != mask:
            raise NetworkError(f"attention layer of {name}: its mask is {found_mask or 'none'}, the graph's is {mask or 'none'}")
        wanted = kinds.LOWER_RIGHT if causal and lengths else kinds.UPPER_LEFT if causal else kinds.NONE
        if attention.causal_kind != wanted:
            raise NetworkError(f"attention layer of {name}: causality is {attention.causal_kind.name}, the graph asks for {wanted.name}")
        found = attention.key_value_lengths
        if (_source(found, producers) if found is not None else "") != lengths:
            has = f"takes its lengths from {_source(found, producers)}" if found is not None else "has no key/value lengths"
            raise NetworkError(f"attention layer of {name} {has}, the graph's are {lengths or 'none'}")
        if not attention.decomposable:
            raise NetworkError(f"attention layer of {name} may not be decomposed: it would fail where a GPU has no fused kernel for it")
    wanted_layers = sorted(nodes) + _inlined(parsed, "Attention")
    if sorted(name for name in seen if name in nodes) != sorted(nodes) or len(seen) != len(wanted_layers):
        raise NetworkError(f"the network has {len(seen)} attention layers, the graph has {len(wanted_layers)} Attention nodes")


def _check_scale(parsed: Parsed, producers: Mapping[str, Any]) -> None:
    """Queries and keys of every attention are multiplied by what makes up the scale of its node."""
    nodes = parsed.nodes("Attention")
    for layer in parsed.of_type("ATTENTION_INPUT"):
        node = nodes.get(_node_name(layer))
        if node is None:
            continue
        wanted = next((attribute.f for attribute in node.attribute if attribute.name == "scale"), layer.get_input(QUERY).shape[-1] ** -0.5)
        found = _factor(layer.get_input(QUERY), producers) * _factor(layer.get_input(KEY), producers)
        if abs(found - wanted) > SCALE_TOLERANCE * wanted:
            raise NetworkError(f"attention layer of {node.name}: scores are scaled by {found:g}, the graph asks for {wanted:g}")


def _factor(tensor: Any, producers: Mapping[str, Any]) -> float:
    """The number by which a tensor was multiplied last; 1 where it was not."""
    layer = producers.get(tensor.name)
    if layer is None or layer.type.name != "ELEMENTWISE" or layer.op.name != "PROD":
        return 1.0
    factor = producers.get(_source(layer.get_input(1), producers))
    if factor is None or factor.type.name != "CONSTANT":
        return 1.0
    values = np.asarray(factor.weights)
    return float(values.reshape(-1)[0]) if values.size == 1 else 1.0


def _inlined(parsed: Parsed, op_type: str) -> list[str]:
    """Names of the nodes of one type that come in with function bodies, once for each call."""
    bodies = {function.name: [node.name for node in function.node if node.op_type == op_type] for function in parsed.model.functions}
    return [name for node in parsed.model.graph.node for name in bodies.get(node.op_type, [])]


def _paired(parsed: Parsed, op_type: str, layer_type: str, unlike: str) -> Iterator[tuple[str, Any, Any]]:
    """Every node of a type with the layer that it became, and their name; ``unlike`` says where some have none: {layers}, {nodes}, {first}."""
    nodes = parsed.nodes(op_type)
    layers = {_node_name(layer): layer for layer in parsed.of_type(layer_type)}
    if alone := sorted(set(layers) ^ set(nodes)):
        raise NetworkError(unlike.format(layers=len(layers), nodes=len(nodes), first=alone[0]))
    return ((name, node, layers[name]) for name, node in nodes.items())


def _check_caches(parsed: Parsed, producers: Mapping[str, Any]) -> None:
    """Every TensorScatter is a KV cache update of the same tensors, from the same places on."""
    unlike = "the network updates {layers} KV caches, the graph {nodes}: {first}"
    for name, node, layer in _paired(parsed, "TensorScatter", "KV_CACHE_UPDATE", unlike):
        found = layer.get_input(0).name, _source(layer.get_input(2), producers), layer.get_output(0).name
        if found != (node.input[0], node.input[2], node.output[0]):
            raise NetworkError(
                f"KV cache update of {name}: cache, places and result are {found}, the graph's {node.input[0], node.input[2], node.output[0]}"
            )
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -2)
        mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"linear")
        if axis != CACHE_AXIS or mode != b"linear" or layer.cache_mode.name != "LINEAR":
            raise NetworkError(f"KV cache update of {name}: must be linear on axis {CACHE_AXIS}")


def _check_rotary(parsed: Parsed) -> None:
    """Every RotaryEmbedding turns whole heads in halves."""
    unlike = "the network has {layers} rotary embeddings, the graph {nodes}"
    for name, node, layer in _paired(parsed, "RotaryEmbedding", "ROTARY_EMBEDDING", unlike):
        interleaved = any(attribute.name == "interleaved" and attribute.i for attribute in node.attribute)
        if layer.interleaved != interleaved or layer.rotary_embedding_dim != 0:
            raise NetworkError(f"rotary embedding of {name}: the network's settings differ from the graph's")


def _check_weights(parsed: Parsed) -> None:
    """Every DequantizeLinear is a layer with scales of the same shape along the same axis; their shape is what says how large blocks are."""
    unlike = "the network restores {layers} weights, the graph {nodes}"
    shapes = {tensor.name: list(tensor.dims) for tensor in parsed.model.graph.initializer}
    for name, node, layer in _paired(parsed, "DequantizeLinear", "DEQUANTIZE", unlike):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        codes, scales = layer.get_input(0), layer.get_input(1)
        found, wanted = [_shape(codes), _shape(scales)], [shapes[node.input[0]], shapes[node.input[1]]]
        if "block_size" in attributes:
            wanted[1][attributes["axis"]] = -(-wanted[0][attributes["axis"]] // attributes["block_size"])
        elif layer.axis != attributes["axis"]:
            raise NetworkError(f"weight of {name}: its scales lie along axis {layer.axis}, the graph's along {attributes['axis']}")
        if found != wanted:
            raise NetworkError(f"weight of {name}: codes and scales are {found}, the graph's {wanted}")


def _check_use(parsed: Parsed, producers: Mapping[str, Any]) -> None:
    """Every input reaches an output by its values, but those that serve by their length alone, which must at least do that."""
    waiting = [(tensor.name, "value") for tensor in parsed.outputs()]
    needed = set(waiting)
    while waiting:
        name, need = waiting.pop()
        new = set(_needs(producers[name], need)) - needed if name in producers else set()
        needed |= new
        waiting += new
    for name in (tensor.name for tensor in parsed.inputs()):
        if (name, "value") not in needed and not (name in LENGTH_ONLY and (name, "length") in needed):
            used = "used by its length alone" if (name, "length") in needed else "not used"
            raise NetworkError(f"input {name} is {used}; the parser has dropped what the graph does with it")


def _needs(layer: Any, need: str) -> Iterator[tuple[str, str]]:
    """What of its inputs a layer needs for the ``value``, or for the ``length``, that is the shape, of its outputs: (tensor, value or length)."""
    kind = layer.type.name
    for place, tensor in enumerate(_sources(layer)):
        sized_by_value = kind == "FILL" or (kind in SIZED_BY_INPUTS and place > 0)
        if kind != "SHAPE" and (need == "value" or sized_by_value):
            yield tensor.name, "value"
        if kind == "SHAPE" or need == "length":
            yield tensor.name, "length"


def _sources(layer: Any) -> Iterator[Any]:
    """What a layer computes from; key/value lengths are not among its numbered inputs until they are set."""
    for number in range(layer.num_inputs):
        tensor = layer.get_input(number)
        if tensor is not None:
            yield tensor
    if layer.type.name == "ATTENTION_INPUT" and layer.attention.key_value_lengths is not None:
        yield layer.attention.key_value_lengths


def _source(tensor: Any, producers: Mapping[str, Any]) -> str:
    """Name of the tensor behind any casts."""
    while tensor.name in producers and producers[tensor.name].type.name == "CAST":
        tensor = producers[tensor.name].get_input(0)
    return str(tensor.name)


def _node_name(layer: Any) -> str:
    """The graph's node that a layer was parsed from; for one inside a function, body node and call together."""
    match = LAYER_OF.search(layer.attention.metadata if layer.type.name == "ATTENTION_INPUT" else layer.metadata)
    return match[1] if match else ""


def _input(node: onnx.NodeProto, place: int) -> str:
    return str(node.input[place]) if len(node.input) > place else ""


def _first(lines: Sequence[str]) -> str:
    return lines[0].strip().splitlines()[0] if lines else ""


def layer_report(parsed: Parsed) -> list[dict[str, Any]]:
    """Every layer of the network: name, type, node, inputs and outputs, and for attention what the parser is known to lose.

    Of the network, not of the engine: TensorRT inspects engines on a GPU alone.
    """
    report = []
    for layer in parsed.layers():
        inputs = [tensor.name for tensor in _sources(layer)]
        outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
        row: dict[str, Any] = {"name": layer.name, "type": layer.type.name, "node": _node_name(layer), "inputs": inputs}
        row["outputs"] = [
            {"name": tensor.name, "dtype": DTYPES.get(tensor.dtype.name, tensor.dtype.name), "shape": _shape(tensor)} for tensor in outputs
        ]
        if layer.type.name == "ATTENTION_INPUT":
            lengths = layer.attention.key_value_lengths
            row["attention"] = {
                "causality": layer.attention.causal_kind.name,
                "key_value_lengths": lengths.name if lengths is not None else None,
                "mask": layer.attention.mask.name if layer.attention.mask is not None else None,
                "decomposable": layer.attention.decomposable,
            }
        report.append(row)
    return report


def _dtype(tensor: Any) -> str:
    return DTYPES.get(tensor.dtype.name, str(tensor.dtype.name))


def _shape(tensor: Any) -> list[int] | None:
    """None where the builder has yet to find out how many dimensions there are."""
    try:
        return [int(size) for size in tensor.shape]
    except ValueError:
        return None
