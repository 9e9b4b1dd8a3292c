"""A small engine built by hand: two ONNX graphs with the inputs and outputs of docs/architecture.md and a byte-level tokenizer.

It has every mechanism that the session must drive (in-place caches, segments, later stages, M-RoPE positions, text that
depends on every earlier token) and no trained weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from triton_process import SLOW_TOKENS
from vflow.engines import Engine, kv_segments, open_engine, write_engine_directory
from vflow.engines.directory import CHECKSUM, checksum
from vflow.engines.triton_server.settings import Settings
from vflow.exporter.schedule import Schedule, Stage
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape
from vflow.exporter.triton_repository import REPOSITORY_FOLDER, write_model

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|box_start|>")
PATCH_SIZE, MERGE_SIZE, TEMPORAL = 4, 2, 2
SHAPE = ModelShape(
    TowerShape(blocks=2, embed_dim=16, heads=2, mlp_dim=32, patch_dim=3 * TEMPORAL * PATCH_SIZE**2, merge_size=MERGE_SIZE),
    DecoderShape(layers=3, hidden_size=16, heads=4, kv_heads=2, head_dim=8, mlp_dim=32, vocab_size=256 + len(SPECIAL_TOKENS)),
)
SCHEDULE = Schedule(stages=(Stage("decoder", 0, 512), Stage("decoder", 2, 256)))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64, "int32": TensorProto.INT32}


class GraphBuilder:
    """Nodes, constants and value names of one graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{kind}_{len(self.nodes)}"
        outputs = [name] if kind != "TopK" else [f"{name}_values", name]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return name

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def length(self, name: str, axis: int = 0) -> str:
        """One axis of a shape, int64 [1]."""
        return self.op("Shape", name, start=axis, end=axis + 1)

    def keep_count(self, tokens: str, keep: int) -> str:
        grown = self.op("Add", self.op("Mul", tokens, self.const([keep])), self.const([1023]))
        return self.op("Div", grown, self.const([1024]))

    def top(self, key: str, count: str) -> str:
        """Indices of the largest ``count`` of a vector, ascending."""
        best = self.op("TopK", key, count, axis=0)
        ascending = self.op("TopK", best, count, axis=0, largest=0)
        return self.op("Gather", best, ascending)

    def save(self, path: Path) -> None:
        def values(tensors: list[dict[str, Any]]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(t["name"], ONNX_TYPES[t["dtype"]], t["shape"]) for t in tensors]

        graph = helper.make_graph(self.nodes, path.stem, values(self.inputs), values(self.outputs), self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def vision_graph(schedule: Schedule, dtype: str) -> GraphBuilder:
    """Visual tokens are projected mean patches; importance is their mean magnitude (so a test can work it out)."""
    g = GraphBuilder()
    weights = np.random.default_rng(1).normal(size=(SHAPE.tower.patch_dim, SHAPE.decoder.hidden_size)) * 0.2
    g.inputs = [tensor("pixel_values", dtype, "rows", "columns", SHAPE.tower.group, SHAPE.tower.patch_dim)]
    flat = g.op("Reshape", g.op("ReduceMean", "pixel_values", g.const([2]), keepdims=0), g.const([-1, SHAPE.tower.patch_dim]))
    embeds = g.op("MatMul", flat, g.const(weights, dtype))
    importance = g.op("Cast", g.op("ReduceMean", g.op("Abs", embeds), g.const([1]), keepdims=0), to=TensorProto.FLOAT)
    keep = schedule.keep_at("decoder", 0)
    if schedule.stages and keep < 1024:
        g.inputs.append(tensor("budget_tokens", "int32", "N"))
        count = g.keep_count(g.length("budget_tokens"), keep)
    else:
        count = g.length(embeds)
    g.op("Identity", g.top(importance, count), output="index")
    g.op("Gather", embeds, "index", output="visual_embeds")
    g.op("Gather", importance, "index", output="importance")
    g.outputs = [tensor("visual_embeds", dtype, "M", SHAPE.decoder.hidden_size), tensor("importance", "float32", "M"), tensor("index", "int64", "M")]
    return g


def language_graph(schedule: Schedule, dtype: str) -> GraphBuilder:
    """Attention-only layers with caches, segments and later stages."""
    g, d, rng = GraphBuilder(), SHAPE.decoder, np.random.default_rng(2)
    segments = schedule.decoder_segments(d.layers)
    g.inputs = [
        tensor("input_ids", "int64", "B", "S"),
        tensor("position_ids", "int64", 3, "B", "S"),
        tensor("visual_embeds", dtype, "V", d.hidden_size),
        tensor("visual_positions", "int64", "V"),
        tensor("past_lengths", "int64", "B", len(segments)),
    ]
    if len(segments) > 1:
        g.inputs += [tensor("importance", "float32", "V"), tensor("budget_tokens", "int32", "N")]

    table = g.const(rng.normal(size=(d.vocab_size, d.hidden_size)), dtype)
    text = g.op("Reshape", g.op("Gather", table, "input_ids"), g.const([-1, d.hidden_size]))  # [B · S, H]
    columns = g.op("Unsqueeze", "visual_positions", g.const([1]))  # [V, 1]
    hidden = g.op("ScatterND", text, columns, "visual_embeds")
    angles = g.op(
        "MatMul", g.op("Cast", g.op("Transpose", "position_ids", perm=[1, 2, 0]), to=ONNX_TYPES[dtype]), g.const([[0.3], [0.5], [0.7]], dtype)
    )
    rows = g.op("Concat", g.op("Shape", "input_ids"), g.const([d.hidden_size]), axis=0)
    hidden = g.op("Add", g.op("Reshape", hidden, rows), g.op("Sin", angles))  # [B, S, H]
    alive = g.length("visual_embeds")
    for number, (first, end, keep) in enumerate(segments):
        if number:
            if number == 1:
                infinite = g.op("Expand", g.const([np.inf], np.float32), g.length(hidden, 1))
                key = g.op("ScatterND", infinite, columns, "importance")  # [S]
            left = g.keep_count(g.length("budget_tokens"), keep)
            count = g.op("Sub", g.length(hidden, 1), g.op("Sub", alive, left))
            kept, alive = g.top(key, count), left
            hidden, key = g.op("Gather", hidden, kept, axis=1), g.op("Gather", key, kept)
        past = g.op("Gather", "past_lengths", g.const(number), axis=1)  # [B]
        total = g.op("Add", past, g.length(hidden, 1))
        for layer in range(first, end):
            hidden = attention_layer(g, hidden, past, total, layer, f"capacity_{number}", dtype, rng)
    g.op("Gather", hidden, g.const(-1), axis=1, output="last_hidden")
    logits = g.op("MatMul", "last_hidden", g.const(rng.normal(size=(d.hidden_size, d.vocab_size)), dtype))
    g.op("Cast", logits, to=TensorProto.FLOAT, output="logits")
    g.outputs = [tensor("logits", "float32", "B", d.vocab_size), tensor("last_hidden", dtype, "B", d.hidden_size), *g.outputs]
    return g


def attention_layer(g: GraphBuilder, hidden: str, past: str, total: str, layer: int, capacity: str, dtype: str, rng: np.random.Generator) -> str:
    d = SHAPE.decoder

    def heads(count: int) -> str:
        weight = g.const(rng.normal(size=(d.hidden_size, count * d.head_dim)) * 0.2, dtype)
        split = g.op("Reshape", g.op("MatMul", hidden, weight), g.const([0, 0, count, d.head_dim]))
        return g.op("Transpose", split, perm=[0, 2, 1, 3])  # [B, heads, S, head_dim]

    query, caches = heads(d.heads), []
    for kind in ("key", "value"):
        name = f"past_key_values.{layer}.{kind}"
        cache = tensor(name, dtype, "B", d.kv_heads, capacity, d.head_dim)
        g.inputs.append(cache)
        g.outputs.append({**cache, "name": f"present.{layer}.{kind}"})
        caches.append(g.op("TensorScatter", name, heads(d.kv_heads), past, output=f"present.{layer}.{kind}", axis=2))
    attended = g.op("Attention", query, *caches, "", "", "", total, is_causal=1)
    joined = g.op("Reshape", g.op("Transpose", attended, perm=[0, 2, 1, 3]), g.const([0, 0, d.heads * d.head_dim]))
    return g.op("Add", hidden, g.op("MatMul", joined, g.const(rng.normal(size=(d.heads * d.head_dim, d.hidden_size)) * 0.2, dtype)))


def byte_tokenizer() -> Any:
    """Byte-level tokenizer without merges: a character outside ASCII takes several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_standin(
    target: Path,
    *,
    schedule: Schedule = SCHEDULE,
    precision: str = "fp32",
    max_visual_tokens: int = 40,
    max_text_tokens: int = 160,
    force: bool = False,
) -> Path:
    """Write a whole engine directory."""
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    tokenizer = byte_tokenizer()
    manifest: dict[str, Any] = {
        "format": 1,
        "family": "qwen2_vl",
        "model": {"name": "stand-in", "fingerprint": "0123abcd"},
        "precision": precision,
        "shape": SHAPE.to_dict(),
        "schedule": schedule.to_dict(),
        "limits": {"max_visual_tokens": max_visual_tokens, "max_text_tokens": max_text_tokens},
        "segments": [
            vars(segment)
            for segment in kv_segments(schedule, SHAPE.decoder.layers, max_visual_tokens=max_visual_tokens, max_text_tokens=max_text_tokens)
        ],
        "tokens": {
            "image": tokenizer.token_to_id("<|image_pad|>"),
            "vision_start": tokenizer.token_to_id("<|vision_start|>"),
            "vision_end": tokenizer.token_to_id("<|vision_end|>"),
            "stop": [tokenizer.token_to_id("<|im_end|>")],
        },
        "image_processor": {
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL,
            "merge_size": MERGE_SIZE,
            "min_pixels": 256,
            "max_pixels": 64 * 64,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
        },
        "graphs": {},
        "environment": {},
    }
    with write_engine_directory(target, manifest, force=force) as folder:
        for name, graph in (("vision", vision_graph(schedule, dtype)), ("language", language_graph(schedule, dtype))):
            graph.save(folder / f"{name}.onnx")
            manifest["graphs"][name] = {"file": f"{name}.onnx", "inputs": graph.inputs, "outputs": graph.outputs}
        schedule.save(folder / "schedule.json")
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return target


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The stand-in's byte-level tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_standin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a stand-in engine somewhere new (or at ``target``); keywords as :func:`write_standin`."""

    def make(target: Path | None = None, **options: Any) -> Path:
        return write_standin(target or tmp_path_factory.mktemp("engines") / "engine", **options)

    return make


@pytest.fixture(scope="session")
def standin(make_standin: Callable[..., Path]) -> Engine:
    """One stand-in engine for tests that change nothing in it."""
    return open_engine(make_standin())


@pytest.fixture(scope="session")
def slow_engine(make_standin: Callable[..., Path]) -> Engine:
    """The Triton model "slow" beside its engine: one slot, a queue of one, long answers."""
    folder = make_standin(max_text_tokens=SLOW_TOKENS)
    write_model(folder / REPOSITORY_FOLDER, "slow", Settings("../..", slots=1, queue_limit=1, threads=1))
    return open_engine(folder)


@pytest.fixture
def edit_manifest() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Change the manifest of an engine in place, as a builder that wrote that would have."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps({**values, CHECKSUM: checksum(values)}))

    return edit
