"""Schedules as points of the unit cube, budgets met by construction.

Every coordinate is mapped into the interval that the budget leaves open at its turn, so each point of the cube is a schedule that meets the
budget and every such schedule is reached; nothing is clipped, penalised or thrown away. (The research code clips what the budget makes
negative, and two fifths of its search box under-spend.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from .budget import cost, kv_bytes, spend_keep
from .presets import FIRST_TOWER_BLOCK
from .schedule import KEEP_UNIT, MAX_GLOBAL_THRESHOLD, Importance, RecycledImportance, Schedule, ScheduleError, Stage
from .shape import ModelShape

__all__ = ["Budget", "SearchSpace", "parse_bytes"]

CELL_RANGE = (3.0, 24.0)  # the paper's
MOST_TOWER_PLACES = 16  # candidate blocks: each costs memory for the unpruned tower's state there
BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
CATEGORIES: dict[str, tuple[RecycledImportance, ...]] = {"recycled_importance": ("own", "sum", "protected")}


@dataclass(frozen=True)
class Budget:
    """What a schedule may spend; at least one of the three, combined where several are given.

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
        if self.keep is None and self.kv_bytes is None and self.prefill_flops is None:
            raise ScheduleError("a budget is needed: --keep, --kv-budget or --prefill-flops")
        for name, share in (("keep", self.keep), ("prefill-flops", self.prefill_flops)):
            if share is not None and not 0 < share <= 1:
                raise ScheduleError(f"--{name} must be above 0 and at most 1, got {share:g}")

    def average_keep(self, shape: ModelShape) -> float:
        """Average keep that keep and KV budget allow, 1 without either.

        Raises:
            ScheduleError: fewer than 1/1024 of the tokens.
        """
        keeps = [1.0] if self.keep is None else [self.keep]
        if self.kv_bytes is not None:
            whole = kv_bytes(Schedule(), shape, tokens=self.rows * self.columns, bytes_per_value=self.bytes_per_value)
            rounding = kv_bytes(Schedule(), shape, tokens=1, bytes_per_value=self.bytes_per_value)
            keeps.append((self.kv_bytes - rounding) / whole)  # ceilings cost up to a token a layer
        if min(keeps) * KEEP_UNIT < 1:
            raise ScheduleError(f"the budget leaves less than 1/{KEEP_UNIT} of the visual tokens (or less than one); raise it")
        return min(keeps)


@dataclass(frozen=True)
class SearchSpace:
    """What may vary.

    Attributes:
        starts: decoder layers of the stages, from 0 on; the last one's ratio is solved from the budget.
        tower_blocks: candidate places of tower stages, ascending; empty: none.
        tower_stages: how many of them are used.
        entropy, recycling, guidance, carry: whether α, the cell side, β and ``recycled_importance`` vary.
    """

    shape: ModelShape
    budget: Budget
    starts: tuple[int, ...]
    tower_blocks: tuple[int, ...] = ()
    tower_stages: int = 0
    entropy: bool = True
    recycling: bool = True
    guidance: bool = False
    carry: bool = False

    @classmethod
    def for_model(cls, shape: ModelShape, budget: Budget, *, tower_stages: int = 0, guidance: bool = False, paper: bool = False) -> SearchSpace:
        """Stages at thirds of the decoder, tower stages anywhere from block 2 on; with ``paper`` only what the paper searches.

        Raises:
            ScheduleError: more tower stages than there are places.
        """
        layers, blocks = shape.decoder.layers, shape.tower.blocks
        starts = tuple(dict.fromkeys((0, layers // 3, 2 * layers // 3)))
        step = max(1, blocks // MOST_TOWER_PLACES)
        places = tuple(range(FIRST_TOWER_BLOCK, blocks, step)) if tower_stages else ()
        if tower_stages > len(places):
            raise ScheduleError(f"--tower-stages {tower_stages}: this tower has room for {len(places)}")
        space = cls(shape, budget, starts, places, tower_stages, guidance=guidance, carry=not paper)
        space.schedule(space.middle())  # a budget that cannot be met fails here, before anything is computed
        return space

    def middle(self) -> dict[str, float | str]:
        """The centre of the cube."""
        return {**dict.fromkeys(self.coordinates(), 0.5), **{name: values[0] for name, values in self.categories().items()}}

    def coordinates(self) -> tuple[str, ...]:
        """Names of the unit coordinates, in the order in which they are used."""
        names = [f"decoder_{number}" for number in range(len(self.starts) - 1)] + ["global_threshold"]
        names += ["entropy_weight"] if self.entropy else []
        names += ["recycle", "cell_size"] if self.recycling else []
        names += ["guidance_weight"] if self.guidance else []
        names += [f"tower_block_{n}" for n in range(self.tower_stages)] + [f"tower_keep_{n}" for n in range(self.tower_stages)]
        return tuple(names)

    def categories(self) -> Mapping[str, tuple[str, ...]]:
        """Categorical parameters and their values."""
        return CATEGORIES if self.carry else {}

    def schedule(self, point: Mapping[str, float | str]) -> Schedule:
        """The schedule of a point: coordinates in [0, 1], categories by value.

        Raises:
            ScheduleError: the budget cannot be met at all.
        """
        unit = {name: float(point[name]) for name in self.coordinates()}
        recycle = None
        if self.recycling and unit["recycle"] >= 0.5:
            recycle = _between(*CELL_RANGE, unit["cell_size"])
        importance = Importance(
            global_threshold=MAX_GLOBAL_THRESHOLD * unit["global_threshold"] ** 2,  # finer near 0, where most tokens change sides
            entropy_weight=_between(-1.0, 1.0, unit["entropy_weight"]) if self.entropy else 0.0,
        )
        decoder = self._decoder(unit, recycle)
        carried = point.get("recycled_importance", "own")
        base = Schedule(
            stages=decoder,
            importance=importance,
            guidance_weight=unit.get("guidance_weight", 0.0),
            recycled_importance=carried,  # type: ignore[arg-type]  # validated by Schedule
        )
        return self._with_tower(base, unit)

    def _decoder(self, unit: Mapping[str, float], recycle: float | None) -> tuple[Stage, ...]:
        average = self.budget.average_keep(self.shape)
        keeps = spend_keep(
            self.shape.decoder.layers, average, self.starts, lambda number, least, most: _between(least, most, unit[f"decoder_{number}"])
        )
        return tuple(Stage("decoder", start, keep, recycle if start == 0 else None) for start, keep in zip(self.starts, keeps, strict=True))

    def _with_tower(self, base: Schedule, unit: Mapping[str, float]) -> Schedule:
        """Tower stages with places and keeps of the point; keeps shrink together, towards the first decoder stage's, until the FLOPs are met."""
        if not self.tower_stages:
            self._check_flops(base)
            return base
        floor = base.stages[0].keep
        places: list[int] = []
        for number in range(self.tower_stages):
            open_places = self._open_places(base, places)
            places.append(open_places[min(int(unit[f"tower_block_{number}"] * len(open_places)), len(open_places) - 1)])
        keeps: list[int] = []
        ceiling = KEEP_UNIT
        for number in range(self.tower_stages):
            keeps.append(ceiling := round(_between(floor, ceiling, unit[f"tower_keep_{number}"])))
        schedule = _put_tower(base, places, keeps)
        if self.budget.prefill_flops is None or self._flops_share(schedule) <= self.budget.prefill_flops:
            return schedule
        # Too dear: shrink all tower keeps towards the floor, the least that still meets the budget.
        low, high = 0, KEEP_UNIT
        while high - low > 1:
            middle = (low + high) // 2
            shrunk = _put_tower(base, places, [floor + (keep - floor) * middle // KEEP_UNIT for keep in keeps])
            low, high = (middle, high) if self._flops_share(shrunk) <= self.budget.prefill_flops else (low, middle)
        return _put_tower(base, places, [floor + (keep - floor) * low // KEEP_UNIT for keep in keeps])

    def _open_places(self, base: Schedule, places: list[int]) -> list[int]:
        """Where the next tower stage may stand, so that the rest still fits behind it and the least keeps meet the FLOPs."""
        behind = [block for block in self.tower_blocks if not places or block > places[-1]]
        floor, wanted = base.stages[0].keep, self.tower_stages
        open_places = []
        for number, block in enumerate(behind):
            filled = [*places, *behind[number : number + wanted - len(places)]]
            if len(filled) < wanted:
                break
            cheapest = _put_tower(base, filled, [floor] * wanted)
            if self.budget.prefill_flops is None or self._flops_share(cheapest) <= self.budget.prefill_flops:
                open_places.append(block)
        if not open_places:
            self._check_flops(_put_tower(base, [*places, *behind[: wanted - len(places)]], [floor] * wanted))
        return open_places

    def _flops_share(self, schedule: Schedule) -> float:
        return self._flops(schedule) / self._unpruned_flops

    @cached_property
    def _unpruned_flops(self) -> int:
        return self._flops(Schedule())

    def _flops(self, schedule: Schedule) -> int:
        budget = self.budget
        return cost(schedule, self.shape, rows=budget.rows, columns=budget.columns, text_tokens=budget.text_tokens).flops

    def _check_flops(self, schedule: Schedule) -> None:
        if self.budget.prefill_flops is not None and self._flops_share(schedule) > self.budget.prefill_flops:
            raise ScheduleError(
                f"--prefill-flops {self.budget.prefill_flops:g} cannot be met with these stages (least {self._flops_share(schedule):.3f}); "
                "allow earlier tower stages or a smaller --keep"
            )


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``64MiB``, ``1.5GB`` or ``4096``.

    Raises:
        ScheduleError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)?\s*", text)
    if match is None:
        raise ScheduleError(f"{text!r} is not a size; write it as 64MiB, 1.5GB or a number of bytes")
    return int(float(match[1]) * BYTE_UNITS[match[2] or "B"])


def _put_tower(base: Schedule, places: list[int], keeps: list[int]) -> Schedule:
    tower = tuple(Stage("tower", block, keep) for block, keep in zip(places, keeps, strict=True))
    return replace(base, stages=(*tower, *base.stages))


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
