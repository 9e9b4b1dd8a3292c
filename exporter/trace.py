"""Tracing: the two walked graphs through ``torch.onnx.export``, on shapes alone.

Nothing here reads a weight (the model is fake tensors), so a graph of any size is traced in little memory and the
writer streams the weights afterwards (``onnx_writer``).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch.export import Dim

from ..plugins import compaction, guidance, importance
from ..plugins.node import DOMAIN, OPSET, VERSION
from .models import LanguageGraph, VisionGraph
from .schedule import Schedule
from .shape import ModelShape

__all__ = ["trace_language", "trace_vision"]

FUNCTIONS = {f.name: f for module in (importance, compaction, guidance) for f in module.FUNCTIONS}
AUTO = Dim.AUTO


def _cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the KV caches, key and value of each layer in turn; ``prefix`` is past_key_values or present."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _bias_names(segments: int, prefix: str) -> list[str]:
    """Names of what is added to attention scores of the tokens in each segment's caches; ``prefix`` as above."""
    return [f"{prefix}.bias.{segment}" for segment in range(segments)]


def trace_vision(graph: VisionGraph, shape: ModelShape, *, dtype: torch.dtype) -> ir.Model:
    """vision.onnx without weights (docs/architecture.md has its inputs and outputs)."""
    rows, columns, group = 6, 8, shape.tower.group  # any sizes, all different, none of them 1
    arguments: dict[str, Any] = {"pixel_values": torch.zeros(rows, columns, group, shape.tower.patch_dim, dtype=dtype)}
    sizes: dict[str, Any] = {"pixel_values": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    if graph.uses_entropy():
        arguments["entropy"] = torch.zeros(rows, columns, group)
        sizes["entropy"] = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    if graph.uses_budget():
        arguments["budget_tokens"] = torch.zeros(rows * columns, dtype=torch.int32)
        sizes["budget_tokens"] = {0: Dim.DYNAMIC}
    outputs = ["visual_embeds", "importance", "index", *(["key_bias"] if graph.schedule.proportional_attention else [])]
    model = _export(_VisionEntry(graph), arguments, sizes, outputs)
    grid = {0: "rows", 1: "columns"}
    survivors = {name: {0: "survivors"} for name in outputs}
    _name_dimensions(model, {"pixel_values": grid, "entropy": grid, "budget_tokens": {0: "budget"}, **survivors})
    return model


def trace_language(graph: LanguageGraph, shape: ModelShape, schedule: Schedule, *, dtype: torch.dtype) -> ir.Model:
    """language.onnx without weights."""
    decoder = shape.decoder
    batch, length, visual, budget = 3, 11, 5, 48
    segments = schedule.decoder_segments(decoder.layers)
    arguments: dict[str, Any] = {
        "input_ids": torch.zeros(batch, length, dtype=torch.int64),
        "position_ids": torch.zeros(3, batch, length, dtype=torch.int64),
        "visual_embeds": torch.zeros(visual, shape.visual_width, dtype=dtype),
        "visual_positions": torch.zeros(visual, dtype=torch.int64),
    }
    sizes: dict[str, Any] = {
        "input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        "position_ids": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC},
        "visual_embeds": {0: Dim.DYNAMIC},
        "visual_positions": {0: Dim.DYNAMIC},
    }
    if schedule.later_stages:
        arguments["importance"] = torch.zeros(visual)
        arguments["budget_tokens"] = torch.zeros(budget, dtype=torch.int32)
        sizes["importance"] = sizes["budget_tokens"] = {0: Dim.DYNAMIC}
    if schedule.proportional_attention:
        arguments["key_bias"] = torch.zeros(visual)
        sizes["key_bias"] = {0: Dim.DYNAMIC}
    arguments["past_lengths"] = torch.zeros(batch, len(segments), dtype=torch.int64)
    sizes["past_lengths"] = {0: Dim.DYNAMIC}
    caches, biases = [], []
    for number, (first, end, _) in enumerate(segments):
        for _ in range(first, end):
            cache = torch.zeros(batch, decoder.kv_heads, 64 + number, decoder.head_dim, dtype=dtype)
            caches.append((cache, cache.clone()))
        if schedule.proportional_attention:
            biases.append(torch.zeros(batch, 1, 64 + number, 1, dtype=dtype))
    cache_size = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    arguments["past_key_values"], sizes["past_key_values"] = caches, [(cache_size, cache_size)] * len(caches)
    arguments["past_key_bias"], sizes["past_key_bias"] = biases, [cache_size] * len(biases)
    past, present = ((_cache_names(decoder.layers, prefix), _bias_names(len(biases), prefix)) for prefix in ("past_key_values", "present"))
    model = _export(_LanguageEntry(graph), arguments, sizes, ["logits", "last_hidden", *chain(*present)])
    names: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "length"},
        "position_ids": {1: "batch", 2: "length"},
        **{name: {0: "visual"} for name in ("visual_embeds", "visual_positions", "importance", "key_bias")},
        "budget_tokens": {0: "budget"},
        **{name: {0: "batch"} for name in ("past_lengths", "logits", "last_hidden")},
    }
    inputs = [*chain(*past)]
    for value, name in zip(model.graph.inputs[-len(inputs) :], inputs, strict=True):
        value.name = name
    for number, (first, end, _) in enumerate(segments):
        for cached, added in (past, present):
            for name in (*cached[2 * first : 2 * end], *added[number : number + 1]):
                names[name] = {0: "batch", 2: f"capacity_{number}"}
    _name_dimensions(model, names)
    return model


class _VisionEntry(nn.Module):
    """Gives the exporter named optional inputs; holds no logic."""

    def __init__(self, graph: VisionGraph) -> None:
        super().__init__()
        self.walk = graph

    def forward(self, pixel_values: Tensor, entropy: Tensor | None = None, budget_tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(output for output in self.walk(pixel_values, entropy, budget_tokens) if output is not None)


class _LanguageEntry(nn.Module):
    def __init__(self, graph: LanguageGraph) -> None:
        super().__init__()
        self.walk = graph

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visual_embeds: Tensor,
        visual_positions: Tensor,
        importance: Tensor | None = None,
        budget_tokens: Tensor | None = None,
        key_bias: Tensor | None = None,
        *,
        past_lengths: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]],
        past_key_bias: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]], list[Tensor]]:
        outputs: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]], list[Tensor]] = self.walk(
            input_ids,
            position_ids,
            visual_embeds,
            visual_positions,
            importance,
            budget_tokens,
            key_bias,
            past_lengths,
            past_key_values,
            past_key_bias,
        )
        return outputs


def _export(entry: nn.Module, arguments: dict[str, Any], sizes: dict[str, Any], outputs: list[str]) -> ir.Model:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            entry.eval(), (), kwargs=arguments, dynamic_shapes=sizes, output_names=outputs,
            opset_version=OPSET, dynamo=True, verbose=False, optimize=False,
        )  # fmt: skip
    assert program is not None
    model = program.model
    _optimize_around_weights(model)
    for node in model.graph.all_nodes():  # the exporter notes stack traces: paths of this machine, and most of the file
        node.metadata_props.clear()
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(used):
        function = ir.serde.deserialize_function(FUNCTIONS[name])
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = VERSION
    return model


def _name_dimensions(model: ir.Model, names: dict[str, dict[int, str]]) -> None:
    """Give the free dimensions of inputs and outputs their names; the tracer's symbols inside the graph are dropped."""
    interface = [*model.graph.inputs, *model.graph.outputs]
    for value in interface:
        assert isinstance(value.shape, ir.Shape) and value.name is not None
        named = names.get(value.name, {})
        value.shape = ir.Shape([named.get(axis, size) for axis, size in enumerate(value.shape)])
    outside = set(interface)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in outside and isinstance(value.shape, ir.Shape):
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])


def _optimize_around_weights(model: ir.Model) -> None:
    """Fold constants and drop dead nodes; the weights are only shapes yet and pass through as if they were inputs."""
    weights = list(model.graph.initializers.values())
    for value in weights:
        del model.graph.initializers[str(value.name)]
        value.const_value = None
    model.graph.inputs.extend(weights)
    onnxscript.optimizer.optimize_ir(model)
    del model.graph.inputs[len(model.graph.inputs) - len(weights) :]
    for value in weights:
        if value.uses():
            model.graph.initializers[str(value.name)] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints steps and logs about our own ops; what matters is raised."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
