"""A graph that holds every op at the sizes for which the tests compile kernels."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper
from vflow.plugins.compaction import WEIGHT_FLOOR

# Odd sizes: a head dimension of two tiles, a group of 3 heads a key head, widths that are no powers of two.
TOWER_HEADS, HEAD_DIM, WIDTH, TOWER_WIDTH, ROTARY = 4, 80, 96, 640, 8
DECODER_HEADS, KEY_HEADS, DECODER_HEAD_DIM = 6, 2, 16
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
KINDS = {"F": TensorProto.FLOAT, "I": TensorProto.INT64, "i": TensorProto.INT32, "B": TensorProto.BOOL}
Sizes = Sequence[int | str]


def kernel_graph(precision: str) -> onnx.ModelProto:
    """Nodes of all ops, as exported graphs of this precision have them; inputs alone, nothing computes."""
    values: list[onnx.ValueInfoProto] = []
    nodes: list[onnx.NodeProto] = []

    def node(op: str, *inputs: tuple[str, Sizes], **attributes: float) -> None:
        names = [f"{len(nodes)}.{number}" for number in range(len(inputs))]
        kinds = {**KINDS, "T": TYPES[precision]}
        values.extend(helper.make_tensor_value_info(name, kinds[kind], sizes) for name, (kind, sizes) in zip(names, inputs, strict=True))
        nodes.append(helper.make_node(op, names, [f"{len(nodes)}.out"], domain="vflow", **attributes))

    query, key = ("T", (TOWER_HEADS, "R", HEAD_DIM)), ("T", (TOWER_HEADS, "P", HEAD_DIM))
    node("RowLogSumExp", query, key, scale=HEAD_DIM**-0.5)
    node("MaskedColumnMean", query, key, ("F", (TOWER_HEADS, "R")), ("B", ("R",)), scale=HEAD_DIM**-0.5)
    node("KeepTop", ("F", ("N",)), ("i", ("M",)))
    node("KeepTopPerCell", ("F", ("N",)), ("I", ("N",)), ("I", ("C",)), ("i", ("M",)))
    node("GroupTokens", ("I", ("M",)), ("I", ("N",)), ("I", ("M",)))
    merged = [("F", ("N",)), *(("I", (size,)) for size in ("M", "N", "M", "N", "M"))]
    for width in (TOWER_WIDTH, WIDTH, WIDTH):  # the last one again: one kernel serves both
        node("MergeTokens", ("T", ("N", width)), *merged, floor=WEIGHT_FLOOR)
    node("MergeTokens", ("F", ("N", 1)), *merged, floor=WEIGHT_FLOOR)  # sizes, float32 in any precision
    rotary = ("T", (1, "S", ROTARY))
    node("GatherTokens", ("T", (1, "S", WIDTH)), rotary, rotary, ("F", ("S",)), ("I", ("M",)))
    scale = DECODER_HEAD_DIM**-0.5
    guidance = ("T", (DECODER_HEADS, DECODER_HEAD_DIM)), ("T", (KEY_HEADS, "S", DECODER_HEAD_DIM)), ("B", ("S",))
    node("LastTokenLogSumExp", *guidance, scale=scale)
    node("LastTokenAttention", *guidance, ("F", (DECODER_HEADS, "B")), scale=scale)
    return helper.make_model(helper.make_graph(nodes, "kernels", values, []))
