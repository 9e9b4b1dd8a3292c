"""What a built engine allocates and computes is what the budget arithmetic says: KV buffers, and the products in its graphs as they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.inliner import inline_local_functions
from schedules import DEEPSTACK_SCHEDULES, SCHEDULES, WINDOWED_SCHEDULES
from support import MAX_VISUAL_TOKENS, picture
from vflow.engines import Engine, Session
from vflow.engines.preprocess import preprocess_image
from vflow.exporter.budget import cost, kv_bytes

ROWS, COLUMNS = 5, 6


def products(path: Path, values: dict[str, Any], *, causal: bool) -> int:
    """Multiply-adds of every matrix product and attention in a graph that runs on these inputs, times two; function bodies included."""
    model = inline_local_functions(onnx.load(path))
    inputs = {value.name: values[value.name] for value in model.graph.input}  # what a graph has no use for is left out
    counted = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Attention")]
    wanted = {name for node in counted for name in node.input[:3] if name}
    known = {value.name for value in model.graph.input} | {value.name for value in model.graph.initializer} | {o.name for o in model.graph.output}
    for name in sorted(wanted - known):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    shapes = {name: array.shape for name, array in zip(names, session.run(None, inputs), strict=True)}
    shapes |= {name: array.shape for name, array in inputs.items()} | {value.name: tuple(value.dims) for value in model.graph.initializer}
    total = 0
    for node in counted:
        first, second = (shapes[name] for name in node.input[:2])
        if node.op_type == "Attention":
            query, key, value = (shapes[name] for name in node.input[:3])
            heads, length = query[0] * query[1], query[2]  # of all windows, where they are the batch
            if causal:  # keys beyond the lengths are never looked at: a row sees itself and what is before
                total += heads * (query[3] + value[3]) * length * (length + 1)
            else:
                total += 2 * heads * (query[3] + value[3]) * length * key[2]
        else:
            transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
            columns = second[-2] if transposed else second[-1]
            total += 2 * int(np.prod(first)) * columns
    return total


def inputs(session: Session) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What one prefill feeds to the vision and the language graph, and its text tokens."""
    engine = session.engine
    tower, decoder = engine.shape.tower, engine.shape.decoder
    patches = preprocess_image(picture(ROWS, COLUMNS), engine.image_processor)
    prepared = session.prepare("how many objects are there ?", [picture(ROWS, COLUMNS)])
    budget = np.zeros(ROWS * COLUMNS, np.int32)
    vision = {
        "pixel_values": patches.pixel_values.reshape(ROWS, COLUMNS, tower.group, tower.patch_dim),
        "entropy": patches.entropy.reshape(ROWS, COLUMNS, tower.group),
        "budget_tokens": budget,
    }
    language: dict[str, Any] = {
        "input_ids": prepared.input_ids[None],
        "position_ids": prepared.position_ids[:, None],
        "visual_embeds": prepared.visual_embeds,
        "visual_positions": prepared.visual_positions,
        "importance": prepared.importance,
        "key_bias": prepared.key_bias,
        "budget_tokens": budget,
        "past_lengths": np.zeros((1, len(engine.segments)), np.int64),
    }
    capacities = [segment.capacity for segment in engine.segments for _ in range(segment.layers)]
    for layer, capacity in enumerate(capacities):
        for part in ("key", "value"):
            language[f"past_key_values.{layer}.{part}"] = np.zeros((1, decoder.kv_heads, capacity, decoder.head_dim), np.float32)
    for number, segment in enumerate(engine.segments):
        language[f"past_key_values.bias.{number}"] = np.zeros((1, 1, segment.capacity, 1), np.float32)
    return vision, language, prepared.input_ids.size - prepared.visual_positions.size


def check_products(engine: Engine) -> None:
    vision, language, text_tokens = inputs(Session(engine))
    expected = cost(engine.schedule, engine.shape, rows=ROWS, columns=COLUMNS, text_tokens=text_tokens)
    assert products(engine.path / "language.onnx", language, causal=True) == expected.decoder_flops
    assert products(engine.path / "vision.onnx", vision, causal=False) == expected.tower_flops + expected.scoring_flops


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_products_in_an_engine_s_graphs_are_the_arithmetic_s(build: Callable[..., Engine], random_checkpoint: Path, name: str) -> None:
    check_products(build(random_checkpoint, SCHEDULES[name]))


@pytest.mark.parametrize("name", list(WINDOWED_SCHEDULES))
def test_they_are_where_the_tower_looks_at_windows(build: Callable[..., Engine], windowed_checkpoint: Path, name: str) -> None:
    check_products(build(windowed_checkpoint, WINDOWED_SCHEDULES[name]))


@pytest.mark.parametrize("name", list(DEEPSTACK_SCHEDULES))
def test_they_are_where_blocks_give_to_decoder_layers(build: Callable[..., Engine], deepstack_checkpoint: Path, name: str) -> None:
    check_products(build(deepstack_checkpoint, DEEPSTACK_SCHEDULES[name]))


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_visual_kv_bytes_of_an_engine_are_the_arithmetic_s(build: Callable[..., Engine], random_checkpoint: Path, name: str) -> None:
    engine = build(random_checkpoint, SCHEDULES[name])
    session = Session(engine)
    decoder, text = engine.shape.decoder, engine.limits.max_text_tokens
    text_bytes = decoder.layers * text * 2 * decoder.kv_heads * decoder.head_dim * 4
    text_bytes += len(engine.segments) * text * 4 if engine.schedule.proportional_attention else 0  # what is added to attention scores
    expected = kv_bytes(engine.schedule, engine.shape, tokens=MAX_VISUAL_TOKENS, bytes_per_value=4)
    assert session.backend.cache_bytes - text_bytes == expected
