"""The pruning schedule: stages over the whole network, as data.

A schedule says where visual tokens are dropped (``stages``), by what importance (``importance``), and nothing else does: the
graphs, the KV capacities, the budget arithmetic and the reports are all read off it. Ratios are integers of 1024, so that
PyTorch, ONNX, kernels and shape expressions agree to the token. Needs neither PyTorch nor NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .shape import ModelShape, TowerShape

__all__ = [
    "KEEP_UNIT",
    "SCHEDULE_FORMAT",
    "Importance",
    "Schedule",
    "ScheduleError",
    "Stage",
    "cell_count",
    "cell_of",
    "keep_count",
    "load_schedule",
    "unpruned_schedule",
]

SCHEDULE_FORMAT = 1
KEEP_UNIT = 1024  # ratios and cell sides are integers of this
MAX_GLOBAL_THRESHOLD = 50.0  # the box that the paper searches
RECYCLE_RANGE = (1.0, 64.0)  # cell side in visual tokens; the paper searches [3, 24]
MAX_PROPORTIONAL_ATTENTION = 4.0  # on the small model 2 to 3 serve best and 4 is too much (docs/quality.md)

Part = Literal["tower", "decoder"]
RecycledImportance = Literal["own", "sum", "protected"]


class ScheduleError(ValueError):
    """A schedule that cannot be used; the message names the field to change."""


def keep_count(tokens: int, keep: int) -> int:
    """⌈tokens · keep / 1024⌉: how many of ``tokens`` visual tokens a stage leaves. Works on symbolic sizes as well."""
    return (tokens * keep + KEEP_UNIT - 1) // KEEP_UNIT


def cell_of(position: Any, cell: int) -> Any:
    """Grid cell along one axis of a token at ``position`` (a number or a tensor of them), for cells of ``cell``/1024 tokens."""
    return position * KEEP_UNIT // cell


def cell_count(length: int, cell: int) -> int:
    """Number of cells of ``cell``/1024 tokens along an axis of ``length`` tokens."""
    return (length - 1) * KEEP_UNIT // cell + 1


@dataclass(frozen=True)
class Stage:
    """Visual tokens are cut to ``keep``/1024 of the original number before block or layer ``layer`` of ``part``.

    Attributes:
        part: ``tower`` or ``decoder``.
        layer: the block or layer that sees the survivors first; decoder 0 is between merger and decoder.
        keep: survivors in 1/1024 of the image's original visual tokens, 1..1024, rounded up (cumulative, not per stage).
        recycle: side of the grid cells, in visual tokens, into whose representatives dropped tokens are merged
            (section 2 of docs/algorithm.md); None drops them. Only in the tower and at decoder 0.
    """

    part: Part
    layer: int
    keep: int
    recycle: float | None = None

    def __post_init__(self) -> None:
        where = f"stage before {self.part} {self.layer}"
        if self.part not in ("tower", "decoder"):
            raise ScheduleError(f"stage part must be 'tower' or 'decoder', got {self.part!r}")
        if not _is_int(self.layer) or self.layer < 0:
            raise ScheduleError(f"{where}: layer must be a whole number from 0, got {self.layer!r}")
        if not _is_int(self.keep) or not 1 <= self.keep <= KEEP_UNIT:
            raise ScheduleError(f"{where}: keep must be a whole number in 1..{KEEP_UNIT} (of {KEEP_UNIT}), got {self.keep!r}")
        if self.recycle is not None:
            low, high = RECYCLE_RANGE
            if not _is_number(self.recycle) or not low <= self.recycle <= high:
                raise ScheduleError(f"{where}: recycle must be a cell side in [{low:g}, {high:g}] tokens or null, got {self.recycle!r}")
            if self.part == "decoder" and self.layer > 0:
                raise ScheduleError(f"{where}: recycle is only possible in the tower and before decoder layer 0; set it to null")

    @property
    def cell(self) -> int | None:
        """The cell side in 1/1024 token, the integer that every form of the algorithm computes with."""
        return None if self.recycle is None else round(self.recycle * KEEP_UNIT)


@dataclass(frozen=True)
class Importance:
    """Parameters of the importance map (section 1 of docs/algorithm.md).

    Attributes:
        global_threshold: t, tokens that receive more attention than this (1 on average) are global; 0 takes them all.
        entropy_weight: α in [−1, 1], weight of the patches' entropy.
        vision_layer: tower block whose attention ranks tokens for the decoder; −1 is the last. In a tower with windows it is the last block up to
            this one that looks at the whole image, here as for tower stages.
        score_rows: share of the patches, in 1/1024 and evenly spaced, whose attention is looked at (beyond the paper; 1024 is exact).
    """

    global_threshold: float = 0.0
    entropy_weight: float = 0.0
    vision_layer: int = -1
    score_rows: int = KEEP_UNIT

    def __post_init__(self) -> None:
        if not _is_number(self.global_threshold) or not 0 <= self.global_threshold <= MAX_GLOBAL_THRESHOLD:
            raise ScheduleError(f"importance.global_threshold must be in [0, {MAX_GLOBAL_THRESHOLD:g}], got {self.global_threshold!r}")
        if not _is_number(self.entropy_weight) or not -1 <= self.entropy_weight <= 1:
            raise ScheduleError(f"importance.entropy_weight must be in [-1, 1], got {self.entropy_weight!r}")
        if not _is_int(self.vision_layer):
            raise ScheduleError(f"importance.vision_layer must be a whole number, got {self.vision_layer!r}")
        if not _is_int(self.score_rows) or not 1 <= self.score_rows <= KEEP_UNIT:
            raise ScheduleError(f"importance.score_rows must be a whole number in 1..{KEEP_UNIT} (of {KEEP_UNIT}), got {self.score_rows!r}")

    @property
    def global_rows(self) -> int:
        """Room for global tokens, in 1/1024 of the patches: received attention averages 1, so fewer than P/t exceed t."""
        return KEEP_UNIT if self.global_threshold <= 1 else math.ceil(KEEP_UNIT / self.global_threshold)


@dataclass(frozen=True)
class Schedule:
    """Stages in network order, and how importance is made and carried.

    Attributes:
        stages: tower stages by block, then decoder stages by layer; keep never grows.
        importance: parameters of the map.
        recycled_importance: what a representative carries on: its ``own`` importance (published), the ``sum`` of its
            cell, or ``protected``: it survives all later stages.
        guidance_weight: β in [0, 1], weight of the last prompt token's attention at stages inside the decoder (0: off).
        proportional_attention: γ in [0, 4]: the decoder adds γ·log(n) to its attention scores of a token that stands for n (0: off; 1: as n
            equal tokens would be looked at). Section 2a of docs/algorithm.md.
        renumber_first_stage: survivors of the first decoder stage get consecutive position ids, as the research code does.
        model: fingerprint of the model that the schedule was made for; None fits every model with these layers.
        provenance: how it was found; carried along, never interpreted.
    """

    stages: tuple[Stage, ...] = ()
    importance: Importance = field(default_factory=Importance)
    recycled_importance: RecycledImportance = "own"
    guidance_weight: float = 0.0
    proportional_attention: float = 0.0
    renumber_first_stage: bool = False
    model: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recycled_importance not in ("own", "sum", "protected"):
            raise ScheduleError(f"recycled_importance must be 'own', 'sum' or 'protected', got {self.recycled_importance!r}")
        if not _is_number(self.guidance_weight) or not 0 <= self.guidance_weight <= 1:
            raise ScheduleError(f"guidance_weight must be in [0, 1], got {self.guidance_weight!r}")
        if not _is_number(self.proportional_attention) or not 0 <= self.proportional_attention <= MAX_PROPORTIONAL_ATTENTION:
            raise ScheduleError(f"proportional_attention must be in [0, {MAX_PROPORTIONAL_ATTENTION:g}], got {self.proportional_attention!r}")
        if not isinstance(self.renumber_first_stage, bool):
            raise ScheduleError(f"renumber_first_stage must be true or false, got {self.renumber_first_stage!r}")
        if not all(isinstance(stage, Stage) for stage in self.stages):
            raise ScheduleError("stages must hold stages")
        if self.model is not None and not isinstance(self.model, str):
            raise ScheduleError(f"model must be a fingerprint or null, got {self.model!r:.60}")
        if not isinstance(self.provenance, Mapping):
            raise ScheduleError(f"provenance must be a JSON object, got {self.provenance!r:.60}")
        try:
            json.dumps(dict(self.provenance), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ScheduleError(f"provenance must hold JSON values only ({error})") from None
        if self.proportional_attention and all(stage.recycle is None for stage in self.stages):
            raise ScheduleError(
                "proportional_attention: no stage recycles, so every token stands for itself alone; set recycle at one, or set this to 0"
            )
        if self.renumber_first_stage and self.first_stage is None:
            raise ScheduleError("renumber_first_stage: there is no stage before decoder layer 0 whose survivors to number; add one, or leave it out")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if _order(after) <= _order(before):
                raise ScheduleError(
                    f"stages out of order: {after.part} {after.layer} comes after {before.part} {before.layer}; "
                    "list tower stages by block, then decoder stages by layer, each place once"
                )
            if after.keep > before.keep:
                raise ScheduleError(
                    f"keep grows from {before.keep} (before {before.part} {before.layer}) to {after.keep} "
                    f"(before {after.part} {after.layer}); a dropped token cannot come back"
                )

    def check(self, shape: ModelShape, *, fingerprint: str | None = None) -> None:
        """Check against a model.

        Raises:
            ScheduleError: a stage or ``vision_layer`` outside the model or with nothing to rank by, or a schedule of another model.
        """
        if self.model is not None and fingerprint is not None and self.model != fingerprint:
            raise ScheduleError(
                f"schedule was made for model {self.model}, this model is {fingerprint}; tune one for it, or remove 'model' to use it anyway"
            )
        depth = {"tower": shape.tower.blocks, "decoder": shape.decoder.layers}
        for stage in self.stages:
            if stage.layer >= depth[stage.part]:
                raise ScheduleError(f"stage before {stage.part} {stage.layer}: this model's {stage.part} has layers 0..{depth[stage.part] - 1}")
        for stage in self.tower_stages:
            if stage.layer > 0 and shape.tower.ranking_block(stage.layer - 1) is None:
                raise ScheduleError(f"stage before tower {stage.layer}: no block before it looks at the whole image; {_everywhere(shape)}")
        if not -shape.tower.blocks <= self.importance.vision_layer < shape.tower.blocks:
            raise ScheduleError(f"importance.vision_layer {self.importance.vision_layer}: this model's tower has blocks 0..{shape.tower.blocks - 1}")
        if not self.needs_importance:
            return
        ranking = shape.tower.ranking_block(self.importance.vision_layer % shape.tower.blocks)
        if ranking is None:
            raise ScheduleError(
                f"importance.vision_layer {self.importance.vision_layer}: no block up to it looks at the whole image; {_everywhere(shape)}"
            )
        last_tower = max((s.layer for s in self.tower_stages), default=0)
        if ranking < last_tower:
            raise ScheduleError(
                f"importance.vision_layer {self.importance.vision_layer}: block {ranking} ranks, which lies before the tower stage at block "
                f"{last_tower}; rank for the decoder with a block after the last tower stage"
            )

    @property
    def tower_stages(self) -> tuple[Stage, ...]:
        return tuple(s for s in self.stages if s.part == "tower")

    @property
    def first_stage(self) -> Stage | None:
        """The stage between merger and decoder, if there is one."""
        return next((s for s in self.stages if s.part == "decoder" and s.layer == 0), None)

    @property
    def later_stages(self) -> tuple[Stage, ...]:
        """The stages inside the decoder."""
        return tuple(s for s in self.stages if s.part == "decoder" and s.layer > 0)

    @property
    def needs_importance(self) -> bool:
        """Whether tokens are ranked for the decoder by the map; where the last token's attention alone ranks, they are not."""
        return self.first_stage is not None or (bool(self.later_stages) and self.guidance_weight < 1)

    def scoring_blocks(self, tower: TowerShape) -> frozenset[int]:
        """Tower blocks whose attention ranks tokens, for its stages and for the decoder."""
        looked_from = [stage.layer - 1 for stage in self.tower_stages if stage.layer > 0]
        if self.needs_importance:
            looked_from.append(self.importance.vision_layer % tower.blocks)
        return frozenset(block for seen in looked_from if (block := tower.ranking_block(seen)) is not None)

    def keep_at(self, part: Part, layer: int) -> int:
        """Cumulative keep (of 1024) of the tokens that enter a block or layer."""
        place = _place(part, layer)
        return min((s.keep for s in self.stages if _order(s) <= place), default=KEEP_UNIT)

    def decoder_segments(self, layers: int) -> tuple[tuple[int, int, int], ...]:
        """Runs of decoder layers with one token count: (first layer, end, keep of 1024)."""
        starts = [0, *(s.layer for s in self.later_stages)]
        ends = [*starts[1:], layers]
        return tuple((a, b, self.keep_at("decoder", a)) for a, b in zip(starts, ends, strict=True))

    def average_keep(self, layers: int) -> float:
        """(1/L) Σ κ(ℓ)/1024 over decoder layers: the share of the visual KV cache that is kept."""
        return sum((b - a) * keep for a, b, keep in self.decoder_segments(layers)) / layers / KEEP_UNIT

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"format": SCHEDULE_FORMAT, **asdict(replace(self, provenance=dict(self.provenance)))}

    def save(self, path: str | Path) -> None:
        """Write ``schedule.json``."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Any) -> Schedule:
        """Read the JSON form.

        Raises:
            ScheduleError: an unknown field, a newer format or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ScheduleError("a schedule must be a JSON object")
        values = dict(values)
        version = values.pop("format", None)
        if version != SCHEDULE_FORMAT:
            raise ScheduleError(f"schedule format {version!r} is not supported (this version reads {SCHEDULE_FORMAT})")
        stages = values.pop("stages", [])
        if not isinstance(stages, Sequence) or isinstance(stages, str):
            raise ScheduleError("stages must be a list")
        made = tuple(_build(Stage, stage, "stages[]") for stage in stages)
        importance = _build(Importance, values.pop("importance", {}), "importance")
        schedule: Schedule = _build(cls, {**values, "stages": made, "importance": importance}, "schedule")
        return schedule


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule file.

    Raises:
        ScheduleError: missing, not JSON, or not a valid schedule; the message starts with the path.
    """
    try:
        return Schedule.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ScheduleError(f"{path}: {error.strerror or error}") from None
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"{path}: not JSON ({error})") from None


def unpruned_schedule() -> Schedule:
    """The schedule that keeps everything."""
    return Schedule()


def _build(kind: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ScheduleError(f"{where} must be a JSON object, got {values!r}")
    known = kind.__dataclass_fields__
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ScheduleError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ScheduleError(f"{where}: {error}".replace("__init__() ", "")) from None


def _everywhere(shape: ModelShape) -> str:
    """Which blocks of a tower with windows rank tokens."""
    return f"blocks that do: {', '.join(map(str, shape.tower.full_blocks)) or 'none'}"


def _order(stage: Stage) -> tuple[int, int]:
    return _place(stage.part, stage.layer)


def _place(part: Part, layer: int) -> tuple[int, int]:
    """Sorts along the network."""
    return (0 if part == "tower" else 1, layer)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))  # isfinite itself fails at large whole numbers
