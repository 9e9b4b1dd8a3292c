"""ONNX Runtime: both graphs, and KV caches that are updated where they lie.

The caches are allocated once, for all slots, at the capacity of their segment. The rows of the slots that a call is for are bound both as input
and as output of ``language.onnx``, so that they are written where they lie and nothing copies them. No other module knows that they exist.

The vision graph and the language graph are two sessions of the runtime, which run side by side; of the language graph's bindings, one call at a time.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..manifest import Engine, Graph
from .base import EmbeddedImage

__all__ = ["DISABLED_OPTIMIZERS", "MINIMUM_VERSION", "OnnxRuntimeBackend", "OnnxRuntimeVision", "check_version", "session_options"]

# Early kernels of this operator align causal attention at the top left when the cache is longer than the query: they would answer, and wrongly
# (onnxruntime pull request 28958). 1.31 is the oldest that was tried on a GPU, and the newest that there is for one.
MINIMUM_VERSION = (1, 31)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Its blocked layout is for convolutions, which our graphs have none of; and in 1.32.0 it dies of a segmentation fault where
# MatmulTransposeFusion has moved a Transpose behind a Cast (Transpose, Cast, MatMul by a constant).
DISABLED_OPTIMIZERS = ["NchwcTransformer"]
# Weights in fewer bits are fused with the products that they enter, which by default round the activations to 8 bits as well: logits of the small
# model were 0.17 off. Level 1 multiplies in float32.
MULTIPLY_EXACTLY = ("session.qdq_matmulnbits_accuracy_level", "1")
LOG_SEVERITY = 3  # errors only: fp16 graphs load with warnings about constants that the CPU cannot fold, of no use to anybody
CACHE_INPUT, BIAS_INPUT = "past_key_values.{layer}.{kind}", "past_key_values.bias.{segment}"
CACHE_KINDS = ("key", "value")
VISION_INPUTS = frozenset({"pixel_values", "entropy", "budget_tokens"})
LANGUAGE_INPUTS = frozenset(
    {"input_ids", "position_ids", "visual_embeds", "visual_positions", "importance", "budget_tokens", "key_bias", "past_lengths"}
)  # beside the caches


class OnnxRuntimeVision:
    """The vision graph of one engine.

    Args:
        engine: checked engine directory.
        provider: ``cpu`` or ``cuda``; None takes CUDA where the installed runtime has it.
        threads: of each operator; None leaves it to the runtime.
        standard: load the graphs of standard operators on the CPU as well, where ``cpu_file`` is faster; for comparison.

    Raises:
        EngineError: no runtime, one that is too old or lacks the provider, or a graph that it cannot load.
    """

    def __init__(self, engine: Engine, *, provider: str | None = None, threads: int | None = None, standard: bool = False, spin: bool = True) -> None:
        if engine.precision == "bf16":
            raise EngineError(f"{engine.path} is bf16, for which ONNX Runtime has no kernels; run it with its target, or build it in fp16")
        runtime = _import_runtime()
        self.provider = _choose_provider(provider, runtime.get_available_providers())
        if self.provider == "cuda":
            _find_cuda(runtime)
        self.dtype: type[np.float16] | type[np.float32] = np.float16 if engine.precision == "fp16" else np.float32
        self._runtime = runtime
        self._demanded = provider is not None
        self._standard = standard
        self._failures = _failures()
        self._vision_inputs = frozenset(engine.vision.input_names)
        self._vision_outputs = [name for name in EmbeddedImage._fields if name in {output.name for output in engine.vision.outputs}]
        _check_inputs(engine.vision, VISION_INPUTS)
        self._options = session_options(runtime, threads)
        if not spin:
            self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._vision = self._load(engine, engine.vision)

    def vision(self, pixel_values: NDArray[np.floating[Any]], entropy: NDArray[np.float32], budget: int) -> EmbeddedImage:
        """Run the vision graph on one image.

        Args:
            pixel_values: float32 or T [rows, columns, G, patch_dim].
            entropy: float32 [rows, columns, G], bits; anything where the graph has no such input.
            budget: N, original visual tokens from which the stages' ratios are counted.

        Raises:
            EngineError: the runtime failed, out of memory for instance.
        """
        feed = {"pixel_values": pixel_values.astype(self.dtype, copy=False), "entropy": entropy, "budget_tokens": np.zeros(budget, np.int32)}
        try:
            outputs = self._vision.run(self._vision_outputs, {name: value for name, value in feed.items() if name in self._vision_inputs})
        except self._failures as error:
            raise EngineError(f"vision graph failed on an image of {budget} visual tokens: {_first_line(error)}; try a smaller image") from error
        return EmbeddedImage(**dict(zip(self._vision_outputs, outputs, strict=True)))

    def _load(self, engine: Engine, graph: Graph) -> Any:
        lowered = graph.cpu_file if self.provider == "cpu" and not self._standard else None
        path = engine.path / (lowered or graph.file)
        name = PROVIDERS[self.provider]
        providers = [name] if self.provider == "cpu" else [name, PROVIDERS["cpu"]]
        try:
            session = self._runtime.InferenceSession(str(path), self._options, providers=providers, disabled_optimizers=DISABLED_OPTIMIZERS)
        except self._failures as error:
            raise EngineError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)}); build the engine again") from error
        if name not in session.get_providers():
            if self._demanded:
                raise EngineError(f"ONNX Runtime cannot start provider {self.provider!r} on this machine (its log says why); use provider 'cpu'")
            self.provider = "cpu"
        return session


class OnnxRuntimeBackend(OnnxRuntimeVision):
    """Both graphs of one engine, and KV caches for ``slots`` requests; other arguments and errors as :class:`OnnxRuntimeVision`."""

    def __init__(self, engine: Engine, *, slots: int = 1, provider: str | None = None, threads: int | None = None, standard: bool = False) -> None:
        if slots < 1:
            raise EngineError(f"slots must be at least 1, got {slots}")
        sizes = _cache_sizes(engine)
        _check_inputs(engine.language, LANGUAGE_INPUTS | sizes.keys())
        # With several slots the two graphs run side by side, and a graph's idle threads would spin on the cores that the other one needs.
        super().__init__(engine, provider=provider, threads=threads, standard=standard, spin=slots == 1)
        self.slots = slots
        self._language_inputs = frozenset(engine.language.input_names)
        self._language = self._load(engine, engine.language)
        self._caches = {
            name: self._runtime.OrtValue.ortvalue_from_numpy(np.zeros((slots, *size), self.dtype), self.provider, 0) for name, size in sizes.items()
        }
        self._logits = np.zeros((slots, engine.shape.decoder.vocab_size), np.float32)
        self._last_hidden = np.zeros((slots, engine.shape.decoder.hidden_size), self.dtype)
        self._bindings: dict[tuple[int, int], Any] = {}  # by first slot and number of slots, made when first needed

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches of all slots, read off the buffers themselves."""
        return sum(int(value.tensor_size_in_bytes()) for value in self._caches.values())

    def cache_array(self, layer: int, kind: str) -> NDArray[Any]:
        """A copy of one layer's ``key`` or ``value`` cache, T [slots, kv_heads, capacity, head_dim]; for tests and reports."""
        array: NDArray[Any] = self._caches[CACHE_INPUT.format(layer=layer, kind=kind)].numpy().copy()
        return array

    def cache_pointers(self) -> dict[str, int]:
        """Address of each cache by input name; it never changes."""
        return {name: int(value.data_ptr()) for name, value in self._caches.items()}

    def clear_caches(self, slot: int | None = None) -> None:
        """Overwrite the caches of one slot, or of all, with zeros: masked positions must hold finite numbers, since 0 · NaN is NaN."""
        for value in self._caches.values():
            contents = value.numpy().copy()  # an OrtValue is written whole, and this is done where logits have overflowed only
            contents[slice(None) if slot is None else slot] = 0
            value.update_inplace(contents)

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
        """Run the language graph on tokens that follow those in the caches of B slots, and add them to the caches.

        Args:
            input_ids: int64 [B, S]; with B > 1, S is 1 and there are no visual tokens.
            position_ids: int64 [3, B, S].
            visual_embeds: T [V, hidden_size].
            visual_positions: int64 [V].
            importance, key_bias: float32 [V].
            budget: N over all images, 0 without any.
            past_lengths: int64 [B, segments].
            slot: of the first row.

        Returns:
            ``logits`` float32 [B, vocab_size] and ``last_hidden`` T [B, hidden_size] of the last token of each row, both copies.

        Raises:
            EngineError: the runtime failed, out of memory for instance.
        """
        feed = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "visual_embeds": visual_embeds.astype(self.dtype, copy=False),
            "visual_positions": visual_positions,
            "importance": importance,
            "key_bias": key_bias,
            "budget_tokens": np.zeros(budget, np.int32),
            "past_lengths": past_lengths,
        }
        feed = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in self._language_inputs}
        rows = slice(slot, slot + input_ids.shape[0])
        binding = self._binding(rows.start, rows.stop)
        for name, value in feed.items():  # `feed` must outlive the run: the binding holds addresses
            binding.bind_cpu_input(name, value)
        try:
            self._language.run_with_iobinding(binding)
        except self._failures as error:
            raise EngineError(f"language graph failed on {input_ids.shape[1]} tokens: {_first_line(error)}; try a shorter request") from error
        return self._logits[rows].copy(), self._last_hidden[rows].copy()

    def _binding(self, start: int, stop: int) -> Any:
        """What stays between calls for these slots: their rows of the caches, on both sides, and of the buffers of the two results."""
        if (start, stop) not in self._bindings:
            binding = self._language.io_binding()
            for name, value in self._caches.items():
                shape = [stop - start, *value.shape()[1:]]
                address = value.data_ptr() + start * (value.tensor_size_in_bytes() // self.slots)
                binding.bind_input(name, self.provider, 0, self.dtype, shape, address)
                binding.bind_output(name.replace("past_key_values", "present"), self.provider, 0, self.dtype, shape, address)
            for name, buffer in (("logits", self._logits[start:stop]), ("last_hidden", self._last_hidden[start:stop])):
                binding.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            self._bindings[start, stop] = binding
        return self._bindings[start, stop]


def check_version(version: str) -> None:
    """Refuse an ONNX Runtime that might compute something else.

    Raises:
        EngineError: older than ``MINIMUM_VERSION``.
    """
    least = ".".join(map(str, MINIMUM_VERSION))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM_VERSION:
        raise EngineError(
            f"onnxruntime {version} is too old: it may align causal attention differently and answer wrongly; pip install 'onnxruntime>={least}'"
        )


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        least = ".".join(map(str, MINIMUM_VERSION))
        raise EngineError(f"onnxruntime is missing; pip install 'onnxruntime>={least}' (or onnxruntime-gpu for CUDA)") from None
    check_version(onnxruntime.__version__)
    return onnxruntime


def _find_cuda(runtime: Any) -> None:
    """Load CUDA and cuDNN from NVIDIA's Python packages, where they are installed; otherwise the system's are found as ever."""
    if hasattr(runtime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            runtime.preload_dlls()


def _failures() -> tuple[type[BaseException], ...]:
    """What ONNX Runtime raises; its classes have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException")
    return (RuntimeError, *(getattr(state, name) for name in names))


def _choose_provider(provider: str | None, available: list[str]) -> str:
    if provider is None:
        return "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if provider not in PROVIDERS:
        raise EngineError(f"provider must be one of {', '.join(PROVIDERS)}, got {provider!r}")
    if PROVIDERS[provider] not in available:
        raise EngineError(f"the installed onnxruntime has no provider {provider!r}; pip install onnxruntime-gpu, or use provider 'cpu'")
    return provider


def session_options(runtime: Any, threads: int | None = None) -> Any:
    """Options with which graphs are loaded."""
    options = runtime.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.add_session_config_entry(*MULTIPLY_EXACTLY)
    if threads is not None:
        if threads < 1:
            raise EngineError(f"threads must be at least 1, got {threads}")
        options.intra_op_num_threads = threads
    return options


def _cache_sizes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Every cache by input name, with its sizes for one slot."""
    decoder, sizes = engine.shape.decoder, dict[str, tuple[int, ...]]()
    for number, segment in enumerate(engine.segments):
        for layer in range(segment.first_layer, segment.end_layer):
            for kind in CACHE_KINDS:
                sizes[CACHE_INPUT.format(layer=layer, kind=kind)] = decoder.kv_heads, segment.capacity, decoder.head_dim
        if engine.schedule.proportional_attention:
            sizes[BIAS_INPUT.format(segment=number)] = 1, segment.capacity, 1
    return sizes


def _check_inputs(graph: Graph, known: frozenset[str]) -> None:
    unknown = sorted(set(graph.input_names) - known)
    if unknown:
        raise EngineError(f"{graph.file} wants input {unknown[0]!r}, which this vflow-export does not know; use the version that built the engine")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
