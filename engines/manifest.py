"""``manifest.json`` as typed data: what a runtime needs to know about an engine, checked field by field.

The keys are those of docs/architecture.md, "The engine directory". Nothing here touches a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar

from ..exporter.schedule import Schedule, ScheduleError, keep_count
from ..exporter.shape import DecoderShape, ModelShape, TowerShape
from .errors import EngineError
from .fields import choice, count, field, positive
from .graphs import Graph, Target, TensorInfo, parse_graph, parse_targets
from .preprocess import ImageProcessorConfig

__all__ = [
    "FAMILIES",
    "MANIFEST_FORMAT",
    "PRECISIONS",
    "WEIGHTS",
    "Engine",
    "FileEntry",
    "Graph",
    "Limits",
    "Segment",
    "TensorInfo",
    "TokenIds",
    "kv_segments",
    "parse_manifest",
]

MANIFEST_FORMAT = 1
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PRECISIONS = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of a number
WEIGHTS = ("full", "int8", "int4", "fp8")
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SHA256_DIGITS = 64

Precision = Literal["fp32", "fp16", "bf16"]
Sizes = TypeVar("Sizes", TowerShape, DecoderShape)


@dataclass(frozen=True)
class Limits:
    """What every request may hold: original visual tokens of all its images, and text tokens of prompt and answer. One with fewer visual tokens
    has more room for text."""

    max_visual_tokens: int
    max_text_tokens: int


@dataclass(frozen=True)
class Segment:
    """A run of decoder layers [first_layer, end_layer) between two stages; its KV caches have one length.

    ``keep`` of 1024 visual tokens are alive in it. Its caches hold ``capacity`` tokens, of which ``visual_capacity`` are for visual ones.
    """

    first_layer: int
    end_layer: int
    keep: int
    visual_capacity: int
    capacity: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.end_layer - self.first_layer


@dataclass(frozen=True)
class TokenIds:
    """Token ids that structure a prompt, and those that end an answer."""

    image: int
    vision_start: int
    vision_end: int
    stop: tuple[int, ...]


@dataclass(frozen=True)
class FileEntry:
    """Checksum (lower-case hexadecimal) and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Engine:
    """An engine directory whose manifest has been checked; ``path`` is its folder.

    ``precision`` is that of tensors and arithmetic; ``weights`` how those of the decoder's projections are stored: ``full`` is like the rest.
    """

    path: Path
    family: str
    model_name: str
    model_fingerprint: str
    precision: Precision
    weights: str
    shape: ModelShape
    schedule: Schedule
    limits: Limits
    segments: tuple[Segment, ...]
    tokens: TokenIds
    image_processor: ImageProcessorConfig
    vision: Graph
    language: Graph
    files: Mapping[str, FileEntry]
    environment: Mapping[str, Any]
    targets: Mapping[str, Target]  # by name; none where ONNX Runtime alone was asked for

    @property
    def itemsize(self) -> int:
        """Bytes of a number in tensors of type T, KV caches among them."""
        return PRECISIONS[self.precision]

    @property
    def tokenizer_path(self) -> Path:
        """The checkpoint's tokenizer."""
        return self.path / TOKENIZER_FILE

    @property
    def chat_template_path(self) -> Path:
        """The checkpoint's chat template."""
        return self.path / CHAT_TEMPLATE_FILE


def kv_segments(schedule: Schedule, layers: int, *, max_visual_tokens: int, max_text_tokens: int) -> tuple[Segment, ...]:
    """The decoder's segments and their KV capacities, in tokens.

    With several images the survivors are rounded up image by image, so the first segment can hold up to images − 1 visual tokens more
    than ``visual_capacity``. They take from the room for text; the session checks that at run time.
    """
    segments = []
    for first_layer, end_layer, keep in schedule.decoder_segments(layers):
        visual_capacity = keep_count(max_visual_tokens, keep)
        segments.append(Segment(first_layer, end_layer, keep, visual_capacity, visual_capacity + max_text_tokens))
    return tuple(segments)


def parse_manifest(values: Any, path: Path) -> Engine:
    """Check a manifest and give it types; ``path`` is the engine's folder, which is not looked at.

    Raises:
        EngineError: a newer format, an unknown family or precision, a field that is missing, of the wrong type or out of range, or
            fields that contradict each other. The message names the field.
    """
    if not isinstance(values, Mapping):
        raise EngineError("must be a JSON object")
    version = field(values, "format", int)
    if version != MANIFEST_FORMAT:
        age = "newer" if version > MANIFEST_FORMAT else "older"
        raise EngineError(f"format {version} is {age} than the one that this vflow-export reads ({MANIFEST_FORMAT}); use the version that wrote it")
    precision: Precision = choice(values, "precision", tuple(PRECISIONS))
    model = field(values, "model", Mapping)
    graphs = field(values, "graphs", Mapping)
    files = _files(field(values, "files", Mapping))
    engine = Engine(
        path=path,
        family=choice(values, "family", FAMILIES),
        model_name=field(model, "name", str, "model."),
        model_fingerprint=field(model, "fingerprint", str, "model."),
        precision=precision,
        weights=choice(values, "weights", WEIGHTS) if "weights" in values else "full",
        shape=_shape(field(values, "shape", Mapping)),
        schedule=_schedule(field(values, "schedule", Mapping)),
        limits=_limits(field(values, "limits", Mapping)),
        segments=_segments(field(values, "segments", list)),
        tokens=_tokens(field(values, "tokens", Mapping)),
        image_processor=_image_processor(field(values, "image_processor", Mapping)),
        vision=parse_graph(graphs, "vision"),
        language=parse_graph(graphs, "language"),
        files=files,
        environment=field(values, "environment", Mapping),
        targets=parse_targets(field(values, "targets", Mapping)) if "targets" in values else {},
    )
    _check_consistency(engine)
    return engine


def _check_consistency(engine: Engine) -> None:
    """Fields that must agree: a manifest edited by hand or damaged in one place is caught here."""
    try:
        engine.schedule.check(engine.shape, fingerprint=engine.model_fingerprint)
    except ScheduleError as error:
        raise EngineError(f"schedule: {error}") from None
    limits = engine.limits
    needed = kv_segments(
        engine.schedule,
        engine.shape.decoder.layers,
        max_visual_tokens=limits.max_visual_tokens,
        max_text_tokens=limits.max_text_tokens,
    )
    if [(s.first_layer, s.end_layer, s.keep) for s in engine.segments] != [(s.first_layer, s.end_layer, s.keep) for s in needed]:
        raise EngineError("segments do not follow from schedule and shape")
    for segment, least in zip(engine.segments, needed, strict=True):
        # At least: a backend may round capacities up.
        if segment.visual_capacity < least.visual_capacity or segment.capacity < segment.visual_capacity + limits.max_text_tokens:
            raise EngineError(f"segment of layers {segment.first_layer}..{segment.end_layer - 1} is smaller than limits ask for")
    if engine.image_processor.merge_size != engine.shape.tower.merge_size:
        raise EngineError("image_processor.merge_size differs from shape.tower.merge_size")
    built = [graph for target in engine.targets.values() for graph in (target.vision, target.language)]
    for target in engine.targets.values():
        for graph, ours in ((engine.vision, target.vision), (engine.language, target.language)):
            if [tensor.name for tensor in (*graph.inputs, *graph.outputs)] != [tensor.name for tensor in (*ours.inputs, *ours.outputs)]:
                raise EngineError(f"targets.{target.name}: {ours.file} has other inputs or outputs than {graph.file}")
    of_targets = [name for graph in built for name in (graph.file, graph.log, graph.layers)]
    of_cpu = [graph.cpu_file for graph in (engine.vision, engine.language) if graph.cpu_file is not None]
    for name in (engine.vision.file, engine.language.file, TOKENIZER_FILE, CHAT_TEMPLATE_FILE, *of_cpu, *of_targets):
        if name not in engine.files:
            raise EngineError(f"files does not list {name}")


def _sizes(kind: type[Sizes], values: Mapping[str, Any], where: str, **others: Any) -> Sizes:
    sizes: dict[str, Any] = {size.name: positive(values, size.name, where) for size in fields(kind) if size.name not in others}
    return kind(**sizes, **others)


def _shape(values: Mapping[str, Any]) -> ModelShape:
    older = {"mlp_matrices": 2, "window": 0, "full_blocks": [], "deepstack_blocks": []}  # what engines from before these lack
    sizes = {**older, **field(values, "tower", Mapping, "shape.")}
    blocks = {name: _blocks(sizes, name) for name in ("full_blocks", "deepstack_blocks")}
    tower = _sizes(TowerShape, sizes, "shape.tower.", window=count(sizes, "window", "shape.tower."), **blocks)
    decoder = _sizes(DecoderShape, field(values, "decoder", Mapping, "shape."), "shape.decoder.")
    return ModelShape(tower, decoder)


def _blocks(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    blocks = field(values, name, list, "shape.tower.")
    if not all(type(block) is int and block >= 0 for block in blocks):
        raise EngineError(f"field shape.tower.{name} must be a list of blocks, got {blocks!r:.60}")
    return tuple(blocks)


def _schedule(values: Mapping[str, Any]) -> Schedule:
    try:
        return Schedule.from_dict(values)
    except ScheduleError as error:
        raise EngineError(f"schedule: {error}") from None


def _limits(values: Mapping[str, Any]) -> Limits:
    return Limits(positive(values, "max_visual_tokens", "limits."), positive(values, "max_text_tokens", "limits."))


def _segments(values: Sequence[Any]) -> tuple[Segment, ...]:
    segments = []
    for number, value in enumerate(values):
        where = f"segments[{number}]."
        if not isinstance(value, Mapping):
            raise EngineError(f"segments[{number}] must be an object, got {value!r:.60}")
        segments.append(Segment(**{size.name: count(value, size.name, where) for size in fields(Segment)}))
    return tuple(segments)


def _tokens(values: Mapping[str, Any]) -> TokenIds:
    stop = field(values, "stop", list, "tokens.")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in stop):
        raise EngineError(f"field tokens.stop must be a list of token ids, got {stop!r:.60}")
    image, start, end = (count(values, key, "tokens.") for key in ("image", "vision_start", "vision_end"))
    return TokenIds(image, start, end, tuple(stop))


def _image_processor(values: Mapping[str, Any]) -> ImageProcessorConfig:
    sizes = {k: positive(values, k, "image_processor.") for k in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")}
    mean, std = (_channels(values, key) for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise EngineError("field image_processor.image_std must be positive")
    return ImageProcessorConfig(**sizes, image_mean=mean, image_std=std)


def _channels(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    channels = field(values, key, list, "image_processor.")
    if len(channels) != 3 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in channels):
        raise EngineError(f"field image_processor.{key} must be three numbers, got {channels!r:.60}")
    return tuple(float(v) for v in channels)


def _files(values: Mapping[str, Any]) -> dict[str, FileEntry]:
    files = {}
    for name, entry in values.items():
        _check_relative(name)
        if not isinstance(entry, Mapping):
            raise EngineError(f"field files.{name} must be an object, got {entry!r:.60}")
        sha256: str = field(entry, "sha256", str, f"files.{name}.")
        if len(sha256) != SHA256_DIGITS or not set(sha256) <= set("0123456789abcdef"):
            raise EngineError(f"field files.{name}.sha256 must be {SHA256_DIGITS} hexadecimal digits, got {sha256!r:.80}")
        files[name] = FileEntry(sha256, count(entry, "size", f"files.{name}."))
    return files


def _check_relative(name: str) -> None:
    """Refuse a name that leaves the folder, in the reading of any platform."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not posix.parts or posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in name:
        raise EngineError(f"files lists {name!r}, which lies outside the engine's folder")
