"""What a backend needs of the CUDA runtime, through cuda-python: the device's capability, buffers, copies, one stream."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError

__all__ = ["Buffer", "Device", "Recording", "gpu_capability"]

LEAST_BYTES = 256  # of a buffer: tensors without elements need an address as well
CUDA_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
TO_DEVICE, TO_HOST = "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"


def gpu_capability() -> str | None:
    """Compute capability of the first GPU here, such as 8.9; None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return None
    device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in zip(numbers, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"{numbers[0].value}.{numbers[1].value}"


class Device:
    """The first GPU, and a stream on it.

    Args:
        runtime: ``cuda.bindings.runtime``, or what stands in for it in tests.

    Raises:
        EngineError: cuda-python, the driver or a GPU is missing, or the driver is too old.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._runtime = runtime or _import_runtime()
        error, count = self._runtime.cudaGetDeviceCount()
        if int(error) or not count:
            raise EngineError(f"no NVIDIA GPU that CUDA can use ({error.name}); {self._driver_advice()}")
        self.call("cudaSetDevice", 0)
        self.stream: Any = self.call("cudaStreamCreate")

    @property
    def compute_capability(self) -> str:
        """Such as 8.9."""
        kinds = self._runtime.cudaDeviceAttr
        names = ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
        return ".".join(str(self.call("cudaDeviceGetAttribute", getattr(kinds, name), 0)) for name in names)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; its result, where it has one.

        Raises:
            EngineError: it failed, out of memory for instance.
        """
        error, *results = getattr(self._runtime, name)(*arguments)
        if int(error):
            raise EngineError(f"CUDA: {name} failed ({error.name}); free memory on the GPU, or use ONNX Runtime")
        return results[0] if results else None

    def synchronize(self) -> None:
        """Wait for all that was put on the stream."""
        self.call("cudaStreamSynchronize", self.stream)

    def copy_kind(self, name: str) -> Any:
        return getattr(self._runtime.cudaMemcpyKind, name)

    def capture_mode(self) -> Any:
        """What this thread must not do while it records; others may."""
        return self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def _driver_advice(self) -> str:
        (error, driver), (_, wanted) = self._runtime.cudaDriverGetVersion(), self._runtime.cudaRuntimeGetVersion()
        if int(error) or not driver:
            return "install its driver, or use ONNX Runtime"
        if driver // 1000 < wanted // 1000:
            return f"its driver is for CUDA {_version(driver)} and CUDA {_version(wanted)} is needed: update the driver, or use ONNX Runtime"
        return "use ONNX Runtime"


class Buffer:
    """Device memory of one size, allocated once."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, max(size, LEAST_BYTES)
        self.address = int(device.call("cudaMalloc", self.size))
        self.clear()

    def clear(self) -> None:
        """Overwrite with zeros."""
        self.device.call("cudaMemsetAsync", self.address, 0, self.size, self.device.stream)

    def write(self, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the start; it must stay alive until the stream is synchronized."""
        if array.nbytes > self.size:
            raise EngineError(f"{array.nbytes} bytes do not fit into a buffer of {self.size}")
        if array.nbytes:
            self._copy(self.address, array.ctypes.data, array.nbytes, TO_DEVICE)

    def read(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A new array with what lies at the start. Synchronizes."""
        array: NDArray[Any] = np.empty(shape, dtype)
        if array.nbytes:
            self._copy(array.ctypes.data, self.address, array.nbytes, TO_HOST)
        self.device.synchronize()
        return array

    def free(self) -> None:
        """Give the memory back; the buffer must not be used again."""
        self.device.call("cudaFree", self.address)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self.device.call("cudaMemcpyAsync", target, source, size, self.device.copy_kind(kind), self.device.stream)


class Recording:
    """What some work puts on the stream, recorded once and launched by one call (a CUDA graph): the same kernels on the same addresses.

    Args:
        work: is called once, and nothing of it is carried out.

    Raises:
        EngineError: it cannot be recorded; or what ``work`` raises.
    """

    def __init__(self, device: Device, work: Callable[[], None]) -> None:
        self._device = device
        device.call("cudaStreamBeginCapture", device.stream, device.capture_mode())
        try:
            work()
        except BaseException:
            with suppress(EngineError):  # the stream must leave the mode; what went wrong is known
                device.call("cudaStreamEndCapture", device.stream)
            raise
        graph = device.call("cudaStreamEndCapture", device.stream)
        self._executable = device.call("cudaGraphInstantiate", graph, 0)
        device.call("cudaGraphDestroy", graph)

    def launch(self) -> None:
        """Put it on the stream."""
        self._device.call("cudaGraphLaunch", self._executable, self._device.stream)


def _import_runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        if gpu_capability() is None:
            raise EngineError("no NVIDIA GPU that CUDA can use; use ONNX Runtime") from None
        raise EngineError("cuda-python is missing; pip install 'vflow-export[tensorrt-rtx]'") from None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
