"""Exported graphs in ONNX Runtime against the PyTorch reference: survivors, features, logits, caches, step by step and in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from schedules import DEEPSTACK_SCHEDULES, SCHEDULES, WINDOWED_SCHEDULES
from support import picture
from vflow.engines import Engine, Session
from vflow.engines.backends.onnxruntime import DISABLED_OPTIMIZERS, OnnxRuntimeBackend
from vflow.engines.preprocess import ImageProcessorConfig, preprocess_image
from vflow.engines.request import read_request
from vflow.exporter.build import BuildOptions, build_engine
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.data import generated_samples
from vflow.exporter.model import load_model, pruned_graphs, shapes_only
from vflow.exporter.models import model_shape
from vflow.exporter.onnx_writer import write_graphs
from vflow.exporter.presets import preset_schedule
from vflow.exporter.reference import TorchBackend
from vflow.exporter.tiny.trained import TRAINED_KINDS
from vflow.exporter.trace import trace_vision

FP32 = 1e-4  # absolute, of features and logits of up to about 6: the same operations in another order
FP16_RELATIVE = 2e-2  # of the largest value: 2⁻¹¹ a rounding, some twenty of them in a row, in another place on either side
GRIDS = [(5, 6), (3, 9), (1, 1), (1, 7), (8, 8)]
VISION_ONLY = ["pixels", "first stage only", "protected"]  # their language graphs are the others'
PROMPT = "how many objects are there ?"


def onnx_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS)


def vision_inputs(engine_processor: Any, rows: int, columns: int) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    patches = preprocess_image(picture(rows, columns, seed=rows * 31 + columns), engine_processor)
    return patches.pixel_values.reshape(rows, columns, 4, -1), patches.entropy.reshape(rows, columns, 4), rows * columns


@pytest.fixture(
    scope="module",
    params=[
        ("random_checkpoint", "unpruned", "fp32"),
        ("random_checkpoint", "decoder", "fp32"),
        ("random_checkpoint", "tower and decoder", "fp32"),
        ("random_checkpoint", "guided, no first stage", "fp32"),
        ("untied_checkpoint", "guidance alone", "fp32"),
        ("random_checkpoint", "proportional", "fp32"),
        ("random_checkpoint", "proportional", "fp32", "standard"),
        ("random_checkpoint", "tower and decoder", "fp16"),
        ("random_checkpoint", "tower and decoder", "fp32", "standard"),
        ("windowed_checkpoint", "windows", "fp32"),
        ("windowed_checkpoint", "windows", "fp16"),
        ("windowed_checkpoint", "windows, twice by one block", "fp32", "standard"),
        ("deepstack_checkpoint", "deepstack", "fp32"),
        ("deepstack_checkpoint", "deepstack", "fp16"),
        ("deepstack_checkpoint", "deepstack, proportional", "fp32", "standard"),
    ],
    ids=lambda case: "-".join(case[1:]) + ("-untied" if "untied" in case[0] else ""),
)
def pair(request: pytest.FixtureRequest, build: Callable[..., Engine]) -> tuple[Session, Session]:
    """An engine in ONNX Runtime, its graphs lowered for the CPU unless "standard", and the same request path over the reference."""
    kind, name, precision, *standard = request.param
    folder = request.getfixturevalue(kind)
    engine = build(folder, (SCHEDULES | WINDOWED_SCHEDULES | DEEPSTACK_SCHEDULES)[name], precision)
    model = load_model(open_checkpoint(str(folder)), {"fp32": torch.float32, "fp16": torch.float16}[precision])
    reference = TorchBackend(*pruned_graphs(model, engine.shape, engine.schedule), engine.segments)
    backend = OnnxRuntimeBackend(engine, provider="cpu", threads=1, standard=bool(standard))
    return Session(engine, backend=backend), Session(engine, backend=reference)


def close(session: Session, actual: NDArray[Any], expected: NDArray[Any]) -> None:
    expected = expected.astype(np.float32)
    tolerance = FP32 if session.engine.precision == "fp32" else FP16_RELATIVE * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_the_vision_graph_keeps_the_same_tokens(pair: tuple[Session, Session], rows: int, columns: int) -> None:
    session, reference = pair
    inputs = vision_inputs(session.engine.image_processor, rows, columns)
    embeds, importance, index, bias = session.backend.vision(*inputs)
    expected_embeds, expected_importance, expected_index, expected_bias = reference.backend.vision(*inputs)
    if session.engine.precision == "fp16" and index.tolist() != expected_index.tolist():
        shared = np.intersect1d(index, expected_index)  # importances that differ by less than a rounding may change places
        assert len(shared) >= 0.9 * len(index)
        return
    assert index.tolist() == expected_index.tolist()
    close(session, embeds, expected_embeds)
    tolerance = 1e-4 if session.engine.precision == "fp32" else 5e-2
    np.testing.assert_allclose(importance, expected_importance, rtol=tolerance, atol=1e-7)
    assert (bias is None) == (expected_bias is None) == (session.engine.schedule.proportional_attention == 0)
    if bias is not None and expected_bias is not None:
        np.testing.assert_allclose(bias, expected_bias, rtol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_prefill_and_decoding_give_the_same_logits(pair: tuple[Session, Session], rows: int, columns: int) -> None:
    session, reference = pair
    prepared = session.prepare(PROMPT, [picture(rows, columns, seed=3)])
    ours, theirs = session.prefill(prepared), reference.prefill(prepared)
    close(session, ours.logits, theirs.logits)
    close(session, ours.last_hidden, theirs.last_hidden)
    for token in (9, 11, 20):
        ours, theirs = session.decode(token), reference.decode(token)
        close(session, ours.logits, theirs.logits)


def test_several_images_and_text_alone_give_the_same_logits(pair: tuple[Session, Session]) -> None:
    session, reference = pair
    for images in ([picture(3, 4, seed=1), picture(2, 7, seed=2)], []):
        prepared = session.prepare(PROMPT, images)
        close(session, session.prefill(prepared).logits, reference.prefill(prepared).logits)


def test_a_chunk_is_the_same_tokens_one_by_one(pair: tuple[Session, Session]) -> None:
    session, _ = pair
    prepared = session.prepare(PROMPT, [picture(4, 5)])
    session.prefill(prepared)
    for token in (9, 11, 20, 14):
        stepwise = session.decode(token)
    session.prefill(prepared)
    close(session, session.extend([9, 11, 20, 14]).logits, stepwise.logits)


def test_nothing_of_an_earlier_request_is_seen(pair: tuple[Session, Session]) -> None:
    session, _ = pair
    short = session.prepare(PROMPT, [picture(2, 3)])
    before = session.prefill(short).logits
    session.prefill(session.prepare(PROMPT, [picture(8, 8)]))
    np.testing.assert_array_equal(session.prefill(short).logits, before)


def test_caches_hold_as_many_tokens_as_the_schedule_says(pair: tuple[Session, Session]) -> None:
    session, _ = pair
    backend = session.backend
    assert isinstance(backend, OnnxRuntimeBackend)
    prepared = session.prepare(PROMPT, [picture(5, 6)])
    backend.clear_caches()
    session.prefill(prepared)
    text = prepared.input_ids.size - prepared.visual_positions.size
    for layer in range(4):
        kept = -(-30 * session.engine.schedule.keep_at("decoder", layer) // 1024)
        assert np.count_nonzero(np.abs(backend.cache_array(layer, "key")).sum((0, 1, 3))) == text + kept


@pytest.mark.parametrize("name", VISION_ONLY)
def test_other_vision_graphs_keep_the_same_tokens(random_checkpoint: Path, model: Any, tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(str(random_checkpoint))
    shape, schedule = model_shape(checkpoint.config), SCHEDULES[name]
    with shapes_only(checkpoint, torch.float32) as traced:
        graph = trace_vision(pruned_graphs(traced, shape, schedule)[0], shape, dtype=torch.float32)
    write_graphs([(graph, "vision.onnx")], checkpoint, tmp_path)
    session, reference = onnx_session(tmp_path / "vision.onnx"), pruned_graphs(model, shape, schedule)[0]
    wanted = {value.name for value in session.get_inputs()}
    for rows, columns in GRIDS:
        pixels, entropy, budget = vision_inputs(ImageProcessorConfig(4, 2, 2, 64, 64 * 64), rows, columns)
        tensors = {"pixel_values": pixels, "entropy": entropy, "budget_tokens": np.zeros(budget, np.int32)}
        actual = session.run(None, {key: value for key, value in tensors.items() if key in wanted})
        with torch.no_grad():
            expected = reference(*(torch.from_numpy(value) for value in tensors.values()))
        assert actual[2].tolist() == expected[2].tolist()
        np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=FP32)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("file", ["language.onnx", "language.cpu.onnx"])
@pytest.mark.parametrize("name", ["decoder", "proportional"])
def test_rows_of_a_batch_decode_as_if_alone(build: Callable[..., Engine], random_checkpoint: Path, name: str, file: str) -> None:
    engine = build(random_checkpoint, SCHEDULES[name])
    session = onnx_session(engine.path / file)
    names = [value.name for value in session.get_outputs()]
    rng = np.random.default_rng(5)
    feed: dict[str, NDArray[Any]] = {
        "input_ids": np.array([[9], [12], [30]]),
        "position_ids": np.tile(np.array([[7], [3], [5]]), (3, 1, 1)),
        "visual_embeds": np.zeros((0, 32), np.float32),
        "visual_positions": np.zeros(0, np.int64),
        "importance": np.zeros(0, np.float32),
        "budget_tokens": np.zeros(0, np.int32),
        "past_lengths": np.array([[6, 4], [2, 1], [5, 5]]),
    }
    for tensor in engine.language.inputs:
        if tensor.name == "key_bias":
            feed["key_bias"] = np.zeros(0, np.float32)
        elif tensor.name.startswith("past_key_values."):
            sizes = {"batch": 3, "capacity_0": 9, "capacity_1": 9}
            feed[tensor.name] = rng.normal(size=[sizes.get(str(size), size) for size in tensor.shape]).astype(np.float32)
    together = dict(zip(names, session.run(None, feed), strict=True))
    batch_axis = {"position_ids": 1, "visual_embeds": None, "visual_positions": None, "importance": None, "budget_tokens": None, "key_bias": None}
    for row in range(3):
        alone = {k: v if batch_axis.get(k, 0) is None else v.take([row], batch_axis.get(k, 0)) for k, v in feed.items()}
        for name, value in zip(names, session.run(None, alone), strict=True):
            np.testing.assert_allclose(together[name][row : row + 1], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_scale", [1.0, 0.4])
def test_the_room_for_an_answer_is_known_before_the_vision_graph_runs(pair: tuple[Session, Session], keep_scale: float) -> None:
    session, _ = pair
    for images in ([], [picture(4, 6)], [picture(3, 3), picture(2, 5, 1)]):
        request = read_request(session.engine, session.encoder, PROMPT, images, keep_scale=keep_scale)
        session.prefill(session.prepare(PROMPT, images, keep_scale=keep_scale))
        assert request.max_new_tokens == session.room + 1


def test_a_smaller_budget_keeps_fewer_tokens_of_the_same_image(pair: tuple[Session, Session]) -> None:
    session, reference = pair
    image = picture(6, 6, seed=4)
    ours, theirs = (s.prepare(PROMPT, [image], keep_scale=0.5) for s in pair)
    keep = session.engine.schedule.keep_at("decoder", 0)
    unpruned = not session.engine.schedule.tower_stages and session.engine.schedule.first_stage is None
    assert ours.survivors[0].index.size == (36 if unpruned else -(-18 * keep // 1024))
    if session.engine.precision == "fp32":
        assert ours.survivors[0].index.tolist() == theirs.survivors[0].index.tolist()
    if not unpruned:
        close(session, session.prefill(ours).logits, reference.prefill(ours).logits)


@pytest.mark.parametrize("name", ["tiny", "tiny-2.5", "tiny-3"])
def test_a_trained_model_still_sees_without_most_of_its_tokens(tmp_path: Path, name: str) -> None:
    """Half of them gone early in the tower, three quarters later, nine in ten in the decoder."""
    checkpoint = open_checkpoint(name)
    schedule = preset_schedule("tower", model_shape(checkpoint.config), 0.1)
    assert schedule.tower_stages
    session = Session(build_engine(checkpoint, schedule, tmp_path / "engine", BuildOptions("fp16", 256, 64)), provider="cpu")
    questions = list(generated_samples(24, TRAINED_KINDS, 448))
    right = sum(session.generate(q.prompt, q.images, max_new_tokens=4).text.strip() == q.answer for q in questions)
    assert right >= 16  # 19, 18 and 18 here; tokens left at random, or a picture of as many, answer 11 to 14
