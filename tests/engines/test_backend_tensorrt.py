"""The TensorRT backend on stand-ins for library and driver: answers as of ONNX Runtime, memory that stays in place, one line for what is missing.

No engine runs here: the stand-in executes the ONNX graph on the very memory, shapes and profile that the backend gave its contexts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import picture
from tensorrt_standins import FakeCuda, FakeTensorRT
from vflow.engines import EngineError, SamplingParams, Session
from vflow.engines.backends import tensorrt as tensorrt_module
from vflow.engines.backends.cuda import Device, Recording
from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend
from vflow.engines.backends.tensorrt import TensorRTBackend
from vflow.engines.graphs import BuiltEngine, Graph, Profile, Target
from vflow.engines.manifest import Engine
from vflow.exporter.schedule import Schedule, Stage
from vflow.exporter.tensorrt.graph import engine_interface
from vflow.exporter.tensorrt.profiles import language_profiles, vision_profiles

STAGES = (Stage("tower", 2, 700), Stage("decoder", 0, 500, 2.0), Stage("decoder", 2, 250))
SCHEDULES = {
    "fp32": Schedule(STAGES, guidance_weight=0.5),
    "fp16": Schedule(STAGES, guidance_weight=0.5),
    "proportional": Schedule(STAGES, proportional_attention=2.0),
}
PROMPT = "how many objects are there ?"


def as_built(engine: Engine, graph: Graph, profiles: tuple[Profile, ...]) -> BuiltEngine:
    inputs, outputs = engine_interface(graph, engine.segments)
    return BuiltEngine(graph.file, "log", "layers", inputs, outputs, profiles, 1, 1.0, None)


@pytest.fixture(scope="module", params=list(SCHEDULES))
def engine(request: pytest.FixtureRequest, build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    """Its graphs stand for the engines built from them."""
    engine = build(random_checkpoint, SCHEDULES[request.param], request.param if request.param.startswith("fp") else "fp32")
    vision = as_built(engine, engine.vision, vision_profiles(engine.limits))
    language = as_built(engine, engine.language, language_profiles(engine.segments, engine.limits))
    return dataclasses.replace(engine, targets={"tensorrt-rtx": Target("tensorrt-rtx", {"tensorrt_rtx": "1.6"}, ("8.9", "12.0"), vision, language)})


@pytest.fixture
def library(engine: Engine) -> FakeTensorRT:
    return FakeTensorRT([engine.path / engine.vision.file, engine.path / engine.language.file])


def test_answers_are_those_of_onnx_runtime(engine: Engine, library: FakeTensorRT) -> None:
    cuda = FakeCuda()
    ours = Session(engine, backend=TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=cuda))
    theirs = Session(engine, backend=OnnxRuntimeBackend(engine, provider="cpu"))
    greedy = SamplingParams()
    for images in ([picture(6, 5)], [], [picture(4, 3, 1), picture(5, 5, 2)], [picture(1, 20)]):
        answers = [session.generate(PROMPT, images, max_new_tokens=5, sampling=greedy) for session in (ours, theirs)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].to_dict()["visual_tokens"] == answers[1].to_dict()["visual_tokens"]
        assert answers[0].to_dict()["kv_bytes"] == answers[1].to_dict()["kv_bytes"]


def test_prefill_and_decode_have_a_context_each_and_no_buffer_moves(engine: Engine, library: FakeTensorRT) -> None:
    cuda = FakeCuda()
    session = Session(engine, backend=TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=cuda))

    def request() -> None:
        session.prefill(session.prepare(PROMPT, [picture(6, 5)]))
        for token in (9, 10, 11):
            session.decode(token)

    request()
    square, prefill, decode = library.contexts
    assert [context.profile for context in (square, prefill, decode)] == [0, 0, 1]
    assert (prefill.runs, decode.runs) == (1, 3)
    assert [context.records_itself for context in (square, prefill, decode)] == [False, False, True] and cuda.launches == 0
    assert prefill.addresses == decode.addresses
    for name, address in prefill.addresses.items():
        if name.startswith("present."):
            assert address == prefill.addresses[name.replace("present.", "past_key_values.")]
    assert len({address for name, address in prefill.addresses.items() if not name.startswith("present.")}) == len(engine.language.inputs) + 2
    before, addresses = list(cuda.calls), dict(prefill.addresses)
    request()
    assert cuda.calls == before  # nothing is allocated for a second request
    assert prefill.addresses == addresses and len(library.contexts) == 3


def test_tensorrt_records_a_decoding_step_once_and_launches_it_from_then_on(engine: Engine, library: FakeTensorRT) -> None:
    """Against a backend that runs every step."""
    cuda, files = FakeCuda(), [engine.path / engine.vision.file, engine.path / engine.language.file]
    recorded = dataclasses.replace(engine, targets={"tensorrt": dataclasses.replace(engine.targets["tensorrt-rtx"], name="tensorrt")})
    recording = FakeTensorRT(files, cuda)
    ours = Session(recorded, backend=TensorRTBackend(recorded, target="tensorrt", library=recording, runtime=cuda))
    theirs = Session(engine, backend=TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=FakeCuda()))

    def check(rows: int) -> None:
        prepared = theirs.prepare(PROMPT, [picture(rows, 5)])
        np.testing.assert_array_equal(ours.prefill(prepared).logits, theirs.prefill(prepared).logits)
        for token in (9, 10, 11, 12):
            np.testing.assert_array_equal(ours.decode(token).logits, theirs.decode(token).logits)
        np.testing.assert_array_equal(ours.extend([9, 10]).logits, theirs.extend([9, 10]).logits)  # of the same profile, and another size

    check(2)
    assert cuda.launches == 3  # the first step ran by itself
    check(2)
    assert cuda.launches == 3 + 4 + 1
    check(6)  # a longer prompt needs more scratch memory, so what was recorded is of no use
    assert cuda.launches == 8 + 3
    assert not any(context.records_itself for context in recording.contexts)


def test_a_step_that_cannot_be_recorded_leaves_the_stream_usable() -> None:
    cuda = FakeCuda()
    device = Device(cuda)
    with pytest.raises(EngineError, match=r"^no$"):
        Recording(device, lambda: (_ for _ in ()).throw(EngineError("no")))
    assert cuda.recording is None


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("ICudaEngine", "create_runtime_config"),
        ("IRuntimeConfig", "cuda_graph_strategy"),
        ("IRuntimeConfig", "set_execution_context_allocation_strategy"),
        ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
    ],
)
def test_what_the_stand_in_has_the_library_has(owner: str, name: str) -> None:
    assert hasattr(getattr(pytest.importorskip("tensorrt_rtx"), owner), name)


def test_tall_and_wide_images_take_their_own_profiles(engine: Engine, library: FakeTensorRT) -> None:
    session = Session(engine, backend=TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=FakeCuda()))
    for image in (picture(30, 1), picture(1, 30)):
        session.generate(PROMPT, [image], max_new_tokens=1)
    names = [profile.name for profile in engine.targets["tensorrt-rtx"].vision.profiles]
    assert [names[context.profile] for context in library.contexts if "input_ids" not in context.shapes] == ["tall", "wide"]


def test_clearing_the_caches_overwrites_them(engine: Engine, library: FakeTensorRT) -> None:
    cuda = FakeCuda()
    backend = TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=cuda)
    Session(engine, backend=backend).generate(PROMPT, [picture(6, 5)], max_new_tokens=2)
    prefill = library.contexts[1]
    caches = [cuda.memory[address] for name, address in prefill.addresses.items() if name.startswith("past_key_values.")]
    assert all(any(cache.raw) for cache in caches)
    backend.clear_caches()
    assert not any(any(cache.raw) for cache in caches)


def test_sizes_beyond_every_profile_are_refused(engine: Engine, library: FakeTensorRT) -> None:
    backend = TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=FakeCuda())
    group, patch_dim = engine.shape.tower.group, engine.shape.tower.patch_dim
    with pytest.raises(EngineError, match=r"^vision.onnx has no profile for rows 40, columns 40, budget 1600; ask for less"):
        backend.vision(np.zeros((40, 40, group, patch_dim), np.float32), np.zeros((40, 40, group), np.float32), 1600)


def test_a_failed_execution_is_said_in_one_line(engine: Engine, library: FakeTensorRT) -> None:
    backend = TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=FakeCuda())
    library.failing = True
    with pytest.raises(EngineError, match=r"^vision.onnx failed \(Cuda Runtime \(an illegal memory access\)\); try a smaller request$"):
        Session(engine, backend=backend).generate(PROMPT, [picture(6, 5)], max_new_tokens=1)


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (FakeCuda(devices=0), "no NVIDIA GPU that CUDA can use (cudaErrorNoDevice); use ONNX Runtime"),
        (FakeCuda(driver=0), "no NVIDIA GPU that CUDA can use (cudaErrorInsufficientDriver); install its driver, or use ONNX Runtime"),
        (FakeCuda(driver=12040), "its driver is for CUDA 12.4 and CUDA 13.5 is needed: update the driver"),
        (
            FakeCuda(capability="9.0"),
            "the engines are for GPUs of compute capability 8.9, 12.0, this one has 9.0; build with --compute-capability 9.0",
        ),
        (FakeCuda(room=1000), "CUDA: cudaMalloc failed (cudaErrorMemoryAllocation); free memory on the GPU, or use ONNX Runtime"),
    ],
)
def test_what_is_missing_is_said_in_one_line(engine: Engine, library: FakeTensorRT, cuda: FakeCuda, message: str) -> None:
    with pytest.raises(EngineError) as caught:
        TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=cuda)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refused", "tensorrt_rtx 1.7, built with 1.6, cannot load it (Version tag does not match.); build the engine again"),
        ("incomplete", "its inputs and outputs are not those of the manifest; build the engine again"),
    ],
)
def test_an_engine_that_does_not_load_is_named(engine: Engine, library: FakeTensorRT, fault: str, message: str) -> None:
    setattr(library, fault, True)
    with pytest.raises(EngineError) as caught:
        TensorRTBackend(engine, target="tensorrt-rtx", library=library, runtime=FakeCuda())
    assert str(caught.value).startswith(str(engine.path / "vision.onnx"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tensorrt", {}, r"was built for onnxruntime and tensorrt-rtx, not for tensorrt; build it with --target tensorrt$"),
        ("cuda", {}, r"^target must be one of onnxruntime, tensorrt-rtx, tensorrt, got 'cuda'$"),
        ("tensorrt-rtx", {"provider": "cpu"}, r"^provider and threads are settings of ONNX Runtime; leave them out with target tensorrt-rtx$"),
        ("tensorrt-rtx", {"threads": 2}, r"^provider and threads are settings of ONNX Runtime; leave them out with target tensorrt-rtx$"),
    ],
)
def test_a_session_that_asks_for_what_is_not_there_says_what_is(engine: Engine, target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Session(engine, target=target, **options)


def test_a_directory_for_onnx_runtime_alone_says_what_to_build(engine: Engine) -> None:
    message = r"was built for onnxruntime, not for tensorrt-rtx; build it with --target tensorrt-rtx$"
    with pytest.raises(EngineError, match=message):
        Session(dataclasses.replace(engine, targets={}), target="tensorrt-rtx")


def test_a_session_with_a_target_runs_its_engines(engine: Engine, library: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Session(engine).generate(PROMPT, [picture(6, 5)], max_new_tokens=2)
    modules = {"tensorrt_rtx": library, "cuda.bindings.runtime": FakeCuda()}
    monkeypatch.setattr("importlib.import_module", modules.__getitem__)
    session = Session(engine, target="tensorrt-rtx")
    assert isinstance(session.backend, TensorRTBackend)
    assert session.generate(PROMPT, [picture(6, 5)], max_new_tokens=2).token_ids == theirs.token_ids


@pytest.mark.parametrize("module", ["tensorrt_rtx", "cuda.bindings.runtime"])
def test_a_missing_package_is_named(engine: Engine, library: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("vflow.engines.backends.cuda.gpu_capability", lambda: "8.9")
    monkeypatch.setattr("importlib.import_module", missing)
    given = {"library": library} if module != "tensorrt_rtx" else {"runtime": FakeCuda()}
    with pytest.raises(EngineError, match=r"is missing; pip install 'vflow-export\[tensorrt-rtx\]'"):
        TensorRTBackend(engine, target="tensorrt-rtx", **given)


def test_without_cuda_python_and_without_a_gpu_the_gpu_is_what_is_missing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow.engines.backends.cuda.gpu_capability", lambda: None)
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(EngineError, match=r"^no NVIDIA GPU that CUDA can use; use ONNX Runtime$"):
        TensorRTBackend(engine, target="tensorrt-rtx")


def test_bfloat16_is_converted_on_the_way_in_and_out() -> None:
    """To the nearest and halves to even, as PyTorch does."""
    values = np.concatenate([np.random.default_rng(1).normal(size=1000), [0.0, -0.0, 1.00390625, 1.01171875, 1e30, 1e-30, np.inf]]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    bits = tensorrt_module._to_device(values, "bfloat16")
    np.testing.assert_array_equal(bits, expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(tensorrt_module._from_bfloat16(bits), expected.float().numpy())


def test_a_bf16_engine_is_not_for_onnx_runtime(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"is bf16, for which ONNX Runtime has no kernels; run it with its target, or build it in fp16$"):
        Session(dataclasses.replace(engine, precision="bf16"))
