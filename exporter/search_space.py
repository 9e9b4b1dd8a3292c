"""Schedules as points of the unit cube, budgets met by construction.

Every coordinate is mapped into the interval that the budget leaves open at its turn, so each point of the cube is a schedule that meets the
budget and every such schedule is reached; nothing is clipped, penalised or thrown away. (The research code clips what the budget makes
negative, and two fifths of its search box under-spend.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .budget import cost, kv_bytes, spend_keep
from .presets import tower_places
from .schedule import KEEP_UNIT, MAX_GLOBAL_THRESHOLD, MAX_PROPORTIONAL_ATTENTION, Importance, RecycledImportance, Schedule, ScheduleError, Stage
from .shape import ModelShape

__all__ = ["Budget", "SearchSpace", "parse_bytes"]

PAPER_CELLS = (3.0, 24.0)  # sides that the paper searches
CELLS = (1.5, 24.0)  # below 3, all survivors of a small budget represent cells: the best token of each, none beside another
MOST_TOWER_PLACES = 16  # candidate blocks: each costs memory for the unpruned tower's state there
TOWER_STAGES = 2  # at most, by attention; one by the pixels besides
LATER_STAGES = 2  # at most, inside the decoder; one before it besides
NO_CUT = 0.85  # of a tower keep's coordinate; above, the stage is none
EXACT_ZERO = 0.1  # of the coordinates of t, β, γ and what a decoder stage keeps above an even spread; below, they are 0
LEAST_SCORE_ROWS = 32  # of 1024
AVERAGE_STEPS = KEEP_UNIT  # the average keep is a whole number of 1/1024 of a layer
BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
Point = dict[str, float | str]  # coordinates in [0, 1] and categories
CATEGORIES: dict[str, tuple[RecycledImportance, ...]] = {"recycled_importance": ("own", "sum", "protected")}


@dataclass(frozen=True)
class Budget:
    """What a schedule may spend; all that is given is kept to.

    Attributes:
        keep: average share of visual tokens over decoder layers.
        kv_bytes: visual KV cache in bytes, at the size below.
        prefill_flops: share of the unpruned prefill's FLOPs, tower and decoder together, at the size below.
        rows, columns, text_tokens: the request that bytes and FLOPs are counted for; bytes_per_value: of a cache entry.
    """

    keep: float | None = None
    kv_bytes: int | None = None
    prefill_flops: float | None = None
    rows: int = 32
    columns: int = 32
    text_tokens: int = 64
    bytes_per_value: int = 2

    def __post_init__(self) -> None:
        for name, share in (("keep", self.keep), ("prefill-flops", self.prefill_flops)):
            if share is not None and not 0 < share <= 1:
                raise ScheduleError(f"--{name} must be above 0 and at most 1, got {share:g}")

    @property
    def bounds_keep(self) -> bool:
        """Whether the average keep is given, so that it is spent and not searched."""
        return self.keep is not None or self.kv_bytes is not None

    def average_keep(self, shape: ModelShape) -> float:
        """Average keep that keep and KV budget allow, 1 without either.

        Raises:
            ScheduleError: fewer than 1/1024 of the tokens.
        """
        keeps = [1.0] if self.keep is None else [self.keep]
        if self.kv_bytes is not None:
            whole = kv_bytes(Schedule(), shape, tokens=self.rows * self.columns, bytes_per_value=self.bytes_per_value)
            rounding = kv_bytes(Schedule(), shape, tokens=1, bytes_per_value=self.bytes_per_value)  # ceilings cost up to a token a layer
            bias = (1 + LATER_STAGES) * self.rows * self.columns * self.bytes_per_value  # the most that proportional attention takes besides
            keeps.append((self.kv_bytes - rounding - bias) / whole)
        if min(keeps) * KEEP_UNIT < 1:
            raise ScheduleError(f"the budget leaves less than 1/{KEEP_UNIT} of the visual tokens (or less than one); raise it")
        return min(keeps)


@dataclass(frozen=True)
class SearchSpace:
    """What may vary.

    A stage whose keep equals the one before it is no stage, and each keep has a stretch of its coordinate where that is so: how many stages
    there are is searched along with where they stand.

    Attributes:
        decoder_places: candidate layers of stages inside the decoder; empty: thirds of the depth, fixed.
        tower_places: candidate blocks of attention stages inside the tower; empty: no tower stages at all, none by pixels either.
        beyond: whether what the paper does not have varies: merging at all, what representatives carry on, which block ranks, rows scored.
        guidance: whether β varies.
        fixed: coordinates and categories that do not vary, with their values; what they do is told by leaving them alone (ablations).
    """

    shape: ModelShape
    budget: Budget
    decoder_places: tuple[int, ...] = ()
    tower_places: tuple[int, ...] = ()
    beyond: bool = False
    guidance: bool = False
    fixed: tuple[tuple[str, float | str], ...] = ()

    @classmethod
    def for_model(cls, shape: ModelShape, budget: Budget, *, tower: bool = False, guidance: bool = False, paper: bool = False) -> SearchSpace:
        """Three decoder stages anywhere; with ``tower``, one by the pixels and two by attention; with ``paper`` what the paper searches.

        Raises:
            ScheduleError: a budget that cannot be met.
        """
        places = tower_places(shape.tower) if tower else ()
        places = places[:: max(1, math.ceil(len(places) / MOST_TOWER_PLACES))]
        decoder_places = () if paper else tuple(range(1, shape.decoder.layers))
        space = cls(shape, budget, decoder_places, places, beyond=not paper, guidance=guidance)
        space.schedule(space.middle())  # a budget that cannot be met fails here, before anything is computed
        return space

    @property
    def entry_blocks(self) -> tuple[int, ...]:
        """Blocks before which a schedule may first differ from the unpruned tower, or behind which one may rank: what is worth keeping of it."""
        ranking = [block + 1 for block in self._ranking_blocks(0)[:-1]] if self.beyond else []
        return tuple(sorted({*self.tower_places, *ranking}))

    def middle(self) -> Point:
        """The centre of the cube."""
        return {**dict.fromkeys(self.coordinates(), 0.5), **{name: values[0] for name, values in self.categories().items()}}

    def starts(self) -> tuple[Point, ...]:
        """Points to try first: in one stage and in several, merged and not, with and without entropy, from the pixels on and by attention alone."""
        plain: Point = {**self.middle(), "global_threshold": 0.0, "entropy_weight": 0.5, "guidance_weight": 0.0, "vision_layer": 0.0}
        plain |= {"proportional_attention": 0.6, "score_rows": 0.4}
        plain |= {"pixel_keep": 0.4, "tower_place_0": 0.0, "tower_place_1": 0.5, "tower_keep_0": 1.0, "tower_keep_1": 0.5}
        single: Point = {**plain, "decoder_keep_0": 0.0, "decoder_keep_1": 0.0, "recycle": 0.0, "pixel_recycle": 0.0}
        merged: Point = {**single, "recycle": 1.0, "cell_size": 0.35, "pixel_recycle": 1.0, "pixel_cell_size": 0.25}
        chosen = [
            merged,
            single,
            {**merged, "cell_size": 0.1},
            {**merged, "proportional_attention": 0.0},
            {**merged, "decoder_keep_0": 0.4, "decoder_keep_1": 0.4},
            {**single, "entropy_weight": 0.85},
        ]
        if self.tower_places:
            by_attention: Point = {"pixel_keep": 1.0, "tower_keep_0": 0.5}
            chosen += [{**merged, "tower_keep_1": 1.0}, {**merged, **by_attention}, {**single, **by_attention}]
        known = set(self.coordinates()) | set(self.categories())
        points = [{name: value for name, value in point.items() if name in known} for point in chosen]
        return tuple(point for number, point in enumerate(points) if point not in points[:number])  # equal where what differs is fixed

    def coordinates(self) -> tuple[str, ...]:
        """Names of the unit coordinates that vary."""
        return tuple(name for name in self._axes() if name not in dict(self.fixed))

    def _axes(self) -> list[str]:
        names = [] if self.budget.bounds_keep else ["average_keep"]
        names += [f"decoder_place_{n}" for n in range(min(LATER_STAGES, len(self.decoder_places)))]
        names += [f"decoder_keep_{n}" for n in range(len(self._decoder_starts(None)) - 1)]
        names += ["global_threshold", "entropy_weight", *(["recycle", "proportional_attention", "vision_layer"] if self.beyond else []), "cell_size"]
        names += ["guidance_weight"] if self.guidance else []
        if self.tower_places:
            count = min(TOWER_STAGES, len(self.tower_places))
            names += ["pixel_keep", "pixel_recycle", "pixel_cell_size"]
            names += [*(f"tower_place_{n}" for n in range(count)), *(f"tower_keep_{n}" for n in range(count))]
        names += ["score_rows"] if self._samples_rows else []
        return names

    def categories(self) -> Mapping[str, tuple[str, ...]]:
        """Categorical parameters and their values."""
        return {name: values for name, values in CATEGORIES.items() if self.beyond and name not in dict(self.fixed)}

    def schedule(self, point: Mapping[str, float | str]) -> Schedule:
        """The schedule of a point: coordinates in [0, 1], categories by value.

        Each choice is made among what still meets the budget with everything after it at its cheapest; last, the tower's keeps shrink together
        towards the first decoder layer's until the FLOPs are met.

        Raises:
            ScheduleError: the budget cannot be met at all.
        """
        chosen = {**dict(self.fixed), **point}
        unit = {name: float(chosen[name]) for name in self._axes()}
        carried = chosen.get("recycled_importance", "own")
        cell = _cell_side(CELLS if self.beyond else PAPER_CELLS, unit["cell_size"]) if unit.get("recycle", 1.0) >= 0.5 else None
        layers = self.shape.decoder.layers
        cheapest = _Choice(average=layers, cell=cell, shrink=0, score_rows=KEEP_UNIT, global_rows=0)
        if self._samples_rows:
            cheapest = replace(cheapest, score_rows=LEAST_SCORE_ROWS)

        def affordable(choice: _Choice) -> bool:
            return self.budget.prefill_flops is None or self.flops_share(self._assemble(unit, choice)) <= self.budget.prefill_flops

        if not affordable(cheapest):
            cheapest = replace(cheapest, cell=None)
        if not affordable(cheapest):
            least = self.flops_share(self._assemble(unit, cheapest))
            raise ScheduleError(
                f"--prefill-flops {self.budget.prefill_flops:g} cannot be met with these stages (least {least:.3f}); "
                + ("raise it" if self.tower_places else "raise it, or allow tower stages")
            )
        most = max(1, int(self.budget.average_keep(self.shape) * AVERAGE_STEPS * layers + 1e-9))
        average = _largest(lambda steps: affordable(replace(cheapest, average=steps)), layers, most) if most > layers else most
        if not self.budget.bounds_keep:
            average = round(_between(layers, average, unit["average_keep"]))
        choice = replace(cheapest, average=average)

        if self._samples_rows:
            rows = _largest(lambda value: affordable(replace(choice, score_rows=value)), LEAST_SCORE_ROWS, KEEP_UNIT)
            choice = replace(choice, score_rows=round(rows * (LEAST_SCORE_ROWS / rows) ** unit["score_rows"]))
        threshold = 0.0
        if unit["global_threshold"] > EXACT_ZERO:
            rows = _largest(lambda value: affordable(replace(choice, global_rows=value)), 0, KEEP_UNIT)
            lowest = 0.0 if rows == KEEP_UNIT else MAX_GLOBAL_THRESHOLD if rows == 0 else min(MAX_GLOBAL_THRESHOLD, KEEP_UNIT / rows)
            share = _beyond_zero(unit["global_threshold"]) ** 2
            wished = _between(lowest, MAX_GLOBAL_THRESHOLD, share)  # finer near the low end, where most tokens change sides
            if affordable(replace(choice, global_rows=Importance(wished).global_rows)):
                threshold = wished
        choice = replace(choice, threshold=threshold, global_rows=Importance(threshold).global_rows if threshold else 0)
        choice = replace(choice, shrink=_largest(lambda value: affordable(replace(choice, shrink=value)), 0, KEEP_UNIT))
        return replace(self._assemble(unit, choice), recycled_importance=carried)  # type: ignore[arg-type]  # validated by Schedule

    def _assemble(self, unit: Mapping[str, float], choice: _Choice) -> Schedule:
        """The schedule of a point with the values that budgets act on."""
        layers = self.shape.decoder.layers
        starts = self._decoder_starts(unit)
        wishes = [_beyond_zero(unit[f"decoder_keep_{number}"]) ** 2 for number in range(len(starts) - 1)]  # finer near an even spread
        starts = starts[: wishes.index(0) + 1] if 0 in wishes else starts  # an even spread from there on is one stage
        average = choice.average / AVERAGE_STEPS / layers
        keeps = spend_keep(layers, average, starts, lambda number, least, most: _between(least, most, wishes[number]))
        decoder = [Stage("decoder", start, keep, choice.cell if start == 0 else None) for start, keep in zip(starts, keeps, strict=True)]
        pixel_cell = _cell_side(CELLS, unit["pixel_cell_size"]) if unit.get("pixel_recycle", 0.0) >= 0.5 else None
        tower, ceiling = [], KEEP_UNIT
        for block, wish in self._tower_wishes(unit):
            if wish < NO_CUT:
                ceiling = round(_between(keeps[0], ceiling, wish / NO_CUT))
            tower.append(Stage("tower", block, keeps[0] + (ceiling - keeps[0]) * choice.shrink // KEEP_UNIT, None if block else pixel_cell))
        weight = _between(-1.0, 1.0, unit["entropy_weight"])
        importance = Importance(choice.threshold, weight, self._vision_layer(unit, tower), choice.score_rows)
        if choice.global_rows and not choice.threshold:  # what is only costed so far: a threshold that needs these rows
            importance = replace(importance, global_threshold=min(MAX_GLOBAL_THRESHOLD, KEEP_UNIT / choice.global_rows))
        found = Schedule(_cutting([*tower, *decoder]), importance)
        recycles = any(stage.recycle is not None for stage in found.stages)
        return replace(  # what would have no effect is left out
            found,
            guidance_weight=_beyond_zero(unit.get("guidance_weight", 0.0)) if found.later_stages else 0.0,
            proportional_attention=MAX_PROPORTIONAL_ATTENTION * _beyond_zero(unit.get("proportional_attention", 0.0)) if recycles else 0.0,
        )

    def _decoder_starts(self, unit: Mapping[str, float] | None) -> tuple[int, ...]:
        """Layers of the decoder stages, from 0 on; None: any, of the right number."""
        layers, places = self.shape.decoder.layers, self.decoder_places
        if not places:
            return tuple(dict.fromkeys((0, layers // 3, 2 * layers // 3)))
        count = min(LATER_STAGES, len(places))
        return 0, *(places[:count] if unit is None else _ascending(places, [unit[f"decoder_place_{n}"] for n in range(count)]))

    def _vision_layer(self, unit: Mapping[str, float], tower: Sequence[Stage]) -> int:
        """The block that ranks for the decoder: the last, or one a little before it, never before a tower stage."""
        open_blocks = self._ranking_blocks(max((stage.layer for stage in tower), default=0))
        back = min(int(unit.get("vision_layer", 0.0) * len(open_blocks)), len(open_blocks) - 1)
        return open_blocks[-1 - back] - self.shape.tower.blocks

    def _ranking_blocks(self, last_stage: int) -> list[int]:
        """Blocks that may rank for the decoder, ascending: at the end of the tower, and looking at the whole image."""
        tower = self.shape.tower
        first = max(last_stage, tower.blocks - max(2, tower.blocks // 8))
        return [block for block in range(first, tower.blocks) if tower.looks_everywhere(block)] or [tower.ranking_block(tower.blocks - 1) or 0]

    def _tower_wishes(self, unit: Mapping[str, float]) -> list[tuple[int, float]]:
        """Tower stages as (block, coordinate of the keep)."""
        if not self.tower_places:
            return []
        count = min(TOWER_STAGES, len(self.tower_places))
        blocks = _ascending(self.tower_places, [unit[f"tower_place_{n}"] for n in range(count)])
        return [(0, unit["pixel_keep"]), *((block, unit[f"tower_keep_{n}"]) for n, block in enumerate(blocks))]

    @property
    def _samples_rows(self) -> bool:
        """Whether ``score_rows`` varies: where FLOPs matter."""
        return self.beyond and (bool(self.tower_places) or self.budget.prefill_flops is not None)

    def flops_share(self, schedule: Schedule) -> float:
        """Prefill FLOPs of a schedule at the budget's size, as a share of the unpruned ones."""
        return self._flops(schedule) / self._unpruned_flops

    @cached_property
    def _unpruned_flops(self) -> int:
        return self._flops(Schedule())

    def _flops(self, schedule: Schedule) -> int:
        budget = self.budget
        return cost(schedule, self.shape, rows=budget.rows, columns=budget.columns, text_tokens=budget.text_tokens).flops


@dataclass(frozen=True)
class _Choice:
    """What budgets act on: the average keep (in 1/1024 of a layer), cell side, how far tower keeps may rise above the floor, rows to score."""

    average: int
    cell: float | None
    shrink: int
    score_rows: int
    global_rows: int
    threshold: float = 0.0


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``64MiB``, ``1.5GB`` or ``4096``.

    Raises:
        ScheduleError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)?\s*", text)
    if match is None:
        raise ScheduleError(f"{text!r} is not a size; write it as 64MiB, 1.5GB or a number of bytes")
    return int(float(match[1]) * BYTE_UNITS[match[2] or "B"])


def _cutting(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages that drop something; one that would drop no more than a rounding is joined to the one before."""
    kept: list[Stage] = []
    for stage in stages:
        before = kept[-1].keep if kept else KEEP_UNIT
        if kept and stage.keep >= before - 1:
            kept[-1] = replace(kept[-1], keep=stage.keep)
        elif stage.keep < before:
            kept.append(stage)
    return tuple(kept)


def _beyond_zero(share: float) -> float:
    """A coordinate with a stretch at its low end that means exactly 0."""
    return max(0.0, (share - EXACT_ZERO) / (1 - EXACT_ZERO))


def _ascending(places: Sequence[int], shares: Sequence[float]) -> list[int]:
    """One place a share, each behind the one before, with room left for the rest."""
    chosen: list[int] = []
    first = 0
    for number, share in enumerate(shares):
        end = len(places) - (len(shares) - number - 1)
        index = first + min(int(share * (end - first)), end - first - 1)
        chosen.append(places[index])
        first = index + 1
    return chosen


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest whole number in [low, high] that holds, by bisection; ``low`` is known to, and what is above one that does not doesn't either."""
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _cell_side(sides: tuple[float, float], share: float) -> float:
    """A cell's side, finer at the small end: one token more changes the number of cells most there."""
    low, high = sides
    side: float = low * (high / low) ** share
    return side


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
