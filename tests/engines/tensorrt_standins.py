"""Stand-ins for the CUDA runtime and for TensorRT: memory is the host's, and ONNX Runtime executes what an engine would."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray


class Status(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815


class FakeCuda:
    """``cuda.bindings.runtime`` for one GPU."""

    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, *, capability: str = "8.9", devices: int = 1, driver: int = 13000, room: int = 1 << 30) -> None:
        self.capability, self.devices, self.driver, self.room = capability, devices, driver, room
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.recording: list[Callable[[], Any]] | None = None  # what a stream that is recorded was given
        self.launches = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return lambda *arguments: (Status.cudaSuccess,)

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        if self.driver < 13000:
            return Status.cudaErrorInsufficientDriver, None
        return (Status.cudaSuccess, self.devices) if self.devices else (Status.cudaErrorNoDevice, 0)

    def cudaDriverGetVersion(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, 13050

    def cudaStreamCreate(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, 77

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:  # noqa: N802
        return Status.cudaSuccess, int(self.capability.split(".")[attribute])

    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        if size > self.room:
            return Status.cudaErrorMemoryAllocation, None
        self.calls.append("cudaMalloc")
        block = ctypes.create_string_buffer(b"\xff" * size, size)
        self.memory[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        self.calls.append("cudaFree")
        del self.memory[address]
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:  # noqa: N802
        assert stream == 77 and mode == 1 and self.recording is None
        self.recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        graph, self.recording = self.recording, None
        return Status.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802
        return Status.cudaSuccess, list(graph)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> Any:  # noqa: N802
        assert stream == 77
        self.launches += 1
        for work in graph:
            work()
        return (Status.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> Any:  # noqa: N802
        ctypes.memset(address, value, size)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        assert self.recording is None  # CUDA refuses it then
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Any:  # noqa: N802
        assert self.recording is None  # nobody means to record a copy
        ctypes.memmove(target, source, size)
        return (Status.cudaSuccess,)


class FakeTensorRT:
    """``tensorrt_rtx`` (or ``tensorrt``) whose engines are ONNX files that ONNX Runtime runs, on the memory that their contexts are given.

    ``cuda`` is given where runs may be recorded.
    """

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    __name__ = "tensorrt_rtx"
    __version__ = "1.7"

    class ILogger:
        ERROR = 1

    def __init__(self, files: Sequence[Path], cuda: FakeCuda | None = None) -> None:
        self.cuda = cuda
        self.files = {file.read_bytes(): file for file in files}
        self.contexts: list[FakeContext] = []
        self.refused = self.failing = self.incomplete = False

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def deserialize(plan: bytes) -> FakeEngine | None:
            if self.refused:
                logger.log(1, "Version tag does not match.\nmore")
                return None
            return FakeEngine(self, logger, self.files[plan])

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class FakeEngine:
    def __init__(self, library: FakeTensorRT, logger: Any, file: Path) -> None:
        self.library, self.logger = library, logger
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of caches that are not updated in place, for each layer
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = {tensor.name: tensor.type for tensor in self.session.get_inputs()}
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]
        self.names = [*self.inputs, *self.outputs][: -1 if library.incomplete else None]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, how: str | FakeRuntimeConfig) -> FakeContext:
        assert (how if isinstance(how, str) else how.strategy) == "user managed"
        self.library.contexts.append(FakeContext(self))
        self.library.contexts[-1].records_itself = not isinstance(how, str) and how.cuda_graph_strategy == "whole graph"
        return self.library.contexts[-1]


class FakeRuntimeConfig:
    strategy = cuda_graph_strategy = ""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile, self.scratch, self.runs, self.records_itself = -1, (0, 0), 0, False

    def set_optimization_profile_async(self, place: int, stream: int) -> bool:
        self.profile = place
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * self.shapes["input_ids"][1] if "input_ids" in self.shapes else 5000

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77 and self.scratch[1] >= self.update_device_memory_size_for_shapes()
        cuda = self.engine.library.cuda
        if cuda is not None and cuda.recording is not None:
            assert self.runs  # the library must have run once with these shapes
            scratch, shapes = self.scratch, dict(self.shapes)
            cuda.recording.append(lambda: self._replay(cuda, scratch, shapes))
            return True
        return self._run()

    def _replay(self, cuda: FakeCuda, scratch: tuple[int, int], shapes: dict[str, tuple[int, ...]]) -> bool:
        assert scratch[0] in cuda.memory, "recorded with scratch memory that has been given back"
        self.shapes = dict(shapes)
        return self._run()

    def _run(self) -> bool:
        self.runs += 1
        if self.engine.library.failing:
            self.engine.logger.log(1, "Cuda Runtime (an illegal memory access)")
            return False
        feed = {name: self._array(name, kind) for name, kind in self.engine.inputs.items()}
        for name, array in zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, feed), strict=True):
            ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)
            self.shapes[name] = array.shape
        return True

    def _array(self, name: str, kind: str) -> NDArray[Any]:
        dtype = np.dtype({"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int64)": "i8", "tensor(int32)": "i4"}[kind])
        size = int(np.prod(self.shapes[name])) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(self.shapes[name])
