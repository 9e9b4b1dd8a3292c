"""Methods, presets and schedule files by name, made into candidates that ``evaluate`` can compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .evaluate import Candidate
from .methods import METHODS, Method
from .presets import PRESET_NAMES, preset_schedule
from .schedule import Schedule, ScheduleError, load_schedule
from .shape import ModelShape

__all__ = ["UNPRUNED", "method_candidates", "schedule_candidates"]

UNPRUNED = Method("unpruned", lambda shape, keep: Schedule())


def method_candidates(names: Sequence[str], keeps: Sequence[float], shape: ModelShape, fingerprint: str) -> tuple[list[Candidate], list[str]]:
    """Candidates of every method at every keep, the unpruned model first; and why some are left out.

    Args:
        names: of methods or presets; ``all`` stands for all of them, presets that are methods once.

    Raises:
        ScheduleError: an unknown name.
    """
    known = dict.fromkeys((*PRESET_NAMES, *METHODS))
    wanted = list(dict.fromkeys(name for asked in names for name in (known if asked == "all" else [asked])))
    for name in wanted:
        if name not in known:
            raise ScheduleError(f"unknown method {name!r}; one of {', '.join(known)}, or all")
    found, refused = [Candidate("unpruned", UNPRUNED, Schedule())] if wanted else [], []
    for keep in keeps:
        for name in wanted:
            try:
                found.append(_candidate(name, keep, shape, fingerprint))
            except ScheduleError as error:
                refused.append(f"{name} at keep {keep:g}: {error}")
    return found, refused


def schedule_candidates(paths: Iterable[Path], shape: ModelShape, fingerprint: str) -> list[Candidate]:
    """Candidates of schedule files, named after them.

    Raises:
        ScheduleError: a file that is none, or of another model.
    """
    candidates = []
    for path in paths:
        schedule = load_schedule(path)
        schedule.check(shape, fingerprint=fingerprint)
        candidates.append(Candidate(path.stem, UNPRUNED, schedule))
    return candidates


def _candidate(name: str, keep: float, shape: ModelShape, fingerprint: str) -> Candidate:
    if name not in METHODS:
        return Candidate(name, UNPRUNED, preset_schedule(name, shape, keep, fingerprint=fingerprint))
    method = METHODS[name]
    return Candidate(name, method, method.schedule(shape, keep), method.image_share(keep) if method.image_share else 1.0)
