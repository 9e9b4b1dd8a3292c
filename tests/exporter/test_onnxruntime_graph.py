"""Attention lowered to ONNX Runtime's own operators: the same answers and caches as the standard ones, and nothing else changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from schedules import DEEPSTACK_SCHEDULES, SCHEDULES, WINDOWED_SCHEDULES
from vflow.engines import Engine
from vflow.exporter.onnxruntime_graph import graph_for_onnxruntime
from vflow.plugins.node import DOMAIN

HEADS, KV_HEADS, CAPACITY = 4, 2, 20
CACHED = """
<ir_version: 11, opset_import: ["": 24]>
small (float[B, 4, S, D] query, float[B, 2, S, D] key, float[B, 2, S, D] value, float[B, 2, C, D] past_key, float[B, 2, C, D] past_value,
       int64[B] starts, int64[B] lengths) => (float[B, 4, S, D] mixed, float[B, 2, C, D] present_key, float[B, 2, C, D] present_value) {
    present_key = TensorScatter <axis: int = 2>(past_key, key, starts)
    present_value = TensorScatter <axis: int = 2>(past_value, value, starts)
    mixed = Attention <is_causal: int = 1, scale: float = 0.3>(query, present_key, present_value, , , , lengths)
}
"""

# The same with a mask that says what is seen and how much is added, as proportional attention has it.
MASKED = CACHED.replace("int64[B] lengths", "float[B, 1, S, C] mask").replace("is_causal: int = 1, ", "").replace(", , , lengths)", ", mask)")
MASKED = MASKED.replace("present_value, ,", "present_value,")


def small_graph(folder: Path, head_dim: int, text: str = CACHED) -> Path:
    """One attention to a cache, with the head dimension as a number."""
    onnx.save(onnx.parser.parse_model(text.replace("D]", f"{head_dim}]")), folder / "small.onnx")
    return folder / "small.onnx"


def run(model: Any, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that caches are copied here is no news
    results: list[NDArray[Any]] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feed)
    return results


def operators(nodes: Any) -> Counter[str]:
    return Counter(node.op_type for node in nodes if node.domain != DOMAIN and ("Attention" in node.op_type or node.op_type == "TensorScatter"))


# One request of any length, at the start and behind others; then single tokens of several requests of different lengths, one of them empty.
@pytest.mark.parametrize(("tokens", "past"), [(7, [0]), (1, [0]), (20, [0]), (1, [19]), (5, [9]), (1, [3, 19, 0]), (1, [0, 0])])
@pytest.mark.parametrize("text", [CACHED, MASKED], ids=["causal", "masked"])
def test_lowered_attention_and_caches_are_the_standard_ones(tmp_path: Path, text: str, tokens: int, past: list[int]) -> None:
    file, rng, rows = small_graph(tmp_path, 8, text), np.random.default_rng(tokens), len(past)
    feed: dict[str, NDArray[Any]] = {"query": rng.normal(size=(rows, HEADS, tokens, 8)).astype(np.float32)}
    feed |= {name: rng.normal(size=(rows, KV_HEADS, tokens, 8)).astype(np.float32) for name in ("key", "value")}
    feed |= {name: np.full((rows, KV_HEADS, CAPACITY, 8), 1e4, np.float32) for name in ("past_key", "past_value")}  # left over, and large
    for name in ("past_key", "past_value"):
        for row, length in enumerate(past):
            feed[name][row, :, :length] = rng.normal(size=(KV_HEADS, length, 8))
    feed["starts"] = np.array(past)
    if text == CACHED:
        feed["lengths"] = np.array(past) + tokens
    else:
        seen = np.arange(CAPACITY) <= (np.array(past)[:, None] + np.arange(tokens))[:, None, :, None]
        feed["mask"] = np.where(seen, rng.normal(scale=3, size=(rows, 1, 1, CAPACITY)), -np.inf).astype(np.float32)
    lowered = ir.serde.serialize_model(graph_for_onnxruntime(file)).SerializeToString()
    mixed, *caches = run(lowered, feed)
    expected, *expected_caches = run(str(file), feed)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-6)  # values of about 1, rounded in another order
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        for row, length in enumerate(past):  # what is behind means nothing, and is not copied where a cache is not updated in place
            np.testing.assert_array_equal(cache[row, :, : length + tokens], expected_cache[row, :, : length + tokens])


@pytest.mark.parametrize(("head_dim", "lowered"), [(16, True), (12, False)])
def test_heads_that_the_runtime_s_operator_does_not_take_stay_standard(tmp_path: Path, head_dim: int, lowered: bool) -> None:
    model = graph_for_onnxruntime(small_graph(tmp_path, head_dim))
    assert operators(model.graph) == ({"GroupQueryAttention": 1} if lowered else {"TensorScatter": 2, "Attention": 1})
    assert ("com.microsoft" in model.opset_imports) == lowered


@pytest.mark.parametrize("name", ["unpruned", "tower and decoder", "guided, no first stage", "proportional"])
def test_all_attention_of_an_engine_is_lowered_function_bodies_included(build: Callable[..., Engine], random_checkpoint: Path, name: str) -> None:
    engine = build(random_checkpoint, SCHEDULES[name])
    vision, language = (onnx.load(engine.path / str(graph.cpu_file), load_external_data=False) for graph in (engine.vision, engine.language))
    assert operators(vision.graph.node) == {"MultiHeadAttention": 3}
    assert operators(language.graph.node) == {"GroupQueryAttention": 4}
    for function in (*vision.functions, *language.functions):
        assert set(operators(function.node)) <= {"MultiHeadAttention"}


def test_attention_in_windows_stays_standard(build: Callable[..., Engine], windowed_checkpoint: Path) -> None:
    engine = build(windowed_checkpoint, WINDOWED_SCHEDULES["windows"])
    vision = onnx.load(engine.path / str(engine.vision.cpu_file), load_external_data=False)
    assert operators(vision.graph.node) == {"MultiHeadAttention": 2, "Attention": 2}


def test_heads_that_are_normed_are_lowered_as_others_are(build: Callable[..., Engine], deepstack_checkpoint: Path) -> None:
    engine = build(deepstack_checkpoint, DEEPSTACK_SCHEDULES["deepstack"])
    vision, language = (onnx.load(engine.path / str(graph.cpu_file), load_external_data=False) for graph in (engine.vision, engine.language))
    assert operators(vision.graph.node) == {"MultiHeadAttention": 4}
    assert operators(language.graph.node) == {"GroupQueryAttention": 4}


def test_a_lowered_graph_has_the_interface_and_the_weights_of_the_other(build: Callable[..., Engine], random_checkpoint: Path) -> None:
    engine = build(random_checkpoint, SCHEDULES["tower and decoder"])
    for graph in (engine.vision, engine.language):
        standard, lowered = (onnx.load(engine.path / str(file), load_external_data=False).graph for file in (graph.file, graph.cpu_file))
        for ours, theirs in ((lowered.input, standard.input), (lowered.output, standard.output)):
            assert [(value.name, value.type) for value in ours] == [(value.name, value.type) for value in theirs]
        weights = [{t.name: list(t.external_data) for t in side.initializer if t.external_data} for side in (standard, lowered)]
        assert weights[0] == weights[1] != {}
