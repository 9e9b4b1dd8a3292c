"""What goes into the two graphs and comes out, and the engines that were built from them for one target.

A manifest holds both (docs/architecture.md, "The engine directory"). Nothing here touches a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import EngineError
from .fields import count, field, number

__all__ = ["GRAPHS", "RUNTIMES", "TARGETS", "BuiltEngine", "Graph", "Profile", "Target", "TensorInfo", "parse_graph", "parse_targets"]

GRAPHS = ("vision", "language")
TARGETS = ("tensorrt-rtx", "tensorrt")  # for which engines are built; ONNX Runtime takes the graphs as they are
RUNTIMES = ("onnxruntime", *TARGETS)


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output; a dimension is a size or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the engine, and what goes in and comes out.

    ``cpu_file`` is the same graph in operators that ONNX Runtime's CPU provider computes faster; None in engines built without.
    """

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    cpu_file: str | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in graph order."""
        return tuple(tensor.name for tensor in self.inputs)


@dataclass(frozen=True)
class Profile:
    """Sizes for which an engine was built: (least, usual, most) by the name of a free dimension.

    Raises:
        EngineError: sizes that are not in ascending order or below 0.
    """

    name: str
    sizes: Mapping[str, tuple[int, int, int]]

    def __post_init__(self) -> None:
        for name, (least, usual, most) in self.sizes.items():
            if not 0 <= least <= usual <= most:
                raise EngineError(f"profile {self.name}: sizes of {name} must ascend from 0 on, got {least}, {usual}, {most}")

    @property
    def volume(self) -> int:
        """Product of the largest sizes."""
        return math.prod(most for _, _, most in self.sizes.values())

    def admits(self, **sizes: int) -> bool:
        """Whether these sizes are within; dimensions that the profile does not name are not looked at."""
        return all(self.sizes[name][0] <= size <= self.sizes[name][2] for name, size in sizes.items() if name in self.sizes)

    def shapes(self, tensor: TensorInfo) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The tensor's least, usual and largest shape."""
        least, usual, most = (tuple(size if isinstance(size, int) else self.sizes[size][which] for size in tensor.shape) for which in range(3))
        return least, usual, most


@dataclass(frozen=True)
class BuiltEngine:
    """One engine: its file, its interface (KV capacities are sizes here), and what building it took.

    ``log`` and ``layers`` name the build log and the list of its network's layers. ``peak_memory_bytes`` is None where it cannot be measured.
    """

    file: str
    log: str
    layers: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: tuple[Profile, ...]
    engine_bytes: int
    build_seconds: float
    peak_memory_bytes: int | None

    def profile_for(self, **sizes: int) -> int | None:
        """Number of the smallest profile that admits these sizes, None where none does: a decoding step fits into prefill as well."""
        admitting = [place for place, profile in enumerate(self.profiles) if profile.admits(**sizes)]
        return min(admitting, key=lambda place: self.profiles[place].volume, default=None)


@dataclass(frozen=True)
class Target:
    """Engines of both graphs for one runtime; without ``compute_capabilities`` they are as portable as the library makes them."""

    name: str
    versions: Mapping[str, str]
    compute_capabilities: tuple[str, ...]
    vision: BuiltEngine
    language: BuiltEngine


def parse_graph(graphs: Mapping[str, Any], name: str) -> Graph:
    """One entry of the manifest's ``graphs``.

    Raises:
        EngineError: a field is missing or of the wrong type.
    """
    where = f"graphs.{name}."
    values = field(graphs, name, Mapping, "graphs.")
    cpu_file = field(values, "cpu_file", str, where) if "cpu_file" in values else None
    return Graph(field(values, "file", str, where), _tensors(values, "inputs", where), _tensors(values, "outputs", where), cpu_file)


def parse_targets(values: Mapping[str, Any]) -> dict[str, Target]:
    """The manifest's ``targets``, which engines without any do not have.

    Raises:
        EngineError: a field is missing, of the wrong type or out of range.
    """
    targets = {}
    for name in values:
        where = f"targets.{name}."
        entry = field(values, name, Mapping, "targets.")
        versions = field(entry, "versions", Mapping, where)
        capabilities = field(entry, "compute_capabilities", list, where)
        if not all(isinstance(text, str) for text in (*versions.values(), *capabilities)):
            raise EngineError(f"fields {where}versions and compute_capabilities must hold strings")
        vision, language = (_built(field(entry, graph, Mapping, where), f"{where}{graph}.") for graph in GRAPHS)
        targets[name] = Target(name, dict(versions), tuple(capabilities), vision, language)
    return targets


def _built(values: Mapping[str, Any], where: str) -> BuiltEngine:
    files = {key: field(values, key, str, where) for key in ("file", "log", "layers")}
    profiles = tuple(_profile(entry, f"{where}profiles[].") for entry in field(values, "profiles", list, where))
    memory = values.get("peak_memory_bytes")
    return BuiltEngine(
        **files,
        inputs=_tensors(values, "inputs", where),
        outputs=_tensors(values, "outputs", where),
        profiles=profiles,
        engine_bytes=count(values, "engine_bytes", where),
        build_seconds=number(values, "build_seconds", where),
        peak_memory_bytes=None if memory is None else count(values, "peak_memory_bytes", where),
    )


def _profile(values: Any, where: str) -> Profile:
    if not isinstance(values, Mapping):
        raise EngineError(f"field {where.rstrip('.')} must be an object, got {values!r:.60}")
    sizes = field(values, "sizes", Mapping, where)
    for name, numbers in sizes.items():
        if not (isinstance(numbers, list) and len(numbers) == 3 and all(type(size) is int for size in numbers)):
            raise EngineError(f"field {where}sizes.{name} must be three whole numbers, got {numbers!r:.60}")
    return Profile(field(values, "name", str, where), {name: (least, usual, most) for name, (least, usual, most) in sizes.items()})


def _tensors(values: Mapping[str, Any], side: str, where: str) -> tuple[TensorInfo, ...]:
    return tuple(_tensor(entry, f"{where}{side}") for entry in field(values, side, list, where))


def _tensor(values: Any, where: str) -> TensorInfo:
    if not isinstance(values, Mapping):
        raise EngineError(f"field {where}[] must be an object, got {values!r:.60}")
    shape = field(values, "shape", list, f"{where}[].")
    if not all(isinstance(size, (int, str)) and not isinstance(size, bool) for size in shape):
        raise EngineError(f"field {where}[].shape must hold sizes and names, got {shape!r:.60}")
    return TensorInfo(field(values, "name", str, f"{where}[]."), field(values, "dtype", str, f"{where}[]."), tuple(shape))
