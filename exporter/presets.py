"""Schedules by name, for a budget: those tuned for a model and shipped, and where to start when there is none.

tuned         found by ``tune`` for this very model and average keep (``tuned/*.json``)
tuned-tower   the same with stages inside the tower, for a share of the prefill FLOPs as well
progressive   three decoder stages, received attention, no merging (untuned default)
tower         the same, and stages inside the tower
paper         VFlowOpt as published (arXiv 2508.05211), everything beyond it off

Besides, the methods of ``methods/`` whose schedule is all there is to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .budget import spend_keep
from .schedule import KEEP_UNIT, Importance, Schedule, ScheduleError, Stage, load_schedule, unpruned_schedule
from .shape import ModelShape, TowerShape

__all__ = ["DEFAULT_MAX_TEXT_TOKENS", "DEFAULT_MAX_VISUAL_TOKENS", "DEFAULT_PRESET", "PRESETS", "PRESET_NAMES", "preset_schedule", "tower_places",
           "tuned_keeps", "tuned_schedule"]  # fmt: skip

TUNED_FOLDER = Path(__file__).parent / "tuned"
TUNED = ("tuned", "tuned-tower")
METHOD_PRESETS = ("attention", "fastv", "pyramiddrop")  # exportable methods, by the name that they have there

DEFAULT_MAX_VISUAL_TOKENS = 1280  # of a request; what Qwen2-VL's documentation suggests for max_pixels, in visual tokens
DEFAULT_MAX_TEXT_TOKENS = 1024
DEFAULT_PRESET = "progressive"

# Published for LLaVA-OneVision-7B: average keep → ratios of the first two stages (each of the stage before), t, cell side; α = 0.
PUBLISHED = {
    0.50: (0.723, 0.749, 28.7, 11.8),
    0.25: (0.265, 0.983, 34.8, 15.6),
    0.10: (0.117, 1.0, 39.3, 17.4),
}
FIRST_SHARE = 1.3  # first stage of `progressive`, in average keeps: more tokens early, where the decoder still reads them
TOWER_KEEPS = (512, 256)  # half of the tokens from the first tower stage on, a quarter from the second
TOWER_SCORE_ROWS = 256  # a quarter of the rows ranks as well as all on the small model (docs/quality.md), and scoring then costs a quarter
FIRST_TOWER_BLOCK = 2  # of stages by attention; never earlier: block 0's attention ranks no better than chance (docs/algorithm.md, section 4)


def preset_schedule(name: str, shape: ModelShape, keep: float, *, fingerprint: str | None = None) -> Schedule:
    """A named schedule whose average keep over decoder layers is at most ``keep``; its provenance says whether it was tuned. At keep 1 nothing is
    pruned, whatever the name.

    Args:
        fingerprint: of the model, for tuned ones.

    Raises:
        ScheduleError: an unknown name, ``keep`` outside (0, 1], a budget that whole tokens of 1024 cannot meet, or nothing tuned for it.
    """
    if name not in PRESET_NAMES:
        raise ScheduleError(f"unknown preset {name!r}; one of {', '.join(PRESET_NAMES)}")
    if not 0 < keep <= 1:
        raise ScheduleError(f"keep must be above 0 and at most 1, got {keep:g}")
    if keep * KEEP_UNIT < 1:
        raise ScheduleError(f"keep {keep:g} is below 1/{KEEP_UNIT}, the smallest that a schedule can express")
    if keep == 1:
        return unpruned_schedule()
    if name in TUNED:
        schedule = tuned_schedule(fingerprint, keep, tower=name == "tuned-tower")
        if schedule is None:
            keeps = ", ".join(f"{known:g}" for known in tuned_keeps(fingerprint))
            known_keeps = f"tuned are keeps {keeps}" if keeps else "for this model nothing is"
            raise ScheduleError(f"no preset {name!r} at keep {keep:g} ({known_keeps}); run vflow-export tune, and give its file as --schedule")
        return schedule
    if name in METHOD_PRESETS:
        from .methods import METHODS

        schedule = METHODS[name].schedule(shape, keep)
    else:
        schedule = PRESETS[name](shape, keep)
    return replace(schedule, provenance={"preset": name, "tuned": False})


def tuned_schedule(fingerprint: str | None, keep: float, *, tower: bool = False) -> Schedule | None:
    """The shipped schedule that was tuned for this model, average keep and part of the network; None where there is none."""
    return _tuned(fingerprint).get((keep, tower))


def tuned_keeps(fingerprint: str | None) -> tuple[float, ...]:
    """Average keeps for which schedules of this model are shipped, ascending."""
    return tuple(sorted({keep for keep, _ in _tuned(fingerprint)}))


def _tuned(fingerprint: str | None) -> dict[tuple[float, bool], Schedule]:
    """Shipped schedules of a model by the budget that they were tuned for: average keep, and whether prefill FLOPs were given too."""
    found = {}
    for path in sorted(TUNED_FOLDER.glob("*.json")):
        schedule = load_schedule(path)
        if schedule.model == fingerprint:
            budget = schedule.provenance["budget"]
            found[budget["keep"], "prefill_flops" in budget] = schedule
    return found


def tower_places(tower: TowerShape) -> tuple[int, ...]:
    """Blocks before which a stage by attention may stand: right behind one that looks at the whole image, and not behind the last such."""
    last = tower.ranking_block(tower.blocks - 1)
    return tuple(block for block in range(FIRST_TOWER_BLOCK, (last or 0) + 1) if tower.looks_everywhere(block - 1))


def _progressive(shape: ModelShape, keep: float) -> Schedule:
    return Schedule(stages=_three_stages(shape.decoder.layers, keep, FIRST_SHARE, 1 / FIRST_SHARE))


def _tower(shape: ModelShape, keep: float) -> Schedule:
    decoder = _progressive(shape, keep).stages
    first = next((stage.keep for stage in decoder if stage.layer == 0), KEEP_UNIT)
    open_places, places = tower_places(shape.tower), list[int]()
    for wished in (shape.tower.blocks // 8, 3 * shape.tower.blocks // 8):
        places += [place for place in open_places if place >= wished and place not in places][:1]
    tower = [Stage("tower", block, max(kept, first)) for block, kept in zip(places, TOWER_KEEPS, strict=False)]
    return Schedule(stages=_dropping((*tower, *decoder)), importance=Importance(score_rows=TOWER_SCORE_ROWS))


def _paper(shape: ModelShape, keep: float) -> Schedule:
    nearest = min(PUBLISHED, key=lambda published: abs(published - keep))
    first, second, threshold, cell = PUBLISHED[nearest]
    stages = _three_stages(shape.decoder.layers, keep, first / nearest, second)
    recycled = (replace(stage, recycle=cell) if stage.layer == 0 else stage for stage in stages)
    return Schedule(stages=tuple(recycled), importance=Importance(global_threshold=threshold))


def _three_stages(layers: int, keep: float, first: float, second: float) -> tuple[Stage, ...]:
    """Stages before layers 0, L/3 and 2L/3: ``first`` average keeps, ``second`` of that, and the last takes what the budget leaves."""
    starts = tuple(dict.fromkeys((0, layers // 3, 2 * layers // 3)))
    wished = (keep * first * KEEP_UNIT, keep * first * second * KEEP_UNIT, 0.0)
    keeps = spend_keep(layers, keep, starts, lambda number, least, most: wished[number])
    return _dropping([Stage("decoder", layer, value) for layer, value in zip(starts, keeps, strict=True)])


def _dropping(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages that drop something: others would be ranked for, merged and gathered all the same."""
    before = (KEEP_UNIT, *(stage.keep for stage in stages))
    return tuple(stage for stage, alive in zip(stages, before, strict=False) if stage.keep < alive)


PRESETS: dict[str, Callable[[ModelShape, float], Schedule]] = {"progressive": _progressive, "tower": _tower, "paper": _paper}
PRESET_NAMES = (*TUNED, *PRESETS, *METHOD_PRESETS)
