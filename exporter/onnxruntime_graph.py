"""A graph as ONNX Runtime's CPU provider is given it: the same, with attention in the operators that it computes without a map.

Its kernel of the standard ``Attention`` writes all scores to memory (1 GB for 4,096 patches and 16 heads) and looks at a cache's whole capacity. Its
own operators do neither (docs/benchmarks.md has the figures; github.com/microsoft/onnxruntime, docs/ContribOperators.md):

- ``com.microsoft.MultiHeadAttention`` for full attention. With heads as the batch nothing is transposed.
- ``com.microsoft.GroupQueryAttention`` for causal attention to a cache, in the place of two ``TensorScatter`` and one ``Attention``. It appends to
  the caches, where they lie if input and output are one buffer. It takes a batch of one, or one token a row, which is what language.onnx is for.

Attention in windows stays as it is: its maps are small, and the standard kernel takes about half as long as MultiHeadAttention with a mask.

Not for CUDA: its GroupQueryAttention has no float32, and its standard Attention takes flash attention as it is.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.tape import Tape

__all__ = ["graph_for_onnxruntime"]

DOMAIN = "com.microsoft"
DOMAIN_VERSION = 1
MASK, LENGTHS = 3, 6  # places of attn_mask and nonpad_kv_seqlen among the inputs of Attention
BIAS_INPUT = 10  # place of attention_bias among those of GroupQueryAttention
CACHED_HEAD_DIM_MULTIPLE = 8  # GroupQueryAttention refuses others


def graph_for_onnxruntime(file: Path) -> ir.Model:
    """The graph in ``file`` with its attention lowered, function bodies included; weights stay where they are."""
    model = ir.load(file)
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        shared: dict[ir.Value, tuple[ir.Value, ...]] = {}
        lowered = 0
        for node in list(graph):
            if node.domain != "" or node.op_type != "Attention":
                continue
            scatters = _extended_caches(node)
            if len(node.inputs) <= MASK:
                _lower_full(graph, node)
            elif scatters and _sizes(node.inputs[0])[1] % CACHED_HEAD_DIM_MULTIPLE == 0:
                _lower_cached(graph, node, scatters, shared)
            else:
                continue
            lowered += 1
        if lowered:
            graph.opset_imports[DOMAIN] = DOMAIN_VERSION
            model.opset_imports[DOMAIN] = DOMAIN_VERSION
    return model


def _lower_full(graph: ir.Graph | ir.Function, node: ir.Node) -> None:
    """Attention over [1, H, R, D] as one head over a batch of H."""
    tape = Tape()
    axis = _whole_numbers(tape, [0])
    squeezed = [tape.op("Squeeze", [value, axis]) for value in node.inputs]
    attributes = {"num_heads": 1, "scale": node.attributes["scale"].as_float()}
    mixed = tape.op("MultiHeadAttention", squeezed, attributes, domain=DOMAIN)
    _replace(graph, node, tape, [(node.outputs[0], tape.op("Unsqueeze", [mixed, axis]))])


def _extended_caches(node: ir.Node) -> list[ir.Node]:
    """The two TensorScatter that have extended the keys and values that an attention looks at; none where it looks at no caches."""
    return [scatter for value in node.inputs[1:3] if value and (scatter := value.producer()) and scatter.op_type == "TensorScatter"]


def _lower_cached(graph: ir.Graph | ir.Function, node: ir.Node, scatters: list[ir.Node], shared: dict[ir.Value, tuple[ir.Value, ...]]) -> None:
    """Attention of queries [B, H, S, D] to caches that ``scatters`` have extended, causal by lengths or by a mask; ``shared`` holds what layers
    of a segment share."""
    tape = Tape()
    query, mask = node.inputs[0], node.inputs[MASK]
    assert query is not None
    caches, updates = ([scatter.inputs[place] for scatter in scatters] for place in (0, 1))
    heads, head_dim = _sizes(query)
    kv_heads, _ = _sizes(updates[0])
    key = mask or node.inputs[LENGTHS]
    assert key is not None
    if key not in shared:
        shared[key] = _masked_lengths(tape, query, mask, scatters[0].inputs[2]) if mask else _lengths(tape, key)
    inputs: list[ir.Value | None] = [*(_heads_last(tape, value) for value in (query, *updates)), *caches, *shared[key][:2]]
    inputs += [*[None] * (BIAS_INPUT - len(inputs)), *shared[key][2:]] if mask else []
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": node.attributes["scale"].as_float()}
    mixed, *extended = tape.op_multi_out("GroupQueryAttention", inputs, attributes, domain=DOMAIN, num_outputs=3)
    split = tape.op("Reshape", [mixed, _whole_numbers(tape, [0, 0, heads, head_dim])])
    back = tape.op("Transpose", [split], {"perm": [0, 2, 1, 3]})
    written = [scatter.outputs[0] for scatter in scatters]
    _replace(graph, node, tape, [(node.outputs[0], back), *zip(written, extended, strict=True)])
    graph.remove(scatters, safe=True)


def _lengths(tape: Tape, in_use: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Entries in use [B] → int32 [B], one less, and int32, the most of them."""
    into = {"to": ir.DataType.INT32}
    last = tape.op("Cast", [tape.op("Sub", [in_use, _whole_numbers(tape, [1])])], into)
    return last, tape.op("Cast", [tape.op("ReduceMax", [in_use], {"keepdims": 0})], into)


def _masked_lengths(tape: Tape, query: ir.Value, mask: ir.Value, starts: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The same where queries [B, H, S, D] stand from ``starts`` [B] on, and of a mask [B, 1, S, capacity] the entries that any row uses."""
    length = tape.op("Shape", [query], {"start": 2, "end": 3})
    last, longest = _lengths(tape, tape.op("Add", [starts, length]))
    zero, axis = _whole_numbers(tape, [0]), _whole_numbers(tape, [3])
    end = tape.op("Reshape", [tape.op("Cast", [longest], {"to": ir.DataType.INT64}), _whole_numbers(tape, [1])])
    return last, longest, tape.op("Slice", [mask, zero, end, axis])


def _heads_last(tape: Tape, value: ir.Value | None) -> ir.Value:
    """[B, H, S, D] → [B, S, H · D]."""
    heads, head_dim = _sizes(value)
    moved = tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    return tape.op("Reshape", [moved, _whole_numbers(tape, [0, 0, heads * head_dim])])


def _sizes(value: ir.Value | None) -> tuple[int, int]:
    """H and D of a value [B, H, S, D]: the model's sizes, so the trace knows them."""
    assert value is not None and value.shape is not None
    heads, head_dim = value.shape[1], value.shape[3]
    assert isinstance(heads, int) and isinstance(head_dim, int)
    return heads, head_dim


def _whole_numbers(tape: Tape, numbers: list[int]) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": numbers})


def _replace(graph: ir.Graph | ir.Function, node: ir.Node, tape: Tape, values: list[tuple[ir.Value, ir.Value]]) -> None:
    """Put the tape's nodes in the node's place, under the names, shapes and types that its outputs had."""
    graph.insert_before(node, tape.nodes)
    for old, new in values:
        new.shape, new.type = old.shape, old.type
        new.name, old.name = old.name, None
        replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
