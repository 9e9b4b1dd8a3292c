"""TensorRT and TensorRT for RTX: the engines of one target on the first GPU, behind the same session as ONNX Runtime.

Buffers are allocated once: the KV caches at their capacity, bound as input and as output; inputs and outputs at their largest. Prefill and decode are
one engine with a context for each profile; all contexts share one scratch buffer, since they run one after another.

A decoding step is some hundreds of small kernels of the same sizes each time, and starting them one by one takes longer than they do. So it is
recorded as a CUDA graph and launched whole. TensorRT for RTX does that by itself, once it has compiled kernels for these sizes.

**Not run anywhere yet**: written from the documentation of TensorRT, on a machine without a GPU. Tests run it on stand-ins for library and driver,
which shows what is called in which order, and what is said when something is missing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..graphs import RUNTIMES, BuiltEngine, Target, TensorInfo
from ..manifest import Engine
from .base import EmbeddedImage
from .cuda import Buffer, Device, Recording

__all__ = ["TensorRTBackend"]

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
DTYPES: dict[str, Any] = {
    "float16": np.float16, "bfloat16": np.uint16, "float": np.float32, "float32": np.float32, "int64": np.int64, "int32": np.int32,
}  # fmt: skip
PAST, PRESENT = "past_key_values.", "present."
DECODE = "decode"  # the profile whose runs are recorded


class TensorRTBackend:
    """The engines of one target, loaded for one request at a time.

    Args:
        engine: checked engine directory.
        target: ``tensorrt-rtx`` or ``tensorrt``.
        library, runtime: ``tensorrt_rtx`` (or ``tensorrt``) and ``cuda.bindings.runtime``, or what stands in for them in tests.

    Raises:
        EngineError: no engines for the target, no library, no GPU, one of another compute capability, or an engine that the library refuses. All but
            the last before anything large is loaded.
    """

    def __init__(self, engine: Engine, *, target: str, library: Any = None, runtime: Any = None) -> None:
        built = _built_for(engine, target)
        self.device = Device(runtime)
        _check_capability(built, self.device.compute_capability)
        self._trt = library or _import_library(target)
        self.dtype: type[np.float16] | type[np.float32] = np.float16 if engine.precision == "fp16" else np.float32
        self.slots = 1  # the profiles are built for one request
        self.records_itself = target == "tensorrt-rtx"
        self._logger, self._errors = _logger(self._trt)
        loader = self._trt.Runtime(self._logger)
        self._scratch: Buffer | None = None
        self._vision = _Loaded(self, loader, engine, built, built.vision)
        self._language = _Loaded(self, loader, engine, built, built.language)
        self._caches = {name: buffer for name, buffer in self._language.buffers.items() if name.startswith(PAST)}

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches."""
        return sum(self._language.largest(self._language.tensors[name]) for name in self._caches)

    def clear_caches(self, slot: int | None = None) -> None:
        """Overwrite the caches with zeros: masked positions must hold finite numbers, since 0 · NaN is NaN."""
        for buffer in self._caches.values():
            buffer.clear()

    def vision(self, pixel_values: NDArray[np.floating[Any]], entropy: NDArray[np.float32], budget: int) -> EmbeddedImage:
        """One image: float32 or T [rows, columns, G, patch_dim], float32 [rows, columns, G] and N; results as the vision graph's."""
        rows, columns = pixel_values.shape[:2]
        sizes = {"rows": rows, "columns": columns, "budget": budget}
        feed = {"pixel_values": pixel_values, "entropy": entropy, "budget_tokens": np.zeros(budget, np.int32)}
        return EmbeddedImage(**self._vision.run(sizes, feed, [name for name in EmbeddedImage._fields if name in self._vision.tensors]))

    def language(
        self,
        *,
        input_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        visual_embeds: NDArray[Any],
        visual_positions: NDArray[np.int64],
        importance: NDArray[np.float32],
        key_bias: NDArray[np.float32],
        budget: int,
        past_lengths: NDArray[np.int64],
        slot: int = 0,
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Append S tokens to the caches; arguments and results as the language graph's, for B = 1."""
        sizes = {"batch": 1, "length": input_ids.shape[1], "visual": visual_positions.size, "budget": budget}
        feed = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "visual_embeds": visual_embeds,
            "visual_positions": visual_positions,
            "importance": importance,
            "key_bias": key_bias,
            "budget_tokens": np.zeros(budget, np.int32),
            "past_lengths": past_lengths,
        }
        outputs = self._language.run(sizes, feed, ("logits", "last_hidden"))
        return outputs["logits"], outputs["last_hidden"]

    def scratch(self, size: int) -> Buffer:
        """Memory for a context's activations, shared by all; it grows to what the largest request needed."""
        if self._scratch is None or self._scratch.size < size:
            if self._scratch is not None:
                self.device.synchronize()  # a context may still be using it
                self._scratch.free()
            self._scratch = Buffer(self.device, size)
        return self._scratch

    @property
    def scratch_address(self) -> int:
        """Where that memory lies; 0 before any context has needed it."""
        return self._scratch.address if self._scratch is not None else 0

    def first_error(self) -> str:
        """What the library said first since it was last asked."""
        line = self._errors[0].strip().splitlines()[0] if self._errors else "its log says nothing"
        self._errors.clear()
        return line


class _Loaded:
    """One engine, a context for each of its profiles, and a buffer for each of its tensors."""

    def __init__(self, backend: TensorRTBackend, loader: Any, engine: Engine, target: Target, built: BuiltEngine) -> None:
        self.backend, self.built = backend, built
        self.path = engine.path / built.file
        self.tensors = {tensor.name: tensor for tensor in (*built.inputs, *built.outputs)}
        self._symbols = _largest_sizes(engine, built)
        self._engine = loader.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            library = f"{backend._trt.__name__} {backend._trt.__version__}, built with {target.versions.get(backend._trt.__name__, 'another')}"
            raise EngineError(f"{self.path}: {library}, cannot load it ({backend.first_error()}); build the engine again")
        self._check_interface()
        self._contexts: dict[int, Any] = {}
        self._recordings: dict[tuple[int, ...], tuple[Recording, dict[str, tuple[int, ...]]]] = {}  # with the shapes of what comes out
        self.buffers: dict[str, Buffer] = {}
        for name, tensor in self.tensors.items():  # inputs come first, and a cache's output is its input
            shared = name.replace(PRESENT, PAST, 1) if name.startswith(PRESENT) else None
            self.buffers[name] = self.buffers[shared] if shared else Buffer(backend.device, self.largest(tensor))

    def largest(self, tensor: TensorInfo) -> int:
        """Most bytes that a tensor can have."""
        sizes = [size if isinstance(size, int) else self._symbols[size] for size in tensor.shape]
        return math.prod(sizes) * int(np.dtype(DTYPES[tensor.dtype]).itemsize)

    def run(self, sizes: Mapping[str, int], feed: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run once, in the smallest profile that admits these sizes.

        Raises:
            EngineError: no profile does, or the library failed.
        """
        place = self.built.profile_for(**sizes)
        if place is None:
            asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise EngineError(f"{self.path.name} has no profile for {asked}; ask for less, or build with larger limits")
        kept = []  # arrays must outlive the copies
        for tensor in self.built.inputs:
            if not tensor.name.startswith(PAST):
                kept.append(_to_device(feed[tensor.name], tensor.dtype))
                self.buffers[tensor.name].write(kept[-1])
        recorded = self._recordings.get(self._recording_key(place, sizes))
        if recorded is not None:
            recorded[0].launch()
            return self._read(recorded[1])
        context = self._context(place)
        for tensor in self.built.inputs:
            self._set_shape(context, tensor, sizes)
        scratch = self.backend.scratch(context.update_device_memory_size_for_shapes())
        context.set_device_memory(scratch.address, scratch.size)
        self._enqueue(context)
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in wanted}
        outputs = self._read(shapes)
        if self.built.profiles[place].name == DECODE and not self.backend.records_itself:  # it must have run once, and to its end
            self._recordings[self._recording_key(place, sizes)] = Recording(self.backend.device, lambda: self._enqueue(context)), shapes
        return outputs

    def _recording_key(self, place: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """What a recording holds for: also where the scratch buffer lies, which moves when it grows."""
        return place, self.backend.scratch_address, *sizes.values()

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(int(self.backend.device.stream)):
            raise EngineError(f"{self.path.name} failed ({self.backend.first_error()}); try a smaller request")

    def _read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
        """Outputs of these shapes. Synchronizes."""
        arrays = {name: self.buffers[name].read(shape, DTYPES[self.tensors[name].dtype]) for name, shape in shapes.items()}
        return {name: _from_bfloat16(array) if self.tensors[name].dtype == "bfloat16" else array for name, array in arrays.items()}

    def _context(self, place: int) -> Any:
        """The context of a profile, made when it is first needed; its tensors' addresses never change."""
        if place not in self._contexts:
            trt = self.backend._trt
            how = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            if self.backend.records_itself and self.built.profiles[place].name == DECODE:
                settings = self._engine.create_runtime_config()
                settings.set_execution_context_allocation_strategy(how)
                settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                how = settings
            context = self._engine.create_execution_context(how)
            if context is None or not context.set_optimization_profile_async(place, int(self.backend.device.stream)):
                raise EngineError(f"{self.path.name}: no context for profile {self.built.profiles[place].name} ({self.backend.first_error()})")
            for name, buffer in self.buffers.items():
                context.set_tensor_address(name, buffer.address)
            self._contexts[place] = context
        return self._contexts[place]

    def _set_shape(self, context: Any, tensor: TensorInfo, sizes: Mapping[str, int]) -> None:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
        if not context.set_input_shape(tensor.name, shape):
            raise EngineError(f"{self.path.name} refuses {tensor.name} of shape {list(shape)} ({self.backend.first_error()})")

    def _check_interface(self) -> None:
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        if sorted(names) != sorted(self.tensors):
            raise EngineError(f"{self.path}: its inputs and outputs are not those of the manifest; build the engine again")


def _to_device(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """As a tensor of this type lies in memory."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, DTYPES[dtype])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, halves to even


def _from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _largest_sizes(engine: Engine, built: BuiltEngine) -> dict[str, int]:
    """The most that each free dimension can be, over all profiles; the survivors of an image are not of a profile."""
    largest = {"survivors": engine.limits.max_visual_tokens}
    for profile in built.profiles:
        for name, (_, _, most) in profile.sizes.items():
            largest[name] = max(most, largest.get(name, 0))
    return largest


def _built_for(engine: Engine, target: str) -> Target:
    if target not in engine.targets:
        held = " and ".join(name for name in RUNTIMES if name == "onnxruntime" or name in engine.targets)
        raise EngineError(f"{engine.path} was built for {held}, not for {target}; build it with --target {target}")
    return engine.targets[target]


def _import_library(target: str) -> Any:
    try:
        return importlib.import_module(MODULES[target])
    except ImportError:
        raise EngineError(f"{MODULES[target]} is missing; pip install 'vflow-export[{target}]'") from None


def _check_capability(target: Target, here: str) -> None:
    if target.compute_capabilities and here not in target.compute_capabilities:
        built = ", ".join(target.compute_capabilities)
        raise EngineError(f"the engines are for GPUs of compute capability {built}, this one has {here}; build with --compute-capability {here}")


def _logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger for the library, and the errors that it has been given."""
    errors: list[str] = []

    class Errors(trt.ILogger):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                errors.append(message)

    return Errors(), errors
