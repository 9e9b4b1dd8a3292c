"""A front of quality against a resource, as files: a schedule a point, the numbers, and a plot where matplotlib is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .outputs import check_folder
from .plots import plot_lines
from .tune import MEASURES, FrontPoint, Measure, Resource

__all__ = ["COST_NAMES", "write_front"]

COST_NAMES = {"kv": "average keep (share of the visual KV cache)", "flops": "prefill FLOPs, share of the unpruned"}


def write_front(front: Sequence[FrontPoint], folder: Path, resource: Resource, measure: Measure) -> None:
    """Write ``front.json``, ``schedule-NN.json`` a point, cheapest first, and ``front.png``.

    Raises:
        ScheduleError: as ``check_folder``.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"schedule-{number:02d}.json" for number in range(len(front))]
    for name, point in zip(names, front, strict=True):
        point.schedule.save(folder / name)
    rows = [{"schedule": name, measure: point.value, "cost": point.cost} for name, point in zip(names, front, strict=True)]
    (folder / "front.json").write_text(json.dumps({"resource": resource, "points": rows}, indent=2) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        line = {"front": [(point.cost, point.value) for point in front]}
        plot_lines(line, folder / "front.png", cost=COST_NAMES[resource], quality=MEASURES[measure], title="Front of schedules")
