"""The serving table: rates are medians of rounds, percentiles are of all requests; and the whole runs on a small engine."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import DECODER_STAGES
from vflow.engines import Engine
from vflow.exporter.schedule import Schedule

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("measure_serving")
    sys.modules.pop("measure_serving", None)


def test_percentiles_are_values_that_have_been_seen(tool: Any) -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [tool.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert tool.percentile([3.0], 0.5) == tool.percentile([3.0], 0.99) == 3.0
    assert tool.percentile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_rates_stand_beside_the_first_engines(tool: Any) -> None:
    slow, fast = tool.Load((2.0, 2.0), 4.0, 8), tool.Load((1.0, 1.0), 2.0, 8)
    loads = {("out/a", 1): [slow, slow, fast], ("out/b", 1): [fast, fast, slow]}
    *_, first, second = tool.table(["out/a", "out/b"], {"out/a": 2, "out/b": 6}, loads)
    assert first == "| a | 2 | 1 | 0.5 | 1.00 | 2 | 2 | 2 |"
    assert second == "| b | 6 | 1 | 1 | 2.00 | 1 | 2 | 4 |"


def test_engines_are_measured_at_the_same_memory(build: Callable[..., Engine], random_checkpoint: Path) -> None:
    engines = [build(random_checkpoint, schedule) for schedule in (Schedule(), DECODER_STAGES)]
    options = ["--side", "224", "--slots", "4", "--clients", "1", "3", "--requests", "6", "--rounds", "1", "--max-new-tokens", "3", "--threads", "1"]
    command = [sys.executable, str(TOOLS / "measure_serving.py"), *(str(engine.path) for engine in engines), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if re.match(r"\| engine \| \d", line)]
    capacities = [sum(segment.layers * segment.capacity for segment in engine.segments) for engine in engines]
    assert [(int(row[1]), int(row[2])) for row in rows] == [(4, 1), (4, 3), (5, 1), (5, 3)] and 4 * capacities[0] // capacities[1] == 5
